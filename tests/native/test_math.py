"""csrc/math.h against float64: every function over the whole range of float32, on every instruction set.

The bound of a function is the one that the header states beside it. A test takes every STEP-th float, and all around zero,
one, the limits and the thresholds; `python -m tests.native.test_math 1` takes each of the 2^32 and prints the worst errors.
"""

from __future__ import annotations

import math
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgen.ops import _native
from tests import emulation

STEP = 2**12 + 1  # odd: every low bit pattern comes up
CHUNK = 2**24
ISAS = [*_native.available_isas(), "neon"] if "neon" not in _native.available_isas() else _native.available_isas()
SOURCES = {name: (emulation.ROOT / "csrc" / name).read_text() for name in ("math.h", "simd.h")}

# the same function of a float64 tensor, without cancellation
EXACT = {
    "exp": torch.exp,
    "exp_bounded": lambda x: torch.exp(x.clamp_min(-87)),
    "expm1": torch.expm1,
    "log": torch.log,
    "log1p": torch.log1p,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "sigmoid_factors": lambda x: torch.sigmoid(x.clamp(-80, 80)),
    "sigmoid_factors_rest": lambda x: torch.sigmoid(-x.clamp(-80, 80)),
    "softplus": lambda x: x.clamp_min(0) + torch.log1p(torch.exp(-x.abs())),
    "log_sigmoid": lambda x: x.clamp_max(0) - torch.log1p(torch.exp(-x.abs())),
    "reciprocal": torch.reciprocal,
    "sqrt": torch.sqrt,
}
# where a function is not asked for: what its comment excludes
OUTSIDE = {
    "exp_bounded": lambda x: (x > 88) | x.isnan(),
    "sigmoid_factors": torch.isnan,
    "sigmoid_factors_rest": torch.isnan,
    "reciprocal": lambda x: ~((x.abs() >= 2.0**-126) & (x.abs() <= 2.0**126)),
}
EXACTLY_ROUNDED = {"sqrt": 0.5}
# helpers, whose error is that of the functions built on them, and those that only move bits
PARTS = {"abs", "copy_sign", "log_of_parts"}


def stated(name: str) -> float:
    """The bound in ulp from the comment on a function."""
    if name in EXACTLY_ROUNDED:
        return EXACTLY_ROUNDED[name]
    for source in SOURCES.values():
        found = re.search(
            rf"((?://[^\n]*\n)*)(?:template[^\n]*\n)?INLINE (?:vf|void) {name.removesuffix('_rest')}\(([^\n]*)", source
        )
        if found:
            return max(map(float, re.findall(r"(?:< |to )([\d.]+) ulp", found.group(0))))  # of the whole range
    raise AssertionError(f"no function {name}")


def bit_patterns(first: int, last: int, step: int) -> Tensor:
    """Floats by their bits, padded to whole vectors."""
    words = torch.arange(first, last, step)
    words = torch.cat([words, words[:1].expand(-len(words) % 16)])
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).view(torch.float32)


def sweep(step: int) -> Iterator[Tensor]:
    for first in range(0, 2**32, CHUNK * step):
        yield bit_patterns(first, min(first + CHUNK * step, 2**32), step)


def corners() -> Iterator[Tensor]:
    """A thousand floats on either side of where something changes."""
    places = [0.0, 2.0**-149, 2.0**-126, 0.25, 0.5, math.sqrt(0.5), 1.0, math.sqrt(2), 2.0, math.log(2) / 2, math.log(2)]
    places += [9.0, 17.0, 26.0, 80.0, 87.0, 88.0, 88.72284, 89.0, 87.33655, 103.97, 104.0, 1e4, 2.0**23, 2.0**24, 2.0**31]
    places += [2.0**126, 3.4028235e38, math.inf]
    for place in places:
        (word,) = torch.tensor([place]).view(torch.int32).tolist()
        for sign in (0, 2**31):
            yield bit_patterns(max(sign, sign + word - 1000), min(sign + word + 1000, sign + 2**31), 1)


def ulps(result: Tensor, exact: Tensor) -> Tensor:
    """Distance in units in the last place of float32, where infinity counts as 2^128."""
    top = 2.0**128
    exact, result = exact.clamp(-top, top), result.double().clamp(-top, top)
    exponent = (
        torch.frexp(exact.abs().clamp(2.0**-126, 2.0**127)).exponent - 24
    )  # subnormals have the ulp of the smallest normal
    return torch.ldexp((result - exact).abs(), -exponent)


def worst(name: str, remote: emulation.Remote, blocks: Iterator[Tensor]) -> tuple[float, float]:
    """The largest error in ulp, and the argument it is at."""
    found = (0.0, 0.0)
    for x in blocks:
        y = torch.full_like(x, -1.5)
        remote.call(f"{name}_all", "ipp", len(x), x, y)
        wanted = torch.ones_like(x, dtype=torch.bool)
        if name in OUTSIDE:
            wanted = ~OUTSIDE[name](x)
        x, y = x[wanted], y[wanted]
        if not len(x):
            continue
        exact = EXACT[name](x.double())
        strange = (y.isnan() != exact.isnan()).nonzero()
        if len(strange):
            return math.inf, x[strange[0]].item()
        error, place = ulps(y, exact).nan_to_num(0.0).max(0)
        found = max(found, (error.item(), x[place].item()))
    return found


@pytest.fixture(scope="module", params=ISAS)
def remote(request, shared_folder):
    if request.param == "neon":
        emulation.require_neon()
    if _native.missing():
        pytest.skip(_native.missing())
    return emulation.compiled(request.param, shared_folder, "elementary")


@pytest.mark.parametrize("name", EXACT)
def test_error_is_as_stated(name, remote):
    for blocks in (corners(), sweep(STEP)):
        error, place = worst(name, remote, blocks)
        assert error <= stated(name), f"{error:.3f} ulp at {place!r}"


def test_every_function_is_swept():
    functions = set(re.findall(r"^INLINE vf (\w+)\(vf", SOURCES["math.h"], re.MULTILINE))
    assert functions - PARTS <= EXACT.keys()


def main(step: int, isas: list[str]) -> None:
    """Print the worst error of every function over every ``step``-th float."""
    with tempfile.TemporaryDirectory() as folder:
        for isa in isas:
            remote = emulation.compiled(isa, Path(folder), "elementary")
            for name in EXACT:
                error, place = worst(name, remote, sweep(step))
                print(f"{isa:7} {name:20} {error:.3f} ulp at {place!r}; stated {stated(name)}", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:] or ISAS)
