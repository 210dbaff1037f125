"""What gpu_check does, as data: stages in order, each with name, purpose, points, rough cost and function.

A stage function gets a :class:`gpu.run.Run`, adds rows or figures to it, and raises if anything failed.
Stages know of each other only through ``run.results``, so that each can run in a process of its own.
"""

from __future__ import annotations

import math
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.cases.baselines import MODES, Point, build, compiled, operands, tensor_core_settings
from benchmarks.cases.machine import card_state, machine
from benchmarks.cases.records import NORMED, TWO
from benchmarks.cases.roofline import table
from checks.block_cases import ODD
from gpu.launch_rows import rows_of
from gpu.native_stage import native, native_points
from gpu.normed_stage import batch_norm, normed_points
from gpu.run import Matrix, Row, Run, StageError, run_command
from gpu.sanitizer_stage import sanitizer
from gpu.stem_stage import checked_stem, of_stem, stem, stem_parity_points, stem_points
from gpu.suite_stages import build as build_all
from gpu.suite_stages import report, suite, timeline, tune
from inception_fused.block.googlenet_blocks import BRANCH3
from inception_fused.tools.timing import measure_ceilings

TESTS_SHARE = 0.45
"""Most of the remaining budget that the tests may take."""

# Parts of the package are imported where they are used: one that does not import fails its own stages, not
# those that measure the card and the baselines.


def environment(run: Run) -> None:
    """Fills stage["figures"] with what a figure's reader must know of the machine."""
    run.stage["figures"] = found = machine()
    for name, value in found.items():
        print(f"  {name}: {value}", flush=True)
    from inception_fused import info
    from inception_fused.tools.environment import format_info

    found["info"] = info()
    print(format_info(found["info"]), flush=True)
    if run.device == "cuda" and os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise StageError("TRITON_INTERPRET is set: the kernels would be interpreted on the CPU; unset it")


def tests(run: Run) -> None:
    """Runs the GPU tests in a process group of their own and keeps their output in tests.log."""
    limit = max(1.0, run.remaining() * TESTS_SHARE)
    arguments = "-m pytest -m gpu tests -q --tb=short -p no:cacheprovider"
    command = [sys.executable, *arguments.split()]
    code, text = run_command(command, limit, run.out / "tests.log")
    found = re.findall(r"(\d+) (passed|failed|errors?|skipped|deselected|xfailed)", text[-500:])
    counts = {word: int(number) for number, word in found}
    run.stage["figures"] = {"exit_code": code, **counts, "tail": text[-4000:]}
    print("  " + "\n  ".join(text.strip().splitlines()[-8:]), flush=True)
    if code is None:
        raise StageError(f"no result after {limit:.0f} s: raise --budget, or run pytest -m gpu tests by itself")
    if code == 5:
        raise StageError("pytest found no test marked gpu, so nothing was tested")
    if code:
        raise StageError(f"pytest ended with exit code {code}; see tests.log")
    if not counts.get("passed"):
        raise StageError("pytest passed no test, so nothing was tested; see tests.log")


def parity_points(matrix: Matrix) -> list[Point]:
    """Every block, and the stem; of those with two 3x3 in branch 3 the first, it without ReLU, and one whose channels
    are odd."""
    every = replace(matrix, batches=(1,), dtypes=("bf16", "tf32", "fp16"))
    name, config = next(iter(matrix.blocks.items()))
    first = replace(every, blocks={name: config}, branch3=BRANCH3[TWO]).points(("forward",))
    found = every.points(("forward",))
    for point in first:
        odd = replace(point, block="odd", config=ODD, batch=2, size=7)
        found += [point, replace(point, activation=None), odd]
    return found + stem_parity_points(matrix)


def window_points(matrix: Matrix) -> list[Point]:
    """Those of few blocks with two 3x3 in branch 3: one of each stage, in the first dtype."""
    blocks = {name: config for name, config in matrix.blocks.items() if name in ("3a", "4e", "5b")} or matrix.blocks
    few = replace(matrix, blocks=blocks, batches=matrix.batches[:2], dtypes=matrix.dtypes[:1], branch3=BRANCH3[TWO])
    return few.points(("forward", "training"))


def parity(run: Run) -> None:
    def check(point: Point) -> list[Row]:
        start = time.perf_counter()
        if of_stem(point):
            checked_stem(point, run.device)
        else:
            run.gate(point, torch.contiguous_format, backward=True)
        return [{"value": f"ok in {time.perf_counter() - start:.1f} s"}]

    run.each(parity_points(run.matrix), check, seconds=5)


def ceilings(run: Run) -> None:
    with tensor_core_settings():
        found = measure_ceilings(run.stopwatch, run.device)
    name = torch.cuda.get_device_name(0) if run.device == "cuda" else run.device
    run.stage["figures"] = {**found, "device": name, "nvidia_smi": card_state()}
    print(
        f"  copy {found['bandwidth'] / 1e12:.2f} TB/s (read + written), "
        f"GEMM bf16 {found['bf16'] / 1e12:.0f} and TF32 {found['tf32'] / 1e12:.0f} TFLOP/s, "
        f"two events alone {found['empty_us']:.1f} us",
        flush=True,
    )


def floors(run: Run) -> None:
    limits, size = run.ceilings(), run.matrix.image_size
    points = [(batch, dtype) for dtype in run.matrix.dtypes for batch in run.matrix.batches]
    run.stage["figures"] = {"tables": [table(batch, dtype, size, limits) for batch, dtype in points]}
    print(
        "\n\n".join(table(run.matrix.batches[0], dtype, size, limits) for dtype in run.matrix.dtypes),
        flush=True,
    )


def baselines(run: Run) -> None:
    from inception_fused import Inception

    run.each(
        run.matrix.points(MODES),
        lambda point: run.time_block(point, "eager", build(Inception, point, run.device)),
        seconds=5,
    )


def kernel_points(matrix: Matrix) -> list[Point]:
    return matrix.points(("forward",))


def launch_rows(run: Run, point: Point) -> list[Row]:
    """A row for each launch of our block, after parity with float64."""
    from inception_fused import FusedInception

    run.gate(point, torch.contiguous_format, backward=True)
    module = build(FusedInception, point, run.device, torch.contiguous_format)
    x, dy = operands(point, run.device)
    weights, biases, _ = module.params()
    return rows_of(run, point, dy, x, weights, biases)


def kernels(run: Run) -> None:
    run.each(kernel_points(run.matrix), lambda point: launch_rows(run, point), seconds=5)


def blocks(run: Run) -> None:
    from inception_fused import FusedInception, Inception, backend

    def time_ours(point: Point) -> list[Row]:
        run.gate(point, torch.channels_last, backward=True)
        # Demanded, not preferred: a fallback must fail here, not be timed as ours.
        with backend("kernels"):
            ours, reference = (build(cls, point, run.device) for cls in (FusedInception, Inception))
            return run.time_block(point, "ours", ours, reference)

    run.each(run.matrix.points(MODES), time_ours, seconds=5)


def two_windows(run: Run) -> None:
    """Our block and eager at each point, and at those of the forward each of our launches."""
    from inception_fused import FusedInception, Inception, backend

    def time_all(point: Point) -> list[Row]:
        run.gate(point, torch.channels_last, backward=True)
        ours, eager = (build(cls, point, run.device) for cls in (FusedInception, Inception))
        rows = run.time_block(point, "eager", eager)
        # Demanded, not preferred: a fallback must fail here, not be timed as ours.
        with backend("kernels"):
            rows += run.time_block(point, "ours", ours, eager)
        return rows + (launch_rows(run, point) if point.mode == "forward" else [])

    run.each(window_points(run.matrix), time_all, seconds=5)


def compile_points(matrix: Matrix) -> list[Point]:
    return matrix.points(("forward", "training"))


def torch_compile(run: Run) -> None:
    from inception_fused import Inception

    def time_compiled(point: Point) -> list[Row]:
        module = build(Inception, point, run.device)
        return run.time_block(point, "compile", compiled(module), module)

    run.each(compile_points(run.matrix), time_compiled, seconds=20)


@dataclass(frozen=True)
class Stage:
    """One stage. name, what: for the reader. points: what it walks in a matrix. seconds: rough cost of one
    point (of the stage, where it has none) on a data-centre card. needs_gpu: False if it is worth running
    without one. patience: longest silence in seconds before it counts as hanging, 0 for the usual.
    """

    name: str
    what: str
    run: Callable[[Run], None]
    seconds: float
    points: Callable[[Matrix], list[Point]] | None = None
    needs_gpu: bool = True
    patience: float = 0.0

    def cost(self, matrix: Matrix) -> float:
        """Rough seconds for the whole stage."""
        return self.seconds * (len(self.points(matrix)) if self.points else 1)


STAGES = (
    Stage(
        "environment",
        "versions, card, driver, commit, hash of the kernel sources",
        environment,
        5,
        needs_gpu=False,
    ),
    Stage("build", "the compiled extension on this card; every Triton binary of GoogLeNet", build_all, 20),
    Stage("tests", "pytest -m gpu tests, in a process of its own", tests, 200, patience=math.inf),
    Stage("parity", "our block and stem against float64, forward and backward, batch 1", parity, 1.0, parity_points),
    Stage(
        "sanitizer",
        "the compiled kernels under compute-sanitizer: memcheck, racecheck, synccheck",
        sanitizer,
        200,
        # Each of its runs has a limit of its own.
        patience=math.inf,
    ),
    Stage("ceilings", "device copy, 8192^3 bf16 and TF32 GEMM", ceilings, 4),
    Stage("floors", "the least time of each kernel under the ceilings", floors, 0.1, needs_gpu=False),
    Stage("baselines", "eager channels_last", baselines, 0.7, lambda matrix: matrix.points(MODES)),
    Stage("kernels", "each of our launches against its floor", kernels, 4, kernel_points),
    Stage("native", "the compiled kernels against their Triton twins and floors", native, 2.0, native_points),
    Stage("blocks", "our block at the baselines' points", blocks, 0.5, lambda matrix: matrix.points(MODES)),
    Stage("stem", "the stem's two convolutions: eager, ours, each of our launches", stem, 3.5, stem_points),
    Stage(TWO, "blocks of two 3x3 in branch 3: eager, ours, each of our launches", two_windows, 3.5, window_points),
    Stage("timeline", "when each launch of a training step runs, eager's and ours", timeline, 10),
    Stage("tune", "tiles timed and the best kept for this card; the stages after it measure with them", tune, 60),
    Stage(
        "suite",
        "pytest benchmarks --benchmark-only",
        suite,
        150,
        # It has a limit of its own.
        patience=math.inf,
    ),
    Stage(
        NORMED,
        "a training step with BatchNorm: eager, ours, torch.compile, each of our launches",
        batch_norm,
        22,
        normed_points,
    ),
    Stage(
        "compile", "torch.compile at the baselines' points, as far as the time goes", torch_compile, 10, compile_points
    ),
    Stage("report", "report.md and pictures, and on a GPU benchmarks/results", report, 10, needs_gpu=False),
)
"""Order is value: a budget that ends early has measured the first ones. The report comes last in any case."""
