"""The ATen twin of every launcher: the same arguments, the same places written, in plain PyTorch calls.

They serve a kernel that is switched off (``backend("K3=eager")``), tensors on a CPU, and machines without Triton.
Arithmetic is PyTorch's own in the dtype of the operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.batch_stats import MEAN, Centred
from inception_fused.block.shapes import BlockShape
from inception_fused.block.views import (
    BatchNorm,
    ChannelSlice,
    Epilogue,
    Packed,
    PackedDgrad,
    Partials,
    accumulator_of,
    bits_width,
    is_ready,
)

WINDOW = 3
"""Side of the pool's window; its padding is 1, its stride 1."""


def pack(
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    dtype: torch.dtype,
    batch_norms: Sequence[BatchNorm | None] | None = None,
) -> Packed:
    """Parameters as a kernel reads them; see kernels/pack.py."""
    ready = [w if is_ready(w, dtype) else w.to(dtype, memory_format=torch.channels_last, copy=True) for w in weights]
    if batch_norms is None:
        return Packed(ready, biases, [None] * len(ready))
    folded = zip(batch_norms, biases, weights, strict=True)
    pairs = [_folded(norm, b, accumulator_of(dtype), w.new_zeros(w.shape[0])) for norm, b, w in folded]
    return Packed(ready, [shift for _, shift in pairs], [scale for scale, _ in pairs])


def _folded(norm: BatchNorm | None, bias: Tensor | None, dtype: torch.dtype, zeros: Tensor) -> tuple[Tensor, Tensor]:
    """scale and shift of one BatchNorm, or of none, in dtype. zeros: [K]."""
    if norm is None:
        zeros = zeros.to(dtype)
        return zeros + 1, zeros if bias is None else bias.to(dtype)
    gamma, beta, mean, var, bias = (t.to(dtype) if t is not None else None for t in (*norm[:4], bias))
    scale = (var + norm.eps).rsqrt()
    if gamma is not None:
        scale = scale * gamma
    shift = (bias - mean if bias is not None else -mean) * scale
    return scale, shift if beta is None else shift + beta


def grouped_gemm(
    x: ChannelSlice,
    weights: Sequence[Tensor],
    y: ChannelSlice,
    r3: ChannelSlice,
    r5: ChannelSlice,
    bits: ChannelSlice | None,
    *,
    gemm_m: int,
    epilogues: Sequence[Epilogue],
) -> None:
    """K1; see kernels/grouped_gemm.py."""
    rows = x.rows(gemm_m)
    for w, out, mask, epilogue in zip(weights, (y, r3, r5), (bits, None, None), epilogues, strict=True):
        _store(rows @ w.flatten(1).T, out, mask, gemm_m, epilogue)


def conv_fprop(
    x: ChannelSlice,
    w: Tensor,
    y: ChannelSlice,
    bits: ChannelSlice | None,
    *,
    gemm_m: int,
    image: tuple[int, int],
    epilogue: Epilogue,
) -> None:
    """K3 and K4; see kernels/conv_fprop.py."""
    out = F.conv2d(images_of(x, gemm_m, image), w, padding=w.shape[-1] // 2)
    _store(rows_of(out), y, bits, gemm_m, epilogue)


def pool_proj(
    x: ChannelSlice,
    w: Tensor,
    y: ChannelSlice,
    bits: ChannelSlice | None,
    taps: Tensor | None,
    *,
    gemm_m: int,
    image: tuple[int, int],
    epilogue: Epilogue,
) -> None:
    """K2; see kernels/pool_proj.py."""
    images = images_of(x, gemm_m, image)
    if taps is None:
        pooled = F.max_pool2d(images, WINDOW, stride=1, padding=1)
    else:
        pooled, indices = F.max_pool2d(images, WINDOW, stride=1, padding=1, return_indices=True)
        taps.copy_(pack_taps(rows_of(taps_of_indices(indices))))
    _store(rows_of(pooled) @ w.flatten(1).T, y, bits, gemm_m, epilogue)


def pack_dgrad(
    weights: Sequence[Tensor], dtype: torch.dtype, *, r5: int, reduced_width: int, wanted: Sequence[bool]
) -> PackedDgrad:
    """Weights as dgrad reads them; see kernels/pack_dgrad.py."""
    packed = PackedDgrad.empty(weights, dtype, reduced_width, wanted)
    flipped = (*packed.windows, packed.projection)
    for out, w in zip(flipped, (*chains.windows(weights), chains.projection(weights)), strict=True):
        if out is not None:
            out.copy_(w.flip((2, 3)).permute(1, 2, 3, 0))
    if packed.grouped is not None:
        packed.grouped.zero_()
        k1 = chains.direct([w.shape[0] for w in weights])
        starts = ([0] if k1 else []) + [k1, k1 + r5]
        for w, start in zip(chains.reductions(weights), starts, strict=False):
            packed.grouped[:, start : start + w.shape[0]] = w.flatten(1).T
    return packed


def mask_grad(
    dy: Tensor, bits: ChannelSlice | None, g: Sequence[ChannelSlice], sums: Tensor | None, borders: Tensor,
    *, ranges: tuple[int, int],
) -> None:  # fmt: skip
    """B1; see kernels/mask_grad.py. One range."""
    borders.copy_(border_words(tuple(dy.shape[2:]), borders.numel(), dy.device))
    gemm_m = dy.shape[0] * dy.shape[2] * dy.shape[3]
    column = byte = 0
    for part in g:
        columns = rows_of(dy)[:, column : column + part.channels]
        if bits is not None:
            width = bits_width(part.channels)
            columns = torch.where(unpack_bits(bits.rows(gemm_m)[:, byte : byte + width], part.channels), columns, 0)
            byte += width
        part.rows(gemm_m).copy_(columns)
        if sums is not None:
            sums[0, column : column + part.channels] = columns.sum(dim=0, dtype=sums.dtype)
        column += part.channels


def conv_dgrad(
    g: ChannelSlice,
    w_t: Tensor,
    r: ChannelSlice | None,
    dr: ChannelSlice,
    sums: ChannelSlice | None,
    *,
    gemm_m: int,
    image: tuple[int, int],
    width: int,
    centred: Centred | None = None,
) -> None:
    """B2; see kernels/conv_dgrad.py."""
    out = rows_of(F.conv2d(images_of(g, gemm_m, image), w_t.permute(0, 3, 1, 2), padding=w_t.shape[1] // 2))
    if r is not None:
        out = torch.where(r.rows(gemm_m) <= 0, 0, out)
    dr._replace(channels=width).rows(gemm_m).copy_(F.pad(out, (0, width - dr.channels)))
    if sums is not None:
        sums.rows(1).copy_(out.sum(dim=0, dtype=sums.base.dtype))
    if centred is not None:
        raw, stats, dots = centred
        away = raw.rows(gemm_m).to(stats.base.dtype) - stats.rows(MEAN + 1)[MEAN]
        dots.rows(1).copy_((out * away).sum(dim=0))


def grouped_dgrad(
    g: ChannelSlice,
    w_t: Tensor,
    dpool: ChannelSlice,
    taps: Tensor,
    dx: ChannelSlice,
    *,
    gemm_m: int,
    image: tuple[int, int],
) -> None:
    """B3; see kernels/grouped_dgrad.py. A gather as there: ATen's own scatter adds in no fixed order on CUDA."""
    h, w = image
    sent_to = unpack_taps(taps, dx.channels).unflatten(0, (-1, h, w)).permute(0, 3, 1, 2)
    gradient = images_of(dpool, gemm_m, image)
    total = images_of(ChannelSlice(g.rows(gemm_m) @ w_t.T, dx.channels, 0, dx.channels), gemm_m, image)
    total = total.to(torch.promote_types(gradient.dtype, torch.float32))
    for tap in range(WINDOW**2):
        r, s = divmod(tap, WINDOW)
        sent = F.pad(torch.where(sent_to == tap, gradient, 0), (1, 1, 1, 1))
        total = total + sent[:, :, 2 - r : 2 - r + h, 2 - s : 2 - s + w]
    dx.rows(gemm_m).copy_(rows_of(total))


def conv_wgrad(
    g: ChannelSlice, x: ChannelSlice, part: Tensor, borders: Tensor,
    *, gemm_m: int, image: tuple[int, int], pool: bool,
) -> None:  # fmt: skip
    """B4; see kernels/conv_wgrad.py. One range, and no need of borders."""
    images = images_of(x, gemm_m, image)
    if pool:
        images = F.max_pool2d(images, WINDOW, stride=1, padding=1)
    _, k, r, _, c = part.shape
    w = images.new_empty((k, c, r, r))
    wanted = [False, True, False]
    _, dw, _ = torch.ops.aten.convolution_backward(
        images_of(g, gemm_m, image), images, w, None, [1, 1], [r // 2] * 2, [1, 1], False, [0, 0], 1, wanted
    )
    part[0] = dw.permute(0, 2, 3, 1)


def reduce(partials: Partials, outs: Sequence[Tensor | None], shape: BlockShape, *, first: int) -> None:
    """B5; see kernels/reduce.py."""
    group, windows, projection, out, inner = (
        tuple(map(_total, part)) if isinstance(part, (list, tuple)) else _total(part) for part in partials
    )
    # For each weight and bias: the sums that hold its own, and where these begin.
    grouped = [(group, start - first) for start, _ in shape.reductions]
    weights = chains.from_roles(grouped, [(part, None) for part in windows], (projection, None))
    branches = shape.branch_channels
    ends = [(out, sum(branches[:i])) for i in range(len(branches))]
    biases = chains.from_outputs(ends, [(inner, start) for start in shape.r_offsets])
    for out, k, (total, start) in zip(outs, [*shape.filters, *shape.filters], [*weights, *biases], strict=True):
        if out is None:
            continue
        if start is None:
            out.copy_(total.permute(0, 3, 1, 2))
        else:
            out.copy_(total[start : start + k].view(k, *out.shape[1:]))


def _total(part: Tensor | None) -> Tensor | None:
    return part.sum(dim=0) if part is not None else None


def border_words(image: tuple[int, int], words: int, device: torch.device) -> Tensor:
    """int16 [words]: of pixel q % (H*W) bit i where row + i - 2 is in the image, bit 8 + i where column + i - 2 is."""
    h, w = image
    q = torch.arange(words, device=device)
    found = torch.zeros_like(q)
    for i in range(5):
        for at, size, first in ((q // w % h, h, 0), (q % w, w, 8)):
            shifted = at + i - 2
            found |= ((shifted >= 0) & (shifted < size)).long() << first + i
    return found.to(torch.int16)


def taps_of_indices(indices: Tensor) -> Tensor:
    """PyTorch's flat arg-max indices [N, C, H, W] (row * W + column in the image) -> taps 3 * r + s in 0..8."""
    h, w = indices.shape[-2:]
    row = torch.arange(h, device=indices.device)[:, None]
    column = torch.arange(w, device=indices.device)[None, :]
    return (indices // w - row + 1) * WINDOW + (indices % w - column + 1)


def indices_of_taps(taps: Tensor) -> Tensor:
    """The inverse of :func:`taps_of_indices`, as int64."""
    h, w = taps.shape[-2:]
    row = torch.arange(h, device=taps.device)[:, None]
    column = torch.arange(w, device=taps.device)[None, :]
    taps = taps.long()
    return (taps // WINDOW - 1 + row) * w + (taps % WINDOW - 1 + column)


def pack_taps(taps: Tensor) -> Tensor:
    """[M, C] of 0..8 -> uint8 [M, ceil(C / 2)], the even channel in the low half."""
    taps = F.pad(taps.to(torch.uint8), (0, taps.shape[1] % 2))
    return taps[:, 0::2] | taps[:, 1::2] << 4


def unpack_taps(packed: Tensor, channels: int) -> Tensor:
    """uint8 [M, ceil(channels / 2)] -> uint8 [M, channels]."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1)[:, :channels]


def pack_bits(y: Tensor) -> Tensor:
    """Bits of not (y <= 0), so NaN passes: [M, K] -> uint8 [M, ceil(K / 8)], least significant bit first."""
    m, k = y.shape
    passes = F.pad((~(y <= 0)).to(torch.uint8), (0, -k % 8)).view(m, bits_width(k), 8)
    return (passes << torch.arange(8, dtype=torch.uint8, device=y.device)).sum(dim=-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, channels: int) -> Tensor:
    """uint8 [M, ceil(channels / 8)] -> bool [M, channels]."""
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return (packed[..., None] >> shifts & 1).bool().flatten(1)[:, :channels]


def _store(acc: Tensor, y: ChannelSlice, bits: ChannelSlice | None, gemm_m: int, epilogue: Epilogue) -> None:
    if epilogue.scale is not None:
        # Not in a 16-bit dtype: where mean is large, product and shift cancel.
        acc = acc * epilogue.scale
    if epilogue.shift is not None:
        acc = acc + epilogue.shift.to(acc.dtype)
    if epilogue.relu:
        acc = F.relu(acc)
    y.rows(gemm_m).copy_(acc)
    if bits is not None:
        bits.rows(gemm_m).copy_(pack_bits(acc.to(y.base.dtype)))


def images_of(x: ChannelSlice, gemm_m: int, image: tuple[int, int]) -> Tensor:
    """Rows as [N, C, H, W] in channels_last strides."""
    h, w = image
    return x.rows(gemm_m).unflatten(0, (gemm_m // (h * w), h, w)).permute(0, 3, 1, 2)


def rows_of(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [N*H*W, C]."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)
