"""The sampling loop: any model, any number of samples, to memory or to disk.

Sample i of a seed is drawn at index i of ``key(seed, stream=Stream.SAMPLE)``: its noise depends on the seed and on i,
never on how many are drawn with it, in which batches, or by which process.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import operator
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from tqdm import tqdm

from fastgen import random
from fastgen._arguments import check_device, check_path, check_whole
from fastgen.data import ImageFiles
from fastgen.nn.model import Model
from fastgen.sampling.writers import Format, Writer, open_writer
from fastgen.training.run import load

__all__ = ["sample"]

_IMAGES = {"init", "inpaint", "mask"}
"""Options that may be paths of images."""


def _check_ids(n: int | None, ids: Iterable[int] | None) -> Sequence[int]:
    if (n is None) == (ids is None):
        raise ValueError("give n, the number of samples, or ids, their indices: one of the two")
    if ids is None:
        check_whole("n", n, 1)
        return range(cast(int, n))
    if not isinstance(ids, Iterable):
        raise TypeError(f"ids must be indices of samples, such as range(8), got {ids!r}")
    chosen: Sequence[int] = ids if isinstance(ids, range) else list(ids)
    if not isinstance(ids, range):
        for i in chosen:
            check_whole("each of ids", i)
        chosen = [operator.index(i) for i in chosen]
    if len(chosen) == 0:
        raise ValueError("ids is empty: there is nothing to sample")
    for i in (min(chosen), max(chosen)):
        if not 0 <= i < 1 << 56:
            raise ValueError(f"ids must be in 0 .. 2**56 - 1, got {i}")
    return chosen


def _check_options(model: Model, options: dict[str, Any]) -> None:
    parameters = inspect.signature(model.sample).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = [name for name in list(parameters)[1:] if name != "key"]
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            has = f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(known) or 'none'}"
            raise ValueError(f"{type(model).__name__}.sample has no option {name!r}; {has}")


def _open_images(model: Model, options: dict[str, Any]) -> dict[str, Any]:
    """The options, with images in place of paths to them."""
    opened = dict(options)
    for name in _IMAGES & options.keys():
        if isinstance(options[name], (str, Path)):
            shape = (1, *model.event_shape[1:]) if name == "mask" else model.event_shape
            opened[name] = ImageFiles(options[name], shape)
    return opened


def _run_name(model: Model, seed: int, micro_batch: int | None, options: dict[str, Any]) -> str:
    """A name for all that a sample depends on, but for its id: weights, seed and options."""
    digest = hashlib.sha256(f"{type(model).__qualname__} {model.config} {seed} {micro_batch}".encode())

    def feed(value: Any) -> None:
        if isinstance(value, Tensor):
            digest.update(f"{value.dtype}{list(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, ImageFiles):
            for path in value.paths:
                digest.update(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}".encode())
        else:
            digest.update(getattr(value, "__qualname__", repr(value)).encode())

    for name, value in [*model.state_dict().items(), *sorted(options.items())]:
        digest.update(f"\n{name}=".encode())
        feed(value)
    return digest.hexdigest()[:32]


def _blocks(ids: Sequence[int], size: int) -> Iterator[tuple[int, list[int], list[int]]]:
    """Blocks of ``size`` neighbouring samples that hold ``ids``: block, places in it, places in ``ids``.

    The last block that was used is kept open, so runs of neighbouring ids share one whatever their order.
    """
    block = -1
    within: list[int] = []
    where: list[int] = []
    for position, i in enumerate(ids):
        if i // size != block:
            if where:
                yield block, within, where
            block, within, where = i // size, [], []
        within.append(i % size)
        where.append(position)
    yield block, within, where


def _draw(
    model: Model, ids: Sequence[int], key: Tensor, batch_size: int, micro_batch: int | None, options: dict[str, Any]
) -> Iterator[tuple[Sequence[int], Tensor]]:
    """Samples in the order of ``ids``, as (their ids, [B, *event_shape])."""
    if micro_batch is not None:
        for block, within, where in _blocks(ids, micro_batch):
            x = model.sample(micro_batch, key=random.at(key, sample=block * micro_batch), **options)
            yield ids[where[0] : where[-1] + 1], x if within == list(range(micro_batch)) else x[within]
        return
    for first in range(0, len(ids), batch_size):
        chosen = ids[first : first + batch_size]
        if list(chosen) == list(range(chosen[0], chosen[0] + len(chosen))):
            batch_key = random.at(key, sample=chosen[0])
        else:
            rows = torch.tensor(list(chosen), device=key.device)[:, None]
            batch_key = torch.cat([key[:3].expand(len(chosen), 3), rows], dim=1)
        yield chosen, model.sample(len(chosen), key=batch_key, **options)


def sample(
    model_or_dir: Model | str | Path,
    n: int | None = None,
    *,
    ids: Iterable[int] | None = None,
    seed: int = 0,
    batch_size: int = 64,
    micro_batch: int | None = None,
    out: str | Path | None = None,
    format: Format | None = None,
    shard_size: int | None = None,
    resume: bool = False,
    device: torch.device | str | None = None,
    progress: bool = False,
    **options: Any,
) -> Tensor | Path:
    """Draw samples.

    The noise of sample i is a function of ``seed`` and i alone. The samples may still differ in their last bits with
    the batch size, since networks sum in another order; ``micro_batch`` takes that away too.

    Args:
        model_or_dir: a model, or a run directory of :func:`fastgen.fit`.
        n: draw samples 0 .. n-1.
        ids: draw these instead: ``range(a, b)`` redraws a part of a run, ``range(rank, n, world)`` shards it.
        seed: any 64-bit integer.
        batch_size: samples drawn at a time.
        micro_batch: the network always sees exactly this many samples, sample i at place ``i % micro_batch`` among the
            same neighbours, so that it has the same bits in every run on the same machine. Blocks are computed whole:
            shards should be contiguous and end at multiples of it.
        out: None for a tensor; ``FILE.png`` (a grid of images, a scatter of 2-D points), ``FILE.npz`` (array ``x``),
            ``FILE.safetensors`` (tensor ``x``), or a folder.
        format: of the files in a folder: "png", one per image, named by its id; "npz" or "safetensors", shards named by
            their first and last id (arrays ``x``, float32, and ``ids``). None: PNG for images, else npz.
        shard_size: samples in a shard; None: as many as make 64 MB.
        resume: leave out the files that an interrupted or shorter run of the same weights, seed and options has written; its
            last shard, where that is not full, is written anew. With ``micro_batch`` the result has the same bits as a run at
            one go.
        device: where to draw; None for the model's device, for a directory CUDA where there is one, else the CPU.
        progress: show a bar on stderr.
        **options: of the model's ``sample``. Images to start from (``init``), to complete (``inpaint``) and masks (``mask``,
            white where to paint) may also be paths of an image or a folder of them; sample i takes number i mod their count.

    Returns:
        The samples [n, *event_shape] in the order of ``ids``, on the model's device; or the path of ``out``.

    Raises:
        ValueError: an argument or option that cannot be used, named.
        ModuleNotFoundError: ``out`` needs a package that is not installed.
    """
    chosen = _check_ids(n, ids)
    for name, value in (("batch_size", batch_size), ("micro_batch", micro_batch)):
        if value is not None:
            check_whole(name, value, 1)
    check_whole("seed", seed)
    check_device(device)
    if out is not None:
        check_path("out", out)
    if not isinstance(model_or_dir, Model):
        check_path("model_or_dir, unless it is a model,", model_or_dir)
    if isinstance(model_or_dir, Model):
        model = model_or_dir if device is None else model_or_dir.to(device)
    else:
        model = load(model_or_dir, device=device)
    _check_options(model, options)
    options = _open_images(model, options)
    key = random.key(seed, stream=random.Stream.SAMPLE, device=model.device)
    run_name = functools.partial(_run_name, model, seed, micro_batch, options)
    unit = " images" if len(model.event_shape) == 3 else " samples"
    was_training = model.training
    model.eval()
    try:
        with (
            torch.no_grad(),
            open_writer(
                out, model.event_shape, chosen, format=format, shard_size=shard_size, resume=resume, run=run_name
            ) as writer,
            tqdm(
                total=len(chosen),
                initial=len(chosen) - len(writer.pending),
                unit=unit,
                desc="sample",
                disable=not progress,
                dynamic_ncols=True,
            ) as bar,
        ):
            if len(writer.pending):
                _run(_draw(model, writer.pending, key, batch_size, micro_batch, options), writer, bar, model)
            return writer.finish()
    finally:
        model.train(was_training)


def _run(batches: Iterator[tuple[Sequence[int], Tensor]], writer: Writer, bar: Any, model: Model) -> None:
    begin, asked = time.perf_counter(), getattr(model, "evaluations", None)
    for ids, x in batches:
        if tuple(x.shape) != (len(ids), *model.event_shape):
            raise ValueError(
                f"{type(model).__name__}.sample gave shape {tuple(x.shape)}, expected {(len(ids), *model.event_shape)}"
            )
        writer.add(ids, x)
        if asked is not None:
            rate = (cast(Any, model).evaluations - asked) / (time.perf_counter() - begin)
            bar.set_postfix_str(f"{rate:,.1f} evaluations/s", refresh=False)
        bar.update(len(ids))
