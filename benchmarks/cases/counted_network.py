"""Counted, not measured: GoogLeNet part by part, eager's floors beside what the forecast says of ours.

The network is the one that benchmarks time, of grey images and 10 classes, at 224x224 and at the 96x96 of the
original's training. What PyTorch computes is taken at its floor, a bound, and what ours compute at its forecast: a sum
of both is too low by what PyTorch's kernels need beyond their floors.

JSON of :func:`collect`, times in microseconds:

    schema, what, commit, counts, cards   as in cases/counted.py
    forms                          what is fused, by name: kinds of parts (plan/network.py)
    columns                        names of what a part's list holds: COLUMNS
    points                         a list: card, dtype, batch, image, training, parts, sums

A part: its name, stage and kind, how many kernels eager makes of it and their floor; how many launches ours are, their
floor, their busiest units, predicted with low and high; null where there are none. sums: by form, "eager" the first, of
the whole network ("all"), of the stem, and of what PyTorch computes of the stem: the floors ("floor"), and the floors
of PyTorch's parts with the "busiest", "predicted", "low" or "high" of ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

from benchmarks.cases import baselines
from benchmarks.cases.counted import BATCHES, CARD_NAMES, DTYPES, head, pass_of
from benchmarks.cases.suite import meta_subject
from inception_fused.plan import counts
from inception_fused.plan.cards import CARDS
from inception_fused.plan.counts import Counts
from inception_fused.plan.forecast import Forecast
from inception_fused.plan.network import FORMS, Estimate, busiest, estimates, parts_of, stem_share, summed

FILE = "network.json"
"""Its name in the folder of counted results."""

NETWORK = "googlenet"
IMAGES = (224, 96)
EAGER = "eager"

FIGURES: Mapping[str, Callable[[Forecast], float]] = {
    "floor": attrgetter("floor"),
    "busiest": busiest,
    **{name: attrgetter(name) for name in ("predicted", "low", "high")},
}
PLACE = ("card", "dtype", "batch", "image", "pass")
COLUMNS = ("part", "stage", "kind", "kernels", "eager", "launches", *FIGURES)


def collect(known: Counts | None = None, commit: str = "", cards: Sequence[str] = CARD_NAMES) -> dict[str, Any]:
    """Every part at every point. known: counts; None for the package's. commit: of the kernels and the plan."""
    known = known or counts.shipped()
    points = []
    for image, dtype, batch in itertools.product(IMAGES, DTYPES, BATCHES):
        torch_dtype = baselines.DTYPES[dtype]
        parts = parts_of(*(tensors.to(torch_dtype) for tensors in meta_subject(NETWORK, image, batch)))
        for card, training in itertools.product(cards, (False, True)):
            options = dict(precision=dtype, training=training, known=known)
            by_form = {
                form: estimates(parts, torch_dtype, CARDS[card], fused=fused, **options)
                for form, fused in {EAGER: (), **FORMS}.items()
            }
            place = dict(card=card, dtype=dtype, batch=batch, image=image, training=training)
            *_, fullest = by_form.values()
            sums = {form: _sums(found) for form, found in by_form.items()}
            points.append(place | {"parts": list(map(_row, fullest)), "sums": sums})
    order = (cards, DTYPES, BATCHES, IMAGES)
    points.sort(key=lambda point: [some.index(value) for some, value in zip(order, point.values(), strict=False)])
    what = "GoogLeNet, microseconds counted from machine code, and PyTorch's parts at their floors; not measured"
    forms = {form: list(kinds) for form, kinds in FORMS.items()}
    return head(what, known, commit, cards) | {"forms": forms, "columns": list(COLUMNS), "points": points}


def _us(seconds: float) -> float:
    return round(1e6 * seconds, 2)


def _row(estimate: Estimate) -> list[Any]:
    part, launches = estimate.part, len(estimate.launches) or None
    ours = [_us(estimate.seconds(of)) if launches else None for of in FIGURES.values()]
    return [part.name, part.stage, part.kind, estimate.kernels, _us(estimate.floor), launches, *ours]


def _sums(found: Sequence[Estimate]) -> dict[str, dict[str, float]]:
    sums: dict[str, dict[str, float]] = {"all": {}, "stem": {}, "PyTorch's of the stem": {}}
    for figure, of in FIGURES.items():
        whole, shares = summed(found, of), (1.0, *stem_share(found, of))
        for into, share in zip(sums.values(), shares, strict=True):
            into[figure] = _us(whole * share)
    return sums


def cell(sums: Mapping[str, Mapping[str, float]], batch: int) -> str:
    """Busiest units with PyTorch's floors; at batch 1, where single warps are waited for, the range with launches."""
    figures = sums["all"]
    if batch == 1 and figures["high"] > figures["low"]:
        return f"{figures['low']:.0f} to {figures['high']:.0f}"
    return f"{figures['busiest']:.0f}"


def share(sums: Mapping[str, Mapping[str, float]]) -> str:
    """The stem's."""
    return f"{sums['stem']['busiest'] / sums['all']['busiest']:.0%}"


def header(data: Mapping[str, Any]) -> tuple[str, ...]:
    """Of :func:`row`."""
    return (*PLACE, "eager's floor", *data["forms"])


def row(point: Mapping[str, Any]) -> tuple[str, ...]:
    """A point's sums, and in brackets the stem's share of each. At batch 1 floors without launches are no share of a
    forecast that launches and latency decide."""
    batch = point["batch"]
    place = (point["card"], point["dtype"], str(batch), f"{point['image']}x{point['image']}", pass_of(point))
    shares = [f" ({share(sums)})" if batch > 1 else "" for sums in point["sums"].values()]
    return (*place, *(cell(sums, batch) + stem for sums, stem in zip(point["sums"].values(), shares, strict=True)))


def table(point: Mapping[str, Any]) -> str:
    """One point as Markdown: a line a part, then the sums."""
    names = ("part", "kernels", "eager's floor", "launches", "floor", "busiest", "predicted", "range")
    lines = [f"| {' | '.join(names)} |", "|---" * len(names) + "|"]
    for values in point["parts"]:
        found = dict(zip(COLUMNS, values, strict=True))
        ours = ["by PyTorch", "-", "-", "-", "-"]
        if found["launches"]:
            ours = [str(found["launches"]), *_figures(found, 1)]
        lines.append(f"| {found['part']} | {found['kernels']} | {found['eager']:.1f} | {' | '.join(ours)} |")
    for form, sums in point["sums"].items():
        for what, figures in sums.items():
            lines.append(f"| {form}: {what} | | | | {' | '.join(_figures(figures, 0))} |")
    return "\n".join(lines)


def _figures(found: Mapping[str, float], digits: int) -> tuple[str, ...]:
    """Floor, busiest, predicted, and its range where there is one."""
    low, high = (f"{found[name]:.{digits}f}" for name in ("low", "high"))
    spread = f"{low} to {high}" if low != high else "-"
    return (*(f"{found[name]:.{digits}f}" for name in ("floor", "busiest", "predicted")), spread)


def title(point: Mapping[str, Any]) -> str:
    place = f"GoogLeNet at {point['image']}x{point['image']}, {point['card']}, {point['dtype']}, batch {point['batch']}"
    return f"{place}, {pass_of(point)}, microseconds counted, not measured; PyTorch's parts at their floors"


def report(data: Mapping[str, Any]) -> str:
    """The sums at every point as Markdown, then each part on the first card at the largest batch."""
    card, largest = data["points"][0]["card"], max(point["batch"] for point in data["points"])
    names = header(data)
    lines = [
        f"GoogLeNet, counted, not measured, commit {data['commit'] or 'not given'}, microseconds. {WORDS}",
        "", f"| {' | '.join(names)} |", "|---" * len(names) + "|",
        *(f"| {' | '.join(row(point))} |" for point in data["points"]),
    ]  # fmt: skip
    for point in data["points"]:
        if (point["card"], point["batch"]) == (card, largest):
            lines += ["", title(point), "", table(point)]
    return "\n".join(lines)


WORDS = (
    "In brackets is the share of the stem, b1 and b2. blocks fused: the stem by PyTorch; stem too: b2's 1x1 and 3x3 by "
    "ours; pools too: the four max-pools of stride 2 by ours, the first with the bias and the ReLU of the 7x7, which "
    "alone of the stem is PyTorch's then. PyTorch's parts stand at their floors, a bound by FLOP and bytes of its "
    "kernels without their launches; ours at their busiest units, at batch 1 as a range with launches. A sum of both "
    "is too low by what PyTorch's kernels need beyond their floors, and so is the stem's share where it is PyTorch's."
)
"""What the figures of a row are."""
