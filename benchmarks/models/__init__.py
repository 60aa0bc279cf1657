"""Whole models against the libraries that have them: ``python -m benchmarks.models``."""
