"""A picture of the whole network: eager's floors, then what is fused at its forecast, as bars of the network's parts.

Hatched is a floor, a bound that nothing beats; plain is a forecast, counted in the machine code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from benchmarks.cases.counted import pass_of
from benchmarks.cases.counted_network import COLUMNS, EAGER, IMAGES
from benchmarks.figures.pictures import BLUE, GREEN, GREY, ORANGE, SKY, figure, save
from inception_fused.plan.network import BLOCK, CONVOLUTION, POOL, STEM

POINT = {"card": "H200", "dtype": "bf16", "batch": 128}

KINDS = {
    "7x7": (ORANGE, lambda part: part["kind"] == CONVOLUTION),
    "its bias and ReLU, max-pools": (GREEN, lambda part: part["kind"] == POOL),
    "stem's 1x1 and 3x3": (SKY, lambda part: part["kind"] == STEM),
    "nine blocks": (BLUE, lambda part: part["kind"] == BLOCK),
    "head": (GREY, lambda part: True),
}
"""Colour of each kind of part, which is the first that it is, in the order of a bar."""

HATCH = "///"
WORDS = "GoogLeNet part by part: eager's floors, and what is fused as its forecast"


def draw_network(data: Mapping[str, Any], path: Path) -> None:
    """A panel for each size of image and pass, a bar for eager and for each form of the network.

    data: as counted_network.collect() gives it. Raises MissingLibraryError without matplotlib.
    """
    points = [point for point in data["points"] if all(point[name] == value for name, value in POINT.items())]
    drawn = figure(2.0 + 0.55 * len(IMAGES) * (1 + len(data["forms"])))
    at = f"{POINT['card']}, {POINT['dtype']}, batch {POINT['batch']}"
    drawn.suptitle(f"{WORDS}\n{at}; counted, not measured", fontsize=11)
    grid = drawn.subplots(len(IMAGES), 2, squeeze=False)
    for point in points:
        axes = grid[IMAGES.index(point["image"])][int(point["training"])]
        _panel(axes, bars_of(point, data["forms"]))
        axes.set_title(f"{point['image']}x{point['image']}, {pass_of(point)}", loc="left", fontsize=10)
        if point["training"]:
            axes.set_yticklabels([])
    patch = import_module("matplotlib.patches").Patch
    handles = [patch(facecolor=colour, label=kind) for kind, (colour, _) in KINDS.items()]
    handles.append(patch(facecolor="white", edgecolor="black", hatch=HATCH, label="a floor"))
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=8, frameon=False)
    save(drawn, path)


def bars_of(point: Mapping[str, Any], forms: Mapping[str, Sequence[str]]) -> dict[str, dict[str, tuple[float, bool]]]:
    """By form, "eager" the first, and in it by kind: (microseconds, whether it is fused)."""
    bars: dict[str, dict[str, tuple[float, bool]]] = {}
    for form, fused in {EAGER: (), **forms}.items():
        bar = bars[form] = dict.fromkeys(KINDS, (0.0, False))
        for values in point["parts"]:
            part = dict(zip(COLUMNS, values, strict=True))
            kind, ours = next(name for name, (_, fits) in KINDS.items() if fits(part)), part["kind"] in fused
            bar[kind] = bar[kind][0] + part["busiest" if ours else "eager"], ours
    return bars


def _panel(axes: Any, bars: Mapping[str, Mapping[str, tuple[float, bool]]]) -> None:
    longest = max(sum(us for us, _ in bar.values()) for bar in bars.values())
    for level, bar in enumerate(bars.values()):
        left = 0.0
        for (us, fused), (colour, _) in zip(bar.values(), KINDS.values(), strict=True):
            axes.barh(
                level, us, left=left, height=0.62, color=colour, hatch="" if fused else HATCH, edgecolor="white",
                linewidth=0.5,
            )  # fmt: skip
            if us > 0.05 * longest:
                box = {"boxstyle": "square,pad=0.15", "facecolor": "white", "edgecolor": "none", "alpha": 0.85}
                axes.annotate(f"{us:.0f}", (left + us / 2, level), ha="center", va="center", fontsize=7, bbox=box)
            left += us
        axes.annotate(f"{left:.0f}", (left, level), (3, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set_ylim(len(bars) - 0.5, -0.5)
    axes.set_xlim(0, longest * 1.13)
    axes.set_yticks(range(len(bars)), list(bars))
    axes.set_xlabel("microseconds", fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
