"""Sizes of max-pools of stride 2 are PyTorch's."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from inception_fused.block.pools import PADDINGS, STRIDE, WINDOW, PoolShape

SIZES = range(1, 12)


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_sizes_are_pytorchs(padding, ceil_mode):
    for h, w in itertools.product(SIZES, SIZES):
        pool = PoolShape(3, h, w, padding, ceil_mode)
        x, place = torch.zeros(3, 1, h, w), (WINDOW, STRIDE, padding)
        if min(pool.pooled) < 1:
            with pytest.raises(RuntimeError, match="too small"):
                F.max_pool2d(x, *place, ceil_mode=ceil_mode)
        else:
            y = F.max_pool2d(x, *place, ceil_mode=ceil_mode)
            assert pool.pooled == tuple(y.shape[2:])
            assert (pool.rows, pool.pooled_rows) == (3 * h * w, y.numel())


@pytest.mark.parametrize("ceil_mode", [False, True], ids=["floor", "ceil"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_no_last_window_begins_outside(padding, ceil_mode):
    """Which ceil_mode would drop; so the formula of sizes has no such case."""
    for size in range(1, 1000):
        count, _ = PoolShape(1, size, size, padding, ceil_mode).pooled
        assert STRIDE * (count - 1) - padding < size


@pytest.mark.parametrize("padding", PADDINGS)
def test_cells_cover_an_image_and_hold_the_windows_of_their_pixels(padding):
    for size in SIZES:
        pool = PoolShape(3, size, size, padding)
        count, _ = pool.cells_of_image
        assert pool.cells == 3 * count**2
        assert STRIDE * (count - 1) - padding < size <= STRIDE * count - padding
        for pixel in range(size):
            cell = (pixel + padding) // STRIDE
            inside = [i for i in range(-2, size) if 0 <= pixel - (STRIDE * i - padding) < WINDOW]
            assert set(inside) <= {cell - 1, cell}
