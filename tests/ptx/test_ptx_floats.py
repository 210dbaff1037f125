"""Instructions on floating point numbers in the emulator, executed in tiny modules, against the text of the PTX ISA."""

from __future__ import annotations

import math
import random
import struct
from fractions import Fraction

import pytest

from isa_rules import (
    F16,
    F32,
    NAN,
    ORDERED,
    compared,
    decoded,
    encoded,
    extreme,
    signed,
    summed,
    to_integer,
)  # fmt: skip
from tiny_ptx import EDGES, Operand, combinations, lanewise

FLOATS = {
    "f32": [0, 1 << 31, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0xBF800000, 0x3F800001, 0x33800000, 0x4B7FFFFF,
            0x7F7FFFFF, 0xFF7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFFC12345, 0x7F812345, 0x3EAAAAAB],
    "f16": [0, 0x8000, 1, 0x03FF, 0x0400, 0x3C00, 0xBC00, 0x3C01, 0x7BFF, 0xFBFF, 0x7C00, 0xFC00, 0x7E00,
            0xFE01, 0x7C01],
    "bf16": [0, 0x8000, 1, 0x007F, 0x0080, 0x3F80, 0xBF80, 0x3F81, 0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0,
             0xFFC1, 0x7F81],
}  # fmt: skip
"""Zeros, subnormal and normal numbers, the largest, infinities, quiet and signalling NaNs, of both signs."""


def same(found: int, wanted: int, kind: str) -> bool:
    """Equal patterns, or two NaNs: the ISA does not say which NaN arithmetic gives."""
    return found == wanted or (math.isnan(decoded(found, kind)) and math.isnan(decoded(wanted, kind)))


ARITHMETIC = {
    "add.f32": lambda a, b, c: (a, 1.0, b), "add.rn.f32": lambda a, b, c: (a, 1.0, b),
    "sub.f32": lambda a, b, c: (a, 1.0, -b), "fma.rn.f32": lambda a, b, c: (a, b, c),
    "mul.f32": lambda a, b, c: (a, b, math.copysign(0, math.copysign(1, a) * math.copysign(1, b))),
}  # fmt: skip


@pytest.mark.parametrize("op", ARITHMETIC)
def test_arithmetic_rounds_once(op):
    """9.7.3.3 to 9.7.3.6: to nearest even, with subnormals; fma's product is not rounded."""
    draw = random.Random(1)
    close = [encoded(1 + draw.randrange(1, 1 << 12) / 2**23, "f32") for _ in range(6)]
    columns = [FLOATS["f32"] + close] * (3 if op[:3] == "fma" else 2)
    rows = combinations(*columns)
    # Products that lie on a tie before the sum: a second rounding would go the other way.
    ties = [
        (encoded(1 + 2**-12, "f32"), encoded(1 + 2**-12, "f32"), encoded(sign * 2.0**-60, "f32")) for sign in (1, -1)
    ]
    rows += [row[: len(columns)] for row in ties]
    names = "abc"[: len(columns)]
    sources = {name: Operand(32, values) for name, values in zip(names, zip(*rows, strict=True), strict=True)}
    found = lanewise(f"{op} {{d}}, {', '.join(f'{{{name}}}' for name in names)};", sources, {"d": 32})["d"]
    for row, value in zip(rows, found, strict=True):
        wanted = summed(*ARITHMETIC[op](*[decoded(x, "f32") for x in row], *[0.0] * (3 - len(row))))
        assert same(value, wanted, "f32"), (op, [*map(hex, row)], hex(value), hex(wanted))


@pytest.mark.parametrize("kind", ["f16", "bf16", "f16x2", "bf16x2"])
def test_halves_are_fused_with_one_rounding(kind):
    """9.7.4.4: also where the product lies on a tie, from which fp32 would not tell the sum."""
    one = kind.removesuffix("x2")
    factors = {"f16": (1 + 2**-5, 1 + 2**-6), "bf16": (1 + 2**-4, 1 + 2**-4)}[one]
    rows = combinations(FLOATS[one], FLOATS[one], FLOATS[one])
    rows += [tuple(encoded(x, one) for x in (*factors, sign * 2.0**-24)) for sign in (1, -1)]
    wanted = [summed(*(decoded(x, one) for x in row), one) for row in rows]
    bits = 16 if one == kind else 32
    pairs = list(zip(rows, rows[1:] + rows[:1], strict=True))
    sources = {
        name: Operand(bits, [(high[i] << 16 | low[i]) & (1 << bits) - 1 for low, high in pairs])
        for i, name in enumerate("abc")
    }
    found = lanewise(f"fma.rn.{kind} {{d}}, {{a}}, {{b}}, {{c}};", sources, {"d": bits})["d"]
    for row, value, result in zip(rows, found, wanted, strict=True):
        assert same(value & 0xFFFF, result, one), ([*map(hex, row)], hex(value), hex(result))
    if one != kind:
        upper = zip(found, wanted[1:] + wanted[:1], strict=True)
        assert all(same(value >> 16, result, one) for value, result in upper)


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("how", [*ORDERED, "equ", "neu", "ltu", "leu", "gtu", "geu", "num", "nan"])
def test_floats_are_compared(how, kind):
    """9.7.6.2 and 9.7.7.2 setp; of a pair p is the lower half's answer, q the upper's."""
    one = kind.removesuffix("x2")
    rows = combinations(FLOATS[one], FLOATS[one])
    wanted = [compared(decoded(a, one), decoded(b, one), how) for a, b in rows]
    lows, highs = rows, rows[1:] + rows[:1]
    if one == kind:
        sources = {"a": Operand(32 if one == "f32" else 16, [a for a, _ in rows]),
                   "b": Operand(32 if one == "f32" else 16, [b for _, b in rows])}  # fmt: skip
        assert lanewise(f"setp.{how}.{kind} {{d}}, {{a}}, {{b}};", sources, {"d": 1})["d"] == wanted
    else:
        sources = {name: Operand(32, [high[i] << 16 | low[i] for low, high in zip(lows, highs, strict=True)])
                   for i, name in enumerate("ab")}  # fmt: skip
        found = lanewise(f"setp.{how}.{kind} {{d}}|{{e}}, {{a}}, {{b}};", sources, {"d": 1, "e": 1})
        assert found["d"] == wanted
        assert found["e"] == wanted[1:] + wanted[:1]


@pytest.mark.parametrize("kind", ["f16x2", "bf16x2"])
@pytest.mark.parametrize("how", ["eq", "neu", "gt", "nan"])
@pytest.mark.parametrize("result", ["u32", "same"])
def test_comparisons_into_halves(how, kind, result):
    """9.7.7.1 set: 0xFFFF or 1.0 in each half where true, else zero."""
    one = kind.removesuffix("x2")
    rows = combinations(FLOATS[one], FLOATS[one])
    true = 0xFFFF if result == "u32" else encoded(1.0, one)
    wanted = [true * compared(decoded(a, one), decoded(b, one), how) for a, b in rows]
    upper = [0x7FFF, *(a for a, _ in rows[:-1])], [*(b for _, b in rows[1:]), 0x1234]
    both = [compared(decoded(a, one), decoded(b, one), how) * true for a, b in zip(*upper, strict=True)]
    sources = {name: Operand(32, [high << 16 | row[i] for high, row in zip(upper[i], rows, strict=True)])
               for i, name in enumerate("ab")}  # fmt: skip
    found = lanewise(
        f"set.{how}.{kind if result == 'same' else result}.{kind} {{d}}, {{a}}, {{b}};", sources, {"d": 32}
    )
    assert found["d"] == [high << 16 | low for high, low in zip(both, wanted, strict=True)]


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "f16x2", "bf16x2"])
@pytest.mark.parametrize("nan", ["", ".NaN"])
@pytest.mark.parametrize("op", ["min", "max"])
def test_extremes(op, nan, kind):
    one = kind.removesuffix("x2")
    rows = combinations(FLOATS[one], FLOATS[one])
    wanted = [extreme(a, b, one, op == "max", bool(nan)) for a, b in rows]
    if one != kind:
        rows = [(a << 16 | d, b << 16 | c) for (a, b), (d, c) in zip(rows, rows[1:] + rows[:1], strict=True)]
        wanted = [high << 16 | low for high, low in zip(wanted, wanted[1:] + wanted[:1], strict=True)]
    bits = 16 if kind in ("f16", "bf16") else 32
    sources = {name: Operand(bits, [row[i] for row in rows]) for i, name in enumerate("ab")}
    found = lanewise(f"{op}{nan}.{kind} {{d}}, {{a}}, {{b}};", sources, {"d": bits})["d"]
    assert [*map(hex, found)] == [*map(hex, wanted)]


def near(kind: str) -> list[int]:
    """fp32 patterns around what a narrower format holds: ties to an even and to an odd neighbour, one bit more and
    less, the largest numbers and beyond, subnormal results and what becomes zero."""
    form_ties = {"bf16": 1 << 15, "f16": 1 << 12, "tf32": 1 << 12}[kind]
    step = 2 * form_ties
    found = []
    for base in (0x3F800000, 0x40490000 & -step, 0x42280000, 0x7F7F0000, 0x477FE000, 0x38800000, 0x387FE000):
        found += [base + k * step + d for k in (0, 1) for d in (0, form_ties - 1, form_ties, form_ties + 1)]
    found += [
        0x33000000,
        0x33000001,
        0x33800000,
        0x33C00000,
        0x32FFFFFF,
        0x00008000,
        0x00018000,
        0x00007FFF,
        0x477FF000,
    ]
    return sorted({*found, *(x | 1 << 31 for x in found), *FLOATS["f32"]})


@pytest.mark.parametrize("op", ["rn.bf16", "rz.bf16", "rn.f16", "rz.f16", "rna.tf32"])
def test_floats_are_narrowed(op):
    rounding, kind = op.split(".")
    values = near(kind)
    bits = 32 if kind == "tf32" else 16
    found = lanewise(f"cvt.{op}.f32 {{d}}, {{a}};", {"a": Operand(32, values)}, {"d": bits})["d"]
    wanted = [encoded(decoded(value, "f32"), kind, rounding) for value in values]
    # Which NaN of TF32 a NaN becomes is not said.
    equal = same if kind == "tf32" else lambda f, w, _: f == w
    wrong = [(hex(v), hex(f), hex(w)) for v, f, w in zip(values, found, wanted, strict=True) if not equal(f, w, kind)]
    assert not wrong


@pytest.mark.parametrize("kind", ["f16", "bf16"])
@pytest.mark.parametrize("rounding", ["rn", "rz"])
def test_the_first_operand_becomes_the_upper_half(rounding, kind):
    values = near(kind)
    sources = {"a": Operand(32, values), "b": Operand(32, values[::-1])}
    found = lanewise(f"cvt.{rounding}.{kind}x2.f32 {{d}}, {{a}}, {{b}};", sources, {"d": 32})["d"]
    halves = [encoded(decoded(value, "f32"), kind, rounding) for value in values]
    assert found == [a << 16 | b for a, b in zip(halves, halves[::-1], strict=True)]


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_halves_are_widened(kind):
    values = [*FLOATS[kind], *range(0x3B00, 0x4100, 37)]
    found = lanewise(f"cvt.f32.{kind} {{d}}, {{a}};", {"a": Operand(16, values)}, {"d": 32})["d"]
    for value, f in zip(values, found, strict=True):
        assert same(f, encoded(decoded(value, kind), "f32"), "f32"), (hex(value), hex(f))


def test_roundings_by_hand():
    """What the rules themselves must give: 1 + 2**-8 lies between two numbers of bf16 and goes to the even 1."""
    assert encoded(1 + 2**-8, "bf16") == 0x3F80
    assert encoded(1 + 3 * 2**-8, "bf16") == 0x3F82
    assert encoded(65520.0, "f16") == 0x7C00
    assert encoded(65519.0, "f16") == encoded(65520.0, "f16", "rz") == 0x7BFF
    assert encoded(2.0**-25, "f16") == 0
    assert encoded(2.0**-25 * 1.5, "f16") == 1
    assert encoded(math.nan, "bf16") == 0x7FFF
    assert encoded(1 + 2**-11, "tf32", "rna") == struct.unpack("<I", struct.pack("<f", 1 + 2**-10))[0]
    assert (F32.precision, F16.precision, NAN["f32"]) == (24, 11, 0x7FFFFFFF)


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_floats_become_integers(kind):
    values = [*FLOATS["f32"], *(encoded(x, "f32") for x in (0.5, -0.5, 1.5, -2.5, 2.0**31, -(2.0**31), 2.0**32, 3e9))]
    found = lanewise(f"cvt.rzi.{kind}.f32 {{d}}, {{a}};", {"a": Operand(32, values)}, {"d": 32})["d"]
    assert found == [to_integer(decoded(value, "f32"), 32, kind == "s32") for value in values]


@pytest.mark.parametrize("kind", ["s32", "u32"])
def test_integers_become_floats(kind):
    values = [*EDGES[32], 0x01000001, 0x01000003, 0xFEFFFFFF]
    found = lanewise(f"cvt.rn.f32.{kind} {{d}}, {{a}};", {"a": Operand(32, values)}, {"d": 32})["d"]
    assert found == [encoded(Fraction(signed(value, 32) if kind == "s32" else value), "f32") for value in values]


@pytest.mark.parametrize("op", ["neg", "abs"])
def test_signs(op):
    """9.7.3.9 abs, 9.7.3.10 neg."""
    values = FLOATS["f32"]
    found = lanewise(f"{op}.f32 {{d}}, {{a}};", {"a": Operand(32, values)}, {"d": 32})["d"]
    for value, f in zip(values, found, strict=True):
        x = decoded(value, "f32")
        assert same(f, encoded(-x if op == "neg" else math.copysign(x, 1), "f32"), "f32"), hex(value)


@pytest.mark.parametrize("instruction", ["add.f32", "sub.f32", "mul.f32", "fma.rn.f32"])
def test_every_sum_has_one_nan(instruction):
    """0x7fffffff, as the CUDA C++ Programming Guide has it: what lanes add in different orders is the same pattern."""
    nans = [0x7FC00000, 0xFFC12345, 0x7F812345, 0x7F800000]
    operands = {"a": Operand(32, nans), "b": Operand(32, [0xFF800000] * 4), "c": Operand(32, nans[::-1])}
    names = list(operands)[: 3 if instruction.startswith("fma") else 2]
    text = f"{instruction} {{d}}, " + ", ".join(f"{{{name}}}" for name in names) + ";"
    found = lanewise(text, {name: operands[name] for name in names}, {"d": 32})["d"]
    wanted = [0x7FFFFFFF if math.isnan(decoded(value, "f32")) else value for value in found]
    assert found == wanted
    assert found[:3] == [0x7FFFFFFF] * 3
