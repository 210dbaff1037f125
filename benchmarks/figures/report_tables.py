"""Markdown tables of result files: every case, sums over the blocks, goals, public yardsticks, slower points.

Ratios are eager's or the compiled time over ours: above 1 ours is faster. They never mix two files.
"""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.cases.records import COMPILE, EAGER, OURS_BLOCKS, OWN_BLOCKS
from benchmarks.figures.goals import SCENARIOS, YARDSTICKS, Bar, Outcome, Scenario, evaluate
from benchmarks.figures.gpu_report import (
    OWN_TITLES,
    WEIGHTS,
    forms_table,
    kernel_table,
    own_blocks,
    routes_table,
    stage_table,
)
from benchmarks.figures.gpu_report import _table as markdown_table
from benchmarks.figures.result_files import Case, Measured

MEBIBYTE = 2**20


def number(value: float | None, digits: int = 1) -> str:
    """A cell; empty for None, without decimals from a thousand on."""
    return "" if value is None else f"{value:.{digits if abs(value) < 1000 else 0}f}"


def pair(values: Sequence[float | None], digits: int = 0) -> str:
    """ "4 / 20"; "-" for one that is not there, empty where none is."""
    if all(value is None for value in values):
        return ""
    return " / ".join("-" if value is None else f"{value:.{digits}f}" for value in values)


def case_table(measured: Measured) -> str:
    """One row per case of a file. The compiled time is that of its fastest mode, which the row names."""
    rows = []
    for case in measured.cases:
        mode, compiled = case.best(COMPILE)
        ours, eager = case.by.get("ours"), case.by.get(EAGER)
        word = (mode or "").removeprefix("compile").strip("_").replace("_", "-")
        both = (ours, eager)
        spread = max((record.spread for record in both if record), default=None)
        rows.append(
            (
                case.suite, case.name, number(case.us("ours")),
                pair([case.us("ours_graph"), case.us("eager_graph")], 1), number(case.us(EAGER)),
                number(case.us("eager_nchw")), number(compiled) + (f" ({word})" if word else ""),
                number(case.ratio("ours", EAGER), 2), number(case.ratio("ours", COMPILE), 2),
                number(ours.x_floor if ours else None, 2), number(spread and spread * 100),
                pair([record and record.launches for record in both]),
                pair([record.peak_bytes / MEBIBYTE if record and record.peak_bytes else None for record in both]),
                pair([record and record.host_us for record in both]),
            )
        )  # fmt: skip
    header = (
        "suite", "case", "ours us", "in a graph: ours / eager", "eager us", "eager NCHW", "best compile us", "x eager",
        "x compile", "x floor", "spread %", "launches ours / eager (channels_last weights)", "peak MiB", "host us",
    )  # fmt: skip
    return markdown_table(header, rows)


def sums_table(cases: Sequence[Case]) -> str:
    """Sums over the blocks that have both ours and eager, other subjects by themselves; compile's where all have it."""
    groups: dict[tuple[object, ...], list[Case]] = {}
    for case in cases:
        if case.ratio("ours", EAGER) is not None:
            subject = None if case.suite in ("block", *OWN_BLOCKS) else f"{case.suite} {case.subject}"
            form = f" of {case.suite}" if case.suite in OWN_BLOCKS else ""
            groups.setdefault((subject, form, case.image, case.dtype, case.batch, case.mode), []).append(case)
    rows = []
    for (subject, form, image, dtype, batch, mode), group in groups.items():
        us = [total([case.us(name) for case in group]) for name in ("ours", OURS_BLOCKS, EAGER, "eager_nchw")]
        compiled = total([case.best(COMPILE)[1] for case in group])
        ours, _, eager, _ = us
        what = subject or (f"{len(group)} blocks{form}" if len(group) > 1 else f"block {group[0].label}")
        rows.append(
            (
                what, f"{image}x{image}" if image else "", dtype, batch, mode, *map(number, us),
                number(compiled), number(eager / ours, 2), number(compiled / ours if compiled else None, 2),
                number(min(case.ratio("ours", EAGER) for case in group), 2),
            )
        )  # fmt: skip
    header = (
        "what", "image", "dtype", "batch", "pass", "ours us", "ours, stem eager us", "eager us", "eager NCHW us",
        "best compile us", "x eager", "x compile", "worst x eager",
    )  # fmt: skip
    filled = [i for i in range(len(header)) if any(str(row[i]) for row in rows)]
    return markdown_table([header[i] for i in filled], [[row[i] for i in filled] for row in rows])


def total(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values)


def goal_outcome(scenario: Scenario, files: Sequence[Measured]) -> tuple[Outcome, Measured | None]:
    """A scenario in the first of the files that has all of it, and that file. Files without a GPU have no say."""
    outcomes = [(evaluate(scenario, measured.cases), measured) for measured in files if measured.gpu]
    whole = [found for found in outcomes if found[0].us is not None]
    partial = [found for found in outcomes if found[0].missing != "not measured"]
    return (whole or partial or [(Outcome(None, missing="not measured"), None)])[0]


def goals_table(files: Sequence[Measured]) -> str:
    """Every scenario with gate and moonshot beside what was measured; "open" where a figure that decides is missing."""
    rows = []
    for scenario in SCENARIOS:
        outcome, _ = goal_outcome(scenario, files)
        rows.append(
            (
                scenario.name, outcome_words(outcome), bar_words(scenario.gate), verdict(outcome, scenario.gate),
                bar_words(scenario.moonshot), verdict(outcome, scenario.moonshot),
            )
        )  # fmt: skip
    header = ("scenario", "measured: x eager / x compile", "gate", "gate is", "moonshot", "moonshot is")
    return markdown_table(header, rows)


def outcome_words(outcome: Outcome) -> str:
    if outcome.us is None:
        return outcome.missing
    ratios = [value / outcome.us if value else None for value in (outcome.eager, outcome.compile)]
    floor = f", {outcome.us / outcome.floor:.2f} x floor" if outcome.floor else ""
    return f"{pair(ratios, 2) or '- / -'}{floor}, {outcome.us:.0f} us"


def bar_words(bar: Bar) -> str:
    """As :func:`outcome_words`."""
    floor = "" if bar.floor is None else f", {bar.floor:g} x floor"
    us = "" if bar.us is None else f", {bar.us:.0f} us"
    return f"{bar.eager:g} / {bar.compile:g}{floor}{us}"


def verdict(outcome: Outcome, bar: Bar) -> str:
    """Reached if every figure of the bar is; else which are missed, or which are still open."""
    if outcome.us is None:
        return "not measured"
    held = outcome.against(bar)
    for word, answer in (("missed", False), ("open", None)):
        names = [name for name, reached in held.items() if reached is answer]
        if names:
            return f"{word}: {', '.join(names)}"
    return "reached"


def yardsticks_table(files: Sequence[Measured]) -> str:
    """KernelBench's problems in milliseconds: public times, then every measured case of the problem at batch 10."""
    rows: list[Sequence[object]] = []
    for stick in YARDSTICKS:
        for card, (eager, compiled) in stick.milliseconds.items():
            rows.append((stick.name, f"{card}, public", number(eager, 2), number(compiled, 2), "", "", ""))
        found = [(measured, case) for measured in files if measured.gpu for case in measured.cases]
        for measured, case in found:
            if case.suite == stick.suite and case.mode == "forward":
                eager, ours = case.us(EAGER), case.us("ours")
                compiled = case.best(COMPILE)[1]
                cells = [number(us / 1e3 if us else None, 2) for us in (eager, compiled, ours)]
                ratios = (number(case.ratio("ours", name), 2) for name in (EAGER, COMPILE))
                rows.append((stick.name, f"{measured.gpu}, {case.dtype}, batch {case.batch}", *cells, *ratios))
        if not any(case.suite == stick.suite and case.mode == "forward" for _, case in found):
            rows.append((stick.name, "here", "not measured", "", "", "", ""))
    header = ("KernelBench level 3", "where", "eager ms", "best compile ms", "ours ms", "x eager", "x compile")
    return markdown_table(header, rows)


def slower_points(measured: Measured) -> list[str]:
    """One line for each case of a file in which ours, by launches or in a graph, is slower than eager channels_last."""
    lines = []
    for case in measured.cases:
        for name in ("ours", "ours_graph"):
            ratio = case.ratio(name, EAGER)
            if ratio is not None and ratio < 1:
                spread = max(case.by[name].spread or 0, case.by[EAGER].spread or 0)
                noise = f", within the spread of {spread:.1%}" if 1 / ratio - 1 <= spread else ""
                lines.append(
                    f"{case.suite} {case.name}, {name}: {ratio:.2f} x eager "
                    f"({case.us(name):.1f} us, eager {case.us('eager'):.1f} us{noise})"
                )
    return lines


def gpu_check_tables(measured: Measured) -> list[str]:
    """gpu_check's own: stages, launches against floors, a compiled kernel's two forms; none for a file of the suite."""
    if measured.kind != "gpu_check":
        return []
    results = measured.results
    kernels = [kernel_table(results, direction, sums_only=True) for direction in ("forward", "backward")]
    words = WEIGHTS if any(kernels) else ""
    found = [
        stage_table(results),
        words,
        *kernels,
        *(own_blocks(results, stage, compact=True) for stage in OWN_TITLES),
        forms_table(results),
        routes_table(results),
    ]
    return [text for text in found if text]
