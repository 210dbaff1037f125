"""Rows of tensors beyond 2**31 elements: bases advance in int64. No memory is taken but the pages of the rows."""

from __future__ import annotations

import mmap

import pytest
import torch

from inception_fused.block.batch_stats import Centred
from inception_fused.block.pools import PoolShape
from inception_fused.block.views import ChannelSlice, Epilogue, Tile
from inception_fused.kernels.conv_dgrad import conv_dgrad
from inception_fused.kernels.conv_fprop import conv_fprop
from inception_fused.kernels.conv_wgrad import conv_wgrad
from inception_fused.kernels.grouped_dgrad import grouped_dgrad
from inception_fused.kernels.grouped_gemm import grouped_gemm
from inception_fused.kernels.mask_grad import mask_grad
from inception_fused.kernels.max_pool import max_pool
from inception_fused.kernels.max_pool_grad import max_pool_grad
from inception_fused.kernels.norm_apply import norm_apply
from inception_fused.kernels.norm_grad_apply import norm_grad_apply
from inception_fused.kernels.norm_grad_stats import norm_grad_stats
from inception_fused.kernels.norm_stats import norm_stats
from inception_fused.kernels.pool_proj import pool_proj
from inception_fused.plan import choice
from inception_fused.runtime import aten

H, W = 11, 3
M = H * W
IMAGES = dict(gemm_m=M, image=(H, W))
RUN = dict(tile=Tile(16, 16, 16, 1, num_stages=1), unit=8)

FAR = 2**26 + 8
"""Elements from row to row: a tile's rows and those of its windows lie within 2**31, the third tile begins beyond."""


class Place:
    """Matrices by name, the same values wherever they lie: in rows ``stride`` elements apart, or dense."""

    def __init__(self, stride: int | None) -> None:
        self.stride, self.matrices = stride, {}

    def __call__(self, name: str, width: int, first: int = 0, channels: int = 0, *, rows: int = M, bits: bool = False):
        """``channels`` columns from ``first`` on, by default all, of a matrix [rows, width]."""
        if name not in self.matrices:
            dtype, stride = torch.uint8 if bits else torch.float16, self.stride or width
            base = reserve(rows * stride, dtype) if self.stride else torch.zeros(rows * stride, dtype=dtype)
            drawn = torch.randn(rows, width, generator=torch.Generator().manual_seed(len(self.matrices)))
            whole = ChannelSlice(base, stride, 0, width)
            whole.rows(rows).copy_((100 * drawn).abs() if bits else drawn)
            self.matrices[name] = whole, rows
        return self.matrices[name][0]._replace(c_offset=first, channels=channels or width)

    def contents(self) -> dict[str, torch.Tensor]:
        return {name: whole.rows(rows) for name, (whole, rows) in self.matrices.items()}


def reserve(size: int, dtype: torch.dtype) -> torch.Tensor:
    """Zeros, and 2**31 of them before the first: there an offset that has wrapped around leads."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0x4000)
    memory = mmap.mmap(-1, (2**31 + size) * dtype.itemsize, flags=flags)
    return torch.frombuffer(memory, dtype=dtype)[2**31 :]


def weights(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(9)).half()


def k1(at):
    w = weights(8, 8, 1, 1)
    outputs = at("y", 8), at("r", 16, 0, 8), at("r", 16, 8, 8), at("bits", 1, bits=True)
    grouped_gemm(at("x", 8), (w, w, w), *outputs, gemm_m=M, epilogues=(Epilogue(),) * 3, **RUN)


def k2(at):
    taps = torch.zeros(M, 4, dtype=torch.uint8)
    outputs = at("y", 8), at("bits", 1, bits=True), taps
    pool_proj(at("x", 8), weights(8, 8, 1, 1), *outputs, epilogue=Epilogue(), **IMAGES, **RUN)
    return taps


def k3(at):
    w = weights(8, 8, 3, 3).contiguous(memory_format=torch.channels_last)
    conv_fprop(at("x", 8), w, at("y", 8), at("bits", 1, bits=True), epilogue=Epilogue(), **IMAGES, **RUN)


def pixels(rows: ChannelSlice) -> torch.Tensor:
    """Rows as [1, C, H, W]."""
    dy, stride, _, channels = rows
    return dy.as_strided((1, channels, H, W), (M * stride, 1, W * stride, stride))


def b1(at):
    return masked(at, pixels(at("dy", 40)))


def b1_strided(at):
    """Far apart are channels, not pixels."""
    dy, stride = at("dy", M, rows=40)[:2]
    return masked(at, dy.as_strided((1, 40, H, W), (1, stride, W, 1)))


def masked(at, dy):
    g = [at("g", 40, first, channels) for first, channels in ((0, 8), (8, 8), (16, 8), (24, 16))]
    sums = torch.zeros(3, 40)
    borders = torch.zeros(choice.border_words((H, W)), dtype=torch.int16)
    mask_grad(dy, at("bits", 5, bits=True), g, sums, borders, ranges=(3, 1), **RUN)
    return sums


def b2(at):
    sums, dots = (ChannelSlice(torch.zeros(3, 16), 16, start, 8) for start in (0, 8))
    dots = dots._replace(base=sums.base)
    centred = Centred(at("raw", 8), numbers(8), dots)
    conv_dgrad(
        at("g", 8), weights(8, 3, 3, 8), at("r", 8), at("dr", 8), sums, width=8, centred=centred, **IMAGES, **RUN
    )  # fmt: skip
    return sums.base


def numbers(width: int) -> ChannelSlice:
    """A table of statistics or coefficients."""
    return ChannelSlice(weights(5, width).float(), width, 0, width)


def n1(at):
    parts = torch.zeros(2, 2, 8)
    norm_stats(at("x", 8), parts, gemm_m=M, ranges=(2, 2), **RUN)
    return parts


def n3(at):
    norm_apply(at("x", 8), numbers(8), at("y", 8), gemm_m=M, relu=True, **RUN)


def n4(at):
    parts, borders = torch.zeros(3, 2, 8), torch.zeros(choice.border_words((H, W)), dtype=torch.int16)
    norm_grad_stats(pixels(at("dy", 8)), at("x", 8), numbers(8), parts, borders, relu=True, ranges=(3, 1), **RUN)
    return parts


def n6(at):
    g = [at("g", 24, first, 8) for first in (16, 0, 8)]
    norm_grad_apply(pixels(at("dy", 24)), at("x", 24), numbers(24), numbers(24), g, relu=True, **RUN)


def b3(at):
    taps = 17 * torch.randint(9, (M, 4), generator=torch.Generator().manual_seed(9)).to(torch.uint8)
    grouped_dgrad(at("g", 24), weights(8, 24), at("dpool", 8), taps, at("dx", 8), **IMAGES, **RUN)


def b4(at, side=3):
    part = torch.zeros(1, 8, side, side, 8)
    borders = aten.border_words((H, W), choice.border_words((H, W)), torch.device("cpu"))
    conv_wgrad(at("g", 8), at("x", 8), part, borders, pool=side == 1, **IMAGES, **RUN)
    return part


POOL = PoolShape(1, H, W, 1)


def p1(at):
    taps = torch.zeros(POOL.pooled_rows, 4, dtype=torch.uint8)
    max_pool(at("x", 8), at("y", 8, rows=POOL.pooled_rows), taps, pool=POOL, **RUN)
    return taps


def p2(at):
    taps = 17 * torch.randint(9, (POOL.pooled_rows, 4), generator=torch.Generator().manual_seed(9)).to(torch.uint8)
    max_pool_grad(at("dy", 8, rows=POOL.pooled_rows), taps, at("dx", 8), pool=POOL, **RUN)


LAUNCHES = {
    "K1": k1, "K2": k2, "K3": k3, "B1": b1, "B1 strided": b1_strided, "B2": b2, "B3": b3, "B4": b4,
    "B4 pool": lambda at: b4(at, 1), "N1": n1, "N3": n3, "N4": n4, "N6": n6, "P1": p1, "P2": p2,
}  # fmt: skip


@pytest.mark.parametrize("kernel", LAUNCHES)
def test_rows_beyond_32_bit_offsets(kernel):
    """Bit for bit what the same launch gives in dense memory."""
    far, near = Place(FAR), Place(None)
    beside = [LAUNCHES[kernel](at) for at in (far, near)]
    for name, expected in near.contents().items():
        assert torch.equal(far.contents()[name], expected), name
    assert beside[1] is None or torch.equal(*beside)
