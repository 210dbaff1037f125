"""Repairs of Triton's CPU interpreter (3.6 to 3.9), loaded only where TRITON_INTERPRET=1.

As shipped, bf16 means nothing there: values are held as uint16 bit patterns, and arithmetic, comparison, matrix
products and maxima work on the patterns; fp32 -> bf16 truncates where hardware rounds to nearest even. A fused
multiply-add rounds its product too. Triton 3.6 also refuses a run-time loop bound under numpy >= 2.4, and up to 3.7 a
maximum without ``propagate_nan`` keeps the NaN that hardware's drops. Repaired are exactly these; every value then
equals PyTorch's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as shipped


def repair() -> None:
    """Patch the interpreter of this process. Idempotent."""
    builder = shipped.InterpreterBuilder
    if hasattr(builder, "inception_fused_shipped_cast"):
        return
    builder.inception_fused_shipped_cast = builder.cast_impl
    builder.cast_impl = _cast
    builder.create_fp_to_fp = _wrap_fp_to_fp(builder.create_fp_to_fp)
    for name in ("create_fp_ext", "create_fp_trunc", "create_si_to_fp", "create_ui_to_fp"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    for name in ("create_fp_to_si", "create_fp_to_ui"):
        setattr(builder, name, lambda self, src, dst_type: self.cast_impl(src, dst_type))
    builder.binary_op = _through_fp32(builder.binary_op)
    builder.unary_op = _through_fp32(builder.unary_op)
    # As Triton 3.8 has them; a NaN that a kernel loses on a GPU would be seen here.
    builder.create_maxnumf = lambda self, a, b: self.binary_op(a, b, np.fmax)
    builder.create_minnumf = lambda self, a, b: self.binary_op(a, b, np.fmin)
    builder.create_fma = _fma
    builder.create_dot = _wrap_dot(builder.create_dot)
    builder.get_bf16 = lambda self, value: self.cast_impl(self.get_fp32(value), tl.bfloat16)
    shipped._patch_lang_tensor = _wrap_patch_tensor(shipped._patch_lang_tensor)
    _patch_once_a_launch()
    # The int32 overflow check costs a third of the time and more; sanitize_overflow() switches it on.
    shipped.interpreter_builder.options = shipped.InterpreterOptions(sanitize_overflow=False)


def sanitize_overflow(enabled: bool) -> None:
    """Switch the interpreter's check for int32 overflow in address arithmetic (off by default: 1.3 to 1.7x slower)."""
    shipped.interpreter_builder.options = shipped.InterpreterOptions(sanitize_overflow=enabled)


def _patch_once_a_launch() -> None:
    """Let a call of one device function by another find the language as its launch has patched it.

    As shipped every such call patches it anew, which finds nothing to do and takes 1.7 ms: a quarter of a block's step.
    """
    patch, patched = shipped._patch_lang, set()

    @cache
    def languages(fn: Callable[..., Any]) -> frozenset[int]:
        return frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)

    def patch_for_a_launch(fn: Callable[..., Any]) -> Any:
        patched.clear()
        patched.update(languages(fn))
        return patch(fn)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not languages(self.fn) <= patched:
            patch(self.fn)
            patched.update(languages(self.fn))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise shipped.InterpreterError(repr(error)) from error

    shipped._patch_lang = patch_for_a_launch
    shipped.InterpretedFunction.__call__ = call


def _is_bf16(handle: Any) -> bool:
    return handle.dtype.scalar == tl.bfloat16


def _bf16_to_fp32(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _fp32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Round to nearest even; a NaN stays one (PyTorch gives the quiet 0x7FC0, sign kept)."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits.astype(np.uint64) + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    quiet = ((bits >> 16) & 0x8000 | 0x7FC0).astype(np.uint16)
    return np.where(np.isnan(np.asarray(values)), quiet, rounded).reshape(np.shape(values))


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    dst = dst_type.scalar
    if _is_bf16(src) and dst != tl.bfloat16:
        src = shipped.TensorHandle(_bf16_to_fp32(src.data), tl.float32)
    elif dst == tl.bfloat16 and not _is_bf16(src):
        return shipped.TensorHandle(_fp32_to_bf16(src.data.astype(np.float32)), dst)
    return self.inception_fused_shipped_cast(src, dst_type)


def _wrap_fp_to_fp(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        if _is_bf16(src) or dst_type.scalar == tl.bfloat16:
            return self.cast_impl(src, dst_type)
        return original(self, src, dst_type, rounding_mode)

    return create_fp_to_fp


def _through_fp32(original: Callable[..., Any]) -> Callable[..., Any]:
    """bf16 operands widen to fp32, exactly; a floating result rounds back, a comparison's stays as it is."""

    def op_on_values(self: Any, *operands_and_op: Any) -> Any:
        *operands, op = operands_and_op
        if not any(_is_bf16(operand) for operand in operands):
            return original(self, *operands, op)
        wide = [_cast(self, operand, tl.float32) if _is_bf16(operand) else operand for operand in operands]
        out = op(*(operand.data for operand in wide))
        if out.dtype == np.bool_:
            return shipped.TensorHandle(out, tl.int1)
        return shipped.TensorHandle(_fp32_to_bf16(out), tl.bfloat16)

    return op_on_values


def _fma(self: Any, x: Any, y: Any, z: Any) -> Any:
    """x * y + z; in fp32 rounded once but for a tie, as block/batch_stats.py's ``normalised`` does."""
    a, b, c = (operand.data.astype(np.float64) for operand in (x, y, z))
    return shipped.TensorHandle((a * b + c).astype(z.data.dtype), z.dtype.scalar)


def _wrap_dot(original: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        a, b = (_cast(self, operand, tl.float32) if _is_bf16(operand) else operand for operand in (a, b))
        return original(self, a, b, d, input_precision, max_num_imprecise_acc)

    return create_dot


def _wrap_patch_tensor(original: Callable[..., Any]) -> Callable[..., Any]:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda value: int(value.handle.data.item()))

    return patch
