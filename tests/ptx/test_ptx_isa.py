"""Instructions on integers, predicates and bytes in the emulator, in tiny modules, against the text of the PTX ISA."""

from __future__ import annotations

import functools
import operator
import random

import pytest

from emulator import execute
from isa_rules import (
    ORDERED,
    bit_field,
    divided,
    funnel,
    inserted,
    looked_up,
    permuted,
    remainder,
    shifted,
    shuffled,
    signed,
    unsigned,
)  # fmt: skip
from tiny_ptx import COUNTS, EDGES, Operand, check, combinations, flat, lanewise, module, patterns, tensor


def s(value: int, bits: int = 32) -> int:
    return signed(value, bits)


INTEGERS = {
    # 9.7.1.1 add, 9.7.1.2 sub: what does not fit is cut off
    "add.s32": ("32 32,32", lambda a, b: a + b),
    "add.s64": ("64 64,64", lambda a, b: a + b),
    "add.s16": ("16 16,16", lambda a, b: a + b),
    "sub.s32": ("32 32,32", lambda a, b: a - b),
    "sub.s64": ("64 64,64", lambda a, b: a - b),
    "sub.s16": ("16 16,16", lambda a, b: a - b),
    # 9.7.1.3 mul: the lower or the upper half, or all of it in twice the width
    "mul.lo.s32": ("32 32,32", lambda a, b: a * b),
    "mul.lo.s64": ("64 64,64", lambda a, b: a * b),
    "mul.lo.s16": ("16 16,16", lambda a, b: a * b),
    "mul.hi.s32": ("32 32,32", lambda a, b: s(a) * s(b) >> 32),
    "mul.hi.u32": ("32 32,32", lambda a, b: a * b >> 32),
    "mul.wide.s32": ("64 32,32", lambda a, b: s(a) * s(b)),
    "mul.wide.u32": ("64 32,32", lambda a, b: a * b),
    "mul.wide.u16": ("32 16,16", lambda a, b: a * b),
    "mul.wide.s16": ("32 16,16", lambda a, b: s(a, 16) * s(b, 16)),
    # 9.7.1.4 mad
    "mad.lo.s32": ("32 32,32,32", lambda a, b, c: a * b + c),
    "mad.lo.s64": ("64 64,64,64", lambda a, b, c: a * b + c),
    "mad.wide.s32": ("64 32,32,64", lambda a, b, c: s(a) * s(b) + c),
    "mad.wide.u32": ("64 32,32,64", lambda a, b, c: a * b + c),
    # 9.7.1.11 neg, 9.7.1.12 min, 9.7.1.13 max
    "neg.s32": ("32 32", lambda a: -a),
    "min.s32": ("32 32,32", lambda a, b: min(s(a), s(b))),
    "max.s32": ("32 32,32", lambda a, b: max(s(a), s(b))),
    "min.u32": ("32 32,32", min),
    "max.u32": ("32 32,32", max),
    # 9.7.8.1 and, 9.7.8.2 or, 9.7.8.3 xor, 9.7.8.4 not
    **{f"and.b{w}": (f"{w} {w},{w}", lambda a, b: a & b) for w in (16, 32, 64)},
    **{f"or.b{w}": (f"{w} {w},{w}", lambda a, b: a | b) for w in (16, 32, 64)},
    **{f"xor.b{w}": (f"{w} {w},{w}", lambda a, b: a ^ b) for w in (16, 32, 64)},
    **{f"not.b{w}": (f"{w} {w}", lambda a: ~a) for w in (16, 32, 64)},
    # 9.7.9.21 cvt between integers: the source's type says how it is widened, the result's how much is kept
    "cvt.s64.s32": ("64 32", s),
    "cvt.u64.u32": ("64 32", lambda a: a),
    "cvt.u32.u64": ("32 64", lambda a: a),
    "cvt.u32.u16": ("32 16", lambda a: a),
    "cvt.s32.s16": ("32 16", lambda a: s(a, 16)),
    "cvt.s64.s16": ("64 16", lambda a: s(a, 16)),
    "cvt.u64.u16": ("64 16", lambda a: a),
    "cvt.u16.u32": ("16 32", lambda a: a),
    "cvt.u16.u64": ("16 64", lambda a: a),
    "cvt.s16.s8": ("16 16", lambda a: s(a, 8)),
    "cvt.u16.u8": ("16 16", lambda a: a & 255),
    "cvt.s32.s8": ("32 16", lambda a: s(a, 8)),
    "cvt.u32.u8": ("32 16", lambda a: a & 255),
}  # fmt: skip


@pytest.mark.parametrize("op", INTEGERS)
def test_integers(op):
    bits, rule = INTEGERS[op]
    operands = ", ".join(f"{{{name}}}" for name in "dabc"[: bits.count(",") + 2])
    check(f"{op} {operands};", bits, rule)


@pytest.mark.parametrize("kind", ["s32", "u32", "s64", "u64"])
@pytest.mark.parametrize(("op", "rule"), [("div", divided), ("rem", remainder)])
def test_quotients(op, rule, kind):
    width = int(kind[1:])
    value = (lambda x: s(x, width)) if kind[0] == "s" else int
    divisors = [x for x in EDGES[width] if 0 < x < (1 << width) - 1] + [unsigned(-7, width)]
    # Division by zero, and the smallest number by -1, give what the ISA leaves to the machine.
    check(f"{op}.{kind} {{d}}, {{a}}, {{b}};", f"{width} {width},{width}", lambda a, b: rule(value(a), value(b)),
          [EDGES[width], divisors])  # fmt: skip


@pytest.mark.parametrize("op", ["shl.b16", "shl.b32", "shl.b64", "shr.u16", "shr.s16", "shr.u32", "shr.s32", "shr.u64",
                                "shr.s64"])  # fmt: skip
def test_shifts(op):
    width, kind = int(op[-2:]), "l" if op[:3] == "shl" else op[4]
    check(f"{op} {{d}}, {{a}}, {{b}};", f"{width} {width},32", lambda a, n: shifted(a, n, width, kind),
          [EDGES[width], COUNTS])  # fmt: skip


@pytest.mark.parametrize("direction", "lr")
@pytest.mark.parametrize("mode", ["wrap", "clamp"])
def test_funnel_shifts(direction, mode):
    check(f"shf.{direction}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", "32 32,32,32",
          lambda a, b, n: funnel(a, b, n, direction == "l", mode == "wrap"),
          [EDGES[32][-4:], EDGES[32][-4:], COUNTS])  # fmt: skip


@pytest.mark.parametrize("kind", ["u32", "s32", "u64", "s64"])
def test_bit_fields(kind):
    """Empty fields, fields that reach beyond the register or begin beyond it, numbers beyond 255."""
    width = int(kind[1:])
    places = [0, 1, 4, 15, 31, 32, 33, 63, 64, 200, 255, 256, 260]
    rows = [EDGES[width][-4:], places, [0, 1, 8, 14, 31, 32, 33, 63, 64, 255, 256, 264]]
    check(f"bfe.{kind} {{d}}, {{a}}, {{b}}, {{c}};", f"{width} {width},32,32",
          lambda a, pos, length: bit_field(a, pos, length, width, kind[0] == "s"), rows)  # fmt: skip
    check(f"bfe.{kind} {{d}}, {{a}}, 4, 14;", f"{width} {width}", lambda a: bit_field(a, 4, 14, width, kind[0] == "s"))


@pytest.mark.parametrize("width", [32, 64])
def test_bits_are_inserted(width):
    values, places, counts = (
        EDGES[width][-3:],
        [0, 1, 15, 31, 32, 63, 64, 255, 256],
        [0, 1, 8, 31, 32, 33, 64, 255, 264],
    )
    sources = combinations(values, values, places, counts)
    operands = {name: Operand(bits, column) for name, bits, column in
                zip("abcd", (width, width, 32, 32), zip(*sources, strict=True), strict=True)}  # fmt: skip
    found = lanewise(f"bfi.b{width} {{e}}, {{a}}, {{b}}, {{c}}, {{d}};", operands, {"e": width})["e"]
    assert found == [inserted(*row, width) for row in sources]


def test_bytes_are_permuted():
    bytes_ = [0x83828180, 0x07060504, 0x7F80FF00]
    selectors = [0x3210, 0x5410, 0x7632, 0x1054, 0xBA98, 0xFEDC, 0xC840, 0x00F8, 0xFFFF, 0xABCD5410]
    check("prmt.b32 {d}, {a}, {b}, {c};", "32 32,32,32", permuted, [bytes_, bytes_, selectors])
    for selector in selectors[:9]:
        check(f"prmt.b32 {{d}}, {{a}}, {{b}}, {selector:#x}U;", "32 32,32", lambda a, b, c=selector: permuted(a, b, c))
    # By hand: b's lower half above a's; the sign of byte 3 everywhere.
    found = lanewise("prmt.b32 {d}, {a}, {b}, 0x5410U;\nprmt.b32 {e}, {a}, {b}, 0xBBBBU;",
                     {"a": Operand(32, [0x83221100]), "b": Operand(32, [0x77665544])}, {"d": 32, "e": 32})  # fmt: skip
    assert found == {"d": [0x55441100], "e": [0xFFFFFFFF]}


@pytest.mark.parametrize("table", [0x00, 0x01, 0x1B, 0x2A, 0x53, 0x80, 0x96, 0xCA, 0xE8, 0xEA, 0xF8, 0xFE, 0xFF])
def test_three_inputs_through_a_table(table):
    check(f"lop3.b32 {{d}}, {{a}}, {{b}}, {{c}}, {table};", "32 32,32,32", lambda a, b, c: looked_up(a, b, c, table))


def test_tables_by_hand():
    """0xEA is (a & b) | c, 0x96 is a ^ b ^ c: 9.7.8.6's own recipe, on 0xF0, 0xCC and 0xAA."""
    assert ((0xF0 & 0xCC) | 0xAA, 0xF0 ^ 0xCC ^ 0xAA) == (0xEA, 0x96)
    a, b, c = 0x0F0F1234, 0x33335678, 0x555589AB
    sources = {name: Operand(32, [value]) for name, value in zip("abc", (a, b, c), strict=True)}
    found = lanewise("lop3.b32 {d}, {a}, {b}, {c}, 0xEA;\nlop3.b32 {e}, {a}, {b}, {c}, 0x96;",
                     sources, {"d": 32, "e": 32})  # fmt: skip
    assert found == {"d": [(a & b) | c], "e": [a ^ b ^ c]}


INTEGER_COMPARISONS = [
    *(f"{how}.{kind}" for how in ORDERED for kind in ("s16", "s32", "u32", "s64", "u64", "u16")),
    *(f"{how}.b{width}" for how in ("eq", "ne") for width in (16, 32, 64)),
    "lo.u32", "ls.u32", "hi.u32", "hs.u32",
]  # fmt: skip


@pytest.mark.parametrize("op", INTEGER_COMPARISONS)
def test_integers_are_compared(op):
    how, kind = op.split(".")
    width = int(kind[1:])
    value = (lambda x: s(x, width)) if kind[0] == "s" else int
    rule = ORDERED[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)]
    check(f"setp.{op} {{d}}, {{a}}, {{b}};", f"1 {width},{width}", lambda a, b: rule(value(a), value(b)))


@pytest.mark.parametrize("width", [16, 32, 64])
def test_a_predicate_selects(width):
    kinds = {16: ["b16"], 32: ["b32", "f32"], 64: ["b64"]}[width]
    for kind in kinds:
        check(f"selp.{kind} {{d}}, {{a}}, {{b}}, {{c}};", f"{width} {width},{width},1", lambda a, b, p: a if p else b,
              [EDGES[width], EDGES[width], [0, 1]])  # fmt: skip


def test_predicates():
    """9.7.8: and, or, xor, not, mov of predicates; @p and @!p leave a register as it was; !p as an operand."""
    code = """
        and.pred {d}, {a}, {b};
        or.pred {e}, {a}, {b};
        xor.pred {f}, {a}, {b};
        not.pred {g}, {a};
        mov.pred {h}, {b};
        mov.pred {i}, -1;
        mov.pred {j}, 0;
        mov.b32 {k}, 7;
        @{a} mov.b32 {k}, 8;
        @!{b} add.s32 {k}, {k}, 16;
    """
    pairs = [(0, 0), (0, 1), (1, 0), (1, 1)]
    sources = {name: Operand(1, [pair[i] for pair in pairs]) for i, name in enumerate("ab")}
    found = lanewise(code, sources, {**dict.fromkeys("defghij", 1), "k": 32})
    assert found == {
        "d": [0, 0, 0, 1], "e": [0, 1, 1, 1], "f": [0, 1, 1, 0], "g": [1, 1, 0, 0], "h": [0, 1, 0, 1],
        "i": [1, 1, 1, 1], "j": [0, 0, 0, 0], "k": [23, 7, 24, 8],
    }  # fmt: skip


def test_registers_are_packed_and_unpacked():
    """9.7.9.4 mov: the first of {lo, hi} has the lowest bits."""
    code = """
        mov.b32 {d}, {{{a}, {b}}};
        mov.b32 {{{e}, {f}}}, {d};
        mov.b64 {g}, {{{d}, {c}}};
        mov.b64 {{{h}, _}}, {g};
        mov.b64 {i}, {{{a}, {b}, {b}, {a}}};
    """
    sources = {"a": Operand(16, [0x1122]), "b": Operand(16, [0x3344]), "c": Operand(32, [0x55667788])}
    found = lanewise(code, sources, {"d": 32, "e": 16, "f": 16, "g": 64, "h": 32, "i": 64})
    assert found == {
        "d": [0x33441122], "e": [0x1122], "f": [0x3344], "g": [0x5566778833441122], "h": [0x33441122],
        "i": [0x1122334433441122],
    }  # fmt: skip


@pytest.mark.parametrize("space", ["global", "shared", "shared::cta"])
@pytest.mark.parametrize(("bits", "count"), [(8, 1), (8, 2), (8, 4), (16, 1), (16, 2), (16, 4), (32, 1), (32, 2),
                                             (32, 4), (64, 1), (64, 2)])  # fmt: skip
def test_vectors_in_memory(space, bits, count):
    """ld and st: elements in order of address, little-endian; a byte fills its register with zeros."""
    register = {8: "%rs", 16: "%rs", 32: "%r", 64: "%rd"}[bits]
    vector = f".v{count}" if count > 1 else ""
    listed = [f"{register}{i + 1}" for i in range(count)]
    text = listed[0] if count == 1 else f"{{{', '.join(listed)}}}"
    back = listed[::-1]
    swapped = back[0] if count == 1 else f"{{ {', '.join(back)} }}"
    size = bits * count // 8
    lines = ["ld.param.b64 %rd100, [tiny_param_0];", "ld.param.b64 %rd101, [tiny_param_1];", "mov.u32 %r100, %tid.x;",
             f"mul.wide.u32 %rd102, %r100, {size};", "add.s64 %rd103, %rd100, %rd102;",
             "add.s64 %rd104, %rd101, %rd102;",
             f"mul.lo.s32 %r101, %r100, {size};", "mov.b32 %r102, global_smem;", "add.s32 %r103, %r102, %r101;",
             f"ld.global{vector}.b{bits} {text}, [%rd103];"]  # fmt: skip
    if space == "global":
        lines += [f"st.global{vector}.b{bits} [%rd104+0], {swapped};"]
    else:
        lines += [f"st.{space}{vector}.b{bits} [ %r103 + 256 ], {swapped};",
                  f"ld.shared{vector}.b{bits} {swapped}, [%r103+256];",
                  f"st.global{vector}.b{bits} [%rd104], {swapped};"]  # fmt: skip
    rows = [[random.Random(i).getrandbits(bits) for i in range(count * j, count * (j + 1))] for j in range(128)]
    given, taken = tensor(rows, bits), tensor([0] * 128 * count, bits)
    execute(module("\n".join(lines), parameters=["u64", "u64"]), (1,), [given, taken], shared=256 + 128 * size)
    assert patterns(taken).tolist() == flat(row[::-1] for row in rows)


def test_a_byte_is_widened_with_zeros_and_stored_alone():
    lines = """
        ld.param.b64 %rd1, [tiny_param_0];
        mov.u32 %r1, %tid.x;
        cvt.u64.u32 %rd2, %r1;
        add.s64 %rd3, %rd1, %rd2;
        mov.b16 %rs1, -1;
        ld.global.b8 %rs1, [%rd3];
        add.s16 %rs2, %rs1, 256;
        shr.u16 %rs3, %rs2, 1;
        st.global.b8 [%rd3], %rs3;
    """
    values = [(7 * i) % 256 for i in range(128)]
    given = tensor(values, 8)
    execute(module(lines, parameters=["u64"]), (1,), [given])
    assert patterns(given).tolist() == [(value + 256 >> 1) & 255 for value in values]


@pytest.mark.parametrize(("mode", "numbers", "c"), [
    ("bfly", (0, 1, 2, 4, 8, 16, 31), 0x1F), ("bfly", (1, 4, 8), 0x181F), ("bfly", (16, 31), 0x0F),
    ("up", (0, 1, 5, 16, 31), 0), ("up", (1, 3, 7), 0x1800), ("down", (0, 1, 5, 31), 0x1F), ("down", (1, 3), 0x1C1F),
    ("idx", (0, 5, 31, 33), 0x1F), ("idx", (0, 3, 9), 0x1C1F), ("idx", (5, 20), 0x0F),
])  # fmt: skip
def test_lanes_read_each_other(mode, numbers, c):
    """c: the last lane that may be read, and in bits 8 to 12 which bits of a lane's number name its segment."""
    values = [random.Random(i).getrandbits(32) for i in range(256)]
    for number in numbers:
        found = lanewise(
            f"shfl.sync.{mode}.b32 {{d}}, {{a}}, {number}, {c}, -1;", {"a": Operand(32, values)}, {"d": 32}
        )
        assert found["d"] == [values[(i & ~31) + shuffled(i & 31, mode, number, c)] for i in range(256)], (mode, number)


def test_a_lane_may_be_named_by_a_register():
    values, lanes = [i * i for i in range(128)], [(5 * i + 3) % 32 for i in range(128)]
    sources = {"a": Operand(32, values), "b": Operand(32, lanes)}
    found = lanewise("shfl.sync.idx.b32 {d}, {a}, {b}, 31, -1;", sources, {"d": 32})["d"]
    assert found == [values[(i & ~31) + lane] for i, lane in enumerate(lanes)]


def folded(op: str, values: list[int]) -> int:
    kind = op.split(".")[1]
    if op.startswith(("min", "max", "add")):
        rule = {"min": min, "max": max, "add": sum}[op[:3]]
        return unsigned(rule([s(value) if kind == "s32" else value for value in values]), 32)
    rule = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}[op.split(".")[0]]
    return functools.reduce(rule, values)


@pytest.mark.parametrize("op", ["and.b32", "or.b32", "xor.b32", "add.s32", "add.u32", "min.s32", "max.s32", "min.u32",
                                "max.u32"])  # fmt: skip
def test_warps_are_reduced(op):
    """9.7.13 redux.sync: every lane gets its warp's result."""
    draw = random.Random(2)
    values = [draw.getrandbits(32) | (0x11 if op[:3] == "and" else 0) for _ in range(128)]
    found = lanewise(f"mov.b32 %r200, -1;\nredux.sync.{op} {{d}}, {{a}}, %r200;", {"a": Operand(32, values)}, {"d": 32})
    assert found["d"] == [folded(op, values[i & ~31 : (i & ~31) + 32]) for i in range(128)]
