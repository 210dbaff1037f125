"""A row for each of our launches at a point, beside what the forecast says of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from benchmarks.cases.baselines import DTYPES, Point
from gpu.run import Row, Run
from inception_fused.plan.cards import Ceilings
from inception_fused.plan.floors import works
from inception_fused.plan.forecast import Forecast, forecast


def predicted(point: Point, ceilings: Ceilings, device: torch.device) -> list[Forecast]:
    """What plan/forecast.py says of each launch, in order, with the rules' tiles, no tuned ones."""
    from inception_fused.op import dispatch

    dtype = DTYPES[point.dtype]
    chosen = dispatch.choices("auto", device, dtype) if device.type == "cuda" else None
    options = {"precision": point.dtype, "training": True, "packs": True, "chosen": chosen}
    return forecast(point.shape, dtype, ceilings, **options)


def rows_of(
    run: Run, point: Point, dy: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor]
) -> list[Row]:
    """Of both passes; parameters in PyTorch's own layout, so that pack is among them. pass: "forward" or "backward"."""
    from inception_fused.op import operators

    with torch.no_grad():
        passes = {
            "forward": operators.forward_launches(x, weights, biases),
            "backward": operators.backward_launches(dy, x, weights, biases),
        }
    limits = {name: works(point.shape, name, packs=name == "forward") for name in passes}
    return run.time_launches(point, passes, limits, predicted(point, run.ceilings(), x.device))
