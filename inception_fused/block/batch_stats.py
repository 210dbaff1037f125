"""BatchNorm with the statistics of the batch, as the kernels compute it: its numbers, where they lie, its formulas.

Of each channel, over the M = N*H*W values that a convolution has stored ("raw"):

    mean = sum(raw) / M         var = sum((raw - mean)**2) / M         scale = gamma / sqrt(var + eps)
    y    = act(fma(raw - mean, scale, shift))                          shift = beta - rest * scale

mean is rounded to fp32 and ``rest`` is what the rounding left out, so that nothing is lost where the mean is far larger
than the deviation: raw - mean is then exact. The mask of the backward is not (y <= 0) of y as it is stored, computed
again by the very same operations. With g = dy behind the mask, S1 = sum(g) and S2 = sum(g * (raw - true mean)):

    d raw   = c0 * g - c1 * (raw - mean) - c2
              c0 = scale, c1 = scale * S2 / (M * (var + eps)), c2 = scale * S1 / M - c1 * rest
    d gamma = S2 / sqrt(var + eps)                 d beta = S1                 d bias = 0: a mean takes it out again

A convolution whose BatchNorm is in eval mode has its running mean and variance in their place, rest = 0, c1 = c2 = 0,
d bias = scale * S1. One without BatchNorm has mean = var = 0, eps = 1, scale = 1, shift = 0. Both then stand in the
same columns, for the same launches.

Sources: Ioffe and Szegedy, "Batch Normalization" (2015); partial (count, mean, M2) combined as in Chan, Golub, LeVeque,
"Updating Formulae and a Pairwise Algorithm for Computing Sample Variances" (1979).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inception_fused.block import chains, folding
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import Norms
from inception_fused.block.views import BatchNorm, ChannelSlice, accumulator_of

NONE, FIXED, BATCH = range(3)
"""Modes of a convolution: no BatchNorm behind it, one in eval mode, one with the statistics of the batch."""

MEAN, REST, VAR, SCALE, SHIFT = range(5)
"""Rows of a block's statistics [5, K + r_width]: of y's columns, then of r's."""

STATISTICS = 5

COUNT = 5
"""Where the batch lies on several processes, one row more: how many values all of them have."""

SYNCHRONISED = 6

COEFFICIENTS = 3
"""c0, c1, c2: rows of the backward's [3, K + r_width]."""


class NormColumns(NamedTuple):
    """The columns of one convolution in a matrix of its outputs.

    start, channels: its columns. mode: NONE, FIXED or BATCH. gamma, beta: [channels] or None for 1 and 0. mean, var:
    [channels], of FIXED, which alone reads them, else None. eps: at least 0, 1 of NONE.
    """

    start: int
    channels: int
    mode: int
    gamma: Tensor | None
    beta: Tensor | None
    mean: Tensor | None
    var: Tensor | None
    eps: float


class VectorGrads(NamedTuple):
    """Where the gradients of one convolution's vectors go: [channels] of any floating dtype, None where not wanted."""

    gamma: Tensor | None
    beta: Tensor | None
    bias: Tensor | None


class Centred(NamedTuple):
    """What B2 sums for BatchNorm beside dr: dots[i, c] = sum over the i-th tile of rows of dr * (raw - mean).

    raw: what r was made of. stats: its statistics. dots: one row a tile, as sums has them.
    """

    raw: ChannelSlice
    stats: ChannelSlice
    dots: ChannelSlice


class Columns(NamedTuple):
    """Whose columns lie side by side and are normalised together. convs: places of the convolutions in every list;
    start, width: their columns in the statistics; offset: of the first in its own matrix, y's or r's."""

    convs: tuple[int, ...]
    start: int
    width: int
    offset: int

    def of(self, matrix: Tensor) -> ChannelSlice:
        """These columns of [M, K] of y, or of [M, r_width] of r."""
        return ChannelSlice(matrix, matrix.shape[1], self.offset, self.width)

    def of_table(self, table: Tensor) -> ChannelSlice:
        """These columns of statistics or coefficients."""
        return ChannelSlice(table, table.shape[1], self.start, self.width)


def columns_of(shape: BlockShape) -> tuple[Columns, ...]:
    """In the order of a forward: [r3 | r5], t where branch 3 has two windows, y."""
    variant, k = shape.variant, shape.k
    reduced = tuple(i for i in variant.inner if i in variant.reductions)
    found = [Columns(reduced, k, shape.reduced_width, 0)]
    later = tuple(i for i in variant.inner if i not in variant.reductions)
    if later:
        reduced_width = shape.reduced_width
        found.append(Columns(later, k + reduced_width, shape.r_width - reduced_width, reduced_width))
    return (*found, Columns(variant.ends, 0, k, 0))


def starts(shape: BlockShape) -> list[int]:
    """Where each convolution's columns begin in the statistics."""
    branches = shape.branch_channels
    ends = [sum(branches[:i]) for i in range(len(branches))]
    return chains.from_outputs(ends, [shape.k + offset for offset in shape.r_offsets])


def width(shape: BlockShape) -> int:
    """Columns of a block's statistics."""
    return shape.k + shape.r_width


def fresh(x: Tensor, shape: BlockShape, rows: int) -> Tensor:
    """Memory for ``rows`` numbers a column; zeros where there are columns that belong to no convolution."""
    make = x.new_zeros if shape.r_padded else x.new_empty
    return make((rows, width(shape)), dtype=accumulator_of(x.dtype))


def modes_of(norms: Sequence[BatchNorm | None]) -> list[int]:
    """Of every convolution, by what stands behind it."""
    return [NONE if norm is None else BATCH if norm.mean is None else FIXED for norm in norms]


def takes_batch(norms: Sequence[BatchNorm | None] | None) -> bool:
    """Whether some BatchNorm takes the statistics of the batch."""
    return norms is not None and any(norm is not None and norm.mean is None for norm in norms)


def norm_columns(
    columns: Columns, shape: BlockShape, norms: Sequence[Tensor], modes: Sequence[int], eps: Sequence[float]
) -> list[NormColumns]:
    """The convolutions of some columns, with their places among these. norms: flat and dense, or none where no vector
    is read. eps: one a convolution."""
    kinds = Norms.of([None if folding.is_missing(t) else t for t in norms])
    means, variances, gammas, betas = (kind or chains.each(None, modes) for kind in kinds)
    all_starts, found = starts(shape), []
    for i in columns.convs:
        fixed = (means[i], variances[i]) if modes[i] == FIXED else (None, None)
        place = all_starts[i] - columns.start, shape.filters[i]
        found.append(NormColumns(*place, modes[i], gammas[i], betas[i], *fixed, eps[i]))
    return found


def batch_statistics(stats: Tensor, shape: BlockShape) -> list[tuple[Tensor, Tensor]]:
    """(mean, biased variance) of every convolution's output, views of its statistics."""
    return [
        (stats[MEAN, start : start + k], stats[VAR, start : start + k])
        for start, k in zip(starts(shape), shape.filters, strict=True)
    ]


def normalised(raw: Tensor, stats: Tensor, dtype: torch.dtype) -> Tensor:
    """act's argument as it is stored, in ATen and to the kernels' bit: raw [M, C], stats [5, C] -> [M, C] of dtype.

    A fused multiply-add rounds once. In fp64 a product of two fp32 is exact, and so is the sum but for its last bits.
    """
    wide = stats.dtype
    centred = raw.to(wide) - stats[MEAN]
    exact = centred.double() * stats[SCALE].double() + stats[SHIFT].double()
    return exact.to(wide).to(dtype)
