"""What every diffusion model shares: its options, its network, the loss by one draw, and sampling by any sampler.

A model adds a schedule and a way to draw training times. Images are in [0, 1] outside and in [-1, 1] inside; vectors are as
they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastgen import ops, random
from fastgen.diffusion.guidance import keep_known
from fastgen.diffusion.loop import Step, Table, run, tabulate
from fastgen.diffusion.samplers import Plan, Sampler, make_sampler, resampled
from fastgen.diffusion.schedules import Discrete, Grid, Schedule, Spacing, Target, target_rows
from fastgen.diffusion.upstream import upstream_chain, upstream_grid, upstream_plan
from fastgen.nn.dit import DiT
from fastgen.nn.inference import optimize, relative_error
from fastgen.nn.mlp import TimeMLP
from fastgen.nn.model import Config, Model
from fastgen.nn.unet import UNet
from fastgen.random import Stream

__all__ = [
    "DiffusionConfig",
    "DiffusionLoss",
    "DiffusionModel",
    "Given",
    "Inference",
    "build_network",
    "given_mask",
    "given_samples",
]

Inference = Literal["plain", "packed", "bfloat16", "compiled"]
Given = Tensor | Callable[[Tensor], Tensor]
"""Samples [m, ...], of which sample i takes number i mod m; or a function from indices [n] to those of each, [n, ...]."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiffusionConfig(Config):
    """Options that the configs of all diffusion models have."""

    network: Literal["auto", "mlp", "unet", "dit"] = "auto"
    """"auto" is "unet" for images and "mlp" for anything else."""
    widths: tuple[int, ...] = (64, 128, 128)
    """U-Net: channels of each level, finest first; each level but the last halves the image."""
    attention_levels: tuple[int, ...] = (1,)
    """U-Net: levels with self-attention, 0 the finest."""
    width: int = 256
    """MLP and DiT: of the hidden layers, of the tokens."""
    layers: int = 2
    """Residual blocks: of each level of the U-Net, or of the MLP; blocks of the DiT."""
    patch: int = 2
    """DiT: side of a patch."""
    dropout: float = 0.0
    num_classes: int | None = None
    """Class labels; None: none are used."""
    label_dropout: float = 0.1
    """Share of the labels that training replaces by the null class, for classifier-free guidance."""
    sampler: str = "ddim"
    """What :meth:`DiffusionModel.sample` uses unless told."""
    sampling_steps: int = 50
    """How many steps it takes unless told; of a chain at most its length."""
    learning_rate: float = 2e-4

    def __post_init__(self) -> None:
        if self.network not in ("auto", "mlp", "unet", "dit"):
            raise ValueError(f"network must be 'auto', 'mlp', 'unet' or 'dit', got {self.network!r}")
        if self.network in ("unet", "dit") and len(self.event_shape) != 3:
            raise ValueError(f"network={self.network!r} needs images (C, H, W), got event_shape {self.event_shape}")
        if self.num_classes is not None and self.num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {self.num_classes}")
        if not 0 <= self.label_dropout <= 1:
            raise ValueError(f"label_dropout must be in 0 .. 1, got {self.label_dropout}")
        if self.sampling_steps < 1:
            raise ValueError(f"sampling_steps must be at least 1, got {self.sampling_steps}")
        make_sampler(self.sampler)


class DiffusionLoss(NamedTuple):
    """The loss per element of a sample, averaged over the batch."""

    loss: Tensor
    """Weighted squared error of the prediction."""


def build_network(config: DiffusionConfig, *, outputs: int = 1, time_scale: float = 1.0) -> nn.Module:
    """The network that a config asks for.

    Args:
        config: its options.
        outputs: predictions of the shape of the event: 2 with a learned variance.
        time_scale: factor of the time before its sinusoids, which suit 0 .. 1000.
    """
    channels, *rest = config.event_shape
    kind = config.network
    if kind == "auto":
        kind = "unet" if len(config.event_shape) == 3 else "mlp"
    if kind == "unet":
        return UNet(
            channels,
            outputs * channels,
            widths=config.widths,
            layers=config.layers,
            attention_levels=config.attention_levels,
            num_classes=config.num_classes,
            dropout=config.dropout,
            time_scale=time_scale,
        )
    if kind == "dit":
        return DiT(
            channels,
            outputs * channels,
            patch=config.patch,
            width=config.width,
            depth=config.layers,
            num_classes=config.num_classes,
            time_scale=time_scale,
        )
    return TimeMLP(
        config.event_shape,
        (outputs * channels, *rest),
        width=config.width,
        layers=config.layers,
        num_classes=config.num_classes,
        dropout=config.dropout,
        time_scale=time_scale,
    )


def given_samples(given: Given, indices: Tensor, event_shape: tuple[int, ...], name: str, *, images: bool) -> Tensor:
    """What the user gave for the samples with these indices: [n, *event_shape], on the device of ``indices``.

    Raises:
        ValueError: for another shape, or ``images`` that are not in [0, 1].
    """
    x = given(indices) if callable(given) else given
    if tuple(x.shape[1:]) != event_shape or not len(x) or (callable(given) and len(x) != len(indices)):
        raise ValueError(f"{name} must be [m, {', '.join(map(str, event_shape))}], got {list(x.shape)}")
    if not callable(given):
        x = x[indices.to(x.device) % len(x)]
    x = x.to(indices.device, torch.float32)
    if images and not bool(((x >= -1e-4) & (x <= 1 + 1e-4)).all()):
        low, high = (v.item() for v in torch.aminmax(x))
        raise ValueError(f"{name} must hold images in [0, 1], its values run from {low:.4g} to {high:.4g}")
    return x


def given_mask(mask: Given, indices: Tensor, event_shape: tuple[int, ...]) -> Tensor:
    """Where to paint, for the samples with these indices: bool [n, *event_shape].

    Args:
        mask: broadcast against ``event_shape``, with or without samples [m, ...] before it; above 0.5 (or True) to paint.
        indices: [n].
        event_shape: of a sample.

    Raises:
        ValueError: for a shape that does not fit.
    """
    values = mask(indices) if callable(mask) else mask
    if values.dtype is not torch.bool:
        values = values > 0.5
    if values.dim() == 2 and len(event_shape) == 3:
        values = values[None]
    if values.dim() <= len(event_shape):
        values = values[None]
    fits = values.dim() == len(event_shape) + 1 and len(values) > 0
    if not fits or any(have not in (1, want) for have, want in zip(values.shape[1:], event_shape, strict=True)):
        shape = list(mask(indices).shape if callable(mask) else mask.shape)
        raise ValueError(f"mask must fit samples of shape {event_shape}, got {shape}")
    if not callable(mask):
        values = values[indices.to(values.device) % len(values)]
    return values.to(indices.device).expand(len(indices), *event_shape)


class DiffusionModel(Model):
    """Base of the diffusion models: ``network(x, time, labels=labels)`` predicts a target of ``schedule``.

    Subclasses set ``schedule``, ``target`` and ``time_scale`` and write ``loss`` with :meth:`denoising_loss`.

    Attributes:
        schedule: alpha and sigma.
        target: what the network predicts; None where :meth:`rows` says it.
        network: [N, *event_shape], time [N] -> [N, *event_shape], or twice the channels with a learned variance.
        learned_variance: whether it is.
    """

    config: DiffusionConfig
    schedule: Schedule
    target: Target | None = None
    network: nn.Module
    learned_variance: bool = False
    evaluations: int = 0
    """How often :meth:`sample` has asked the network so far, a batch at a time."""
    _last: tuple[tuple[object, ...], Plan, Table] | None = None

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__(config)
        self._copies: dict[str, tuple[Any, nn.Module]] = {}

    time_scale: ClassVar[float] = 1.0
    """Schedule's time times this is what the network is told."""

    @property
    def is_image(self) -> bool:
        return len(self.event_shape) == 3

    def encode_range(self, x: Tensor) -> Tensor:
        """From the range outside to that inside."""
        return 2 * x - 1 if self.is_image else x

    def decode_range(self, x: Tensor) -> Tensor:
        """From the range inside to that outside."""
        return (0.5 * x + 0.5).clamp_(0, 1) if self.is_image else x

    def rows(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        """Rows (a, b, c, d) of what the network predicts, [..., 4] float64."""
        assert self.target is not None, "a model without a target has rows of its own"
        return target_rows(self.target, alpha, sigma)

    def training_labels(self, labels: Tensor | None, u: Tensor) -> Tensor | None:
        """The labels of a batch with a share of them, where u < ``label_dropout``, replaced by the null class."""
        classes = self.config.num_classes
        if classes is None:
            return None
        if labels is None or labels.is_floating_point():
            raise ValueError(f"num_classes={classes} needs batches (x, y) with integer labels y")
        return torch.where(u < self.config.label_dropout, classes, labels)

    def denoising_loss(
        self,
        x: Tensor,
        time: Tensor,
        rows: Tensor,
        key: Tensor,
        *,
        weight: Tensor | None = None,
        labels: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Weighted mean squared error per sample [N].

        Args:
            x: the data, in the range inside.
            time: what the network is told, [N].
            rows: (a, b, c, d) of each sample, [N, 4].
            key: the noise is drawn at its stream ``DIFFUSE``.
            weight: [N].
            labels: with the null class in place, as :meth:`training_labels` gives them.
            noise: instead of the key's.
        """
        place = None if noise is not None else random.at(key, stream=Stream.DIFFUSE)
        x_t, _ = ops.diffuse(x, rows, place, noise=noise, target=False)
        out = self.network(x_t, time, labels=labels)
        return ops.diffusion_loss(out, x, rows, place, noise=noise, weight=weight)

    def sample_indices(self, n: int, key: Tensor) -> Tensor:
        """The index of each of ``n`` samples drawn at a key: [n]."""
        return key[3] + torch.arange(n, device=key.device) if key.dim() == 1 else key[:, 3]

    def sampling_labels(self, labels: int | Sequence[int] | Tensor | None, n: int, key: Tensor) -> Tensor | None:
        """The class of each sample: that of its index modulo the length of ``labels``; see :meth:`sample`."""
        classes = self.config.num_classes
        if classes is None:
            if labels is not None:
                raise ValueError("labels were given to a model without classes; make it with num_classes")
            return None
        if labels is None:
            return self.sample_indices(n, key) % classes
        if not isinstance(labels, Tensor):
            values = [labels] if isinstance(labels, int) else list(labels)
            if not values or not all(isinstance(v, int) and 0 <= v <= classes for v in values):
                raise ValueError(f"labels must be in 0 .. {classes}, where {classes} is no class, got {labels!r}")
            labels = torch.tensor(values)
        labels = labels.to(key.device, torch.int64)
        return labels[self.sample_indices(n, key) % len(labels)]

    def grid(
        self,
        sampler: Sampler,
        steps: int | Sequence[float] | None = None,
        spacing: Spacing | None = None,
        compat: Literal["diffusers"] | None = None,
    ) -> Grid:
        """The steps that ``sample`` takes with these options."""
        if steps is None:
            steps = self.config.sampling_steps
            if isinstance(self.schedule, Discrete):
                steps = min(steps, self.schedule.steps)
        if compat is None:
            return self.schedule.grid(steps, spacing)
        if compat != "diffusers":
            raise ValueError(f"compat must be None or 'diffusers', got {compat!r}")
        schedule = upstream_chain(self.schedule.betas) if isinstance(self.schedule, Discrete) else self.schedule
        return upstream_grid(schedule, steps, sampler.layout, spacing)

    def table(self, plan: Plan, *, dtype: torch.dtype = torch.float32) -> Table:
        """The table of a plan for this model's network, on its device."""
        return tabulate(plan, self.rows, self.schedule, time_scale=self.time_scale, device=self.device, dtype=dtype)

    @torch.no_grad()
    def sample(
        self,
        n: int,
        *,
        key: Tensor | None = None,
        steps: int | tuple[float, ...] | None = None,
        sampler: str | None = None,
        guidance: float | None = None,
        labels: int | tuple[int, ...] | None = None,
        eta: float | None = None,
        variance: Literal["small", "large", "learned"] | None = None,
        order: int | None = None,
        churn: float | None = None,
        spacing: Spacing | None = None,
        clamp: bool | None = None,
        threshold: float | None = None,
        init: Given | None = None,
        strength: float = 1.0,
        inpaint: Given | None = None,
        mask: Given | None = None,
        resample: int = 1,
        jump: int = 10,
        inference: Inference = "plain",
        compat: Literal["diffusers"] | None = None,
        noise: Callable[[int], Tensor] | None = None,
        adjust: Callable[[Step], Tensor] | None = None,
        callback: Callable[[Step], Tensor | None] | None = None,
    ) -> Tensor:
        """Draw samples.

        Args:
            n: how many.
            key: sample i depends on index ``key.sample + i`` of it alone.
            steps: of the sampler, or the times themselves, falling; None: ``config.sampling_steps``.
            sampler: a name of :data:`fastgen.diffusion.samplers.SAMPLERS`, or a :class:`Sampler`; None: ``config.sampler``.
            guidance: weight g of classifier-free guidance, u + g (c - u); None and 1 are the conditional model alone.
            labels: a class, or several that samples go through by their index: sample i is of class labels[i mod length]. The
                class ``num_classes`` is none. None: all classes in turn.
            eta, variance, order, churn: options of the samplers that have them.
            spacing: of the steps, see :meth:`fastgen.diffusion.schedules.Schedule.grid`.
            clamp: clamp estimates of the data to [-1, 1]; None: for images, where the sampler can.
            threshold: instead of that, dynamic thresholding at this quantile, such as 0.995.
            init: start from these samples, noised, instead of from noise (image-to-image): [m, *event_shape], images in
                [0, 1]; sample i starts from init[i mod m]. Or a function from the indices [n] of samples to where they start.
            strength: share of the steps that are then taken, in (0, 1]: how far results may get from ``init``.
            inpaint: keep these samples but where ``mask`` says: as ``init``, which it is too where ``strength`` is below 1.
            mask: what ``inpaint`` leaves to paint: above 0.5, or True, there; 0 where the sample is known. [H, W],
                [*event_shape] or, of several that samples go through by their index, [m, *event_shape]; an axis may be 1.
            resample: how often each stretch of ``jump`` steps is gone through when inpainting, with the noise of the
                stretch between (RePaint): the painted part agrees with the known one the better, and costs as much more.
            jump: length of these stretches in steps.
            inference: what evaluates the network, see :meth:`evaluator`; :meth:`inference_error` says how far it is off.
            compat: "diffusers" lays out the steps as the sampler of diffusers 0.42 does, its errors and rounding included.
            noise: index of an evaluation -> noise [n, *event_shape], instead of the key's.
            adjust, callback: see :func:`fastgen.diffusion.loop.run`.

        Returns:
            [n, *event_shape], images in [0, 1].

        Raises:
            ValueError: for options that cannot be used, or not together.
        """
        if key is None:
            key = random.fresh_key(self.device)
        sampler = self.config.sampler if sampler is None else sampler
        learned = "learned" if self.learned_variance and sampler == "ddpm" else None
        method = make_sampler(sampler, eta=eta, variance=variance or learned, order=order, churn=churn)
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be in (0, 1], got {strength}")
        if (inpaint is None) != (mask is None):
            raise ValueError("inpainting takes both: inpaint, what is known, and mask, what to paint")
        if inpaint is None and resample != 1:
            raise ValueError(f"resample={resample} is for inpainting: give inpaint and mask")
        if strength < 1:
            init = inpaint if init is None else init
            if init is None:
                raise ValueError(f"strength={strength} needs something to start from: init or inpaint")
        plan, table = self._prepared(method, steps, spacing, compat, strength, (resample, jump))
        limit, adjust = self._limits(method, clamp, threshold, adjust)
        indices = self.sample_indices(n, key)
        x = self._start(indices, key, plan, init)
        if inpaint is not None and mask is not None:
            x, callback = self._inpainting(indices, key, plan, inpaint, mask, x, callback)
        classes = self.sampling_labels(labels, n, key)
        if guidance is not None and guidance != 1:
            if classes is None:
                raise ValueError("guidance needs a model with num_classes")
            classes = torch.cat([torch.full_like(classes, self.config.num_classes or 0), classes])
        else:
            guidance = None

        evaluate = self.evaluator(inference)

        def network(x: Tensor, time: Tensor) -> Tensor:
            return evaluate(x, time, labels=classes)

        self.evaluations += len(table.time)
        x = run(network, x, table, key, guidance=guidance, clamp=limit, noise=noise, adjust=adjust, callback=callback)
        return self.decode_range(x)

    def evaluator(self, inference: Inference = "plain") -> nn.Module:
        """The network as :meth:`sample` runs it.

        Args:
            inference: "plain" is the network itself; "packed" a copy by :func:`fastgen.nn.inference.optimize` in float32 (on
                CPUs with Winograd's convolutions, at an error of rounding), "bfloat16" one in bfloat16 (on CPUs without its
                arithmetic the packed one with half the memory for its convolutions, and an error of a few 1e-3),
                "compiled" one under ``torch.compile``. Copies are kept until the weights change.
        """
        if inference == "plain":
            return self.network
        if inference not in get_args(Inference):
            raise ValueError(f"inference must be one of {', '.join(get_args(Inference))}, got {inference!r}")
        weights = tuple((p.data_ptr(), p._version) for p in self.network.parameters())
        if inference not in self._copies or self._copies[inference][0] != weights:
            dtype = torch.bfloat16 if inference == "bfloat16" else torch.float32
            self._copies[inference] = weights, optimize(self.network, dtype=dtype, compile=inference == "compiled")
        return self._copies[inference][1]

    @torch.no_grad()
    def inference_error(self, inference: Inference, *, samples: int = 8, key: Tensor | None = None) -> float:
        """Relative error of the network's output, ||copy - network|| / ||network||, over states along the schedule.

        Args:
            inference: see :meth:`evaluator`.
            samples: how many states: of noise, at times from the noisiest on.
            key: of the noise.
        """
        key = random.key(0, stream=Stream.EVALUATE, device=self.device) if key is None else key
        grid = self.schedule.grid(samples)
        spread = (grid.alpha.square() + grid.sigma.square()).sqrt().to(self.device, torch.float32)
        x = ops.normal((samples, *self.event_shape), key) * spread.view(-1, *[1] * len(self.event_shape))
        time = (grid.time * self.time_scale).to(self.device, torch.float32)
        return relative_error(self.evaluator(inference), self.network, x, time)

    def _prepared(
        self,
        method: Sampler,
        steps: int | Sequence[float] | None,
        spacing: Spacing | None,
        compat: Literal["diffusers"] | None,
        strength: float,
        resampling: tuple[int, int],
    ) -> tuple[Plan, Table]:
        """The plan and its table on the device; those of the last call are kept, as runs go batch by batch."""
        times = steps if steps is None or isinstance(steps, int) else tuple(float(t) for t in steps)
        asked = (self.schedule, self.target, self.device, method, times, spacing, compat, strength, resampling)
        if self._last is None or self._last[0] != asked:
            grid = self.grid(method, times, spacing, compat)
            grid = grid.tail(max(1, round(strength * len(grid.time))))
            plan = method.plan(grid) if compat is None else upstream_plan(method, grid)
            plan = resampled(plan, *resampling)
            self._last = asked, plan, self.table(plan)
        return self._last[1], self._last[2]

    def _start(self, indices: Tensor, key: Tensor, plan: Plan, init: Given | None) -> Tensor:
        alpha, sigma = float(plan.alpha[0]), float(plan.sigma[0])
        place = random.at(key, stream=Stream.LATENT)
        if init is None:
            shape = (len(indices), *self.event_shape)
            return ops.normal(shape, place) * float(self.schedule.prior_std(plan.alpha[0], plan.sigma[0]))
        x = self.encode_range(given_samples(init, indices, self.event_shape, "init", images=self.is_image))
        return ops.diffuse(x, torch.tensor([alpha, sigma, 0.0, 0.0], device=x.device), place, target=False).x_t

    def _inpainting(
        self,
        indices: Tensor,
        key: Tensor,
        plan: Plan,
        inpaint: Given,
        mask: Given,
        x: Tensor,
        callback: Callable[[Step], Tensor | None] | None,
    ) -> tuple[Tensor, Callable[[Step], Tensor | None]]:
        """The start with what is known in its place, and ``callback`` behind what keeps it there."""
        known = given_samples(inpaint, indices, self.event_shape, "inpaint", images=self.is_image)
        keep = ~given_mask(mask, indices, self.event_shape)
        x = torch.where(keep, self._start(indices, key, plan, lambda _: known), x)
        restore = keep_known(self.encode_range(known), keep, key)

        def restored(step: Step) -> Tensor | None:
            now = restore(step)
            instead = None if callback is None else callback(step._replace(x=now))
            return now if instead is None else instead

        return x, restored

    def _limits(
        self, sampler: Sampler, clamp: bool | None, threshold: float | None, adjust: Callable[[Step], Tensor] | None
    ) -> tuple[float | None, Callable[[Step], Tensor] | None]:
        """The clamp, and ``adjust`` behind dynamic thresholding."""
        if not sampler.clamps and (clamp or threshold is not None or adjust is not None):
            kind = "noises" if getattr(sampler, "on", "data") == "noise" else "slopes"
            raise ValueError(f"{type(sampler).__name__} combines {kind}, not estimates of the data: it cannot change those")
        if threshold is not None and not 0 < threshold <= 1:
            raise ValueError(f"threshold must be in (0, 1], got {threshold}")
        if threshold is None:
            clamp = self.is_image and sampler.clamps if clamp is None else clamp
            return (1.0 if clamp else None), adjust
        inner = adjust

        def thresholded(step: Step) -> Tensor:
            x0 = step.x0 if inner is None else inner(step)
            assert x0 is not None
            return ops.dynamic_threshold(x0, threshold, 1e4)

        return None, thresholded

    def extra_repr(self) -> str:
        return f"target={self.target!r}, schedule={type(self.schedule).__name__}"
