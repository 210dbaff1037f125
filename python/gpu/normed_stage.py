"""The stage of torchvision's blocks in training: a step with BatchNorm behind every convolution, converted."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from benchmarks.cases.baselines import DTYPES, Point, build, compiled, operands
from benchmarks.cases.networks import batch_norm_block
from benchmarks.cases.records import NORMED
from benchmarks.cases.suite import WINDOWS
from gpu.run import Matrix, Row, Run
from inception_fused.block.reference import InceptionParams
from inception_fused.plan.floors import works
from inception_fused.plan.forecast import forecast


def normed_points(matrix: Matrix) -> list[Point]:
    """Every block at the largest batch, in the first dtype."""
    few = replace(matrix, batches=matrix.batches[:1], dtypes=matrix.dtypes[:1], branch3=WINDOWS[NORMED])
    return few.points(("training",))


def launch_rows(run: Run, point: Point, params: InceptionParams) -> list[Row]:
    """A row for each launch of both passes, weights channels_last."""
    from inception_fused.op import dispatch, normed_operators

    x, dy = operands(point, run.device)
    dtype = DTYPES[point.dtype]
    passes = normed_operators.recorded_launches(x.detach(), dy, params.weights, params.batch_norms)
    limits = {name: works(point.shape, name, normed=True) for name in passes}
    chosen = dispatch.choices("auto", x.device, dtype) if x.device.type == "cuda" else None
    options = {"precision": point.dtype, "training": True, "normed": True, "chosen": chosen}
    said = forecast(point.shape, dtype, run.ceilings(), **options)
    return run.time_launches(point, passes, limits, said, "channels_last")


def batch_norm(run: Run) -> None:
    """At each point, after parity with float64: eager, ours, each of our launches, torch.compile."""
    from inception_fused import backend, testing
    from inception_fused.conversion.fused_blocks import view_of

    def time_all(point: Point) -> list[Row]:
        ours, eager = (
            build(partial(batch_norm_block, fused=fused), point, run.device).train() for fused in (True, False)
        )
        # Demanded, not preferred: a fallback must fail here, not be timed as ours.
        with backend("kernels"):
            testing.assert_parity(ours, operands(replace(point, mode="forward"), run.device)[0])
        rows = run.time_block(point, "eager", eager)
        with backend("kernels"):
            rows += run.time_block(point, "ours", ours, eager)
        rows += launch_rows(run, point, view_of(ours).params())
        rows += run.time_block(point, "compile", compiled(eager), eager)
        return [row | {"block": f"{point.block} {NORMED}"} for row in rows]

    run.each(normed_points(run.matrix), time_all, seconds=20)
