"""What a denoising network is told besides x: the time, and a class label or nothing.

    sinusoidal(t)_k = sin(w_k t), cos(w_k t),    w_k = max_period^(-k / (D/2 - freq_shift))
    fourier(t)_k    = sin(2 pi f_k log t), cos(2 pi f_k log t),    f_k ~ N(0, scale^2)

Vaswani et al. (2017), arXiv:1706.03762; Tancik et al. (2020), arXiv:2006.10739; Song et al. (2021), arXiv:2011.13456.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Conditioning", "Fourier", "LabelEmbedding", "Learned", "Sinusoidal"]


class Sinusoidal(nn.Module):
    """Sines and cosines of the time at geometric frequencies: [N] -> [N, features], float32.

    Args:
        features: size of the result; an odd one ends in a zero.
        flip_sin_to_cos: cosines first.
        freq_shift: 1 makes the last frequency exactly ``1 / max_period``, as DDPM does.
        scale: the time is multiplied by it; 1000 suits times in [0, 1].
        max_period: of the slowest frequency.
    """

    def __init__(
        self,
        features: int,
        *,
        flip_sin_to_cos: bool = False,
        freq_shift: float = 0.0,
        scale: float = 1.0,
        max_period: float = 10_000.0,
    ) -> None:
        super().__init__()
        if features < 2 or features // 2 <= freq_shift:
            raise ValueError(f"features must be at least 2 and above 2 * freq_shift + 1, got {features} with {freq_shift}")
        self.features, self.flip_sin_to_cos, self.freq_shift = features, flip_sin_to_cos, freq_shift
        self.scale, self.max_period = scale, max_period

    def forward(self, time: Tensor) -> Tensor:
        half = self.features // 2
        # not a buffer: `.to(bfloat16)` would round the frequencies
        steps = torch.arange(half, dtype=torch.float32, device=time.device)
        frequency = torch.exp(steps * -math.log(self.max_period) / (half - self.freq_shift))
        phase = time.float()[:, None] * frequency * self.scale
        parts = [phase.cos(), phase.sin()] if self.flip_sin_to_cos else [phase.sin(), phase.cos()]
        return F.pad(torch.cat(parts, 1), (0, self.features % 2))


class Fourier(nn.Module):
    """Sines and cosines at fixed random frequencies of the time's logarithm: [N] -> [N, 2 * frequencies], float32.

    Args:
        frequencies: how many; drawn once and kept with the weights.
        scale: their standard deviation.
        log: take the logarithm of the time, which must then be positive (a noise level).
        flip_sin_to_cos: cosines first.
    """

    def __init__(self, frequencies: int, *, scale: float = 16.0, log: bool = True, flip_sin_to_cos: bool = False) -> None:
        super().__init__()
        self.features, self.log, self.flip_sin_to_cos = 2 * frequencies, log, flip_sin_to_cos
        self.frequency: Tensor
        self.register_buffer("frequency", torch.randn(frequencies) * scale)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Fourier:
        # `.to(bfloat16)` may move the frequencies, not round them: they would be others
        exact = self.frequency
        super()._apply(fn, recurse)
        self.frequency = exact.to(self.frequency.device)
        return self

    def forward(self, time: Tensor) -> Tensor:
        time = time.float()
        phase = (time.log() if self.log else time)[:, None] * self.frequency * 2 * math.pi
        parts = [phase.cos(), phase.sin()] if self.flip_sin_to_cos else [phase.sin(), phase.cos()]
        return torch.cat(parts, 1)


class Learned(nn.Module):
    """A learned vector for each of the times 0, 1, ..., steps - 1: [N] -> [N, features]."""

    def __init__(self, steps: int, features: int) -> None:
        super().__init__()
        self.features = features
        self.table = nn.Embedding(steps, features)

    def forward(self, time: Tensor) -> Tensor:
        return self.table(time.long())


class LabelEmbedding(nn.Module):
    """A learned vector for each class, and one for the null class of classifier-free guidance (Ho & Salimans 2022).

    Shape: labels int64 [N] in 0..num_classes, where ``num_classes`` is the null class -> [N, features]; None, the null class
    for all, gives [1, features].
    """

    def __init__(self, num_classes: int, features: int) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        self.num_classes = num_classes
        self.table = nn.Embedding(num_classes + 1, features)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, labels: Tensor | None) -> Tensor:
        return self.table.weight[self.num_classes :] if labels is None else self.table(labels)


class TwoLayers(nn.Module):
    """Linear, SiLU, linear, in the dtype of the weights."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, outputs)
        self.second = nn.Linear(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(F.silu(self.first(x.to(self.first.weight.dtype))))


class Conditioning(nn.Module):
    """One vector for all that a network is told: embedding of the time plus embedding of the label.

    Args:
        time: features of the time: :class:`Sinusoidal`, :class:`Fourier` or :class:`Learned`.
        outputs: size of the vector.
        num_classes: classes of the labels; None: no labels, unless ``labels`` says otherwise.
        labels: what a label is: "index" (of a class), "number" (embedded as the time is) or "vector" (added as it comes).

    Shape: time [N] or [1], labels [N] -> [N, outputs], or [1, outputs] where time and label are shared by the batch, which
    lets blocks do less: one time expanded to [N] counts as one. float32 arithmetic in the features of the time, the weights'
    own after them.
    """

    def __init__(
        self,
        time: Sinusoidal | Fourier | Learned,
        outputs: int,
        *,
        num_classes: int | None = None,
        labels: Literal["index", "number", "vector"] = "index",
    ) -> None:
        super().__init__()
        self.outputs = outputs
        self.features = time
        self.time = TwoLayers(time.features, outputs)
        self.label: nn.Module | None = None
        self.labels = labels
        if labels == "number":
            self.label = TwoLayers(time.features, outputs)
        elif labels == "index":
            self.label = None if num_classes is None else LabelEmbedding(num_classes, outputs)
        elif labels != "vector":
            raise ValueError(f"labels must be 'index', 'number' or 'vector', got {labels!r}")
        self.takes_labels = self.label is not None or labels == "vector"

    def forward(self, time: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is not None and not self.takes_labels:
            raise ValueError("labels were given to a network without classes: make it with num_classes")
        time = time.reshape(-1)
        if time.stride(0) == 0:
            time = time[:1]
        embedded = self.time(self.features(time))
        if self.labels == "index":
            return embedded if self.label is None else embedded + self.label(labels)
        if labels is None:  # nothing to add: the null label
            return embedded
        if self.labels == "number":
            return embedded + self.label(self.features(labels))  # type: ignore[misc]
        return embedded + labels.to(embedded.dtype)
