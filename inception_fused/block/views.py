"""How a kernel sees a tensor: rows of channels. The value types that plan, launchers and ATen twins share."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from inception_fused.block import chains


class ChannelSlice(NamedTuple):
    """``channels`` channels from ``c_offset`` on of a matrix whose rows are the N*H*W pixels of an NHWC tensor.

    base: any tensor; its first element is row 0, channel 0 of the matrix. Channels are adjacent in memory.
    row_stride: elements from one pixel to the next.
    """

    base: Tensor
    row_stride: int
    c_offset: int
    channels: int

    def rows(self, gemm_m: int) -> Tensor:
        """The slice as a [gemm_m, channels] view."""
        start = self.base.storage_offset() + self.c_offset
        return self.base.as_strided((gemm_m, self.channels), (self.row_stride, 1), start)


class Epilogue(NamedTuple):
    """What happens to an accumulator: ``activation(acc * scale + shift)``.

    scale, shift: [K] of any floating dtype, applied in the accumulator's precision, or None for 1 and 0.
    """

    shift: Tensor | None = None
    scale: Tensor | None = None
    relu: bool = True


class BatchNorm(NamedTuple):
    """One convolution's BatchNorm: ``(y - mean) / sqrt(var + eps) * gamma + beta``.

    gamma, beta, mean, var: [K] of any floating dtype; gamma and beta may be None for 1 and 0, mean and var, both or
    neither, for those of the batch, as in training. eps: at least 0.
    """

    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


class Packed(NamedTuple):
    """One of each a convolution. weights: [K, C, R, R] in the compute dtype and KRSC memory. shifts, scales: [K] or
    None."""

    weights: list[Tensor]
    shifts: Sequence[Tensor | None]
    scales: Sequence[Tensor | None]


class PackedDgrad(NamedTuple):
    """The weights as dgrad reads them, dense and in the compute dtype; None where they are not wanted.

    windows: [C, R, R, K] flipped and transposed, one a convolution that reads another's output; projection:
    [C, 1, 1, K]; grouped: [C, k1 + reduced_width], the reductions' columns side by side, 0 where r is padded.
    """

    windows: tuple[Tensor | None, ...]
    projection: Tensor | None
    grouped: Tensor | None

    @classmethod
    def empty(
        cls, weights: Sequence[Tensor], dtype: torch.dtype, reduced_width: int, wanted: Sequence[bool]
    ) -> PackedDgrad:
        """Fresh memory for what is wanted, each on a 16-byte boundary of one buffer. wanted: one flag a window, of the
        projection, of the reductions; reduced_width: BlockShape's."""
        flipped, w1 = (*chains.windows(weights), chains.projection(weights)), chains.first(weights)
        shapes = [(w.shape[1], w.shape[2], w.shape[3], w.shape[0]) if w is not None else () for w in flipped]
        shapes.append((w1.shape[1], chains.direct([w.shape[0] for w in weights]) + reduced_width))
        unit = 16 // dtype.itemsize
        sizes = [prod(shape) if need else 0 for shape, need in zip(shapes, wanted, strict=True)]
        starts = list(accumulate((-(-size // unit) * unit for size in sizes), initial=0))
        buffer = w1.new_empty(starts[-1], dtype=dtype)
        parts = zip(starts[:-1], sizes, shapes, wanted, strict=True)
        *windows, projection, grouped = (
            buffer[start : start + size].view(shape) if need else None for start, size, shape, need in parts
        )
        return cls(tuple(windows), projection, grouped)


class Partials(NamedTuple):
    """Partial sums of a block's gradients in the accumulator's dtype, dense; None where none are wanted.

    group: [SPLIT_K, columns, C] of the reductions' weights; windows, projection: [SPLIT_K, K, R, R, C], of the windows
    one each; out: [ranges, K], the columns of g in the order of dy; reduce: [tiles, r_width], the columns of dr.
    """

    group: Tensor | None
    windows: Sequence[Tensor | None]
    projection: Tensor | None
    out: Tensor | None
    reduce: Tensor | None

    @property
    def flat(self) -> list[Tensor | None]:
        """All of them, in one list."""
        return [self.group, *self.windows, self.projection, self.out, self.reduce]


class Tile(NamedTuple):
    """Launch parameters of one binary, named as Triton's. BLOCK_* in elements."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_K: int
    GROUP_M: int = 8
    num_warps: int = 4
    num_stages: int = 3


def row_stride(x: Tensor) -> int | None:
    """Elements between neighbouring pixels of x [N, C, H, W], or None where x is no matrix of rows.

    It is one where the strides are (H*W*s, 1, W*s, s) with s >= C; strides of dimensions of size 1 do not count.
    """
    n, c, h, w = x.shape
    s_n, s_c, s_h, s_w = x.stride()
    if c > 1 and s_c != 1:
        return None
    if w > 1:
        s = s_w
    elif h > 1:
        s = s_h
    elif n > 1:
        s = s_n
    else:
        s = c
    if s < c or (h > 1 and s_h != w * s) or (n > 1 and s_n != h * w * s):
        return None
    return s


def wide_rows(x: Tensor, unit: int) -> int | None:
    """row_stride(x) where a kernel can read the rows in units (see unit_of()), None elsewhere."""
    stride = row_stride(x)
    if stride is None or unit == 1:
        return stride
    return stride if stride % unit == 0 and (x.is_meta or x.data_ptr() % 16 == 0) else None


def strides_in(x: Tensor, unit: int) -> tuple[bool, tuple[int, ...]]:
    """(whether a kernel can read x as rows in units, the four strides that it takes: of rows the last alone, in
    units)."""
    stride = wide_rows(x, unit)
    return (True, (0, 0, 0, stride // unit)) if stride is not None else (False, x.stride())


def is_ready(w: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can read w [K, C, R, R] as it is: its dtype, KRSC memory, on a 16-byte boundary."""
    if w.dtype != dtype or not (w.is_meta or w.data_ptr() % 16 == 0):
        return False
    return w.is_contiguous(memory_format=torch.channels_last) or (w.shape[-1] == 1 and w.is_contiguous())


def as_dense(w: Tensor) -> Tensor:
    """w [K, C, R, R] in KCRS or KRSC memory: itself, or a copy where its strides are others."""
    return w if w.is_contiguous() or w.is_contiguous(memory_format=torch.channels_last) else w.contiguous()


def accumulator_of(dtype: torch.dtype) -> torch.dtype:
    """What sums and BatchNorm's scale and shift are kept in: fp32, for fp64 that."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def unit_of(dtype: torch.dtype, *quantities: int) -> int:
    """Elements in 16 bytes where every quantity is a multiple of that, else 1.

    Channel counts, offsets and row strides reach a kernel in these units. Triton's own hint is "divisible by 16"
    only: the 24-channel reductions of 4b and 4c, passed as plain 24, would turn every load scalar.
    """
    unit = 16 // dtype.itemsize
    return unit if all(q % unit == 0 for q in quantities) else 1


def bits_width(channels: int) -> int:
    """Bytes of mask bits per row of a slice: one bit a channel, least significant first."""
    return -(-channels // 8)


TAP_WORDS = {8: torch.int32, 4: torch.int16, 2: torch.uint8, 1: torch.uint8}
"""Type by which a backward reads taps, for each unit: those of 16 bytes of gradients in one load."""


def taps_width(channels: int) -> int:
    """Bytes of arg-max taps per row: four bits a channel, the even channel in the low half."""
    return -(-channels // 2)
