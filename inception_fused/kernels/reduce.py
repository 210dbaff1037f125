"""B5: partial sums added up in a fixed order, straight into the gradients of a block's weights and biases.

    dw[k, c, r, s] = sum over i of part[i, k, r, s, c]          of each convolution
    db[k]          = sum over i of sums[i, k]

Shapes:  parts fp32 [SPLIT_K, K, R, R, C] as B4 leaves them, the three reductions as rows of one; sums fp32 [ranges, K]
         and [tiles, row of r] as B1 and B2 leave them. Outputs: any floating dtype; weights dense in KCRS or KRSC.
Grid:    a program is some elements of one output; the outputs lie end to end, weights before biases. What a variant
         does not have is not there (chains.longest()): no outputs, of a window as many filters as it would read, else
         none.

Every BLOCK_M-th partial sum is added in turn, then these BLOCK_M sums as a tree, as the shape alone says. A bias has
few elements and up to a partial sum for each tile of rows: its programs take BIAS_SHARE times the rows and as many
fewer elements.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.shapes import BlockShape
from inception_fused.block.views import Partials, Tile
from inception_fused.runtime.launch import accumulator, launch

TILE = Tile(8, 256, 1, GROUP_M=1, num_stages=1)
"""Partial sums added at once, and elements of a weight's program, at least BIAS_SHARE: 16 loads of fp32 in flight a
thread. A guess until timed."""


BIAS_SHARE = tl.constexpr(8)


@triton.jit
def add_rows(
    pid, part_ptr, out_ptr, rows, stride, size, C,
    RS: tl.constexpr, KRSC: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The pid-th BLOCK_N elements of one output, which its partial sums hold in the order k, r, s, c."""
    i = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = i < size
    offs_r = tl.arange(0, BLOCK_M)
    totals = tl.zeros([BLOCK_M, BLOCK_N], dtype=ACC)
    part_ptrs = part_ptr + (offs_r[:, None] * stride.to(tl.int64) + i[None, :])
    for row in range(0, rows, BLOCK_M):
        inside = (offs_r < rows - row)[:, None] & mask[None, :]
        totals += tl.load(part_ptrs + row * stride.to(tl.int64), mask=inside, other=0.0)
    total = tl.sum(totals, axis=0)
    if KRSC or RS == 1:
        to = i
    else:
        row = i // C
        to = (row // RS * C + (i - row * C)) * RS + row % RS
    tl.store(out_ptr + to, total.to(out_ptr.dtype.element_ty), mask=mask)


RUN_TIME = [
    "C", "K0", "K1", "K2", "K3", "K4", "K5", "K6", "first", "columns", "r5", "t", "r_width",
    "group_rows", "w2_rows", "t_rows", "w3_rows", "w4_rows", "out_rows", "reduce_rows",
    "end0", "end1", "end2", "end3", "end4", "end5", "end6",
    "end7", "end8", "end9", "end10", "end11", "end12", "end13",
]  # fmt: skip
"""Sizes and counts of partial sums, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def reduce_kernel(
    partials, outs,
    C, K0, K1, K2, K3, K4, K5, K6, first, columns, r5, t, r_width,
    group_rows, w2_rows, t_rows, w3_rows, w4_rows, out_rows, reduce_rows,
    end0, end1, end2, end3, end4, end5, end6, end7, end8, end9, end10, end11, end12, end13,
    RS: tl.constexpr, KRSC: tl.constexpr, UNIT: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Channel counts are in units of UNIT elements, numbers of partial sums and of programs plain. Sizes come one by
    # one: Triton specialises integers inside a tuple whatever do_not_specialize says.
    C, K0, K1, K2, K3, K4, K5 = C * UNIT, K0 * UNIT, K1 * UNIT, K2 * UNIT, K3 * UNIT, K4 * UNIT, K5 * UNIT
    K6, first, columns, r5, t, r_width = (
        K6 * UNIT, first * UNIT, columns * UNIT, r5 * UNIT, t * UNIT, r_width * UNIT
    )  # fmt: skip
    K = K0 + K2 + K5 + K6
    filters = (K0, K1, K2, K3, K4, K5, K6)
    channels = (C, C, K1, C, K3, K4, C)
    # For each weight and bias: the partial sums that hold its own, where these begin, how many, how far apart.
    group, w2, w_t, w3, w4, out, inner = partials
    w_parts = (group, group, w2, group, w_t, w3, w4)
    w_start = (0, (K0 - first) * C, 0, (K0 + r5 - first) * C, 0, 0, 0)
    w_rows = (group_rows, group_rows, w2_rows, group_rows, t_rows, w3_rows, w4_rows)
    w_stride = (
        columns * C, columns * C, K2 * K1 * RS[2], columns * C, K4 * K3 * RS[4], K5 * K4 * RS[5], K6 * C
    )  # fmt: skip
    b_parts = (out, inner, out, inner, inner, out, out)
    b_start = (0, 0, K0, r5, t, K0 + K2, K0 + K2 + K5)
    b_rows = (out_rows, reduce_rows, out_rows, reduce_rows, reduce_rows, out_rows, out_rows)
    b_stride = (K, r_width, K, r_width, r_width, K, K)
    pid = tl.program_id(0)
    ends = (end0, end1, end2, end3, end4, end5, end6, end7, end8, end9, end10, end11, end12, end13)
    starts = (0, end0, end1, end2, end3, end4, end5, end6, end7, end8, end9, end10, end11, end12)
    for i in tl.static_range(7):
        if outs[i] is not None:
            if (pid >= starts[i]) & (pid < ends[i]):
                add_rows(
                    pid - starts[i], w_parts[i] + w_start[i], outs[i], w_rows[i], w_stride[i],
                    filters[i] * channels[i] * RS[i], channels[i], RS[i], KRSC[i], ACC, BLOCK_M, BLOCK_N,
                )  # fmt: skip
        if outs[7 + i] is not None:
            if (pid >= starts[7 + i]) & (pid < ends[7 + i]):
                add_rows(
                    pid - starts[7 + i], b_parts[i] + b_start[i], outs[7 + i], b_rows[i], b_stride[i], filters[i],
                    1, 1, True, ACC, BLOCK_M * BIAS_SHARE, BLOCK_N // BIAS_SHARE,
                )  # fmt: skip


def reduce(
    partials: Partials,
    outs: Sequence[Tensor | None],
    shape: BlockShape,
    *,
    first: int,
    unit: int,
    tile: Tile = TILE,
) -> None:
    """Launch B5.

    outs: the weights [K, C, R, R], each contiguous or channels_last, and the biases [K] of all convolutions; None where
    not wanted. first: the column of [g1 | dr3 | dr5] with which ``partials.group`` begins.
    """
    weights, biases = (chains.longest(some, None) for some in (outs[: len(shape.filters)], outs[len(shape.filters) :]))
    block_of = (tile.BLOCK_N, tile.BLOCK_N // BIAS_SHARE.value)
    programs = [
        triton.cdiv(out.numel(), block) if out is not None else 0
        for some, block in zip((weights, biases), block_of, strict=True)
        for out in some
    ]
    parts = partials._replace(windows=chains.longest_windows(partials.windows)).flat
    # The last part of r is t where it has one; nothing reads its place where it has none.
    r5, t = shape.r5, shape.r_offsets[-1]
    launch(
        reduce_kernel,
        (sum(programs),),
        (
            tuple(parts), (*weights, *biases),
            shape.c // unit, *(k // unit for k in chains.longest_filters(shape.filters)), first // unit,
            partials.group.shape[1] // unit if partials.group is not None else 0,
            r5 // unit, t // unit, shape.r_width // unit,
            *(part.shape[0] if part is not None else 0 for part in parts), *accumulate(programs),
        ),
        dict(
            RS=tuple(w.shape[2] ** 2 if w is not None else 1 for w in weights),
            KRSC=tuple(w is not None and not w.is_contiguous() for w in weights),
            UNIT=unit,
            ACC=accumulator(next(part for part in parts if part is not None).dtype),
        ),
        tile,
    )  # fmt: skip
