"""The ATen twin of every launcher: the same arguments, the same places written, in plain PyTorch calls.

They serve a kernel that is switched off (``backend("K3=eager")``), tensors on a CPU, and machines without Triton.
Arithmetic is PyTorch's own in the dtype of the operands.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_fused.kernels.views import ChannelSlice, Epilogue, bits_width, is_ready

WINDOW = 3
"""Side of the pool's window; its padding is 1, its stride 1."""


def pack(weights: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Weights as a kernel reads them; see kernels/pack.py."""
    return [w if is_ready(w, dtype) else w.to(dtype, memory_format=torch.channels_last, copy=True) for w in weights]


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
    out = F.conv2d(_images(x, gemm_m, image), w, padding=w.shape[-1] // 2)
    _store(_rows(out), y, bits, gemm_m, epilogue)


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
    images = _images(x, gemm_m, image)
    if taps is None:
        pooled = F.max_pool2d(images, WINDOW, stride=1, padding=1)
    else:
        pooled, indices = F.max_pool2d(images, WINDOW, stride=1, padding=1, return_indices=True)
        taps.copy_(pack_taps(_rows(taps_of_indices(indices))))
    _store(_rows(pooled) @ w.flatten(1).T, y, bits, gemm_m, epilogue)


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
        acc = acc * epilogue.scale.to(acc.dtype)
    if epilogue.shift is not None:
        acc = acc + epilogue.shift.to(acc.dtype)
    if epilogue.relu:
        acc = F.relu(acc)
    y.rows(gemm_m).copy_(acc)
    if bits is not None:
        bits.rows(gemm_m).copy_(pack_bits(acc.to(y.base.dtype)))


def _images(x: ChannelSlice, gemm_m: int, image: tuple[int, int]) -> Tensor:
    """Rows as [N, C, H, W] in channels_last strides."""
    h, w = image
    return x.rows(gemm_m).unflatten(0, (gemm_m // (h * w), h, w)).permute(0, 3, 1, 2)


def _rows(images: Tensor) -> Tensor:
    """[N, C, H, W] -> [N*H*W, C]."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)
