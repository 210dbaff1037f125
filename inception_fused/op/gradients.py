"""The backward of a block from what its forward saved: which gradients need what, and the launches that make them.

    g    = dy where its mask bit is set, else 0, as rows [g2 | g3 | g4 | g1]
    dr   = dgrad(g2, w2) where not (r3 <= 0), else 0; likewise from g3, by way of dt where branch 3 has two windows;
           behind g in the same rows
    dx   = [g1 | dr3 | dr5] @ [w1; w2_reduce; w3_reduce], and g4 @ w4 sent to the arg-max taps
    dw   = wgrad([g1 | dr3 | dr5], x), wgrad(g2, r3), wgrad(g3, r5), wgrad(g4, max_pool(x));
           of two windows wgrad(dt, r5), wgrad(g3, t)
    db   = sums of g and dr over N, H, W

The masks are the forward's own bits and r, so that a rounding difference cannot flip one. Only what the wanted
gradients need is launched. Every sum has a fixed order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.call_types import BackwardCall, NormedSaved, Saved, Saves
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import Needs
from inception_fused.block.views import ChannelSlice, PackedDgrad, Partials, Tile, accumulator_of, row_stride, wide_rows
from inception_fused.op.launcher import Launcher
from inception_fused.plan import choice, launches
from inception_fused.plan.launches import Row


def saves(needs: Needs, relu: bool) -> Saves:
    """What forward must keep for the wanted gradients."""
    wanted = Wanted.of(needs)
    r = any(wanted.windows) or (relu and any(wanted.inner))
    return Saves(r, relu and any(needs.flat), wanted.x and chains.has_pool(needs.weights))


class Wanted(NamedTuple):
    """What has to be computed for the wanted gradients.

    x: dx, with dpool where there is a pool. inner: the gradients to the parts of r. group: which reductions want their
    weights' gradients, by place among them. windows, projection: the other weights' gradients. out, reduce: the
    gradients of any bias of a branch's last convolution, of the others.
    """

    x: bool
    inner: tuple[bool, ...]
    group: tuple[int, ...]
    windows: tuple[bool, ...]
    projection: bool
    out: bool
    reduce: bool

    @classmethod
    def of(cls, needs: Needs) -> Wanted:
        x, weights, biases = needs
        return cls(
            x=x,
            inner=tuple(chains.windows(needs.to_inputs)),
            group=tuple([i for i, need in enumerate(chains.reductions(weights)) if need]),
            windows=tuple(chains.windows(weights)),
            projection=bool(chains.projection(weights)),
            out=any(chains.ends(biases)),
            reduce=any(chains.inner(biases)),
        )


def block_backward(call: BackwardCall, chosen: Mapping[str, str]) -> list[Tensor | None]:
    """The gradients of x, weights and biases, None where not wanted.

    chosen: implementation by kernel, as dispatch.choices() gives it. Nothing given is written. Returns dx in x's dtype
    and channels_last memory, each other gradient in its parameter's dtype and strides.
    """
    x, weights, needs = call.x, call.weights, call.needs
    shape, wanted = BlockShape.of(x, weights), Wanted.of(needs)
    grads = [torch.empty_like(w) if need else None for w, need in zip(weights, needs.weights, strict=True)]
    vectors = zip(weights, call.bias_dtypes or (None,) * len(weights), needs.biases, strict=True)
    grads += [x.new_empty(w.shape[0], dtype=dtype) if need else None for w, dtype, need in vectors]
    dx = torch.empty_like(x, memory_format=torch.channels_last) if wanted.x else None
    if shape.gemm_m == 0:
        return [dx, *(grad.zero_() if grad is not None else None for grad in grads)]
    stride = row_stride(x)
    if stride is None:
        x = x.contiguous(memory_format=torch.channels_last)
        stride = row_stride(x)
    launcher = Launcher(chosen, ChannelSlice(x, stride, 0, shape.c), shape, x.dtype)
    rows = Rows(launcher, call.dy.to(x.dtype), call.saved, weights, call.relu, wanted)
    rows.run(dx, grads)
    return [dx, *grads]


class Rows:
    """One backward pass: the buffer of gradient rows, filled step by step. See BlockShape.grads_width.

    dy: in the dtype of the kernels. saved: r and taps, and what :meth:`mask` reads. normed: whether its launches are
    those of BatchNorm with the statistics of the batch (normed.py).
    """

    normed = False

    def __init__(
        self, launcher: Launcher, dy: Tensor, saved: Saved | NormedSaved, weights: Sequence[Tensor], relu: bool,
        wanted: Wanted,
    ) -> None:  # fmt: skip
        self.launcher, self.shape, self.wanted = launcher, launcher.shape, wanted
        self.dy, self.saved, self.weights, self.relu = dy, saved, weights, relu
        self.grads = self.dy.new_empty((self.shape.gemm_m, self.shape.grads_width))
        self.branches, self.inner = self.shape.g_slices(self.grads), self.shape.dr_slices(self.grads)
        self.gradients = chains.from_outputs(self.branches, self.inner)
        """To every convolution's output, behind its mask."""
        self.rows = launches.table_of(self.shape.filters, normed=self.normed).backward
        self.place = {"gemm_m": self.shape.gemm_m, "image": self.shape.image}
        self.accumulator = accumulator_of(self.dy.dtype)
        self.borders = self.dy.new_empty(choice.border_words(self.shape.image), dtype=torch.int16)
        """mask() writes them, wgrad() reads them."""

    def run(self, dx: Tensor | None, grads: list[Tensor | None]) -> None:
        """Every launch in order. dx, grads: where the gradients of x, and of the weights and biases go, None where not
        wanted."""
        packed = self.pack()
        out = self.mask()
        reduce = self.dgrad(packed)
        if dx is not None:
            self.input_grad(packed, dx)
        self.finish(self.wgrad(out, reduce), grads)

    def pack(self) -> PackedDgrad:
        """The weights that dgrad needs, in one launch."""
        filters, channels = (max(w.shape[dim] for w in self.weights) for dim in (0, 1))
        pack = self.launcher.bind_untiled(self.rows.pack, choice.interpreter_tile(filters, channels, 1))
        wanted = (*self.wanted.inner, self.wanted.x and self.rows.dgrad_projection is not None, self.wanted.x)
        r5, reduced = self.shape.r5, self.shape.reduced_width
        return pack(self.weights, self.dy.dtype, r5=r5, reduced_width=reduced, wanted=wanted)

    def mask(self) -> Tensor | None:
        """g into its columns. Returns the sums that the biases of the branches' last convolutions want."""
        shape, bits = self.shape, self.saved.bits
        launch = self.launcher.launch(self.rows.mask)
        if wide_rows(self.dy, launch.unit) is None:
            launch = launch.strided()
        tile = self.launcher.tile(launch)
        ranges = choice.row_ranges(shape.gemm_m, tile.BLOCK_M) if tile else (1, 1)
        sums = self.dy.new_empty((ranges[0], shape.k), dtype=self.accumulator) if self.wanted.out else None
        masked = self.relu and bits.numel()
        all_bits = ChannelSlice(bits, shape.bits_width, 0, shape.bits_width) if masked else None
        self.launcher.bind(launch, tile)(self.dy, all_bits, self.branches, sums, self.borders, ranges=ranges)
        return sums

    def dgrad(self, packed: PackedDgrad) -> Tensor | None:
        """dgrad for the parts of r, as far as wanted. Returns the sums that their biases want: [tiles, r_width]."""
        shape = self.shape
        windows, gs = chains.windows(shape.variant.names), chains.windows(self.gradients)
        masks = shape.r_slices(self.saved.r) if self.relu and self.saved.r.numel() else (None,) * len(gs)
        sums = first = None
        for row in self.rows.dgrad_windows:
            i = windows.index(row.convs[0])
            g, w_t, r, dr = (each[i] for each in (gs, packed.windows, masks, self.inner))
            if w_t is None:
                continue
            launch = self.launcher.launch(row)
            tile = self.launcher.tile(launch)
            first = first or tile
            if tile and tile.BLOCK_M != first.BLOCK_M:
                # All need as many sums, hence tiles of the same height, which a table may not give.
                tile = first
            if sums is None:
                sums = self.dgrad_sums(-(-shape.gemm_m // tile.BLOCK_M) if tile else 1)
            options = self.of_sums(sums, i)
            width = shape.r_widths[i]
            self.launcher.bind(launch, tile)(g, w_t, r, dr, options.pop("sums"), width=width, **options, **self.place)
            self.after_dgrad(row, sums)
        return sums

    def dgrad_sums(self, tiles: int) -> Tensor | None:
        """Memory for what B2 sums, None for nothing."""
        if not self.wanted.reduce:
            return None
        return self.dy.new_empty((tiles, self.shape.r_width), dtype=self.accumulator)

    def of_sums(self, sums: Tensor | None, i: int) -> dict[str, Any]:
        """B2's operands for the sums of r's i-th part."""
        if sums is None:
            return {"sums": None}
        shape = self.shape
        return {"sums": ChannelSlice(sums, sums[0].numel(), shape.r_offsets[i], shape.r_channels[i])}

    def after_dgrad(self, row: Row, sums: Tensor | None) -> None:
        """What has to happen to a window's gradient before another launch reads it: nothing here."""

    def input_grad(self, packed: PackedDgrad, dx: Tensor) -> None:
        """dgrad for the pooled x, then that of x."""
        shape, to = self.shape, ChannelSlice(dx, self.shape.c, 0, self.shape.c)
        columns = shape.reductions_slice(self.grads, 0, shape.reductions_width)
        if self.rows.dgrad_projection is None:
            w_t = packed.grouped[:, None, None]
            self.launcher(self.rows.dgrad_x)(columns, w_t, None, to, None, width=shape.c, **self.place)
            return
        dpool = ChannelSlice(self.dy.new_empty((shape.gemm_m, shape.c)), shape.c, 0, shape.c)
        g = chains.projection(self.gradients)
        self.launcher(self.rows.dgrad_projection)(g, packed.projection, None, dpool, None, width=shape.c, **self.place)
        self.launcher(self.rows.dgrad_x)(columns, packed.grouped, dpool, self.saved.taps, to, **self.place)

    def wgrad(self, out: Tensor | None, reduce: Tensor | None) -> Partials:
        """wgrad as often as wanted. out, reduce: mask()'s and dgrad()'s sums."""
        rows, shape, wanted, x = self.rows, self.shape, self.wanted, self.launcher.x
        r = shape.r_slices(self.saved.r) if any(wanted.windows) else (None,) * len(wanted.windows)
        gs, sides = chains.windows(self.gradients), chains.windows(shape.sides)
        group = projection = None
        if wanted.group:
            columns = shape.reductions_slice(self.grads, *self.group_columns())
            group = self._wgrad(rows.wgrad_reductions, columns, x, 1).flatten(2)
        windows = [
            self._wgrad(row, g, part, side) if need else None
            for row, need, g, part, side in zip(rows.wgrad_windows, wanted.windows, gs, r, sides, strict=True)
        ]
        if wanted.projection:
            projection = self._wgrad(rows.wgrad_projection, chains.projection(self.gradients), x, 1)
        return Partials(group, windows, projection, out, reduce)

    def group_columns(self) -> tuple[int, int]:
        """(first, last) column of [g1 | dr3 | dr5] whose weights want a gradient; (0, 0) for none."""
        if not self.wanted.group:
            return 0, 0
        places = self.shape.reductions
        return places[self.wanted.group[0]][0], places[self.wanted.group[-1]][1]

    def _wgrad(self, row: Row, g: ChannelSlice, x: ChannelSlice, side: int) -> Tensor:
        launch = self.launcher.launch(row)
        # Of the reductions fewer may be wanted than the row has.
        launch = launch._replace(gemm=launch.gemm._replace(m=g.channels))
        tile = self.launcher.tile(launch)
        splits = choice.ranges(launch, tile) if tile is not None else 1
        part = self.dy.new_empty((splits, g.channels, side, side, x.channels), dtype=self.accumulator)
        self.launcher.bind(launch, tile)(g, x, part, self.borders, pool=row.pooled, **self.place)
        return part

    def finish(self, partials: Partials, grads: list[Tensor | None]) -> None:
        """Every parameter's gradient from its partial sums."""
        if not any(grad is not None for grad in grads):
            return
        shape = self.shape
        outs = [_reducible(grad) if grad is not None else None for grad in grads]
        most = max(out.numel() for out in outs if out is not None)
        rows = max(part.shape[0] for part in partials.flat if part is not None)
        wide = max(16, 1 << most.bit_length())
        interpreted = Tile(1 if rows == 1 else 4, min(wide, choice.INTERPRETER_BLOCK), 1)
        total = self.launcher.bind_untiled(self.rows.total, interpreted)
        total(partials, outs, shape, first=self.group_columns()[0])
        for grad, out in zip(grads, outs, strict=True):
            if out is not grad:
                grad.copy_(out)


def _reducible(grad: Tensor) -> Tensor:
    """Where B5 writes: the gradient itself, or dense memory beside one whose strides are neither KCRS nor KRSC."""
    if grad.is_contiguous() or (grad.dim() == 4 and grad.is_contiguous(memory_format=torch.channels_last)):
        return grad
    return torch.empty_like(grad, memory_format=torch.contiguous_format)
