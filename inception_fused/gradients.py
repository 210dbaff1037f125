"""The backward of a block from what its forward saved: which gradients need what, and the launches that make them.

    g    = dy where its mask bit is set, else 0, as rows [g2 | g3 | g4 | g1]                      B1
    dr   = dgrad(g2, w2) where not (r3 <= 0), else 0; likewise from g3; behind g in the same rows   B2
    dx   = [g1 | dr3 | dr5] @ [w1; w2_reduce; w3_reduce], and g4 @ w4 sent to the arg-max taps      B2, B3
    dw   = wgrad([g1 | dr3 | dr5], x), wgrad(g2, r3), wgrad(g3, r5), wgrad(g4, max_pool(x))         B4, B5
    db   = sums of g and dr over N, H, W                                                          B1, B2, B5

The masks are the forward's own bits and r, so that a rounding difference cannot flip one. Only what the wanted
gradients need is launched. Every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from inception_fused import dispatch, native, plan, tuned
from inception_fused.kernels import aten
from inception_fused.kernels.views import (
    ChannelSlice,
    PackedDgrad,
    Partials,
    Tile,
    accumulator_of,
    row_stride,
    wide_rows,
)
from inception_fused.shapes import BlockShape

NUM_INPUTS = 13
"""x, six weights, six biases: the order of every list of gradients."""


def saves(needs: Sequence[bool], relu: bool) -> tuple[bool, bool, bool]:
    """Whether forward must keep (r, bits, taps) for the wanted gradients.

    needs: 13 flags for x, six weights, six biases.
    """
    wanted = Wanted.of(needs)
    return wanted.w2 or wanted.w3 or (relu and (wanted.dr3 or wanted.dr5)), relu and any(needs), wanted.x


class Wanted(NamedTuple):
    """What has to be computed for the wanted gradients.

    x: dx, with dpool; dr3, dr5: the gradients to the reductions' outputs; group: which of g1, dr3 and dr5 (0, 1, 2)
    are multiplied with x for their weights' gradients; w2, w3, w4: the other weights' gradients; out, reduce: the
    gradients of any of the branches' biases, of the reductions' biases.
    """

    x: bool
    dr3: bool
    dr5: bool
    group: tuple[int, ...]
    w2: bool
    w3: bool
    w4: bool
    out: bool
    reduce: bool

    @classmethod
    def of(cls, needs: Sequence[bool]) -> Wanted:
        """needs: 13 flags for x, six weights, six biases."""
        x, w1, w2_reduce, w2, w3_reduce, w3, w4, b1, b2_reduce, b2, b3_reduce, b3, b4 = needs
        return cls(
            x=x,
            dr3=x or w2_reduce or b2_reduce,
            dr5=x or w3_reduce or b3_reduce,
            group=tuple(i for i, need in enumerate((w1, w2_reduce, w3_reduce)) if need),
            w2=w2,
            w3=w3,
            w4=w4,
            out=b1 or b2 or b3 or b4,
            reduce=b2_reduce or b3_reduce,
        )


class Launchers(NamedTuple):
    """The implementations chosen for one block's backward."""

    chosen: Mapping[str, str]
    dtype: torch.dtype
    gpu: tuned.Gpu | None = None

    def tile(self, kernel: str, gemm_m: int, gemm_n: int, gemm_k: int, unit: int) -> Tile | None:
        """The tile of one launch; None for the ATen twin. kernel: a key of plan.RULES."""
        choice = self.chosen[kernel[:2]]
        if choice == "eager":
            return None
        if choice == "native":
            return plan.native_tile(kernel, self.dtype, gemm_m=gemm_m, gemm_n=gemm_n, unit=unit)
        if dispatch.interpreting():
            return plan.interpreter_tile(gemm_m, gemm_n, gemm_k)
        sizes = dict(gemm_m=gemm_m, gemm_n=gemm_n, gemm_k=gemm_k)
        return plan.choose_tile(kernel, self.dtype, **sizes, unit=unit, gpu=self.gpu)

    def launcher(self, kernel: str, tile: Tile | None, unit: int) -> Callable[..., None]:
        if tile is None:
            return _TWINS[kernel[:2]]
        if self.chosen[kernel[:2]] == "native":
            return partial(native.grouped_dgrad, tile=tile, unit=unit)
        return partial(_triton(kernel[:2]), tile=tile, unit=unit)


_TWINS = {
    "B1": aten.mask_grad,
    "B2": aten.conv_dgrad,
    "B3": aten.grouped_dgrad,
    "B4": aten.conv_wgrad,
}


def _triton(kernel: str) -> Callable[..., None]:
    """The launcher of one kernel. Imported late: Triton is not everywhere."""
    from inception_fused.kernels.conv_dgrad import conv_dgrad
    from inception_fused.kernels.conv_wgrad import conv_wgrad
    from inception_fused.kernels.grouped_dgrad import grouped_dgrad
    from inception_fused.kernels.mask_grad import mask_grad

    return {"B1": mask_grad, "B2": conv_dgrad, "B3": grouped_dgrad, "B4": conv_wgrad}[kernel]


def block_backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    bits: Tensor,
    taps: Tensor,
    weights: Sequence[Tensor],
    bias_dtypes: Sequence[torch.dtype],
    *,
    relu: bool,
    needs: Sequence[bool],
    chosen: Mapping[str, str],
) -> list[Tensor | None]:
    """The 13 gradients, None where not wanted.

    dy: [N, K, H, W], any strides. x: [N, C, H, W]. r: [M, r_width]. bits: uint8 [M, bits_width]. taps: uint8
    [M, taps_width]; M = N*H*W, each empty where :func:`saves` does not ask for it. weights: six of any
    floating dtype. bias_dtypes: of six biases or none, of which no value is read. chosen: implementation of B1 to B5.
    Nothing given is written.
    Returns dx in x's dtype and channels_last memory, each other gradient in its parameter's dtype and strides.
    """
    shape, wanted = BlockShape.of(x, weights), Wanted.of(needs)
    grads = [torch.empty_like(w) if need else None for w, need in zip(weights, needs[1:7], strict=True)]
    vectors = zip(weights, bias_dtypes or (None,) * 6, needs[7:], strict=True)
    grads += [x.new_empty(w.shape[0], dtype=dtype) if need else None for w, dtype, need in vectors]
    dx = torch.empty_like(x, memory_format=torch.channels_last) if wanted.x else None
    if shape.gemm_m == 0:
        return [dx, *(grad.zero_() if grad is not None else None for grad in grads)]
    stride = row_stride(x)
    if stride is None:
        x = x.contiguous(memory_format=torch.channels_last)
        stride = row_stride(x)
    launchers = Launchers(chosen, x.dtype, tuned.key(x.device))
    rows = _Rows(shape, ChannelSlice(x, stride, 0, shape.c), r, dy.to(x.dtype), launchers, wanted)
    packed = rows.pack(weights)
    out = rows.mask(bits if relu and bits.numel() else None)
    reduce = rows.dgrad(packed, relu)
    if dx is not None:
        rows.input_grad(packed, taps, dx, reduce)
    rows.finish(rows.wgrad(weights)._replace(out=out, reduce=reduce), weights, grads)
    return [dx, *grads]


class _Rows:
    """One backward pass: the buffer of gradient rows, filled step by step. See BlockShape.grads_width."""

    def __init__(
        self, shape: BlockShape, x: ChannelSlice, r: Tensor, dy: Tensor, launchers: Launchers, wanted: Wanted
    ) -> None:
        self.shape, self.x, self.r, self.dy, self.launchers, self.wanted = shape, x, r, dy, launchers, wanted
        dtype = dy.dtype
        self.grads = dy.new_empty((shape.gemm_m, shape.grads_width))
        self.place = {"gemm_m": shape.gemm_m, "image": (shape.h, shape.w)}
        self.unit = plan.backward_unit(shape, dtype)
        aligned = x.base.is_meta or x.base.data_ptr() % 16 == 0
        self.x_unit = plan.backward_unit(shape, dtype, x.row_stride, aligned=aligned)
        self.accumulator = accumulator_of(dtype)

    def pack(self, weights: Sequence[Tensor]) -> PackedDgrad:
        """The weights that dgrad needs, in one launch."""
        flags = (self.wanted.dr3, self.wanted.dr5, self.wanted.x, self.wanted.x)
        arguments = dict(r5=self.shape.r5_offset, r_width=self.shape.r_width, wanted=flags)
        if "triton" not in (self.launchers.chosen[kernel] for kernel in plan.BACKWARD):
            return aten.pack_dgrad(weights, self.dy.dtype, **arguments)
        from inception_fused.kernels.pack_dgrad import pack_dgrad

        if dispatch.interpreting():
            filters, channels = (max(w.shape[dim] for w in weights) for dim in (0, 1))
            arguments["tile"] = plan.interpreter_tile(filters, channels, 1)
        return pack_dgrad(weights, self.dy.dtype, **arguments, unit=self.unit)

    def mask(self, bits: Tensor | None) -> Tensor | None:
        """B1: g into its columns. Returns the sums that the branches' biases want."""
        shape = self.shape
        kernel = "B1" if wide_rows(self.dy, self.unit) is not None else "B1 strided"
        tile = self.launchers.tile(kernel, shape.gemm_m, max(shape.branch_channels), plan.B1_GEMM_K, self.unit)
        ranges = plan.row_ranges(shape.gemm_m, tile.BLOCK_M) if tile else (1, 1)
        sums = self.dy.new_empty((ranges[0], shape.k), dtype=self.accumulator) if self.wanted.out else None
        all_bits = ChannelSlice(bits, shape.bits_width, 0, shape.bits_width) if bits is not None else None
        launch = self.launchers.launcher("B1", tile, self.unit)
        launch(self.dy, all_bits, shape.g_slices(self.grads), sums, ranges=ranges)
        return sums

    def dgrad(self, packed: PackedDgrad, relu: bool) -> Tensor | None:
        """B2 for both reductions' outputs, as far as wanted. Returns the sums that their biases want."""
        shape = self.shape
        gs, drs = shape.g_slices(self.grads)[1:3], shape.dr_slices(self.grads)
        masks = shape.r_slices(self.r) if relu and self.r.numel() else (None, None)
        sums = first = None
        for g, w_t, r, dr, start, end in zip(
            gs, packed[:2], masks, drs, (0, shape.r5_offset), (shape.r5_offset, shape.r_width), strict=True
        ):
            if w_t is None:
                continue
            tile = self.launchers.tile("B2", shape.gemm_m, end - start, g.channels, self.unit)
            first = first or tile
            if tile and tile.BLOCK_M != first.BLOCK_M:
                # Both need as many sums, hence tiles of the same height, which a table may not give.
                tile = first
            if sums is None and self.wanted.reduce:
                tiles = -(-shape.gemm_m // tile.BLOCK_M) if tile else 1
                sums = self.dy.new_empty((tiles, shape.r_width), dtype=self.accumulator)
            part = ChannelSlice(sums, shape.r_width, start, dr.channels) if sums is not None else None
            launch = self.launchers.launcher("B2", tile, self.unit)
            launch(g, w_t, r, dr, part, width=end - start, **self.place)
        return sums

    def input_grad(self, packed: PackedDgrad, taps: Tensor, dx: Tensor, sums: Tensor | None) -> None:
        """B2 for branch 4, then B3. sums: dgrad()'s, of which no column is written."""
        shape, unit = self.shape, self.unit
        g4 = shape.g_slices(self.grads)[3]
        dpool = ChannelSlice(self.dy.new_empty((shape.gemm_m, shape.c)), shape.c, 0, shape.c)
        tile = self.launchers.tile("B2", shape.gemm_m, shape.c, shape.k4, unit)
        launch = self.launchers.launcher("B2", tile, unit)
        unsummed = ChannelSlice(sums, shape.r_width, 0, 0) if sums is not None else None
        launch(g4, packed.w4, None, dpool, unsummed, width=shape.c, **self.place)
        columns = shape.reductions_slice(self.grads, 0, shape.k1 + shape.r_width)
        tile = self.launchers.tile("B3", shape.gemm_m, shape.c, columns.channels, unit)
        launch = self.launchers.launcher("B3", tile, unit)
        launch(columns, packed.grouped, dpool, taps, ChannelSlice(dx, shape.c, 0, shape.c), **self.place)

    def wgrad(self, weights: Sequence[Tensor]) -> Partials:
        """B4 as often as wanted."""
        shape, wanted = self.shape, self.wanted
        _, g2, g3, g4 = shape.g_slices(self.grads)
        r3, r5 = shape.r_slices(self.r) if wanted.w2 or wanted.w3 else (None, None)
        total = sum(w.numel() for w in weights)
        group = w2 = w3 = w4 = None
        if wanted.group:
            first, last = self.group_columns()
            columns = shape.reductions_slice(self.grads, first, last)
            group = self._wgrad(columns, self.x, 1, total, self.x_unit).flatten(2)
        if wanted.w2:
            w2 = self._wgrad(g2, r3, weights[2].shape[-1], total, self.unit)
        if wanted.w3:
            w3 = self._wgrad(g3, r5, weights[4].shape[-1], total, self.unit)
        if wanted.w4:
            w4 = self._wgrad(g4, self.x, 1, total, self.x_unit, pool=True)
        return Partials(group, w2, w3, w4)

    def group_columns(self) -> tuple[int, int]:
        """(first, last) column of [g1 | dr3 | dr5] whose weights want a gradient; (0, 0) for none."""
        if not self.wanted.group:
            return 0, 0
        places = self.shape.reductions
        return places[self.wanted.group[0]][0], places[self.wanted.group[-1]][1]

    def _wgrad(self, g: ChannelSlice, x: ChannelSlice, r: int, total: int, unit: int, *, pool: bool = False) -> Tensor:
        kernel, m, columns = "B4 pool" if pool else "B4", self.shape.gemm_m, r * r * x.channels
        tile, splits = self.launchers.tile(kernel, g.channels, columns, m, unit), 1
        if tile is not None:
            tiles = -(-g.channels // tile.BLOCK_M) * -(-columns // tile.BLOCK_N)
            splits = plan.split_k(tiles, -(-m // tile.BLOCK_K), total)
        part = self.dy.new_empty((splits, g.channels, r, r, x.channels), dtype=self.accumulator)
        self.launchers.launcher(kernel, tile, unit)(g, x, part, pool=pool, **self.place)
        return part

    def finish(self, partials: Partials, weights: Sequence[Tensor], grads: list[Tensor | None]) -> None:
        """B5: every parameter's gradient from its partial sums."""
        if not any(grad is not None for grad in grads):
            return
        shape = self.shape
        outs = [_reducible(grad) if grad is not None else None for grad in grads]
        arguments = dict(first=self.group_columns()[0], r5=shape.r5_offset, r_width=shape.r_width)
        filters = [w.shape[0] for w in weights]
        if self.launchers.chosen["B5"] == "eager":
            aten.reduce(partials, outs, filters, shape.c, **arguments)
        else:
            from inception_fused.kernels.reduce import reduce

            if dispatch.interpreting():
                most = max(out.numel() for out in outs if out is not None)
                rows = max(part.shape[0] for part in partials if part is not None)
                wide = max(16, 1 << most.bit_length())
                arguments["tile"] = Tile(1 if rows == 1 else 4, min(wide, plan.INTERPRETER_BLOCK), 1)
            reduce(partials, outs, filters, shape.c, **arguments, unit=self.unit)
        for grad, out in zip(grads, outs, strict=True):
            if out is not grad:
                grad.copy_(out)


def _reducible(grad: Tensor) -> Tensor:
    """Where B5 writes: the gradient itself, or dense memory beside one whose strides are neither KCRS nor KRSC."""
    if grad.is_contiguous() or (grad.dim() == 4 and grad.is_contiguous(memory_format=torch.channels_last)):
        return grad
    return torch.empty_like(grad, memory_format=torch.contiguous_format)
