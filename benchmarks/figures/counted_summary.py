"""README's table where nothing was timed on a GPU: what the forecast counts for the nine blocks, before and now."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.cases.baselines import Point
from benchmarks.cases.counted import pass_of, same, summed
from benchmarks.figures.gpu_report import _table as markdown_table
from benchmarks.figures.result_files import COUNTED, ResultFileError
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, spatial_size
from inception_fused.plan.cards import CARDS
from inception_fused.plan.eager_kernels import eager_backward_kernels, eager_kernels
from inception_fused.plan.floors import total

BEFORE, AFTER, REPORT = "before.json", "after.json", "report.md"
COMMAND = "python benchmarks/counted.py --json benchmarks/results/counted/after.json --commit HASH"
SHOWN = ("H200", 128)
"""The card of which every batch is shown, and the batch that is shown of every card, with BatchNorm that alone. A batch
of 1 is a range."""


def counted_summary(results: Path) -> str:
    """Sums over the nine blocks at 224x224, with what bounds most of the time. "" where nothing was counted.

    Raises ResultFileError for a file that cannot be used.
    """
    before, after = (read(results / COUNTED / name, COMMAND) for name in (BEFORE, AFTER))
    if after is None:
        return ""
    shown = [point for point in after["points"] if _is_shown(point)]
    rows = [_row(point, same(before, point) if before else None) for point in shown]
    header = ("card", "dtype", "batch", "pass", "floor", "eager's floor", "before", "now", "bound by")
    was = f" before: commit {before['commit']}." if before else ""
    return (
        "**Counted from machine code, not measured**: microseconds of the nine blocks at 224x224, the busiest unit of "
        f"every launch by its instructions and bytes (SASS of Triton {after['counts']['triton']}; "
        "[DESIGN.md](DESIGN.md), section 8). Units that wait for each other cost real kernels another 15 to 25%, which "
        "is a guess, as are some constants of the cards (`inception_fused/plan/cards.py`). A batch of 1 waits for "
        "single warps: a range, launches included. floor: FLOP and bytes of our launches alone; eager's floor: those "
        "of PyTorch's own in channels_last. BatchNorm: with the statistics of the batch, behind every convolution. "
        f"now: commit {after['commit']};{was} "
        f"[Every launch](benchmarks/results/{COUNTED}/{REPORT}); `{COMMAND}` counts again."
        f"\n\n{markdown_table(header, rows)}"
    )


def _is_shown(point: Mapping[str, Any]) -> bool:
    return point["batch"] == SHOWN[1] or (point["card"] == SHOWN[0] and not point.get("normed"))


def _row(point: Mapping[str, Any], was: Mapping[str, Any] | None) -> tuple[str, ...]:
    now = summed(point)["all"]
    card = CARDS[point["card"]]
    eager = sum(total(works, card, point["dtype"]) for works in _eager(point)) * 1e6
    bound = max(now["busiest by bound"], key=now["busiest by bound"].get)
    cells = [_cell(figures, point["batch"]) for figures in (was and summed(was)["all"], now)]
    place = (point["card"], point["dtype"], str(point["batch"]), pass_of(point))
    return (*place, f"{now['floor']:.0f}", f"{eager:.0f}", *cells, bound)


def _cell(figures: Mapping[str, Any] | None, batch: int) -> str:
    if figures is None:
        return ""
    return f"{figures['low']:.0f} to {figures['high']:.0f}" if batch == 1 else f"{figures['busiest']:.0f}"


def _eager(point: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
    for block, config in GOOGLENET_BLOCKS.items():
        shape = Point(block, config, spatial_size(block), point["batch"], point["dtype"]).shape
        normed = point.get("normed", False)
        yield eager_kernels(shape, normed=normed)
        if point["training"]:
            yield eager_backward_kernels(shape, normed=normed)


def read(path: Path, command: str) -> dict[str, Any] | None:
    """A file that benchmarks/counted.py wrote by a command; None where there is none, or counts were lacking.

    Raises ResultFileError for one that cannot be used.
    """
    if not path.exists():
        return None
    try:
        found = json.loads(path.read_text())
        return found if found["points"] and found["counts"] else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultFileError(f"{path}: is no record of counts ({error}); make it again with `{command}`") from None
