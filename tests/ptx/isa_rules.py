"""What scalar instructions compute, from the text of the PTX ISA, in Python's integers and rationals, a lane at a time.

Nothing here knows numpy or a bit trick of a rounding: a mistake that an emulator and a kernel's author would share
should not be made a third time. Sections are those of PTX ISA 9.0.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from fractions import Fraction
from typing import NamedTuple


def unsigned(value: int, bits: int) -> int:
    return value % (1 << bits)


def signed(value: int, bits: int) -> int:
    value = unsigned(value, bits)
    return value - (1 << bits) if value >= 1 << bits - 1 else value


def divided(a: int, b: int) -> int:
    """9.7.1.8 div: the quotient, truncated toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def remainder(a: int, b: int) -> int:
    """9.7.1.9 rem: what is left of a, with the sign of a."""
    return a - divided(a, b) * b


def bit_field(a: int, start: int, length: int, bits: int, sign: bool) -> int:
    """9.7.1.19 bfe: bits start to start + length - 1 of a; beyond them the sign of the field, or zero. Both numbers
    count modulo 256; a field that reaches beyond a ends with a."""
    start, length, top = start % 256, length % 256, bits - 1
    fill = 0 if not sign or length == 0 else a >> min(start + length - 1, top) & 1
    found = [a >> start + i & 1 if i < length and start + i <= top else fill for i in range(bits)]
    return sum(bit << i for i, bit in enumerate(found))


def inserted(a: int, b: int, start: int, length: int, bits: int) -> int:
    """9.7.1.20 bfi: the low bits of a, in b from bit ``start`` on; what would lie beyond b is left out."""
    start, length = start % 256, length % 256
    for i in range(length):
        if start + i < bits:
            b = b & ~(1 << start + i) | (a >> i & 1) << start + i
    return b


def permuted(a: int, b: int, control: int) -> int:
    """9.7.9.7 prmt, generic form: bytes 0 to 3 are a's, 4 to 7 b's; a selector's top bit repeats the byte's sign."""
    source = [*struct.pack("<I", a), *struct.pack("<I", b)]
    taken = []
    for place in range(4):
        selector = control >> 4 * place & 15
        byte = source[selector & 7]
        taken.append((255 if byte >= 128 else 0) if selector & 8 else byte)
    return struct.unpack("<I", bytes(taken))[0]


def looked_up(a: int, b: int, c: int, table: int) -> int:
    """9.7.8.6 lop3: the table is what the wanted function makes of ta = 0xF0, tb = 0xCC, tc = 0xAA."""
    return sum((table >> 4 * (a >> i & 1) + 2 * (b >> i & 1) + (c >> i & 1) & 1) << i for i in range(32))


def funnel(a: int, b: int, count: int, left: bool, wrap: bool) -> int:
    """9.7.8.7 shf: the upper word of {b, a} shifted left, or the lower of it shifted right."""
    n = count & 31 if wrap else min(count, 32)
    pair = b << 32 | a
    return unsigned(pair << n >> 32, 32) if left else unsigned(pair >> n, 32)


def shifted(a: int, count: int, bits: int, kind: str) -> int:
    """9.7.8.8 shl, 9.7.8.9 shr: counts beyond the width are the width. kind: "l", "u" (zeros enter) or "s" (signs)."""
    count = min(count, bits)
    if kind == "l":
        return unsigned(a << count, bits)
    return unsigned((signed(a, bits) if kind == "s" else a) >> count, bits)


ORDERED: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b, "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b,
}  # fmt: skip


def compared(a: float, b: float, how: str) -> bool:
    """9.3.2 Floating point comparisons: ordered ones are false with a NaN, those with a u true; num and nan ask."""
    unordered = math.isnan(a) or math.isnan(b)
    if how in ("num", "nan"):
        return unordered == (how == "nan")
    if how in ORDERED:
        return not unordered and ORDERED[how](a, b)
    return unordered or ORDERED[how.removesuffix("u")](a, b)


class Format(NamedTuple):
    """precision: bits of the significand with its hidden one. lowest, highest: exponents of normal numbers. below: bits
    of the register under the number's."""

    bits: int
    precision: int
    lowest: int
    highest: int
    below: int = 0


F32 = Format(32, 24, -126, 127)
F16 = Format(16, 11, -14, 15)
BF16 = Format(16, 8, -126, 127)
TF32 = Format(32, 11, -126, 127, 13)
FORMATS = {"f32": F32, "f16": F16, "bf16": BF16, "tf32": TF32}

NAN = {"f32": 0x7FFFFFFF, "f16": 0x7FFF, "bf16": 0x7FFF, "tf32": 0x7FFFFFFF}
"""The canonical NaN of 9.7.3 (.f32), 9.7.4 (.f16, .bf16) and 9.7.9.21 cvt."""


def decoded(pattern: int, kind: str) -> float:
    """The number that a pattern stands for; each is a double."""
    form = FORMATS[kind]
    pattern >>= form.below
    bits = form.bits - form.below
    fraction_bits = form.precision - 1
    exponent = pattern >> fraction_bits & (1 << bits - form.precision) - 1
    fraction = pattern & (1 << fraction_bits) - 1
    if exponent == (1 << bits - form.precision) - 1:
        size = math.nan if fraction else math.inf
    elif exponent == 0:
        size = math.ldexp(fraction, form.lowest - fraction_bits)
    else:
        size = math.ldexp(fraction + (1 << fraction_bits), exponent - 1 + form.lowest - fraction_bits)
    return -size if pattern >> bits - 1 else size


def encoded(value: Fraction | float, kind: str, rounding: str = "rn", negative_zero: bool = False) -> int:
    """The pattern of an exact number: rn to nearest, ties to even; rz toward zero; rna to nearest, ties away."""
    form = FORMATS[kind]
    bits, fraction_bits = form.bits - form.below, form.precision - 1
    infinity = (1 << bits - form.precision) - 1 << fraction_bits
    if isinstance(value, float):
        if math.isnan(value):
            return NAN[kind]
        negative_zero = math.copysign(1, value) < 0
        if math.isinf(value):
            return (infinity | (value < 0) << bits - 1) << form.below
        value = Fraction(value)
    sign, size = value < 0 or (value == 0 and negative_zero), abs(value)
    exponent = form.lowest
    if size:
        above = size.numerator.bit_length() - size.denominator.bit_length()
        exponent = max(exponent, above - (size < Fraction(2) ** above))
    steps = size / Fraction(2) ** (exponent - fraction_bits)
    whole = math.floor(steps)
    rest = steps - whole
    half = Fraction(1, 2)
    up = {"rn": rest > half or (rest == half and whole % 2 == 1), "rz": False, "rna": rest >= half}[rounding]
    pattern = whole + up + (exponent - form.lowest << fraction_bits)
    limit = infinity - 1 if rounding == "rz" else infinity
    return (min(pattern, limit) | sign << bits - 1) << form.below


def summed(a: float, b: float, c: float, kind: str = "f32") -> int:
    """9.7.3.6 fma: a times b plus c, rounded once; add is a * 1 + c."""
    if not all(map(math.isfinite, (a, b, c))):
        return encoded(a * b + c, kind)
    exact = Fraction(a) * Fraction(b) + Fraction(c)
    # An exact zero of parts that are not zeros is +0.
    return encoded(exact, kind, negative_zero=a * b == 0 and c == 0 and math.copysign(1, a * b + c) < 0)


def extreme(a: int, b: int, kind: str, largest: bool, nan: bool) -> int:
    """9.7.3.11 min, 9.7.3.12 max, 9.7.4.7 and 9.7.4.8: a number wins over a NaN, unless .NaN asks for NaNs; of two
    NaNs the canonical one; +0 is larger than -0."""
    x, y = decoded(a, kind), decoded(b, kind)
    if math.isnan(x) or math.isnan(y):
        return NAN[kind] if nan or (math.isnan(x) and math.isnan(y)) else b if math.isnan(x) else a
    first = (x, math.copysign(1, x)) >= (y, math.copysign(1, y))
    return a if first == largest else b


def to_integer(value: float, bits: int, sign: bool) -> int:
    """9.7.9.21 cvt.rzi: toward zero, clamped to the type's range; a NaN is 0."""
    if math.isnan(value):
        return 0
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if sign else (0, (1 << bits) - 1)
    if math.isinf(value):
        return unsigned(low if value < 0 else high, bits)
    return unsigned(min(max(math.trunc(value), low), high), bits)


def shuffled(lane: int, mode: str, b: int, c: int) -> int:
    """9.7.9.6 shfl.sync: the lane that a lane reads, itself where the computed one is out of range."""
    b, clamp, segment = b & 31, c & 31, c >> 8 & 31
    last, first = lane & segment | clamp & ~segment, lane & segment
    source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": first | b & ~segment}[mode]
    in_range = source >= last if mode == "up" else source <= last
    return source if in_range else lane
