"""Networks that compute the parameters of a transform from the part of its input that stays, and from a context."""

from __future__ import annotations

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.nn.conv import Conv2d, channels_last, zero

__all__ = ["LIMIT", "ConvConditioner", "MLPConditioner", "ResNetConditioner", "has_hooks", "keep_activations"]

LIMIT = 1e9
"""Inputs of conditioners saturate here: beyond, sums overflow float32 and no finite output is left."""

_keep: contextvars.ContextVar[bool | None] = contextvars.ContextVar("keep", default=None)


@contextlib.contextmanager
def keep_activations() -> Iterator[None]:
    """Within the block, conditioners keep their activations for a backward pass that follows at once; see ``keep`` of
    :func:`fastgen.ops.perceptron`.
    """
    token = _keep.set(True)
    try:
        yield
    finally:
        _keep.reset(token)


class MLPConditioner(nn.Module):
    """Fully connected network with one linear layer per output, each contiguous as the kernels read it.

    The context enters the first layer, which is what concatenating it to the input would do, without the copy.

    Args:
        inputs: features of x.
        hidden: widths of the hidden layers, at least one.
        outputs: size of each output.
        context: features of the context; 0 for none.
        identity: the last layers start at zero, so that an affine coupling starts as the identity: with PyTorch's own start the
            activations of a deep stack of them grow by orders of magnitude.

    Shape: [N, inputs], [N, context] or None -> a tuple of [N, outputs[i]].
    """

    def __init__(
        self, inputs: int, hidden: Sequence[int], outputs: Sequence[int], context: int = 0, *, identity: bool = False
    ) -> None:
        super().__init__()
        if not hidden or min(hidden) < 1:
            raise ValueError(f"hidden must be the widths of at least one layer, got {tuple(hidden)}")
        self.hidden = tuple(hidden)
        self.first = nn.Linear(inputs, hidden[0])
        self.context = nn.Linear(context, hidden[0], bias=False) if context else None
        self.rest = nn.ModuleList(nn.Linear(n, m) for n, m in itertools.pairwise(hidden))
        heads = (nn.Linear(hidden[-1], size) for size in outputs)
        self.heads = nn.ModuleList(zero(head) if identity else head for head in heads)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        options = self.as_perceptron(x, context)
        if options is not None:
            return ops.perceptron(x, **options)
        h = self.first(x.clamp(-LIMIT, LIMIT))
        if self.context is not None:
            h = h + self.context(context)
        # in place: a linear layer's gradient does not need its output
        h = torch.relu_(h)
        for layer in self.rest:
            h = torch.relu_(layer(h))
        return tuple(head(h) for head in self.heads)

    def as_perceptron(self, x: Tensor, context: Tensor | None) -> dict[str, Any] | None:
        """The arguments of :func:`fastgen.ops.perceptron` that stand for this network, where that is faster and nobody could
        tell the difference.

        Args:
            x: the input, or a tensor that it is a part of.
            context: [N, context] or None.
        """
        layers = cast("list[nn.Linear]", [self.first, *self.rest, *self.heads])
        if not all(_is_plain(layer) for layer in layers):
            return None
        sizes, depth = [layer.out_features for layer in layers], 1 + len(self.rest)
        hidden, outputs = sizes[:depth], sizes[depth:]
        if not ops.perceptron_serves(x, hidden, outputs):
            return None
        added = None if self.context is None else self.context(context)
        parameters = [(layer.weight, layer.bias) for layer in layers]
        sizes_and_limit = {"hidden": hidden, "outputs": outputs, "limit": LIMIT}
        return {"parameters": parameters, "added": added, "keep": _keep.get(), **sizes_and_limit}


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody watches or changes the calls of a module."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def _is_plain(layer: nn.Linear) -> bool:
    """Whether calling this layer is its product in float32 and nothing else: no other class, no hook, no other tensors."""
    if type(layer) is not nn.Linear or layer.bias is None or has_hooks(layer):
        return False
    return all(type(p) in _KINDS and p.dtype is torch.float32 for p in (layer.weight, layer.bias))


_KINDS = (nn.Parameter, Tensor)


class ConvConditioner(nn.Module):
    """Three convolutions, 3x3, 1x1 and 3x3, with ReLU between them: Glow's network.

    Args:
        inputs: channels of x.
        hidden: channels between the convolutions.
        outputs: channels of each output.
        context: features of the context, which enters as the bias of the first layer; 0 for none.

    The last layer starts at zero, so that an affine coupling starts as the identity.

    Shape: [N, inputs, H, W], [N, context] or None -> a tuple of [N, outputs[i], H, W].
    """

    def __init__(self, inputs: int, hidden: int, outputs: Sequence[int], context: int = 0) -> None:
        super().__init__()
        self.first = Conv2d(inputs, hidden, 3, padding=1)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        self.middle = Conv2d(hidden, hidden, 1)
        self.head = zero(Conv2d(hidden, sum(outputs), 3, padding=1))
        self.outputs = tuple(outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        h = self.first(_as_pixels(x), None if self.context is None else self.context(context))
        h = torch.relu_(self.middle(torch.relu_(h)))
        return self.head(h).split(self.outputs, 1)


class ResNetConditioner(nn.Module):
    """A 3x3 convolution, residual blocks of two more, and a last one: RealNVP's network, without its batch normalisation,
    which would make a sample's density depend on its batch.

    Args, start and shapes are those of :class:`ConvConditioner`; ``blocks`` counts the residual blocks.
    """

    def __init__(self, inputs: int, hidden: int, outputs: Sequence[int], context: int = 0, *, blocks: int = 2) -> None:
        super().__init__()
        self.first = Conv2d(inputs, hidden, 3, padding=1)
        self.context = nn.Linear(context, hidden, bias=False) if context else None
        self.blocks = nn.ModuleList(_ResidualBlock(hidden) for _ in range(blocks))
        self.head = zero(Conv2d(hidden, sum(outputs), 3, padding=1))
        self.outputs = tuple(outputs)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, ...]:
        h = self.first(_as_pixels(x), None if self.context is None else self.context(context))
        for block in self.blocks:
            h = block(h)
        return self.head(torch.relu(h)).split(self.outputs, 1)


class _ResidualBlock(nn.Module):
    """x + conv(relu(conv(relu(x))))."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = Conv2d(channels, channels, 3, padding=1)
        self.second = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(torch.relu_(self.first(torch.relu(x))))


def _as_pixels(x: Tensor) -> Tensor:
    """Saturated, and with the channels of a pixel side by side: the layout in which convolutions are fastest."""
    return channels_last(x.clamp(-LIMIT, LIMIT))
