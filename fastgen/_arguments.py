"""Checks of arguments: a wrong one is named, with what came and what was expected."""

from __future__ import annotations

import functools
import numbers
import operator
import os
import types
import typing
from typing import Any, Literal, Union

import torch

__all__ = ["check_device", "check_path", "check_types", "check_whole"]

_NAMES = {int: "an int", float: "a number", bool: "True or False", str: "a str", type(None): "None"}
_KINDS: dict[Any, Any] = {int: numbers.Integral, float: numbers.Real, bool: bool, str: str, type(None): type(None)}


def check_whole(name: str, value: Any, least: int | None = None) -> None:
    """TypeError unless ``value`` is an integer, ValueError if it is below ``least``."""
    try:
        operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an int, got {value!r}") from None
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_path(name: str, value: Any) -> None:
    """TypeError unless ``value`` can be a path; ``name`` says what else it may be."""
    if not isinstance(value, (str, os.PathLike)):
        raise TypeError(f"{name} must be a path, got {type(value).__name__}")


def check_device(device: torch.device | str | None) -> None:
    """ValueError unless ``device`` is one that can hold numbers, or None."""
    if device is None:
        return
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device must be such as 'cpu', 'cuda' or 'cuda:1', got {device!r}") from None
    if found.type == "meta":
        raise ValueError("device must be one that holds numbers, 'meta' has none")


def _fits(value: Any, kind: Any) -> bool:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, member) for member in args)
    if origin is Literal:
        return type(value) in {type(choice) for choice in args}  # which of them, a config says itself
    if origin is tuple:
        each = args[:1] * len(value) if isinstance(value, (tuple, list)) and args[-1:] == (...,) else args
        return isinstance(value, (tuple, list)) and len(each) == len(value) and all(map(_fits, value, each))
    if kind in _KINDS:
        return isinstance(value, _KINDS[kind]) and (kind is bool or not isinstance(value, bool))
    return True


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_describe, args)))
    if origin is Literal:
        return " or ".join(map(repr, args))
    if origin is tuple:
        one = _describe(args[0]).split()[-1]
        return f"a tuple of {one}s" if args[-1:] == (...,) else f"a tuple of {len(args)}"
    return _NAMES.get(kind, str(kind))


@functools.cache
def _hints(owner: type) -> dict[str, Any]:
    return typing.get_type_hints(owner)


def check_types(owner: type, values: typing.Mapping[str, Any]) -> None:
    """TypeError that names the first of ``values`` that does not fit its annotation in the class ``owner``."""
    for name, kind in _hints(owner).items():
        if name in values and not _fits(values[name], kind):
            raise TypeError(f"{name} must be {_describe(kind)}, got {values[name]!r}")
