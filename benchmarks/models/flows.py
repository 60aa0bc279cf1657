"""Flows against zuko, nflows, normflows and FrEIA: the same layers on the same weights; and invertible backpropagation."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from benchmarks.models.case import Case, Goal, Side
from benchmarks.models.common import difference, training_step
from fastgen.flows.coupling import AffineCoupling, Coupling
from fastgen.flows.flow import Flow
from fastgen.flows.glow import Glow, GlowConfig
from fastgen.flows.linear import ActNorm, LULinear
from fastgen.flows.nsf import NSF, NSFConfig
from fastgen.flows.realnvp import RealNVP, RealNVPConfig

__all__ = ["CASES"]

_OURS, _ZUKO, _NFLOWS, _NORMFLOWS, _FREIA = "fastgen", "zuko", "nflows", "normflows", "FrEIA"
_INVERTIBLE = "fastgen, invertible backpropagation"
_PARTLY = "fastgen, three quarters of the layers stored"
_BINS, _BOUND = 8, 5.0
_SAME = 1e-4


@dataclasses.dataclass
class _PeerFlow:
    """A flow of another library, and ours with its weights."""

    module: nn.Module
    log_prob: Callable[[Tensor], Tensor]
    invert: Callable[[Tensor], Tensor]
    """From noise to data."""
    sample: Callable[[int], Any]
    ours: Flow
    reverse: bool = False
    """The peer's way from data to noise is our way back."""

    def _of_ours(self, x: Tensor) -> Tensor:
        if not self.reverse:
            return self.ours.log_prob(x)
        z, ladj = self.ours.transform.inv_and_ladj(x)
        return self.ours.base.log_prob(z) + ladj

    def check_density(self, x: Tensor) -> float:
        """log p(x) and its gradient in x."""

        def signature(log_prob: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
            leaf = x.clone().requires_grad_()
            values = log_prob(leaf)
            return values, torch.autograd.grad(values.sum(), leaf)[0]

        (ours, ours_grad), (theirs, theirs_grad) = signature(self._of_ours), signature(self.log_prob)
        # gradients jump at the knots of a spline, where rounding may fall either way: one sample of a thousand is left out
        far = (ours_grad - theirs_grad).flatten(1).norm(dim=1).argsort()
        kept = far[: len(x) - len(x) // 1000]
        return max(difference(ours, theirs, _SAME), difference(ours_grad[kept], theirs_grad[kept], _SAME))

    @torch.no_grad()
    def check_sample(self, z: Tensor) -> float:
        """The data that noise becomes."""
        return difference(self.ours.transform.inv_and_ladj(z)[0], self.invert(z), _SAME)


class _Conditioner(nn.Module):
    """The network that the examples of nflows and normflows put into a coupling, with their signature."""

    def __init__(self, inputs: int, outputs: int, hidden: Sequence[int]) -> None:
        super().__init__()
        self.hidden_features = hidden[-1]  # both scale widths and heights by its root
        layers = [nn.Sequential(nn.Linear(n, m), nn.ReLU()) for n, m in itertools.pairwise((inputs, *hidden))]
        self.net = nn.Sequential(*layers, nn.Linear(hidden[-1], outputs))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.net(x)


def _linear_layers(module: nn.Module) -> list[nn.Linear]:
    """Those of PyTorch's own class, and of zuko's, which is like it."""
    return [cast("nn.Linear", layer) for layer in module.modules() if getattr(layer, "weight", torch.zeros(0)).dim() == 2]


@torch.no_grad()
def _copy_network(theirs: nn.Module, ours: nn.Module, rows: Sequence[Tensor], scales: Sequence[float] | None = None) -> None:
    """The weights of a fully connected network into our conditioner.

    Args:
        theirs: a network whose last layer gives all parameters.
        ours: an ``MLPConditioner``, with a last layer for each kind of parameter.
        rows: which outputs of theirs are each of our kinds.
        scales: what theirs are divided by later on.
    """
    *hidden, last = _linear_layers(theirs)
    own = _linear_layers(ours)
    for mine, layer in zip(own, hidden, strict=False):
        mine.load_state_dict(layer.state_dict())
    for mine, chosen, scale in zip(own[len(hidden) :], rows, scales or [1.0] * len(rows), strict=True):
        mine.weight.copy_(last.weight[chosen] / scale)
        mine.bias.copy_(last.bias[chosen] / scale)


def _couplings(flow: Flow) -> list[Coupling]:
    return [layer for layer in flow.modules() if isinstance(layer, Coupling)]


@dataclasses.dataclass(frozen=True)
class _Spline:
    """Neural spline couplings: sizes, and the flow in every library. Even layers transform the second half, odd the first."""

    features: int
    layers: int
    hidden: tuple[int, ...]

    def ours(self, convention: str = "zuko", memory: str = "standard") -> NSF:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            options: dict[str, Any] = {"convention": convention, "memory": memory}
            return NSF(
                NSFConfig(
                    event_shape=(self.features,), layers=self.layers, hidden=self.hidden, bins=_BINS, bound=_BOUND, **options
                )
            )

    def _with_weights(self, networks: Sequence[nn.Module], convention: str, scaled: bool) -> NSF:
        """Ours, with the weights of networks that give, element by element, widths, heights and derivatives."""
        flow, half = self.ours(convention), self.features // 2
        index = torch.arange(half * (3 * _BINS - 1)).view(half, -1)
        rows = [index[:, :_BINS], index[:, _BINS : 2 * _BINS], index[:, 2 * _BINS :]]
        root = self.hidden[-1] ** 0.5 if scaled else 1.0
        for network, layer in zip(networks, _couplings(flow), strict=True):
            _copy_network(network, layer.conditioner, [r.flatten() for r in rows], (root, root, 1.0))
        return flow

    def _stays(self, layer: int) -> list[bool]:
        first = [layer % 2 == 0] * (self.features // 2)
        return first + [not stays for stays in first]

    def zuko(self) -> _PeerFlow:
        import zuko

        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [
                zuko.flows.coupling.GeneralCouplingTransform(
                    self.features,
                    mask=torch.tensor(self._stays(i)),
                    univariate=functools.partial(zuko.transforms.MonotonicRQSTransform, bound=_BOUND),
                    shapes=[(_BINS,), (_BINS,), (_BINS - 1,)],
                    hidden_features=self.hidden,
                )
                for i in range(self.layers)
            ]
        zeros, ones = torch.zeros(self.features), torch.ones(self.features)
        base = zuko.lazy.UnconditionalDistribution(zuko.distributions.DiagNormal, zeros, ones, buffer=True)
        flow = zuko.flows.Flow(layers, base)
        return _PeerFlow(
            flow,
            lambda x: flow().log_prob(x),
            flow().transform.inv,
            lambda n: flow().sample((n,)),
            self._with_weights([layer.hyper for layer in layers], "zuko", scaled=False),
        )

    def nflows(self) -> _PeerFlow:
        from nflows.distributions.normal import StandardNormal
        from nflows.flows import Flow as Composed
        from nflows.transforms import CompositeTransform, PiecewiseRationalQuadraticCouplingTransform

        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [
                PiecewiseRationalQuadraticCouplingTransform(
                    torch.tensor(self._stays(i)).logical_not().int(),
                    functools.partial(_Conditioner, hidden=self.hidden),
                    num_bins=_BINS,
                    tails="linear",
                    tail_bound=_BOUND,
                )
                for i in range(self.layers)
            ]
        flow = Composed(CompositeTransform(layers), StandardNormal([self.features]))
        return _PeerFlow(
            flow,
            flow.log_prob,
            lambda z: flow._transform.inverse(z)[0],
            flow.sample,
            self._with_weights([layer.transform_net for layer in layers], "nflows", scaled=True),
        )

    def normflows(self) -> _PeerFlow:
        import normflows
        from normflows.flows.neural_spline.coupling import PiecewiseRationalQuadraticCoupling

        with torch.random.fork_rng():
            torch.manual_seed(0)
            layers = []
            for i in range(self.layers):
                # the wrapper with the library's direction, around a coupling with this network
                layer = normflows.flows.CoupledRationalQuadraticSpline(self.features, 1, 8)
                layer.prqct = PiecewiseRationalQuadraticCoupling(
                    torch.tensor(self._stays(i)).logical_not().int(),
                    functools.partial(_Conditioner, hidden=self.hidden),
                    num_bins=_BINS,
                    tails="linear",
                    tail_bound=_BOUND,
                )
                layers.append(layer)
        base = normflows.distributions.DiagGaussian(self.features, trainable=False)
        flow = normflows.NormalizingFlow(base, layers[::-1])

        def invert(z: Tensor) -> Tensor:
            for layer in flow.flows:
                z, _ = layer(z)
            return z

        networks = [layer.prqct.transform_net for layer in layers]
        return _PeerFlow(flow, flow.log_prob, invert, flow.sample, self._with_weights(networks, "nflows", scaled=True))


def _flow_training(flow: nn.Module, log_prob: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], Any]:
    return training_step(list(flow.parameters()), lambda: -log_prob(x).mean())


def _data(n: int, features: int) -> Tensor:
    return 1.5 * torch.randn(n, features, generator=torch.Generator().manual_seed(1))


def _training_side(make: Callable[[], _PeerFlow], x: Tensor) -> Callable[[], Side]:
    def side() -> Side:
        peer = make()
        return Side(_flow_training(peer.module, peer.log_prob, x), lambda: make().check_density(x))

    return side


def _sampling_side(make: Callable[[], _PeerFlow], n: int, z: Tensor) -> Callable[[], Side]:
    def side() -> Side:
        peer = make()
        return Side(torch.no_grad()(lambda: peer.sample(n)), lambda: peer.check_sample(z))

    return side


def _spline_training(tiny: bool) -> dict[str, Callable[[], Side]]:
    spline, n = (_Spline(4, 2, (8, 8)), 8) if tiny else (_Spline(32, 8, (128, 128)), 4096)
    x = _data(n, spline.features)

    def ours() -> Side:
        flow = spline.ours()
        return Side(_flow_training(flow, flow.log_prob, x))

    peers = {_ZUKO: spline.zuko, _NFLOWS: spline.nflows, _NORMFLOWS: spline.normflows}
    return {_OURS: ours, **{name: _training_side(make, x) for name, make in peers.items()}}


def _spline_sampling(tiny: bool) -> dict[str, Callable[[], Side]]:
    spline, n = (_Spline(4, 2, (8, 8)), 8) if tiny else (_Spline(32, 8, (128, 128)), 65536)
    z = _data(min(n, 4096), spline.features)

    def ours() -> Side:
        flow = spline.ours()
        return Side(lambda: flow.sample(n))

    peers = {_ZUKO: spline.zuko, _NFLOWS: spline.nflows, _NORMFLOWS: spline.normflows}
    return {_OURS: ours, **{name: _sampling_side(make, n, z) for name, make in peers.items()}}


@dataclasses.dataclass(frozen=True)
class _Affine:
    """RealNVP of vectors in every library; even layers transform the second half, odd layers the first."""

    features: int
    layers: int
    hidden: tuple[int, ...]

    def ours(self, bound: str | None = "tanh", memory: str = "standard") -> RealNVP:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            options: dict[str, Any] = {"bound": bound, "memory": memory}
            return RealNVP(RealNVPConfig(event_shape=(self.features,), layers=self.layers, hidden=self.hidden, **options))

    def normflows(self) -> _PeerFlow:
        """Log-scales as they are: its ``scale_map="exp"``. Its data are our noise."""
        import normflows

        half = self.features // 2
        with torch.random.fork_rng():
            torch.manual_seed(0)
            networks = [normflows.nets.MLP([half, *self.hidden, self.features]) for _ in range(self.layers)]
        layers: list[Any] = []
        for network in networks:
            layers += [normflows.flows.AffineCouplingBlock(network), normflows.flows.Permute(self.features, mode="swap")]
        flow = normflows.NormalizingFlow(normflows.distributions.DiagGaussian(self.features, trainable=False), layers)
        ours, index = self.ours(None), torch.arange(self.features)
        for network, layer in zip(networks, _couplings(ours), strict=True):
            _copy_network(network, layer.conditioner, [index[0::2], index[1::2]])
        return _PeerFlow(flow, flow.log_prob, _unused, flow.sample, ours, reverse=True)

    def freia(self) -> _PeerFlow:
        import FrEIA.framework
        import FrEIA.modules

        half = self.features // 2
        flow = FrEIA.framework.SequenceINN(self.features)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for _ in range(self.layers):
                flow.append(
                    FrEIA.modules.AffineCouplingOneSided,
                    subnet_constructor=functools.partial(_Conditioner, hidden=self.hidden),
                    clamp=1.0,
                    clamp_activation="TANH",
                )
                flow.append(FrEIA.modules.PermuteRandom)
        index = torch.arange(self.features)
        ours = self.ours("tanh")
        for i, layer in enumerate(_couplings(ours)):
            coupling, swap = flow[2 * i], flow[2 * i + 1]
            _copy_network(coupling.subnet, layer.conditioner, [index[half:], index[:half]])
            for name in ("perm", "perm_inv"):
                getattr(swap, name).data.copy_(torch.cat([index[half:], index[:half]]))
        base = ours.base

        def log_prob(x: Tensor) -> Tensor:
            z, ladj = flow(x)
            return base.log_prob(z) + ladj

        return _PeerFlow(flow, log_prob, _unused, _unused, ours)


@dataclasses.dataclass(frozen=True)
class _Autoregressive:
    """Autoregressive neural spline flow in ours, zuko and nflows; layers alternate the order of the features."""

    features: int
    layers: int
    hidden: tuple[int, ...]

    def ours(self) -> NSF:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            sizes: dict[str, Any] = {"event_shape": (self.features,), "layers": self.layers, "hidden": self.hidden}
            return NSF(NSFConfig(kind="autoregressive", bins=_BINS, bound=_BOUND, **sizes))

    def zuko(self) -> _PeerFlow:
        import zuko

        from fastgen.interop.zuko import from_zuko

        with torch.random.fork_rng():
            torch.manual_seed(0)
            flow = zuko.flows.NSF(self.features, transforms=self.layers, bins=_BINS, hidden_features=self.hidden)

        def sample(n: int) -> Tensor:
            return flow().sample((n,))

        return _PeerFlow(flow, lambda x: flow().log_prob(x), flow().transform.inv, sample, from_zuko(flow))

    def nflows(self) -> _PeerFlow:
        from nflows import transforms
        from nflows.distributions.normal import StandardNormal
        from nflows.flows import Flow as Composed

        from fastgen.interop.nflows import from_nflows

        layers: list[Any] = []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for i in range(self.layers):
                layers += [transforms.ReversePermutation(self.features)] if i else []
                layers.append(
                    transforms.MaskedPiecewiseRationalQuadraticAutoregressiveTransform(
                        self.features,
                        self.hidden[0],
                        num_bins=_BINS,
                        tails="linear",
                        tail_bound=_BOUND,
                        num_blocks=len(self.hidden) - 1,
                        use_residual_blocks=False,
                    )
                )
        flow = Composed(transforms.CompositeTransform(layers), StandardNormal([self.features]))
        return _PeerFlow(flow, flow.log_prob, lambda z: flow._transform.inverse(z)[0], flow.sample, from_nflows(flow))


def _autoregressive_sampling(tiny: bool) -> dict[str, Callable[[], Side]]:
    sizes, n = (_Autoregressive(4, 2, (8, 8)), 8) if tiny else (_Autoregressive(64, 3, (64, 64)), 1024)
    z = _data(min(n, 64), sizes.features)

    def ours() -> Side:
        flow = sizes.ours()
        return Side(lambda: flow.sample(n))

    return {_OURS: ours, **{name: _sampling_side(make, n, z) for name, make in ((_ZUKO, sizes.zuko), (_NFLOWS, sizes.nflows))}}


def _unused(*_: Any) -> Any:
    raise NotImplementedError("this comparison does not sample")


def _affine_training(tiny: bool) -> dict[str, Callable[[], Side]]:
    affine, n = (_Affine(4, 2, (8, 8)), 8) if tiny else (_Affine(64, 16, (128, 128)), 4096)
    x = _data(n, affine.features)

    def ours() -> Side:
        flow = affine.ours()
        return Side(_flow_training(flow, flow.log_prob, x))

    return {_OURS: ours, _NORMFLOWS: _training_side(affine.normflows, x), _FREIA: _training_side(affine.freia, x)}


@dataclasses.dataclass(frozen=True)
class _Glow:
    """Glow: levels of steps; no learned prior, which normflows has not, and its log-scales."""

    shape: tuple[int, int, int]
    levels: int
    steps: int
    channels: int

    def ours(self, memory: str = "standard", stored: float = 0.0) -> Glow:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            options: dict[str, Any] = {
                "memory": memory,
                "stored": stored,
                "bound": "sigmoid",
                "learned_prior": False,
                "grey_levels": 0,
            }
            return Glow(
                GlowConfig(event_shape=self.shape, levels=self.levels, steps=self.steps, channels=self.channels, **options)
            )

    def normflows(self, x: Tensor) -> _PeerFlow:
        import normflows

        channels, height, width = self.shape
        base, merges, flows = [], [], []
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for i in range(self.levels):
                depth = self.levels - i
                block = functools.partial(normflows.flows.GlowBlock, channels * 2 ** (depth + 1), self.channels)
                flows.append([*(block() for _ in range(self.steps)), normflows.flows.Squeeze()])
                latent = (channels * 2 ** (depth + (i == 0)), height >> depth, width >> depth)
                base.append(normflows.distributions.DiagGaussian(latent, trainable=False))
                if i > 0:
                    merges.append(normflows.flows.Merge())
            flow = normflows.MultiscaleFlow(base, flows, merges, class_cond=False)
            with torch.no_grad():
                flow.log_prob(x - 0.5, None)  # its normalisation starts from a batch
                for block in flow.modules():
                    if isinstance(block, normflows.nets.ConvNet2d):
                        # shifts stay 0: after their scale there, before it here, they are no common parameter
                        block.net[-1].weight[1::2].normal_(std=0.02)
        # where pixels are centred is a constant: ours does it inside
        return _PeerFlow(flow, lambda v: flow.log_prob(v - 0.5, None), _unused, _unused, self._with_weights(flow))

    @torch.no_grad()
    def _with_weights(self, flow: Any) -> Glow:
        ours, (channels, _, _) = self.ours(), self.shape
        for level in range(self.levels):
            blocks = [b for b in reversed(flow.flows[self.levels - 1 - level]) if hasattr(b, "flows")]
            own: list[Any] = [m for m in _levels(ours)[level].modules() if type(m) in _GLOW_PARTS]
            # after the squeeze ours has the channels of the checkerboard's colours together, theirs by channel
            size = channels * 2**level
            of_ours = torch.arange(size)[None] * 4 + torch.tensor([0, 3, 1, 2])[:, None]
            order = of_ours.flatten()
            for block, normalise, mix, couple in zip(blocks, own[::3], own[1::3], own[2::3], strict=True):
                coupling, mixing, normalising = block.flows
                s, t = normalising.s.flatten()[order], normalising.t.flatten()[order]
                normalise.log_scale.copy_(-s)
                normalise.shift.copy_(-t * torch.exp(-s))
                normalise.initialized.fill_(True)
                matrix, lower, upper = torch.linalg.lu(mixing._assemble_W().double()[:, order])
                diagonal = upper.diagonal()
                mix.lower.copy_(lower.tril(-1))
                mix.upper.copy_(upper.triu(1))
                mix.log_diagonal.copy_(diagonal.abs().log())
                mix.sign.copy_(diagonal.sign())
                mix.permutation.copy_(matrix.argmax(1))
                first, middle, last = (m for m in coupling.flows[1].param_map.net if isinstance(m, nn.Conv2d))
                network = couple.conditioner
                network.first.load_state_dict(first.state_dict())
                network.middle.load_state_dict(middle.state_dict())
                both = torch.cat([torch.arange(0, len(last.weight), 2), torch.arange(1, len(last.weight), 2)])
                network.head.weight.copy_(last.weight[both])
                network.head.bias.copy_(cast("Tensor", last.bias)[both])
                order = torch.arange(len(order))
        ours.load_state_dict(ours.state_dict())  # the normalisations see that they have started
        return ours


_GLOW_PARTS = (ActNorm, LULinear, AffineCoupling)


def _levels(flow: Glow) -> Any:
    """The levels of a Glow: the last transform, after the one that centres pixels."""
    return cast("Any", flow.transform)[-1]


def _glow_training(tiny: bool) -> dict[str, Callable[[], Side]]:
    glow, n = (_Glow((1, 8, 8), 2, 2, 8), 2) if tiny else (_Glow((3, 32, 32), 3, 8, 128), 16)
    x = torch.rand(n, *glow.shape, generator=torch.Generator().manual_seed(1))

    def ours(memory: str, stored: float = 0.0) -> Side:
        flow = glow.ours(memory, stored).train()
        with torch.no_grad():
            flow.log_prob(x)
        return Side(_flow_training(flow, flow.log_prob, x))

    return {
        _OURS: functools.partial(ours, "standard"),
        _PARTLY: functools.partial(ours, "invertible", 0.75),
        _INVERTIBLE: functools.partial(ours, "invertible"),
        _NORMFLOWS: _training_side(functools.partial(glow.normflows, x), x),
    }


def _depth(tiny: bool) -> dict[str, Callable[[], Side]]:
    """Gradients of deep flows. They are added to those of the call before, whose memory depends on the depth by itself."""
    features, hidden, n = (4, (8,), 8) if tiny else (64, (64, 64), 16384)
    x = _data(n, features)

    def gradients(layers: int, memory: str) -> Callable[[], Flow]:
        flow = _Affine(features, layers, hidden).ours(memory=memory)
        # some way from the identity, at which it starts
        generator = torch.Generator().manual_seed(2)
        for layer in _couplings(flow):
            for head in _linear_layers(layer.conditioner)[-2:]:
                head.weight.data.normal_(std=0.02, generator=generator)

        def call() -> Flow:
            (-flow.log_prob(x).mean()).backward()
            return flow

        return call

    def side(layers: int, memory: str) -> Side:
        def check() -> float:
            found, expected = (
                torch.cat([p.grad.flatten() for p in gradients(layers, kind)().parameters() if p.grad is not None])
                for kind in (memory, "standard")
            )
            return difference(found, expected, _SAME)

        return Side(gradients(layers, memory), None if memory == "standard" else check)

    deep, shallow = (6, 2) if tiny else (64, 4)
    return {
        _DEEP: functools.partial(side, deep, "invertible"),
        _SHALLOW: functools.partial(side, shallow, "invertible"),
        _STORED: functools.partial(side, deep, "standard"),
    }


_DEEP, _SHALLOW, _STORED = "64 layers, invertible", "4 layers, invertible", "64 layers, activations stored"
_SPLINES = (_ZUKO, _NFLOWS, _NORMFLOWS)

CASES = (
    Case(
        "nsf-training",
        "NSF coupling, 8 layers, hidden 128-128, 32 features, batch 4096, Adam",
        "one training step",
        _spline_training,
        (Goal(_OURS, _SPLINES, 3.5),),
    ),
    Case(
        "nsf-sampling",
        "the same flow, 65,536 samples",
        "all of them",
        _spline_sampling,
        (Goal(_OURS, _SPLINES, 5),),
        rounds=3,
    ),
    Case(
        "nsf-autoregressive",
        "autoregressive NSF, 3 layers, hidden 64-64, 64 features, 1,024 samples",
        "all of them",
        _autoregressive_sampling,
        (Goal(_OURS, (_ZUKO, _NFLOWS), 8),),
        rounds=2,
    ),
    Case(
        "realnvp-training",
        "RealNVP, 16 layers, hidden 128-128, 64 features, batch 4096, Adam",
        "one training step",
        _affine_training,
        (Goal(_OURS, (_NORMFLOWS, _FREIA), 1.4),),
    ),
    Case(
        "glow-training",
        "Glow, 3 levels of 8 steps, 128 channels, 16x3x32x32, Adam",
        "one training step",
        _glow_training,
        (
            Goal(_PARTLY, (_NORMFLOWS,), 1),
            Goal(_PARTLY, (_NORMFLOWS,), 2, of="memory"),
            Goal(_OURS, (_NORMFLOWS,), 1),
            Goal(_INVERTIBLE, (_NORMFLOWS,), 2, of="memory"),
        ),
        memory=True,
        rounds=3,
    ),
    Case(
        "flow-depth",
        "gradients of RealNVP, 64 features, hidden 64-64, batch 16384",
        "one backward pass with its forward pass",
        _depth,
        (Goal(_DEEP, (_SHALLOW,), 1.2, of="memory", growth=True), Goal(_DEEP, (_STORED,), 1.4, growth=True)),
        memory=True,
        rounds=3,
    ),
)
