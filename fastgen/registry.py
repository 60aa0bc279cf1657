"""Names: every model a user can ask for, as name -> (class, config).

A model file registers itself with :func:`register`; the families are imported on the first look-up, never at
``import fastgen``.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import pkgutil
from collections.abc import Callable
from typing import Any, TypeVar

from fastgen._arguments import check_whole
from fastgen.nn.model import Config, Model

__all__ = ["Entry", "create", "describe", "names", "register"]

_FAMILIES = ("autoencoders", "gans", "diffusion", "flows", "autoregressive", "energy", "classical")

M = TypeVar("M", bound=type[Model])


@dataclasses.dataclass(frozen=True)
class Entry:
    """One registered model.

    Attributes:
        name: what the user types.
        model: the class, called with one config.
        config: the config's dataclass.
        preset: config fields that this name sets differently from the dataclass's defaults.
        paper: "Authors (year), title", and where it is.
        data: the data set that suits the model: ``--data default``.
    """

    name: str
    model: type[Model]
    config: type[Config]
    preset: dict[str, Any]
    paper: str
    data: str

    @property
    def file(self) -> str:
        """Path of the model's file inside the repository."""
        return self.model.__module__.replace(".", "/") + ".py"

    @property
    def summary(self) -> str:
        """First line of the model's docstring."""
        return (self.model.__doc__ or "").strip().splitlines()[0]


_entries: dict[str, Entry] = {}


def register(name: str, *, config: type[Config], paper: str, data: str, **preset: Any) -> Callable[[M], M]:
    """Class decorator: make a model known under ``name``. A name can be taken once."""

    def add(model: M) -> M:
        if name in _entries:
            raise ValueError(f"model name {name!r} is taken by {_entries[name].model.__qualname__}")
        _entries[name] = Entry(name, model, config, preset, paper, data)
        return model

    return add


def _import_families() -> None:
    for family in _FAMILIES:
        try:
            package = importlib.import_module(f"fastgen.{family}")
        except ModuleNotFoundError as error:
            if error.name != f"fastgen.{family}":
                raise
            continue
        for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
            importlib.import_module(module.name)


def names() -> list[str]:
    """All model names, sorted."""
    _import_families()
    return sorted(_entries)


def describe(name: str) -> Entry:
    """The entry of a model name; ``ValueError`` with near misses where there is none."""
    known = names()
    if name not in _entries:
        near = difflib.get_close_matches(name, known, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else f"known: {', '.join(known)}"
        raise ValueError(f"unknown model {name!r}; {hint}")
    return _entries[name]


def create(name: str, **config: Any) -> Model:
    """A new model by name.

    Args:
        name: one of :func:`names`.
        **config: fields of the model's config; ``event_shape`` is required, everything else has the paper's default.
            ``features=D`` is short for ``event_shape=(D,)``.

    >>> create("vae", event_shape=(1, 28, 28), latent=2).event_shape
    (1, 28, 28)
    """
    entry = describe(name)
    fields = [f.name for f in dataclasses.fields(entry.config)]
    if "features" in config and "features" not in fields:
        if "event_shape" in config:
            raise ValueError(f"{name} takes features or event_shape, not both")
        check_whole("features", config["features"], 1)
        config = {**config, "event_shape": (config["features"],)}
        del config["features"]
    for option in config:
        if option not in fields:
            near = difflib.get_close_matches(option, fields, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(fields)}"
            raise ValueError(f"{name} has no option {option!r}; {hint}")
    if "event_shape" not in config:
        raise ValueError(f"{name} needs event_shape, the shape of one sample, such as (1, 28, 28)")
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in {**entry.preset, **config}.items()}
    return entry.model(entry.config(**values))
