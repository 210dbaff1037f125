"""The closing table of a benchmark run: every point in a line, what is slower than eager, what was not measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from benchmarks.cases.records import COMPILE, EAGER, OWN_BLOCKS, Record, with_ratios
from benchmarks.cases.suite import IMPLEMENTATIONS

HEADINGS = {
    "ours_graph": "ours, graph",
    "ours_blocks": "ours, blocks",
    "eager_nchw": "eager NCHW",
    "eager_graph": "eager, graph",
    "compile_reduce_overhead": "reduce-ovh.",
    "compile_max_autotune": "max-autot.",
}
"""Of an implementation's column where its name is too long or too plain."""

CPU_NOTE = (
    "No GPU was used: ours ran PyTorch's own operators in channels_last, as eager did, so these times say nothing "
    "about the kernels, and no ratio is taken."
)

HOST_NOTE = "pytest-benchmark's table above is the host's wall time of a call, waiting for the device included."


def closing(records: Iterable[Record], skipped: Iterable[str] = (), *, gpu: bool) -> str:
    """Text for a terminal. skipped: the reason of each case that was not measured, which are then counted by reason."""
    records = with_ratios(records)
    parts = [table(records), slower(records)] if records else ["nothing was measured"]
    parts.append(not_measured(skipped))
    parts.append("" if gpu else CPU_NOTE)
    return "\n\n".join(part for part in parts if part)


def table(records: Sequence[Record]) -> str:
    """Median microseconds of each implementation at each point; ratios are those of ours.

    x eager: eager channels_last over ours; "<" marks a point at which ours is slower. x compile: the best torch.compile
    over ours. x floor: ours over the least time that the measured ceilings allow. Without a GPU there are no ratios.
    """
    points: dict[tuple, dict[str, Record]] = {}
    for record in records:
        points.setdefault(record.point, {})[record.implementation] = record
    columns = [name for name in IMPLEMENTATIONS if any(name in at for at in points.values())]
    on_gpu = not all(record.on_cpu for record in records)
    compiled = on_gpu and any(name in columns for name in COMPILE)
    floors = any(record.x_floor is not None for record in records)
    head = ["us of device time" if on_gpu else "us of wall time", "image", "batch", "dtype", "mode"]
    head += [HEADINGS.get(name, name) for name in columns]
    head += [*(["x eager"] if on_gpu else []), *(["x compile"] if compiled else []), *(["x floor"] if floors else [])]
    rows = []
    for at in points.values():
        first, ours = next(iter(at.values())), at.get("ours")
        ratios = [_ratio(ours and ours.x_eager, mark=True)] if on_gpu else []
        ratios += [_ratio(ours and ours.x_compile)] if compiled else []
        ratios += [_ratio(ours and ours.x_floor)] if floors else []
        times = [f"{at[name].device_us:.1f}" if name in at else "" for name in columns]
        rows.append([subject(first), f"{first.image}", f"{first.batch}", first.dtype, first.mode, *times, *ratios])
    return "\n".join(_aligned(head, rows))


def slower(records: Sequence[Record]) -> str:
    """The points at which ours is slower than eager channels_last, which it should be nowhere."""
    both = [record for record in records if record.implementation == "ours" and record.x_eager is not None]
    if not both:
        return ""
    rule = "ours is never to be slower than eager channels_last"
    worse = [record for record in both if record.x_eager < 1]
    if not worse:
        return f"{rule}: it is at none of {len(both)} points"
    spreads = {record.point: record.spread for record in records if record.implementation == EAGER}
    lines = [f"{rule}, but it is at {len(worse)} of {len(both)} points:"]
    for record in sorted(worse, key=lambda record: record.x_eager):
        noise = 1 / record.x_eager - 1 < record.spread + spreads[record.point]
        lines.append(
            f"  {subject(record)} image {record.image} batch {record.batch} {record.dtype} {record.mode}: "
            f"{record.x_eager:.2f} x eager{', within the spread of the two' if noise else ''}"
        )
    return "\n".join(lines)


def not_measured(skipped: Iterable[str]) -> str:
    """Each reason with the number of cases, a line each."""
    counts = Counter(skipped)
    lines = [f"  {count} {'case' if count == 1 else 'cases'}: {reason}" for reason, count in counts.items()]
    return "\n".join(["not measured:", *lines]) if lines else ""


def subject(record: Record) -> str:
    """What a person calls the subject of a record."""
    if record.suite in OWN_BLOCKS:
        return f"{record.subject} {record.suite}"
    return "KernelBench 6" if record.suite == "kernelbench6" else record.subject


def _ratio(value: float | None, *, mark: bool = False) -> str:
    return "" if value is None else f"{'< ' if mark and value < 1 else ''}{value:.2f}"


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    left = (0, 3, 4)

    def line(row: Sequence[str]) -> str:
        cells = (
            cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        return "  ".join(cells).rstrip()

    return [line(head), "-" * len(line(head)), *map(line, rows)]
