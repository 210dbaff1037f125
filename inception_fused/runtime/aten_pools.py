"""The ATen twins of the launchers of max-pools of stride 2; see aten.py, sizes in block/pools.py."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_fused.block.pools import NO_TAP, STRIDE, WINDOW, PoolShape
from inception_fused.block.views import ChannelSlice, accumulator_of
from inception_fused.runtime.aten import images_of, pack_taps, rows_of, unpack_taps


def max_pool(
    x: ChannelSlice, y: ChannelSlice, taps: Tensor | None, bias: Tensor | None = None, *, relu: bool = False,
    pool: PoolShape,
) -> None:  # fmt: skip
    """P1; see kernels/max_pool.py."""
    images, place = images_of(x, pool.rows, (pool.h, pool.w)), (WINDOW, STRIDE, pool.padding)
    if taps is None:
        pooled = F.max_pool2d(images, *place, ceil_mode=pool.ceil_mode)
    else:
        pooled, indices = F.max_pool2d(images, *place, ceil_mode=pool.ceil_mode, return_indices=True)
        named = rows_of(taps_of_indices(indices, pool))
    rows = rows_of(pooled)
    if bias is not None:
        rows = rows + bias
    if taps is not None:
        taps.copy_(pack_taps(torch.where(rows <= 0, NO_TAP, named) if relu else named))
    y.rows(pool.pooled_rows).copy_(F.relu(rows) if relu else rows)


def max_pool_grad(
    dy: ChannelSlice, taps: Tensor, dx: ChannelSlice, sums: Tensor | None = None, *, pool: PoolShape
) -> None:
    """P2; see kernels/max_pool_grad.py. A gather in its order: ATen's own scatter adds in no fixed order on CUDA."""
    if sums is not None:
        passes = unpack_taps(taps, dy.channels) != NO_TAP
        sums.copy_(torch.where(passes, dy.rows(pool.pooled_rows), 0).sum(dim=0, dtype=sums.dtype, keepdim=True))
    (h, w), p = pool.pooled, pool.padding
    gradient = images_of(dy, pool.pooled_rows, pool.pooled)
    sent_to = unpack_taps(taps, dy.channels).unflatten(0, (pool.n, h, w)).permute(0, 3, 1, 2)
    # The pixels of all places of all windows, and of the image beyond the last.
    height, width = (max(size + p, STRIDE * count + 1) for size, count in ((pool.h, h), (pool.w, w)))
    total = gradient.new_zeros((pool.n, dy.channels, height, width), dtype=accumulator_of(gradient.dtype))
    for tap in reversed(range(WINDOW**2)):
        r, s = divmod(tap, WINDOW)
        there = total[:, :, r : r + STRIDE * h : STRIDE, s : s + STRIDE * w : STRIDE]
        there += torch.where(sent_to == tap, gradient, 0)
    dx.rows(pool.rows).copy_(rows_of(total[:, :, p : p + pool.h, p : p + pool.w]))


def taps_of_indices(indices: Tensor, pool: PoolShape) -> Tensor:
    """PyTorch's flat arg-max indices [N, C, Ho, Wo] (row * W + column in the image) -> taps 3 * r + s in 0..8."""
    top, left = _begins(pool, indices.device)
    return (indices // pool.w - top) * WINDOW + (indices % pool.w - left)


def indices_of_taps(taps: Tensor, pool: PoolShape) -> Tensor:
    """The inverse of :func:`taps_of_indices`, as int64."""
    top, left = _begins(pool, taps.device)
    taps = taps.long()
    return (taps // WINDOW + top) * pool.w + (taps % WINDOW + left)


def _begins(pool: PoolShape, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first row of each window [Ho, 1] and its first column [1, Wo], which may be -1."""
    top, left = (STRIDE * torch.arange(count, device=device) - pool.padding for count in pool.pooled)
    return top[:, None], left[None, :]
