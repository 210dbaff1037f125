"""What BatchNorm in training adds to a block, for the tuner: its launches' results, and the truth beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from inception_fused.block import batch_stats
from inception_fused.block.call_types import NormedBackwardCall, NormedCall, NormedSaves
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import BlockTensors, Needs
from inception_fused.block.views import ChannelSlice
from inception_fused.op import normed, normed_operators
from inception_fused.op.launcher import Call, Launcher
from inception_fused.plan import choice, launches
from inception_fused.plan.launches import Row
from inception_fused.plan.problems import Launch
from inception_fused.runtime import aten_norms

EPS = 1e-3
"""Of every BatchNorm."""


def launch_block(shape: BlockShape, tensors: BlockTensors, x: Tensor, dy: Tensor, direction: str) -> None:
    """Every launch of a pass, in Triton, all gradients wanted. BatchNorm has no parameters: none of the launches that
    are timed reads them."""
    chosen, weights = dict.fromkeys(choice.KERNELS, "triton"), tensors.weights
    modes, eps = [batch_stats.BATCH] * len(weights), [EPS] * len(weights)
    y, saved = normed_operators.outputs(x, shape, saves := NormedSaves(True, True, True, True))
    if direction == "forward":
        call = NormedCall(x, tensors._replace(norms=(), eps=eps), modes, True, saves, "kernels")
        launcher = Launcher(chosen, ChannelSlice(x, shape.c, 0, shape.c), shape, x.dtype)
        normed.launch_normed(launcher, call, y.permute(0, 2, 3, 1).flatten(0, 2), saved)
        return
    needs = Needs(True, [True] * len(weights), [True] * len(weights))
    vectors = [(torch.float32, torch.float32, None)] * len(weights)
    call = NormedBackwardCall(dy, x, saved, weights, eps, modes, vectors, True, needs, "kernels")
    normed.normed_backward(call, chosen)


def parts(row: Row, args: tuple[Any, ...]) -> dict[str, ChannelSlice | Tensor]:
    """The operands that a launch writes; "moments" are N1's parts."""
    if row.direction == "forward":
        return {"moments": args[1]} if row.role == launches.STATISTICS else {"y": args[2]}
    if row.role == launches.STATISTICS:
        return {"sums": args[3], "borders": args[4]}
    return {f"g{i}": g for i, g in enumerate(args[4])}


def is_table(problem: Launch, t: Tensor) -> bool:
    """Whether an operand has the statistics or the coefficients of all of a block's columns."""
    return problem.row.role in launches.NORMS and t.shape[1:] == (batch_stats.width(problem.shape),)


def table_values(t: Tensor, generator: torch.Generator | None) -> Tensor:
    """Random numbers for such an operand, of like size: products of normal ones have peaks whose rounding is 12 times
    the bound (N3 y of 3a at batch 32 in bf16), where PEAK_FACTOR is 8."""
    return torch.empty_like(t).uniform_(0.5, 1.0, generator=generator)


def is_in_place(problem: Launch) -> bool:
    """Whether a launch writes where it reads: N6 of r and t."""
    return problem.row.role == launches.NORMALISE and problem.row.direction == "backward" and not problem.apart


def share(call: Call, dy: Tensor) -> dict[int, Tensor]:
    """One fresh buffer for gradient and result of a launch in place, by the ids of what they replace: a run leaves its
    result where the next would read. dy: the gradient's values."""
    old, *_, (g,) = call.args
    buffer = g.base.clone()
    images = buffer.as_strided(old.shape, old.stride(), old.storage_offset())
    images.copy_(dy)
    return {id(g.base): buffer, id(old): images}


def moments(found: Tensor, call: Call, rows: int) -> Tensor:
    """[2, C] in float64: mean and variance that N2 makes of N1's parts, each of ``rows`` rows but for the last. As many
    parts as a tile asks for cannot be compared themselves."""
    x = call.args[0]
    stats = found.new_empty((batch_stats.STATISTICS, x.channels), dtype=torch.float64)
    columns = batch_stats.NormColumns(0, x.channels, batch_stats.BATCH, None, None, None, None, EPS)
    table = ChannelSlice(stats, x.channels, 0, x.channels)
    aten_norms.norm_combine(found.double(), x, [columns], table, gemm_m=call.kwargs["gemm_m"], rows=rows)
    return stats[[batch_stats.MEAN, batch_stats.VAR]]


def behind_mask(call: Call) -> Call:
    """N4 or N6 on what its mask lets pass, and without one: in float64 a value near 0 might lie on its other side."""
    dy, raw, stats, *others = call.args
    n, _, h, w = dy.shape
    rows = raw.rows(n * h * w)
    out = batch_stats.normalised(rows, stats.rows(batch_stats.STATISTICS), rows.dtype)
    g = torch.where(out <= 0, 0, dy.permute(0, 2, 3, 1).flatten(0, 2))
    images = g.unflatten(0, (n, h, w)).permute(0, 3, 1, 2)
    return call._replace(args=(images, raw, stats, *others), kwargs=call.kwargs | {"relu": False})
