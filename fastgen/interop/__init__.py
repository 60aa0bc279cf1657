"""fastgen among other libraries: their weights, classes and verbs."""
