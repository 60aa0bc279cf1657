"""Options that commands share; and ``--set key=value``: text to typed values, by the annotations of a config's dataclass
or of a ``sample`` method."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import inspect
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union

import typer

from fastgen.nn.model import Config, Model

__all__ = ["Device", "RunDirectory", "check_device", "config_types", "parse_settings", "parse_value", "sample_types"]

Device = Annotated[str | None, typer.Option(metavar="DEVICE", help="cpu, cuda, cuda:1, ...", show_default="the fastest")]
RunDirectory = Annotated[Path, typer.Argument(metavar="DIR", help="Run directory of `fastgen train`.", show_default=False)]

_WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


def _describe(kind: Any) -> str:
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        return " or ".join(_describe(a) for a in args)
    if origin is Literal:
        return " or ".join(str(a) for a in args)
    if origin is tuple:
        return f"{_describe(args[0])}s separated by commas"
    if kind is type(None):
        return "none"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _guess(text: str) -> Any:
    """The value of an option without annotation: JSON where it is JSON, else text."""
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def parse_value(text: str, kind: Any) -> Any:
    """``text`` as a value of the annotation ``kind``; ``ValueError`` where it is none.

    Understood: int, float, bool, str, None, Literal, unions of them, and tuples written ``64,64``.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any or kind is inspect.Parameter.empty:
        return _guess(text)
    if origin in (Union, types.UnionType):
        for member in sorted(args, key=lambda a: a is str):  # text fits anything: try it last
            with contextlib.suppress(ValueError):
                return parse_value(text, member)
    elif origin is Literal:
        for choice in args:
            if text == str(choice):
                return choice
    elif origin is tuple:
        inner = text.strip().removeprefix("(").removesuffix(")")
        parts = [p.strip() for p in inner.split(",") if p.strip()]
        if len(args) == 2 and args[1] is Ellipsis:
            return tuple(parse_value(p, args[0]) for p in parts)
        if len(parts) == len(args):
            return tuple(parse_value(p, a) for p, a in zip(parts, args, strict=True))
    elif kind is type(None):
        if text.lower() in ("none", "null"):
            return None
    elif kind is bool:
        if text.lower() in _WORDS:
            return _WORDS[text.lower()]
    elif kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    elif kind is str:
        return text
    else:
        return _guess(text)
    raise ValueError(f"expected {_describe(kind)}, got {text!r}")


def parse_settings(settings: Sequence[str], kinds: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """``["latent=2", "hidden=64,64"]`` -> ``{"latent": 2, "hidden": (64, 64)}``.

    Args:
        settings: the values of ``--set``.
        kinds: name of each known option -> annotation.
        owner: whose options they are, for the error.

    Raises:
        ValueError: not ``key=value``, an unknown key (near misses are named) or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for setting in settings:
        name, equals, text = setting.partition("=")
        name = name.strip().replace("-", "_")
        if not equals or not name:
            raise ValueError(f"--set takes key=value, got {setting!r}")
        if name not in kinds:
            near = difflib.get_close_matches(name, kinds, n=1)
            known = f"it has: {', '.join(kinds)}" if kinds else "it has none"
            raise ValueError(f"{owner} has no option {name!r}; {f'did you mean {near[0]!r}?' if near else known}")
        try:
            values[name] = parse_value(text, kinds[name])
        except ValueError as error:
            raise ValueError(f"--set {name}: {error}") from None
    return values


def config_types(config: type[Config]) -> dict[str, Any]:
    """Options of a model's config and their types; the shape of a sample comes from the data and is not among them."""
    hints = typing.get_type_hints(config)
    return {f.name: hints[f.name] for f in dataclasses.fields(config) if f.init and f.name != "event_shape"}


def sample_types(model: Model) -> dict[str, Any]:
    """Options of a model's ``sample`` and their types."""
    method = type(model).sample
    hints = typing.get_type_hints(method)
    parameters = list(inspect.signature(method).parameters.values())[2:]  # without self and n
    return {
        p.name: hints.get(p.name, Any)
        for p in parameters
        if p.name != "key" and p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD)
    }


def check_device(device: str | None) -> None:
    """``ValueError`` unless torch can put tensors on ``device``; None is fine."""
    if device is None:
        return
    import torch

    try:
        where = torch.device(device)
    except RuntimeError:
        raise ValueError(f"--device must be such as cpu, cuda or cuda:1, got {device!r}") from None
    if where.type == "meta":
        raise ValueError("--device must be one that holds numbers, meta has none")
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].strip()
        raise ValueError(f"--device {device} cannot be used: {reason}") from None
