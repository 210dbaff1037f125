"""The same points of two result files: what got faster, what got slower."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log

from benchmarks.cases.records import Record
from benchmarks.figures.gpu_report import _table as markdown_table
from benchmarks.figures.result_files import Measured, ResultFileError


@dataclass(frozen=True)
class Change:
    """A point of both files. ratio: microseconds after over before; spread: the larger of the two measurements'."""

    before: Record
    after: Record
    ratio: float
    spread: float

    def slower(self, threshold: float) -> bool:
        """By more than the threshold and what repeats of one measurement differ by."""
        return self.ratio > 1 + threshold + self.spread

    def faster(self, threshold: float) -> bool:
        return 1 / self.ratio > 1 + threshold + self.spread


def changes(before: Measured, after: Measured) -> list[Change]:
    """Every point that both have. Raises ResultFileError where there is none."""
    first, second = (
        {(*r.point, r.implementation): r for r in measured.records if r.device_us} for measured in (before, after)
    )
    common = [key for key in first if key in second]
    if not common:
        raise ResultFileError(
            f"{before.path} ({len(first)} points) and {after.path} ({len(second)} points) have no point in common; "
            "compare two files of the same suite and the same kind of device"
        )
    return [
        Change(a, b, b.device_us / a.device_us, max(a.spread or 0.0, b.spread or 0.0))
        for a, b in ((first[key], second[key]) for key in common)
    ]


def geometric_mean(found: Sequence[Change]) -> float:
    return exp(sum(log(change.ratio) for change in found) / len(found))


def comparison(before: Measured, after: Measured, found: Sequence[Change], threshold: float) -> str:
    """Markdown: the two files, every point with its verdict, the means, how many got slower."""
    rows = []
    for change in sorted(found, key=lambda change: -change.ratio):
        r = change.before
        verdict = "slower" if change.slower(threshold) else "faster" if change.faster(threshold) else ""
        image = f" at {r.image}x{r.image}" if r.image != 224 else ""
        point = f"{r.suite} {r.subject}{image} batch {r.batch} {r.dtype} {r.mode}"
        figures = (f"{r.device_us:.1f}", f"{change.after.device_us:.1f}", f"{change.ratio:.3f}", f"{change.spread:.1%}")
        rows.append((point, r.implementation, *figures, verdict))
    header = ("point", "implementation", "before us", "after us", "after / before", "spread", "")
    means = []
    for name in dict.fromkeys(change.before.implementation for change in found):
        some = [change for change in found if change.before.implementation == name]
        means.append(f"{name} {geometric_mean(some):.3f} ({len(some)})")
    lines = [f"before: {before.environment}", f"after: {after.environment}"]
    if before.gpu != after.gpu:
        lines.append("The two files are of different devices: their ratios compare the devices, not the code.")
    count = sum(change.slower(threshold) for change in found)
    closing = (
        f"geometric mean of after / before: {geometric_mean(found):.3f} ({len(found)} points); {', '.join(means)}\n"
        f"{count} of {len(found)} points slower by more than {threshold:.0%} and the spread"
    )
    return "\n\n".join(["\n".join(lines), markdown_table(header, rows), closing]) + "\n"
