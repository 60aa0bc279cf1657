"""Keys: the coordinates of counter-based random streams.

Noise in fastgen is a pure function of where it is used, never of how the work was cut up. A *key* says where: an int64
tensor of four words

    (seed, stream, step, sample)

on the device of the op that draws. Shape [4] is one key for a whole batch: sample i of the batch is drawn at
``sample + i``. Shape [N, 4] gives each of the N samples its own row (its own seed, its own index, ...), used as it stands.

``stream`` (0 .. 255) separates uses that share a seed, ``step`` counts training or sampling steps (it wraps at 2**32) and
``sample`` is the global index of a sample (0 <= sample < 2**56). A key is a tensor, so nothing synchronises: under
``torch.compile`` or a replayed CUDA graph, advancing the ``step`` word in place draws fresh noise.

The generator is Philox4x32-10 (Salmon et al., 2011, "Parallel random numbers: as easy as 1, 2, 3"); the layout of its
counter is documented in :mod:`fastgen.ops._philox`.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from fastgen._arguments import check_whole

__all__ = ["Stream", "at", "fresh_key", "key"]


class Stream(enum.IntEnum):
    """What noise is used for. Two uses under one seed must have different streams."""

    DEFAULT = 0
    TRAIN = 1
    SAMPLE = 2
    LATENT = 3
    DATA = 4
    TIMESTEP = 5
    DIFFUSE = 6
    DENOISE = 7
    EVALUATE = 8
    PROBE = 9


_SIGN = 1 << 63
_KEEP_SEED = torch.tensor([-1, 0, 0, 0])


def _as_int64(seed: int) -> int:
    check_whole("seed", seed)
    if not -_SIGN <= seed < 2 * _SIGN:
        raise ValueError(f"seed must fit in 64 bits, got {seed}")
    return seed - 2 * _SIGN if seed >= _SIGN else seed


def _check_words(stream: int | None, step: int | None, sample: int | None) -> None:
    if stream is not None and not 0 <= stream < 256:
        raise ValueError(f"stream must be in 0 .. 255, got {stream}")
    if step is not None and step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if sample is not None and not 0 <= sample < 1 << 56:
        raise ValueError(f"sample must be in 0 .. 2**56 - 1, got {sample}")


def key(
    seed: int | Sequence[int],
    *,
    stream: int = Stream.DEFAULT,
    step: int = 0,
    sample: int = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """The key of a random stream.

    Args:
        seed: any 64-bit integer; or one per sample, which gives a key of shape [N, 4] whose row i draws what
            ``key(seed[i], sample=sample)`` draws for its first sample.
        stream: 0 .. 255, see :class:`Stream`.
        step: training or sampling step, not negative; its low 32 bits count.
        sample: index of the first sample, 0 .. 2**56 - 1.

    Returns:
        int64 tensor [4], or [N, 4] for a sequence of seeds.

    >>> key(7, step=3)
    tensor([7, 0, 3, 0])
    """
    _check_words(stream, step, sample)
    if isinstance(seed, Sequence):
        rows = [[_as_int64(s), int(stream), step, sample] for s in seed]
        return torch.tensor(rows, dtype=torch.int64, device=device).reshape(-1, 4)
    return torch.tensor([_as_int64(seed), int(stream), step, sample], dtype=torch.int64, device=device)


def at(key: Tensor, *, stream: int | None = None, step: int | None = None, sample: int | None = None) -> Tensor:
    """A copy of ``key`` with some of its words replaced; the shape stays.

    >>> at(key(7), stream=Stream.LATENT, sample=100)
    tensor([  7,   3,   0, 100])
    """
    _check_words(stream, step, sample)
    if not isinstance(key, Tensor) or key.dtype is not torch.int64 or key.shape[-1:] != (4,):
        got = f"{key.dtype} {list(key.shape)}" if isinstance(key, Tensor) else repr(key)
        raise TypeError(f"key must be an int64 tensor [4] or [N, 4] made by fastgen.random.key, got {got}")
    out = key.clone()
    for word, value in enumerate((stream, step, sample), start=1):
        if value is not None:
            out[..., word] = int(value)
    return out


def fresh_key(device: torch.device | str | None = None) -> Tensor:
    """A key with a fresh seed from PyTorch's default generator of ``device``, so that ``torch.manual_seed`` rules."""
    words = torch.randint(-_SIGN, _SIGN - 1, (4,), device=device)
    return words.bitwise_and_(_KEEP_SEED if words.is_cpu else _KEEP_SEED.to(words.device))
