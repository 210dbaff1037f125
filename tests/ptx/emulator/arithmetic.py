"""What PTX's arithmetic instructions compute, lane by lane: a table of patterns of opcodes, no state.

A register holds a bit pattern; an instruction reads it as a type and its result becomes a bit pattern again
(:func:`unpack`, :func:`pack`). Values of fp16 and bf16 are computed as fp32, which holds them exactly; of packed pairs
(``bf16x2``) the two halves are the first axis. An opcode that no pattern knows, modifiers included, is an error.
Sections are those of the PTX ISA 9.0, chapter 9.7 (Instructions).
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .integers import SINT, UINT, bit_field, funnel, inserted, lookup, permute, quotient, remainder, shifted

NAN_32, NAN_16 = 0x7FFFFFFF, 0x7FFF
"""The canonical NaN that max, min and conversions give, and additions and multiplications of fp32: "the result is the
quiet NaN of bit pattern 0x7fffffff" (CUDA C++ Programming Guide, floating-point standard)."""


class Operation(NamedTuple):
    """sources, results: types of operands; compute(*values) gives the value of the result, or of each."""

    sources: tuple[str, ...]
    result: str
    compute: Callable[..., np.ndarray]


def width(kind: str) -> int:
    """Bits of a type."""
    if kind == "pred":
        return 1
    return 32 if kind.endswith("x2") else int(re.sub(r"\D", "", kind.replace("bf", "").replace("tf", "")))


def bf16_values(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def bf16_bits(values: np.ndarray) -> np.ndarray:
    """Rounded to the nearest, ties to even; NaN is the canonical one."""
    values = np.ascontiguousarray(values, np.float32)
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(NAN_16), rounded.astype(np.uint16))


def fp16_values(bits: np.ndarray) -> np.ndarray:
    return bits.view(np.float16).astype(np.float32)


def fp16_bits(values: np.ndarray) -> np.ndarray:
    return np.where(np.isnan(values), np.uint16(NAN_16), np.asarray(values).astype(np.float16).view(np.uint16))


def tf32_values(bits: np.ndarray) -> np.ndarray:
    """As matrix units read fp32: the low 13 bits of the mantissa do not count."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


HALVES = {"bf16": (bf16_values, bf16_bits), "f16": (fp16_values, fp16_bits)}


def unpack(bits: np.ndarray, kind: str) -> np.ndarray:
    """Values of a type from a register's bit pattern, whose excess bits do not count."""
    if kind == "pred":
        return bits
    bits = bits.astype(UINT[width(kind)], copy=False)
    if kind.endswith("x2"):
        halves = np.stack([bits.astype(np.uint16), (bits >> np.uint32(16)).astype(np.uint16)])
        return unpack(halves, kind[:-2])
    if kind in HALVES:
        return HALVES[kind][0](bits)
    if kind == "f32":
        return bits.view(np.float32)
    return bits.view(SINT[width(kind)]) if kind[0] == "s" else bits


def pack(values: np.ndarray, kind: str) -> np.ndarray:
    """The bit pattern of values of a type, of its width."""
    if kind == "pred":
        return values
    if kind.endswith("x2"):
        low, high = pack(values, kind[:-2]).astype(np.uint32)
        return low | (high << np.uint32(16))
    if kind in HALVES:
        return HALVES[kind][1](values)
    if kind == "f32":
        return np.asarray(values).astype(np.float32, copy=False).view(np.uint32)
    return np.asarray(values).astype(UINT[width(kind)], copy=False)


def extreme(a: np.ndarray, b: np.ndarray, larger: bool, nan: bool) -> np.ndarray:
    """9.7.3.10, 9.7.3.11: the other operand of a NaN unless .NaN is given; +0.0 is above -0.0."""
    plain = np.fmax(a, b) if larger else np.fmin(a, b)
    take_b = np.signbit(a) if larger else ~np.signbit(a)
    found = np.where(a == b, np.where(take_b, b, a), plain)
    either = np.isnan(a) | np.isnan(b) if nan else np.isnan(a) & np.isnan(b)
    return np.where(either, np.uint32(NAN_32).view(np.float32), found)


def fused_to_odd(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in fp64, rounded to odd, so that a second rounding is that of the exact sum. The product is exact."""
    product, c = a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)
    total = product + c
    back = total - product
    error = (product - (total - back)) + (c - back)
    even = (total.view(np.int64) & 1) == 0
    step = np.where((error > 0) == (total > 0), 1, -1)
    inexact = np.isfinite(total) & (error != 0) & even & (total != 0)
    return (total.view(np.int64) + np.where(inexact, step, 0)).view(np.float64)


def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """a * b + c in fp32 with one rounding."""
    return fused_to_odd(a, b, c).astype(np.float32)


def fused_halves(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """The same of fp16 or bf16: rounded to odd in fp32 too, since pack() rounds."""
    exact = fused_to_odd(a, b, c)
    near = exact.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = np.isfinite(exact) & (near != exact) & (bits & np.uint32(1) == 0)
    step = np.where(np.abs(near) < np.abs(exact), np.uint32(1), np.uint32(0xFFFFFFFF))
    return (bits + np.where(inexact, step, np.uint32(0))).view(np.float32)


def towards_zero(values: np.ndarray, kind: str) -> np.ndarray:
    """fp32 cut to what fp16 or bf16 holds; a number beyond the largest becomes the largest."""
    if kind == "bf16":
        cut = (np.ascontiguousarray(values).view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
        return np.where(np.isnan(values), values, cut)
    near = values.astype(np.float16)
    beyond = np.abs(near.astype(np.float32)) > np.abs(values)
    return np.where(beyond, np.nextafter(near, np.float16(0)), near).astype(np.float32)


def wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.int64 if np.issubdtype(values.dtype, np.signedinteger) else np.uint64)


def _unordered(compare: Callable) -> Callable:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


COMPARE = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip
"""9.3.1: ordered comparisons of integers."""

FLOAT_COMPARE = {
    **{name: COMPARE[name] for name in ("eq", "lt", "le", "gt", "ge")},
    "ne": lambda a, b: (a < b) | (a > b),
    **{f"{name}u": _unordered(COMPARE[name]) for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    "num": lambda a, b: ~(np.isnan(a) | np.isnan(b)),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}
"""9.3.2: false where an operand is NaN, with u true."""

TRUE = {"u32": 0xFFFFFFFF, "s32": 0xFFFFFFFF, "f32": 0x3F800000}
TRUE_HALF = {"u32": 0xFFFF, "s32": 0xFFFF, "bf16x2": 0x3F80, "f16x2": 0x3C00}
"""9.7.6.1, 9.7.7.1: what set gives for true, for all bits or for a half of them."""

LOGIC = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}
ADDED = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
_INT = r"([us](?:16|32|64))"
_FLOAT = r"(f32|f16|bf16|f16x2|bf16x2)"


def _sum(kinds: tuple[str, ...], function: Callable[..., np.ndarray]) -> Operation:
    """With the canonical NaN in fp32, whatever operand a NaN came from; pack() sees to 16 bits."""

    def computed(*operands: np.ndarray) -> np.ndarray:
        found = function(*operands)
        return np.where(np.isnan(found), np.uint32(NAN_32).view(np.float32), found) if kinds[0] == "f32" else found

    return Operation(kinds, kinds[0], computed)


def _set(name: str, result: str, kind: str) -> Operation:
    compare = (FLOAT_COMPARE if "f" in kind else COMPARE)[name]
    if kind.endswith("x2"):
        low, high = np.uint32(TRUE_HALF[result]), np.uint32(TRUE_HALF[result] << 16)

        def halves(a: np.ndarray, b: np.ndarray) -> np.ndarray:
            first, second = compare(a, b)
            return np.where(first, low, np.uint32(0)) | np.where(second, high, np.uint32(0))

        return Operation((kind, kind), "b32", halves)
    return Operation((kind, kind), "b32", lambda a, b: np.where(compare(a, b), np.uint32(TRUE[result]), np.uint32(0)))


def _multiply(name: str, mode: str, kind: str) -> Operation:
    bits = width(kind)
    result = f"{kind[0]}{2 * bits}" if mode == "wide" else kind

    def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if mode == "lo":
            return a * b
        both = wide(a) * wide(b)
        return both >> both.dtype.type(bits) if mode == "hi" else both

    if name == "mad":
        types = (kind, kind, result)
        return Operation(types, result, lambda a, b, c: (product(a, b).astype(c.dtype) + c).astype(c.dtype))
    return Operation((kind, kind), result, product)


def _integer_extreme(name: str, kind: str) -> Operation:
    return Operation((kind, kind), kind, np.maximum if name == "max" else np.minimum)


def _to_half(rounding: str, kind: str) -> Operation:
    """cvt.rn.bf16x2.f32 d, a, b: a becomes the upper half. pack() rounds to the nearest."""
    half = kind.removesuffix("x2")

    def convert(a: np.ndarray) -> np.ndarray:
        return a if rounding == "rn" else towards_zero(a, half)

    if half == kind:
        return Operation(("f32",), kind, convert)
    return Operation(("f32", "f32"), kind, lambda a, b: convert(np.stack(np.broadcast_arrays(b, a))))


def _to_integer(result: str, source: str) -> Operation:
    limits = np.iinfo(SINT[width(result)] if result[0] == "s" else UINT[width(result)])

    def convert(a: np.ndarray) -> np.ndarray:
        whole = np.clip(np.trunc(a.astype(np.float64)), float(limits.min), float(limits.max))
        return np.where(np.isnan(a), 0, whole).astype(limits.dtype)

    return Operation((source,), result, convert)


Builder = Callable[..., Operation]

PATTERNS: tuple[tuple[str, Builder], ...] = (
    # 9.7.1 and 9.7.2: integers.
    (rf"(add|sub)\.{_INT}", lambda name, kind: Operation((kind, kind), kind, ADDED[name])),
    (r"(add|sub)\.([us]16x2)", lambda name, kind: Operation((kind, kind), kind, ADDED[name])),
    (r"(mul|mad)\.(lo|hi|wide)\.([us](?:16|32))", _multiply),
    (r"(mul|mad)\.(lo)\.([us]64)", _multiply),
    (rf"div\.{_INT}", lambda kind: Operation((kind, kind), kind, quotient)),
    (rf"rem\.{_INT}", lambda kind: Operation((kind, kind), kind, remainder)),
    (r"neg\.(s16|s32|s64)", lambda kind: Operation((kind,), kind, operator.neg)),
    (r"abs\.(s16|s32|s64)", lambda kind: Operation((kind,), kind, np.abs)),
    (r"(min|max)\.([us](?:16|32|64)|[us]16x2)", _integer_extreme),
    (r"bfe\.([us](?:32|64))", lambda kind: Operation((kind, "u32", "u32"), kind, bit_field)),
    (r"bfi\.(b32|b64)", lambda kind: Operation((kind, kind, "u32", "u32"), kind, inserted)),
    # 9.7.3 and 9.7.4: floating point. div.full is within 2 ulp; here it is exact.
    (rf"(add|sub|mul)(?:\.rn)?\.{_FLOAT}", lambda name, kind: _sum((kind,) * 2, ADDED[name])),
    (r"fma\.rn\.(f32)", lambda kind: _sum((kind,) * 3, fused)),
    (r"fma\.rn\.(f16|bf16|f16x2|bf16x2)", lambda kind: _sum((kind,) * 3, fused_halves)),
    (r"div\.(?:full|rn|approx)\.(f32)", lambda kind: Operation((kind, kind), kind, operator.truediv)),
    (r"(?:sqrt\.rn|sqrt\.approx)\.(f32)", lambda kind: Operation((kind,), kind, np.sqrt)),
    (r"rsqrt\.approx\.(f32)", lambda kind: Operation((kind,), kind, lambda a: np.float32(1) / np.sqrt(a))),
    (r"(neg)\.(f32|f16x2|bf16x2|f16|bf16)", lambda _, kind: Operation((kind,), kind, operator.neg)),
    (r"(abs)\.(f32|f16x2|bf16x2|f16|bf16)", lambda _, kind: Operation((kind,), kind, np.abs)),
    (rf"(min|max)(\.NaN)?\.{_FLOAT}",
     lambda name, nan, kind: Operation((kind, kind), kind, lambda a, b: extreme(a, b, name == "max", bool(nan)))),
    # 9.7.6 and 9.7.7: comparison and selection.
    (rf"setp\.({'|'.join(COMPARE)})\.([usb](?:16|32|64))",
     lambda name, kind: Operation((kind, kind), "pred", COMPARE[name])),
    (rf"setp\.({'|'.join(FLOAT_COMPARE)})\.{_FLOAT}",
     lambda name, kind: Operation((kind, kind), "pred", FLOAT_COMPARE[name])),
    (rf"set\.({'|'.join(FLOAT_COMPARE)})\.(u32|s32|f32)\.(f32|f16|bf16)", _set),
    (rf"set\.({'|'.join(FLOAT_COMPARE)})\.(u32|s32|f16x2|bf16x2)\.(f16x2|bf16x2)", _set),
    (rf"set\.({'|'.join(COMPARE)})\.(u32|s32|f32)\.([us]32)", _set),
    (r"selp\.[busf](16|32|64)",
     lambda bits: Operation((f"b{bits}", f"b{bits}", "pred"), f"b{bits}", lambda a, b, p: np.where(p, a, b))),
    # 9.7.8 and 9.7.9.7: logic, shifts, bytes.
    (r"(and|or|xor)\.(pred|b16|b32|b64)", lambda name, kind: Operation((kind, kind), kind, LOGIC[name])),
    (r"not\.(pred|b16|b32|b64)", lambda kind: Operation((kind,), kind, operator.invert)),
    (r"shl\.(b16|b32|b64)", lambda kind: Operation((kind, "u32"), kind, lambda a, n: shifted(a, n, True))),
    (r"shr\.([bus](?:16|32|64))", lambda kind: Operation((kind, "u32"), kind, lambda a, n: shifted(a, n, False))),
    (r"shf\.(l|r)\.(wrap|clamp)\.b32",
     lambda side, mode: Operation(("b32",) * 3, "b32", lambda a, b, n: funnel(a, b, n, side == "l", mode == "wrap"))),
    (r"lop3\.b32", lambda: Operation(("b32",) * 4, "b32", lookup)),
    (r"prmt\.b32", lambda: Operation(("b32",) * 3, "b32", permute)),
    # 9.7.9.22: conversions.
    (r"cvt\.([us](?:8|16|32|64))\.([us](?:8|16|32|64))", lambda to, kind: Operation((kind,), to, lambda a: a)),
    (r"cvt\.(rn|rz)\.(bf16|f16|bf16x2|f16x2)\.f32", _to_half),
    (r"cvt\.f32\.(bf16|f16)", lambda kind: Operation((kind,), "f32", lambda a: a)),
    (r"cvt\.rna\.tf32\.f32",
     lambda: Operation(("b32",), "b32", lambda a: (a + np.uint32(0x1000)) & np.uint32(0xFFFFE000))),
    (r"cvt\.rn\.f32\.([us](?:8|16|32|64))", lambda kind: Operation((kind,), "f32", lambda a: a.astype(np.float32))),
    (r"cvt\.rzi\.([us](?:32|64))\.(f32)", _to_integer),
)  # fmt: skip

_COMPILED = [(re.compile(pattern), builder) for pattern, builder in PATTERNS]


def operation(opcode: str) -> Operation | None:
    """What an arithmetic opcode computes; None where it is not one of them."""
    for pattern, builder in _COMPILED:
        if match := pattern.fullmatch(opcode):
            return builder(*match.groups())
    return None
