"""fastgen: generative models whose hot paths are fused kernels.

``import fastgen`` needs torch alone and imports nothing else; every public name below is looked up on first use.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "create": "fastgen.registry",
    "evaluate": "fastgen.metrics",
    "explain": "fastgen.ops",
    "fit": "fastgen.training",
    "load": "fastgen.training",
    "sample": "fastgen.sampling",
    "use_backend": "fastgen.ops",
    "use_math": "fastgen.ops",
}
_MODULES = ("data", "interop", "metrics", "nn", "ops", "random", "registry", "sampling", "training")

__all__ = [*_PUBLIC, *_MODULES]  # noqa: PLE0604 - the names are strings, made from the tables above


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"fastgen.{name}")
    raise AttributeError(f"module 'fastgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
