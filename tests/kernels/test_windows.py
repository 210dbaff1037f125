"""K3, K4, its 1x1 of the stem too, and B2 alone: which pixel every tap reads, bit for bit, between rows of NaN."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inception_fused.block.views import ChannelSlice, Epilogue, Tile
from inception_fused.kernels.conv_dgrad import conv_dgrad
from inception_fused.kernels.conv_fprop import conv_fprop

C, OUTSIDE = 24, 40
"""Channels: a chunk of 16 and a part of one. Rows of NaN before the first image and behind the last."""

TILE = Tile(32, 16, 16, 2, num_stages=1)
IMAGES = [(1, 1), (1, 7), (7, 1), (2, 3), (5, 4)]


def operands(side: int, image: tuple[int, int], batch: int) -> tuple[ChannelSlice, torch.Tensor, torch.Tensor]:
    """x in a wider row, weights [K, R, R, C] of which each takes one element of the window, and what they take."""
    m, k = batch * image[0] * image[1], side**2 + 7
    x = torch.randn(m, C)
    rows = torch.full((m + 2 * OUTSIDE, C + 16), float("nan"))
    rows[OUTSIDE:-OUTSIDE, 8 : C + 8] = x
    tap, channel = torch.arange(k) % side**2, torch.arange(k) * 11 % C
    w = torch.zeros(k, side**2, C)
    w[torch.arange(k), tap, channel] = 1
    images = x.view(batch, *image, C).permute(0, 3, 1, 2)
    windows = F.unfold(images, side, padding=side // 2).view(batch, C, side**2, -1)
    taken = windows[:, channel, tap].permute(0, 2, 1).reshape(m, k)
    inner = rows[OUTSIDE:-OUTSIDE].flatten()
    return ChannelSlice(inner, C + 16, 8, C), w.view(k, side, side, C), taken


@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("side", [1, 3, 5])
def test_every_tap_of_fprop(side, image):
    x, w, taken = operands(side, image, 3)
    y = torch.empty_like(taken)
    m, k = y.shape
    run = dict(gemm_m=m, image=image, epilogue=Epilogue(relu=False), tile=TILE, unit=1)
    conv_fprop(x, w.permute(0, 3, 1, 2), ChannelSlice(y, k, 0, k), None, **run)
    assert torch.equal(y, taken)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("image", IMAGES, ids=str)
@pytest.mark.parametrize("side", [1, 3, 5])
def test_every_tap_of_dgrad(side, image, masked):
    """With sums, of which the rows beyond M are no part, and three columns of padding."""
    g, w, taken = operands(side, image, 3)
    m, k = taken.shape
    r = torch.randn(m, k)
    dr, sums = torch.full((m, k + 3), float("nan")), torch.empty(-(-m // TILE.BLOCK_M), k)
    mask, total = ChannelSlice(r, k, 0, k) if masked else None, ChannelSlice(sums, k, 0, k)
    run = dict(gemm_m=m, image=image, width=k + 3, tile=TILE, unit=1)
    conv_dgrad(g, w, mask, ChannelSlice(dr, k + 3, 0, k), total, **run)
    expected = torch.where(r <= 0, 0, taken) if masked else taken
    assert torch.equal(dr, F.pad(expected, (0, 3)))
    torch.testing.assert_close(sums.sum(0), expected.sum(0), rtol=1e-5, atol=1e-5)
