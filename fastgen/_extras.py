"""Optional packages: imported, or searched for bundled files, at first use; a missing one gives one clear line."""

from __future__ import annotations

import importlib
import importlib.util
from pathlib import Path
from typing import Any

__all__ = ["bundled_file", "require"]


def _missing(package: str, extra: str, purpose: str) -> ModuleNotFoundError:
    return ModuleNotFoundError(f"{purpose} needs {package}: pip install 'fastgen-torch[{extra}]'", name=package)


def require(module: str, *, package: str, extra: str, purpose: str) -> Any:
    """Import ``module`` of ``package``; ``ModuleNotFoundError`` says what it is for and how to install it."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise _missing(package, extra, purpose) from error


def bundled_file(module: str, *parts: str, package: str, extra: str, purpose: str) -> Path:
    """Path of a file inside an installed package, found without importing the package."""
    spec = importlib.util.find_spec(module)
    if spec is None or not spec.submodule_search_locations:
        raise _missing(package, extra, purpose)
    path = Path(spec.submodule_search_locations[0], *parts)
    if not path.exists():
        raise FileNotFoundError(f"{purpose} needs {path}, which this version of {package} does not have")
    return path
