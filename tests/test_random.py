"""Keys, and the generator behind them: known-answer vectors, an outside oracle, the layout of the counter."""

import pytest
import torch
import triton
import triton.language as tl

from fastgen import random
from fastgen.ops import _philox


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_known_answers_of_random123(counter, key, answer):
    words = _philox.philox(tuple(torch.tensor(c) for c in counter), tuple(torch.tensor(k) for k in key))
    assert [int(w) for w in words] == answer


@triton.jit
def _randint4x_kernel(p_out, seed, N: tl.constexpr):
    o = tl.arange(0, N)
    a, b, c, d = tl.randint4x(seed, o)
    tl.store(p_out + 4 * o, a)
    tl.store(p_out + 4 * o + 1, b)
    tl.store(p_out + 4 * o + 2, c)
    tl.store(p_out + 4 * o + 3, d)


@pytest.mark.parametrize("seed", [0, 7, 2**40 + 12345])
def test_words_are_tritons_randint4x(seed):
    out = torch.empty(4096, dtype=torch.int32)
    _randint4x_kernel[(1,)](out, seed, N=1024)
    words = torch.stack(_philox.words(random.key(seed), 1, 4096), -1).flatten()
    assert torch.equal(out.long() & 0xFFFFFFFF, words)


def test_counter_layout():
    key = random.key((5 << 32) + 9, stream=17, step=2**32 + 3, sample=2**33 + 6)
    words = _philox.words(key, 3, 8)
    counter = [torch.tensor(1), torch.tensor(8), torch.tensor(3), torch.tensor(17 | 2 << 8)]  # quartet 1 of the third sample
    expected = _philox.philox(tuple(counter), (torch.tensor(9), torch.tensor(5)))
    assert [int(w[2, 1]) for w in words] == [int(w) for w in expected]


def test_compiled_words_are_the_same():
    """Seeds whose key words carry: products of two words must not overflow where a compiler may assume that they do not."""
    compiled = torch.compile(lambda key: torch.stack(_philox.words(key, 4, 40)), dynamic=False)
    for seed in (890053541648381458, 2**31 + 5, 2**63 - 1, 7):
        key = random.key(seed)
        assert torch.equal(compiled(key), torch.stack(_philox.words(key, 4, 40)))


def test_key_words():
    assert random.key(2**64 - 1).tolist() == [-1, 0, 0, 0]
    assert random.key([3, 4], stream=random.Stream.LATENT, step=2, sample=9).tolist() == [[3, 3, 2, 9], [4, 3, 2, 9]]
    assert random.key([]).shape == (0, 4)
    key = random.key([1, 2])
    moved = random.at(key, step=5)
    assert moved[:, 2].tolist() == [5, 5]
    assert key[:, 2].tolist() == [0, 0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 2**64}, "seed must fit in 64 bits"),
        ({"seed": 0, "stream": 256}, "stream must be in 0 .. 255, got 256"),
        ({"seed": 0, "step": -1}, "step must not be negative, got -1"),
        ({"seed": 0, "sample": 2**56}, "sample must be in"),
    ],
)
def test_key_errors(options, message):
    with pytest.raises(ValueError, match=message):
        random.key(**options)


def test_fresh_keys_follow_manual_seed():
    torch.manual_seed(5)
    first, second = random.fresh_key(), random.fresh_key()
    torch.manual_seed(5)
    assert torch.equal(first, random.fresh_key())
    assert not torch.equal(first, second)
    assert first[1:].tolist() == [0, 0, 0]


def test_key_advances_in_place():
    from fastgen import ops

    key = random.key(1)
    first = ops.normal((2, 8), key)
    key[2] += 1
    assert torch.equal(ops.normal((2, 8), key), ops.normal((2, 8), random.key(1, step=1)))
    assert not torch.equal(first, ops.normal((2, 8), key))
