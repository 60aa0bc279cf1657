"""A folder of shards, as ``fastgen sample --out FOLDER`` writes it: samples in several files, put together in the order of ids.

    folder/00000000-00004095.npz            samples 0 .. 4095: arrays x [N, ...], ids [N] and run
    folder/00004096-00004999.npz            likewise; or all .safetensors, whose header has the run

Shards may interleave (several processes that drew every second sample) and leave ids out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from fastgen.data.arrays import read_arrays, shape_text

__all__ = ["find_shards", "load_shards", "shard_name"]

_NAME = re.compile(r"(\d{8,})-(\d{8,})\.(npz|safetensors)")


def shard_name(ids: Sequence[int], kind: str) -> str:
    """The file of the samples ``ids``: ``00000000-00004095.npz``."""
    return f"{ids[0]:08d}-{ids[-1]:08d}.{kind}"


def find_shards(folder: Path) -> dict[Path, tuple[int, int]]:
    """The shards of a folder, sorted -> first and last id by their names."""
    found = {path: _NAME.fullmatch(path.name) for path in sorted(folder.iterdir())}
    return {path: (int(match[1]), int(match[2])) for path, match in found.items() if match}


def _read(path: Path, ends: tuple[int, int]) -> tuple[Tensor, Tensor, str]:
    """Samples, ids and run of a shard."""
    arrays = read_arrays(path)
    if path.suffix == ".safetensors":
        header = json.loads(arrays.pop("fastgen", "{}"))
        arrays.update({"run": header["run"]} if "run" in header else {})
    missing = [name for name in ("x", "ids", "run") if name not in arrays]
    if missing:
        raise ValueError(f"shard {path} has no {missing[0]}; it has: {', '.join(arrays) or 'nothing'}")
    x, ids = torch.as_tensor(arrays["x"]), torch.as_tensor(arrays["ids"])
    if ids.dim() != 1 or ids.is_floating_point() or x.dim() == 0 or len(x) != len(ids):
        raise ValueError(f"shard {path} has x {list(x.shape)} and ids {list(ids.shape)}, expected as many ids as samples")
    if len(ids) == 0 or (int(ids[0]), int(ids[-1])) != ends:
        held = f"{int(ids[0])} .. {int(ids[-1])}" if len(ids) else "none"
        raise ValueError(f"shard {path} holds ids {held}, not those of its name")
    return x, ids.long(), str(arrays["run"])


def load_shards(folder: Path) -> Tensor:
    """The samples of all shards in a folder, in the order of their ids: [N, ...].

    Raises:
        ValueError: a shard that is damaged, of another shape, dtype, kind or run than the first, or with an id that another has
            too; it is named.
    """
    parts: list[tuple[Tensor, Tensor]] = []
    first: tuple[Path, tuple[int, ...], torch.dtype, str] | None = None
    for path, ends in find_shards(folder).items():
        x, ids, run = _read(path, ends)
        if first is None:
            first = path, tuple(x.shape[1:]), x.dtype, run
        for what, here, there in (
            ("samples of shape", shape_text(x.shape[1:]), shape_text(first[1])),
            ("dtype", x.dtype, first[2]),
            ("run", run, first[3]),
            ("kind", path.suffix, first[0].suffix),
        ):
            if here != there:
                raise ValueError(f"shard {path} has {what} {here}, {first[0].name} beside it has {there}")
        parts.append((x, ids))
    if not parts:
        raise ValueError(f"{folder} has no shards")
    samples, ids = (torch.cat(column) for column in zip(*parts, strict=True))
    order = ids.argsort(stable=True)
    twice = ids[order][1:][ids[order].diff() == 0]
    if len(twice):
        holders = [path.name for path, (low, high) in find_shards(folder).items() if low <= int(twice[0]) <= high]
        raise ValueError(f"{folder} has sample {int(twice[0])} more than once, in {' and '.join(holders[:2])}")
    return samples if bool((ids.diff() > 0).all()) else samples[order]
