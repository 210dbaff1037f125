"""The plan of one block as a table that says why: every launch, its problem, its tile, and the rule or the timing."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inception_fused.block.googlenet_blocks import Config, block_shape
from inception_fused.block.shapes import BlockShape
from inception_fused.block.views import Tile
from inception_fused.plan import choice, kernel_table, launches, pairs, tuned
from inception_fused.plan.cards import H200, Ceilings
from inception_fused.plan.forecast import forecast
from inception_fused.plan.problems import Launch
from inception_fused.plan.rules import Capability
from inception_fused.plan.tile_table import PRECISIONS

HEADER = ("launch", "GEMM_M x N x K", "tile", "us", "bound", "why")


def explain(
    config: Config, batch: int, size: int, dtype: torch.dtype, gpu: tuned.Gpu | None = None,
    backward: bool = True, branch3: Sequence[int] = (5,), card: Ceilings = H200, normed: bool = False,
) -> str:  # fmt: skip
    """A table with a line for each launch of a block, or of the stem, whose tile the plan chooses, and what forecast.py
    says of it. Two that are made as one have a line each, and the time of both in the first.

    size: H = W of the block's feature map; dtype: of the kernels, float32 for TF32. gpu: whose tables are asked
    (tuned.key()); None for the rules. branch3: as block_shape() takes it. card: whose ceilings count, and by whose
    compute capability the rules choose. normed: whether BatchNorm takes the statistics of the batch. The tiles are
    those of Triton's kernels, also where choice.ROUTES prefers a compiled one. For a dense channels_last input, and a
    gradient of the output that is channels_last too.
    """
    rows = [HEADER]
    shape = block_shape(config, batch, size, dtype, branch3=branch3)
    found = forecast(shape, dtype, card, precision=PRECISIONS[dtype], training=backward, normed=normed, gpu=gpu)
    predicted = {item.name: item for item in found}
    place = dict(backward=backward, capability=divmod(card.capability, 10), normed=normed)
    for step in steps_of(shape, dtype, **place, gpu=gpu):
        item = predicted[step.name]
        figures = (f"{1e6 * item.predicted:.1f}", "timed" if item.timed else item.bound)
        for launch in step.halves:
            gemm = f"{launch.gemm.m} x {launch.gemm.n}"
            if launch.row.role in launches.GEMMS:
                gemm += f" x {launch.gemm.k * launch.gemm.taps}"
            rows.append((launch.name, gemm, shown(choice.tile_of(launch, gpu)), *figures, why(launch, gpu)))
            figures = ("", f"with {launch.name}")
    return "\n".join(aligned(rows))


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """A line for each row, its cells below those of the others."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def steps_of(
    shape: BlockShape, dtype: torch.dtype, *, backward: bool, capability: Capability, gpu: tuned.Gpu | None,
    normed: bool = False,
) -> list[pairs.Step]:  # fmt: skip
    """The launches of a block whose tile the plan chooses, as they are made."""
    return pairs.steps(choice.tiled(shape, dtype, backward=backward, capability=capability, normed=normed), gpu)


def legend(card: Ceilings) -> str:
    """What the times of :func:`explain` are."""
    launch = f"{1e6 * card.launch:.1f} a launch"
    return f"us: of the busiest unit on {card.name} and {launch}, counted in the machine code, not measured"


def why(launch: Launch, gpu: tuned.Gpu | None) -> str:
    """What chose a launch's tile, in words."""
    found = choice.tuned_of(launch, gpu)
    if found is not None:
        return timed(launch, found)
    rule = choice.rule_of(launch)
    if launch.unit == 1:
        return f"rule '{rule.name}': not in units of 16 bytes"
    if len(kernel_table.RULES[launch.rules].rules) == 1:
        return "the kernel's only rule"
    condition = rule.condition()
    return f"rule '{rule.name}': {'none before it serves' if condition == 'otherwise' else condition}"


def timed(launch: Launch, found: tuned.Found) -> str:
    """A tuned tile's figures."""
    entry = found.entry
    parts = [f"{found.table.source}: {entry.us:.1f} us"]
    if entry.rule_us is not None:
        parts.append(f"rule's {entry.rule_us:.1f}")
    if entry.runner_up is not None:
        tile, us = entry.runner_up
        parts.append(f"runner-up {shown(tile)} {us:.1f}")
    parts.append(f"spread {entry.spread:.1%}")
    if entry.pixels != launch.pixels:
        parts.append(f"timed with {entry.pixels} pixels")
    return ", ".join(parts)


def shown(tile: Tile) -> str:
    """BLOCK_M x N x K, stages, and warps where they are not four."""
    warps = f", {tile.num_warps} warps" if tile.num_warps != 4 else ""
    stages = "1 stage" if tile.num_stages == 1 else f"{tile.num_stages} stages"
    return f"{tile.BLOCK_M}x{tile.BLOCK_N}x{tile.BLOCK_K}, {stages}{warps}"
