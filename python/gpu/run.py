"""One run of gpu_check: its points, budget and rows, and the checks that come before a time is believed.

A row is a dictionary for the JSON: what was measured (block, batch, dtype, mode, implementation or kernel)
and either the figures of :func:`figures`, or "skipped" with the reason, or "error" with the traceback.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.baselines import (
    Point,
    assert_agree,
    assert_block_parity,
    call_of,
    graphed,
    operands,
    tensor_core_settings,
)
from benchmarks.cases.machine import card_state
from benchmarks.cases.runner import SETTLED
from checks.device import DeviceLostError
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, InceptionConfig, spatial_size
from inception_fused.plan.cards import H200, Ceilings
from inception_fused.plan.eager_kernels import eager_kernels
from inception_fused.plan.floors import Work, block_work, joined
from inception_fused.plan.forecast import Forecast
from inception_fused.tools.timing import Stopwatch, Timing, measure

ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]

Launches = Mapping[str, Sequence[tuple[str, Callable[[], None]]]]
"""(name, what enqueues it) of each launch by pass."""

SAVE_EVERY_S = 5.0


class StageError(RuntimeError):
    """A stage went on to its end, but something in it failed; its rows say what."""


@dataclass(frozen=True)
class Matrix:
    """The points to walk, the most valuable first, since a budget cuts the rest. branch3: sides of the windows of the
    blocks' third branch."""

    blocks: Mapping[str, InceptionConfig]
    batches: Sequence[int] = (128, 1, 32)
    dtypes: Sequence[str] = ("bf16", "tf32")
    image_size: int = 224
    branch3: tuple[int, ...] = (5,)

    def points(self, modes: Sequence[str]) -> list[Point]:
        """Every combination, blocks innermost, so that a cut leaves whole sets of blocks."""
        return [
            Point(name, config, spatial_size(name, self.image_size), batch, dtype, mode, branch3=self.branch3)
            for dtype in self.dtypes
            for batch in self.batches
            for mode in modes
            for name, config in self.blocks.items()
        ]


FULL = Matrix(GOOGLENET_BLOCKS)


class Run:
    """Where, what and until when to measure; one per process.

    results: the JSON to be, with "stages" by name. save: writes it. device: "cuda" or "cpu". deadline: on
    the clock of time.time(). out: folder for logs. seconds: device time spent on one figure.
    """

    def __init__(
        self,
        results: dict[str, Any],
        save: Callable[[], None],
        *,
        device: str,
        stopwatch: Stopwatch,
        deadline: float,
        out: Path,
        matrix: Matrix = FULL,
        seconds: float = 0.06,
    ) -> None:
        self.results, self.save, self.deadline, self.out = results, save, deadline, out
        self.device, self.stopwatch, self.matrix, self.seconds = device, stopwatch, matrix, seconds
        self.stage: dict[str, Any] = {}
        self._verified: set[tuple[Point, torch.memory_format, bool]] = set()
        self._saved = time.time()

    def remaining(self) -> float:
        """Seconds of the budget that are left."""
        return self.deadline - time.time()

    def add(self, row: Row) -> None:
        """Appends a row to the current stage, prints it as one line of progress, and saves now and then,
        which is also the sign of life that the supervising process waits for."""
        self.stage.setdefault("rows", []).append(row)
        print("  " + describe(row), flush=True)
        if time.time() - self._saved > SAVE_EVERY_S:
            self.save()
            self._saved = time.time()

    def ceilings(self) -> Ceilings:
        """The card's measured ceilings, or the reference card's where the stage has not run."""
        found = self.results["stages"].get("ceilings", {}).get("figures")
        return Ceilings.measured(found["device"], found) if found else H200

    def each(self, points: Sequence[Point], work: Callable[[Point], list[Row]], seconds: float) -> None:
        """Adds the rows of ``work`` for each point until less than ``seconds`` of the budget are left.

        Raises StageError after the last point if any failed, DeviceLostError at once if the device is gone.
        """
        failed = 0
        for index, point in enumerate(points):
            if self.remaining() < seconds:
                self.stage["cut"] = len(points) - index
                print(f"  budget spent: {self.stage['cut']} of {len(points)} points left out", flush=True)
                break
            label = {"block": point.label, "batch": point.batch, "dtype": point.dtype, "mode": point.mode}
            try:
                rows = self._too_large(point) or work(point)
            except torch.OutOfMemoryError as error:
                rows = [{"skipped": f"out of memory: {error}".splitlines()[0]}]
            except Exception:
                failed += 1
                rows = [{"error": traceback.format_exc()}]
            for row in rows:
                self.add({**label, **row})
            if "error" in rows[-1]:
                self.check_device()
            if self.device == "cuda":
                torch.cuda.empty_cache()
        if failed:
            raise StageError(f"{failed} of {len(points)} points failed; their rows hold the tracebacks")

    def _too_large(self, point: Point) -> list[Row]:
        if self.device != "cuda":
            return []
        needed, (free, _) = footprint(point), torch.cuda.mem_get_info()
        if needed <= free:
            return []
        return [{"skipped": f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free"}]

    def check_device(self) -> None:
        """Raises DeviceLostError if the device no longer answers, as after an illegal address."""
        try:
            self.stopwatch.synchronize()
        except Exception as error:
            raise DeviceLostError(f"the device reports: {error}") from error

    def gate(self, point: Point, memory_format: torch.memory_format, *, backward: bool) -> None:
        """Asserts parity of our block with float64 at the point's block, batch and dtype, once per process.

        memory_format: of the weights; in PyTorch's own, pack is one of the launches that are tested.
        """
        key = (replace(point, mode="forward"), memory_format, backward)
        if key not in self._verified:
            assert_block_parity(point, self.device, memory_format, backward=backward)
            self._verified.add(key)

    def time_block(
        self, point: Point, name: str, module: torch.nn.Module, reference: torch.nn.Module | None = None
    ) -> list[Row]:
        """The row of one implementation at a point. Raises AssertionError, before any timing, where an
        output differs from ``reference``'s (or, for a graph, from the same call's outside the graph)."""
        with tensor_core_settings():
            timing = self._time_call(point, name, module, reference)
        work = block_work(point.shape, training=point.mode == "training")
        floor = work.floor(self.ceilings(), point.dtype)
        return [{"implementation": name, "weights": "channels_last", **figures(timing, work.flop, floor=floor)}]

    def time_launches(
        self, point: Point, passes: Launches, limits: Mapping[str, Sequence[Work]], said: Sequence[Forecast],
        weights: str = "KCRS",
    ) -> list[Row]:  # fmt: skip
        """A row for each launch of some passes, "forward" before "backward": its time beside its floor and the
        forecast. limits: by pass. said: of all launches, in order. weights: their layout."""
        each = [(direction, *launch) for direction, launches in passes.items() for launch in launches]
        # In order, once: some read what those before them have written.
        for *_, launch in each:
            launch()
        rows, ceilings = [], self.ceilings()
        for (direction, name, launch), forecast in zip(each, said, strict=True):
            timing = measure(launch, self.stopwatch, seconds=self.seconds)
            floors = {work.name: work for work in limits[direction]}
            work = joined(name, [floors[half] for half in name.split("+")])
            limit = {"flop": work.flop, "moved": work.bytes, "floor": work.floor(ceilings, point.dtype)}
            row = {"kernel": name, "pass": direction, "weights": weights, **figures(timing, **limit)}
            rows.append(row | {"predicted_us": 1e6 * forecast.predicted, "bound": forecast.bound})
        return rows

    def _time_call(self, point: Point, name: str, module: torch.nn.Module, reference: torch.nn.Module | None) -> Timing:
        x, dy = operands(point, self.device)
        call = call_of(module, x, dy, point.mode)
        for _ in range(SETTLED):
            outputs = call()
        expected = outputs if reference is None else call_of(reference, x, dy, point.mode)()
        if point.mode == "graph":
            call, outputs = graphed(call)
            for output in outputs:
                output.fill_(float("nan"))
            call()
        assert_agree(f"{name}, {point}", outputs, expected)
        # The graph keeps its outputs' memory itself; nothing else may hold memory while the call is timed.
        del outputs, expected
        return measure(call, self.stopwatch, seconds=self.seconds)


def figures(timing: Timing, flop: int = 0, moved: int = 0, floor: float = 0.0) -> Row:
    """A row's numbers: us, host_us, spread and calls as timed; tflops from ``flop``, gbs (GB/s) from
    ``moved`` bytes, floor_us and x_floor from ``floor`` in seconds, each left out where that is 0."""
    row: Row = {"us": timing.us, "host_us": timing.host_us, "spread": timing.spread, "calls": timing.calls}
    if flop:
        row["tflops"] = flop / timing.us / 1e6
    if moved:
        row["gbs"] = moved / timing.us / 1e3
    if floor:
        row |= {"floor_us": floor * 1e6, "x_floor": timing.us / (floor * 1e6)}
    return row


def run_command(
    command: Sequence[str], limit: float, log: Path, environment: Mapping[str, str] | None = None
) -> tuple[int | None, str]:
    """Exit code (None: killed after ``limit`` seconds) and output of a command run in the root folder.

    The output is also kept in ``log``. environment: variables added to this process's; TRITON_INTERPRET is left out.
    """
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=inherited | dict(environment or {}),
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            # The group, because the command may have started processes of its own that hold the device.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return code, log.read_text(errors="replace")


def footprint(point: Point) -> int:
    """Bytes of device memory that a point may take: 3 times what eager's forward moves, 6 in training."""
    moved = sum(work.bytes for work in eager_kernels(point.shape))
    return moved * (6 if point.mode == "training" else 3)


def describe(row: Mapping[str, Any]) -> str:
    """One line for a row."""
    keys = ("name", "block", "batch", "dtype", "mode", "implementation", "kernel")
    label = " ".join(str(row[key]) for key in keys if key in row)
    if "error" in row:
        return f"{label}: FAILED: {row['error'].strip().splitlines()[-1]}"
    if "skipped" in row:
        return f"{label}: skipped: {row['skipped']}"
    if "us" not in row:
        return f"{label}: {row.get('value', 'ok')}"
    host = "" if row["host_us"] is None else f", host {row['host_us']:.1f}"
    floor = f", {row['x_floor']:.2f} x floor" if "x_floor" in row else ""
    return f"{label}: {row['us']:.1f} us{host}{floor}, spread {row['spread']:.1%}"


def no_gpu_reason() -> str | None:
    """Why there is no GPU to check, with the remedy; None if there is one."""
    if torch.cuda.is_available():
        return None
    build, state = f"PyTorch {torch.__version__}", card_state()
    if torch.version.cuda is None:
        remedy = "install one with CUDA (pytorch.org/get-started)"
        driver = "" if state else "; no NVIDIA driver answers nvidia-smi either"
        return f"{build} is built without CUDA: {remedy}{driver}"
    if state is None:
        return f"no NVIDIA driver answers nvidia-smi: use a machine with an NVIDIA GPU; {build} is fine"
    return (
        f"a driver answers ({state.splitlines()[-1]}), but {build} for CUDA {torch.version.cuda} sees no "
        "GPU: update the driver or install a PyTorch for its CUDA version; check CUDA_VISIBLE_DEVICES"
    )
