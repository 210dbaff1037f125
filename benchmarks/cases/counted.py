"""Counted, not measured: what the forecast says of every launch of the nine blocks, on several cards.

JSON of :func:`collect`, times in microseconds:

    schema, what, commit, counts   of this file, in words, the commit, and of the counts (triton, kernel_sources)
    cards                          by name: bandwidth, l2, flops, multiprocessors, clock, launch, start, capability
    columns                        names of what a launch's list holds: COLUMNS, then UNITS
    points                         a list: card, dtype ("bf16", "tf32"), batch, training, normed, launches

normed: of a training step, whether BatchNorm takes the statistics of the batch. Older files lack it: it is false.

A launch: its block and name, tile (of a pair both, one behind the other), ranges, programs and steps; what bounds it;
what stood in for its own count; floor; predicted with low and high, the launch's own microsecond among them; its ATen
twin; then each unit by itself. null: it has none.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from benchmarks.cases import baselines
from benchmarks.cases.baselines import Point
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, spatial_size
from inception_fused.block.views import Tile
from inception_fused.plan import counts
from inception_fused.plan.cards import CARDS
from inception_fused.plan.counts import Counts
from inception_fused.plan.forecast import UNCOUNTED, Forecast, Planned, forecast

SCHEMA = 1
CARD_NAMES = ("H200", "A100", "RTX 4090")
DTYPES = ("bf16", "tf32")
BATCHES = (1, 32, 128)
PASSES = ((False, False), (True, False), (True, True))
"""(training, normed) of a point."""

UNITS = (
    "DRAM", "L2", "tensor cores", "instructions", "integer instructions", "multiply-adds", "shared memory", "latency",
    "programs",
)  # fmt: skip
COLUMNS = (
    "block", "launch", "tile", "ranges", "programs of the grid", "steps", "bound", "stands for", "floor", "predicted",
    "low", "high", "eager",
)  # fmt: skip
FEW = ("DRAM", "L2", "tensor cores", "instructions", "integer instructions", "multiply-adds")
"""Units without shared memory, of which K1's both branches are counted, and without those whose figures are assumed."""


def collect(
    known: Counts | None = None, commit: str = "", cards: Sequence[str] = CARD_NAMES,
    plans: Mapping[tuple[Any, ...], Mapping[str, Planned]] | None = None,
    passes: Sequence[tuple[bool, bool]] = PASSES,
) -> dict[str, Any]:  # fmt: skip
    """Every launch at every point. known: counts; None for the package's. commit: of the kernels and the plan. plans:
    tiles and ranges by place, as :func:`place_of` gives it, and block, instead of the plan's. passes: some of
    PASSES."""
    known = known or counts.shipped()
    points = []
    for card, dtype, batch, (training, normed) in itertools.product(cards, DTYPES, BATCHES, passes):
        rows = []
        place = dict(card=card, dtype=dtype, batch=batch, training=training, normed=normed)
        for block, config in GOOGLENET_BLOCKS.items():
            point = Point(block, config, spatial_size(block), batch, dtype)
            options = dict(precision=dtype, training=training, normed=normed, known=known)
            if plans is not None:
                options["planned"] = plans.get((*place_of(place), block))
            found = forecast(point.shape, baselines.DTYPES[dtype], CARDS[card], **options)
            rows += [_row(block, item) for item in found]
        points.append(place | {"launches": rows})
    what = "nine blocks of GoogLeNet at 224, microseconds counted from machine code, not measured"
    return head(what, known, commit, cards) | {"columns": [*COLUMNS, *UNITS], "points": points}


def head(what: str, known: Counts, commit: str, cards: Sequence[str]) -> dict[str, Any]:
    """What a file of counted figures says before them."""
    return {
        "schema": SCHEMA,
        "what": what,
        "commit": commit,
        "counts": {"triton": known.triton, "kernel_sources": known.kernel_sources} if known else None,
        "cards": {name: asdict(CARDS[name]) for name in cards},
    }


def place_of(point: Mapping[str, Any]) -> tuple[Any, ...]:
    """What tells a point from others: card, dtype, batch, training, normed."""
    return (*(point[name] for name in ("card", "dtype", "batch", "training")), point.get("normed", False))


def again(data: Mapping[str, Any], known: Counts) -> dict[str, Any]:
    """A result computed anew by today's model and cards, with the tiles and ranges that it holds. known: the counts
    that it came from. A launch whose kernel has another name today keeps its row."""
    plans = {}
    for point in data["points"]:
        place = place_of(point)
        for values in point["launches"]:
            row = dict(zip(data["columns"], values, strict=True))
            fields = len(Tile._fields)
            tiles = [Tile(*row["tile"][i : i + fields]) for i in range(0, len(row["tile"] or ()), fields)]
            plans.setdefault((*place, row["block"]), {})[row["launch"]] = Planned(
                tiles[0] if tiles else None, row["ranges"], *tiles[1:]
            )
    passes = list(dict.fromkeys(place_of(point)[-2:] for point in data["points"]))
    new = collect(known, data["commit"], tuple(data["cards"]), plans, passes)
    said = data["columns"].index("stands for")
    for point, old in zip(new["points"], data["points"], strict=True):
        rows = zip(point["launches"], old["launches"], strict=True)
        point["launches"] = [was if row[said] == UNCOUNTED != was[said] else row for row, was in rows]
    return new


def _row(block: str, item: Forecast) -> list[Any]:
    def us(seconds: float | None) -> float | None:
        return None if seconds is None else round(seconds * 1e6, 2 if seconds < 1e-5 else 1)

    tile = [*(item.taken.tile or ()), *(item.taken.second or ())] or None
    times = map(us, (item.floor, item.predicted, item.low, item.high, item.eager))
    units = (us(item.units.get(unit)) for unit in UNITS)
    place = (block, item.name, tile, item.taken.ranges, item.programs, item.steps)
    return [*place, item.bound, item.stands_for, *times, *units]


def summed(point: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By launch, and "all" of them: sums over the nine blocks of floor, predicted, low, high, each unit, the busiest
    units ("busiest"), those of FEW ("few"), blocks by bound ("bounds"), and the busiest units by
    bound ("busiest by bound")."""
    found: dict[str, dict[str, Any]] = {}
    for values in point["launches"]:
        row = dict(zip((*COLUMNS, *UNITS), values, strict=True))
        units = {unit: row[unit] for unit in UNITS if row[unit] is not None}
        few = max(us for unit, us in units.items() if unit in FEW)
        figures = {name: row[name] or 0.0 for name in ("floor", "predicted", "low", "high", "eager")}
        figures |= {"busiest": max(units.values()), "few": few, **units}
        for name in (row["launch"], "all"):
            into = found.setdefault(name, {"bounds": {}, "busiest by bound": {}})
            for figure, value in figures.items():
                into[figure] = into.get(figure, 0.0) + value
            for kind, value in (("bounds", 1), ("busiest by bound", figures["busiest"])):
                into[kind][row["bound"]] = into[kind].get(row["bound"], 0) + value
    return {name: figures for name, figures in found.items() if name != "all"} | {"all": found["all"]}


def table(point: Mapping[str, Any]) -> str:
    """One point as Markdown: a line a launch, summed over the blocks."""
    head = ("launch", "floor", *UNITS, "busiest", "predicted", "range", "bound")
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, figures in summed(point).items():
        cells = [f"{figures[column]:.0f}" if column in figures else "-" for column in ("floor", *UNITS, "busiest")]
        spread = f"{figures['low']:.0f} to {figures['high']:.0f}"
        bound = max(figures["bounds"], key=figures["bounds"].get) if name != "all" else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {figures['predicted']:.0f} | {spread} | {bound} |")
    return "\n".join(lines)


def title(point: Mapping[str, Any]) -> str:
    place = f"{point['card']}, {point['dtype']}, batch {point['batch']}, {pass_of(point)}"
    return f"{place}, microseconds counted, not measured"


def pass_of(point: Mapping[str, Any]) -> str:
    """In words."""
    kind = "training step" if point["training"] else "inference"
    return f"{kind}, BatchNorm" if point.get("normed") else kind


def compared(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Before and after as Markdown: sums over the nine blocks at every point, then each launch on every card at the
    largest batch, and on the first at every batch; of what was not counted before on the first at the largest batch."""
    pairs = [(same(before, point), point) for point in after["points"]]
    card, batch = after["points"][0]["card"], max(point["batch"] for point in after["points"])
    commits = f"{before['commit'] or 'before'} -> {after['commit'] or 'after'}"
    lines = [
        f"Counted, not measured: {commits}, nine blocks, microseconds",
        "", f"Few: the busiest of {', '.join(FEW)}.", "",
        "| card | dtype | batch | pass | floor | few before | after | busiest before | after | predicted before "
        "| after | ratio |",
        "|---" * 12 + "|",
    ]  # fmt: skip
    for old, new in pairs:
        was, now = (point and summed(point)["all"] for point in (old, new))
        place = f"{new['card']} | {new['dtype']} | {new['batch']} | {pass_of(new).replace(' step', '')}"
        units = " | ".join(f"{side[name]:.0f}" if side else "-" for name in ("few", "busiest") for side in (was, now))
        figures = f"{(was or now)['floor']:.0f} | {units} | {_span(was)} | {_span(now)}"
        ratio = f"{was['predicted'] / now['predicted']:.2f}" if was else "-"
        lines.append(f"| {place} | {figures} | {ratio} |")
    for old, new in pairs:
        places = new["card"] == card, new["batch"] == batch
        if any(places) if old else all(places):
            lines += ["", title(new), "", "| launch | floor | before | bound | after | bound |", "|---" * 6 + "|"]
            was, now = summed(old) if old else {}, summed(new)
            for name in dict.fromkeys([*was, *now]):
                cells = [cell for side in (was, now) for cell in _side(side.get(name), name)]
                floor = (was.get(name) or now[name])["floor"]
                lines.append(f"| {name} | {floor:.0f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def same(data: Mapping[str, Any], point: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The point of another file at the same place; None where it has none."""
    return next((other for other in data["points"] if place_of(other) == place_of(point)), None)


def _span(figures: Mapping[str, Any] | None) -> str:
    """Predicted, with its range where that is wide."""
    if figures is None:
        return "-"
    text = f"{figures['predicted']:.0f}"
    wide = figures["high"] - figures["low"] > 0.1 * figures["predicted"]
    return f"{text} ({figures['low']:.0f} to {figures['high']:.0f})" if wide else text


def _side(figures: Mapping[str, Any] | None, name: str) -> tuple[str, str]:
    if figures is None:
        return "-", "-"
    bound = "" if name == "all" else max(figures["bounds"], key=figures["bounds"].get)
    return f"{figures['busiest']:.0f}", bound
