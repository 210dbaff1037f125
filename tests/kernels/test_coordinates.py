"""Rows and columns of a tile's pixels, which the kernels find with one division a tile."""

import pytest
import torch
import triton
import triton.language as tl

from inception_fused.kernels.common import coordinates


@triton.jit
def coordinates_kernel(out_ptr, m0, H, W, BLOCK_M: tl.constexpr):
    offs_m = tl.arange(0, BLOCK_M)
    row, col = coordinates(m0, offs_m, H, W, BLOCK_M)
    tl.store(out_ptr + offs_m, row)
    tl.store(out_ptr + BLOCK_M + offs_m, col)


SIZES = [1, 2, 3, 7, 28, 127, 128, 129, 511, 512, 513, 46341]


@pytest.mark.parametrize("block", [16, 128, 512])
@pytest.mark.parametrize("w", SIZES)
@pytest.mark.parametrize("h", [1, 2, 7, 127, 512, 1000])
def test_every_pixel_of_a_tile(h, w, block):
    for first in {0, max(h * w - block // 2, 0), 5 * h * w + w - 1, 3 * h * w - 1}:
        out = torch.empty(2, block, dtype=torch.int32)
        coordinates_kernel[(1,)](out, first, h, w, BLOCK_M=block)
        pixel = first + torch.arange(block)
        assert torch.equal(out[0].long(), pixel // w % h)
        assert torch.equal(out[1].long(), pixel % w)
