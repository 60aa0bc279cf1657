"""Replay: a network's calls on inputs that are alike, as one straight function of kernels.

A network of a hundred layers runs thousands of lines of Python between its kernels, and these work through more memory than the
caches hold: every line is met in slow memory, again in every call. What a network does is the same wherever shapes are. So the
second call on inputs of a kind is written down, operator by operator and launch by launch, as a Python function with a line for
each, and further calls are calls of that function. It keeps no memory but the network's own: what is made on the way is
allocated anew and freed after its last use.
"""

from __future__ import annotations

import copy
import functools
import inspect
import itertools
import linecache
import math
import weakref
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastgen.ops import _dispatch, _native

__all__ = ["Replay", "UnrepeatableError", "write_down"]


class UnrepeatableError(Exception):
    """The call depends on more than the kind of its arguments, or does what cannot be seen."""


class _Line(NamedTuple):
    """``names = call(takes)``"""

    names: frozenset[str]
    takes: frozenset[str]
    text: str
    changes: bool
    """Whether it writes to what it takes, so that it stays although nobody wants its results."""


class _Name(str):
    """Of a variable in the lines."""


class _Mark(NamedTuple):
    """What a tensor carries that has a name. To keep the tensors by name instead would be to keep their memory."""

    writer: object
    name: _Name
    root: _Name | None
    """Of the tensor made by a line whose memory this one looks at; None where that is the caller's, who may lay it out anew."""


class _Writer(TorchDispatchMode):
    """Writes down what happens while it is on: PyTorch's operators as a dispatch mode, launches as their listener."""

    def __init__(self, inputs: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.lines: list[_Line] = []
        self.constants: dict[str, Any] = {}
        self._spelled: dict[int, str] = {}  # by id; the constants live as long
        self._me = object()
        self._names = set(inputs)
        for name, tensor in inputs.items():
            tensor._mark = _Mark(self._me, _Name(name), None)  # type: ignore[attr-defined]

    def _new(self, kind: str) -> _Name:
        number = len(self._names)
        while f"{kind}{number}" in self._names:
            number += 1
        self._names.add(name := _Name(f"{kind}{number}"))
        return name

    def mark_of(self, tensor: Tensor) -> _Mark | None:
        """None for a tensor that was there before."""
        mark = getattr(tensor, "_mark", None)
        return mark if mark is not None and mark.writer is self._me else None

    def knows(self, value: Any) -> bool:
        return isinstance(value, Tensor) and self.mark_of(value) is not None

    def name(self, tensor: Tensor, root: _Name | None = None, *, own: bool = False) -> _Name:
        """A new name; ``own``: the tensor is its own root."""
        name = self._new("t")
        tensor._mark = _Mark(self._me, name, name if own else root)  # type: ignore[attr-defined]
        return name

    def _constant(self, value: Any, kind: str = "c") -> str:
        """The name of what is there already."""
        if id(value) not in self._spelled:
            self._spelled[id(value)] = name = self._new(kind)
            self.constants[name] = value
        return self._spelled[id(value)]

    def _spell(self, value: Any, takes: set[str]) -> str:
        """An argument as it stands in a line; ``takes`` collects the names in it."""
        mark = self.mark_of(value) if isinstance(value, Tensor) else None
        if mark is not None or isinstance(value, _Name):
            takes.add(name := str(mark.name if mark else value))
            return name
        if isinstance(value, list | tuple):
            items = "".join(f"{self._spell(item, takes)}, " for item in value)
            return f"[{items}]" if isinstance(value, list) else f"({items})"
        literal = value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value))
        return repr(value) if literal else self._constant(value)

    def _write(
        self, made: Any, call: Any, *args: Any, called: str, changes: bool = False, otherwise: str = "", **kwargs: Any
    ) -> None:
        """The line ``made = call(*args, **kwargs)``; all tensors in ``made`` have names."""
        takes: set[str] = set()
        given = [self._spell(value, takes) for value in args]
        given += [f"{name}={self._spell(value, takes)}" for name, value in kwargs.items()]
        several = isinstance(made, list | tuple)
        marks = [self.mark_of(value) if isinstance(value, Tensor) else None for value in (made if several else (made,))]
        left = ", ".join("_" if mark is None else mark.name for mark in marks) + "," * several
        names = frozenset(str(mark.name) for mark in marks if mark is not None)
        text = f"{left} = {self._constant(call, f'{called}_')}({', '.join(given)}){otherwise}"
        self.lines.append(_Line(names, frozenset(takes), text, changes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags or torch.Tag.dynamic_output_shape in func.tags:
            raise UnrepeatableError(f"{func} depends on values")
        changed = [
            args[place] if place < len(args) else kwargs.get(argument.name)
            for place, argument in enumerate(func._schema.arguments)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if not all(map(self.knows, tree_leaves(changed))):
            raise UnrepeatableError(f"{func} writes to what was there before")
        with _native.listening(None):
            made = func(*args, **kwargs)
        given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
        results = [value for value in (made if isinstance(made, list | tuple) else (made,)) if isinstance(value, Tensor)]
        drawn = torch.Tag.nondeterministic_seeded in func.tags
        if not (drawn or "empty" in func.name() or any(map(self.knows, given))):
            return made  # the same in every call: a constant of the lines that follow
        seen = self.mark_of(given[0]) if given and func.is_view else None
        if seen is not None and seen.root is not None and all(value.dtype == given[0].dtype for value in results):
            for value in results:  # from the root in one step, so that the lines of views in between can go
                self.name(value, seen.root)
                where = value.shape, value.stride(), value.storage_offset()
                self._write(value, torch.as_strided, seen.root, *where, called="as_strided")
            return made
        for value in results:
            if not self.knows(value):  # known is what was written to and is returned
                self.name(value, own=not func.is_view)
        called = func._schema.name.rpartition("::")[2]
        self._write(made, _dispatch.implementation(func), *args, called=called, changes=bool(changed), **kwargs)
        return made

    def hear(self, kernel: str, plan: str | None, args: tuple[Any, ...], made: tuple[Tensor | None, ...]) -> None:
        """A kernel has run: see :func:`fastgen.ops._native.listening`."""
        if plan is None:
            raise UnrepeatableError(f"{kernel} is called without a plan")
        written = ">first" in plan
        for value in made:
            if value is not None and not written:
                self.name(value, own=True)  # not as it was allocated: those lines can go
        self._write(made, _native.launch(kernel, plan), *args, called=kernel, changes=written, otherwise=" or refused()")


_written = itertools.count()


def _refused() -> None:
    raise RuntimeError("a kernel refuses what it took when the call was written down; the network must not be changed")


def write_down(function: Callable[..., Any], tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> tuple[Any, Any]:
    """Call a function, and write down what it does. What happens in Python alone is not seen, and taken to be the same always.

    Args:
        function: called with ``tensors`` and ``rest`` by keyword.
        tensors: what the replay is given: other values of the same shapes, strides and dtypes.
        rest: the arguments that stay.

    Returns:
        The function's tensor, and the replay, a function of ``tensors`` by keyword. ``source`` is its text.

    Raises:
        UnrepeatableError: for a function that reads values, writes to what was there before or does not return a new tensor.
    """
    given = {name: tensor.view_as(tensor) for name, tensor in tensors.items()}  # the caller's own are not marked
    writer = _Writer(given)
    with _native.listening(writer.hear), writer:
        result = function(**given, **rest)
    mark = writer.mark_of(result) if isinstance(result, Tensor) else None
    if mark is None:
        raise UnrepeatableError("what is returned is not a tensor made of the arguments")

    wanted, body = frozenset({str(mark.name)}), [f"return {mark.name}"]
    for line in reversed(writer.lines):
        if line.changes or wanted & line.names:
            unwanted = (line.names | line.takes) - wanted
            body += [f"del {', '.join(sorted(unwanted))}"] * bool(unwanted) + [line.text]
            wanted = wanted - line.names | line.takes
    source = "\n    ".join([f"def replay({', '.join(given)}):", *reversed(body)])
    namespace: dict[str, Any] = {**writer.constants, "refused": _refused}
    file = f"<replay {next(_written)}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # for tracebacks and debuggers
    exec(compile(source, file, "exec"), namespace)
    replay = namespace["replay"]
    replay.source = source
    weakref.finalize(replay, linecache.cache.pop, file, None)
    return result, replay


class Replay:
    """A network's ``forward`` that writes down the second of its calls on arguments of a kind and replays it from the third on.

    The kind of a call are the shapes, strides and dtypes of its tensors, and the values of all else. What a replay would not do
    goes the network's own way: calls that record gradients, under another backend, ``torch.autocast`` or anything that traces,
    with hooks on a layer, in training mode, or that are not repeatable.

    Args:
        network: for evaluation alone; its weights and layers must not be exchanged afterwards.
        most: kinds that are kept; one more puts away the oldest.
    """

    def __init__(self, network: nn.Module, most: int = 16) -> None:
        self._network, self._most = network, most
        self._own = type(network).forward
        parameters = inspect.signature(self._own).parameters.values()
        self._names = [parameter.name for parameter in parameters if parameter.kind is parameter.POSITIONAL_OR_KEYWORD][1:]
        self.replays: dict[Any, Callable[..., Tensor] | None] = {}
        """By kind; None for those that were seen once or are not repeatable."""
        self._unrepeatable: set[Any] = set()

    @functools.cached_property
    def _hooks(self) -> list[Mapping[int, Any]]:
        layers = [layer for layer in self._network.modules() if layer is not self._network]
        return [hooks for layer in layers for hooks in (layer._forward_hooks, layer._forward_pre_hooks)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Replay:
        return Replay(copy.deepcopy(self._network, memo), self._most)  # what is written down names this network's weights

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(self._names, args, strict=False)) | kwargs
        tensors = {name: value for name, value in named.items() if isinstance(value, Tensor)}
        if len(named) != len(args) + len(kwargs) or not self._serves(tensors.values()):
            return self._own(self._network, *args, **kwargs)
        rest = {name: value for name, value in named.items() if name not in tensors}
        kind = (
            *((name, value.shape, value.stride(), value.dtype) for name, value in tensors.items()),
            *((name, type(value), value) for name, value in rest.items()),
        )
        try:
            replay = self.replays.get(kind)
        except TypeError:  # a list, say
            return self._own(self._network, *args, **kwargs)
        if replay is not None:
            return replay(**tensors)
        if kind not in self.replays:
            for oldest in list(self.replays)[: max(0, len(self.replays) + 1 - self._most)]:
                self.replays.pop(oldest, None)
                self._unrepeatable.discard(oldest)
            self.replays[kind] = None
        elif kind not in self._unrepeatable:
            try:
                result, self.replays[kind] = write_down(functools.partial(self._own, self._network), tensors, rest)
            except UnrepeatableError:
                self._unrepeatable.add(kind)
            else:
                return result
        return self._own(self._network, *args, **kwargs)

    def _serves(self, tensors: Collection[Tensor]) -> bool:
        """Whether a replay does all that a call on these tensors would."""
        return (
            all(type(tensor) is Tensor and tensor.is_cpu for tensor in tensors)
            and not self._network.training
            and not any(self._hooks)
            and _dispatch.launch_mode(None, None) is not None
            and not torch.is_autocast_enabled("cpu")
            and not torch._C._len_torch_dispatch_stack()
            and not torch._C._are_functorch_transforms_active()
            and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors))
        )
