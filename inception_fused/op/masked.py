"""The block with the masks, r and arg-max of a forward that has been, by PyTorch's own operators.

    y = mask * conv(.)       r = the stored values, whose gradient goes to mask * conv(x)       pool = x at the taps

Its gradients are those that gradients.py computes, by autograd and to any order. The value of a bias or a beta is read
nowhere: what it adds to is masked by bits, or replaced by the stored r.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_fused.block import batch_stats, folding
from inception_fused.block.batch_stats import BATCH, NONE
from inception_fused.block.call_types import NormedSaved, Saved
from inception_fused.block.chains import PROJECTION, from_outputs, variant_of
from inception_fused.block.reference import InceptionParams, convolution
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import BlockTensors, Flags
from inception_fused.block.views import BatchNorm, ChannelSlice
from inception_fused.runtime import aten


def masked_block(x: Tensor, params: InceptionParams, saved: Saved, *, relu: bool, shape: BlockShape) -> Tensor:
    """The block as a function of x [N, C, H, W] and its parameters, given what a forward of this shape saved.

    params: in x's dtype; a bias may be None. saved: each empty where gradients.saves() does not ask for it. Returns
    [N, K, H, W], of which only the gradients mean anything.
    """
    r, bits, taps = saved
    variant = variant_of(params.weights)

    def picture(rows: Tensor) -> Tensor:
        """[M, C] as [N, C, H, W]."""
        return rows.unflatten(0, (shape.n, shape.h, shape.w)).permute(0, 3, 1, 2)

    def conv(x: Tensor, i: int) -> Tensor:
        y = convolution(x, params, i)
        if masks[i] is not None:
            y = torch.where(masks[i], y, 0)
        return y if stored[i] is None else _Stored.apply(y, stored[i].to(y.dtype))

    outer: Sequence[Tensor | None] = [None for _ in variant.places]
    if bits.numel():
        parts = zip(shape.bits_slices(bits), shape.branch_channels, strict=True)
        outer = [picture(aten.unpack_bits(_columns(bits, part), k)) for part, k in parts]
    # An inner output that no gradient reads is not there, and computed.
    inner = [picture(_columns(r, part)) if r.numel() else None for part in shape.r_slices(r)]
    masks = from_outputs(outer, [~(t <= 0) if relu and t is not None else None for t in inner])
    stored = from_outputs([None for _ in variant.places], inner)
    branches = []
    for places in variant.places:
        y = x
        for i in places:
            y = conv(_pooled(y, taps, shape, picture) if variant.convs[i].role == PROJECTION else y, i)
        branches.append(y)
    return torch.cat(branches, dim=1)


def differentiable_backward(
    dy: Tensor, x: Tensor, saved: Saved, tensors: BlockTensors, needs: Flags, relu: bool,
    modes: Sequence[int] | None = None,
) -> list[Tensor | None]:  # fmt: skip
    """The gradients of x and tensors by :func:`masked_block`, for whoever differentiates them again.

    tensors: a vector that wants no gradient and is not read may be None. needs: the wanted gradients. modes: of the
    convolutions, as batch_stats.py has them; None where no BatchNorm takes the statistics of the batch.
    """
    shape, inputs = BlockShape.of(x, tensors.weights), [x, *tensors.flat]
    wanted = [i for i, need in enumerate(needs.flat) if need]

    def block(*some: Tensor) -> Tensor:
        given = list(inputs)
        for i, t in zip(wanted, some, strict=True):
            given[i] = t
        x, *flat = given
        weights, biases, norms, eps = BlockTensors.of(flat, tensors.eps)
        weights, biases = ([t if t is None else t.to(x.dtype) for t in some] for some in (weights, biases))
        params = folding.params_of(BlockTensors(weights, biases, norms, eps))
        if modes is not None:
            normed = folding.unflatten(norms, eps, [mode != NONE for mode in modes])
            batch = [
                norm._replace(mean=None, var=None) if mode == BATCH else norm
                for norm, mode in zip(normed, modes, strict=True)
            ]
            params = params._replace(batch_norms=tuple(batch))
        elif params.batch_norms is not None:
            each = zip(params.batch_norms, weights, strict=True)
            complete = [None if norm is None else _complete(norm, w) for norm, w in each]
            params = params._replace(batch_norms=tuple(complete))
        return masked_block(x, params, saved, relu=relu, shape=shape)

    with torch.autocast(dy.device.type, enabled=False):
        found = torch.func.vjp(block, *(inputs[i] for i in wanted))[1](dy)
    grads: list[Tensor | None] = [None for _ in inputs]
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    return grads


def saved_of(outputs: NormedSaved, shape: BlockShape, relu: bool) -> Saved:
    """What a forward with batch statistics has saved in the form of one without: the mask bits are those of its y."""
    bits = outputs.taps.new_empty((0,))
    if relu and outputs.raw.numel():
        y = batch_stats.normalised(outputs.raw, outputs.stats[:, : shape.k], outputs.raw.dtype)
        bits = torch.cat([aten.pack_bits(branch) for branch in y.split(shape.branch_channels, dim=1)], dim=1)
    return Saved(outputs.r, bits, outputs.taps)


def _pooled(x: Tensor, taps: Tensor, shape: BlockShape, picture: Callable[[Tensor], Tensor]) -> Tensor:
    """x at the taps, or its own maxima where none were saved."""
    if not taps.numel():
        return F.max_pool2d(x, 3, stride=1, padding=1)
    indices = aten.indices_of_taps(picture(aten.unpack_taps(taps, shape.c)))
    return x.flatten(2).gather(2, indices.flatten(2)).view_as(x)


def _columns(rows: Tensor, part: ChannelSlice) -> Tensor:
    """ChannelSlice.rows() by a slice, since vmap knows no storage offset."""
    return rows[:, part.c_offset : part.c_offset + part.channels]


def _complete(norm: BatchNorm, w: Tensor) -> BatchNorm:
    """With any vectors in the place of those that are not read."""
    zeros = w.new_zeros(w.shape[0])
    mean, var = (zeros if t is None else t for t in (norm.mean, norm.var))
    return norm._replace(mean=mean, var=var)


class _Stored(torch.autograd.Function):
    """``stored``, whose gradient goes to y. ``stored + (y - y.detach())`` would be NaN where y is infinite."""

    generate_vmap_rule = True

    @staticmethod
    def forward(y: Tensor, stored: Tensor) -> Tensor:
        return stored.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None
