"""Tables of a gpu_check run from its JSON: what happened to each stage, and every ratio that matters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.cases.records import NORMED, OWN_BLOCKS, TWO
from inception_fused.block import chains
from inception_fused.plan.launches import NAMES, table_of

Key = tuple[str, str, int, str]
"""(implementation, dtype, batch, mode)"""

STAGE_NAMES = {
    "kernels": NAMES,
    TWO: table_of(chains.DOUBLE.names).names,
    NORMED: table_of(chains.USUAL.names, normed=True).names,
}
"""The launches of each pass by the stage that times them."""

OWN_TITLES = {TWO: "Blocks of two 3x3 in branch 3:", NORMED: "Blocks with BatchNorm in training:"}
"""Stages of blocks in another form than GoogLeNet's."""

KERNEL_ORDER = [name for names in NAMES.values() for name in names]

WEIGHTS = "weights: channels_last; in the stage kernels KCRS, so that pack is one of its launches"
"""With what a run's figures were counted, as the rows' own field says."""


def summary(results: Mapping[str, Any], *, compact: bool = False) -> str:
    """Markdown: stages, ceilings, sums of blocks, kernels, what they were predicted to take, both
    forms of the compiled kernels; every point unless ``compact``."""
    parts = [_heading(results), stage_table(results)]
    times = block_times(results)
    parts += [sums_table(times), *(kernel_table(results, direction, sums_only=compact) for direction in NAMES)]
    parts += [
        forecast_table(results),
        *(own_blocks(results, stage, compact=compact) for stage in OWN_TITLES),
        forms_table(results),
        routes_table(results),
    ]
    if not compact:
        parts.append(point_table(times))
    return "\n\n".join(part for part in parts if part) + "\n"


def _heading(results: Mapping[str, Any]) -> str:
    machine = results["stages"].get("environment", {}).get("figures", {})
    names = ("gpu", "torch", "cuda", "triton", "commit", "dirty")
    lines = [", ".join(f"{name} {machine[name]}" for name in names if machine.get(name) is not None) or "no figures"]
    timed = _rows(results, ("baselines", "kernels", "native", "blocks", *OWN_BLOCKS, "compile"))
    if any("weights" in row for row in timed):
        lines.append(WEIGHTS)
    found = results["stages"].get("ceilings", {}).get("figures")
    if found:
        lines.append(
            f"measured ceilings: copy {found['bandwidth'] / 1e12:.2f} TB/s, "
            f"bf16 {found['bf16'] / 1e12:.0f} and TF32 {found['tf32'] / 1e12:.0f} TFLOP/s"
        )
    elif any("x_floor" in row for row in timed):
        lines.append("ceilings not measured in this run: floors are the reference card's")
    return "\n".join(lines)


def stage_table(results: Mapping[str, Any]) -> str:
    """Each stage's status, duration, points and first line of its error."""
    rows = []
    for name, stage in results["stages"].items():
        points = stage.get("rows", [])
        note = [f"{len(points)} rows"] if points else []
        for word, count in (
            ("failed", sum("error" in row for row in points)),
            ("skipped", sum("skipped" in row for row in points)),
            ("cut by the budget", stage.get("cut", 0)),
        ):
            note += [f"{count} {word}"] if count else []
        if stage.get("error"):
            note.append(stage["error"].strip().splitlines()[-1])
        rows.append((name, stage["status"], f"{stage.get('seconds', 0):.1f}", "; ".join(note)))
    return _table(("stage", "status", "s", "notes"), rows)


def own_blocks(results: Mapping[str, Any], stage: str, *, compact: bool = False) -> str:
    """The tables of a stage of OWN_TITLES under its heading; empty where a run has none."""
    times = block_times(results, (stage,))
    parts = [sums_table(times)]
    parts += [kernel_table(results, direction, sums_only=compact, stage=stage) for direction in NAMES]
    parts += [forecast_table(results, stage), "" if compact else point_table(times)]
    found = [part for part in parts if part]
    return "\n\n".join([OWN_TITLES[stage], *found]) if found else ""


def block_times(
    results: Mapping[str, Any], stages: Iterable[str] = ("baselines", "blocks", "compile")
) -> dict[Key, dict[str, Mapping[str, Any]]]:
    """Rows of stages that hold a block's time, by (implementation, dtype, batch, mode) and block."""
    times: dict[Key, dict[str, Mapping[str, Any]]] = {}
    for row in _rows(results, stages):
        if "us" in row and "implementation" in row:
            key = (row["implementation"], row["dtype"], row["batch"], row["mode"])
            times.setdefault(key, {})[row["block"]] = row
    return times


def sums_table(times: Mapping[Key, Mapping[str, Mapping[str, Any]]]) -> str:
    """Sums over the blocks that both eager and ours have (compile's only if it has them all); "worst" is
    the least of the blocks' ratios eager / ours, which should never be under 1."""
    rows = []
    for _, dtype, batch, mode in dict.fromkeys((None, *key[1:]) for key in times):
        eager, ours, other = (times.get((name, dtype, batch, mode), {}) for name in ("eager", "ours", "compile"))
        blocks = [block for block in eager or ours or other if all(block in by for by in (eager, ours) if by)]
        us = {name: _sum(by, blocks, "us") for name, by in (("e", eager), ("o", ours), ("c", other))}
        floor = _sum(ours or eager or other, blocks, "floor_us")
        ratios = [eager[block]["us"] / ours[block]["us"] for block in blocks if eager and ours]
        rows.append(
            (
                dtype, batch, mode, len(blocks), _number(us["e"]), _number(us["c"]), _number(us["o"]),
                _ratio(us["e"], us["o"]), _ratio(us["c"], us["o"]), _ratio(us["o"], floor),
                f"{min(ratios):.2f}" if ratios else "",
                _number(_sum(eager, blocks, "host_us")), _number(_sum(ours, blocks, "host_us")),
            )
        )  # fmt: skip
    header = (
        "dtype", "batch", "mode", "blocks", "eager us", "compile us", "ours us", "eager/ours",
        "compile/ours", "x floor", "worst", "eager host", "ours host",
    )  # fmt: skip
    return _table(header, rows)


def kernel_table(results: Mapping[str, Any], direction: str, *, sums_only: bool = False, stage: str = "kernels") -> str:
    """Microseconds and times the floor of each launch of a pass, a key of NAMES, per block and summed over them.

    stage: of STAGE_NAMES, whose rows these are."""
    kernels = launch_names(results, stage, direction)
    cases: dict[tuple[str, int], dict[str, dict[str, Mapping[str, Any]]]] = {}
    for row in _rows(results, (stage,)):
        if "us" in row and "kernel" in row and row.get("pass", "forward") == direction:
            by_block = cases.setdefault((row["dtype"], row["batch"]), {})
            by_block.setdefault(row["block"], {})[row["kernel"]] = row
    rows = []
    for (dtype, batch), by_block in cases.items():
        if not sums_only:
            for block, by_kernel in by_block.items():
                cells = [_kernel_cell([by_kernel[k]] if k in by_kernel else []) for k in kernels]
                rows.append((dtype, batch, block, *cells))
        sums = [_kernel_cell([by[k] for by in by_block.values() if k in by]) for k in kernels]
        rows.append((dtype, batch, f"sum of {len(by_block)}", *sums))
    return _table(("dtype", "batch", "block", *(f"{kernel} us (x floor)" for kernel in kernels)), rows)


def launch_names(results: Mapping[str, Any], stage: str, direction: str) -> list[str]:
    """The launches of a pass in order; two that some rows have as one, such as "K1+K2", once more before its first."""
    found = list(STAGE_NAMES[stage][direction])
    rows = [row for row in _rows(results, (stage,)) if row.get("pass", "forward") == direction]
    for pair in dict.fromkeys(row["kernel"] for row in rows if "+" in row.get("kernel", "")):
        found.insert(found.index(pair.partition("+")[0]), pair)
    return found


def forecast_table(results: Mapping[str, Any], stage: str = "kernels") -> str:
    """What is predicted of each launch with the rules' tiles, counted and not measured, beside what it took, summed
    over the blocks at the largest batch; bound: the unit that the prediction finds busiest in most of them."""
    rows = [row for row in _rows(results, (stage,)) if "us" in row and "predicted_us" in row]
    batch = max((row["batch"] for row in rows), default=0)
    cells = []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        for direction in STAGE_NAMES[stage]:
            for kernel in launch_names(results, stage, direction):
                place = (dtype, batch, direction, kernel)
                same = [row for row in rows if (row["dtype"], row["batch"], row["pass"], row["kernel"]) == place]
                if same:
                    floor, expected, us = (
                        sum(row.get(name, 0.0) for row in same) for name in ("floor_us", "predicted_us", "us")
                    )
                    bounds = [row["bound"] for row in same if "bound" in row]
                    bound = max(bounds, key=bounds.count, default="")
                    figures = (_number(floor or None), _number(expected), _number(us), _ratio(us, expected), bound)
                    cells.append((dtype, batch, f"{kernel} {direction}", len(same), *figures))
    header = (
        "dtype",
        "batch",
        "launch",
        "blocks",
        "floor us",
        "predicted us (counted)",
        "us",
        "us/predicted",
        "bound (counted)",
    )
    return _table(header, cells)


def forms_table(results: Mapping[str, Any]) -> str:
    """Compiled kernels in CUDA C++ and in Triton, and floors, in microseconds: per block at the largest batch."""
    times: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    rows = [row for row in _rows(results, ("native",)) if "us" in row]
    batch = max((row["batch"] for row in rows), default=0)
    for row in rows:
        if row["batch"] == batch:
            times.setdefault((row["kernel"], row["dtype"], row["block"]), {})[row["implementation"]] = row
    cells = []
    for (kernel, dtype, block), forms in sorted(times.items(), key=lambda item: KERNEL_ORDER.index(item[0][0])):
        native, triton = (forms.get(form, {}).get("us") for form in ("native", "triton"))
        floor = next(iter(forms.values())).get("floor_us")
        figures = (_number(native), _number(triton), _number(floor), _ratio(triton, native), _ratio(native, floor))
        cells.append((kernel, dtype, batch, block, *figures))
    return _table(
        ("kernel", "dtype", "batch", "block", "native us", "Triton us", "floor us", "Triton/native", "native x floor"),
        cells,
    )


def routes_table(results: Mapping[str, Any]) -> str:
    """Sums over the blocks of a compiled kernel's two forms, which is faster, and what that says of choice.ROUTES."""
    rows, verdicts = [], []
    for kernel, found in results["stages"].get("native", {}).get("figures", {}).get("routes", {}).items():
        if found["ratio"] is None:
            continue
        rows += [
            (kernel, s["dtype"], s["batch"], _number(s["native_us"]), _number(s["triton_us"]), f"{s['ratio']:.3f}")
            for s in found["sets"]
        ]
        rows.append((kernel, "all", "", "", "", f"{found['ratio']:.3f}"))
        verdict = f"; choice.ROUTES: {found['verdict']}" if found["verdict"] else ""
        verdicts.append(f"{kernel}, faster: {found['faster']}{verdict}")
    text = _table(("kernel", "dtype", "batch", "native us, all blocks", "Triton us", "Triton/native"), rows)
    return "\n\n".join(filter(None, [text, *verdicts]))


def point_table(times: Mapping[Key, Mapping[str, Mapping[str, Any]]]) -> str:
    """Every timed point of every implementation."""
    rows = [
        (
            dtype, batch, mode, block, name, _number(row["us"]), f"{row['spread']:.1%}",
            _number(row["host_us"]), _number(row.get("tflops")),
            f"{row['x_floor']:.2f}" if "x_floor" in row else "",
        )
        for (name, dtype, batch, mode), by_block in times.items()
        for block, row in by_block.items()
    ]  # fmt: skip
    header = (
        "dtype",
        "batch",
        "mode",
        "block",
        "implementation",
        "us",
        "spread",
        "host us",
        "TFLOP/s",
        "x floor",
    )
    return _table(header, rows)


def _rows(results: Mapping[str, Any], stages: Iterable[str]) -> list[Mapping[str, Any]]:
    return [row for name in stages for row in results["stages"].get(name, {}).get("rows", [])]


def _sum(by_block: Mapping[str, Mapping[str, Any]], blocks: Sequence[str], figure: str) -> float | None:
    """None where a block or its figure is missing."""
    values = [by_block.get(block, {}).get(figure) for block in blocks]
    return None if not values or None in values else sum(values)


def _kernel_cell(rows: Sequence[Mapping[str, Any]]) -> str:
    if not rows:
        return ""
    us = sum(row["us"] for row in rows)
    floor = sum(row.get("floor_us", 0.0) for row in rows)
    return f"{us:.1f} ({us / floor:.2f})" if floor else f"{us:.1f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _ratio(numerator: float | None, denominator: float | None) -> str:
    return f"{numerator / denominator:.2f}" if numerator and denominator else ""


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table with columns padded for reading as text; empty without rows."""
    if not rows:
        return ""
    cells = [list(map(str, header)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)) + " |" for row in cells]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)
