"""The block with the masks, r and arg-max of a forward that has been, by PyTorch's own operators.

    y = mask * conv(.)       r = the stored values, whose gradient goes to mask * conv(x)       pool = x at the taps

Its gradients are those that gradients.py computes, by autograd and to any order. The value of a bias or a beta is read
nowhere: what it adds to is masked by bits, or replaced by the stored r.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_fused import folding
from inception_fused.kernels import aten
from inception_fused.kernels.views import BatchNorm, ChannelSlice
from inception_fused.reference import InceptionParams, convolution
from inception_fused.shapes import BlockShape


def masked_block(
    x: Tensor, params: InceptionParams, r: Tensor, bits: Tensor, taps: Tensor, *, relu: bool, shape: BlockShape
) -> Tensor:
    """The block as a function of x [N, C, H, W] and its parameters, given what a forward of this shape saved.

    params: in x's dtype; a bias may be None. r: [M, r_width]; bits: uint8 [M, bits_width]; taps: uint8 [M, taps_width];
    each empty where gradients.saves() does not ask for it. Returns [N, K, H, W], of which only the gradients mean
    anything.
    """

    def picture(rows: Tensor) -> Tensor:
        """[M, C] as [N, C, H, W]."""
        return rows.unflatten(0, (shape.n, shape.h, shape.w)).permute(0, 3, 1, 2)

    def conv(x: Tensor, i: int, mask: Tensor | None) -> Tensor:
        y = convolution(x, params, i)
        return y if mask is None else torch.where(mask, y, 0)

    def reduction(i: int, stored: Tensor | None) -> Tensor:
        """Computed where no gradient reads it."""
        y = conv(x, i, ~(stored <= 0) if relu and stored is not None else None)
        return y if stored is None else _Stored.apply(y, stored.to(y.dtype))

    masks: Sequence[Tensor | None] = [None] * 4
    if bits.numel():
        parts = zip(shape.bits_slices(bits), shape.branch_channels, strict=True)
        masks = [picture(aten.unpack_bits(_columns(bits, part), k)) for part, k in parts]
    r3, r5 = [picture(_columns(r, part)) for part in shape.r_slices(r)] if r.numel() else (None, None)
    if taps.numel():
        indices = aten.indices_of_taps(picture(aten.unpack_taps(taps, shape.c)))
        pooled = x.flatten(2).gather(2, indices.flatten(2)).view_as(x)
    else:
        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    y2, y3 = conv(reduction(1, r3), 2, masks[1]), conv(reduction(3, r5), 4, masks[2])
    return torch.cat((conv(x, 0, masks[0]), y2, y3, conv(pooled, 5, masks[3])), dim=1)


def differentiable_backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    bits: Tensor,
    taps: Tensor,
    tensors: Sequence[Tensor | None],
    needs: Sequence[bool],
    relu: bool,
    eps: Sequence[float],
) -> list[Tensor | None]:
    """The gradients of x and tensors by :func:`masked_block`, for whoever differentiates them again.

    tensors: weights, biases, norms; a vector that wants no gradient and is not read may be None. needs: a flag for x
    and each of them.
    """
    shape, inputs = BlockShape.of(x, tensors[:6]), (x, *tensors)
    wanted = [i for i, need in enumerate(needs) if need]

    def block(*some: Tensor) -> Tensor:
        given = list(inputs)
        for i, t in zip(wanted, some, strict=True):
            given[i] = t
        x, *tensors = given
        weights, biases, norms = folding.split(tensors, eps)
        weights, biases = ([t if t is None else t.to(x.dtype) for t in some] for some in (weights, biases))
        batch_norms = folding.unflatten(norms, eps)
        if batch_norms is not None:
            batch_norms = [_complete(norm, w) for norm, w in zip(batch_norms, weights, strict=True)]
        params = InceptionParams(weights, biases or None, batch_norms)
        return masked_block(x, params, r, bits, taps, relu=relu, shape=shape)

    with torch.autocast(dy.device.type, enabled=False):
        found = torch.func.vjp(block, *(inputs[i] for i in wanted))[1](dy)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    return grads


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
