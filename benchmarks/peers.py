"""Named peers of the ops and composites: ``PEERS[name]`` lists those of one."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import diffusion_peers
from benchmarks.parity import ParityError, check_normal
from benchmarks.peer import Peer
from benchmarks.workload import bind
from fastgen.ops import get_spec

__all__ = ["PEERS"]


def _torch_randn(inputs: dict[str, Any], mode: str) -> Callable[[], Tensor]:
    shape, dtype, device = inputs["shape"], inputs["dtype"], inputs["key"].device
    return lambda: torch.randn(shape, dtype=dtype, device=device)


def _check_randn(inputs: dict[str, Any]) -> None:
    check_normal(_torch_randn(inputs, "fwd")(), inputs["shape"])


def _diffusers_randn(inputs: dict[str, Any], mode: str) -> Callable[[], Tensor]:
    """One generator per sample, made beforehand: the documented way to samples that do not depend on their batch."""
    from diffusers.utils.torch_utils import randn_tensor

    shape, dtype, device = inputs["shape"], inputs["dtype"], inputs["key"].device
    seeds = inputs["key"][:, 0].tolist()
    generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
    return lambda: randn_tensor(shape, generator=generators, device=device, dtype=dtype)


def _check_diffusers_randn(inputs: dict[str, Any]) -> None:
    check_normal(_diffusers_randn(inputs, "fwd")(), inputs["shape"])


def _torch_rand(inputs: dict[str, Any], mode: str) -> Callable[[], Tensor]:
    shape, dtype, device = inputs["shape"], inputs["dtype"], inputs["key"].device
    return lambda: torch.rand(shape, dtype=dtype, device=device)


def _check_rand(inputs: dict[str, Any]) -> None:
    u = _torch_rand(inputs, "fwd")().double()
    if not (u.min() >= 0 and u.max() <= 1 and abs(float(u.mean()) - 0.5) <= 7 * (12 * u.numel()) ** -0.5):
        raise ParityError("not uniform on [0, 1]")


def _eager_reparameterize(mean: Tensor, log_var: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As training scripts have it."""
    std = torch.exp(0.5 * log_var)
    eps = torch.randn_like(std) if noise is None else noise
    z = mean + std * eps
    kl = -0.5 * torch.sum(1 + log_var - mean.pow(2) - log_var.exp(), dim=tuple(range(1, mean.dim())))
    return z, kl


@functools.cache
def _compiled_reparameterize() -> Callable[..., Any]:
    return torch.compile(_eager_reparameterize, dynamic=False)


def _reparameterize(function: Callable[[], Callable[..., Any]]) -> Callable[[dict[str, Any], str], Callable[[], Any]]:
    def build(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
        arguments: dict[str, Any] = {name: inputs[name] for name in ("mean", "log_var", "noise") if name in inputs}
        return bind(function(), arguments, mode, ("mean", "log_var"))

    return build


def _check_reparameterize(function: Callable[[], Callable[..., Any]]) -> Callable[[dict[str, Any]], None]:
    def check(inputs: dict[str, Any]) -> None:
        from fastgen.ops.reparameterize import reparameterize_reference

        mean, log_var = inputs["mean"], inputs["log_var"]
        noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3)).to(mean)
        results = function()(mean, log_var, noise)
        expected = reparameterize_reference(mean.double(), log_var.double(), noise=noise.double())
        bound = 1e-3 if mean.dtype.itemsize >= 4 else 2e-2
        for name, got, want in zip(("z", "kl"), results, expected, strict=True):
            if not torch.allclose(got.double(), want, rtol=bound, atol=bound):
                raise ParityError(f"{name} differs from the reference on the same noise")

    return check


class _Recorded(torch.autograd.Function):
    """What PyTorch charges for two outputs and their gradients, allocated and recorded but not computed."""

    @staticmethod
    def forward(ctx: Any, mean: Tensor, log_var: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(mean, log_var)
        return torch.empty_like(mean), mean.new_empty(len(mean))

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_kl: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_var = ctx.saved_tensors
        return torch.empty_like(mean), torch.empty_like(log_var)


def _record_alone(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
    names = ("mean", "log_var")
    return bind(lambda **given: _Recorded.apply(*given.values()), {name: inputs[name] for name in names}, mode, names)


def _torchmetrics_moments(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
    """The update of torchmetrics' FrechetInceptionDistance: raw sums in float64. Its co-moment is what is compared."""
    features = inputs["features"]
    width = features.shape[1]
    total = features.new_zeros(width, dtype=torch.float64)
    products = features.new_zeros(width, width, dtype=torch.float64)

    def update() -> tuple[Tensor, Tensor]:
        nonlocal total, products
        wide = features.double()
        total += wide.sum(dim=0)
        products += wide.t().mm(wide)
        return total, products

    return update


def _check_torchmetrics_moments(inputs: dict[str, Any]) -> None:
    from fastgen.ops.moments import moments_reference

    total, products = _torchmetrics_moments(inputs, "fwd")()
    n, expected = len(inputs["features"]), moments_reference(inputs["features"])
    if not torch.allclose(products - torch.outer(total, total) / n, expected.comoment, rtol=1e-8, atol=1e-6):
        raise ParityError("co-moment differs from the reference")


def _torchmetrics_trace(inputs: dict[str, Any], mode: str) -> Callable[[], Tensor]:
    """torchmetrics' way: the eigenvalues of the product, which is not symmetric."""
    cov1, cov2 = inputs["cov1"].double(), inputs["cov2"].double()
    return lambda: torch.linalg.eigvals(cov1 @ cov2).sqrt().real.sum(-1)


def _scipy_trace(inputs: dict[str, Any], mode: str) -> Callable[[], Tensor]:
    """pytorch-fid's way: scipy's root of the product, of a single pair."""
    from scipy.linalg import sqrtm

    if len(inputs["cov1"]) != 1:
        raise ParityError("takes one pair at a time")
    product = (inputs["cov1"][0].double() @ inputs["cov2"][0].double()).numpy()
    return lambda: torch.tensor([sqrtm(product).real.trace()])


def _eager_coupling(
    x: Tensor, shift: Tensor, log_scale: Tensor, bound: str | None = None, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """As flow libraries have it."""
    if bound == "tanh":
        log_scale = torch.tanh(log_scale)
    elif bound == "sigmoid":
        log_scale = torch.nn.functional.logsigmoid(log_scale + 2)
    log_det = log_scale.flatten(1).sum(1)
    if inverse:
        return (x - shift) * torch.exp(-log_scale), -log_det
    return x * torch.exp(log_scale) + shift, log_det


@functools.cache
def _compiled_coupling() -> Callable[..., Any]:
    return torch.compile(_eager_coupling, dynamic=False)


def _coupling(function: Callable[[], Callable[..., Any]]) -> Callable[[dict[str, Any], str], Callable[[], Any]]:
    return lambda inputs, mode: bind(function(), inputs, mode, ("x", "shift", "log_scale"))


def _eager_lu_linear(
    x: Tensor,
    lower: Tensor,
    upper: Tensor,
    log_diagonal: Tensor,
    sign: Tensor,
    permutation: Tensor,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """As Glow has it: build the matrix, convolve."""
    left = torch.tril(lower, -1) + torch.eye(len(lower), dtype=lower.dtype, device=lower.device)
    matrix = left[permutation] @ (torch.triu(upper, 1) + torch.diag(sign * torch.exp(log_diagonal)))
    log_det = log_diagonal.sum() * x[0, 0].numel()
    if inverse:
        matrix, log_det = torch.inverse(matrix), -log_det
    return torch.nn.functional.conv2d(x, matrix[:, :, None, None].to(x.dtype)), log_det.expand(len(x))


def _lu_linear(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
    return bind(_eager_lu_linear, inputs, mode, ("x", "lower", "upper", "log_diagonal"))


def _own_layers(inputs: dict[str, Any], inputs_of_first: int, outputs: tuple[int, ...]) -> dict[str, Tensor]:
    """Parameters of their own, as modules have them."""
    widths = [inputs_of_first, *inputs["hidden"]]
    sizes = [*itertools.pairwise(widths), *((widths[-1], m) for m in outputs)]
    parts = iter(inputs["parameters"].split([k for n, m in sizes for k in (n * m, m)]))
    layers: dict[str, Tensor] = {}
    for i, (n, m) in enumerate(sizes):
        layers |= {f"weight{i}": next(parts).view(m, n).clone(), f"bias{i}": next(parts).clone()}
    return layers


def _network(x: Tensor, added: Tensor | None, hidden: int, limit: float | None, layers: dict[str, Tensor]) -> list[Tensor]:
    """The outputs of a module of linear layers, ``hidden`` of them under ReLUs."""
    linear = torch.nn.functional.linear
    h = x if limit is None else x.clamp(-limit, limit)
    for i in range(hidden):
        h = linear(h, layers[f"weight{i}"], layers[f"bias{i}"])
        h = torch.relu_(h if i or added is None else h + added)
    return [linear(h, layers[f"weight{i}"], layers[f"bias{i}"]) for i in range(hidden, len(layers) // 2)]


def _linear_layers(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
    hidden, limit = len(inputs["hidden"]), inputs["limit"]

    def apply(x: Tensor, added: Tensor | None = None, **layers: Tensor) -> tuple[Tensor, ...]:
        return tuple(_network(x, added, hidden, limit, layers))

    arguments = {"x": inputs["x"]} | ({} if inputs["added"] is None else {"added": inputs["added"]})
    arguments |= _own_layers(inputs, inputs["x"].shape[1], inputs["outputs"])
    return bind(apply, arguments, mode, tuple(arguments))


def _coupling_of_layers(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
    """Its parts one after the other."""
    sizes, hidden, limit = list(inputs["sizes"]), len(inputs["hidden"]), inputs["limit"]
    if inputs["flip"] or inputs["added"] is not None:
        raise ParityError("this peer moves the second part, without a context")

    def apply(x: Tensor, **layers: Tensor) -> tuple[Tensor, Tensor]:
        stays, moves = x.split(sizes, 1)
        shift, log_scale = _network(stays, None, hidden, limit, layers)
        y, log_det = _eager_coupling(moves, shift, log_scale, bound=inputs["bound"], inverse=inputs["inverse"])
        return torch.cat((stays, y), 1), log_det

    arguments = {"x": inputs["x"], **_own_layers(inputs, sizes[0], (sizes[1], sizes[1]))}
    return bind(apply, arguments, mode, tuple(arguments))


def _check_layers(
    peer: Callable[[dict[str, Any], str], Callable[[], Any]], op: str, names: tuple[str, ...]
) -> Callable[[dict[str, Any]], None]:
    """Compares outputs and gradients with the op's reference, those of all parameters joined."""

    def check(inputs: dict[str, Any]) -> None:
        reference = get_spec(op).reference
        known = {name: value for name, value in inputs.items() if name != "keep"}
        with torch.enable_grad():
            expected = bind(reference, known, "fwdbwd", names)()
            found = peer(inputs, "fwdbwd")()
        first = len(expected) - 1
        joined = torch.cat([g.flatten() for g in found[first:]])
        for got, right in zip((*found[:first], joined), expected, strict=True):
            if not torch.allclose(got, right, rtol=1e-4, atol=1e-4 * float(right.detach().abs().max())):
                raise ParityError("not the outputs and gradients of the reference")

    return check


def _fused_attention(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
    def attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        queries, keys, values = queries.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2)
        return torch.nn.functional.scaled_dot_product_attention(queries, keys, values).transpose(1, 2)

    return bind(attend, inputs, mode, ("queries", "keys", "values"))


def _check_fused_attention(inputs: dict[str, Any]) -> None:
    from fastgen.ops.attention import attention_reference

    if not torch.allclose(_fused_attention(inputs, "fwd")(), attention_reference(**inputs), rtol=1e-4, atol=1e-5):
        raise ParityError("not the attention of the reference")


def _torch_quantile(inputs: dict[str, Any], mode: str) -> Callable[[], Tensor]:
    """The lines of diffusers' dynamic thresholding."""
    x0, quantile, maximum = inputs["x0"], inputs["quantile"], inputs["maximum"]

    def threshold() -> Tensor:
        flat = x0.reshape(len(x0), -1)
        s = torch.quantile(flat.abs(), quantile, dim=1).clamp(1, maximum).unsqueeze(1)
        return (torch.clamp(flat, -s, s) / s).reshape(x0.shape)

    return threshold


_SPLINE = ("x", "widths", "heights", "derivatives")


def _zuko_spline(bound: float, inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    from zuko.transforms import MonotonicRQSTransform

    def spline(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        transform = MonotonicRQSTransform(widths, heights, derivatives, bound=bound)
        y, log_det = (transform.inv if inverse else transform).call_and_ladj(x)
        return y, log_det.flatten(1).sum(1)

    return spline


def _nflows_spline(bound: float, inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    from nflows.transforms.splines.rational_quadratic import unconstrained_rational_quadratic_spline

    def spline(x: Tensor, widths: Tensor, heights: Tensor, derivatives: Tensor) -> tuple[Tensor, Tensor]:
        parameters = (widths, heights, derivatives)
        y, log_det = unconstrained_rational_quadratic_spline(x, *parameters, inverse, tails="linear", tail_bound=bound)
        return y, log_det.flatten(1).sum(1)

    return spline


@functools.cache
def _compiled_spline(bound: float, inverse: bool) -> Callable[..., tuple[Tensor, Tensor]]:
    return torch.compile(_zuko_spline(bound, inverse), dynamic=False)


def _spline(name: str, make: Callable[[float, bool], Callable[..., tuple[Tensor, Tensor]]], convention: str) -> Peer:
    """A peer that normalises the parameters in its own way, whatever the convention of the workload: the same work."""

    def build(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
        return bind(make(inputs["bound"], inputs["inverse"]), {n: inputs[n] for n in _SPLINE}, mode, _SPLINE)

    def check(inputs: dict[str, Any]) -> None:
        from fastgen.ops.rq_spline import rq_spline_reference

        bound, inverse = inputs["bound"], inputs["inverse"]
        wide = {n: inputs[n].double() for n in _SPLINE}
        expected = rq_spline_reference(**wide, bound=bound, inverse=inverse, convention=convention)
        # with gradients where they are timed, or a compiler would work twice
        leaves = {n: inputs[n].clone().requires_grad_(torch.is_grad_enabled()) for n in _SPLINE}
        got = make(bound, inverse)(**leaves)
        for output, mine, theirs in zip(("y", "log_det"), got, expected, strict=True):
            if not torch.allclose(mine.double(), theirs, rtol=1e-3, atol=1e-3):
                raise ParityError(f"{output} differs from the reference in the convention of {convention}")

    return Peer(name, build, check)


def _vq_codebook(inputs: dict[str, Any]) -> Any:
    """The codebook of vector-quantize-pytorch in the state of the inputs; it renews itself in place."""
    from vector_quantize_pytorch import VectorQuantize

    codes, width = inputs["codebook"].shape
    book = VectorQuantize(
        width, codes, decay=inputs["decay"], eps=inputs["eps"], threshold_ema_dead_code=0, rotation_trick=False
    )._codebook.train()
    for name, value in (("embed", "codebook"), ("embed_avg", "sums"), ("cluster_size", "counts")):
        getattr(book, name).copy_(inputs[value][None])
    return book.to(inputs["z"].device)


def _vq_step(inputs: dict[str, Any], mode: str) -> Callable[[], Any]:
    book, z = _vq_codebook(inputs), inputs["z"][None]
    return lambda: book(z)


def _check_vq_step(inputs: dict[str, Any]) -> None:
    """On vectors close to a code each, so that rounding cannot choose another."""
    from benchmarks.composites import codebook_step_reference

    codebook = inputs["codebook"]
    generator = torch.Generator().manual_seed(3)
    own = torch.randint(len(codebook), (len(inputs["z"]),), generator=generator)
    z = codebook[own] + 0.01 * torch.randn(inputs["z"].shape, generator=generator).to(codebook)
    given = {**inputs, "z": z}
    book = _vq_codebook(given)
    codes, index, _ = book(z[None])
    got = (index[0], codes[0], book.cluster_size[0], book.embed_avg[0], book.embed[0])
    names = ("index", "codes", "counts", "sums", "codebook")
    for name, mine, theirs in zip(names, got, codebook_step_reference(**given), strict=True):
        if mine.shape != theirs.shape or not torch.allclose(mine.double(), theirs.double(), rtol=1e-3, atol=1e-4):
            raise ParityError(f"{name} differs from the reference")


def _cdist_argmin(inputs: dict[str, Any], mode: str) -> Callable[[], Tensor]:
    """The index alone, through the matrix of all distances."""
    z, codebook = inputs["z"], inputs["codebook"]
    return lambda: torch.cdist(z, codebook).argmin(1)


def _check_choice(index: Tensor, inputs: dict[str, Any]) -> None:
    """Near ties may fall either way: it is the distance of the chosen code that must be the least."""
    from fastgen.ops.nearest_code import nearest_code_reference

    chosen = (inputs["z"].double() - inputs["codebook"].double()[index]).square().sum(1)
    if not torch.allclose(
        chosen, nearest_code_reference(inputs["z"].double(), inputs["codebook"].double()).distance, rtol=1e-3
    ):
        raise ParityError("some codes are not the nearest")


def _eager_bias_act(x: Tensor, b: Tensor | None, dim: int, act: str, clamp: float | None) -> Tensor:
    """As StyleGAN's ports without a kernel have it: one operation after the other."""
    from fastgen.ops.bias_act import ACTIVATIONS

    if b is not None:
        x = x + b.reshape([-1 if i == dim else 1 for i in range(x.dim())])
    x = ACTIVATIONS[act].function(x, 0.2)
    if ACTIVATIONS[act].gain != 1:
        x = x * ACTIVATIONS[act].gain
    return x if clamp is None else x.clamp(-clamp, clamp)


@functools.cache
def _compiled_bias_act() -> Callable[..., Any]:
    return torch.compile(_eager_bias_act, dynamic=False)


def _bias_act(function: Callable[[], Callable[..., Any]]) -> Callable[[dict[str, Any], str], Callable[[], Any]]:
    return lambda inputs, mode: bind(function(), inputs, mode, ("x", "b"))


def _transposed_convolution(
    x: Tensor, f: Tensor, up: int, padding: tuple[int, int, int, int], gain: float = 1, flip_filter: bool = False
) -> Tensor:
    """Upsampling as PyTorch does it best: a depthwise transposed convolution, then a crop."""
    weight = gain * (torch.outer(f, f) if f.dim() == 1 else f)
    weight = weight.flip(0, 1) if flip_filter else weight
    # its output begins where the filter meets the first pixel: len(f) - 1 pixels before ours without padding
    (height, width), (x0, x1, y0, y1) = weight.shape, padding
    y = torch.nn.functional.conv_transpose2d(x, weight.expand(x.shape[1], 1, -1, -1), stride=up, groups=x.shape[1])
    sides = [x0 - width + 1, x1 - width + up, y0 - height + 1, y1 - height + up]
    return torch.nn.functional.pad(y, sides)


def _eager_group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    eps: float = 1e-5,
    activation: str | None = "silu",
) -> Tensor:
    """As U-Nets have it."""
    z = torch.nn.functional.group_norm(x, groups, weight, bias, eps)
    ones = (1,) * (x.dim() - 2)
    if scale is not None:
        z = z * (1 + scale.reshape(*scale.shape, *ones))
    if shift is not None:
        z = z + shift.reshape(*shift.shape, *ones)
    return torch.nn.functional.silu(z) if activation else z


@functools.cache
def _compiled_group_norm() -> Callable[..., Any]:
    return torch.compile(_eager_group_norm, dynamic=False)


def _group_norm(function: Callable[[], Callable[..., Any]]) -> Callable[[dict[str, Any], str], Callable[[], Any]]:
    return lambda inputs, mode: bind(function(), inputs, mode, ("x", "weight", "bias", "scale", "shift"))


def _onednn_conv2d(inputs: dict[str, Any], mode: str) -> Callable[[], Tensor]:
    """What PyTorch's own compiler calls: the weight in oneDNN's layout, the bias inside."""
    x, bias = inputs["x"], inputs["bias"]
    last = inputs["weight"].contiguous(memory_format=torch.channels_last)
    one = [1, 1]
    weight = torch.ops.mkldnn._reorder_convolution_weight(last, one, one, one, 1, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, weight, bias, one, one, one, 1, "none", [], "")


def _check_onednn_conv2d(inputs: dict[str, Any]) -> None:
    expected = torch.nn.functional.conv2d(inputs["x"], inputs["weight"], inputs["bias"], padding=1)
    if not torch.allclose(_onednn_conv2d(inputs, "fwd")(), expected, rtol=1e-4, atol=1e-5):
        raise ParityError("not the convolution")


PEERS: dict[str, list[Peer]] = {
    **diffusion_peers.PEERS,
    "affine_coupling": [
        Peer("eager PyTorch", _coupling(lambda: _eager_coupling)),
        Peer("torch.compile of it", _coupling(_compiled_coupling)),
    ],
    "bias_act": [
        Peer("eager PyTorch", _bias_act(lambda: _eager_bias_act)),
        Peer("torch.compile of it", _bias_act(_compiled_bias_act)),
    ],
    "group_norm_silu": [
        Peer("eager PyTorch", _group_norm(lambda: _eager_group_norm)),
        Peer("torch.compile of it", _group_norm(_compiled_group_norm)),
    ],
    "attention": [Peer("F.scaled_dot_product_attention", _fused_attention, _check_fused_attention)],
    "lu_linear": [Peer("eager PyTorch", _lu_linear)],
    "perceptron": [
        Peer(
            "eager PyTorch",
            _linear_layers,
            _check_layers(_linear_layers, "perceptron", ("x", "added", "parameters")),
        )
    ],
    "perceptron_coupling": [
        Peer(
            "eager PyTorch",
            _coupling_of_layers,
            _check_layers(_coupling_of_layers, "perceptron_coupling", ("x", "parameters")),
        )
    ],
    "codebook_step": [Peer("vector-quantize-pytorch", _vq_step, _check_vq_step, modes=("fwd",))],
    "dynamic_threshold": [Peer("torch.quantile, clamp, divide", _torch_quantile, modes=("fwd",))],
    "rq_spline": [
        _spline("zuko", _zuko_spline, "zuko"),
        _spline("nflows", _nflows_spline, "nflows"),
        _spline("torch.compile of zuko's", _compiled_spline, "zuko"),
    ],
    "moments": [
        Peer("torchmetrics' update, float64", _torchmetrics_moments, _check_torchmetrics_moments, modes=("fwd",)),
    ],
    "trace_sqrt_product": [
        Peer("torchmetrics' way, eigvals", _torchmetrics_trace, modes=("fwd",), slow=True),
        Peer("scipy sqrtm", _scipy_trace, modes=("fwd",), slow=True),
    ],
    "nearest_code": [
        Peer(
            "torch.cdist + argmin",
            _cdist_argmin,
            lambda inputs: _check_choice(_cdist_argmin(inputs, "fwd")(), inputs),
            when=lambda flags: not flags.get("statistics"),
            modes=("fwd",),
        ),
    ],
    "normal": [
        Peer("torch.randn", _torch_randn, _check_randn),
        Peer(
            "diffusers randn_tensor, one generator a sample",
            _diffusers_randn,
            _check_diffusers_randn,
            when=lambda flags: bool(flags.get("per_sample")),
        ),
    ],
    "uniform": [Peer("torch.rand", _torch_rand, _check_rand)],
    "ready_conv2d": [Peer("oneDNN, weight laid out beforehand", _onednn_conv2d, _check_onednn_conv2d, modes=("fwd",))],
    "upfirdn2d": [
        Peer(
            "depthwise conv_transpose2d",
            lambda inputs, mode: bind(_transposed_convolution, inputs, mode, ("x",)),
            when=lambda flags: flags.get("resampling", "up 2") == "up 2",
        ),
    ],
    "reparameterize": [
        Peer(
            "eager PyTorch",
            _reparameterize(lambda: _eager_reparameterize),
            _check_reparameterize(lambda: _eager_reparameterize),
        ),
        Peer(
            "torch.compile of it",
            _reparameterize(_compiled_reparameterize),
            _check_reparameterize(_compiled_reparameterize),
        ),
        # not a way to do the work: the least that any op with a gradient in Python costs, right by definition
        Peer("an autograd function that computes nothing", _record_alone, lambda inputs: None, modes=("fwdbwd",)),
    ],
}
