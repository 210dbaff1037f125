"""What the ATen twin of a launch would take (runtime/aten.py): a small model, to name ``backend("B4=eager")``.

Each of a twin's operations is a kernel of its own: a product at EAGER_SHARE of the peak, or a pass over memory at the
whole bandwidth, none faster than LEAST, and a launch each. A guess beside the counted figures of our kernels, generous
to eager; what the host needs for each operation is not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from inception_fused.plan import launches
from inception_fused.plan.cards import Ceilings
from inception_fused.plan.eager_kernels import INDEX_BYTES
from inception_fused.plan.problems import PARTIAL_SUM_BYTES, Launch

EAGER_SHARE = 0.6
"""Of the peak that cuDNN's and cuBLAS's products reach in these shapes: a guess, the better half of 0.3 to 0.6."""

LEAST, STEP, STEPS = 1.7e-6, 0.12e-6, 12
"""Seconds that a small kernel takes, and of a product for each 64 of GEMM_K, which it splits where there are more than
so many steps: guesses."""

TAP_PASSES = 6
"""Passes over the indices that make taps of them."""

GATHER_PASSES = 8
"""Of each of nine taps: compare, select, pad, add, in fp32."""


class Operation(NamedTuple):
    """flop, bytes: of one kernel; k: of a product, GEMM_K."""

    flop: int
    bytes: int
    k: int = 0

    def least(self) -> float:
        return LEAST + STEP * min(STEPS, self.k / 64)


def seconds(launch: Launch, ceilings: Ceilings, precision: str, saves: bool) -> float | None:
    """A launch with a product, as its twin computes it; None for the others. saves: for training."""
    if launch.row.role not in launches.GEMMS:
        return None
    return total(_operations(launch, saves), ceilings, precision)


def total(operations: Iterable[Operation], ceilings: Ceilings, precision: str) -> float:
    peak = EAGER_SHARE * ceilings.flops[precision]
    bodies = (max(op.flop / peak, op.bytes / ceilings.bandwidth, op.least()) for op in operations)
    return sum(body + ceilings.launch for body in bodies)


def _operations(launch: Launch, saves: bool) -> Iterator[Operation]:
    gemm, role, e = launch.gemm, launch.row.role, launch.shape.itemsize
    rows, pooled = launch.shape.gemm_m, launch.row.pooled
    # In one step of memory each: the product reads its operands and writes its result.
    yield Operation(launch.flop, launch.bytes, gemm.k * gemm.taps)
    if pooled and role in (launches.FPROP, launches.WGRAD):
        yield Operation(0, rows * launch.shape.c * (2 * e + INDEX_BYTES))
    if role == launches.FPROP:
        # Bias, then ReLU into the slice.
        yield from [Operation(0, 2 * e * rows * gemm.n)] * 2
        if saves and pooled:
            yield from [Operation(0, 2 * INDEX_BYTES * rows * launch.shape.c)] * TAP_PASSES
    elif role == launches.DGRAD:
        yield Operation(0, 3 * e * rows * gemm.n)
        yield Operation(0, 2 * e * rows * gemm.n)
    elif role == launches.DGRAD_X:
        yield from [Operation(0, 2 * PARTIAL_SUM_BYTES * rows * gemm.n)] * (9 * GATHER_PASSES // 2)
    else:
        yield Operation(0, 2 * PARTIAL_SUM_BYTES * gemm.m * gemm.n)
