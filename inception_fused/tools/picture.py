"""A :class:`Verification` as a picture: errors over their bounds, launches, memory and time, block by block."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inception_fused.errors import InceptionInputError
from inception_fused.tools.measuring import Costs, Pair
from inception_fused.tools.report import figure_of, launches_words, memory_unit, short, verdict, versions_line

if TYPE_CHECKING:
    from inception_fused.tools.verification import BlockReport, Verification

FUSED, EAGER, BAD = ("#1f5fa8", "#9cc3ec"), ("#c8650a", "#f7c28b"), "#c00000"
"""Dark and light: fused is blue and eager orange in all four parts, the forward dark and the backward light."""

SMALLEST = 1e-4
"""Errors over bounds are drawn from here on; an error may be exactly 0."""

WIDTH = 0.38
"""Of a bar; blocks are 1 apart."""


def check_picture(path: Path) -> None:
    """Raise InceptionInputError unless matplotlib is there and can write a file of path's suffix."""
    try:
        backends = import_module("matplotlib.backend_bases")
    except ImportError as error:
        raise InceptionInputError(
            f"picture: {path.name} is drawn with matplotlib, which is not installed: python -m pip install matplotlib"
        ) from error
    known = backends.FigureCanvasBase.get_supported_filetypes()
    if path.suffix.lower().removeprefix(".") not in known:
        raise InceptionInputError(
            f"picture: got {path.name!r}, wants a file name ending in one of .{', .'.join(known)}"
        )
    if not path.absolute().parent.is_dir():
        raise InceptionInputError(f"picture: got {str(path)!r}, wants a file in a folder that exists")


def draw(result: Verification, path: Path) -> None:
    """Draw the blocks that were checked into a file; where none was, the picture says so."""
    check_picture(path)
    rows = [row for row in result.rows if row.checked]
    # A Figure of its own leaves the caller's choice of window system alone.
    figure = import_module("matplotlib.figure").Figure(
        figsize=(min(max(13.0, 3 + 1.1 * len(rows)), 40), 9.5), dpi=120, layout="constrained"
    )
    figure.suptitle(
        f"Inception blocks, fused beside eager: {result.device}, {result.dtypes}, backend {result.backend}\n"
        f"{versions_line(result)}; {_paths(rows)}",
        fontsize=12,
    )
    words = textwrap.shorten(verdict(result), 260, placeholder=" ...")
    figure.supxlabel(textwrap.fill(words, 130), fontsize=11, color="black" if result.ok else BAD, fontweight="bold")
    if rows:
        (errors, launches), (memory, clock) = figure.subplots(2, 2)
        _errors(errors, rows)
        _launches(launches, rows)
        _memory(memory, rows)
        _time(clock, rows)
        for axes in (errors, launches, memory, clock):
            axes.set_xticks(range(len(rows)), [short(row.name) for row in rows])
            if max(len(short(row.name)) for row in rows) * len(rows) > 60:
                axes.tick_params(axis="x", labelrotation=40)
            axes.set_xlim(-0.6, len(rows) - 0.4)
            axes.grid(axis="y", alpha=0.3)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


PATHS = {"kernels": "kernels ran", "interpreted": "kernels ran interpreted on the CPU", "eager": "no kernel ran"}


def _paths(rows: list[BlockReport]) -> str:
    words = [PATHS[row.path] for row in rows]
    counts = {word: words.count(word) for word in words}
    if len(counts) < 2:
        return "".join(counts) or "nothing was checked"
    return ", ".join(f"{word} ({number} of {len(rows)} blocks)" for word, number in counts.items())


def _errors(axes: Any, rows: list[BlockReport]) -> None:
    """Every slice and gradient over its bound; eager's beside it, over the same bound."""
    axes.set_title("error against float64 over its bound, every slice and gradient", loc="left", fontsize=11)
    low, high = 1.0, 10.0
    for at, row in enumerate(rows):
        figures = [r.decisive for r in row.parity]
        for side, (name, colour) in ((-1, ("ratio", FUSED[0])), (1, ("eager_ratio", EAGER[0]))):
            values = [min(max(getattr(figure, name), SMALLEST), 1e4) for figure in figures]
            # A little apart, so that equal values do not hide each other.
            offsets = [at + side * (0.1 + 0.2 * i / len(values)) for i in range(len(values))]
            wrong = [not r.ok and side < 0 for r in row.parity]
            colours = [BAD if bad else colour for bad in wrong]
            axes.scatter(offsets, values, s=[44 if bad else 14 for bad in wrong], c=colours, linewidths=0)
            low, high = min(low, *values), max(high, *values)
        if not row.ok:
            bad = [r.what for r in row.parity if not r.ok]
            more = f"\n+{len(bad) - 1} more" if len(bad) > 1 else ""
            place = (at, min(row.worst.decisive.ratio, 1e4))
            axes.annotate(
                row.worst.what + more, place, (0, 9), textcoords="offset points", ha="center", fontsize=8, color=BAD
            )
    axes.axhline(1, color=BAD, linewidth=1.2)
    axes.set(yscale="log", ylabel="error / bound", ylim=(low / 2, high * (high / low) ** 0.3))
    handles = [_dot(FUSED[0], "fused"), _dot(EAGER[0], "eager"), _dot(BAD, "fused, beyond its bound")]
    line = import_module("matplotlib.lines").Line2D([], [], color=BAD, linewidth=1.2, label="bound")
    axes.legend(handles=[*(handles if not all(row.ok for row in rows) else handles[:2]), line], **_LEGEND)


def _launches(axes: Any, rows: list[BlockReport]) -> None:
    axes.set_title(f"launches: {launches_words(rows)}".replace(" (", "\n("), loc="left", fontsize=11)
    top = 0.0
    for at, row in enumerate(rows):
        forward, backward = row.costs.launches_forward, row.costs.launches_backward
        for side, number, colours in _sides():
            first = forward[number]
            second = backward[number] if backward is not None else None
            unknown = any(n is not None and n.aten is None for n in (first, second))
            height = first.total + (second.total if second else 0)
            text = f"{height}+?" if unknown else str(height)
            _stacked(axes, at + side, (first.total, second.total if second else 0), colours, text)
            top = max(top, height)
    axes.set(ylabel="launches", ylim=(0, 1.3 * top or 1))
    _pass_legend(axes, any(row.costs.launches_backward for row in rows))


def _memory(axes: Any, rows: list[BlockReport]) -> None:
    held = [row.costs.held_bytes for row in rows]
    peaks = [row.costs.peak_bytes for row in rows]
    if not any(held) and not any(peaks):
        _empty(axes, "memory", "held memory is that of a backward pass,\nwhich was left out")
        return
    title = "memory held from forward to backward, beyond parameters and x"
    axes.set_title(title if any(held) else "peak memory of a forward", loc="left", fontsize=11)
    unit, size = memory_unit(rows)
    top, handles = 0.0, []
    for at, (kept, peak) in enumerate(zip(held, peaks, strict=True)):
        for side, number, colours in _sides():
            value = kept[number] / size if kept else 0.0
            if kept:
                _stacked(axes, at + side, (value, 0), colours, figure_of(value))
            if peak:
                value = peak[number] / size
                axes.scatter(at + side, value, marker="_", s=180, color=colours[0], linewidths=2)
            top = max(top, value)
    if any(held):
        handles += [_patch(FUSED[0], "fused, held"), _patch(EAGER[0], "eager, held")]
    if any(peaks):
        handles += [_dot(FUSED[0], "fused, peak", "_"), _dot(EAGER[0], "eager, peak", "_")]
    axes.set(ylabel=unit, ylim=(0, 1.3 * top or 1))
    axes.legend(handles=handles, **_LEGEND)


def _time(axes: Any, rows: list[BlockReport]) -> None:
    figure: Callable[[Costs], Pair | None] = lambda c: c.step_us or c.forward_us  # noqa: E731
    if not any(figure(row.costs) for row in rows):
        _empty(axes, "time", "left out: that of interpreted kernels\nsays nothing of a GPU")
        return
    stepped = any(row.costs.step_us for row in rows)
    what = "forward + backward" if stepped else "forward"
    axes.set_title(f"time of {what}, above it eager's over fused", loc="left", fontsize=11)
    top = max(max(figure(row.costs)) for row in rows if figure(row.costs)) / 1e3
    for at, row in enumerate(rows):
        pair = figure(row.costs)
        if pair is None:
            continue
        for side, number, colours in _sides():
            whole, first = pair[number] / 1e3, row.costs.forward_us[number] / 1e3
            _stacked(axes, at + side, (min(first, whole), max(whole - first, 0)), colours, "")
        text = "same\npath" if row.path == "eager" else f"{pair.eager / pair.fused:.2f}x"
        axes.annotate(text, (at, max(pair) / 1e3), (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set(ylabel="ms", ylim=(0, 1.3 * top))
    _pass_legend(axes, stepped)


def _sides() -> tuple[tuple[float, int, tuple[str, str]], ...]:
    """Where a bar stands beside its block, which figure of a pair it shows, and its two colours."""
    return (-WIDTH / 2, 0, FUSED), (WIDTH / 2, 1, EAGER)


def _stacked(axes: Any, at: float, heights: tuple[float, float], colours: tuple[str, str], text: str) -> None:
    """A bar of forward and backward with its text above it."""
    axes.bar(at, heights[0], WIDTH * 0.94, color=colours[0])
    axes.bar(at, heights[1], WIDTH * 0.94, bottom=heights[0], color=colours[1])
    axes.annotate(text, (at, sum(heights)), (0, 2), textcoords="offset points", ha="center", fontsize=8)


def _pass_legend(axes: Any, backward: bool) -> None:
    names = [("fused forward", FUSED[0]), ("fused backward", FUSED[1]), ("eager forward", EAGER[0])]
    names = [*names, ("eager backward", EAGER[1])] if backward else [names[0], names[2]]
    axes.legend(handles=[_patch(colour, name) for name, colour in names], **_LEGEND)


def _empty(axes: Any, title: str, words: str) -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.text(0.5, 0.5, words, transform=axes.transAxes, ha="center", va="center", color="dimgray")
    axes.set_yticks([])


def _patch(colour: str, label: str) -> Any:
    return import_module("matplotlib.patches").Patch(color=colour, label=label)


def _dot(colour: str, label: str, marker: str = "o") -> Any:
    line = import_module("matplotlib.lines").Line2D
    return line([], [], color=colour, marker=marker, linestyle="", markersize=5 if marker == "o" else 11, label=label)


_LEGEND: dict[str, Any] = dict(loc="upper right", ncols=4, fontsize=8, frameon=False)
