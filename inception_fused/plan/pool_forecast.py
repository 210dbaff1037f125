"""The launches of a max-pool of stride 2 as data, and what each is predicted to take: bytes, instructions, programs.

    P1             x -> y; in training the taps
    P2             dy, taps -> dx; behind bias and ReLU partial sums of the bias's gradient
    P2's sums      partial sums -> the bias's gradient, of bytes alone

Rows of windows are three pixels high and lie two apart, so that every second row of x is read twice through L2; a row
of cells reads two rows of windows. Columns that neighbours share come from L1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from inception_fused.block.pools import STRIDE, WINDOW, PoolShape
from inception_fused.block.views import Tile, accumulator_of, taps_width, unit_of
from inception_fused.plan import choice, counts
from inception_fused.plan.cards import Ceilings
from inception_fused.plan.counts import Counts, Key, Part
from inception_fused.plan.floors import Work
from inception_fused.plan.forecast import (
    NO_PRODUCT,
    UNCOUNTED,
    Forecast,
    Planned,
    bounded,
    issued,
    one_program,
    resident_of,
    through_l2,
)
from inception_fused.plan.kernel_table import POOL_KERNELS, Kernel
from inception_fused.plan.rules import PLANNED, Capability

STRAIGHT = ("before", "between", "after")
"""Parts of a binary that every program runs. The one loop there is, of P1 with taps, runs where NaN is left."""


class Pool(NamedTuple):
    """A max-pool of stride 2 over dense rows. epilogue: whether bias and ReLU are in it."""

    shape: PoolShape
    channels: int
    dtype: torch.dtype
    epilogue: bool = False


class PoolLaunch(NamedTuple):
    """name: as above. kernel, tile: None where PyTorch adds the sums up. saves: whether P1 writes taps. rows: windows
    or cells, which tiles divide. reads, writes: bytes through device memory by operand, the bias left out. l2: bytes
    that its programs read through L2."""

    name: str
    kernel: Kernel | None
    pool: Pool
    saves: bool
    rows: int
    tile: Tile | None
    reads: dict[str, int]
    writes: dict[str, int]
    l2: float

    @property
    def work(self) -> Work:
        return Work(self.name, 0, sum(self.reads.values()) + sum(self.writes.values()))

    @property
    def programs(self) -> int:
        if self.tile is None:
            return 0
        return -(-self.rows // self.tile.BLOCK_M) * -(-self.pool.channels // self.tile.BLOCK_N)

    @property
    def key(self) -> Key:
        """Finds its binary among the counts."""
        form = " bias" if self.pool.epilogue else ""
        return Key(f"{self.kernel.function}{form}", counts.DTYPES[self.pool.dtype], self.tile, WINDOW, self.saves)


def pool_launches(pool: Pool, *, training: bool = False, capability: Capability = PLANNED) -> Iterator[PoolLaunch]:
    """Of a forward, with ``training`` of the backward too, in order."""
    shape, channels, dtype, epilogue = pool
    e = dtype.itemsize
    columns = dict(gemm_n=channels, unit=unit_of(dtype, channels), capability=capability)
    forward, backward = POOL_KERNELS
    x, y = e * channels * shape.rows, e * channels * shape.pooled_rows
    taps = {"taps": shape.pooled_rows * taps_width(channels)} if training else {}
    tile, read = choice.choose_tile(forward.name, dtype, gemm_m=shape.pooled_rows, **columns), WINDOW / STRIDE * x
    yield PoolLaunch(forward.name, forward, pool, training, shape.pooled_rows, tile, {"x": x}, {"y": y} | taps, read)
    if training:
        tile = choice.choose_tile(backward.name, dtype, gemm_m=shape.cells, **columns)
        tiles = -(-shape.cells // tile.BLOCK_M)
        sums = {"sums": accumulator_of(dtype).itemsize * tiles * channels} if epilogue else {}
        reads = {"dy": y} | taps
        yield PoolLaunch(
            backward.name, backward, pool, False, shape.cells, tile, reads, {"dx": x} | sums,
            STRIDE * sum(reads.values()),
        )  # fmt: skip
        if epilogue:
            yield PoolLaunch(f"{backward.name}'s sums", None, pool, False, tiles, None, sums, {"db": e * channels}, 0.0)


def pool_forecast(
    pool: Pool, ceilings: Ceilings, *, precision: str, training: bool = False, known: Counts | None = None
) -> list[Forecast]:
    """Every launch on a card, as forecast.forecast() has a block's. known: counts; None for the package's."""
    known = known or counts.shipped()
    launches = pool_launches(pool, training=training, capability=divmod(ceilings.capability, 10))
    return [_one(launch, ceilings, precision, known) for launch in launches]


def _one(launch: PoolLaunch, ceilings: Ceilings, precision: str, known: Counts) -> Forecast:
    work, programs, tile = launch.work, launch.programs, launch.tile
    units = {"DRAM": work.bytes / ceilings.bandwidth, "programs": programs * ceilings.start}
    resident, stands_for = 0, NO_PRODUCT
    if tile is not None:
        most = -(-programs // ceilings.multiprocessors)
        units["L2"], stands_for = through_l2(launch.l2, programs, ceilings), UNCOUNTED
        found = known.find(launch.key, ceilings.capability)
        if found:
            total, cycles = one_program(found.binary, _times)
            units |= issued(total, cycles, most, tile, found.binary, ceilings)
            resident, stands_for = resident_of(found.binary, tile, ceilings), found.stands_for
    bound, low, middle, high = bounded(units, ceilings)
    floor = work.floor(ceilings, precision)
    moved = dict(programs=programs, steps=0, taken=Planned(tile, 1), resident=resident)
    return Forecast(launch.name, floor, middle, False, bound, low, high, units, stands_for, **moved)


def _times(part: Part) -> int:
    return int(part.kind in STRAIGHT)
