"""Data: named sets that need no download, toy densities, folders of images, arrays, and anything from Python.

>>> from fastgen import data
>>> data.load("checkerboard", split="test").event_shape
(2,)
"""

from fastgen.data.arrays import check_samples
from fastgen.data.catalogue import Entry, as_source, describe, load, names
from fastgen.data.folder import FolderSource, ImageFiles
from fastgen.data.glyphs import load_glyphs
from fastgen.data.source import ArraySource, DatasetSource, Source, StreamSource
from fastgen.data.toy import ToyDensity, ToySource, toy

__all__ = [
    "ArraySource",
    "DatasetSource",
    "Entry",
    "FolderSource",
    "ImageFiles",
    "Source",
    "StreamSource",
    "ToyDensity",
    "ToySource",
    "as_source",
    "check_samples",
    "describe",
    "load",
    "load_glyphs",
    "names",
    "toy",
]
