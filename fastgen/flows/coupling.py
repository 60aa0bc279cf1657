"""Coupling layers: one part of x stays and sets the transform of the other, y_b = g(x_b; network(x_a, context)).

The parts are halves of dimension 1: features of vectors, channels of images. ``flip`` takes the second half as the one that
stays, so that layers which alternate it need no permutation between them.

Sources: Dinh, Krueger and Bengio (2015), "NICE"; Dinh, Sohl-Dickstein and Bengio (2017), "Density estimation using Real NVP";
Durkan, Bekasov, Murray and Papamakarios (2019), "Neural spline flows".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastgen import ops
from fastgen.flows.elementwise import Affine, Spline
from fastgen.flows.transform import Bijection, gradients
from fastgen.nn.conditioner import MLPConditioner, has_hooks, keep_activations
from fastgen.ops.perceptron import keeps_hidden

__all__ = ["AdditiveCoupling", "AffineCoupling", "Coupling", "SplineCoupling", "halves"]


class Coupling(Bijection):
    """Base of coupling layers.

    Args:
        conditioner: ``conditioner(x_a, context)`` -> a tuple of parameters for :meth:`couple`.
        sizes: length of the first and of the second part along dimension 1.
        flip: the second part stays and the first is transformed.
    """

    def __init__(self, conditioner: nn.Module, sizes: tuple[int, int], *, flip: bool = False) -> None:
        super().__init__()
        self.conditioner = conditioner
        self.sizes = sizes
        self.flip = flip

    def couple(self, x: Tensor, parameters: tuple[Tensor, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
        """The elementwise transform of one part, or its inverse, and the log-determinant [N]."""
        raise NotImplementedError

    def uncouple(
        self, y: Tensor, parameters: tuple[Tensor, ...], grad_y: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Backpropagation through :meth:`couple` from its output: x, the gradient in x, and those in ``parameters``."""
        x = self.couple(y, parameters, inverse=True)[0]
        with torch.enable_grad():
            leaves = [t.detach().requires_grad_() for t in (x, *parameters)]
            outputs = self.couple(leaves[0], tuple(leaves[1:]), inverse=False)
            (grad_x, *grads), _ = gradients(outputs, leaves, None, (grad_y, grad_ladj), [])
        return x, grad_x, tuple(grads)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What stays, and what is transformed."""
        first, second = x.split(self.sizes, 1)
        return (second, first) if self.flip else (first, second)

    def _join(self, stays: Tensor, moves: Tensor) -> Tensor:
        return torch.cat((moves, stays) if self.flip else (stays, moves), 1)

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self._split(x)
        b, ladj = self.couple(b, self.conditioner(a, context), inverse=False)
        return self._join(a, b), ladj

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        a, b = self._split(y)
        b, ladj = self.couple(b, self.conditioner(a, context), inverse=True)
        return self._join(a, b), ladj

    def rebuild(
        self, y: Tensor, context: Tensor | None, grad_y: Tensor, grad_ladj: Tensor, parameters: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        """One pass of the conditioner serves the inverse and the gradients: the part that it reads is the same in x and y."""
        grad_stays, grad_moves = self._split(grad_y)
        stays, moves = self._split(y)
        with torch.enable_grad(), keep_activations():
            a = stays.detach().requires_grad_()
            theta = self.conditioner(a, context)
        with torch.no_grad():
            b, grad_b, grad_theta = self.uncouple(moves, tuple(t.detach() for t in theta), grad_moves, grad_ladj)
        (grad_a,), rest = gradients(theta, [a], context, grad_theta, parameters)
        with torch.no_grad():
            return self._join(stays, b), self._join(grad_a + grad_stays, grad_b), rest


class AdditiveCoupling(Coupling):
    """y_b = x_b + shift(x_a): volume-preserving. The conditioner gives ``(shift,)``."""

    def couple(self, x: Tensor, parameters: tuple[Tensor, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
        (shift,) = parameters
        return x - shift if inverse else x + shift, x.new_zeros(len(x))

    def uncouple(
        self, y: Tensor, parameters: tuple[Tensor, ...], grad_y: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        (shift,) = parameters
        return y - shift, grad_y, (grad_y,)


class AffineCoupling(Coupling):
    """y_b = x_b * exp(s(x_a)) + shift(x_a), with s bounded as :func:`fastgen.ops.affine_coupling` has it.

    The conditioner gives ``(shift, log_scale)``, each of the shape of x_b.
    """

    def __init__(
        self, conditioner: nn.Module, sizes: tuple[int, int], *, flip: bool = False, bound: str | None = "tanh"
    ) -> None:
        super().__init__(conditioner, sizes, flip=flip)
        self.bound = bound
        self.elementwise = Affine(bound)

    def couple(self, x: Tensor, parameters: tuple[Tensor, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.elementwise(x, parameters, inverse=inverse)

    def uncouple(
        self, y: Tensor, parameters: tuple[Tensor, ...], grad_y: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return self.elementwise.rebuild(y, parameters, grad_y, grad_ladj)

    def call_and_ladj(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = None if self._keeps_activations(x) else self._in_one_call(x, context)
        return super().call_and_ladj(x, context) if options is None else ops.perceptron_coupling(x, **options)

    def inv_and_ladj(self, y: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        options = None if self._keeps_activations(y) else self._in_one_call(y, context)
        return super().inv_and_ladj(y, context) if options is None else ops.perceptron_coupling(y, inverse=True, **options)

    def rebuild(
        self, y: Tensor, context: Tensor | None, grad_y: Tensor, grad_ladj: Tensor, parameters: list[nn.Parameter]
    ) -> tuple[Tensor, Tensor, list[Tensor | None]]:
        with torch.enable_grad():
            options = self._in_one_call(y, context)
        if options is None:
            return super().rebuild(y, context, grad_y, grad_ladj, parameters)
        layers, added = options.pop("parameters"), options["added"]
        options.pop("keep")
        x, grad_x, flat, *grad_added = ops.perceptron_coupling_rebuild(y, layers, grad_y, grad_ladj, **options)
        own = [p for layer in layers for p in layer]
        pieces = zip(own, flat.split([p.numel() for p in own]), strict=True)
        found: dict[nn.Parameter, Tensor | None] = {p: g.view(p.shape) for p, g in pieces}
        others, of_context = [p for p in parameters if p not in found], None
        if added is not None and added.requires_grad:
            *of_others, of_context = gradients((added,), [], context, tuple(grad_added), others)[1]
            found.update(zip(others, of_others, strict=True))
        return x, grad_x, [*(found[p] for p in parameters), of_context]

    def _keeps_activations(self, x: Tensor) -> bool:
        """Whether a backward pass will find the hidden layers where the forward pass left them. Then their memory sets the
        pace, and the steps one by one are as fast.
        """
        if not torch.is_grad_enabled() or not isinstance(self.conditioner, MLPConditioner):
            return False
        return keeps_hidden(x, self.conditioner.hidden)

    def _in_one_call(self, x: Tensor, context: Tensor | None) -> dict[str, Any] | None:
        """The arguments of :func:`fastgen.ops.perceptron_coupling` that stand for this layer, where nobody could tell the
        difference.
        """
        conditioner = self.conditioner
        if type(self) is not AffineCoupling or type(conditioner) is not MLPConditioner or has_hooks(conditioner):
            return None
        options = conditioner.as_perceptron(x, context)
        if options is None or options.pop("outputs") != [self.sizes[0 if self.flip else 1]] * 2:
            return None
        return {**options, "sizes": self.sizes, "flip": self.flip, "bound": self.bound}

    def extra_repr(self) -> str:
        return f"bound={self.bound!r}"


class SplineCoupling(Coupling):
    """y_b is a rational-quadratic spline of x_b on [-bound, bound], element by element; the identity outside.

    The conditioner gives ``(widths, heights, derivatives)``: [N, D * bins] twice and [N, D * (bins - 1)] for D elements of
    x_b, to be read as [N, D, bins]; see :func:`fastgen.ops.rq_spline`.
    """

    def __init__(
        self,
        conditioner: nn.Module,
        sizes: tuple[int, int],
        *,
        flip: bool = False,
        bins: int = 8,
        bound: float = 5.0,
        convention: str = "zuko",
    ) -> None:
        super().__init__(conditioner, sizes, flip=flip)
        self.bins = bins
        self.bound = bound
        self.convention = convention
        self.elementwise = Spline(bins, bound, convention)

    def couple(self, x: Tensor, parameters: tuple[Tensor, ...], *, inverse: bool) -> tuple[Tensor, Tensor]:
        return self.elementwise(x, parameters, inverse=inverse)

    def uncouple(
        self, y: Tensor, parameters: tuple[Tensor, ...], grad_y: Tensor, grad_ladj: Tensor
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        return self.elementwise.rebuild(y, parameters, grad_y, grad_ladj)

    def extra_repr(self) -> str:
        return f"bins={self.bins}, bound={self.bound}, convention={self.convention!r}"


def halves(features: int, index: int) -> tuple[tuple[int, int], int, int]:
    """The sizes of the halves of ``features``, and how many stay and move in layer ``index`` of alternating layers.

    >>> halves(5, 0), halves(5, 1)
    (((2, 3), 2, 3), ((2, 3), 3, 2))
    """
    if features < 2:
        raise ValueError(f"coupling layers need at least 2 features, got {features}: one part sets the transform of the other")
    sizes = features // 2, features - features // 2
    return sizes, sizes[index % 2], sizes[1 - index % 2]
