"""Sampling: one loop for all models, whose samples do not depend on how the work was cut up."""

from fastgen.sampling import images
from fastgen.sampling.loop import sample

__all__ = ["images", "sample"]
