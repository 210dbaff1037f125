"""Predicted time of a block's launches: a floor knows no tiles and no instructions, this does.

    seconds = time of the busiest unit + launch

    DRAM          bytes / bandwidth
    L2            bytes that tiles read / bandwidth of L2; a multiprocessor's own at most through its port
    tensor cores  multiply-adds of matrix instructions / peak
    instructions  4 warp instructions a cycle
    integer instructions, multiply-adds, shared memory    each by the lanes or bytes of its unit
    latency       cycles of one warp in order, for each of the rounds in which programs fit
    programs      of the grid, each a nanosecond or so of the card

Instructions are counted in the machine code of the launch's binary (counts.py), not measured. All units of a
multiprocessor are asked of the one with the most programs, which is the last to end: ceil(programs / multiprocessors).
Two launches that are made as one (pairs.py) keep a unit busy one after the other, and wait beside each other where a
multiprocessor holds the programs of both; they are counted as the launches that they replace.
What a card can do stands in cards.py, what a launch reads in traffic.py. A launch that somebody has timed (tuned.py)
takes what it took, in proportion to its pixels.

Launches without a product only move bytes: BatchNorm's are counted as those with one, others by bytes and programs.

Left out: units that wait for each other, which costs real kernels another 15 to 25% (a guess), and the host.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch

from inception_fused.block.shapes import BlockShape
from inception_fused.block.views import Tile
from inception_fused.plan import choice, counts, eager, floors, launches, pairs, problems, traffic, tuned
from inception_fused.plan.cards import ISSUE, L2_PORT, SHARED_LINE, Ceilings
from inception_fused.plan.counts import MAIN, OTHER, OUTER, Binary, Counts, Part
from inception_fused.plan.floors import Work
from inception_fused.plan.problems import Launch

LATENCY_SPREAD = 0.3
"""Of the latency, whose figures are assumed: low and high of a forecast."""

LAUNCH = "launch"
"""What bounds a launch whose units all take less than it costs to launch it."""

WHOLE_CARD = ("DRAM", "L2", "programs")
"""Units that all multiprocessors share."""

UNCOUNTED = "no count of this kernel"
NO_PRODUCT = "no product: bytes and programs"

WARP = 32


class Parts(NamedTuple):
    """Partial sums that launches have written for the next that adds up. bytes: of wgrad's; rows: of BatchNorm's."""

    bytes: float = 0.0
    rows: int = 1


class Planned(NamedTuple):
    """tile: None where the launcher has its own. ranges: into which GEMM_K is cut. second: the tile of a pair's second
    half."""

    tile: Tile | None
    ranges: int
    second: Tile | None = None


class Forecast(NamedTuple):
    """One launch. floor, predicted, low, high: seconds; timed: whether predicted is a tuned table's.

    bound: the busiest unit. units: seconds of each. stands_for: what stood in for the launch's own count, "" where it
    was there. eager: seconds of its ATen twin, a guess, None where it has no product. programs, steps: of the grid, and
    of GEMM_K in one. taken: tile and ranges. resident: programs that a multiprocessor holds at once, 0 where nobody
    counted.
    """

    name: str
    floor: float
    predicted: float
    timed: bool
    bound: str
    low: float
    high: float
    units: Mapping[str, float]
    stands_for: str = ""
    eager: float | None = None
    programs: int = 0
    steps: int = 0
    taken: Planned = Planned(None, 1)
    resident: int = 0


def forecast(
    shape: BlockShape,
    dtype: torch.dtype,
    ceilings: Ceilings,
    *,
    precision: str,
    training: bool = False,
    normed: bool = False,
    packs: bool = False,
    chosen: Mapping[str, str] | None = None,
    gpu: tuned.Gpu | None = None,
    known: Counts | None = None,
    planned: Mapping[str, Planned] | None = None,
) -> list[Forecast]:
    """Every launch of a block's forward, with ``training`` of its backward too, in order.

    precision: "bf16", "fp16", "tf32" or "fp32", whose peak counts. normed: whether BatchNorm takes the statistics of
    the batch. Such a forward leaves taps for its backward, but no bits: the counts of inference stand for K1, K3, K4.
    packs: whether the forward begins with pack, since 3x3 and 5x5 weights are not channels_last, any need casting, or
    BatchNorm is folded. chosen: "native" or "triton" by kernel, as dispatch.choices() gives it; None for Triton's. gpu:
    whose tuned tables are asked, as tuned.key() gives it. known: counts; None for the package's. planned: tile and
    ranges of launches by name, in the place of the plan's; of pairs it has those that there are.
    """
    known = known or counts.shipped()
    found, parts = [], Parts()
    for direction in ("forward", "backward") if training else ("forward",):
        rows = problems.launches_of(shape, dtype, direction, capability=divmod(ceilings.capability, 10), normed=normed)
        if direction == "forward" and not packs:
            rows = [launch for launch in rows if launch.row.role != launches.PACK]
        for step in _steps(rows, gpu, chosen, planned):
            halves = []
            for launch, given in zip(step.halves, _given(step, planned), strict=True):
                native = chosen is not None and chosen.get(launch.kernel.name) == "native"
                taken = given or _planned(launch, native, gpu)
                saves = training and (launch.row.pooled or not normed)
                halves.append(_one(launch, taken, ceilings, precision, saves, native, gpu, known, parts))
                parts = _left(parts, launch, taken)
            found.append(halves[0] if len(halves) == 1 else _together(step, halves, ceilings, precision))
    return found


def _left(parts: Parts, launch: Launch, taken: Planned) -> Parts:
    """The partial sums behind a launch."""
    if launch.row.role == launches.WGRAD:
        return parts._replace(bytes=parts.bytes + traffic.part_bytes(launch, taken.ranges))
    if launch.row.role == launches.STATISTICS or launch.row.centred:
        return parts._replace(rows=traffic.part_rows(launch, taken.tile))
    return parts


def _steps(
    rows: Sequence[Launch], gpu: tuned.Gpu | None, chosen: Mapping[str, str] | None,
    planned: Mapping[str, Planned] | None,
) -> list[pairs.Step]:  # fmt: skip
    """The launches of a pass as the plan makes them, or as ``planned`` has them."""
    if planned is None:
        return pairs.steps(rows, gpu, chosen)
    both = [pairs.Step(two) for two in itertools.pairwise(rows)]
    together = [step for step in both if step.name in planned]
    second = {step.halves[1].name for step in together}
    first = {step.halves[0].name: step for step in together}
    return [first.get(launch.name, pairs.Step((launch,))) for launch in rows if launch.name not in second]


def _given(step: pairs.Step, planned: Mapping[str, Planned] | None) -> Sequence[Planned | None]:
    """What ``planned`` says of each half."""
    if planned is None or step.name not in planned:
        return [None] * len(step.halves)
    taken = planned[step.name]
    return [taken] if len(step.halves) == 1 else [Planned(taken.tile, 1), Planned(taken.second, 1)]


def _together(step: pairs.Step, halves: Sequence[Forecast], ceilings: Ceilings, precision: str) -> Forecast:
    """A pair's, of its halves'. A multiprocessor with one program has one of either; with more, some of both."""
    one, other = halves
    programs = one.programs + other.programs
    most = -(-programs // ceilings.multiprocessors)

    def together(unit: str) -> Callable[..., float]:
        beside = most <= min(one.resident, other.resident) if unit == "latency" else most == 1
        return max if beside and unit not in WHOLE_CARD else math.fsum

    units = {
        unit: together(unit)([half.units.get(unit, 0.0) for half in halves]) for unit in {**one.units, **other.units}
    }
    work = floors.joined(step.name, [Work(launch.name, launch.flop, launch.bytes) for launch in step.halves])
    bound, low, middle, high = bounded(units, ceilings)
    return Forecast(
        step.name, work.floor(ceilings, precision), middle, False, bound, low, high, units,
        stands_for="; ".join(dict.fromkeys(filter(None, (half.stands_for for half in halves)))),
        eager=sum(half.eager for half in halves), programs=programs, steps=max(half.steps for half in halves),
        taken=Planned(one.taken.tile, 1, other.taken.tile), resident=min(half.resident for half in halves),
    )  # fmt: skip


def bounded(units: Mapping[str, float], ceilings: Ceilings) -> tuple[str, float, float, float]:
    """(what bounds a launch, its low, middle and high seconds)."""
    bound = max(units, key=units.__getitem__)
    low, middle, high = (
        max(seconds * (factor if unit == "latency" else 1) for unit, seconds in units.items()) + ceilings.launch
        for factor in (1 - LATENCY_SPREAD, 1, 1 + LATENCY_SPREAD)
    )
    return LAUNCH if units[bound] < ceilings.launch else bound, low, middle, high


def _planned(launch: Launch, native: bool, gpu: tuned.Gpu | None) -> Planned:
    if not launch.rules:
        return Planned(None, 1)
    tile = choice.native_tile_of(launch) if native else choice.tile_of(launch, gpu)
    return Planned(tile, choice.ranges(launch, tile))


def _one(
    launch: Launch, taken: Planned, ceilings: Ceilings, precision: str, saves: bool, native: bool,
    gpu: tuned.Gpu | None, known: Counts | None, parts: Parts,
) -> Forecast:  # fmt: skip
    """saves: whether a forward writes what its backward reads. parts: what the launches before it have left."""
    floor = Work(launch.name, launch.flop, launch.bytes).floor(ceilings, precision)
    timed = choice.tuned_of(launch, gpu) if launch.rules and not native else None
    tile, ranges, role = taken.tile, taken.ranges, launch.row.role
    programs, steps, units, stands_for = 0, 0, {"DRAM": launch.bytes / ceilings.bandwidth}, NO_PRODUCT
    binary = None
    if role in launches.COUNTED:
        counted = None
        if known is not None and not native:
            counted = _counted(launch, tile, saves, known, ceilings.capability)
        binary, stands_for, tile = counted or (None, UNCOUNTED, tile)
        if role in launches.GEMMS:
            through_l1 = binary is not None and binary.through_l1
            programs, steps, l2 = traffic.walk(launch, tile, ranges, through_l1=through_l1)
        else:
            programs, steps, l2 = traffic.moved(launch, tile, parts.rows)
        units |= busy(launch, tile, binary, programs, steps, l2, ceilings, precision)
    else:
        if role == launches.MASK:
            programs = traffic.mask_programs(launch, tile)
        elif known is not None:
            programs = known.programs(launch.kernel.function, sum(launch.shape.weight_sizes)) or 0
        if role == launches.SUM:
            units["L2"] = parts.bytes / ceilings.l2
    units["programs"] = programs * ceilings.start
    bound, low, middle, high = bounded(units, ceilings)
    if timed is not None:
        low = middle = high = timed.entry.us * 1e-6 * launch.pixels / timed.entry.pixels
    beside = eager.seconds(launch, ceilings, precision, saves)
    moved = (programs, steps, taken, resident_of(binary, tile, ceilings) if binary else 0)
    return Forecast(
        launch.name, floor, middle, timed is not None, bound, low, high, units, stands_for, beside, *moved
    )  # fmt: skip


def _counted(
    launch: Launch, tile: Tile | None, saves: bool, known: Counts, capability: int
) -> tuple[Binary, str, Tile] | None:
    """(binary, what it stands for, its tile); None where nobody counted it."""
    if tile is None:
        # The launcher has one of its own, and says it in the counts.
        tile = known.tile_of(launch.kernel.function)
    found = tile and known.find(counts.key_of(launch, tile, saves), capability)
    return (*found, tile) if found else None


def busy(
    launch: Launch, tile: Tile, binary: Binary | None, programs: int, steps: int, l2: float, ceilings: Ceilings,
    precision: str,
) -> dict[str, float]:  # fmt: skip
    """Seconds of the units of the multiprocessor with the most programs, and of L2. binary: None for one that nobody
    counted, whose tile alone says what its matrix units do."""
    most = -(-programs // ceilings.multiprocessors)
    peak = ceilings.flops[precision] / 2 / ceilings.multiprocessors
    units = {"L2": through_l2(l2, programs, ceilings)} if programs else {}
    product = launch.row.role in launches.GEMMS
    if binary is None:
        if product:
            units["tensor cores"] = most * steps * tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K / peak
        return units
    total, cycles = one_program(binary, lambda part: _times(part, binary, launch, tile, steps))
    if product:
        units["tensor cores"] = most * tile.num_warps * total["macs"] * counts.MACS_UNIT / peak
    return units | issued(total, cycles, most, tile, binary, ceilings)


def through_l2(l2: float, programs: int, ceilings: Ceilings) -> float:
    """Seconds of L2, or of the port to it of the multiprocessor with the most programs. l2: bytes that all read."""
    most = -(-programs // ceilings.multiprocessors)
    return max(l2 / ceilings.l2, most * l2 / programs / (L2_PORT * ceilings.clock))


def issued(
    total: Mapping[str, float], cycles: float, most: int, tile: Tile, binary: Binary, ceilings: Ceilings
) -> dict[str, float]:
    """Seconds of the units of a multiprocessor with ``most`` programs, matrix units left out. total, cycles: as
    one_program() gives them."""
    clock, chip = ceilings.clock, ceilings.multiprocessor
    warps, threads = most * tile.num_warps, most * tile.num_warps * WARP
    rounds = math.ceil(most / resident_of(binary, tile, ceilings))
    float_and_integer = threads * (total["fma"] + total["imad"]) / chip.fma
    return {
        "instructions": warps * total["issue"] / ISSUE / clock,
        "integer instructions": threads * total["alu"] / chip.alu / clock,
        "multiply-adds": max(float_and_integer, threads * total["imad"] / chip.imad) / clock,
        "shared memory": warps * total["data"] * 128 / SHARED_LINE / clock,
        "latency": rounds * cycles / clock,
    }


def resident_of(binary: Binary, tile: Tile, ceilings: Ceilings) -> int:
    """Programs that a multiprocessor holds at once."""
    return ceilings.multiprocessor.resident(tile.num_warps, binary.registers, binary.shared)


def one_program(binary: Binary, times_of: Callable[[Part], int]) -> tuple[dict[str, float], float]:
    """(columns of one warp from its first instruction to its last, cycles of it). times_of: how often a program comes
    through a part."""
    total, cycles = dict.fromkeys(counts.COLUMNS, 0.0), 0.0
    for part in binary.parts:
        times = times_of(part)
        cycles += times * part.cycles
        for name, figure in zip(counts.COLUMNS, part.figures, strict=True):
            total[name] += times * figure
    return total, cycles


def _times(part: Part, binary: Binary, launch: Launch, tile: Tile, steps: int) -> int:
    """How often a program comes through a part."""
    if part.kind == MAIN:
        # A second one is the rest of an unrolled loop.
        macs = part.of("macs") * tile.num_warps
        return math.ceil(steps / _steps_of_a_trip(macs, tile)) if part is binary.main else 0
    if part.kind == OUTER:
        return -(-launch.gemm.k // tile.BLOCK_K)
    if part.kind == OTHER and launch.row.role == launches.DGRAD_X:
        return traffic.TAPS
    if part.kind == OTHER and launch.row.role not in launches.GEMMS:
        # The last loop is over rows or partial sums, N4's first over borders.
        return steps if part is binary.parts[-1] else 1
    return 1


def _steps_of_a_trip(macs: float, tile: Tile) -> int:
    """More than one where the compiler unrolled the loop. Of a tile below 64x64 matrix instructions may compute rows
    that nobody wants, so that nothing can be told."""
    if min(tile.BLOCK_M, tile.BLOCK_N) < 64:
        return 1
    return max(1, round(macs * counts.MACS_UNIT / (tile.BLOCK_M * tile.BLOCK_N * tile.BLOCK_K)))
