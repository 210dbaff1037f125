"""Counts made for a test, with figures that its arithmetic can follow."""

from __future__ import annotations

from inception_fused.block.views import Tile
from inception_fused.plan.counts import COLUMNS, MACS_UNIT, MAIN, OTHER, Binary, Counts, Key, Part

NOTHING = Counts("none", "", {}, {})


def part(kind: str, cycles: float = 0, **figures: float) -> Part:
    return Part(kind, tuple(figures.get(name, 0) for name in COLUMNS), cycles)


def binary(
    tile: Tile, *, step: float = 0, alu: float = 0, imad: float = 0, data: float = 0, cycles: float = 0,
    straight: float = 0, other: float = 0, unrolled: int = 1, registers: int = 64, shared: int = 16384,
    through_l1: bool = False,
) -> Binary:  # fmt: skip
    """step: instructions of a trip, of which alu, imad; straight: those outside of loops, all of them ALU's, and as
    many cycles; other: of a loop without matrix instructions."""
    macs = unrolled * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K / tile.num_warps / MACS_UNIT
    parts = [
        part("before", straight, issue=straight, alu=straight),
        part(MAIN, cycles, issue=step, alu=alu, imad=imad, data=data, macs=macs, tensor=1),
    ]
    if other:
        parts.append(part(OTHER, 0, issue=other))
    return Binary(90, registers, 0, shared, through_l1, 0, tuple(parts))


def counts_of(kernel: str, tile: Tile, side: int, made: Binary) -> Counts:
    """A file that knows one binary, with and without what a backward reads."""
    return NOTHING._replace(
        binaries={(Key(kernel, "bf16", tile, side, saves), made.capability): made for saves in (False, True)}
    )
