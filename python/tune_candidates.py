"""Which tiles are tried for a problem, and why no others."""

from __future__ import annotations

from collections.abc import Sequence

from inception_fused import plan, tuned
from inception_fused.kernels.views import Tile
from inception_fused.problems import Problem

GEMM = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
WIDE = ((128, 256), (256, 128))
SHAPES: dict[str, tuple[tuple[int, int], ...]] = {
    "K1": GEMM,
    "K2": ((32, 32), (32, 64), (32, 128), (64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)),
    "K3": GEMM,
    "K4": (*GEMM, (32, 32), (128, 32)),
    "B1": ((16, 64), (32, 64), (64, 64), (128, 64), (16, 128), (32, 128), (64, 128), (128, 32)),
    "B2": GEMM,
    "B3": GEMM,
    "B4": GEMM,
    "B4 pool": ((32, 32), (32, 64), (64, 32), (64, 64), (128, 32), (128, 64), (128, 128)),
}
STAGES: dict[str, tuple[int, ...]] = {"K2": (1, 2, 3), "B1": (1,), "B4 pool": (1, 2, 3)}


def candidates(problem: Problem, shared_bytes: int, warps: Sequence[int] = (4,)) -> list[Tile]:
    """The tiles to time, the rule's first."""
    rule = problem.tile()
    found = [rule]
    for num_warps in warps:
        shapes = SHAPES[problem.kernel] + (WIDE if num_warps == 8 and SHAPES[problem.kernel][:6] == GEMM else ())
        for block_m, block_n in shapes:
            for stages in STAGES.get(problem.kernel, (2, 3, 4)):
                tile = rule._replace(BLOCK_M=block_m, BLOCK_N=block_n, num_warps=num_warps, num_stages=stages)
                if tile not in found and tuned.illegal_tile(tile, problem.dtype, shared_bytes) is None:
                    found.append(tile)
    return found
