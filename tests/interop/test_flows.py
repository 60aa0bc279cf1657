"""nflows' names, and weights of zuko, nflows and normflows: the same functions, the same densities."""

import pytest
import torch

import fastgen
from fastgen import random
from fastgen.flows.elementwise import Spline
from fastgen.interop import nflows as ours
from fastgen.interop.nflows import from_nflows
from fastgen.interop.normflows import from_normflows
from fastgen.interop.zuko import from_zuko


def shake(module, size=0.3):
    """Random parameters: some start at zero or near it."""
    torch.manual_seed(3)
    for parameter in module.parameters():
        parameter.data += size * torch.randn_like(parameter)
    return module


def splines(n=200, bins=6, derivatives=7, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, k, generator=generator).double() for k in (bins, bins, derivatives)]


BOX = {"left": -2.0, "right": 1.0, "bottom": 0.5, "top": 3.0}


def test_spline_maps_the_box_and_is_undone():
    parameters = splines()
    x = torch.linspace(-2, 1, 200).double().requires_grad_()
    y, ladj = ours.rational_quadratic_spline(x, *parameters, **BOX)
    assert (y.diff() != 0).all()
    torch.testing.assert_close(y[[0, -1]].detach(), torch.tensor([0.5, 3.0]).double())
    (slope,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(ladj, slope.log())
    back, ladj_back = ours.rational_quadratic_spline(y.clamp(0.5, 3.0), *parameters, inverse=True, **BOX)
    torch.testing.assert_close(back, x)
    torch.testing.assert_close(ladj_back, -ladj)


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("least", [1e-3, 0.02])
def test_unconstrained_spline_is_the_fused_op_of_single_elements(inverse, least):
    parameters = [p.view(50, 4, -1) for p in splines(derivatives=5)]
    x = 3 * torch.randn(50, 4).double()
    minima = {f"min_{name}": least for name in ("bin_width", "bin_height", "derivative")}
    y, ladj = ours.unconstrained_rational_quadratic_spline(x, *parameters, inverse=inverse, tail_bound=2.5, **minima)
    assert torch.equal(y[x.abs() > 2.5], x[x.abs() > 2.5])
    assert torch.equal(ladj[x.abs() > 2.5], torch.zeros_like(ladj[x.abs() > 2.5]))
    expected = fastgen.ops.rq_spline(x, *parameters, bound=2.5, inverse=inverse)
    if least == 1e-3:
        torch.testing.assert_close(y, expected.y)
        torch.testing.assert_close(ladj.sum(1), expected.log_det)
    else:
        assert (y - expected.y).abs().max() > 1e-3
        back, _ = ours.unconstrained_rational_quadratic_spline(y, *parameters, inverse=not inverse, tail_bound=2.5, **minima)
        torch.testing.assert_close(back, x)


def test_spline_errors():
    parameters = splines(n=2)
    with pytest.raises(ours.InputOutsideDomain, match=r"inputs must be in \[0.0, 1.0\], got 0 .. 1.5"):
        ours.rational_quadratic_spline(torch.tensor([0.0, 1.5]).double(), *parameters)
    with pytest.raises(ValueError, match="min_bin_width must be at most 1 / 6 for 6 bins"):
        ours.rational_quadratic_spline(torch.zeros(2).double(), *parameters, min_bin_width=0.2)
    with pytest.raises(RuntimeError, match="circular tails are not implemented"):
        ours.unconstrained_rational_quadratic_spline(torch.zeros(2).double(), *parameters, tails="circular")


@pytest.mark.parametrize("context", [0, 2])
def test_flow_has_the_methods_of_nflows(context):
    model = shake(fastgen.create("nsf", features=3, layers=2, hidden=(8,), context=context)).double()
    c = torch.randn(4, context).double() if context else None
    flow = ours.Flow(model.transform, ours.StandardNormal([3]).double())
    x = torch.randn(4, 3).double()
    torch.testing.assert_close(flow.log_prob(x, c), model.log_prob(x, c))
    torch.testing.assert_close(flow.transform_to_noise(x, c), model.encode(x, c))
    leading = (4, 7) if context else (7,)
    assert flow.sample(7, c).shape == (*leading, 3)
    assert flow.sample(7, c, batch_size=3).shape == (*leading, 3)
    samples, log_prob = flow.sample_and_log_prob(7, c)
    assert log_prob.shape == leading
    rows = None if c is None else c.repeat_interleave(7, 0)
    torch.testing.assert_close(model.log_prob(samples.reshape(-1, 3), rows).view(leading), log_prob)
    if context:
        with pytest.raises(ValueError, match="one row per input: 4, got 3"):
            flow.log_prob(x, c[:3])


def test_flow_embeds_its_context():
    model = shake(fastgen.create("maf", features=3, layers=2, hidden=(8,), context=2))
    net = torch.nn.Linear(5, 2)
    flow = ours.Flow(model.transform, ours.StandardNormal((3,)), net)
    x, c = torch.randn(4, 3), torch.randn(4, 5)
    torch.testing.assert_close(flow.log_prob(x, c), model.log_prob(x, net(c)))
    with pytest.raises(ValueError, match=r"inputs must be \[N, 3\], got \[2, 4\]"):
        ours.StandardNormal([3]).log_prob(torch.zeros(2, 4))


def compare(flow, peer, log_prob, features, context=0):
    """log p against the peer's in double precision; and the way there and back."""
    x = 1.5 * torch.randn(40, features)  # much farther out a log-density is millions of nats, and float32 is off by thousands
    c = torch.randn(40, context) if context else None
    with torch.no_grad():
        single = flow.log_prob(x, c).double()
        flow, peer, x, c = flow.double(), peer.double(), x.double(), None if c is None else c.double()
        expected = log_prob(x, c)
        torch.testing.assert_close(single, expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(flow.log_prob(x, c), expected, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(flow.decode(flow.encode(x, c), c), x, rtol=1e-6, atol=1e-6)


ZUKO = {
    "nsf": ("NSF", {"transforms": 3, "bins": 5, "hidden_features": (16, 20)}),
    "nsf-context": ("NSF", {"transforms": 2, "context": 2, "hidden_features": (16,)}),
    "nsf-randperm": ("NSF", {"transforms": 2, "randperm": True, "hidden_features": (16, 16)}),
    "maf": ("MAF", {"transforms": 3, "hidden_features": (16, 16)}),
    "maf-context": ("MAF", {"transforms": 2, "context": 3, "hidden_features": (16, 16, 7)}),
    "realnvp": ("RealNVP", {"transforms": 4, "hidden_features": (16, 16)}),
    "realnvp-context": ("RealNVP", {"transforms": 2, "context": 1, "randmask": True, "hidden_features": (16,)}),
}


@pytest.mark.parametrize("case", ZUKO)
def test_zuko(case):
    zuko = pytest.importorskip("zuko")
    name, options = ZUKO[case]
    peer = shake(getattr(zuko.flows, name)(features=5, **options))
    compare(from_zuko(peer), peer, lambda x, c: peer(c).log_prob(x), 5, options.get("context", 0))


def test_zuko_refusals():
    zuko = pytest.importorskip("zuko")
    with pytest.raises(ValueError, match="cannot convert a masked transform that is not fully autoregressive"):
        from_zuko(zuko.flows.NSF(features=4, passes=2))
    with pytest.raises(ValueError, match=r"cannot convert the activation ELU.*: ReLU is expected"):
        from_zuko(zuko.flows.MAF(features=4, activation=torch.nn.ELU))
    with pytest.raises(ValueError, match="cannot convert a base distribution"):
        from_zuko(zuko.flows.NCSF(features=4))


def nflows_cases():
    from nflows import transforms as t
    from nflows.distributions.normal import StandardNormal
    from nflows.flows import MaskedAutoregressiveFlow, SimpleRealNVP
    from nflows.flows.base import Flow
    from nflows.nn.nets import ResidualNet

    def net(context=None):
        return lambda i, o: ResidualNet(i, o, hidden_features=16, context_features=context)

    def coupling(sign, **options):
        context = options.pop("context", None)
        mask = sign * torch.tensor([1, -1, 1, 1, -1])
        return t.PiecewiseRationalQuadraticCouplingTransform(
            mask, net(context), num_bins=6, tails="linear", tail_bound=3.0, **options
        )

    def spline(**options):
        return t.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
            5, 17, num_bins=6, tails="linear", tail_bound=3.0, **options
        )

    def flow(*layers):
        return Flow(t.CompositeTransform(list(layers)), StandardNormal([5]))

    return {
        "maf": lambda: MaskedAutoregressiveFlow(5, 17, 3, 2),
        "maf-feedforward": lambda: MaskedAutoregressiveFlow(5, 17, 2, 1, use_residual_blocks=False),
        "maf-permutations": lambda: MaskedAutoregressiveFlow(5, 17, 3, 1, use_random_permutations=True),
        "realnvp": lambda: SimpleRealNVP(5, 16, 3, 2),
        "nice": lambda: SimpleRealNVP(5, 16, 3, 2, use_volume_preserving=True),
        "nsf": lambda: flow(coupling(1), t.LULinear(5), coupling(-1), t.RandomPermutation(5)),
        "nsf-unconditional": lambda: flow(coupling(1, apply_unconditional_transform=True), t.NaiveLinear(5)),
        "nsf-context": lambda: flow(coupling(1, context=2), coupling(-1, context=2)),
        "nsf-autoregressive": lambda: flow(spline(), t.ReversePermutation(5), spline()),
        "nsf-autoregressive-context": lambda: flow(spline(context_features=2), spline(context_features=2)),
        "iaf": lambda: flow(t.InverseTransform(t.MaskedAffineAutoregressiveTransform(5, 17))),
    }


NFLOWS = [
    "maf", "maf-feedforward", "maf-permutations", "realnvp", "nice", "nsf", "nsf-unconditional", "nsf-context",
    "nsf-autoregressive", "nsf-autoregressive-context", "iaf",
]  # fmt: skip


@pytest.mark.parametrize("case", NFLOWS)
def test_nflows(case):
    pytest.importorskip("nflows")
    peer = shake(nflows_cases()[case](), 0.15)
    compare(from_nflows(peer), peer, peer.log_prob, 5, 2 if "context" in case else 0)


@pytest.mark.parametrize("inverse", [False, True])
def test_splines_are_those_of_nflows(inverse):
    theirs = pytest.importorskip("nflows.transforms.splines.rational_quadratic")
    parameters = splines()
    x = torch.linspace(0.01, 0.99, 200).double()
    expected = theirs.rational_quadratic_spline(x, *parameters, inverse=inverse, min_derivative=0.01)
    got = ours.rational_quadratic_spline(x, *parameters, inverse=inverse, min_derivative=0.01)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    parameters = splines(derivatives=5)
    x = 3 * torch.randn(200).double()
    for least in (1e-3, 0.01):
        options = {"inverse": inverse, "tail_bound": 2.0, "min_bin_width": least}
        expected = theirs.unconstrained_rational_quadratic_spline(x, *parameters, **options)
        got = ours.unconstrained_rational_quadratic_spline(x, *parameters, **options)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_nflows_refusals():
    pytest.importorskip("nflows")
    from nflows import flows

    with pytest.raises(ValueError, match="cannot convert batch normalisation"):
        from_nflows(flows.MaskedAutoregressiveFlow(5, 17, 1, 1, batch_norm_within_layers=True))
    with pytest.raises(ValueError, match="cannot convert the transform BatchNorm"):
        from_nflows(flows.MaskedAutoregressiveFlow(5, 17, 1, 1, batch_norm_between_layers=True))
    with pytest.raises(ValueError, match=r"cannot convert dropout, here 0\.5"):
        from_nflows(flows.SimpleRealNVP(5, 17, 1, 1, dropout_probability=0.5))
    with pytest.raises(ValueError, match="cannot convert the activation"):
        from_nflows(flows.SimpleRealNVP(5, 17, 1, 1, activation=torch.tanh))


def normflows_cases():
    import normflows as nf

    def mask(i):
        return torch.arange(5) % 2 == i % 2

    def real(i):
        s, t = (nf.nets.MLP([5, 16, 16, 5], init_zeros=True) for _ in range(2))
        return nf.flows.MaskedAffineFlow(mask(i).float(), t, s)

    def block(scale_map, mode):
        moved = 2 if mode == "channel" else 3
        return nf.flows.AffineCouplingBlock(nf.nets.MLP([5 - moved, 16, 2 * moved]), scale_map=scale_map, split_mode=mode)

    spline, masked = nf.flows.CoupledRationalQuadraticSpline, nf.flows.AutoregressiveRationalQuadraticSpline
    return {
        "nsf": lambda: [spline(5, 2, 16), nf.flows.LULinearPermute(5), spline(5, 1, 16, reverse_mask=True)],
        "nsf-autoregressive": lambda: [masked(5, 2, 17), nf.flows.LULinearPermute(5), masked(5, 1, 17, permute_mask=True)],
        "realnvp": lambda: [real(0), real(1), real(2)],
        "blocks": lambda: [
            block("exp", "channel"),
            nf.flows.Permute(5, mode="swap"),
            block("sigmoid", "channel"),
            nf.flows.Permute(5, mode="shuffle"),
            block("sigmoid_inv", "channel_inv"),
        ],
        "maf": lambda: [nf.flows.MaskedAffineAutoregressive(5, 17, num_blocks=2), nf.flows.Permute(5)],
    }


@pytest.mark.parametrize("case", ["nsf", "nsf-autoregressive", "realnvp", "blocks", "maf"])
def test_normflows(case):
    nf = pytest.importorskip("normflows")
    peer = shake(nf.NormalizingFlow(nf.distributions.DiagGaussian(5), normflows_cases()[case]()), 0.15)
    compare(from_normflows(peer), peer, lambda x, c: peer.log_prob(x), 5)


def test_imported_flow_is_a_model():
    zuko = pytest.importorskip("zuko")
    flow = from_zuko(zuko.flows.NSF(features=3, transforms=2, hidden_features=(8,)))
    assert flow.sample(4, key=random.key(0)).shape == (4, 3)
    assert any(isinstance(getattr(m, "elementwise", None), Spline) for m in flow.modules())
    first = flow.loss(torch.zeros(8, 3)).loss.item()
    fastgen.fit(flow, torch.zeros(8, 3), steps=30, batch_size=8, progress=False)
    assert flow.loss(torch.zeros(8, 3)).loss.item() < first
