"""A network made for evaluation alone: fewer bits, weights laid out once, sums and biases inside the convolutions."""

from __future__ import annotations

import copy
import ctypes
import platform
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastgen import ops
from fastgen.nn.attention import ImageAttention, Projection
from fastgen.nn.conv import Conv2d
from fastgen.nn.norm import GroupNorm
from fastgen.nn.replay import Replay
from fastgen.nn.resnet import ResBlock, Upsample, upsample
from fastgen.nn.time import Conditioning

__all__ = ["fast_dtype", "optimize", "relative_error"]


def fast_dtype(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 where the device multiplies it natively (AMX or AVX-512 BF16 on a CPU), else float32: emulated it is slower."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    if device.type == "cpu" and (torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()):
        return torch.bfloat16
    return torch.float32


def optimize(network: nn.Module, *, dtype: torch.dtype | None = None, compile: bool = False) -> nn.Module:
    """A copy of the network for evaluation: same interface, no gradients, not to be saved.

    * Weights in ``dtype``, channels-last; inputs and outputs keep theirs, and so do the time and label embeddings.
    * A CPU that has no bfloat16 arithmetic would have to emulate it, many times slower than float32. There bfloat16 is a wish
      for fewer bits that is met otherwise: no bfloat16 is computed with; where the CPU multiplies pairs of 16-bit integers
      (AVX-512 VNNI, AVX2), wide linear maps and convolutions by minimal filtering or of 1x1 round their operands to such
      integers, each tile of an image and each output channel in a unit of its own, and sum exactly. All between them is
      float32. A layer errs by 2e-4 to 2e-3, less than in bfloat16: see :func:`fastgen.ops.winograd_weight`. On other CPUs it is
      float32 altogether.
    * On a CPU the weights of convolutions and of attention are laid out once for oneDNN instead of at every call, and the
      residual sums happen inside. In float32 "double the image, then convolve" is one transposed convolution where that is less
      work, and 3x3 convolutions go by minimal filtering (:func:`fastgen.ops.winograd_conv2d`) where that is faster: an error
      of 1e-6 a layer, near that of plain sums, for a transformed copy of the weight of 2 to 4 times its size. They normalise
      what they read, and a U-Net's skips are read where they lie: neither is stored. A residual block is one call
      (:func:`fastgen.ops.winograd_residual`). The projections of the time in residual blocks are one product for all of them.
      The process keeps up to 256 MB of memory that it frees.
    * On a CPU the third call on inputs of a kind and all after it replay what the second did, kernel by kernel and without the
      layers' Python code: see :class:`fastgen.nn.replay.Replay`, which also says which calls are not replayed. The copy must
      not be changed.
    * ``compile=True`` compiles the copy whole instead (slow on the first call of each shape).

    Args:
        network: any network of :mod:`fastgen.nn`; it is left as it is.
        dtype: of the weights; None: :func:`fast_dtype` of the network's device.
        compile: use ``torch.compile(fullgraph=True)``.

    How far the copy is from the network, :func:`relative_error` says.
    """
    device = next(network.parameters()).device
    dtype = fast_dtype(device) if dtype is None else dtype
    emulated = dtype == torch.bfloat16 and device.type == "cpu" and fast_dtype(device) != dtype
    products = torch.int16 if emulated and ops.winograd_pairs() else torch.float32
    dtype = torch.float32 if emulated else dtype
    fast = copy.deepcopy(network).eval().requires_grad_(False).to(dtype=dtype)
    for module in fast.modules():
        if isinstance(module, Conditioning):
            module.float()
    for module in fast.modules():
        if isinstance(module, Conv2d):
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compile:
        return cast(nn.Module, torch.compile(fast, fullgraph=True))
    if device.type == "cpu" and torch.backends.mkldnn.is_available() and dtype in (torch.float32, torch.bfloat16):
        if dtype == torch.float32:
            _exchange(fast, lambda module: PackedUpsample(module, products) if isinstance(module, Upsample) else None)
        _share_projections(fast)
        _keep_freed_memory()
        told = {own for module in fast.modules() if isinstance(module, Conditioning) for own in module.modules()}

        def layer(module: nn.Module) -> nn.Module | None:
            if type(module) is Conv2d:
                return PackedConv2d(module, products)
            if type(module) is Projection or (type(module) is nn.Linear and products is torch.int16 and module not in told):
                return PackedLinear(module, products)
            return None

        def block(module: nn.Module) -> nn.Module | None:
            if type(module) is ResBlock:
                return PackedResBlock(module)
            return PackedImageAttention(module) if type(module) is ImageAttention and products is torch.int16 else None

        _exchange(fast, layer)
        _exchange(fast, block)
        fast.forward = Replay(fast)
    return fast


def _exchange(network: nn.Module, made_of: Callable[[nn.Module], nn.Module | None]) -> None:
    """Put what is made of them in the place of the network's layers, but of those of which None is."""
    for name, module in list(network.named_modules()):
        made = made_of(module) if name else None
        if made is not None:
            network.set_submodule(name, made)


KEPT_BYTES = 256 << 20
"""Of freed memory, what the process keeps for its next allocations."""


def _keep_freed_memory() -> None:
    """Where freed memory goes back to the system, every layer takes its own anew, page by page: a tenth of the time of a U-Net.

    glibc gives back what is free at the end of its heap and every block of at least a threshold; what is set here are the
    size from which it does the former, and the largest threshold that it takes.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 32 << 20)
    libc.mallopt(trim_threshold, KEPT_BYTES)


def _share_projections(network: nn.Module) -> None:
    """Make one product of the projections of the embedding in all residual blocks that are fed one of the same size."""
    blocks: dict[int, list[ResBlock]] = {}
    for module in network.modules():
        if isinstance(module, ResBlock) and isinstance(module.project, nn.Linear):
            blocks.setdefault(module.project.in_features, []).append(module)
    for alike in blocks.values():
        for block in alike:
            if block.modulation == "add":  # the projection takes the bias of the convolution to which it is added
                cast(nn.Linear, block.project).bias.add_(block.conv1.bias)
                block.conv1.bias.zero_()
        shared = SharedProjections([cast(nn.Linear, block.project) for block in alike])
        for i, block in enumerate(alike):
            block.project = SharedProjection(shared, i)


class SharedProjections:
    """Linear maps of one vector, computed together for the first that asks."""

    def __init__(self, maps: Sequence[nn.Linear]) -> None:
        self.weight = torch.cat([m.weight.detach() for m in maps])
        self.bias = torch.cat([m.bias.detach() for m in maps])
        self.sizes = [m.out_features for m in maps]
        self.last: tuple[Tensor, int, tuple[Tensor, ...]] | None = None

    def __call__(self, embedding: Tensor, index: int) -> Tensor:
        last = self.last  # read once: threads may share a network
        version = 0 if embedding.is_inference() else embedding._version
        if last is None or last[0] is not embedding or last[1] != version:
            last = self.last = embedding, version, F.linear(embedding, self.weight, self.bias).split(self.sizes, 1)
        return last[2][index]


class SharedProjection(nn.Module):
    """One of :class:`SharedProjections`."""

    def __init__(self, shared: SharedProjections, index: int) -> None:
        super().__init__()
        self.shared, self.index = shared, index

    def forward(self, embedding: Tensor) -> Tensor:
        return self.shared(embedding, self.index)


@torch.no_grad()
def relative_error(fast: nn.Module, network: nn.Module, x: Tensor, time: Tensor, **conditions: Any) -> float:
    """||fast(x) - network(x)|| / ||network(x)|| over the whole batch, in float64."""
    a, b = fast(x, time, **conditions).double(), network(x, time, **conditions).double()
    return ((a - b).norm() / b.norm()).item()


class Filters:
    """A weight of stride 1 laid out for :func:`fastgen.ops.winograd_conv2d` at first use: 3x3 with padding 1, or, for products
    of integers, 1x1.

    Args:
        products: their dtype, float32 or int16; a weight that is not finite takes float32.
    """

    def __init__(self, weight: Tensor, products: torch.dtype = torch.float32) -> None:
        self.weight = weight
        self.products = products if weight.isfinite().all() else torch.float32
        self.transformed: dict[int, ops.WinogradWeight] = {}

    def serve(self, x: Tensor, *, joined: bool = False, double: bool = False) -> ops.WinogradWeight | None:
        """The weight for images like x, which are ``joined`` by others where their channels are not all; None where a plain
        convolution is faster.
        """
        outputs, inputs, side, _ = self.weight.shape
        tile: int | None
        if side == 3:
            tile = ops.winograd_tile(x, outputs, inputs, double=double)
        else:  # measured with 32 to 512 channels
            enough = x.numel() >= 64 * x.shape[1]
            tile = 1 if enough and (self._wide or joined) and ops.winograd_serves(x) else None
        if tile is None:
            return None
        if tile not in self.transformed:
            dtype = self.products if side == 3 or self._wide else torch.float32
            self.transformed[tile] = ops.winograd_weight(self.weight, 2 if tile == 2 else 4, dtype=dtype)
        return self.transformed[tile]

    @property
    def _wide(self) -> bool:
        """Whether 1x1 products of integers are faster than others."""
        return self.products is torch.int16 and min(self.weight.shape[:2]) >= 64


class PackedLinear(nn.Module):
    """A linear map for evaluation, bias and residual sum inside: with products of integers where there are rows enough, which
    are the pixels of a 1x1 convolution, or by oneDNN with the weight in its own layout for the first input it sees. Other
    numbers of rows are right too.
    """

    def __init__(self, linear: nn.Linear, products: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = linear.weight.detach()
        self.bias = self.weight.new_zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        self.filters = Filters(self.weight[:, :, None, None], products) if products is torch.int16 else None

    def forward(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        if self.filters is not None:
            pixels = _row_of_pixels(x)
            weight = self.filters.serve(pixels)
            if weight is not None:
                y = ops.winograd_conv2d(pixels, weight, self.bias, None if residual is None else _row_of_pixels(residual))
                return y[0, :, 0].t().reshape(*x.shape[:-1], -1)
        if self.weight.layout == torch.strided:
            self.weight = torch.ops.mkldnn._reorder_linear_weight(self.weight, x.shape[:-1].numel())
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self.weight, self.bias, "add")


def _row_of_pixels(x: Tensor) -> Tensor:
    """[..., C] -> [1, C, 1, W], channels last."""
    return x.reshape(-1, x.shape[-1]).t()[None, :, None]


class PackedConv2d(nn.Module):
    """:class:`fastgen.nn.conv.Conv2d` for evaluation, bias and residual sum inside: by minimal filtering, or by oneDNN with the
    weight in its own layout for the first input it sees. Other input sizes are right too.

    What is convolved may be more than x: joined by the channels of ``skip``, normalised by ``norm`` with the scale and the
    shift of ``modulation``, doubled by nearest neighbours. Minimal filtering stores none of these.
    """

    def __init__(self, conv: Conv2d, products: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.in_channels = conv.in_channels
        self.weight = conv.weight.detach()
        self.bias = conv.bias.detach() if conv.bias.any() else None
        self.stride, self.padding, self.dilation = list(conv.stride), list(conv.padding), list(conv.dilation)
        where = conv.kernel_size, conv.stride, conv.padding, conv.dilation
        three, one = (((k, k), (1, 1), (k // 2, k // 2), (1, 1)) for k in (3, 1))
        self.filters = Filters(self.weight, products) if where in (three, one) else None

    def forward(
        self,
        x: Tensor,
        shift: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        skip: Tensor | None = None,
        norm: GroupNorm | None = None,
        modulation: tuple[Tensor | None, ...] = (),
        double: bool = False,
    ) -> Tensor:
        weight = self.serve(x, joined=skip is not None, double=double)
        if weight is not None:
            bias = self.bias_with(shift)
            own, activation = (None, None) if norm is None else (norm.coefficients(x, *modulation, skip=skip), norm.activation)
            return ops.winograd_conv2d(
                x, weight, bias, residual, double=double, skip=skip, norm=own, activation=activation, aside=True
            )
        x = x if skip is None else torch.cat([x, skip], 1)
        x = x if norm is None else norm(x, *modulation)
        return self._plain(upsample(x) if double else x, shift, residual)

    def serve(self, x: Tensor, *, joined: bool = False, double: bool = False) -> ops.WinogradWeight | None:
        """As :meth:`Filters.serve`."""
        return None if self.filters is None else self.filters.serve(x, joined=joined, double=double)

    def bias_with(self, shift: Tensor | None) -> Tensor | None:
        """Bias and shift in one, [O] or [N, O] or [1, O]."""
        return self.bias if shift is None else shift if self.bias is None else self.bias + shift

    def _plain(self, x: Tensor, shift: Tensor | None, residual: Tensor | None) -> Tensor:
        where = (self.padding, self.stride, self.dilation, 1)
        if self.weight.layout == torch.strided:
            self.weight = torch.ops.mkldnn._reorder_convolution_weight(self.weight, *where, list(x.shape))
        shared = shift is not None and shift.shape[0] == 1
        bias = self.bias_with(shift[0] if shared else None)  # type: ignore[index]
        if residual is None:
            h = torch.ops.mkldnn._convolution_pointwise(x, self.weight, bias, *where, "none", [], "")
        else:
            h = torch.ops.mkldnn._convolution_pointwise.binary(
                x, residual, self.weight, bias, *where, "add", None, None, [], None
            )
        return h if shift is None or shared else h.add_(shift[:, :, None, None])


Parts = tuple[ops.NormedConvolution, ops.NormedConvolution, tuple[ops.WinogradWeight, Tensor | None] | None]


class PackedResBlock(nn.Module):
    """:class:`fastgen.nn.resnet.ResBlock` for evaluation: its convolutions normalise and double what they read, and join two
    images that they read.
    """

    def __init__(self, block: ResBlock) -> None:
        super().__init__()
        self.block: Any = block  # its convolutions are packed
        self.parts: dict[Any, Parts | None] = {}

    def forward(
        self, x: Tensor, embedding: Tensor | None = None, size: tuple[int, int] | None = None, skip: Tensor | None = None
    ) -> Tensor:
        block = self.block
        double = block.resample == "up"
        if block.resample == "down" or (double and size not in (None, (2 * x.shape[2], 2 * x.shape[3]))):
            return block(x, embedding, size, skip)
        added, scale, shift = block.told(embedding)  # the latter of the second normalisation
        known = x.shape, x.dtype, skip is None
        if known not in self.parts:
            self.parts[known] = self._parts(x, skip is not None, double)
        parts = self.parts[known]
        if parts is not None:
            first, second, carry = parts
            if added is not None:
                added = block.conv1.bias_with(added)
            h = ops.winograd_residual(x, first, second, carry, skip=skip, bias=added, scale=scale, shift=shift, double=double)
            return h if block.divisor == 1 else h / block.divisor
        h = block.conv1(x, added, skip=skip, norm=block.norm1, double=double)
        if block.carry is not None:
            x = block.carry(x, skip=skip)
        elif skip is not None:
            x = torch.cat([x, skip], 1)
        h = block.conv2(h, residual=upsample(x) if double else x, norm=block.norm2, modulation=(scale, shift))
        return h if block.divisor == 1 else h / block.divisor

    def _parts(self, x: Tensor, joined: bool, double: bool) -> Parts | None:
        """What images like x are convolved with; None where not all convolutions are by minimal filtering."""
        block = self.block
        first, second = block.conv1.serve(x, joined=joined, double=double), block.conv2.serve(x, joined=True, double=double)
        carry = None if block.carry is None else block.carry.serve(x, joined=joined, double=double)
        if first is None or second is None or (carry is None and (joined or block.carry is not None)):
            return None

        def normed(weight: ops.WinogradWeight, conv: PackedConv2d, norm: GroupNorm) -> ops.NormedConvolution:
            return ops.NormedConvolution(weight, conv.bias, norm.num_groups, norm.weight, norm.bias, norm.eps)

        carried = None if carry is None else (carry, block.carry.bias)
        return normed(first, block.conv1, block.norm1), normed(second, block.conv2, block.norm2), carried


class PackedImageAttention(nn.Module):
    """:class:`fastgen.nn.attention.ImageAttention` for evaluation: its projections of tokens are 1x1 convolutions of the image,
    the first of which normalises what it reads.
    """

    def __init__(self, block: ImageAttention) -> None:
        super().__init__()
        self.block: Any = block  # its projections are packed

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        block, attention = self.block, self.block.attention
        weights = [projection.filters.serve(x) for projection in (attention.first, attention.out)]
        if None in weights:
            return block(x, context)
        norm = None if block.norm is None else block.norm.coefficients(x)
        h = ops.winograd_conv2d(x, weights[0], attention.first.bias, norm=norm)
        h = attention.attend(h.permute(0, 2, 3, 1).flatten(1, 2), context)
        h = h.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)
        h = ops.winograd_conv2d(h, weights[1], attention.out.bias, x, aside=True)
        return h if block.divisor == 1 else h / block.divisor


class PackedUpsample(nn.Module):
    """:class:`fastgen.nn.resnet.Upsample` without the doubled image: by minimal filtering, or as one transposed convolution
    (the 3x3 kernel run over the 2x2 copies of a pixel is a 4x4 kernel of stride 2, with 4 products for every 9). Small
    images, where a layer is bound by its weights, go the plain way.
    """

    pixels = 128

    def __init__(self, upsample: Upsample, products: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.plain = upsample
        self.filters = Filters(upsample.conv.weight.detach(), products)
        self.bias = upsample.conv.bias.detach()
        self.weight: Tensor | None = None

    def forward(self, x: Tensor, embedding: Tensor | None = None, size: tuple[int, int] | None = None) -> Tensor:
        height, width = x.shape[2:]
        if size not in (None, (2 * height, 2 * width)):
            return self.plain(x, embedding, size)
        weight = self.filters.serve(x, double=True)
        if weight is not None:
            return ops.winograd_conv2d(x, weight, self.bias, double=True, aside=True)
        if height * width < self.pixels:
            return self.plain(x, embedding, size)
        if self.weight is None:
            kernel = F.pad(self.filters.weight.flip(2, 3).transpose(0, 1), (1, 1, 1, 1))
            rows = kernel[:, :, 1:] + kernel[:, :, :-1]
            self.weight = (rows[..., 1:] + rows[..., :-1]).contiguous()
        return F.conv_transpose2d(x, self.weight, self.bias, stride=2, padding=1)
