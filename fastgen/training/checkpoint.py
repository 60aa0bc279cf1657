"""Checkpoints: safetensors files that are whole or not there.

Every file of a run is written under a temporary name in its own folder, forced to disk, and then renamed over the old
one, so that a process killed at any instant leaves the last good file. The temporary name is fixed per file: whatever
a kill leaves behind is overwritten by the next write, or removed by :func:`remove_leftovers`.

Tensors go to safetensors, everything else to JSON in the same file's header. Nothing is pickled.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

__all__ = [
    "load_weights",
    "read",
    "read_meta",
    "remove_leftovers",
    "restore_optimizer",
    "store_optimizer",
    "write",
    "write_atomic",
]

_META = "fastgen"


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.tmp")


def _force_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, content: bytes | Callable[[Path], object], *, durable: bool = True) -> None:
    """Make ``path`` hold ``content``: all of it, or what was there before.

    Args:
        path: the file; its folder must exist.
        content: the bytes, or a function that writes them to the path it is given.
        durable: wait until the disk has them. Without it the file is still never seen half written, but a power cut
            may lose it; meant for thousands of small files.
    """
    temporary = _temporary(path)
    try:
        if isinstance(content, bytes):
            temporary.write_bytes(content)
        else:
            content(temporary)
    except OSError as error:
        if error.filename != str(temporary):
            raise
        raise type(error)(error.errno, error.strerror, str(path)) from error  # the name that the caller knows
    if durable:
        _force_to_disk(temporary)
    os.replace(temporary, path)
    if durable:
        _force_to_disk(path.parent)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed writer may have left in ``folder``."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def write(path: Path, tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> None:
    """Write tensors, and JSON values ``meta`` in the header, as one safetensors file, atomically."""
    plain: dict[str, Tensor] = {}
    storages = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage().data_ptr()
        # safetensors takes no two names for one storage (tied weights): they are written twice.
        plain[name] = tensor.clone() if storage in storages else tensor
        storages.add(storage)
    # Not save_file: that writes through a temporary file with a random name, which a kill leaves behind.
    write_atomic(path, save(plain, metadata={_META: json.dumps(meta)}))


def _open(path: Path) -> Any:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing")
    try:
        return safe_open(path, "pt")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or corrupt ({error})") from None


def read_meta(path: Path) -> dict[str, Any]:
    """The JSON values that :func:`write` put into the header; ``{}`` in a safetensors file of another origin.

    Raises:
        FileNotFoundError, ValueError: the file is missing; truncated or corrupt.
    """
    with _open(path) as file:
        return json.loads((file.metadata() or {}).get(_META, "{}"))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors (on the CPU) and the JSON values of a file that :func:`write` wrote.

    Raises:
        FileNotFoundError, ValueError: the file is missing; truncated or corrupt.
    """
    with _open(path) as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - the file is no mapping
        return tensors, json.loads((file.metadata() or {}).get(_META, "{}"))


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], source: Path) -> None:
    """``module.load_state_dict`` with one line for what does not fit.

    Raises:
        ValueError: names the first tensor that is missing, not known, or of another shape.
    """
    own = module.state_dict()
    for name, value in own.items():
        if name not in tensors:
            raise ValueError(f"{source} does not fit the model: it has no tensor {name!r}")
        if tensors[name].shape != value.shape:
            raise ValueError(
                f"{source} does not fit the model: {name} has shape {tuple(tensors[name].shape)}, "
                f"the model's is {tuple(value.shape)}"
            )
    for name in tensors:
        if name not in own:
            raise ValueError(f"{source} does not fit the model: it has a tensor {name!r} that the model lacks")
    module.load_state_dict(dict(tensors))


def store_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], prefix: str
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The state of any optimiser as tensors named ``prefix/parameter/key`` and JSON values.

    Args:
        optimizer: its hyper-parameters must be JSON values or tensors.
        names: name of each of its parameters.
        prefix: starts every tensor's name.
    """
    state = optimizer.state_dict()
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors: dict[str, Tensor] = {}

    def split(values: Mapping[str, Any], owner: str) -> dict[str, Any]:
        plain = {}
        for key, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"{prefix}/{owner}/{key}"] = value
            else:
                plain[key] = value
        return plain

    values = {}
    for index, entries in state["state"].items():
        name = names[parameters[index]]
        values[name] = {"tensors": [k for k, v in entries.items() if isinstance(v, Tensor)], **split(entries, name)}
    groups = [
        {"tensors": [k for k, v in group.items() if isinstance(v, Tensor)], **split(group, f"group {i}")}
        for i, group in enumerate(state["param_groups"])
    ]
    return tensors, {"state": values, "param_groups": groups}


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[nn.Parameter, str],
    prefix: str,
    tensors: Mapping[str, Tensor],
    meta: Mapping[str, Any],
) -> None:
    """Undo :func:`store_optimizer` through the optimiser's own ``load_state_dict``."""

    def join(values: Mapping[str, Any], owner: str) -> dict[str, Any]:
        found = {key: tensors[f"{prefix}/{owner}/{key}"] for key in values["tensors"]}
        return {**{k: v for k, v in values.items() if k != "tensors"}, **found}

    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {index: join(meta["state"][names[p]], names[p]) for index, p in enumerate(parameters) if names[p] in meta["state"]}
    groups = []
    for i, (stored, current) in enumerate(zip(meta["param_groups"], optimizer.param_groups, strict=True)):
        group = join(stored, f"group {i}")
        # JSON has no tuples: give back those that the optimiser made (Adam's betas).
        groups.append({k: tuple(v) if isinstance(current.get(k), tuple) else v for k, v in group.items()})
    optimizer.load_state_dict({"state": state, "param_groups": groups})
