"""A 3x3 max-pool of stride 2, and bias and ReLU before it, as a function that autograd knows.

The kernels where they can run, PyTorch's own operators elsewhere and in graphs that outlive the call, of torch.export
or torch.jit.trace, which PyTorch can differentiate and hand on.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from inception_fused.block.pools import NO_TAP, PADDINGS, STRIDE, WINDOW, PoolShape
from inception_fused.block.views import accumulator_of
from inception_fused.op import backends, checking, pools, reasons, saved
from inception_fused.op import batching as _batching  # noqa: F401  registers the operators' rules for torch.func
from inception_fused.op.autograd import announce_eager
from inception_fused.op.calls import PLAIN_SET
from inception_fused.runtime import aten, aten_pools


def max_pool(
    x: Tensor, *, padding: int, ceil_mode: bool = False, bias: Tensor | None = None, relu: bool = False
) -> Tensor:
    """max_pool2d(act(x + bias), 3, 2, padding, ceil_mode=ceil_mode), act being ReLU or nothing.

    x: [N, C, H, W], floating, any strides; what else PyTorch's pool takes it gets. bias: [C], cast to x's dtype as
    autocast would have a convolution cast it. Returns [N, C, Ho, Wo], of the kernels in channels_last memory.

    Raises:
        KernelError: where the backend demands kernels that cannot run.
    """
    backend = backends.current()
    if bias is not None and bias.dtype != x.dtype:
        bias = bias.to(x.dtype)
    if reasons.outlives_this_call() or not takes(x, padding, ceil_mode):
        return layers(x, bias, relu, padding, ceil_mode)
    reason = obstacle(x, (bias,), backend, x.dtype)
    if reason is not None:
        # Quiet, since the blocks that the pool stands between say the same.
        announce_eager(x, reason.text, backend, quiet=True)
        return layers(x, bias, relu, padding, ceil_mode)
    return _call(x, bias, relu, padding, ceil_mode, backend)


def takes(x: Tensor, padding: int, ceil_mode: bool) -> bool:
    """Whether x is an image that the kernels know. Others are PyTorch's: it has them, or says what is wrong."""
    if x.dim() != 4 or x.layout is not torch.strided or x.is_quantized or padding not in PADDINGS:
        return False
    _, channels, h, w = x.shape
    return channels > 0 and h > 0 and w > 0 and min(pools.shape_of(x, padding, ceil_mode).pooled) > 0


def obstacle(x: Tensor, parameters: Sequence[Tensor | None], backend: str, dtype: torch.dtype) -> reasons.Reason | None:
    """Why the kernels do not run; None where they do. parameters: of what comes before the pool; dtype: of what is
    pooled."""
    strange = [t for t in parameters if t is not None and type(t) not in PLAIN_SET]
    return reasons.first(x.device, dtype, backend, x=strange[0] if strange else x)


def layers(x: Tensor, bias: Tensor | None, relu: bool, padding: int, ceil_mode: bool) -> Tensor:
    """:func:`max_pool` as PyTorch's layers."""
    if bias is not None:
        x = x + bias[:, None, None]
    if relu:
        x = F.relu(x)
    return F.max_pool2d(x, WINDOW, STRIDE, padding, ceil_mode=ceil_mode)


def _call(x: Tensor, bias: Tensor | None, relu: bool, padding: int, ceil_mode: bool, backend: str) -> Tensor:
    """The operator for inference, or the Function where gradients are wanted."""
    needed = torch.is_grad_enabled() and (
        # A tensor that vmap has wrapped does not say whether gradients of what it wraps are wanted.
        reasons.transforming() or x.requires_grad or (bias is not None and bias.requires_grad)
    )
    given = (x, bias, relu, padding, ceil_mode)
    if needed:
        y = MaxPoolFunction.apply(*given, backend)[0]
    else:
        y = torch.ops.inception_fused._max_pool.default(*given, False, backend)[0]
    if checking.on and checking.can_check(x, y):
        with torch.no_grad():
            checking.check_pool(y, layers(*given))
    return y


class MaxPoolFunction(torch.autograd.Function):
    """``apply(x, bias or None, relu, padding, ceil_mode, backend)``.

    Returns (y, taps) as the operator does; only y is differentiable. Saved for backward are the taps alone, half a byte
    an element of y: neither x nor y, so that what follows may change y in place, nor the bias.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, relu: bool, padding: int, ceil_mode: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        return torch.ops.inception_fused._max_pool.default(x, bias, relu, padding, ceil_mode, True, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, bias, _relu, padding, ceil_mode, ctx.backend = inputs
        _, taps = output
        ctx.pool = pools.shape_of(x, padding, ceil_mode)
        ctx.bias_dtype = None if bias is None else saved.dtype_name(bias.dtype)
        ctx.mark_non_differentiable(taps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(taps)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        (taps,), pool = ctx.saved_tensors, ctx.pool
        x_needed, biased = ctx.needs_input_grad[:2]
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or saved.is_batched(dy):
            dx, dbias = scattered(dy, taps, pool)
            dx = dx.to(dy.dtype)
            dbias = dbias.to(getattr(torch, ctx.bias_dtype)) if biased else None
        else:
            given = (dy, taps, pool.h, pool.w, pool.padding, pool.ceil_mode)
            name = ctx.bias_dtype if biased else ""
            dx, dbias = torch.ops.inception_fused._max_pool_backward.default(*given, name, ctx.backend)
            if checking.on and checking.can_check(dy, taps):
                _check(dx, dbias if biased else None, dy, taps, pool)
        return (dx if x_needed else None, dbias if biased else None, None, None, None, None)


# apply() asks for the signature at every call: 10 us of the host, unless a function carries it.
MaxPoolFunction.forward.__signature__ = inspect.signature(MaxPoolFunction.forward)


def scattered(dy: Tensor, taps: Tensor, pool: PoolShape) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the bias, in the dtype of sums, by PyTorch's own operators with the forward's taps, to
    any order: those of second order reach dy alone."""
    h, w = pool.pooled
    channels = dy.shape[1]
    named = aten.unpack_taps(taps, channels).unflatten(0, (pool.n, h, w)).permute(0, 3, 1, 2)
    stopped = named == NO_TAP
    # Any pixel, where nothing is sent.
    places = torch.where(stopped, 0, aten_pools.indices_of_taps(named, pool)).flatten(2)
    sent = torch.where(stopped, 0, dy.to(accumulator_of(dy.dtype)))
    # reshape, since several gradients at once (is_grads_batched=True) have no flatten.
    dx = sent.new_zeros((pool.n, channels, pool.h * pool.w)).scatter_add(2, places, sent.reshape(places.shape))
    return dx.reshape(pool.n, channels, pool.h, pool.w), sent.sum(dim=(0, 2, 3))


def _check(dx: Tensor, dbias: Tensor | None, dy: Tensor, taps: Tensor, pool: PoolShape) -> None:
    """Compare what the kernel gave with :func:`scattered` in float64."""
    (exact, total), (size, total_size) = (scattered(t, taps, pool) for t in (dy.double(), dy.double().abs()))
    checking.check_pool_gradient("x", dx, exact, size, 4)
    if dbias is not None:
        checking.check_pool_gradient("bias", dbias, total, total_size, pool.pooled_rows)
