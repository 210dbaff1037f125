"""Judges the main loops of GoogLeNet's binaries: integer instructions must not outlast everything else, no register
that a wgmma reads may be written before the wgmma is waited for, and no wgmma may wait for the one before it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from counter import counting
from counter.compiling import compile_launch, serialized
from counter.counting import Job, Named
from counter.loops import step
from inception_fused.plan.counts import COLUMNS, Binary, Part


class Exempt(NamedTuple):
    """Loops whose integer instructions outlast both their product and their bytes, and are borne. form: part of a key's
    text; most: how often over the longer of the two, on any architecture."""

    form: str
    dtype: str
    most: float
    reason: str

    def covers(self, key: Any, excess: float) -> bool:
        return self.form in str(key) and self.dtype == key.dtype and excess <= self.most


ARG_MAX = "arg-max: a comparison and a selection for each of nine taps, for a product of 32 to 128 filters"

EXEMPTIONS = (
    Exempt("pool_proj_kernel", "bf16", 2.4, ARG_MAX),
    Exempt("pool_proj_kernel", "fp32", 1.5, ARG_MAX),
)
"""By Triton 3.6.0; other versions are not asked."""

MOST_EXEMPTIONS = 5

WAITS = "serialized: every wgmma is waited for (C7515)"

SERIALIZED = ("conv_fprop_kernel fp32 128x256x32, 8 warps, 3 stages, 3x3, saves",)
"""Binaries whose wgmmas wait for each other, and are borne: L2 bounds K3 in TF32 (662 us over the nine blocks at batch
128, 788 of 128x128 tiles, which are not), and without what the backward reads the same tile's do not wait. Under Triton
3.5.1, 3.8.0 and 3.9.0 none does."""


def faults(item: Named, binary: Binary, exemptions: Iterable[Exempt] = ()) -> list[str]:
    """What is wrong with a binary's main loop."""
    found = overwritten(binary)
    cycles = step(item.problem, item.launch.tile, binary)
    if cycles is not None and cycles.excess > 1:
        if not any(exempt.covers(item.key, cycles.excess) for exempt in exemptions):
            found.append(
                f"integer instructions: {cycles.integer:.0f} cycles a step, the product takes {cycles.tensor:.0f}, "
                f"its bytes {cycles.l2:.0f}"
            )
    return found


def overwritten(binary: Binary) -> list[str]:
    if not binary.overwritten:
        return []
    return [f"register operand: of {binary.overwritten} wgmma written before they are waited for"]


def wgmma_faults(compiled: Any, capability: int) -> list[str]:
    """What is wrong with the wgmmas of a compiled kernel."""
    return overwritten(counting.counted(compiled, capability)) + [WAITS] * serialized(compiled, capability)


def with_integers(binary: Binary, factor: float) -> Binary:
    """The same with so many times the integer instructions."""
    place = COLUMNS.index("alu")

    def more(part: Part) -> Part:
        figures = (factor * figure if i == place else figure for i, figure in enumerate(part.figures))
        return part._replace(figures=tuple(figures))

    return binary._replace(parts=tuple(map(more, binary.parts)))


def run_loop(job: Job) -> dict[str, Any]:
    """One binary's figures, and what is wrong with it."""
    case, dtype, index = job.source
    item = counting.named(case, dtype, job.capability)[index]
    compiled = compile_launch(item.launch, job.capability)
    binary = counting.counted(compiled, job.capability)
    waits = serialized(compiled, job.capability)
    cycles = step(item.problem, item.launch.tile, binary)
    excess = cycles.excess if cycles is not None else 0.0
    return {
        "name": f"{item.key}, sm_{job.capability}",
        "capability": job.capability,
        "excess": excess,
        "exempt": [i for i, exempt in enumerate(EXEMPTIONS) if excess > 1 and exempt.covers(item.key, excess)],
        "serialized": waits,
        "faults": faults(item, binary, EXEMPTIONS) + [WAITS] * (waits and str(item.key) not in SERIALIZED),
    }
