"""pack: everything that parameters need before a block's kernels can read them, in one launch.

    w_out[k, r, s, c] = cast(w[k, c, r, s])                      cast to the compute dtype, permuted to KRSC
    scale[k] = gamma[k] / sqrt(var[k] + eps)                     BatchNorm in eval mode, per channel
    shift[k] = beta[k] + (bias[k] - mean[k]) * scale[k]          (bias 0, gamma 1, beta 0 where there is none;
                                                                 scale 1 where a convolution has no BatchNorm)

Shapes:  one weight [K, C, R, S] a convolution, each contiguous or channels_last, of any floating dtype; only those that
         need it are copied, side by side into one buffer, every part on a 16-byte boundary. scale and shift: [sum of K]
         in fp32, in fp64 where that is the compute dtype (gradient checks).
Grid:    axis 1 is the weight (0 to 6) or, for 7 to 13, the convolution of the affine vectors; axis 0 runs over its
         elements. What a variant does not have is not there (chains.longest()): no weight, no vectors, of a window
         as many filters as it would read, else none.

Nothing is kept from call to call: a cached copy would not see a write through ``.data``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.folding import MISSING
from inception_fused.block.views import BatchNorm, Packed, Tile, accumulator_of, as_dense, is_ready
from inception_fused.runtime.launch import launch

TILE = Tile(1024, 1, 1, GROUP_M=1, num_stages=1)
"""Elements of a program."""


@triton.jit
def copy_krsc(w_ptr, out_ptr, size, C, RS: tl.constexpr, KRSC: tl.constexpr, BLOCK_M: tl.constexpr):
    """BLOCK_M elements of one weight, in the order of the output."""
    i = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = i < size
    if KRSC or RS == 1:
        source = i
    else:
        row = i // C
        source = (row // RS * C + (i - row * C)) * RS + row % RS
    tl.store(out_ptr + i, tl.load(w_ptr + source, mask=mask).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def fold_batch_norm(
    bias_ptr, gamma_ptr, beta_ptr, mean_ptr, var_ptr, scale_ptr, shift_ptr, K, eps, BLOCK_M: tl.constexpr
):
    """BLOCK_M channels of one BatchNorm, or of none. The branches on None are decided when the kernel is compiled."""
    acc = scale_ptr.dtype.element_ty
    k = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mask = k < K
    scale = tl.full([BLOCK_M], 1.0, acc)
    if var_ptr is not None:
        var = tl.load(var_ptr + k, mask=mask, other=1.0).to(acc)
        # sqrt_rn is there for fp32 alone.
        scale = 1.0 / (tl.sqrt_rn(var + eps) if acc == tl.float32 else tl.sqrt(var + eps))
    if gamma_ptr is not None:
        scale = scale * tl.load(gamma_ptr + k, mask=mask).to(acc)
    centred = tl.zeros([BLOCK_M], acc)
    if mean_ptr is not None:
        centred = 0.0 - tl.load(mean_ptr + k, mask=mask).to(acc)
    if bias_ptr is not None:
        centred = centred + tl.load(bias_ptr + k, mask=mask).to(acc)
    shift = centred * scale
    if beta_ptr is not None:
        shift = shift + tl.load(beta_ptr + k, mask=mask).to(acc)
    tl.store(scale_ptr + k, scale, mask=mask)
    tl.store(shift_ptr + k, shift, mask=mask)


@triton.jit(do_not_specialize=["C", "K0", "K1", "K2", "K3", "K4", "K5", "K6"])
def pack_kernel(
    weights, biases, gammas, betas, means, variances, eps, w_out_ptr, scale_ptr, shift_ptr,
    C, K0, K1, K2, K3, K4, K5, K6,
    RS: tl.constexpr, KRSC: tl.constexpr, FOLD: tl.constexpr, UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Sizes come one by one: Triton specialises integers inside a tuple whatever do_not_specialize says, and every
    # block of a network would be a binary of its own.
    job = tl.program_id(1)
    filters = (K0, K1, K2, K3, K4, K5, K6)
    channels = (C, C, K1, C, K3, K4, C)
    offset = 0
    affine = 0
    for i in tl.static_range(7):
        if weights[i] is not None:
            size = filters[i] * channels[i] * RS[i]
            if job == i:
                copy_krsc(weights[i], w_out_ptr + offset, size, channels[i], RS[i], KRSC[i], BLOCK_M)
            offset += tl.cdiv(size, UNIT) * UNIT
        if FOLD:
            if job == 7 + i:
                fold_batch_norm(
                    biases[i], gammas[i], betas[i], means[i], variances[i],
                    scale_ptr + affine, shift_ptr + affine, filters[i], eps[i], BLOCK_M,
                )  # fmt: skip
        affine += filters[i]


def pack(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    batch_norms: Sequence[BatchNorm | None] | None = None,
    *,
    tile: Tile = TILE,
) -> Packed:
    """Prepare a block's parameters in at most one launch; none where nothing needs it.

    weights: one [K, C, R, R] a convolution, of any floating dtype and strides. biases: each [K] or None. batch_norms:
    one each, their vectors dense, None where a convolution has none; None for none at all. tile: of which BLOCK_M
    counts. Without BatchNorm the biases serve as they are: an epilogue reads any floating dtype.
    """
    jobs = [None if is_ready(w, dtype) else as_dense(w) for w in weights]
    if batch_norms is None and not any(w is not None for w in jobs):
        return Packed(list(weights), biases, [None] * len(weights))

    unit = 16 // dtype.itemsize
    sizes = [0 if w is None else w.numel() for w in jobs]
    offsets, end = _offsets([-(-size // unit) for size in sizes])
    first = chains.first(weights)
    buffer = first.new_empty(end * unit, dtype=dtype)
    out = [
        w if job is None else _krsc_view(buffer, o * unit, w) for w, job, o in zip(weights, jobs, offsets, strict=True)
    ]

    filters = chains.longest_filters([w.shape[0] for w in weights])
    affine_offsets, total = _offsets(filters)
    jobs, sides = chains.longest(jobs, None), chains.longest([w.shape[2] for w in weights], 1)
    norms = chains.longest(batch_norms or chains.each(None, weights), None)
    gammas, betas, means, variances, eps = zip(*(norm or MISSING for norm in norms), strict=True)
    folded_biases = chains.longest(biases if batch_norms else chains.each(None, weights), None)
    affine = first.new_empty((2, total), dtype=accumulator_of(dtype)) if batch_norms else None
    scale, shift = affine.unbind() if affine is not None else (None, None)
    jobs_of_each = 2 if batch_norms else 1
    launch(
        pack_kernel,
        (triton.cdiv(max(*sizes, *(filters if batch_norms else ())), tile.BLOCK_M), jobs_of_each * len(jobs)),
        (
            tuple(jobs), tuple(folded_biases), gammas, betas, means, variances, eps,
            buffer, scale, shift, first.shape[1], *filters,
        ),
        dict(
            RS=tuple(side**2 for side in sides),
            KRSC=tuple(job is not None and not job.is_contiguous() for job in jobs),
            FOLD=batch_norms is not None,
            UNIT=unit,
        ),
        tile,
    )  # fmt: skip
    if affine is None:
        return Packed(out, biases, [None] * len(weights))
    parts = [affine[:, o : o + k].unbind() for o, k in zip(affine_offsets, filters, strict=True)]
    parts = chains.shortest(parts, weights)
    return Packed(out, [part[1] for part in parts], [part[0] for part in parts])


def _krsc_view(buffer: Tensor, start: int, w: Tensor) -> Tensor:
    """A part of the flat buffer as [K, C, R, S] in KRSC memory."""
    k, c, r, s = w.shape
    return buffer.as_strided((k, c, r, s), (r * s * c, 1, s * c, c), start)


def _offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    return [sum(sizes[:i]) for i in range(len(sizes))], sum(sizes)
