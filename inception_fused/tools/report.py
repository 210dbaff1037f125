"""A :class:`Verification` as text: what ran, the worst error of each block, what each costs, the verdict."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from inception_fused.tools.measuring import Costs, Launches, Pair

if TYPE_CHECKING:
    from inception_fused.tools.verification import BlockReport, Verification

WIDTH = 120
NAME_WIDTH = 24
"""Longer names of blocks lose their beginning, which many blocks have in common."""


MOST_NAMED = 5
"""Slices and gradients of a block that the verdict names."""


def text(result: Verification) -> str:
    """Lines of at most :data:`WIDTH` characters."""
    checked = [row for row in result.rows if row.checked]
    parts = [_heading(result)]
    if checked:
        parts += [_errors(checked, result.backward), _costs(checked)]
    return "\n\n".join([*parts, "\n".join(map(_wrap, [*result.notes, verdict(result)]))])


def verdict(result: Verification) -> str:
    """One sentence: ok, or what is beyond its bound, and what was not checked."""
    checked = [row for row in result.rows if row.checked]
    bad = [row for row in checked if not row.ok]
    left_out = len(result.rows) - len(checked)
    kinds = ["slice"] + ["statistic"] * _has(checked, "mean ") + ["gradient"] * result.backward
    kind = _listed(kinds)
    if not checked:
        return "NOT OK: nothing was checked"
    if bad:
        return f"NOT OK: beyond its bound: {'; '.join(map(_wrong, bad))}"
    rest = f"; {left_out} not checked" if left_out else ""
    return f"ok: every {kind} of {_blocks(len(checked))} is within its bound{rest}"


def _wrong(row: BlockReport) -> str:
    """A block's slices and gradients beyond their bounds, the first few of them."""
    bad = [f"{r.what} ({_times(r.decisive.ratio)} times its bound)" for r in row.parity if not r.ok]
    more = f" and {len(bad) - MOST_NAMED} more" if len(bad) > MOST_NAMED else ""
    return f"{row.name}: {', '.join(bad[:MOST_NAMED])}{more}"


def short(name: str) -> str:
    return name if len(name) <= NAME_WIDTH else "..." + name[3 - NAME_WIDTH :]


def versions_line(result: Verification) -> str:
    return ", ".join(f"{name} {number or 'not installed'}" for name, number in result.versions.items())


def path_words(row: BlockReport) -> str:
    return {
        "kernels": f"kernels ran: {row.why}",
        "interpreted": f"kernels ran, interpreted on the CPU: {row.why}",
        "eager": f"no kernel ran: {row.why}",
        "not checked": f"not checked: {row.why}",
    }[row.path]


def _heading(result: Verification) -> str:
    lines = [f"{versions_line(result)}; {result.device}; {result.dtypes}; backend {result.backend}"]
    by_path: dict[str, list[str]] = {}
    for row in result.rows:
        by_path.setdefault(path_words(row), []).append(row.name)
    for words, names in by_path.items():
        which = _blocks(len(names)) if len(names) == len(result.rows) else ", ".join(map(short, names))
        lines.append(f"{which}: {words}")
    return "\n".join(map(_wrap, lines))


def _errors(rows: Sequence[BlockReport], backward: bool) -> str:
    cells = []
    for row in rows:
        worst = row.worst
        figures = worst.decisive
        cells.append(
            (
                short(row.name), "x".join(map(str, row.x_shape)), f"{worst.what}, {figures.kind}",
                f"{figures.ours:.1e}", f"{figures.eager:.1e}", f"{figures.bound:.1e}", _times(figures.ratio),
                "ok" if row.ok else "NOT OK",
            )
        )  # fmt: skip
    parts = ["four slices"] * _has(rows, "branch ")
    parts += ["the stem's output" if parts else "output"] * _has(rows, "output")
    parts += ["the batch's statistics"] * _has(rows, "mean ")
    if backward:
        learned = ["x", "weights", "biases"] + ["gammas", "betas"] * _has(rows, " batch_norm.")
        parts.append(f"the gradients of {_listed(learned)}")
    title = f"error against float64, the worst of a block's {_listed(parts)}"
    header = ("block", "x", "worst", "fused", "eager", "bound", "fused/bound", "")
    return f"{_wrap(title)}\n{table(header, cells)}"


def _listed(words: Sequence[str]) -> str:
    """ "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def _has(rows: Sequence[BlockReport], words: str) -> bool:
    """Whether what some block was checked for has these words in its name."""
    return any(words in r.what for row in rows for r in row.parity)


def _costs(rows: Sequence[BlockReport]) -> str:
    found = [row.costs for row in rows]
    unit, size = memory_unit(rows)

    def _bytes(pair: Pair) -> str:
        return f"{figure_of(pair.fused / size)} / {figure_of(pair.eager / size)}"

    columns: list[tuple[str, Callable[[Costs], Pair | None], Callable[[Pair], str]]] = [
        ("fwd launches", lambda c: c.launches_forward, _launches),
        ("bwd launches", lambda c: c.launches_backward, _launches),
        (f"held {unit}", lambda c: c.held_bytes, _bytes),
        (f"peak {unit}", lambda c: c.peak_bytes, _bytes),
        ("fwd ms", lambda c: c.forward_us, _ms),
        ("fwd + bwd ms", lambda c: c.step_us, _ms),
    ]
    columns = [column for column in columns if any(column[1](c) is not None for c in found)]
    names = [short(row.name) for row in rows]
    lines = []
    for name, summed in [*zip(names, ([row] for row in rows), strict=True), ("sum", rows)]:
        parts, cells = [row.costs for row in summed], []
        same = all(row.path == "eager" for row in summed)
        for title, figure, show in columns:
            pairs = [figure(c) for c in parts]
            if None in pairs:
                cells.append("")
                continue
            if title.startswith("peak"):
                total = Pair(*(max(values) for values in zip(*pairs, strict=True)))
            else:
                total = Pair(*(_sum(values) for values in zip(*pairs, strict=True)))
            ratio = ""
            if show is _ms:
                ratio = " (same path)" if same else f" ({total.eager / total.fused:.2f}x)"
            cells.append(show(total) + ratio)
        lines.append((name, *cells))
    if len(rows) == 1:
        lines.pop()
    shown = table(header := ("block", *(title for title, _, _ in columns)), lines)
    if max(map(len, shown.splitlines())) > WIDTH:
        # Two tables, one above the other.
        half = 1 + len(columns) // 2
        shown = "\n\n".join(
            table([header[i] for i in part], [[line[i] for i in part] for line in lines])
            for part in (range(half), (0, *range(half, len(header))))
        )
    title = f"cost, fused / eager; launches: {launches_words(rows)}"
    return f"{title}\n{shown}\n{_wrap(_legend(rows))}"


def _legend(rows: Sequence[BlockReport]) -> str:
    on_cpu = rows[0].costs.peak_bytes is None
    lines = []
    if any(pair.fused.aten is None for row in rows for pair in _launch_pairs(row.costs)):
        lines.append("?: not known, torch.profiler sees no kernels here")
    if rows[0].costs.held_bytes is not None:
        lines.append("held: what autograd keeps for the backward beyond parameters and x, each storage once")
    if not on_cpu:
        lines.append("peak: the most that a step takes beyond what was there, in the sum the largest")
    if rows[0].costs.forward_us is not None:
        how = "wall clock" if on_cpu else "device events, the host ahead"
        lines.append(f"ms: median, {how}, eager in channels_last")
        if any(row.path == "eager" for row in rows):
            lines.append("same path: both are eager PyTorch, so a difference is noise")
    host = [row.costs.host_us.fused / 1e3 for row in rows if row.costs.host_us is not None]
    if host:
        lines.append(f"a fused call takes the host {figure_of(min(host))} to {figure_of(max(host))} ms")
    return "; ".join(lines)


def launches_words(rows: Sequence[BlockReport]) -> str:
    """What a number of launches counts."""
    on_cpu = rows[0].costs.peak_bytes is None
    words = "ATen operators that compute (no views, no allocations)" if on_cpu else "GPU kernels that ATen launches"
    return f"kernels of this package + {words}"


def _launch_pairs(costs: Costs) -> list[Pair]:
    return [pair for pair in (costs.launches_forward, costs.launches_backward) if pair is not None]


def _sum(values: Sequence[object]) -> object:
    if isinstance(values[0], Launches):
        aten = [v.aten for v in values]
        return Launches(sum(v.ours for v in values), None if None in aten else sum(aten))
    return sum(values)


def _launches(pair: Pair) -> str:
    def one(n: Launches) -> str:
        aten = "?" if n.aten is None else str(n.aten)
        return f"{n.ours}+{aten}" if n.ours and aten != "0" else str(n.ours or aten)

    return f"{one(pair.fused)} / {one(pair.eager)}"


def memory_unit(rows: Sequence[BlockReport]) -> tuple[str, int]:
    """("MiB", its bytes), or KiB where eager holds less than a MiB in every block."""
    held = [row.costs.held_bytes.eager for row in rows if row.costs.held_bytes is not None]
    return ("KiB", 2**10) if held and max(held) < 2**20 else ("MiB", 2**20)


def _ms(pair: Pair) -> str:
    return f"{figure_of(pair.fused / 1e3)} / {figure_of(pair.eager / 1e3)}"


def figure_of(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 99.95 else f"{value:.1f}" if value >= 9.995 else f"{value:.2f}"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 100 else f"{ratio:.1e}"


def _blocks(number: int) -> str:
    return "1 block" if number == 1 else f"{number} blocks"


def _wrap(line: str) -> str:
    return textwrap.fill(line, WIDTH, break_on_hyphens=False)


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns of text, left-aligned."""
    widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])
