"""The operators behind a 3x3 max-pool of stride 2, and bias and ReLU before it: schemas, fake and real implementations.

``inception_fused::_max_pool`` and ``::_max_pool_backward`` are functional and private. Each is one launch, P1 and P2;
the second adds up the bias's partial sums behind it. Autograd lives in pools_autograd.py, outside the operators, which
refuse what they would have to differentiate.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inception_fused.block.checks import check_matrix, check_memory, check_place
from inception_fused.block.pools import PADDINGS, PoolShape
from inception_fused.block.views import ChannelSlice, Tile, accumulator_of, row_stride, taps_width, unit_of
from inception_fused.errors import InceptionInputError
from inception_fused.op import dispatch, reasons
from inception_fused.op.backends import parse
from inception_fused.op.calls import refuse_derivatives
from inception_fused.op.launcher import function_of
from inception_fused.op.operators import as_rows, current_device, library, refuse_traced, strict
from inception_fused.op.saved import dtypes_of
from inception_fused.plan import choice, kernel_table, tile_table
from inception_fused.plan.rules import PLANNED
from inception_fused.runtime import replay

POOL, POOL_GRAD = kernel_table.POOL_KERNELS

library.define(
    "_max_pool(Tensor x, Tensor? bias, bool relu, int padding, bool ceil_mode, bool save_taps, str backend) "
    "-> (Tensor y, Tensor taps)"
)
library.define(
    "_max_pool_backward(Tensor dy, Tensor taps, SymInt h, SymInt w, int padding, bool ceil_mode, str bias_dtype, "
    "str backend) -> (Tensor dx, Tensor dbias)"
)


def outputs(x: Tensor, pool: PoolShape, save_taps: bool) -> tuple[Tensor, Tensor]:
    """Fresh y [N, C, Ho, Wo] in channels_last memory and taps [N*Ho*Wo, ceil(C / 2)], [0] where they are not asked
    for."""
    size, channels = (pool.n, x.shape[1], *pool.pooled), x.shape[1]
    y = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    wanted = (pool.pooled_rows, taps_width(channels)) if save_taps else (0,)
    return y, x.new_empty(wanted, dtype=torch.uint8)


def shape_of(x: Tensor, padding: int, ceil_mode: bool) -> PoolShape:
    """Of the pool of x [N, C, H, W]."""
    n, _, h, w = x.shape
    return PoolShape(n, h, w, padding, ceil_mode)


def exceeds_int32(pool: PoolShape, channels: int, stride: int) -> bool:
    """Whether a row number, or an offset inside a window or a tile, would not fit into 32 bits. stride: elements from
    one pixel of x, or of dy, to the next."""
    widest = max(stride, channels)
    return max((pool.w + tile_table.MAX_BLOCK) * widest + channels, pool.rows + tile_table.MAX_BLOCK) >= 2**31


def _max_pool(
    x: Tensor, bias: Tensor | None, relu: bool, padding: int, ceil_mode: bool, save_taps: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """max_pool2d(act(x + bias), 3, 2, padding, ceil_mode=ceil_mode), act being ReLU or nothing.

    x: [N, C, H, W]; bias: [C] of any floating dtype, or None; both of any strides. Returns (y, taps) as outputs()
    describes them.
    """
    given = (x,) if bias is None else (x, bias)
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_max_pool", given)
    _check(x, bias, padding, ceil_mode)
    x, bias = as_rows(x), bias if bias is None else bias.contiguous()
    with current_device(x):
        y, taps = replay.replayed(
            lambda: _planned_forward(x, bias, relu, shape_of(x, padding, ceil_mode), save_taps, backend),
            (x,) if bias is None else (x, bias),
            *("max_pool", relu, padding, ceil_mode, save_taps, backend, strict(x)),
        )
    return y, taps


def _planned_forward(
    x: Tensor, bias: Tensor | None, relu: bool, pool: PoolShape, save_taps: bool, backend: str
) -> tuple[Tensor, Tensor]:
    y, taps = outputs(x, pool, save_taps)
    if y.numel():
        form, channels = _form(POOL, x, pool, backend, announced=False), x.shape[1]
        rows = ChannelSlice(x, row_stride(x), 0, channels), ChannelSlice(y, channels, 0, channels)
        launcher = function_of(POOL, form)
        more = _options(POOL, form, x, pool.pooled_rows)
        launcher(*rows, taps if save_taps else None, bias, relu=relu, pool=pool, **more)
    return y, taps


def _max_pool_backward(
    dy: Tensor, taps: Tensor, h: int, w: int, padding: int, ceil_mode: bool, bias_dtype: str, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradients of x [N, C, H, W], in channels_last memory, and of the bias.

    dy: [N, C, Ho, Wo], any strides; taps: as the forward of an image of h x w pixels saved them. bias_dtype: "float32"
    and the like, "" where the gradient of the bias is not wanted, which is empty then.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_max_pool_backward", (dy,))
    n, channels, *pooled = dy.shape
    pool = PoolShape(n, h, w, padding, ceil_mode)
    if tuple(pooled) != pool.pooled:
        raise InceptionInputError(f"dy: got shape {tuple(dy.shape)}, wants images of {pool.pooled}, of {h}x{w} pixels")
    for name, t in (("dy", dy), ("taps", taps)):
        check_memory(name, t, dy)
    check_matrix("taps", taps, (pool.pooled_rows, taps_width(channels)), torch.uint8)
    dy = as_rows(dy)
    with current_device(dy):
        dx, sums = replay.replayed(
            lambda: _planned_backward(dy, taps, pool, bool(bias_dtype), backend),
            (dy, taps),
            *("max_pool_backward", h, w, padding, ceil_mode, bool(bias_dtype), backend, strict(dy)),
        )
        if not bias_dtype:
            return dx, sums
        # Not replayed, since it is PyTorch's: in a fixed order, without atomics.
        (dtype,) = dtypes_of([bias_dtype])
        return dx, sums.sum(dim=0).to(dtype)


def _planned_backward(dy: Tensor, taps: Tensor, pool: PoolShape, biased: bool, backend: str) -> tuple[Tensor, Tensor]:
    """dx, and the partial sums of the bias's gradient [tiles, C] or [0]."""
    channels = dy.shape[1]
    size, accumulator = (pool.n, channels, pool.h, pool.w), accumulator_of(dy.dtype)
    dx = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    if not dy.numel():
        return dx.zero_(), dy.new_zeros((1, channels) if biased else (0,), dtype=accumulator)
    form = _form(POOL_GRAD, dy, pool, backend, announced=True)
    more = _options(POOL_GRAD, form, dy, pool.cells)
    tiles = -(-pool.cells // more["tile"].BLOCK_M) if more else 1
    sums = dy.new_empty((tiles, channels) if biased else (0,), dtype=accumulator)
    rows = ChannelSlice(dy, row_stride(dy), 0, channels), ChannelSlice(dx, channels, 0, channels)
    function_of(POOL_GRAD, form)(rows[0], taps, rows[1], sums if biased else None, pool=pool, **more)
    return dx, sums


def _form(kernel: kernel_table.Kernel, rows: Tensor, pool: PoolShape, backend: str, *, announced: bool) -> str:
    """ "triton" or "eager" for a kernel that reads ``rows``. announced: whether the forward has warned or refused.

    Raises:
        KernelError: where kernels are demanded that cannot run.
    """
    asked, too_large = parse(backend), exceeds_int32(pool, rows.shape[1], row_stride(rows))
    form = dispatch.choices(backend, rows.device, rows.dtype)[kernel.name]
    if not too_large:
        return form
    if not announced:
        if asked.demands_kernels:
            raise reasons.refused(backend, reasons.TOO_LARGE)
        if form != "eager" and rows.is_cuda:
            # Of other reasons the blocks that the pool stands between have told.
            reasons.warn(reasons.TOO_LARGE, stacklevel=3)
    return "eager"


def _options(kernel: kernel_table.Kernel, form: str, rows: Tensor, gemm_m: int) -> dict[str, Any]:
    """Tile and unit of a launch, nothing for the ATen twin. gemm_m: windows or cells. The tuner has no tables of it."""
    if form == "eager":
        return {}
    channels = rows.shape[1]
    unit = unit_of(rows.dtype, channels, row_stride(rows)) if rows.data_ptr() % 16 == 0 else 1
    return {"tile": _tile(kernel.name, rows, gemm_m, channels, unit), "unit": unit}


def _tile(rules: str, rows: Tensor, gemm_m: int, channels: int, unit: int) -> Tile:
    if reasons.interpreting():
        return choice.interpreter_tile(gemm_m, channels, 1)
    capability = torch.cuda.get_device_capability(rows.device) if rows.is_cuda else PLANNED
    return choice.choose_tile(rules, rows.dtype, gemm_m=gemm_m, gemm_n=channels, unit=unit, capability=capability)


def _check(x: Tensor, bias: Tensor | None, padding: int, ceil_mode: bool) -> None:
    """Raise InceptionInputError unless the operands are those of a pool."""
    if x.dim() != 4 or not x.is_floating_point():
        raise InceptionInputError(f"x: got {tuple(x.shape)} {x.dtype}, wants a floating [N, C, H, W]")
    if padding not in PADDINGS:
        raise InceptionInputError(f"padding: got {padding}, wants {' or '.join(map(str, PADDINGS))}")
    if min(shape_of(x, padding, ceil_mode).pooled) < 1 or not x.shape[1]:
        raise InceptionInputError(f"x: got {tuple(x.shape)}, wants an image that has a window")
    if bias is not None and not (bias.shape == x.shape[1:2] and bias.is_floating_point()):
        raise InceptionInputError(f"bias: got {tuple(bias.shape)} {bias.dtype}, wants a floating [{x.shape[1]}]")
    for name, t in (("x", x), ("bias", bias)):
        if t is not None:
            check_memory(name, t, x)


@torch.library.register_fake("inception_fused::_max_pool", lib=library)
def _fake_max_pool(x, bias, relu, padding, ceil_mode, save_taps, backend):
    refuse_traced("_max_pool", (x,) if bias is None else (x, bias))
    # One tensor on the meta device brings the other here.
    if bias is not None:
        check_place("bias", bias, x)
    return outputs(x, shape_of(x, padding, ceil_mode), save_taps)


@torch.library.register_fake("inception_fused::_max_pool_backward", lib=library)
def _fake_max_pool_backward(dy, taps, h, w, padding, ceil_mode, bias_dtype, backend):
    refuse_traced("_max_pool_backward", (dy,))
    size = (*dy.shape[:2], h, w)
    dx = torch.empty(size, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
    return dx, dy.new_empty(dy.shape[1:2], dtype=dtypes_of([bias_dtype])[0]) if bias_dtype else dy.new_empty(0)


for _device in ("CPU", "CUDA"):
    library.impl("_max_pool", _max_pool, _device)
    library.impl("_max_pool_backward", _max_pool_backward, _device)
