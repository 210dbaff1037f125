"""Predicted time of a block's launches: a floor knows no tiles, this does.

    seconds = max(compute, bytes / bandwidth) + launch

    compute = waves * 2 * BLOCK_M*BLOCK_N*BLOCK_K * steps * multiprocessors / peak
    waves   = ceil(programs / multiprocessors)

A program computes whole tiles in whole steps of BLOCK_K, and the multiprocessor with the most programs is the last to
end. A launch that somebody has timed (tuned.py) takes what it took, in proportion to its pixels. Left out: what the L2
cache can feed, the latency of a program that has a multiprocessor to itself, the clock under load. So a large block is
predicted too fast, by how much only a measurement tells.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from inception_fused import plan, tuned
from inception_fused.floors import Ceilings, Work, backward_kernels, forward_kernels, pack, weight_count
from inception_fused.problems import Problem, block_problems
from inception_fused.shapes import BlockShape


class Forecast(NamedTuple):
    """One launch. floor, predicted: seconds; timed: whether predicted is a tuned table's."""

    name: str
    floor: float
    predicted: float
    timed: bool


def forecast(
    shape: BlockShape,
    dtype: torch.dtype,
    ceilings: Ceilings,
    *,
    precision: str,
    branch3: int = 5,
    training: bool = False,
    packs: bool = False,
    chosen: Mapping[str, str] | None = None,
    gpu: tuned.Gpu | None = None,
) -> list[Forecast]:
    """Every launch of a block's forward, with ``training`` of its backward too, in order.

    precision: "bf16", "fp16", "tf32" or "fp32", whose peak counts. packs: whether the forward begins with pack, since
    3x3 and 5x5 weights are not channels_last, any need casting, or BatchNorm is folded. chosen: "native" or "triton" by
    kernel, as dispatch.choices() gives it; None for Triton's. gpu: whose tuned tables are asked, as tuned.key() gives
    it.
    """
    works = [pack(shape, branch3=branch3)] if packs else []
    works += forward_kernels(shape, branch3=branch3)
    if training:
        works += backward_kernels(shape, branch3=branch3)
    problems = {problem.launch: problem for problem in block_problems(shape, dtype, branch3=branch3)}
    weights = weight_count(shape, branch3=branch3)
    found = []
    for work in works:
        problem, floor = problems.get(work.name), work.floor(ceilings, precision)
        native = chosen is not None and chosen.get(work.name) == "native"
        entry = None if native or gpu is None or problem is None else _timed(problem, gpu)
        if entry is not None:
            found.append(Forecast(work.name, floor, entry, timed=True))
            continue
        seconds = floor if problem is None else _seconds(work, problem, ceilings, precision, weights, native)
        found.append(Forecast(work.name, floor, seconds + ceilings.launch, timed=False))
    return found


def _timed(problem: Problem, gpu: tuned.Gpu) -> float | None:
    """Seconds by a tuned table; None where none knows the problem."""
    if problem.unit == 1:
        return None
    sizes = problem.gemm_m, problem.gemm_n, problem.gemm_k
    known = tuned.lookup(gpu, problem.kernel, problem.dtype, *sizes)
    if known is None:
        return None
    return known.entry.us * 1e-6 * problem.pixels / known.entry.pixels


def _seconds(
    work: Work, problem: Problem, ceilings: Ceilings, precision: str, weights: int, native: bool
) -> float:  # fmt: skip
    """A launch without what it costs to launch it. weights: elements of all of the block's."""
    moving = work.bytes / ceilings.bandwidth
    if not work.flop:
        return moving
    tile = problem.native_tile() if native else problem.tile()
    tiles = -(-problem.gemm_m // tile.BLOCK_M) * -(-problem.gemm_n // tile.BLOCK_N)
    steps, ranges = problem.taps * -(-problem.gemm_k // tile.BLOCK_K), 1
    if problem.kernel.startswith("B4"):
        ranges = plan.split_k(tiles, steps, weights)
    waves = -(-tiles * ranges // ceilings.multiprocessors)
    flop = 2 * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K * -(-steps // ranges)
    return max(moving, waves * flop * ceilings.multiprocessors / ceilings.flops[precision])
