"""The weights of a block as the backward pass reads them, in one launch: transposed, flipped and cast.

    w2_t[c, r, s, k] = w2[k, c, R - 1 - r, R - 1 - s]            likewise w3_t and, 1x1, w4_t
    w_t[c, :]        = [w1[:, c] | w2_reduce[:, c] | 0 | w3_reduce[:, c] | 0]        the zeros stand where r is padded

Shapes:  six weights [K, C, R, R], each contiguous or channels_last, of any floating dtype; outputs in the compute
         dtype, dense, side by side in one buffer, every part on a 16-byte boundary.
Grid:    a program is one tile of filters and channels of one tap of one weight; the weights lie end to end.

Tiles are read along c and written along k, so that both sides are whole lines of memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.views import PackedDgrad, Tile, as_dense
from inception_fused.runtime.launch import launch

TILE = Tile(64, 64, 1, GROUP_M=1, num_stages=1)
"""Filters and channels of a program: 128-byte lines on both sides in 16-bit types."""


@triton.jit
def transpose(
    pid, w_ptr, out_ptr, K, padded, C, row,
    RS: tl.constexpr, KRSC: tl.constexpr, UNIT: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
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
    if UNIT > 1:
        # Triton 3.5 sees no whole units through a transposition, and stored element by element.
        mask = (c < C)[:, None] & (k < padded)[None, :]
    else:
        # Of single elements the other form puts 40 bytes on the stack on sm_90, Triton 3.8.
        mask = tl.trans((k < padded)[:, None] & (c < C)[None, :])
    tl.store(out_ptr + to, tl.trans(tile), mask=mask)


RUN_TIME = ["C", "K0", "K1", "K2", "K3", "K4", "K5", "r5", "r_width", "end0", "end1", "end2", "end3", "end4", "end5"]
"""Sizes, for which no binary is made anew."""


@triton.jit(do_not_specialize=RUN_TIME)
def pack_dgrad_kernel(
    weights, outs,
    C, K0, K1, K2, K3, K4, K5, r5, r_width, end0, end1, end2, end3, end4, end5,
    RS: tl.constexpr, KRSC: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Sizes are in units of UNIT elements, and one by one: Triton specialises integers inside a tuple.
    C, K0, K1, K2, K3, K4, K5 = C * UNIT, K0 * UNIT, K1 * UNIT, K2 * UNIT, K3 * UNIT, K4 * UNIT, K5 * UNIT
    r5, r_width = r5 * UNIT, r_width * UNIT
    pid = tl.program_id(0)
    starts, ends = (0, end0, end1, end2, end3, end4), (end0, end1, end2, end3, end4, end5)
    filters = (K0, K1, K2, K3, K4, K5)
    padded = (K0, r5, K2, r_width - r5, K4, K5)
    rows = (K0 + r_width, K0 + r_width, K2, K0 + r_width, K4, K5)
    channels = (C, C, K1, C, K3, C)
    places = (0, K0, 0, K0 + r5, 0, 0)
    for i in tl.static_range(6):
        if weights[i] is not None:
            if (pid >= starts[i]) & (pid < ends[i]):
                transpose(
                    pid - starts[i], weights[i], outs[i] + places[i], filters[i], padded[i], channels[i], rows[i],
                    RS[i], KRSC[i], UNIT, BLOCK_M, BLOCK_N,
                )  # fmt: skip


def pack_dgrad(
    weights: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    r5: int,
    r_width: int,
    wanted: Sequence[bool],
    unit: int,
    tile: Tile = TILE,
) -> PackedDgrad:
    """Prepare the weights in one launch; none if none is wanted.

    weights: six [K, C, R, R] of any floating dtype and strides. wanted: one flag for each field of PackedDgrad.
    r5, r_width: the place of r5 in a row of r, and the width of that row.
    """
    packed = PackedDgrad.empty(weights, dtype, r_width, wanted)
    if not any(wanted):
        return packed
    outs = tuple(chains.from_roles([packed.grouped] * 3, packed.windows, packed.projection))
    jobs = [as_dense(w) if out is not None else None for w, out in zip(weights, outs, strict=True)]
    filters = [w.shape[0] for w in weights]
    padded = chains.from_outputs(chains.ends(filters), (r5, r_width - r5))
    tiles = [
        w.shape[2] ** 2 * triton.cdiv(k, tile.BLOCK_M) * triton.cdiv(w.shape[1], tile.BLOCK_N) if w is not None else 0
        for w, k in zip(jobs, padded, strict=True)
    ]
    launch(
        pack_dgrad_kernel,
        (sum(tiles),),
        (
            tuple(jobs), outs, chains.first(weights).shape[1] // unit, *(k // unit for k in filters),
            r5 // unit, r_width // unit, *accumulate(tiles),
        ),
        dict(
            RS=tuple(w.shape[2] ** 2 for w in weights),
            KRSC=tuple(w is not None and not w.is_contiguous() for w in jobs),
            UNIT=unit,
        ),
        tile,
    )  # fmt: skip
    return packed
