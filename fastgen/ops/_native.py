"""The compiled CPU kernels: loaded on first use, one table of functions per instruction set.

A kernel takes its arguments flat, in the order of the C++ function: tensors (their memory; None is a null pointer), ints,
bools and floats. It checks nothing: the op does. ``FASTGEN_ISA`` = scalar | avx2 | avx512 | neon forces one set.

A :class:`Launch` is the call of a kernel described once: it reads sizes off the tensors and allocates the outputs, in C++ where
the tensors are plain, so that a call on a few numbers costs microseconds. A :class:`Record` makes an autograd function of two,
a :class:`Chain` one call of several.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch

__all__ = [
    "DTYPES",
    "Chain",
    "Launch",
    "Record",
    "applier",
    "available_isas",
    "current_isa",
    "kernel",
    "launch",
    "listening",
    "missing",
    "ready",
    "use_isa",
    "watched",
]

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Storage types of the kernels and their codes in ``csrc/simd.h``."""

_tables: dict[str, dict[str, Callable[..., None]]] | None = None
_table: dict[str, Callable[..., None]] = {}
_isa: str | None = None
_missing: str | None = None
_extension: Any = None


def _load() -> None:
    global _tables, _missing, _extension
    _tables = {}
    try:
        _extension = importlib.import_module("fastgen._C")
    except ImportError as error:
        _missing = f"fastgen._C cannot be imported ({error}); install with a C++ compiler to have the CPU kernels"
        return
    _tables = _extension.tables()  # fastest first
    wanted = os.environ.get("FASTGEN_ISA")
    if wanted and wanted not in _tables:
        _missing = f"FASTGEN_ISA={wanted} is not available here; available: {', '.join(_tables)}"
        return
    _select(wanted or next(iter(_tables)))


def _select(isa: str | None) -> None:
    global _isa, _table
    _isa = isa
    _table = _tables[isa] if _tables and isa else {}
    if _extension:
        _extension.use_isa(isa or "")


def missing() -> str | None:
    """None if the CPU kernels are loaded, else the reason why not."""
    if _tables is None:
        _load()
    return _missing


def ready() -> bool:
    """Whether there are CPU kernels to call; the cheap form of ``missing() is None``."""
    return bool(_table) or missing() is None


# What torch.compile takes as it stands instead of tracing it: nothing can be imported there. `assume_constant_result` sets this
# too, but importing it imports the compiler.
for _answer in (missing, ready):
    _answer.__dict__["_dynamo_marked_constant"] = True


def available_isas() -> list[str]:
    """Instruction sets that were compiled in and that this CPU has, fastest first."""
    missing()
    return list(_tables or {})


def current_isa() -> str | None:
    """The instruction set in use; None without the extension."""
    missing()
    return _isa


@contextlib.contextmanager
def use_isa(isa: str) -> Iterator[None]:
    """Force an instruction set within the block, for tests and benchmarks. Affects all threads."""
    if isa not in available_isas():
        raise ValueError(f"instruction set {isa!r} is not available here; available: {', '.join(available_isas())}")
    before = _isa
    _select(isa)
    try:
        yield
    finally:
        _select(before)


def add_table(isa: str, table: dict[str, Callable[..., None]]) -> None:
    """Offer kernels that run elsewhere, an emulator for one, under the name of an instruction set."""
    missing()
    if _tables is not None:
        _tables[isa] = table


@contextlib.contextmanager
def extra_table(isa: str, table: dict[str, Callable[..., None]]) -> Iterator[None]:
    """:func:`add_table` for the block alone."""
    add_table(isa, table)
    try:
        yield
    finally:
        (_tables or {}).pop(isa, None)


@contextlib.contextmanager
def watched() -> Iterator[dict[str, float]]:
    """Seconds that the kernels run within the block, by name; filled at its end. Not to be nested."""
    seconds: dict[str, float] = {}
    if not ready():
        yield seconds
        return
    _extension.restart_watch(True)
    try:
        yield seconds
    finally:
        seconds |= _extension.restart_watch(False)


@contextlib.contextmanager
def listening(told: Callable[..., None] | None) -> Iterator[None]:
    """Within the block, ``told(kernel, plan, args, made)`` after each kernel that this thread runs: by a :class:`Launch`, with
    its arguments and its outputs, or as it is, without a plan. None: nobody is told. Launches then expect one dispatch mode
    of PyTorch to be at work, that of the listener, instead of none.
    """
    if not ready():
        yield
        return
    before = _extension.listen(told)
    try:
        yield
    finally:
        _extension.listen(before)


@functools.cache
def launch(name: str, plan: str) -> Callable[..., Any]:
    """:meth:`Launch.attempt` of a plan, as a function."""
    return _extension.launch((name, plan))


def kernel(name: str) -> Callable[..., Any]:
    """The CPU kernel of a name, for the instruction set in use."""
    ready()
    return _table[name]


class Launch:
    """The call of one kernel on tensors, by a plan of one word per argument of the kernel.

    The first tensor given says what the others are like: its first dimension counts samples, its second channels.

    ======================  =============================================================================================
    word                    argument of the kernel
    ======================  =============================================================================================
    dtype, rows, event      storage code of the first tensor, its samples, the elements of one
    channels, pixels        the channels of the first tensor, the elements of one of them in one sample
    height, width           the last two of the four dimensions of the first tensor
    last                    0, or the channels of the first tensor where they lie last in memory: see below
    own                     the channels of the first tensor, which must lie last in memory, as must beside and image
    bins                    the last dimension of the tensors that are binned
    threads, null, 0 ..     PyTorch's number of threads; a null pointer; the whole number as it stands
    like, wide, row         a tensor given by the caller: as the first; its shape in float32; [samples] in float32
    like?                   the same as like, or None
    beside                  as the first but for its channels, which follow those of the first: "channels" counts both
    binned, knots           the first tensor's shape and one more dimension, that of the bins or of the knots between them
    weights                 [samples] or [] in float32, and its number of dimensions: two arguments
    history                 [H, ...], H tensors like the first, and H: two arguments
    table4                  coefficients in float32, [4] or [samples, 4], and the distance of two rows, 0 or 4: two arguments
    table5                  the same with 5 + H columns, H being that of the history before it
    key                     a key, [4] or [samples, 4], and its number of rows: two arguments
    pair1                   two tensors of any one storage type, each [channels], and before them its code: three arguments
    pair2                   the same, each [samples, channels]
    groups                  a whole number given by the caller that divides the channels
    grouped                 [samples, groups, 3] in float32
    parts1, parts2          [samples, P, 3, channels] in float32 of the first and of the one beside it, and P: two arguments
    norm                    [samples, 3, channels] in float32
    outputs, doubled        a whole number and a bool: the channels of the image that is made, and whether it has twice the
                            height and the width of the first
    bias                    [outputs], [1, outputs] or [samples, outputs], rows anywhere, and their distance or 0: two arguments
    image                   as the image that is made
    side                    a whole number, the height of what counts as one part of the image that is made
    memory                  a tensor in any type and shape: that it is what the kernel expects, the caller knows
    flag, number            a bool, a float given by the caller
    >like, >wide, >row ..   the same (like, binned, knots, wide, row, grouped, norm, image), allocated here and returned
    >parts                  [samples, parts, 3, outputs] in float32, allocated here and returned
    >pair1, >pair2          the same for those of the pair that are there, and None for the others: two arguments
    >first                  the first tensor given, written over and returned
    ======================  =============================================================================================

    A tensor given may be None, a null pointer, unless the word is like, binned, knots, grouped or a table. The caller gives
    dense tensors on the CPU that fit, in the order of their dimensions; where the plan has the word last, the first tensor may
    lie channels last, and like, like? and wide lie as it does. Without the word dtype all is float32. Gradients are recorded
    for like, like?, beside, binned, knots, history, pairs, norm, bias and image: all else is a constant for autograd.
    """

    def __init__(self, name: str, plan: str) -> None:
        self.name, self.words = name, plan.split()

    def attempt(self, *args: Any) -> Any:
        """The outputs, as a tuple, if every tensor is plain: dense, on the CPU, as the plan says, no mode at work.

        It asks every question itself, so that its caller needs to ask none: None sends the caller the long way, and False says
        that all would be well, but autograd has a gradient to record. Nothing has been done in either case.
        """
        if not ready():
            return None
        self.attempt = launch(*self.description)  # type: ignore[method-assign]
        return self.attempt(*args)

    @property
    def description(self) -> tuple[str, str]:
        """The kernel's name and the plan."""
        return self.name, " ".join(self.words)

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        """The outputs, as a tuple."""
        return self.attempt(*args) or self._spelled_out(*args)

    def _spelled_out(self, *args: Any) -> tuple[Any, ...]:
        """The same for kernels that run elsewhere, and for whatever else memory can be had of."""
        first, given = args[0], iter(args)
        outputs: list[Any] = []
        flat: list[Any] = []
        rows, channels = first.shape[0], first.shape[1] if first.dim() > 1 else 0
        fixed: dict[str, Any] = {"dtype": DTYPES[first.dtype], "rows": rows, "event": math.prod(first.shape[1:])}
        fixed |= {"channels": channels, "pixels": math.prod(first.shape[2:]), "last": 0 if first.is_contiguous() else channels}
        fixed |= {"threads": torch.get_num_threads(), "null": None, "own": channels}
        fixed |= dict(zip(("height", "width"), first.shape[2:], strict=False))
        split: dict[str, Any] = {}
        pairs: dict[str, list[Any]] = {}
        groups, side, image = 0, 1, [rows, 0, *first.shape[2:]]
        for word in self.words:
            if word in fixed or word.isdecimal():
                flat.append(fixed[word] if word in fixed else int(word))
            elif word == "bins":
                flat.append(None)  # the last of the plan's sizes to be known
            elif word[1:] in split:
                outputs.append(torch.empty_like(split[word[1:]]))
                flat.append(outputs[-1])
            elif word[1:] in pairs:
                made = [None if value is None else torch.empty_like(value) for value in pairs[word[1:]]]
                outputs += made
                flat += made
            elif word == ">first":
                outputs.append(first)
                flat.append(first)
            elif word in (">row", ">grouped"):
                outputs.append(first.new_empty((rows, groups, 3) if word == ">grouped" else rows, dtype=torch.float32))
                flat.append(outputs[-1])
            elif word == ">norm":
                outputs.append(first.new_empty(rows, 3, channels))
                flat.append(outputs[-1])
            elif word == ">parts":
                outputs.append(first.new_empty(rows, -(-image[2] // side), 3, image[1]))
                flat.append(outputs[-1])
            elif word == ">image":
                outputs.append(torch.empty(image, dtype=first.dtype, memory_format=torch.channels_last))
                flat.append(outputs[-1])
            elif word in (">like", ">wide"):
                outputs.append(torch.empty_like(first, dtype=torch.float32 if word == ">wide" else None))
                flat.append(outputs[-1])
            elif word in ("pair1", "pair2"):
                pairs[word] = [next(given), next(given)]
                flat += [next((DTYPES[value.dtype] for value in pairs[word] if value is not None), 0), *pairs[word]]
            else:
                value = next(given)
                flat.append(value)
                if word in ("binned", "knots"):
                    split[word] = value
                if word == "groups":
                    groups = value
                if word == "beside" and value is not None:
                    channels += value.shape[1]
                    flat[self.words.index("channels")] = channels
                if word in ("parts1", "parts2"):
                    flat.append(0 if value is None else value.shape[1])
                if word == "side":
                    side = value
                if word == "outputs":
                    image[1] = value
                if word == "doubled" and value:
                    image[2:] = (2 * size for size in image[2:])
                if word == "bias":
                    flat.append(value.stride(0) if value is not None and value.dim() == 2 and len(value) > 1 else 0)
                if word == "key":
                    flat.append(0 if value is None else value.numel() // 4)
                elif word == "weights":
                    flat.append(0 if value is None else value.dim())
                elif word == "history":
                    flat.append(0 if value is None else len(value))
                elif word in ("table4", "table5"):
                    flat.append(0 if value.dim() == 1 else value.shape[1])
        if split:
            flat[self.words.index("bins")] = split["binned"].shape[-1]
        kernel(self.name)(*flat)
        return tuple(outputs)


class Chain:
    """Launches one after the other, without Python code in between.

    Args:
        steps: of each the launch and what it is given, a word each: "a0" the first argument of the chain, "r1" the first output
            of its second launch, "s1" the second; "true", "false", "none".
    """

    def __init__(self, *steps: tuple[Launch, str]) -> None:
        self._steps = steps

    def attempt(self, *args: Any) -> Any:
        """The outputs of the last launch, as a tuple; None where one would take the long way, or there are gradients."""
        if not ready():
            return None
        made = _extension.chain([launch.description for launch, _ in self._steps], [takes for _, takes in self._steps])
        self.attempt = made  # type: ignore[method-assign]
        return self.attempt(*args)


def applier(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` for arguments that a :class:`Launch` has seen: no transform of functorch is active.

    It skips the search for what those have wrapped, which costs more than a small kernel.
    """
    return super(torch.autograd.Function, function).apply  # type: ignore[misc]


class Record:
    """A :class:`torch.autograd.Function` made of launches: no Python code runs between PyTorch and the kernels.

    Args:
        plain: the launch where there is no gradient to record.
        forward: the launch where there is, given the same; it may put out more, to be kept.
        backward: the launch of the backward pass.
        takes: what ``backward`` is given, a word each: "i0" the first argument of ``forward``, "o2" its third output, "g1" the
            gradient of its second output, "n3" its fourth argument, a number. The first two kinds are what is saved, in this
            order.
        gives: the gradients of the arguments of ``forward``, from the first on: "o0" the first output of ``backward``, "g0" the
            gradient of the first output as it came. Those left out get none.
        returns: how many outputs of ``forward`` the caller sees.
        longer: ``longer(ctx, *grads)``, the backward pass in Python, what was saved in ``ctx.saved_tensors``: for gradients
            that are not dense, and where the backward pass is to be differentiated. The numbers are in ``ctx.remembered``.
        final: the launch of the backward pass where the graph is not kept for another: it may write over what ``forward`` put
            out and saved, which nobody will read again.
    """

    def __init__(
        self,
        plain: Launch,
        forward: Launch,
        backward: Launch,
        *,
        takes: str,
        gives: str,
        returns: int,
        longer: Callable[..., tuple[Any, ...]],
        final: Launch | None = None,
    ) -> None:
        self._launches, self._rest = (plain, forward, backward, final or backward), (returns, takes, gives)
        self._longer = longer

    def _apply_of(self, forward: Callable[..., Any], backward: Callable[..., Any]) -> Callable[..., Any]:
        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        return applier(type(self._launches[1].name, (torch.autograd.Function,), members))

    def attempt(self, *args: Any) -> Any:
        """The outputs, as a tuple, if every tensor is plain, recorded for autograd where it is on and a gradient is wanted.

        None sends the caller the long way: nothing has been done then. See :meth:`Launch.attempt`.
        """
        if not ready():
            return None
        descriptions = (launch.description for launch in self._launches)
        made = _extension.record(*descriptions, *self._rest, self._apply_of, self._longer)
        self.attempt = made  # type: ignore[method-assign]
        return self.attempt(*args)
