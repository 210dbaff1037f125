"""What PTX does with integers and bits beyond what numpy has. Sections are those of the PTX ISA 9.0."""

from __future__ import annotations

import numpy as np

UINT = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SINT = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}


def quotient(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; of a division by zero every bit is set."""
    # The absolute value of the least number of 64 bits has 65.
    kind = object if a.dtype.itemsize == 8 else np.int64
    wide_a, wide_b = a.astype(kind), b.astype(kind)
    zero = b == 0
    divisor = np.where(zero, 1, wide_b)
    found = abs(wide_a) // abs(divisor)
    return np.where(zero, -1, np.where((wide_a < 0) != (wide_b < 0), -found, found)).astype(a.dtype)


def remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """With the sign of a; a itself where b is zero."""
    return np.where(b == 0, a, a - quotient(a, b) * b)


def shifted(a: np.ndarray, count: np.ndarray, left: bool) -> np.ndarray:
    """9.7.8.7, 9.7.8.8: a count above the width counts as the width."""
    bits = 8 * a.dtype.itemsize
    count = np.minimum(count, bits).astype(np.int64)
    # A shift by the width is two shifts here.
    first, second = (count // 2).astype(a.dtype), (count - count // 2).astype(a.dtype)
    return (a << first) << second if left else (a >> first) >> second


def funnel(low: np.ndarray, high: np.ndarray, count: np.ndarray, left: bool, wrap: bool) -> np.ndarray:
    """9.7.8.6: the high or the low half of a pair that is shifted."""
    count = (count & 31 if wrap else np.minimum(count, 32)).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
    return (((both << count) >> np.uint64(32)) if left else (both >> count)).astype(np.uint32)


def bit_field(a: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """9.7.1.20: bits from a position on. Signed: the last bit of the field, or of a, is repeated above it."""
    bits = 8 * a.dtype.itemsize
    position, length = position.astype(np.int64) & 255, length.astype(np.int64) & 255
    signed = np.issubdtype(a.dtype, np.signedinteger)
    top = np.minimum(position + length - 1, bits - 1)
    raw = a.view(UINT[bits])
    sign = shifted(raw, np.maximum(top, 0), left=False) & raw.dtype.type(1)
    field = shifted(raw, position, left=False)
    ones = np.full(1, -1, np.int64).astype(raw.dtype)
    beyond = shifted(np.broadcast_to(ones, np.broadcast_shapes(raw.shape, length.shape)), length, left=True)
    filled = np.where(sign.astype(bool) & signed, field | beyond, field & ~beyond)
    # A field may reach beyond the last bit, which is repeated from there on.
    inside = np.maximum(bits - position, 0)
    above = shifted(np.broadcast_to(ones, filled.shape), inside, left=True)
    filled = np.where((position + length > bits) & sign.astype(bool) & signed, filled | above, filled)
    return np.where(length == 0, raw.dtype.type(0), filled).view(a.dtype)


def inserted(a: np.ndarray, b: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
    """9.7.1.21: b with the low bits of a from a position on."""
    position, length = position.astype(np.int64) & 255, length.astype(np.int64) & 255
    ones = np.full(np.broadcast_shapes(a.shape, b.shape, length.shape), -1, np.int64).astype(a.dtype)
    field = shifted(~shifted(ones, length, left=True), position, left=True)
    return (b & ~field) | (shifted(np.broadcast_to(a, field.shape), position, left=True) & field)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    """9.7.9.7, default mode: four bytes of eight; bit 3 of a selector repeats the byte's sign."""
    eight = (b.astype(np.uint64) << np.uint64(32)) | a.astype(np.uint64)
    found = np.zeros(1, np.uint64)
    for place in range(4):
        choice = (selector >> np.uint32(4 * place)).astype(np.uint64)
        byte = (eight >> (np.uint64(8) * (choice & np.uint64(7)))) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        byte = np.where(choice & np.uint64(8), sign, byte)
        found = found | (byte << np.uint64(8 * place))
    return found.astype(np.uint32)


def lookup(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """9.7.8.5: bit i of the table is the result for the bits of a, b, c that spell i."""
    found = np.zeros(1, np.uint32)
    for i in range(8):
        term = (a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c)
        found = found | np.where(int(table[0]) >> i & 1, term, np.uint32(0))
    return found
