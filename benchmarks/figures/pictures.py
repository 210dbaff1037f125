"""Pictures of result files: speed-up over eager, share of the floor, and the launches of a step on one time axis.

Colours are Okabe and Ito's, told apart by readers with any colour vision. Every picture is 9 inches wide, so that its
text is readable in a README's column of 900 pixels.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.cases.records import EAGER
from benchmarks.cases.timeline import KINDS, PASSES, Row, floor_timeline, kind_of, one_point, point_words
from benchmarks.figures.result_files import Measured
from inception_fused.runtime import files

BLUE, SKY, GREEN, ORANGE, VERMILLION, PURPLE = "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7"
GREY = "#888888"
SHADES = ("#08306b", "#2171b5", "#6baed6", "#b3d3ec", "#dfeaf5")
"""Of batches: small ones dark."""

KIND_COLOURS = {"convolution": BLUE, "bias, ReLU": ORANGE, "pool": GREEN, "copy, sum": PURPLE, "other": GREY}

LONGEST_LABEL = 7
"""Characters of a launch's name that is written into it; a profiler's names are longer."""

WIDTH_INCHES, DPI = 9.0, 200

BASELINE = "eager channels_last"


class Panel(NamedTuple):
    """Cases that are drawn beside each other."""

    dtype: str
    mode: str


PANELS = tuple(Panel(dtype, mode) for dtype in ("bf16", "tf32") for mode in ("forward", "training"))
SPEEDUP_WORDS = f"time of {BASELINE} over ours, per block and batch"

INK = {"convolution": "white", "bias, ReLU": "black", "pool": "white", "copy, sum": "black", "other": "white"}

FLOORS_TITLE = "Floors on an H200 by arithmetic, not measured"

FLOOR_POINT = ("4d", 128, "bf16")
"""Block, batch and dtype of the timeline that is drawn where none was measured."""


class MissingLibraryError(RuntimeError):
    """matplotlib is not installed; the message says how to get it."""


def figure(height: float) -> Any:
    """A figure of the pictures' width. Raises MissingLibraryError where matplotlib is not installed."""
    try:
        module = import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingLibraryError(
            'pictures are drawn with matplotlib, which is not installed: python -m pip install -e ".[train]"'
        ) from error
    # A Figure of its own leaves the caller's choice of window system alone.
    return module.Figure(figsize=(WIDTH_INCHES, height), dpi=DPI, layout="constrained")


def save(drawn: Any, path: Path) -> None:
    """Writes a figure as PNG, whole or not at all. Without a date in it, so that equal pictures are equal files."""
    content = io.BytesIO()
    drawn.savefig(content, format="png", metadata={"Software": None})
    files.write(path, content.getvalue())


def draw(files: Sequence[Measured], folder: Path) -> list[str]:
    """Draws what result files hold into a folder as speedup.png, floors.png and timeline.png.

    Returns for each of the three its Markdown, or a sentence why it was not drawn. Raises MissingLibraryError without
    matplotlib.
    """
    return [_speedups_of(files, folder), _floor_shares_of(files, folder), _timeline_of(files, folder)]


def _speedups_of(files: Sequence[Measured], folder: Path) -> str:
    for measured in files:
        if speedups(measured, folder / "speedup.png"):
            return f"![{SPEEDUP_WORDS}](speedup.png)"
    return "Speed-up over eager: not drawn, no GPU timed anything both with our block and in eager PyTorch."


def _floor_shares_of(files: Sequence[Measured], folder: Path) -> str:
    reason = "no launch of ours was timed by itself (gpu_check's stage kernels), and a floor alone is no share"
    for measured in files:
        title = f"Share of the floor that each launch reaches, in percent, summed over the blocks\n{measured.short}"
        if floor_shares(measured.launches, title, folder / "floors.png"):
            return "![floor over time of each launch](floors.png)"
    return f"Share of the floor: not drawn, {reason}."


def _timeline_of(files: Sequence[Measured], folder: Path) -> str:
    path = folder / "timeline.png"
    for measured in files:
        if measured.timeline:
            rows = one_point(measured.timeline)
            timeline(rows, f"{point_words(rows)}, measured\n{measured.short}", path)
            return "![the launches of a training step, eager's and ours, measured](timeline.png)"
    rows = floor_timeline(*FLOOR_POINT)
    timeline(rows, f"{FLOORS_TITLE}\n{point_words(rows)}", path)
    return "![the launches of a training step, eager's and ours: floors by arithmetic, not measured](timeline.png)"


def speedup_panels(measured: Measured) -> dict[Panel, dict[tuple[str, int], float]]:
    """Eager's time over ours of the blocks at 224x224, by panel, and in it by (block, batch); none without a GPU."""
    found: dict[Panel, dict[tuple[str, int], float]] = {}
    for panel in PANELS:
        for case in measured.cases:
            ratio = case.ratio("ours", EAGER)
            here = (case.dtype, case.mode) == panel and case.suite == "block" and case.image == 224
            if here and ratio is not None:
                found.setdefault(panel, {})[case.subject, case.batch] = ratio
    return found


def speedups(measured: Measured, path: Path) -> bool:
    """Eager's time over ours, one panel per dtype and mode. Returns whether there was anything to draw; no
    file is written otherwise."""
    panels = speedup_panels(measured)
    if not panels:
        return False
    drawn = figure(0.9 + 2.1 * len(panels))
    drawn.suptitle(f"{SPEEDUP_WORDS.capitalize()}\n{measured.short}", fontsize=11)
    for axes, (panel, ratios) in zip(drawn.subplots(len(panels), 1, squeeze=False)[:, 0], panels.items(), strict=True):
        _bars_from_one(axes, ratios)
        axes.set_title(f"{panel.dtype}, {panel.mode}", loc="left", fontsize=10)
    save(drawn, path)
    return True


def _bars_from_one(axes: Any, ratios: Mapping[tuple[str, int], float]) -> None:
    """Bars upwards from a line at 1, or downwards in another colour, hatched, on a logarithmic axis."""
    subjects = sorted({subject for subject, _ in ratios})
    batches = sorted({batch for _, batch in ratios})
    width = 0.84 / len(batches)
    for index, batch in enumerate(batches):
        for place, subject in enumerate(subjects):
            if (subject, batch) not in ratios:
                continue
            ratio, at = ratios[subject, batch], place - 0.42 + width * (index + 0.5)
            slow = ratio < 1
            axes.bar(
                at, ratio - 1, width * 0.92, bottom=1, linewidth=0.4, edgecolor="black",
                color=VERMILLION if slow else _shade(index, len(batches)), hatch="////" if slow else "",
            )  # fmt: skip
            axes.annotate(
                f"{ratio:.2f}" if width > 0.35 else f"{ratio:.1f}", (at, ratio), (0, -2 if slow else 2), ha="center",
                textcoords="offset points", va="top" if slow else "bottom", fontsize=7 if width > 0.2 else 6,
            )  # fmt: skip
    low, high = min(1.0, *ratios.values()), max(1.0, *ratios.values())
    axes.set_yscale("log", base=2)
    axes.axhline(1, color="black", linewidth=1.2)
    # Room below for a bar's figure, above for the legend as well.
    axes.set_ylim(low / (1.35 if low < 1 else 1.06), max(high, 1.2) * (high / low) ** 0.12 * 1.5)
    ticks = [tick for tick in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 4, 6, 8, 12, 16) if low / 1.2 <= tick <= high * 1.3]
    axes.set_yticks(ticks, [f"{tick:g}x" for tick in ticks], minor=False)
    axes.minorticks_off()
    axes.set_xticks(range(len(subjects)), subjects)
    axes.set_xlim(-0.6, len(subjects) - 0.4)
    axes.set_ylabel(f"times faster than\n{BASELINE}", fontsize=8)
    _plain(axes)
    names = [(_shade(index, len(batches)), f"batch {batch}", "") for index, batch in enumerate(batches)]
    if any(ratio < 1 for ratio in ratios.values()):
        names.append((VERMILLION, f"slower than {BASELINE}", "////"))
    _legend(axes, names)


def _shade(index: int, count: int) -> str:
    return SHADES[min(index, len(SHADES) - 1)] if count > 1 else BLUE


def floor_panels(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[tuple[str, int], tuple[float, float]]]:
    """(floor, time), summed over the blocks, by dtype, and in it by (launch, batch); rows: gpu_check's of launches.

    A launch without a measured time, or without a floor, is left out.
    """
    sums: dict[str, dict[tuple[str, int], tuple[float, float]]] = {}
    for row in rows:
        if "us" in row and row.get("floor_us"):
            name = f"{row['kernel']} bwd" if row["kernel"] == "pack" else row["kernel"]
            panel = sums.setdefault(row["dtype"], {})
            floor, us = panel.get((name, row["batch"]), (0.0, 0.0))
            panel[name, row["batch"]] = floor + row["floor_us"], us + row["us"]
    return sums


def floor_shares(rows: Sequence[Mapping[str, Any]], title: str, path: Path) -> bool:
    """Floor over time of every launch, one panel per dtype, one bar per batch.

    rows: gpu_check's of launches. Returns whether any had a time and a floor; no file is written otherwise.
    """
    sums = floor_panels(rows)
    if not sums:
        return False
    drawn = figure(0.9 + 2.2 * len(sums))
    drawn.suptitle(title, fontsize=11)
    for axes, (dtype, panel) in zip(drawn.subplots(len(sums), 1, squeeze=False)[:, 0], sums.items(), strict=True):
        names = list(dict.fromkeys(name for name, _ in panel))
        batches = sorted({batch for _, batch in panel})
        width = 0.84 / len(batches)
        for (name, batch), (floor, us) in panel.items():
            index = batches.index(batch)
            at, share = names.index(name) - 0.42 + width * (index + 0.5), floor / us
            axes.bar(at, share, width * 0.92, color=_shade(index, len(batches)), linewidth=0.4, edgecolor="black")
            axes.annotate(f"{share:.0%}"[:-1], (at, share), (0, 2), ha="center", textcoords="offset points", fontsize=6)
        axes.axhline(1, color="black", linewidth=1.2)
        axes.set_ylim(0, max(1.0, *(floor / us for floor, us in panel.values())) * 1.3)
        axes.set_yticks([0, 0.25, 0.5, 0.75, 1], ["0", "25%", "50%", "75%", "floor"])
        axes.set_xticks(range(len(names)), names)
        axes.set_xlim(-0.6, len(names) - 0.4)
        axes.set_ylabel("floor / time", fontsize=8)
        axes.set_title(dtype, loc="left", fontsize=10)
        _plain(axes)
        _legend(axes, [(_shade(index, len(batches)), f"batch {batch}", "") for index, batch in enumerate(batches)])
    save(drawn, path)
    return True


def timeline(rows: Sequence[Row], title: str, path: Path) -> None:
    """The launches of a training step, eager's above ours, on one time axis; the backward follows the forward."""
    drawn = figure(3.6)
    drawn.suptitle(title, fontsize=11)
    axes = drawn.subplots()
    names = {"eager": "eager\nchannels_last", "ours": "fused"}
    ends, kinds = [], []
    span = max(sum(_ends(rows, name).values()) for name in names)
    for level, implementation in enumerate(names):
        begin = 0.0
        for direction in PASSES:
            chosen = [r for r in rows if r["implementation"] == implementation and r["pass"] == direction]
            if not chosen:
                continue
            for row in chosen:
                kinds.append(kind_of(row))
                axes.barh(
                    level, row["us"], left=begin + row["start_us"], height=0.5, color=KIND_COLOURS[kinds[-1]],
                    edgecolor="white", linewidth=0.5,
                )  # fmt: skip
                if len(row["name"]) <= LONGEST_LABEL and row["us"] > (0.011 + 0.006 * len(row["name"])) * span:
                    at = begin + row["start_us"] + row["us"] / 2
                    axes.annotate(row["name"], (at, level), ha="center", va="center", fontsize=7, color=INK[kinds[-1]])
            end = begin + _ends(rows, implementation)[direction]
            _bracket(axes, begin, end, level, direction, f"{direction}: {len(chosen)} launches, {end - begin:.0f} us")
            begin = end
        ends.append(begin)
    for row_end, level in zip(ends, range(len(names)), strict=True):
        axes.annotate(
            f"{row_end:.0f} us", (row_end, level), (4, 0), textcoords="offset points", va="center", fontsize=9
        )
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlim(0, max(ends) * 1.1 or 1)
    axes.set_yticks(range(len(names)), list(names.values()))
    axes.set_xlabel("microseconds on the device", fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    shown = [kind for kind in (*KINDS, "other") if kind in kinds]
    handles = [import_module("matplotlib.patches").Patch(color=KIND_COLOURS[kind], label=kind) for kind in shown]
    drawn.legend(handles=handles, loc="outside lower center", ncols=len(handles), fontsize=9, frameon=False)
    save(drawn, path)


def _ends(rows: Sequence[Row], implementation: str) -> dict[str, float]:
    """Microseconds of each pass, from its first kernel's start to its last one's end."""
    ends = dict.fromkeys(PASSES, 0.0)
    for row in rows:
        if row["implementation"] == implementation:
            ends[row["pass"]] = max(ends[row["pass"]], row["start_us"] + row["us"])
    return ends


def _bracket(axes: Any, begin: float, end: float, level: int, direction: str, text: str) -> None:
    """A line beside a pass with its name: above the forward, below the backward, so that short ones do not collide."""
    side = -1 if direction == "forward" else 1
    y, tick = level + side * 0.31, level + side * 0.27
    axes.plot([begin, begin, end, end], [tick, y, y, tick], color="black", linewidth=0.9)
    place = "bottom" if side < 0 else "top"
    axes.annotate(text, (begin, y), (1, -3 * side), textcoords="offset points", ha="left", va=place, fontsize=8)


def _plain(axes: Any) -> None:
    axes.tick_params(labelsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(axes: Any, names: Sequence[tuple[str, str, str]]) -> None:
    patch = import_module("matplotlib.patches").Patch
    handles = [patch(facecolor=c, edgecolor="black", linewidth=0.4, hatch=h, label=label) for c, label, h in names]
    axes.legend(handles=handles, loc="upper right", ncols=len(handles), fontsize=8, frameon=False)
