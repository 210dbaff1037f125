"""When each GPU kernel of a block starts and how long it takes, eager's and ours: recorded on a GPU, or by arithmetic.

A row is {implementation: "eager" or "ours", pass: "forward" or "backward", name: the kernel's, start_us: from the start
of the pass's first kernel, us: its duration, block, batch, dtype, weights: their layout}. The forward is that of
training, which keeps what the backward needs.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from benchmarks.cases.baselines import LAYOUTS, Point, build, operands, tensor_core_settings
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, spatial_size
from inception_fused.plan import launches, pairs
from inception_fused.plan.cards import H200, Ceilings
from inception_fused.plan.eager_kernels import eager_backward_kernels, eager_kernels
from inception_fused.plan.floors import works
from inception_fused.tools.measuring import gpu_kernels
from inception_fused.tools.timing import LEAD_LIMIT_US, SPIN_CYCLES_PER_US, CudaStopwatch, stopwatch_for

Row = dict[str, Any]

WARM_UP = 5
"""Steps before the recorded one: compilation and cuDNN's search for its fastest algorithm."""

LEAD_US = LEAD_LIMIT_US
"""How long a spinning kernel holds the device back while the host enqueues a pass under the profiler, as in
timing.py: gaps between kernels are then the device's, not Python's."""

WEIGHTS = "channels_last"
"""Their layout, with which ours needs no pack: a key of LAYOUTS."""

PASSES = ("forward", "backward")


def _ours(*roles: str) -> str:
    """A pattern for our launches in some roles: by their name in plan/launches.py, and by their device code's."""
    tables = [table.rows for table in launches.TABLES.values()]
    rows = [row for table in tables for found in table.values() for row in found if row.role in roles]
    paired = [f"^{pair.function}" for pair in pairs.PAIRS] if launches.FPROP in roles else []
    code = [f"^{row.kernel.function}" for row in rows]
    return "|".join(dict.fromkeys([*(f"^{row.name}$" for row in rows), *code, *paired]))


KINDS = {
    "convolution": r"^(conv|dgrad|wgrad)$|"
    + _ours(*launches.GEMMS)
    + r"|grouped_(gemm|dgrad)|cudnn|cutlass|gemm|fprop|dgrad|wgrad|convolve|nchwToNhwc|nhwcToNchw",
    "bias, ReLU": r"^(bias|relu'?|db)$|" + _ours(launches.MASK) + r"|threshold|relu|clamp|at::native.*reduce_kernel",
    "pool": r"^pool'?$|max_pool",
    "copy, sum": r"^(cat|zeros|add)$|"
    + _ours(launches.PACK, launches.SUM)
    + r"|CatArray|copy|FillFunctor|splitKreduce",
}
"""What a kernel does, by the first pattern that its name fits: the names of plan/floors.py and eager_kernels.py, of our
kernels, and of PyTorch's and cuDNN's. An addition is a bias forward and a sum of gradients backward."""


def kind_of(row: Row) -> str:
    """A key of KINDS, or "other"."""
    for kind, pattern in KINDS.items():
        if re.search(pattern, row["name"]):
            return kind
    if re.search("add", row["name"], re.IGNORECASE):
        return "bias, ReLU" if row["pass"] == "forward" else "copy, sum"
    return "other"


def one_point(rows: Sequence[Row]) -> list[Row]:
    """The rows of the first point among them: a file may hold several."""
    return [row for row in rows if _point(row) == _point(rows[0])]


def _point(row: Row) -> tuple[Any, ...]:
    return row.get("block"), row.get("batch"), row.get("dtype")


def point_words(rows: Sequence[Row]) -> str:
    """A picture's words for the point of its rows."""
    block, batch, dtype = _point(rows[0])
    point = f": block {block}, batch {batch}, {dtype}" if block else ""
    return f"Launches of one training step{point}, {rows[0].get('weights', WEIGHTS)} weights"


def record_timeline(point: Point) -> list[Row]:
    """The kernels of one training step at a point, eager channels_last's and ours, as torch.profiler sees them.

    Raises RuntimeError without a CUDA device, and where the profiler sees no kernels (no rights to CUPTI).
    """
    if not torch.cuda.is_available():
        raise RuntimeError(
            "record_timeline: needs a CUDA device, and PyTorch sees none; floor_timeline draws the floors without one"
        )
    from inception_fused import FusedInception, Inception, backend

    point, stopwatch = replace(point, mode="training"), stopwatch_for("cuda")
    rows: list[Row] = []
    # Demanded, not preferred: a fallback must fail here, not be drawn as ours.
    with tensor_core_settings(), backend("kernels"):
        for implementation, block in (("eager", Inception), ("ours", FusedInception)):
            module = build(block, point, "cuda", LAYOUTS[WEIGHTS])
            x, dy = operands(point, "cuda")
            inputs = (x, *module.parameters())
            for _ in range(WARM_UP):
                torch.autograd.grad(module(x), inputs, dy)
            # The profiler's first use may lose events while CUPTI starts.
            _profiled(lambda module=module, x=x: module(x), stopwatch)
            y, events = _profiled(lambda module=module, x=x: module(x), stopwatch)
            rows += kernel_rows(events, implementation, "forward")
            _, events = _profiled(lambda y=y, i=inputs, dy=dy: torch.autograd.grad(y, i, dy), stopwatch)
            rows += kernel_rows(events, implementation, "backward")
    at = {"block": point.block, "batch": point.batch, "dtype": point.dtype, "weights": WEIGHTS}
    return [row | at for row in rows]


def _profiled(call: Callable[[], Any], stopwatch: CudaStopwatch) -> tuple[Any, Sequence[Any]]:
    """What ``call`` returns, and the profiler's events of it behind a flush of L2 and the lead."""
    stopwatch.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        stopwatch.flush()
        torch.cuda._sleep(int(LEAD_US * SPIN_CYCLES_PER_US))
        result = call()
        stopwatch.synchronize()
    return result, profiler.events()


def kernel_rows(events: Sequence[Any], implementation: str, direction: str) -> list[Row]:
    """Rows of those of torch.profiler's events that are GPU kernels behind the lead, in order of their start.

    Raises RuntimeError where there is none.
    """
    kernels = sorted((e for e in events if gpu_kernels([e])), key=lambda event: event.time_range.start)
    leads = [index for index, event in enumerate(kernels) if "spin_kernel" in event.name]
    kernels = kernels[leads[-1] + 1 :] if leads else []
    if not kernels:
        raise RuntimeError(
            f"timeline: torch.profiler saw no kernel of {implementation}'s {direction} behind the one that holds the "
            "device back: this process may have no rights to the GPU's counters (CUPTI), as in many containers"
        )
    origin = kernels[0].time_range.start
    return [
        {
            "implementation": implementation,
            "pass": direction,
            "name": event.name,
            "start_us": event.time_range.start - origin,
            "us": event.time_range.elapsed_us(),
        }
        for event in kernels
    ]


def floor_timeline(block: str, batch: int, dtype: str, ceilings: Ceilings = H200) -> list[Row]:
    """The same rows by arithmetic: every launch takes its floor and follows the one before without a gap."""
    shape = Point(block, GOOGLENET_BLOCKS[block], spatial_size(block), batch, dtype).shape
    passes = {
        ("eager", "forward"): eager_kernels(shape),
        ("eager", "backward"): eager_backward_kernels(shape),
        ("ours", "forward"): works(shape, "forward"),
        ("ours", "backward"): works(shape, "backward"),
    }
    rows: list[Row] = []
    for (implementation, direction), found in passes.items():
        start = 0.0
        for work in found:
            us = work.floor(ceilings, dtype) * 1e6
            row = {"implementation": implementation, "pass": direction, "name": work.name, "start_us": start, "us": us}
            rows.append(row | {"block": block, "batch": batch, "dtype": dtype, "weights": WEIGHTS})
            start += us
    return rows
