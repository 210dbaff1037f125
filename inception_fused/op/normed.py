"""The launches of a block whose BatchNorm takes the statistics of the batch, forward and backward, in order.

    raw  = conv(x) as it is stored       of [y1 | r3 | r5], [y4], then from r on [y2], [y3]
    r    = act(fma(raw_r - mean, scale, shift)), y likewise          block/batch_stats.py has the formulas

    g    = the gradient of raw, from dy and raw: its two sums a channel first, then d raw
    dr   = dgrad behind r's mask with the same two sums; then d raw_r in its place

Statistics are of the stored values, as PyTorch's are. They are taken by a pass of their own (N1), but for those of dr,
which B2 has at hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from inception_fused.block import batch_stats, chains, folding
from inception_fused.block.batch_stats import Centred, Columns, NormColumns, VectorGrads
from inception_fused.block.call_types import NormedBackwardCall, NormedCall, NormedSaved, NormedSaves
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import BlockTensors, Needs
from inception_fused.block.views import ChannelSlice, PackedDgrad, Tile, row_stride, wide_rows
from inception_fused.op import synchronised
from inception_fused.op.forward import Outputs, calls_of, dense, packed
from inception_fused.op.gradients import Rows, Wanted
from inception_fused.op.launcher import Launcher
from inception_fused.plan import choice, launches
from inception_fused.plan.launches import Normed, Row
from inception_fused.plan.problems import Launch

COMBINED = Tile(256, 64, 1, GROUP_M=1, num_stages=1)
"""The interpreter's tile of what combines sums: ranges, columns."""


def saves(needs: Needs, relu: bool) -> NormedSaves:
    """What a forward must keep for the wanted gradients. needs: of x, weights, and any vector of each convolution."""
    wanted = Wanted.of(needs)
    inner = any(wanted.inner)
    return NormedSaves(any(needs.flat), inner, any(wanted.windows) or (relu and inner), wanted.x)


def launch_normed(launcher: Launcher, call: NormedCall, y: Tensor, saved: NormedSaved) -> None:
    """The launches of a forward. y: [M, K]. saved: taps as far as call.saves asks for them, the others always; raw may
    be y's own memory, and raw_r r's: what normalises may write where it reads."""
    shape, (weights, biases, norms, eps) = launcher.shape, call.tensors
    rows = launches.table_of(shape.filters, normed=True).forward
    plain = folding.tensors_of(folding.params_of(BlockTensors(weights, biases)))
    norms = [dense(vector) for vector in norms]
    no_bits = [None] * len(shape.branch_channels)
    raw, taps = shape.y_slices(saved.raw), saved.taps if call.saves.taps else None
    outputs = Outputs(raw, shape.r_slices(saved.raw_r), no_bits, taps)
    sources = shape.r_slices(saved.r)
    heads, windows = calls_of(launcher, rows, packed(launcher, plain), outputs, sources, relu=False)

    def normalise(norm: Normed, columns: Columns, raw: Tensor, out: Tensor) -> None:
        given = batch_stats.norm_columns(columns, shape, norms, call.modes, eps)
        stats = columns.of_table(saved.stats)
        _statistics(launcher, norm, given, columns.of(raw), stats)
        if call.group:
            synchronised.share_statistics(stats, given, rows=shape.gemm_m, group=call.group)
        launcher(norm.normalise)(columns.of(raw), stats, columns.of(out), gemm_m=shape.gemm_m, relu=call.relu)

    of_r, *of_t, of_y = batch_stats.columns_of(shape)
    launcher.in_order(heads)
    normalise(rows.normed[0], of_r, saved.raw_r, saved.r)
    early = len(windows) - len(of_t)
    launcher.in_order(windows[:early])
    for columns in of_t:
        normalise(rows.normed[1], columns, saved.raw_r, saved.r)
        launcher.in_order(windows[early:])
    normalise(rows.normed[-1], of_y, saved.raw, y)


def _statistics(
    launcher: Launcher, rows: Normed, columns: Sequence[NormColumns], raw: ChannelSlice, stats: ChannelSlice
) -> None:
    gemm_m = launcher.shape.gemm_m
    launch = launcher.launch(rows.statistics)
    tile = launcher.tile(launch)
    ranges, height = _ranges(launch, tile)
    parts = stats.base.new_empty((ranges[0], 2, raw.channels))
    launcher.bind(launch, tile)(raw, parts, gemm_m=gemm_m, ranges=ranges)
    combine = launcher.bind_untiled(rows.combine, COMBINED)
    combine(parts, raw, columns, stats, gemm_m=gemm_m, rows=ranges[1] * height)


def share_nothing(call: NormedCall, shape: BlockShape, stats: Tensor) -> None:
    """The part of a process without rows in a forward over several processes."""
    norms = [dense(vector) for vector in call.tensors.norms]
    for columns in batch_stats.columns_of(shape):
        given = batch_stats.norm_columns(columns, shape, norms, call.modes, call.tensors.eps)
        synchronised.share_statistics(columns.of_table(stats), given, rows=0, group=call.group)


def _ranges(launch: Launch, tile: Tile | None) -> tuple[tuple[int, int], int]:
    """(number of ranges, tiles in each), and a tile's rows; one range for the ATen twin."""
    return (choice.statistics_ranges(launch, tile), tile.BLOCK_M) if tile else ((1, 1), launch.pixels)


def normed_backward(call: NormedBackwardCall, chosen: Mapping[str, str]) -> list[Tensor | None]:
    """The gradients of x, of the weights, and of gamma, beta and bias of each convolution in turn, None where not
    wanted.

    call: x is a matrix of rows. chosen: implementation by kernel, as dispatch.choices() gives it. Nothing given is
    written. Returns dx in x's dtype
    and channels_last memory, each other gradient in its parameter's dtype, those of weights in their strides.
    """
    x, weights, needs = call.x, call.weights, call.needs
    shape, wanted = BlockShape.of(x, weights), Wanted.of(needs)
    grads = [torch.empty_like(w) if need else None for w, need in zip(weights, needs.weights, strict=True)]
    vectors = [
        VectorGrads(*(None if dtype is None else x.new_empty(w.shape[0], dtype=dtype) for dtype in dtypes))
        for w, dtypes in zip(weights, call.vectors, strict=True)
    ]
    dx = torch.empty_like(x, memory_format=torch.channels_last) if wanted.x else None
    found = [dx, *grads, *(grad for three in vectors for grad in three)]
    if shape.gemm_m == 0:
        if call.group:
            _share_no_sums(call, shape, wanted)
        return [grad.zero_() if grad is not None else None for grad in found]
    launcher = Launcher(chosen, ChannelSlice(x, row_stride(x), 0, shape.c), shape, x.dtype)
    # The gradients of vectors are not B5's.
    _NormedRows(launcher, call, wanted, vectors).run(dx, [*grads, *chains.each(None, weights)])
    return found


def _share_no_sums(call: NormedBackwardCall, shape: BlockShape, wanted: Wanted) -> None:
    """The part of a process without rows in a backward over several processes."""
    of_r, *of_t, of_y = batch_stats.columns_of(shape)
    inner = [columns for columns in (*of_t, of_r) if _is_wanted(columns, shape, wanted)]
    for columns in (of_y, *inner):
        nothing = columns.of_table(call.saved.stats.new_zeros((batch_stats.COEFFICIENTS, batch_stats.width(shape))))
        given = batch_stats.norm_columns(columns, shape, (), call.modes, call.eps)
        parts = nothing.base.new_zeros((0, 2, columns.width))
        stats = columns.of_table(call.saved.stats)
        synchronised.share_sums(parts, stats, given, nothing, group=call.group)


def _is_wanted(columns: Columns, shape: BlockShape, wanted: Wanted) -> bool:
    """Whether the gradient to some of r's columns is on the way to what is wanted."""
    end = columns.offset + columns.width
    places = zip(wanted.inner, shape.r_offsets, strict=True)
    return any(need and columns.offset <= offset < end for need, offset in places)


class _NormedRows(Rows):
    """One backward pass. vectors: where the vectors' gradients go."""

    normed = True

    def __init__(
        self, launcher: Launcher, call: NormedBackwardCall, wanted: Wanted, vectors: Sequence[VectorGrads]
    ) -> None:
        super().__init__(launcher, call.dy.to(call.x.dtype), call.saved, call.weights, call.relu, wanted)
        self.call, self.vectors = call, vectors
        self.coefficients = batch_stats.fresh(self.dy, self.shape, batch_stats.COEFFICIENTS)
        of_r, *of_t, of_y = batch_stats.columns_of(self.shape)
        self.columns = (of_y, *of_t, of_r)

    def mask(self) -> None:
        """The gradient of y's raw values into its columns."""
        rows, columns = self.rows.normed[0], self.columns[0]
        launch = self._for_dy(rows.statistics)
        tile = self.launcher.tile(launch)
        ranges, _ = _ranges(launch, tile)
        parts = self.dy.new_empty((ranges[0], 2, self.shape.k), dtype=self.accumulator)
        raw, stats = columns.of(self.saved.raw), columns.of_table(self.saved.stats)
        statistics = self.launcher.bind(launch, tile)
        statistics(self.dy, raw, stats, parts, self.borders, relu=self.relu, ranges=ranges)
        self._combine(rows, columns, parts)
        self._apply(self._for_dy(rows.normalise), self.dy, columns, raw, self.branches, relu=self.relu)

    def _for_dy(self, row: Row) -> Launch:
        launch = self.launcher.launch(row)
        return launch.strided() if wide_rows(self.dy, launch.unit) is None else launch

    def dgrad(self, packed: PackedDgrad) -> None:
        """As of :class:`Rows`, and then the gradient of raw values in the place of dr. Its sums are used up here."""
        sums = super().dgrad(packed)
        if _is_wanted(self.columns[-1], self.shape, self.wanted):
            self._of_inner(self.rows.normed[-1], self.columns[-1], sums)

    def dgrad_sums(self, tiles: int) -> Tensor:
        return self.dy.new_empty((tiles, 2, self.shape.r_width), dtype=self.accumulator)

    def of_sums(self, sums: Tensor, i: int) -> dict[str, Any]:
        shape, (_, kinds, width) = self.shape, sums.shape
        start, channels = shape.r_offsets[i], shape.r_channels[i]
        plain, dots = (ChannelSlice(sums, kinds * width, kind * width + start, channels) for kind in range(kinds))
        stats = ChannelSlice(self.saved.stats, self.saved.stats.shape[1], shape.k + start, channels)
        return {"sums": plain, "centred": Centred(shape.r_slices(self.saved.raw_r)[i], stats, dots)}

    def after_dgrad(self, row: Row, sums: Tensor) -> None:
        """The gradient of raw values in the place of dt, which the next launch reads."""
        names = self.shape.variant.names
        source = dict(zip(names, chains.inputs("x", names), strict=True))[row.convs[0]]
        for rows, columns in zip(self.rows.normed[1:-1], self.columns[1:-1], strict=True):
            if source in rows.normalise.convs:
                self._of_inner(rows, columns, sums)

    def _of_inner(self, rows: Normed, columns: Columns, sums: Tensor) -> None:
        self._combine(rows, columns, sums[:, :, columns.offset : columns.offset + columns.width])
        part = columns.of_table(self.grads)
        images = part.rows(self.shape.gemm_m).unflatten(0, (self.shape.n, *self.shape.image)).permute(0, 3, 1, 2)
        raw = columns.of(self.saved.raw_r)
        self._apply(self.launcher.launch(rows.normalise), images, columns, raw, [part], relu=False)

    def _combine(self, rows: Normed, columns: Columns, parts: Tensor) -> None:
        given = batch_stats.norm_columns(columns, self.shape, (), self.call.modes, self.call.eps)
        stats, coefficients = columns.of_table(self.saved.stats), columns.of_table(self.coefficients)
        outs = [self.vectors[i] for i in columns.convs]
        combine = self.launcher.bind_untiled(rows.combine, COMBINED)
        combine(parts, stats, given, coefficients, outs, gemm_m=self.shape.gemm_m)
        if self.call.group:
            synchronised.share_sums(parts, stats, given, coefficients, group=self.call.group)

    def _apply(
        self, launch: Launch, dy: Tensor, columns: Columns, raw: ChannelSlice, out: Sequence[ChannelSlice],
        *, relu: bool,
    ) -> None:  # fmt: skip
        stats, coefficients = columns.of_table(self.saved.stats), columns.of_table(self.coefficients)
        apply = self.launcher.bind(launch, self.launcher.tile(launch))
        apply(dy, raw, stats, coefficients, out, relu=relu)
