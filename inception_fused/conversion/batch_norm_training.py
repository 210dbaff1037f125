"""A converted block whose BatchNorm takes the statistics of the batch: the call, and the running statistics after it.

What PyTorch's own layer does beside its output happens here, outside the operators: num_batches_tracked goes up, then
running_mean and running_var move by momentum (None: a cumulative average), the variance as the unbiased one, both of
layers that train and track them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from inception_fused.block.batch_stats import COUNT, batch_statistics
from inception_fused.block.reference import InceptionParams
from inception_fused.block.shapes import BlockShape
from inception_fused.conversion.inspection import State
from inception_fused.op import backends, reasons
from inception_fused.op.autograd import eager
from inception_fused.op.calls import check_call, compute_dtype
from inception_fused.op.normed_autograd import normed_call
from inception_fused.op.synchronised import group_name


def train(
    x: Tensor, params: InceptionParams, inside: Sequence[nn.Module], state: State, original: Callable[[Tensor], Any]
) -> Any:
    """x [N, C, H, W] -> [N, K, H, W] in channels_last memory, as ``original`` computes it; moves running statistics.

    params: of the modules ``inside``. Raises KernelError where the backend demands kernels that cannot run.
    """
    layers = [inside[index] if index else None for index in state.norms]
    batch = [layer for layer, norm in zip(layers, params.batch_norms, strict=True) if norm and norm.mean is None]
    group, *others = {group_name(layer) for layer in batch}
    pixels = x.shape[0] * x.shape[2] * x.shape[3]
    if others or (pixels < 2 and not group):
        # Of one value a channel, which PyTorch's own layers refuse, of no image, or shared by some layers only.
        return original(x)
    check_call(x, params, state.activation)
    dtype, backend = compute_dtype(x), backends.current()
    reason = reasons.first(x.device, dtype, backend, x=x, params=params)
    if reason is not None:
        return eager(x, reason.text, backend, original)
    relu = state.activation == "relu"

    def seen(stats: Tensor) -> None:
        found = batch_statistics(stats, BlockShape.of(x, params.weights))
        # How many values all processes have is known on the device alone.
        count = stats[COUNT, 0] if group else pixels
        move([(layer, *own) for layer, own in zip(layers, found, strict=True) if layer in batch], count)

    compiling = torch.compiler.is_compiling()
    options = dict(relu=relu, backend=backend, group=group, seen=None if compiling else seen)
    y, stats = normed_call(x.to(dtype), params, **options)
    if compiling:
        seen(stats)
    return y


@torch.no_grad()
def move(found: Sequence[tuple[nn.Module, Tensor, Tensor]], pixels: int | Tensor) -> None:
    """Moves the running statistics of layers that train and track them.

    found: layers with the mean and the biased variance of their batch. pixels: values a channel.
    """
    layers = [item for item in found if item[0].training and item[0].track_running_stats]
    counts = [norm.num_batches_tracked for norm, *_ in layers if norm.num_batches_tracked is not None]
    if counts:
        torch._foreach_add_(counts, 1)
    running, new, kept, taken = [], [], [], []
    unbiased = pixels / (pixels - 1)
    if isinstance(unbiased, Tensor):
        layers, unbiased = [(norm, mean, var * unbiased) for norm, mean, var in layers], 1.0
    for norm, mean, var in layers:
        if norm.running_mean is None:
            continue
        momentum = norm.momentum
        if momentum is None:
            tracked = norm.num_batches_tracked
            momentum = 0.0 if tracked is None else 1.0 / float(tracked)
        elif isinstance(momentum, Tensor):
            momentum = float(momentum)
        running += [norm.running_mean, norm.running_var]
        new += [mean, var]
        kept += [1 - momentum] * 2
        taken += [momentum, momentum * unbiased]
    if not running:
        return
    if len({id(t) for t in running}) < len(running) or {t.dtype for t in running} != {new[0].dtype}:
        # One after the other where one buffer serves twice, and rounded once where it has fewer bits.
        for t, fresh, old, share in zip(running, new, kept, taken, strict=True):
            t.copy_(fresh * share + t.to(fresh.dtype) * old)
        return
    torch._foreach_mul_(running, kept)
    torch._foreach_add_(running, torch._foreach_mul(new, taken))
