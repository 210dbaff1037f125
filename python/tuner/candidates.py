"""Which tiles are tried for a problem, and why no others.

What is not varied: BLOCK_K, since the order of a sum over channels must not depend on the batch, and then one size has
to serve all batches; GROUP_M, which only orders tiles for the L2 cache, where a whole operand fits.

Left out is also what spilled when compiled ahead of time for sm_90 with Triton 3.6. Of the rest none does, in 535
binaries for sm_90 (four and eight warps) and 319 for sm_80 (four), nor in 48 for each of BatchNorm in training;
``python tests/aot/tune_gate.py --all`` repeats it.
With another compiler or GPU the tuner finds out itself and says so: Triton 3.9 spills in dgrad's 128x128 in fp32, 40
bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inception_fused.block.views import Tile
from inception_fused.plan import choice, kernel_table, tile_table
from inception_fused.plan.problems import Launch

DEEP = (3, 4)
"""Stages, where a kernel's rules name none."""


def candidates(problem: Launch, shared_bytes: int, warps: Sequence[int] = (4,)) -> list[Tile]:
    """The tiles to time, the rule's first. shared_bytes: what one thread block may use on the GPU."""
    rule, tried = choice.tile_of(problem), kernel_table.RULES[problem.rules].tried
    shapes = [(4, shape) for shape in tried.shapes if 4 in warps]
    shapes += [(8, shape) for shape in tried.wide_shapes if 8 in warps]
    found = [rule]
    for num_warps, shape in shapes:
        spills = problem.dtype == torch.float32 and (num_warps, shape) in tried.spill_in_fp32
        if spills or not covers(problem, *shape):
            continue
        # Two stages of the largest tiles, so that two programs fit on a multiprocessor.
        for stages in tried.stages or (DEEP if shape[0] * shape[1] < 128 * 128 else (2, *DEEP)):
            tile = rule._replace(BLOCK_M=shape[0], BLOCK_N=shape[1], num_warps=num_warps, num_stages=stages)
            if tile not in found and tile_table.illegal_tile(tile, problem.dtype, shared_bytes) is None:
                found.append(tile)
    return found


def covers(problem: Launch, block_m: int, block_n: int) -> bool:
    """Whether the pool is computed once: all filters of branch 4 in one tile, up to 128 of them.

    A forward is not tried with 128 columns for 64: half of them empty, and 64x128 with 64 bytes of channels spills
    under Triton 3.9 (40 bytes of stack).
    """
    covered = kernel_table.RULES[problem.rules].tried.covers
    if covered == "n":
        return min(problem.gemm.n, 128) <= block_n <= max(problem.gemm.n, 64)
    return covered != "m" or block_m >= min(problem.gemm.m, 128)
