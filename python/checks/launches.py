"""The launches of a block or of the stem, and all of GoogLeNet's, on tensors without data: to be compiled, not run."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from checks.convolutions import convolutions
from inception_fused.block import batch_stats, folding
from inception_fused.block.call_types import (
    BackwardCall,
    ForwardCall,
    NormedBackwardCall,
    NormedCall,
    NormedSaves,
    Saved,
    Saves,
)
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, GOOGLENET_LAUNCHED, Config, spatial_size
from inception_fused.block.tensor_lists import BlockTensors, Needs
from inception_fused.block.views import BatchNorm
from inception_fused.op import forward, gradients, normed_operators, operators
from inception_fused.op.launcher import Launcher, apart, planned_for
from inception_fused.op.normed import launch_normed, normed_backward
from inception_fused.plan import choice
from inception_fused.plan.rules import PLANNED, Capability
from inception_fused.runtime.launch import Launch
from inception_fused.runtime.submit import record


def block_launches(
    config: Config, batch: int, image: tuple[int, int], dtype: torch.dtype, *,
    save: bool, bias: bool = True, activation: str | None = "relu", branch3: int = 5, double: bool = False,
    packed: bool = False, dy_rows: bool = True, batch_norm: bool = False, normed: bool = False,
    capability: Capability = PLANNED, pairs: bool = True,
) -> list[Launch]:  # fmt: skip
    """:func:`launches_on` tensors of a block's or the stem's sizes.

    branch3: the side of a block's branch 3's window. double: it has two windows of 3x3 instead. packed: parameters need
    no pack launch in the forward. batch_norm: fp32 vectors, affine; normed: it takes the statistics of the batch.
    """
    with torch.device("meta"):
        convs = nn.ModuleList(convolutions(config, bias=bias, branch3=branch3, double=double, dtype=dtype))
        x = torch.empty((batch, config.in_channels, *image), dtype=dtype).contiguous(memory_format=torch.channels_last)
    if packed:
        convs = convs.to(memory_format=torch.channels_last)
    weights, biases = [conv.weight for conv in convs], [conv.bias for conv in convs] if bias else []
    plan = dict(relu=activation == "relu", dy_rows=dy_rows, capability=capability, pairs=pairs)
    return launches_on(x, weights, biases, save=save, batch_norm=batch_norm, normed=normed, **plan)


def launches_on(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *, save: bool, relu: bool = True,
    dy_rows: bool = True, batch_norm: bool = False, normed: bool = False, capability: Capability = PLANNED,
    pairs: bool = True,
) -> list[Launch]:  # fmt: skip
    """The launches of one forward of the chains whose weights these are, with save also those of a backward for all
    gradients.

    dy_rows: dy is channels_last (else NCHW). batch_norm: fp32 vectors, affine. normed: there is BatchNorm, and it takes
    the statistics of the batch. capability: of the GPU that they are for. pairs: whether two launches of the forward
    are made as one where the plan says so.
    """
    vectors = [[w.new_empty(w.shape[0], dtype=torch.float32) for _ in range(4)] for w in weights]
    norms = [BatchNorm(*four[:2], *(None, None) if normed else four[2:], 1e-3) for four in vectors]
    norms = norms if batch_norm or normed else None
    shape = choice.BlockShape.of(x, weights)
    chosen = dict.fromkeys(choice.KERNELS, "triton")
    modes = batch_stats.modes_of(norms or [])
    norms, eps = folding.flatten(norms)
    tensors = BlockTensors(weights, biases, norms, eps)
    launcher = Launcher(chosen, operators.ChannelSlice(x, operators.row_stride(x), 0, shape.c), shape, x.dtype)
    with torch.no_grad(), planned_for(capability), record() as launches, nullcontext() if pairs else apart():
        if normed:
            saves = NormedSaves(save, save, True, save)
            y, saved = normed_operators.outputs(x, shape, saves)
            rows = y.permute(0, 2, 3, 1).flatten(0, 2)
            given = saved if save else saved._replace(raw=rows, raw_r=saved.r)
            launch_normed(launcher, NormedCall(x, tensors, modes, relu, saves, "kernels"), rows, given)
        else:
            saves = Saves(True, save and relu, save)
            y, *outputs = operators.outputs(x, shape, saves)
            saved = Saved(*outputs)
            forward.launch_forward(launcher, ForwardCall(x, tensors, relu, saves, "kernels"), y, saved)
        if save:
            dy = y if dy_rows else torch.empty_like(y, memory_format=torch.contiguous_format)
            needs = Needs(True, [True] * len(weights), [bool(biases) or normed] * len(weights))
            if normed:
                wanted = [(torch.float32, torch.float32, weights[0].dtype if biases else None)] * len(weights)
                call = NormedBackwardCall(dy, x, saved, weights, eps, modes, wanted, relu, needs, "kernels")
                normed_backward(call, chosen)
            else:
                dtypes = [b.dtype for b in biases]
                call = BackwardCall(dy, x, saved, weights, dtypes, relu, needs, "kernels")
                gradients.block_backward(call, chosen)
    return launches


def googlenet_cases(double: bool = False, *, normed: bool = False) -> Iterator[tuple[str, dict[str, Any]]]:
    """("stem" or block, block_launches' arguments) of inference and training of the stem's convolutions and of the nine
    blocks at 224x224, batch 1, 32, 128.

    double: with two windows of 3x3 in branch 3. normed: with BatchNorm, which inference folds and training computes of
    the batch, and without biases; PyTorch then computes the stem.
    """
    for name, config in (GOOGLENET_BLOCKS if normed else GOOGLENET_LAUNCHED).items():
        side = spatial_size(name)
        for batch, save in itertools.product((1, 32, 128), (False, True)):
            # The gradient that comes out of the average pool behind 5b is NCHW.
            at = dict(config=config, batch=batch, image=(side, side), double=double)
            norms = dict(bias=False, batch_norm=not save, normed=save) if normed else {}
            yield name, dict(**at, **norms, save=save, dy_rows=name != "5b")


def googlenet_launches(
    dtype: torch.dtype, double: bool = False, capability: Capability = PLANNED, *, pairs: bool = True
) -> Iterator[tuple[str, Launch]]:
    """Every launch of :func:`googlenet_cases`, with its block or "stem"."""
    for name, case in googlenet_cases(double):
        for launch in block_launches(**case, dtype=dtype, capability=capability, pairs=pairs):
            yield name, launch
