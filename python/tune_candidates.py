"""Which tiles are tried for a problem, and why no others.

What is not varied: BLOCK_K, since the order of a sum over channels must not depend on the batch, and then one size has
to serve all batches; GROUP_M, which only orders tiles for the L2 cache, where a whole operand fits.

Left out is also what spilled when compiled ahead of time for sm_90 with Triton 3.6. Of the rest none does, in 535
binaries for sm_90 (four and eight warps) and 319 for sm_80 (four); ``python tests/tune_gate.py --all`` repeats it. With
another compiler or GPU the tuner finds out itself and says so: Triton 3.9 spills in B2's 128x128 in fp32, 40 bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inception_fused import tile_table
from inception_fused.kernels.views import Tile
from inception_fused.problems import Problem

GEMM = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
WIDE = ((64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
"""For eight warps, which have half as many elements of a tile each."""

SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "K1": GEMM,
    # 128 rows of pixels with the taps of each put 48 to 552 bytes on the stack.
    "K2": ((32, 32), (32, 64), (32, 128), (64, 32), (64, 64), (64, 128)),
    "K3": GEMM,
    # Branch 3 has 32 to 128 filters.
    "K4": (*GEMM, (128, 32)),
    # Nothing is multiplied: bytes in flight per program.
    "B1": ((16, 64), (32, 64), (64, 64), (128, 64), (16, 128), (32, 128), (64, 128)),
    "B2": GEMM,
    # 128x128 beside the gather: 80 bytes of stack in 16-bit types, 616 in fp32.
    "B3": GEMM[:-1],
    "B4": GEMM,
    "B4 pool": ((32, 32), (32, 64), (64, 32), (64, 64), (128, 32), (128, 64)),
}
WIDE_SHAPES = {"K1": WIDE, "K3": WIDE, "K4": WIDE, "B2": WIDE, "B3": WIDE[:3], "B4": WIDE}

SPILL_IN_FP32 = {("B4", 4): ((128, 128),), ("B4", 8): ((128, 256),), ("B2", 8): ((256, 128),)}
"""168, 24 and 40 bytes of stack, by kernel and warps. wgrad's TF32 operands are transposed while they are copied."""

DEEP = (3, 4)
STAGES: dict[str, tuple[int, ...]] = {"K2": (1, 2), "B1": (1,), "B4 pool": (1, 2)}
"""A stage of a pool is nine loads: three take 80 to 180 KB, and leave room for one program on a multiprocessor. B1 has
no dot, which is what Triton pipelines for."""


def candidates(problem: Problem, shared_bytes: int, warps: Sequence[int] = (4,)) -> list[Tile]:
    """The tiles to time, the rule's first. shared_bytes: what one thread block may use on the GPU."""
    rule, kernel = problem.tile(), problem.kernel
    shapes = [(4, shape) for shape in SHAPES[kernel] if 4 in warps]
    shapes += [(8, shape) for shape in WIDE_SHAPES.get(kernel, ()) if 8 in warps]
    found = [rule]
    for num_warps, shape in shapes:
        spills = problem.dtype == torch.float32 and shape in SPILL_IN_FP32.get((kernel, num_warps), ())
        if spills or not covers(problem, *shape):
            continue
        # Two stages of the largest tiles, so that two programs fit on a multiprocessor.
        for stages in STAGES.get(kernel, DEEP if shape[0] * shape[1] < 128 * 128 else (2, *DEEP)):
            tile = rule._replace(BLOCK_M=shape[0], BLOCK_N=shape[1], num_warps=num_warps, num_stages=stages)
            if tile not in found and tile_table.illegal_tile(tile, problem.dtype, shared_bytes) is None:
                found.append(tile)
    return found


def covers(problem: Problem, block_m: int, block_n: int) -> bool:
    """Whether the pool is computed once: all filters of branch 4 in one tile, up to 128 of them.

    K2 is not tried with 128 columns for 64: half of them empty, and 64x128 with 64 bytes of channels spills under
    Triton 3.9 (40 bytes of stack).
    """
    if problem.kernel == "K2":
        return min(problem.gemm_n, 128) <= block_n <= max(problem.gemm_n, 64)
    return problem.kernel != "B4 pool" or block_m >= min(problem.gemm_m, 128)
