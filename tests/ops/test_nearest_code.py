"""nearest_code: against float64 brute force and scipy, ties, near ties, offsets, extremes, NaN, the EMA formula, memory."""

import math
from pathlib import Path

import pytest
import torch
from scipy.cluster.vq import vq

from fastgen import ops
from fastgen.ops import _native

BACKENDS = ["reference", "triton", *(["cpp"] if _native.missing() is None else [])]
every_backend = pytest.mark.parametrize("backend", BACKENDS)
needs_kernels = pytest.mark.skipif(_native.missing() is not None, reason="no compiled kernels")


def brute_force(z, codebook):
    """Index and distance by differences in float64."""
    distances = (z.double()[:, None] - codebook.double()).square().sum(-1)
    return distances.argmin(1), distances.amin(1)


@every_backend
@pytest.mark.parametrize(("rows", "codes", "width"), [(1, 1, 1), (50, 7, 3), (100, 65, 64), (49, 200, 17), (3, 33, 129)])
def test_scipy_agrees(rows, codes, width, backend):
    z, codebook = torch.randn(rows, width), torch.randn(codes, width)
    index, distance = ops.nearest_code(z, codebook, backend=backend)
    expected, length = vq(z.double().numpy(), codebook.double().numpy())
    assert torch.equal(index, torch.from_numpy(expected).long())
    torch.testing.assert_close(distance.double(), torch.from_numpy(length).square(), rtol=2e-7, atol=0)


@every_backend
def test_lowest_index_among_equal_codes(backend):
    codebook = torch.randn(5, 6)[[0, 1, 0, 2, 1, 3, 3, 4, 0, 2] * 4]
    z = torch.cat([codebook, torch.randn(20, 6)])
    index, distance = ops.nearest_code(z, codebook, backend=backend)
    assert torch.equal(index[:10], torch.tensor([0, 1, 0, 3, 1, 5, 5, 7, 0, 3]))
    assert torch.equal(index, brute_force(z, codebook)[0])
    assert not distance[:40].any()
    collapsed, _ = ops.nearest_code(z, codebook[:1].repeat(70, 1), backend=backend)
    assert not collapsed.any()


@every_backend
def test_lowest_index_halfway_between_codes(backend):
    codebook = torch.tensor([[5.0, 5.0], [2.0, 0.0], [-2.0, 0.0], [0.0, 2.0]])
    index, distance = ops.nearest_code(torch.tensor([[0.0, 0.0], [0.0, 1.0], [-1.0, 1.0]]), codebook, backend=backend)
    assert index.tolist() == [1, 3, 2]
    assert distance.tolist() == [4.0, 1.0, 2.0]


@every_backend
@pytest.mark.parametrize(("offset", "spread"), [(0.0, 1e-6), (1e3, 1e-2), (1e5, 1.0), (-3e7, 100.0)])
def test_near_ties_and_common_offsets(offset, spread, backend):
    """Codes that differ by little more than the rounding of their elements: |z|^2 - 2 z.c + |c|^2 would be all noise."""
    centre = offset + torch.randn(24)
    codebook = centre + spread * torch.randn(60, 24)
    z = codebook[torch.randint(60, (40,))] + 0.3 * spread * torch.randn(40, 24)
    index, distance = ops.nearest_code(z, codebook, backend=backend)
    expected, least = brute_force(z, codebook)
    assert torch.equal(index, expected)
    torch.testing.assert_close(distance.double(), least, rtol=1e-7, atol=0)


@every_backend
@pytest.mark.parametrize("scale", [1e-30, 1e-21, 1e-12, 1e12, 1e18, 1e30])
def test_scale_does_not_matter(scale, backend):
    z, codebook = torch.randn(30, 12) * scale, torch.randn(50, 12) * scale
    index, distance = ops.nearest_code(z, codebook, backend=backend)
    expected, least = brute_force(z, codebook)
    assert torch.equal(index, expected)
    assert torch.equal(distance, least.float())


@every_backend
def test_nan_and_infinity(backend):
    z, codebook = torch.randn(6, 5), torch.randn(9, 5)
    clean = ops.nearest_code(z, codebook, backend=backend)
    z[1, 2], z[3, 4], z[4, 0] = math.nan, math.inf, -math.inf
    index, distance, counts, sums = ops.nearest_code(z, codebook, statistics=True, backend=backend)
    assert index[[1, 3, 4]].tolist() == [0, 0, 0]
    assert distance[1].isnan()
    assert distance[[3, 4]].tolist() == [math.inf, math.inf]
    good = torch.tensor([0, 2, 5])
    assert torch.equal(index[good], clean.index[good])
    assert torch.equal(distance[good], clean.distance[good])
    assert torch.equal(counts, torch.bincount(index[good], minlength=9))
    torch.testing.assert_close(sums, torch.zeros(9, 5).index_add_(0, index[good], z[good]))


@every_backend
def test_codes_that_are_not_finite_are_left_alone(backend):
    z, codebook = torch.randn(40, 5), torch.randn(9, 5)
    codebook[0, 1], codebook[4, 0], codebook[7, 3] = math.nan, math.inf, -math.inf
    live = torch.tensor([1, 2, 3, 5, 6, 8])
    index, distance = ops.nearest_code(z, codebook, backend=backend)
    expected, least = brute_force(z, codebook[live])
    assert torch.equal(index, live[expected])
    torch.testing.assert_close(distance, least.float())
    index, distance = ops.nearest_code(z, torch.full((3, 5), math.nan), backend=backend)
    assert not index.any()
    assert distance.isnan().all()


@every_backend
def test_shapes(backend):
    codebook = torch.randn(11, 4)
    flat = torch.randn(30, 4)
    index, distance = ops.nearest_code(flat, codebook, backend=backend)
    for shape in ((5, 6), (2, 3, 5), (30, 1)):
        found = ops.nearest_code(flat.reshape(*shape, 4), codebook, backend=backend)
        assert torch.equal(found.index, index.reshape(shape))
        assert torch.equal(found.distance, distance.reshape(shape))
    single = ops.nearest_code(flat[3], codebook, backend=backend)
    assert (single.index.shape, single.index.item()) == ((), index[3].item())
    none = ops.nearest_code(flat[:0], codebook, statistics=True, backend=backend)
    assert (none.index.shape, none.index.dtype, none.distance.dtype) == ((0,), torch.int64, torch.float32)
    assert not none.counts.any()
    assert not none.sums.any()


@every_backend
def test_statistics_make_the_ema_update(backend):
    """Appendix A.1 of the paper, by one-hot products in float64."""
    z, codebook, decay = torch.randn(4, 50, 6), torch.randn(13, 6), 0.9
    sizes, means = torch.rand(13) + 1, torch.randn(13, 6)
    index, distance, counts, sums = ops.nearest_code(z, codebook, statistics=True, backend=backend)
    chosen = torch.nn.functional.one_hot(index.reshape(-1), 13).double()
    assert torch.equal(counts, chosen.sum(0).long())
    assert counts.sum() == 200
    new_sizes = decay * sizes + (1 - decay) * counts
    new_means = decay * means + (1 - decay) * sums
    torch.testing.assert_close(new_sizes, (decay * sizes.double() + (1 - decay) * chosen.sum(0)).float())
    products = chosen.T @ z.reshape(-1, 6).double()
    torch.testing.assert_close(new_means, (decay * means.double() + (1 - decay) * products).float())
    plain = ops.nearest_code(z, codebook, backend=backend)
    assert len(plain) == 2
    assert torch.equal(plain.index, index)
    assert torch.equal(plain.distance, distance)


@every_backend
def test_long_sums_are_exact_to_the_last_bit(backend):
    z = 1000 + torch.randn(700, 2)
    sums = ops.nearest_code(z, torch.zeros(1, 2), statistics=True, backend=backend).sums
    assert torch.equal(sums[0], z.double().sum(0).float())


@every_backend
def test_gradient_is_that_of_the_commitment_and_codebook_losses(backend):
    z, codebook = torch.randn(60, 7, requires_grad=True), torch.randn(10, 7, requires_grad=True)
    index, distance = ops.nearest_code(z, codebook, backend=backend)
    grads = torch.autograd.grad(distance.sum(), [z, codebook])
    expected = torch.autograd.grad(torch.nn.functional.mse_loss(z, codebook[index], reduction="sum"), [z, codebook])
    for got, want in zip(grads, expected, strict=True):
        torch.testing.assert_close(got, want)
    # one alone, as with a codebook that learns by averages
    (alone,) = torch.autograd.grad(ops.nearest_code(z, codebook.detach(), statistics=True, backend=backend).distance.sum(), [z])
    assert torch.equal(alone, grads[0])
    (alone,) = torch.autograd.grad(ops.nearest_code(z.detach(), codebook, backend=backend).distance.sum(), [codebook])
    assert torch.equal(alone, grads[1])


def test_index_and_statistics_are_constants():
    z = torch.randn(5, 3, requires_grad=True)
    for backend in BACKENDS:
        found = ops.nearest_code(z, torch.randn(4, 3), statistics=True, backend=backend)
        assert [v.requires_grad for v in found] == [False, True, False, False], backend


@every_backend
def test_bfloat16_vectors_and_float32_codes(backend):
    z, codebook = torch.randn(20, 8).bfloat16().requires_grad_(), torch.randn(15, 8, requires_grad=True)
    index, distance = ops.nearest_code(z, codebook, backend=backend)
    expected, least = brute_force(z.detach(), codebook.detach())
    assert torch.equal(index, expected)
    assert distance.dtype is torch.float32
    torch.testing.assert_close(distance.double(), least, rtol=1e-6, atol=0)
    distance.sum().backward()
    assert (z.grad.dtype, codebook.grad.dtype) == (torch.bfloat16, torch.float32)


@needs_kernels
def test_instruction_sets_agree_to_the_bit():
    z, codebook = torch.randn(500, 37), torch.randn(130, 37)
    found = []
    for isa in _native.available_isas():
        with _native.use_isa(isa):
            found.append(ops.nearest_code(z, codebook, statistics=True, backend="cpp"))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_kernels
@pytest.mark.parametrize(("rows", "codes", "width"), [(4000, 1100, 8), (1000, 300, 300)])
def test_many_tiles_and_panels(rows, codes, width):
    z, codebook = torch.randn(rows, width), torch.randn(codes, width)
    index, distance = ops.nearest_code(z, codebook, backend="cpp")
    expected = ops.nearest_code(z, codebook, backend="reference")
    assert torch.equal(index, expected.index)
    torch.testing.assert_close(distance, expected.distance, rtol=1e-7, atol=0)


@needs_kernels
def test_memory_is_a_twentieth_of_the_matrix():
    rows, codes = 32768, 2048
    z, codebook = torch.randn(rows, 8), torch.randn(codes, 8)
    ops.nearest_code(z[:4096], codebook, statistics=True, backend="cpp")
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def kilobytes(name):
        return int(next(line for line in status.read_text().splitlines() if line.startswith(name)).split()[1])

    try:
        reset.write_text("5")  # the peak starts again from what is resident now
    except OSError:
        pytest.skip("the kernel does not reset peaks")
    before = kilobytes("VmRSS:")
    ops.nearest_code(z, codebook, statistics=True, backend="cpp")
    assert (kilobytes("VmHWM:") - before) * 1024 <= rows * codes * 4 / 20


def test_errors():
    z, codebook = torch.zeros(2, 3), torch.zeros(4, 3)
    for backend in (None, "reference"):
        with pytest.raises(ValueError, match=r"codebook must have shape \[K, D\] with K at least 1, got \[0, 3\]"):
            ops.nearest_code(z, codebook[:0], backend=backend)
    with pytest.raises(ValueError, match=r"codebook must have shape \[K, D\] with K at least 1, got \[3\]"):
        ops.nearest_code(z, codebook[0])
    with pytest.raises(ValueError, match=r"z has vectors of 3 elements, the codebook of 2"):
        ops.nearest_code(z, codebook[:, :2])
    with pytest.raises(ValueError, match=r"z must have shape \[..., D\], got a scalar"):
        ops.nearest_code(torch.zeros(()), codebook)
    with pytest.raises(TypeError, match=r"codebook must be a floating-point tensor, got torch\.int64"):
        ops.nearest_code(z, torch.zeros(4, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"z must be a floating-point tensor, got list"):
        ops.nearest_code([[0.0]], codebook)
    with pytest.raises(ValueError, match=r"codebook is on meta, expected cpu like z"):
        ops.nearest_code(z, codebook.to("meta"))


@needs_kernels
@pytest.mark.parametrize("width", [32, 37, 64, 130, 256])
@pytest.mark.parametrize("kind", ["gaussian", "near one code", "offset", "repeated codes", "one large element", "equal rows"])
def test_codes_that_bytes_may_not_tell_apart(width, kind):
    """Sizes at which scores may be taken of 8 bits first: the index is exact whatever the bytes lose."""
    z, codebook = torch.randn(150, width), torch.randn(330, width)
    if kind == "near one code":
        z = codebook[torch.randint(330, (150,))] + 0.1 * z
    elif kind == "offset":
        z, codebook = 1e-3 * z + 50, 1e-3 * codebook + 50
    elif kind == "repeated codes":
        codebook = codebook[torch.randint(5, (330,))].contiguous()
    elif kind == "one large element":  # leaves the others few steps
        z[:, 3], codebook[:, 5] = 1e4, 1e4 * torch.randn(330)
    elif kind == "equal rows":
        z, codebook = torch.zeros_like(z), codebook / codebook.norm(dim=1, keepdim=True)
    for zs, codes in ((z, codebook), (z.bfloat16(), codebook.bfloat16())):
        index, distance = ops.nearest_code(zs, codes, backend="cpp")
        expected, least = brute_force(zs, codes)
        assert torch.equal(index, expected)
        torch.testing.assert_close(distance.double(), least, rtol=2e-7, atol=0)


@needs_kernels
def test_rows_that_are_not_finite_leave_their_neighbours_alone():
    z, codebook = torch.randn(200, 64), torch.randn(128, 64)
    z[60, 3], z[61, 0], z[140, 5], codebook[9, 9] = math.nan, math.inf, 1e4, math.nan
    index, distance = ops.nearest_code(z, codebook, backend="cpp")
    live = [k for k in range(128) if k != 9]
    good = [i for i in range(200) if i not in (60, 61)]
    expected, least = brute_force(z[good], codebook[live])
    assert torch.equal(index[good], torch.tensor(live)[expected])
    torch.testing.assert_close(distance[good].double(), least, rtol=2e-7, atol=0)
    assert not index[[60, 61]].any()
    assert not distance[[60, 61]].isfinite().any()
