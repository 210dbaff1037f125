"""Sizes of one block, and where everything of it lies: slices of the output, of its mask bits, of its gradients.

The checks stand between a wrong call and a kernel that reads beyond a tensor; launches from memory (replay.py) rely on
those of the planned calls before them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import cycle
from typing import NamedTuple

import torch
from torch import Tensor

from inception_fused.errors import InceptionInputError
from inception_fused.folding import FIELDS
from inception_fused.kernels.views import ChannelSlice, bits_width, taps_width
from inception_fused.reference import CONV_NAMES


class BlockShape(NamedTuple):
    """Sizes of one block and the places of its slices. k1, k2, k3, k4: output channels; k2_reduce, k3_reduce."""

    n: int
    h: int
    w: int
    c: int
    k1: int
    k2_reduce: int
    k2: int
    k3_reduce: int
    k3: int
    k4: int
    itemsize: int

    @classmethod
    def of(cls, x: Tensor, weights: Sequence[Tensor]) -> BlockShape:
        """From x [N, C, H, W] and the six weights."""
        n, c, h, w = x.shape
        k1, k2_reduce, k2, k3_reduce, k3, k4 = (weight.shape[0] for weight in weights)
        return cls(n, h, w, c, k1, k2_reduce, k2, k3_reduce, k3, k4, x.element_size())

    @property
    def gemm_m(self) -> int:
        return self.n * self.h * self.w

    @property
    def k(self) -> int:
        """Output channels of the block."""
        return self.k1 + self.k2 + self.k3 + self.k4

    @property
    def branch_channels(self) -> tuple[int, int, int, int]:
        return self.k1, self.k2, self.k3, self.k4

    @property
    def r5_offset(self) -> int:
        """Channels of r before r5: r3 padded to 16 bytes."""
        return self._padded(self.k2_reduce)

    @property
    def r_width(self) -> int:
        """Channels of r = [r3 | r5], each part padded to 16 bytes."""
        return self.r5_offset + self._padded(self.k3_reduce)

    @property
    def r_padded(self) -> bool:
        """Whether r has channels that belong to no reduction."""
        return self.r_width != self.k2_reduce + self.k3_reduce

    @property
    def bits_width(self) -> int:
        """Bytes of mask bits per pixel; every branch begins a byte of its own."""
        return sum(map(bits_width, self.branch_channels))

    @property
    def taps_width(self) -> int:
        """Bytes of arg-max taps per pixel."""
        return taps_width(self.c)

    def y_slices(self, y: Tensor) -> list[ChannelSlice]:
        """The four branches' slices of y [N, k, H, W] in channels_last memory."""
        return _side_by_side(y, self.k, self.branch_channels, self.branch_channels)

    def bits_slices(self, bits: Tensor) -> list[ChannelSlice]:
        """The four branches' slices of bits [gemm_m, bits_width]; channels counts bytes."""
        widths = [bits_width(k) for k in self.branch_channels]
        return _side_by_side(bits, self.bits_width, widths, widths)

    def r_slices(self, r: Tensor) -> list[ChannelSlice]:
        """r3 and r5 in r [gemm_m, r_width]."""
        widths = [self.r5_offset, self.r_width - self.r5_offset]
        return _side_by_side(r, self.r_width, [self.k2_reduce, self.k3_reduce], widths)

    @property
    def grads_width(self) -> int:
        """Channels of the backward pass's buffer of rows: [g2 | g3 | g4 | g1 | dr3 | dr5].

        In this order the three operands of the reductions' gradients lie side by side and are one matrix.
        """
        return self.k + self.r_width

    def g_slices(self, grads: Tensor) -> list[ChannelSlice]:
        """The four branches' masked gradients in grads [gemm_m, grads_width]."""
        g2, g3, g4, g1 = _side_by_side(grads, self.grads_width, *[(self.k2, self.k3, self.k4, self.k1)] * 2)
        return [g1, g2, g3, g4]

    def dr_slices(self, grads: Tensor) -> list[ChannelSlice]:
        """The gradients of r3 and r5 in grads [gemm_m, grads_width]."""
        parts = self.r_slices(grads)
        return [part._replace(row_stride=self.grads_width, c_offset=self.k + part.c_offset) for part in parts]

    def reductions_slice(self, grads: Tensor, first: int, last: int) -> ChannelSlice:
        """Columns first to last of [g1 | dr3 | dr5] in grads [gemm_m, grads_width]."""
        return ChannelSlice(grads, self.grads_width, self.k - self.k1 + first, last - first)

    @property
    def reductions(self) -> tuple[tuple[int, int], ...]:
        """(first, last) column of g1, dr3 and dr5 in [g1 | dr3 | dr5], whose last two are padded to 16 bytes."""
        r3, r5 = self.k1, self.k1 + self.r5_offset
        return (0, self.k1), (r3, r3 + self.k2_reduce), (r5, r5 + self.k3_reduce)

    def gemm(self, kernel: str) -> tuple[int, int]:
        """(GEMM_N, input channels) of one of the block's forward kernels."""
        return {
            "K1": (self.k1 + self.k2_reduce + self.k3_reduce, self.c),
            "K2": (self.k4, self.c),
            "K3": (self.k2, self.k2_reduce),
            "K4": (self.k3, self.k3_reduce),
        }[kernel]

    def _padded(self, channels: int) -> int:
        unit = 16 // self.itemsize
        return -(-channels // unit) * unit


def _side_by_side(base: Tensor, row_stride: int, channels: Sequence[int], widths: Sequence[int]) -> list[ChannelSlice]:
    offsets = [sum(widths[:i]) for i in range(len(widths))]
    return [ChannelSlice(base, row_stride, o, c) for o, c in zip(offsets, channels, strict=True)]


def check_parameter_shapes(
    weights: Sequence[Tensor], biases: Sequence[Tensor], norms: Sequence[Tensor | None] = ()
) -> None:
    """Six weights [K, C, R, R]: 1x1 but for p2_2 (3x3) and p3_2 (3x3 or 5x5), reductions feeding their convolution; a
    bias [K] for each, or none; vectors [K] of BatchNorm in the order of folding.FIELDS."""
    c = weights[0].shape[1] if weights[0].dim() == 4 else "C"
    inputs = (c, c, weights[1].shape[0], c, weights[3].shape[0], c)
    for name, w, channels, sides in zip(
        CONV_NAMES, weights, inputs, ((1,), (1,), (3,), (1,), (3, 5), (1,)), strict=True
    ):
        shape = tuple(w.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3] or shape[2] not in sides or 0 in shape:
            kernel = " or ".join(f"{side}x{side}" for side in sides)
            raise InceptionInputError(
                f"{name}.weight: got shape {shape}, wants (K, {channels}, R, R) with kernel {kernel}"
            )
    for (name, t), w in zip(_named((), biases, norms), cycle(weights), strict=False):
        if t is not None and tuple(t.shape) != (w.shape[0],):
            raise InceptionInputError(f"{name}: got shape {tuple(t.shape)}, wants ({w.shape[0]},)")


def check_operands(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor] = (),
    eps: Sequence[float] = (),
) -> None:
    """Raise InceptionInputError unless all parameters belong to x [N, C, H, W] and lie on its device.

    :func:`inception_fused.inception` has checked its call; what a backward is given may have changed since, and
    ``FusedInceptionFunction`` may be called by anyone.
    """
    if len(weights) != 6 or len(biases) not in (0, 6):
        raise InceptionInputError(f"weights: got {len(weights)} and {len(biases)} biases, wants six, and six or none")
    if len(norms) not in (0, 12, 24) or len(eps) != (6 if norms else 0):
        got = f"{len(norms)} and {len(eps)} eps"
        raise InceptionInputError(
            f"norms: got {got}, wants 12 or 24 vectors of BatchNorm and six eps, or none of either"
        )
    check_parameter_shapes(weights, biases, norms)
    if x.dim() != 4 or x.shape[1] != weights[0].shape[1]:
        raise InceptionInputError(f"x: got shape {tuple(x.shape)}, wants [N, {weights[0].shape[1]}, H, W]")
    check_device(x, weights, biases, norms)
    _check_memory("x", x, x)
    for name, t in named_parameters(weights, biases, norms):
        _check_memory(name, t, x)


def check_device(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], norms: Sequence[Tensor | None] = ()
) -> None:
    """Raise InceptionInputError unless all lie on x's device."""
    for name, t in named_parameters(weights, biases, norms):
        if t.device != x.device:
            raise InceptionInputError(f"x: got device {x.device}, {name} is on {t.device}; wants one device for both")


def named_parameters(
    weights: Sequence[Tensor], biases: Sequence[Tensor], norms: Sequence[Tensor | None] = ()
) -> Iterator[tuple[str, Tensor]]:
    """Weights, biases and BatchNorm's vectors, six of a kind or none, with the names that messages call them by."""
    return ((name, t) for name, t in _named(weights, biases, norms) if t is not None)


def _named(
    weights: Sequence[Tensor], biases: Sequence[Tensor], norms: Sequence[Tensor | None]
) -> Iterator[tuple[str, Tensor | None]]:
    kinds = [(".weight", weights), (".bias", biases)]
    kinds += [(f" batch_norm.{field}", norms[6 * i : 6 * i + 6]) for i, field in enumerate(FIELDS)]
    for kind, tensors in kinds:
        for name, t in zip(CONV_NAMES, tensors, strict=False):
            yield f"{name}{kind}", t


def check_saved(
    shape: BlockShape, dy: Tensor, x: Tensor, r: Tensor, bits: Tensor, taps: Tensor, saved: Sequence[bool]
) -> None:
    """Raise InceptionInputError unless dy, r, bits and taps are what a forward of this shape gave or asks for.

    saved: which of r, bits and taps the wanted gradients need; the others may be empty.
    """
    if tuple(dy.shape) != (shape.n, shape.k, shape.h, shape.w):
        wants = f"({shape.n}, {shape.k}, {shape.h}, {shape.w})"
        raise InceptionInputError(f"dy: got shape {tuple(dy.shape)}, wants {wants}, by what the forward was given")
    _check_memory("dy", dy, x)
    parts = (("r", r, shape.r_width, x.dtype), ("bits", bits, shape.bits_width, torch.uint8))
    for (name, t, width, dtype), needed in zip(
        (*parts, ("taps", taps, shape.taps_width, torch.uint8)), saved, strict=True
    ):
        _check_memory(name, t, x)
        if not needed and not t.numel():
            continue
        if tuple(t.shape) != (shape.gemm_m, width) or t.dtype != dtype or not t.is_contiguous():
            got = f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}"
            raise InceptionInputError(
                f"{name}: got {got}, wants dense {dtype} ({shape.gemm_m}, {width}) as the forward saved it"
            )


def _check_memory(what: str, t: Tensor, x: Tensor) -> None:
    """On x's device, and there at all."""
    if t.device != x.device:
        raise InceptionInputError(f"{what}: got device {t.device}, x is on {x.device}; wants one device for both")
    if t.numel() and not t.is_meta and not t.data_ptr():
        raise InceptionInputError(f"{what}: its memory was freed (a storage of 0 bytes), wants {t.numel()} elements")
