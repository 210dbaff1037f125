"""The GEMMs of one block as the plan is asked about them: one problem a launch, without tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inception_fused import plan, tile_table
from inception_fused.googlenet import InceptionConfig
from inception_fused.kernels.views import Tile
from inception_fused.shapes import BlockShape


class Problem(NamedTuple):
    """One launch, with what :func:`plan.choose_tile` is asked about it.

    launch: "K3", or in the backward as ops.BACKWARD_LAUNCHES ("B2 3x3"); kernel: a key of plan.RULES. gemm_k: channels
    of the sum, of which a convolution's GEMM_K is ``taps`` times as much; pixels for B4, where the window is in gemm_n.
    """

    launch: str
    kernel: str
    dtype: torch.dtype
    gemm_m: int
    gemm_n: int
    gemm_k: int
    unit: int
    taps: int = 1

    def tile(self, gpu: object | None = None) -> Tile:
        """What the plan answers. gpu: as tuned.key() gives it; None for the rules."""
        return plan.choose_tile(
            self.kernel, self.dtype, gemm_m=self.gemm_m, gemm_n=self.gemm_n, gemm_k=self.gemm_k, unit=self.unit, gpu=gpu
        )

    def native_tile(self) -> Tile:
        """The same of the compiled kernel."""
        return plan.native_tile(self.kernel, self.dtype, gemm_m=self.gemm_m, gemm_n=self.gemm_n, unit=self.unit)

    @property
    def pixels(self) -> int:
        return tile_table.pixels_of(self.kernel, self.gemm_m, self.gemm_k)


def block_shape(config: InceptionConfig, batch: int, size: int, dtype: torch.dtype) -> BlockShape:
    """size: H = W of the block's feature map."""
    return BlockShape(
        batch, size, size, config.in_channels, config.c1, *config.c2, *config.c3, config.c4, dtype.itemsize
    )  # fmt: skip


def block_problems(shape: BlockShape, dtype: torch.dtype, *, backward: bool = True, branch3: int = 5) -> list[Problem]:
    """The launches that take a tile of plan.RULES, in order: K1 to K4, then B1 to B4.

    The block's input is dense, its output's gradient channels_last. branch3: window of the third branch.
    """
    found = []
    for kernel, side in zip(plan.FORWARD, (1, 1, 3, branch3), strict=True):
        gemm_n, channels = shape.gemm(kernel)
        unit = plan.forward_unit(shape, kernel, dtype, shape.c)
        found.append(Problem(kernel, kernel, dtype, shape.gemm_m, gemm_n, channels, unit, side**2))
    if not backward:
        return found
    m, unit = shape.gemm_m, plan.backward_unit(shape, dtype)
    r3, r5 = shape.r5_offset, shape.r_width - shape.r5_offset
    reductions = shape.k1 + shape.r_width
    x_unit = plan.backward_unit(shape, dtype, shape.c)
    return [
        *found,
        Problem("B1", "B1", dtype, m, max(shape.branch_channels), plan.B1_GEMM_K, unit),
        Problem("B2 3x3", "B2", dtype, m, r3, shape.k2, unit, 9),
        Problem("B2 5x5", "B2", dtype, m, r5, shape.k3, unit, branch3**2),
        Problem("B2 1x1", "B2", dtype, m, shape.c, shape.k4, unit),
        Problem("B3", "B3", dtype, m, shape.c, reductions, unit),
        # All three reductions: their columns with the padding between them.
        Problem("B4 1x1", "B4", dtype, shape.reductions[-1][1], shape.c, m, x_unit),
        Problem("B4 3x3", "B4", dtype, shape.k2, 9 * shape.k2_reduce, m, unit),
        Problem("B4 5x5", "B4", dtype, shape.k3, branch3**2 * shape.k3_reduce, m, unit),
        Problem("B4 pool", "B4 pool", dtype, shape.k4, shape.c, m, x_unit),
    ]
