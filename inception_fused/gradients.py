"""The backward of a block, in ATen calls, from what its forward saved. No kernel of ours runs here yet.

    g_i  = dy_i where bit_i, else 0                         i = 1..4, the slices of dy
    dr3  = dgrad(g2, w2) where not (r3 <= 0), else 0        dr5 likewise from g3
    dx   = g1 @ w1 + dr3 @ w2_reduce + dr5 @ w3_reduce + scatter of (g4 @ w4) to the arg-max taps
    dw   = wgrad(g, x), wgrad(g2, r3), wgrad(g3, r5), and for w4 wgrad(g4, max_pool(x)) with the maximum recomputed
    db   = sums of g and dr over N, H, W

The masks are the forward's own bits and r, so that a rounding difference cannot flip one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_fused.kernels.aten import WINDOW, indices_of_taps, unpack_bits, unpack_taps
from inception_fused.plan import BlockShape

NUM_INPUTS = 13
"""x, six weights, six biases: the order of every list of gradients."""


def saves(needs: Sequence[bool], relu: bool) -> tuple[bool, bool, bool]:
    """Whether forward must keep (r, bits, taps) for the wanted gradients.

    needs: 13 flags for x, six weights, six biases.
    """
    x, _, w2_reduce, w2, w3_reduce, w3, _, _, b2_reduce, _, b3_reduce, _, _ = needs
    r_as_mask = relu and (x or w2_reduce or w3_reduce or b2_reduce or b3_reduce)
    return w2 or w3 or r_as_mask, relu and any(needs), x


def block_backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    bits: Tensor,
    taps: Tensor,
    weights: Sequence[Tensor],
    *,
    relu: bool,
    needs: Sequence[bool],
) -> list[Tensor | None]:
    """The 13 gradients, None where not wanted.

    dy: [N, K, H, W], any strides. x: [N, C, H, W]. r: [M, r_width]. bits: uint8 [M, bits_width]. taps: uint8
    [M, taps_width]; M = N*H*W, each empty where :func:`saves` does not ask for it. weights: six, any floating dtype.
    Returns dx in x's dtype and channels_last memory, weight gradients in their weight's dtype and strides.
    """
    shape = BlockShape.of(x, weights)
    image = (shape.n, shape.h, shape.w)
    w1, w2_reduce, w2, w3_reduce, w3, w4 = (w.to(x.dtype) for w in weights)
    need_x, need_w, need_b = needs[0], needs[1:7], needs[7:13]
    grad_w: list[Tensor | None] = [None] * 6
    grad_b: list[Tensor | None] = [None] * 6

    g = list(dy.to(x.dtype).split(shape.branch_channels, dim=1))
    if relu and bits.numel():
        for i, part in enumerate(shape.bits_slices(bits)):
            passes = unpack_bits(part.rows(shape.gemm_m), shape.branch_channels[i])
            g[i] = torch.where(_images(passes, image), g[i], 0)

    def conv(i: int, g: Tensor, x: Tensor, w: Tensor, need_input: bool) -> Tensor | None:
        """dgrad of convolution i; its wgrad and bias gradient go to their places."""
        wanted = [need_input, need_w[i], need_b[i]]
        if not any(wanted):
            return None
        pad = [w.shape[-1] // 2] * 2
        dx, grad_w[i], grad_b[i] = torch.ops.aten.convolution_backward(
            g, x, w, [w.shape[0]], [1, 1], pad, [1, 1], False, [0, 0], 1, wanted
        )
        return dx

    parts = [conv(0, g[0], x, w1, need_x)]
    for i, g_i, w_i, reduce, r_i in zip((2, 4), g[1:3], (w2, w3), (w2_reduce, w3_reduce), (0, 1), strict=True):
        need_dr = need_x or need_w[i - 1] or need_b[i - 1]
        if r.numel():
            r_image = _images(shape.r_slices(r)[r_i].rows(shape.gemm_m), image)
        else:
            r_image = x.new_empty((shape.n, reduce.shape[0], shape.h, shape.w)).fill_(0)
        dr = conv(i, g_i, r_image, w_i, need_dr)
        if dr is not None and need_dr:
            dr = torch.where(r_image <= 0, 0, dr) if relu else dr
            parts.append(conv(i - 1, dr, x, reduce, need_x))
    pooled = F.max_pool2d(x, WINDOW, stride=1, padding=1) if need_w[5] else x
    dpool = conv(5, g[3], pooled, w4, need_x)

    dx = None
    if need_x:
        indices = indices_of_taps(_images(unpack_taps(taps, shape.c), image)).contiguous(
            memory_format=torch.channels_last
        )
        x_dense = x.contiguous(memory_format=torch.channels_last)
        dx = torch.ops.aten.max_pool2d_with_indices_backward(
            dpool.contiguous(memory_format=torch.channels_last),
            x_dense, [WINDOW, WINDOW], [1, 1], [1, 1], [1, 1], False, indices,
        )  # fmt: skip
        for part in parts:
            dx = dx + part
        dx = torch.empty_like(x, memory_format=torch.channels_last).copy_(dx)
    for i, w in enumerate(weights):
        if need_w[i]:
            grad_w[i] = torch.empty_like(w).copy_(grad_w[i])
    return [dx, *(d if n else None for d, n in zip(grad_w, need_w, strict=True)), *grad_b]


def _images(rows: Tensor, image: tuple[int, int, int]) -> Tensor:
    """[N*H*W, C] -> [N, C, H, W] in channels_last strides."""
    return rows.unflatten(0, image).permute(0, 3, 1, 2)
