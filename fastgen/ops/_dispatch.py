"""Which backend runs an op, decided in one place, per call.

Order: the ``backend=`` argument, ``with use_backend(...)``, ``FASTGEN_BACKEND``, else the fastest that supports the
tensors. A choice somebody made and that cannot be met raises and says why; the automatic choice falls back, and
:func:`explain` tells what ran and why not the others.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.metadata
import importlib.util
import inspect
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from fastgen.ops import _native
from fastgen.ops._spec import OpSpec, all_specs, get_spec

__all__ = [
    "BACKENDS",
    "choose",
    "differentiable_once",
    "explain",
    "implementation",
    "info",
    "is_fast",
    "launch_mode",
    "raw_op",
    "reason_against",
    "triton_module",
    "use_backend",
    "use_math",
]

BACKENDS = ("triton", "cpp", "reference")
"""Fastest first."""
MATHS = ("exact", "fast")


def _checked(value: str | None, known: tuple[str, ...], what: str) -> str | None:
    if value is not None and value not in known:
        raise ValueError(f"{what} must be one of {', '.join(known)}, got {value!r}")
    return value


class _State:
    """The process-wide choice. Plain attributes, so that torch.compile can guard on them."""

    backend: str | None = _checked(os.environ.get("FASTGEN_BACKEND") or None, BACKENDS, "FASTGEN_BACKEND")
    math: str = _checked(os.environ.get("FASTGEN_MATH") or None, MATHS, "FASTGEN_MATH") or "exact"


_state = _State()
_is_compiling = torch.compiler.is_compiling


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Run every op of the block on one backend, or None for the automatic choice. Holds for all threads.

    >>> with use_backend("reference"):
    ...     z, kl = fastgen.ops.reparameterize(mean, log_var)
    """
    before, _state.backend = _state.backend, _checked(backend, BACKENDS, "backend")
    try:
        yield
    finally:
        _state.backend = before


@contextlib.contextmanager
def use_math(math: str) -> Iterator[None]:
    """Draw the normals of the block in the "exact" or the "fast" mode; see :func:`fastgen.ops.normal`."""
    before, _state.math = _state.math, _checked(math, MATHS, "math") or "exact"
    try:
        yield
    finally:
        _state.math = before


def is_fast(math: str | None) -> bool:
    """Whether ``math=``, or else the mode in force, is "fast"."""
    return (_state.math if math is None else _checked(math, MATHS, "math")) == "fast"


@functools.cache
def triton_version() -> str | None:
    """The version of the Triton that is installed; None without one. Does not import it."""
    try:
        return importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    except ImportError:
        return None


def _interpreting() -> bool:
    return os.environ.get("TRITON_INTERPRET") == "1"


def _generic_reason(spec: OpSpec, backend: str, dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``backend`` cannot serve tensors of this dtype and device; None if it can."""
    if backend == "reference":
        return None
    if backend not in spec.backends:
        return f"{spec.name} has no {backend} kernel: the linear algebra of PyTorch serves every device"
    if dtype not in spec.dtypes:
        return f"{dtype} is served by the reference alone"
    if backend == "cpp":
        if device.type != "cpu":
            return f"tensors are on {device}, the C++ kernels run on the CPU"
        return _native.missing()
    if triton_version() is None:
        return "triton is not installed"
    if device.type == "cpu" and not _interpreting():
        return "tensors are on the CPU, where Triton runs only under TRITON_INTERPRET=1"
    if device.type not in ("cpu", "cuda"):
        return f"Triton does not run on {device}"
    return None


def reason_against(spec: OpSpec, backend: str, inputs: dict[str, Any], dtype: torch.dtype, device: torch.device) -> str | None:
    """Why ``backend`` cannot serve this call; None if it can."""
    reason = _generic_reason(spec, backend, dtype, device)
    if reason is None and spec.supports is not None:
        reason = spec.supports(backend, inputs)
    return reason


def choose(
    spec: OpSpec, backend: str | None, like: Tensor, dtype: torch.dtype | None = None, inputs: dict[str, Any] | None = None
) -> str:
    """The backend that runs this call.

    Args:
        spec: the op.
        backend: what the caller asked for, or None.
        like: a tensor on the device of the call.
        dtype: the storage type, where it is not that of ``like``.
        inputs: for ops whose SPEC has ``supports``.
    """
    wanted = backend or _state.backend
    dtype = dtype or like.dtype
    if wanted is None and like.is_cpu and dtype in spec.dtypes and spec.supports is None and _native.ready():
        return "cpp" if "cpp" in spec.backends else "reference"
    device, inputs = like.device, inputs or {}
    if wanted is not None:
        _checked(wanted, BACKENDS, "backend")
        reason = reason_against(spec, wanted, inputs, dtype, device)
        if reason is not None:
            raise ValueError(f"{spec.name}: backend {wanted!r} was asked for but cannot serve: {reason}")
        return wanted
    # under the interpreter Triton is for tests: never an automatic choice on CPU tensors
    for candidate in ("cpp", "reference") if like.is_cpu else BACKENDS:
        if reason_against(spec, candidate, inputs, dtype, device) is None:
            return candidate
    return "reference"


def launch_mode(backend: str | None, math: str | None) -> bool | None:
    """None where a :class:`_native.Launch` may not be attempted first: another backend is asked for, or something traces.

    Else whether its normals are "fast", as :func:`is_fast` has it.
    """
    if (backend or _state.backend or "cpp") != "cpp" or _is_compiling():
        return None
    return _state.math == "fast" if math is None else is_fast(math)


def _like(inputs: dict[str, Any]) -> Tensor:
    """An empty tensor with the dtype and the device that a call with these arguments has."""
    tensors = [v for v in inputs.values() if isinstance(v, Tensor)]
    for value in tensors:
        if value.is_floating_point():
            return value.new_empty(0)
    device = tensors[0].device if tensors else inputs.get("device")
    return torch.empty(0, dtype=inputs.get("dtype") or torch.get_default_dtype(), device=device)


def explain(name: str, *args: Any, **kwargs: Any) -> str:
    """What a call of op ``name`` with these arguments would run, and why not the others.

    >>> print(fastgen.explain("reparameterize", torch.zeros(8, 4), torch.zeros(8, 4)))
    reparameterize runs on cpp (avx512)
      triton: tensors are on the CPU, where Triton runs only under TRITON_INTERPRET=1
      cpp: can serve
      reference: can serve
    """
    spec = get_spec(name)
    inputs = dict(inspect.signature(spec.function).bind(*args, **kwargs).arguments)
    wanted = inputs.pop("backend", None)
    like = _like(inputs)
    chosen = choose(spec, wanted, like, inputs=inputs)
    isa = f" ({_native.current_isa()})" if chosen == "cpp" else ""
    lines = [f"{name} runs on {chosen}{isa}"]
    reasons = {backend: reason_against(spec, backend, inputs, like.dtype, like.device) for backend in BACKENDS}
    lines += [f"  {backend}: {reason or 'can serve'}" for backend, reason in reasons.items()]
    return "\n".join(lines)


def info() -> dict[str, Any]:
    """What serves the ops in this process: backends, instruction sets, and why others are missing."""
    device = torch.device("cuda") if torch.cuda.is_available() else torch.device("cpu")
    return {
        "backend": _state.backend or "automatic",
        "math": _state.math,
        "threads": torch.get_num_threads(),
        "isa": _native.current_isa(),
        "isas": _native.available_isas(),
        "cpp": _native.missing() or "loaded",
        "triton": triton_version() or "not installed",
        "device": str(device),
        "ops": {
            spec.name: {b: _generic_reason(spec, b, torch.float32, device) or "can serve" for b in BACKENDS}
            for spec in all_specs().values()
        },
    }


def triton_module(name: str) -> Any:
    """The module with an op's Triton kernels: fastgen.kernels.NAME."""
    return importlib.import_module(f"fastgen.kernels.{name}")


_library = torch.library.Library("fastgen", "FRAGMENT")
_implementations: dict[Any, Callable[..., Any]] = {}


def raw_op(name: str, schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Callable[..., Any]:
    """Register a raw kernel with ``torch.library`` as ``torch.ops.fastgen.NAME`` and return what ops call.

    In plain eager mode the implementation is called directly: the dispatcher costs more than a small kernel. Where
    something traces (torch.compile, export, fake tensors) the registered op is called, so that it stands in the graph.
    """
    _library.define(f"{name}{schema}")
    _library.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastgen::{name}", fake, lib=_library)
    registered = getattr(torch.ops.fastgen, name).default
    _implementations[registered] = implementation
    is_compiling, modes = torch.compiler.is_compiling, torch._C._len_torch_dispatch_stack

    def call(*args: Any) -> Any:
        if is_compiling() or modes():
            return registered(*args)
        return implementation(*args)

    return call


def implementation(operator: Any) -> Callable[..., Any]:
    """What an operator of :func:`raw_op` calls; any other operator is its own."""
    return _implementations.get(operator, operator)


def differentiable_once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """For the ``backward`` of an autograd class that calls a raw kernel: a second derivative through it is an error.

    ``torch.autograd.function.once_differentiable`` costs more than a small kernel, and lets the second derivative pass for
    zero where the incoming gradient is a constant.
    """

    @functools.wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        outputs = backward(ctx, *grads)
        if not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return outputs
        message = b"a fused op can be differentiated once; backend='reference' knows second derivatives"
        found = outputs if isinstance(outputs, tuple) else (outputs,)
        leaves = [v if v is None else v.detach().requires_grad_() for v in found]
        causes = [t for t in (*grads, *ctx.saved_tensors) if t is not None and t.requires_grad]
        refuse = torch._C._functions.DelayedError(message, len(leaves) + len(causes))
        refused = refuse(*leaves, *causes)  # type: ignore[arg-type]
        return refused[: len(leaves)] if isinstance(refused, tuple) else refused  # a single one comes bare

    return wrapper
