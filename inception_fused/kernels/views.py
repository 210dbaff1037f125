"""How a kernel sees a tensor: rows of channels. The value types that plan, launchers and ATen twins share."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


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


def is_ready(w: Tensor, dtype: torch.dtype) -> bool:
    """Whether a kernel can read w [K, C, R, R] as it is: its dtype, KRSC memory, on a 16-byte boundary."""
    if w.dtype != dtype or not (w.is_meta or w.data_ptr() % 16 == 0):
        return False
    return w.is_contiguous(memory_format=torch.channels_last) or (w.shape[-1] == 1 and w.is_contiguous())


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


def taps_width(channels: int) -> int:
    """Bytes of arg-max taps per row: four bits a channel, the even channel in the low half."""
    return -(-channels // 2)
