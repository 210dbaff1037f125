"""The weights of a block as the backward pass reads them, in one launch: transposed, flipped and cast.

    w2_t[c, r, s, k] = w2[k, c, R - 1 - r, R - 1 - s]            likewise those of branch 3's windows and, 1x1, w4_t
    w_t[c, :]        = [w1[:, c] | w2_reduce[:, c] | 0 | w3_reduce[:, c] | 0]        the zeros stand where r is padded

Shapes:  one weight [K, C, R, R] a convolution, each contiguous or channels_last, of any floating dtype; outputs in the
         compute dtype, dense, side by side in one buffer, every part on a 16-byte boundary. What a variant does not
         have is not there (chains.longest()): no weight, of a window as many filters as it would read, else none.
Grid:    a program is one tile of filters and channels of one tap of one weight; the weights lie end to end.

Tiles are read along c and written along k, so that both sides are whole lines of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, repeat

import torch
import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.views import PackedDgrad, Tile, as_dense
from inception_fused.runtime.launch import launch

TILE = Tile(64, 64, 1, GROUP_M=1, num_stages=1)
"""Filters and channels of a program: 128-byte lines on both sides in 16-bit types."""

UNALIGNED = TILE._replace(BLOCK_M=32)
"""For single elements, each with an address of its own: 64x64 puts 32 bytes on the stack on sm_120, Triton 3.8."""


@triton.jit
def transpose(
    pid, w_ptr, out_ptr, K, padded, C, row,
    RS: tl.constexpr, KRSC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One tile of one tap of a weight: out[(c * RS + RS - 1 - tap) * row + k], 0 for k from K to padded."""
    tiles_k, tiles_c = tl.cdiv(padded, BLOCK_M), tl.cdiv(C, BLOCK_N)
    tap = pid // (tiles_k * tiles_c)
    k = pid // tiles_c % tiles_k * BLOCK_M + tl.arange(0, BLOCK_M)
    c = pid % tiles_c * BLOCK_N + tl.arange(0, BLOCK_N)
    if KRSC or RS == 1:
        source = (k[:, None] * RS + tap) * C + c[None, :]
    else:
        source = (k[:, None] * C + c[None, :]) * RS + tap
    tile = tl.load(w_ptr + source, mask=(k < K)[:, None] & (c < C)[None, :], other=0.0).to(out_ptr.dtype.element_ty)
    to = (c[:, None] * RS + (RS - 1 - tap)) * row + k[None, :]
    # Not the mask of the load transposed, through which Triton 3.5 sees no whole units.
    mask = (c < C)[:, None] & (k < padded)[None, :]
    tl.store(out_ptr + to, tl.trans(tile), mask=mask)


RUN_TIME = [
    "C", "K0", "K1", "K2", "K3", "K4", "K5", "K6", "r5", "reduced_width",
    "end0", "end1", "end2", "end3", "end4", "end5", "end6",
]  # fmt: skip
"""Sizes, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def pack_dgrad_kernel(
    weights, outs,
    C, K0, K1, K2, K3, K4, K5, K6, r5, reduced_width, end0, end1, end2, end3, end4, end5, end6,
    RS: tl.constexpr, KRSC: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Sizes are in units of UNIT elements, and one by one: Triton specialises integers inside a tuple.
    C, K0, K1, K2, K3, K4, K5 = C * UNIT, K0 * UNIT, K1 * UNIT, K2 * UNIT, K3 * UNIT, K4 * UNIT, K5 * UNIT
    K6, r5, reduced_width = K6 * UNIT, r5 * UNIT, reduced_width * UNIT
    pid = tl.program_id(0)
    starts, ends = (0, end0, end1, end2, end3, end4, end5), (end0, end1, end2, end3, end4, end5, end6)
    filters = (K0, K1, K2, K3, K4, K5, K6)
    padded = (K0, r5, K2, reduced_width - r5, K4, K5, K6)
    rows = (K0 + reduced_width, K0 + reduced_width, K2, K0 + reduced_width, K4, K5, K6)
    channels = (C, C, K1, C, K3, K4, C)
    places = (0, K0, 0, K0 + r5, 0, 0, 0)
    for i in tl.static_range(7):
        if weights[i] is not None:
            if (pid >= starts[i]) & (pid < ends[i]):
                transpose(
                    pid - starts[i], weights[i], outs[i] + places[i], filters[i], padded[i], channels[i], rows[i],
                    RS[i], KRSC[i], BLOCK_M, BLOCK_N,
                )  # fmt: skip


def pack_dgrad(
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    r5: int,
    reduced_width: int,
    wanted: Sequence[bool],
    unit: int,
    tile: Tile | None = None,
) -> PackedDgrad:
    """Prepare the weights in one launch; none if none is wanted.

    weights: one [K, C, R, R] a convolution, of any floating dtype and strides. wanted: as PackedDgrad.empty() takes it.
    r5: BlockShape's, its place in a row of r; reduced_width: of [r3 | r5] in that row. unit: as unit_of() gives it.
    tile: None for TILE or UNALIGNED.
    """
    tile = tile or (TILE if unit > 1 else UNALIGNED)
    packed = PackedDgrad.empty(weights, dtype, reduced_width, wanted)
    if not any(wanted):
        return packed
    outs = chains.from_roles(repeat(packed.grouped), packed.windows, packed.projection)
    jobs = [as_dense(w) if out is not None else None for w, out in zip(weights, outs, strict=True)]
    filters = [w.shape[0] for w in weights]
    k1 = chains.direct(filters)
    reductions = ([k1] if k1 else []) + [r5, reduced_width - r5]
    padded = chains.from_roles(reductions, chains.windows(filters), chains.projection(filters))
    tiles = [
        w.shape[2] ** 2 * triton.cdiv(k, tile.BLOCK_M) * triton.cdiv(w.shape[1], tile.BLOCK_N) if w is not None else 0
        for w, k in zip(jobs, padded, strict=True)
    ]
    jobs = chains.longest(jobs, None)
    launch(
        pack_dgrad_kernel,
        (sum(tiles),),
        (
            tuple(jobs), tuple(chains.longest(outs, None)),
            chains.first(weights).shape[1] // unit, *(k // unit for k in chains.longest_filters(filters)),
            r5 // unit, reduced_width // unit, *accumulate(chains.longest(tiles, 0)),
        ),
        dict(
            RS=tuple(chains.longest([w.shape[2] ** 2 for w in weights], 1)),
            KRSC=tuple(w is not None and not w.is_contiguous() for w in jobs),
            UNIT=unit,
        ),
        tile,
    )  # fmt: skip
    return packed
