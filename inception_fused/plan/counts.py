"""Counted instructions of GoogLeNet's binaries, as ``python python/count.py`` has written them: counts.json.

A record is one binary: what it needs of a multiprocessor, and the instructions of its parts by the unit that runs them.
A binary serves several keys, since a size that is a run-time value makes no other. What is not in the file takes the
count of the nearest that is, and says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from inception_fused.block.views import Tile
from inception_fused.plan import launches
from inception_fused.plan.problems import Launch
from inception_fused.plan.sources import kernel_sources

FILE = Path(__file__).with_name("counts.json")

SCHEMA = 1

COLUMNS = ("issue", "alu", "imad", "fma", "xu", "lsu", "tensor", "uniform", "control", "data", "macs")
"""Of a part. Instructions of one warp by unit, as python/counter/pipes.py sorts them; data: 128 bytes each through
shared memory or L1; macs: multiply-adds of matrix instructions, in units of MACS_UNIT."""

MACS_UNIT = 1024

MAIN, OTHER, OUTER = "main", "other", "outer"
"""Loops: the one with matrix instructions, any without, and any around another."""

DTYPES = {torch.bfloat16: "bf16", torch.float16: "bf16", torch.float32: "fp32"}
"""fp16's kernels are bf16's but for the type. fp32 is computed as TF32."""


class Key(NamedTuple):
    """What finds a binary. kernel: the name of the device code, with its form where one code has two; side: of the
    window; saves: whether a forward writes what its backward reads."""

    kernel: str
    dtype: str
    tile: Tile
    side: int
    saves: bool

    def __str__(self) -> str:
        t = self.tile
        size = f"{t.BLOCK_M}x{t.BLOCK_N}x{t.BLOCK_K}, {t.num_warps} warps, {t.num_stages} stages"
        return f"{self.kernel} {self.dtype} {size}, {self.side}x{self.side}{', saves' * self.saves}"


def key_of(launch: Launch, tile: Tile, saves: bool) -> Key:
    """The key of a launch with a tile. saves: of a forward for training, which writes nothing of an output that another
    convolution reads."""
    row, shape = launch.row, launch.shape
    kernel = row.kernel.function
    if row.role == launches.WGRAD and row.pooled:
        kernel += " pool"
    if launch.rules.endswith(" strided"):
        kernel += " strided"
    if row.centred:
        kernel += " centred"
    sides = dict(zip(shape.variant.names, shape.sides, strict=True))
    side = sides[row.convs[0]] if row.role in (launches.FPROP, launches.DGRAD, launches.WGRAD) else 1
    return Key(kernel, DTYPES[launch.dtype], tile, side, saves and row.role == launches.FPROP and launch.is_output)


class Part(NamedTuple):
    """A stretch of code. kind: "before", "between" or "after" the loops, or a loop's; figures: as COLUMNS; cycles: of
    one warp in order, of a loop those of a trip."""

    kind: str
    figures: tuple[float, ...]
    cycles: float

    def of(self, name: str) -> float:
        return self.figures[COLUMNS.index(name)]

    def times(self, factor: float) -> Part:
        return Part(self.kind, tuple(factor * figure for figure in self.figures), factor * self.cycles)


class Binary(NamedTuple):
    """One binary. registers, stack: of a thread, stack in bytes; shared: bytes of a program; through_l1: whether the
    main loop reads its operands through L1; overwritten: registers that a wgmma reads, written before it is waited
    for."""

    capability: int
    registers: int
    stack: int
    shared: int
    through_l1: bool
    overwritten: int
    parts: tuple[Part, ...]

    @property
    def main(self) -> Part | None:
        """The loop with most matrix instructions."""
        loops = [part for part in self.parts if part.kind == MAIN]
        return max(loops, key=lambda part: part.of("macs"), default=None)


class Found(NamedTuple):
    """A binary, and which other key's it is, "" where it is the launch's own."""

    binary: Binary
    stands_for: str = ""


class Counts(NamedTuple):
    """A file of counts. grids: by kernel (elements of a block's weights, programs) of the launches whose grid is made
    of weights."""

    triton: str
    kernel_sources: str
    binaries: Mapping[tuple[Key, int], Binary]
    grids: Mapping[str, Sequence[tuple[int, int]]]

    @property
    def stale(self) -> bool:
        """Whether the kernels have changed since."""
        return self.kernel_sources != kernel_sources()

    def find(self, key: Key, capability: int) -> Found | None:
        """The binary of a key on an architecture, else the nearest of the same kernel and dtype; None without one."""
        known = sorted({cap for _, cap in self.binaries})
        if not known:
            return None
        # The newest that is no newer: sm_86 and sm_120 have the units of sm_89, nearest by kind of matrix instruction.
        chip = {86: 89, 120: 89, 121: 89}.get(capability, max((c for c in known if c <= capability), default=known[0]))
        chip = chip if chip in known else known[0]
        exact = self.binaries.get((key, chip))
        if exact is not None:
            return Found(exact, "" if chip == capability else f"sm_{chip}'s")
        same = [
            other for other, cap in self.binaries if (other.kernel, other.dtype, cap) == (key.kernel, key.dtype, chip)
        ]
        if not same:
            return None
        nearest = min(same, key=lambda other: (_distance(key, other), str(other)))
        binary = self.binaries[nearest, chip]
        return Found(_scaled(binary, nearest.tile, key.tile), f"sm_{chip} {nearest}")

    def tile_of(self, kernel: str) -> Tile | None:
        """The tile of a kernel whose launcher has one of its own; None where it was not counted."""
        return next((key.tile for key, _ in self.binaries if key.kernel == kernel), None)

    def programs(self, kernel: str, weights: int) -> int | None:
        """Programs of a launch whose grid is made of weights, in proportion to the nearest block's."""
        grids = self.grids.get(kernel)
        if not grids:
            return None
        elements, programs = min(grids, key=lambda grid: abs(grid[0] - weights))
        return max(1, round(programs * weights / elements))


def _distance(key: Key, other: Key) -> tuple[float, ...]:
    def ratio(a: int, b: int) -> float:
        return max(a, b) / min(a, b)

    tile, tile2 = key.tile, other.tile
    sizes = [
        ratio(getattr(tile, name), getattr(tile2, name)) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "num_warps")
    ]
    return (key.saves != other.saves, sum(sizes), abs(key.side - other.side), abs(tile.num_stages - tile2.num_stages))


def _scaled(binary: Binary, tile: Tile, to: Tile) -> Binary:
    """A binary's counts for another tile: a step in proportion to the operands of a warp, matrix instructions to the
    product, what is outside of loops to the result. An assumption, good to a third."""
    warps = to.num_warps / tile.num_warps
    operands = (to.BLOCK_M + to.BLOCK_N) * to.BLOCK_K / ((tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K) / warps
    result = to.BLOCK_M * to.BLOCK_N / (tile.BLOCK_M * tile.BLOCK_N) / warps
    product = result * to.BLOCK_K / tile.BLOCK_K

    def part(found: Part) -> Part:
        scaled = found.times(operands if found.kind == MAIN else result)
        figures = list(scaled.figures)
        for name in ("macs", "tensor"):
            figures[COLUMNS.index(name)] = found.of(name) * product
        return scaled._replace(figures=tuple(figures))

    shared = round(binary.shared * operands * warps * to.num_stages / tile.num_stages)
    return binary._replace(shared=shared, parts=tuple(map(part, binary.parts)))


def parse(text: str) -> Counts:
    """A file's text.

    Raises:
        ValueError: it is of another schema.
    """
    data = json.loads(text)
    if data["schema"] != SCHEMA or tuple(data["columns"]) != COLUMNS:
        raise ValueError(f"counts of schema {data['schema']}, wants {SCHEMA}: run python python/count.py")
    binaries = {}
    for record in data["binaries"]:
        parts = tuple(Part(kind, tuple(figures), cycles) for kind, cycles, *figures in record["parts"])
        binary = Binary(**{name: record[name] for name in Binary._fields if name != "parts"}, parts=parts)
        for kernel, dtype, tile, side, saves in record["serves"]:
            binaries[Key(kernel, dtype, Tile(*tile), side, saves), binary.capability] = binary
    grids = {kernel: [tuple(grid) for grid in found] for kernel, found in data["grids"].items()}
    return Counts(data["triton"], data["kernel_sources"], binaries, grids)


def as_text(counts: Counts) -> str:
    """A file's text: a line a binary, so that a change of one kernel is a change of its lines."""
    serves: dict[tuple[int, Binary], list[Key]] = {}
    for (key, capability), binary in counts.binaries.items():
        serves.setdefault((capability, binary), []).append(key)
    lines = []
    for (_, binary), keys in sorted(serves.items(), key=lambda item: (str(min(item[1])), item[0][0])):
        record = binary._asdict() | {
            "serves": [[key.kernel, key.dtype, list(key.tile), key.side, key.saves] for key in sorted(keys)],
            "parts": [[part.kind, _short(part.cycles), *map(_short, part.figures)] for part in binary.parts],
        }
        lines.append(json.dumps(record, separators=(",", ":")))
    head = {"schema": SCHEMA, "triton": counts.triton, "kernel_sources": counts.kernel_sources, "columns": COLUMNS}
    first = json.dumps(head | {"grids": counts.grids})[:-1]
    return f'{first}, "binaries": [\n' + ",\n".join(lines) + "\n]}\n"


def _short(figure: float) -> float:
    rounded = round(figure, 1)
    return int(rounded) if rounded == int(rounded) else rounded


@cache
def shipped() -> Counts | None:
    """The package's own counts; None where the file is not there or of another schema."""
    try:
        return parse(FILE.read_text(encoding="utf-8"))
    except (OSError, ValueError, KeyError, TypeError):
        return None
