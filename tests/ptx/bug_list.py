"""The seeded bugs of ptx_bugs.py: what a compiler, or a tired engineer, might get wrong in a launch's PTX."""

from __future__ import annotations

import re
from typing import NamedTuple

from bug_rules import Rule, copy_mask, drop, mask, more, store_mask, sub

NANS, TIES, NORMED = "NaNs", "ties", "BatchNorm"
"""Data of a block: with NaNs in x, or with few different values in x; "" for normal ones. NORMED: normal ones, of a
block with BatchNorm in training."""

K1, K2, K3, K4 = "grouped_gemm 1", "pool_proj 1", "conv_fprop 1", "conv_fprop 2"
PACK, PACK_B, B1, B3, B5 = "pack 1", "pack_dgrad 1", "mask_grad 1", "grouped_dgrad 1", "reduce 1"
B2, B2_5X5, B2_1X1 = "conv_dgrad 1", "conv_dgrad 2", "conv_dgrad 3"
B4, B4_POOL = "conv_wgrad 1", "conv_wgrad 4"
N1, N2, N3 = "norm_stats 1", "norm_combine 1", "norm_apply 1"
N4, N5, N6 = "norm_grad_stats 1", "norm_grad_combine 1", "norm_grad_apply 1"


class Bug(NamedTuple):
    """kernel: a launch of a block, by function and number. quick: in every run of the tests. equivalent: why the change
    is no bug, which is then executed as well."""

    name: str
    kernel: str
    capability: int
    rule: Rule
    dtype: str = "bf16"
    data: str = ""
    quick: bool = False
    equivalent: str = ""

    @property
    def id(self) -> str:
        return " ".join(filter(None, (f"{self.name}: {self.kernel} sm_{self.capability} {self.dtype}", self.data)))

    @property
    def block(self) -> tuple[int, str, str]:
        """Of whose launches it is one: architecture, dtype, data."""
        return self.capability, self.dtype, self.data

    def apply(self, ptx: str) -> str:
        """Raises LookupError where the text has no place for it."""
        changed = self.rule(ptx)
        if changed == ptx:
            raise LookupError(f"{self.name}: it changes nothing")
        return changed


BARRIER = r"bar\.sync[ \t]+0;"
LOOP_WAIT = r"cp\.async\.wait_group[ \t]+([1-9]\d*);"
COMMIT = r"cp\.async\.commit_group;"
WGMMA_WAIT = r"wgmma\.wait_group\.sync\.aligned (\d+);"
LDMATRIX = r"(ldmatrix\.sync\.aligned\.m8n8\.x4\S*[^;]*\[%r\d+)(?:\+\d+)?\]"
PACKED = r"(cvt\.rn\.bf16x2\.f32[ \t]+%r\d+, )(%r\d+), (%r\d+);"
IGNORED = (r"max\.NaN\.", "max.", None)
NO_BIT = (r"setp\.neu\.(b?f\w+)", r"setp.ne.\1", None)
REGISTERS_A = r"(mma\.sync[^{]*\{[^}]*\}, \{ ?%r\d+), (%r\d+), (%r\d+)"
WGMMA = r"^([ \t]*wgmma\.mma_async[^}]*\}, )(%rd\d+), (%rd\d+)"
"""With the descriptors of A and B. %rd0 and %r0 are registers that LLVM leaves out."""

HALF_STRIDE = 32 << 32
"""Of a stride of 1024 bytes, encoded in sixteens from bit 32 on."""

A_HALVED = rf"\tsub.s64 %rd0, \2, {HALF_STRIDE};\n\1%rd0, \3"
B_HALVED = rf"\tsub.s64 %rd0, \3, {HALF_STRIDE};\n\1\2, %rd0"
NEXT_16 = r"\tadd.s64 %rd0, \2, 1;\n\1%rd0, \3"

COUNTED = r"(add\.s32[ \t]+(%r\d+), \2, 1;\n[ \t]*setp\.ne\.b32[^;]*)\2(?!\d)"


def _one_more(loop: re.Match[str]) -> str:
    """The end of a loop, asked of the next step's number."""
    return loop[1].replace("setp", f"add.s32 %r0, {loop[2]}, 1;\n\tsetp") + "%r0"


ASYNCHRONOUS = (
    Bug("no barrier behind the wait for copies", K1, 80, sub(rf"({LOOP_WAIT}\n)[ \t]*{BARRIER}\n", r"\1"), quick=True),
    Bug("no barrier behind the wait for copies", K3, 90, sub(rf"({LOOP_WAIT}\n)[ \t]*{BARRIER}\n", r"\1")),
    Bug("no barrier before the rows are stored", K3, 90, drop(BARRIER, -1)),
    Bug("no barrier in the reduction", B5, 80, drop(BARRIER)),
    Bug("no barrier between gather and product", B3, 80, drop(BARRIER, -3)),
    Bug("copies are waited for a group too late", K1, 80, more(LOOP_WAIT), quick=True),
    Bug("copies are waited for a group too late", K4, 90, more(LOOP_WAIT)),
    Bug("copies are waited for a group too late", B4, 80, more(LOOP_WAIT)),
    Bug("the loop commits one group less", K3, 80, drop(COMMIT, -1)),
    Bug("the first copies are committed with the next", B2, 90, drop(COMMIT, 1)),
    Bug("copies in flight at the end are not waited for", K1, 90, drop(r"cp\.async\.wait_group[ \t]+0;", -1)),
    Bug("products are waited for a group too late", K3, 90, more(WGMMA_WAIT), quick=True),
    Bug("the last products are not waited for", K1, 90, more(WGMMA_WAIT, which=-1)),
    Bug("products are never committed", B4, 90, drop(r"wgmma\.commit_group", None)),
    Bug("stores are not fenced from wgmma", K2, 90, drop(r"fence\.proxy\.async"), quick=True),
    Bug("stores are not fenced from wgmma", B4_POOL, 90, drop(r"fence\.proxy\.async")),
)

SHARED = (
    Bug("A's descriptor has half its stride", K1, 90, sub(WGMMA, A_HALVED, None), quick=True),
    Bug("B's descriptor has half its stride", K3, 90, sub(WGMMA, B_HALVED, None)),
    Bug("a descriptor advances too far along K", K3, 90, sub(WGMMA, r"\tadd.s64 %rd0, \2, 2;\n\1%rd0, \3", 1)),
    Bug("a descriptor begins 16 bytes on", B2, 90, sub(WGMMA, NEXT_16)),
    Bug("wgmma replaces instead of adding", K3, 90, sub(r"mov\.pred([ \t]+%p\d+), -1;", r"mov.pred\1, 0;")),
    Bug("wgmma subtracts", K4, 90, sub(r"(wgmma\.mma_async.*, %p\d+), 1, 1, 0, 0;", r"\1, -1, 1, 0, 0;")),
    Bug("wgmma reads B along the other dimension", K1, 90, sub(r"(wgmma\.mma_async.*), 0, 0;", r"\1, 0, 1;")),
    Bug("wgmma reads A along K", B4, 90, sub(r"(wgmma\.mma_async.*), 1, ([01]);", r"\1, 0, \2;")),
    Bug(
        "A is transposed",
        K3,
        80,
        sub(r"ldmatrix\.sync\.aligned\.m8n8\.x4\.shared", "ldmatrix.sync.aligned.m8n8.x4.trans.shared"),
        quick=True,
    ),
    Bug("B is not transposed", B4, 80, sub(r"\.x4\.trans\.shared", ".x4.shared")),
    Bug("a matrix is read 16 bytes on", K4, 80, sub(LDMATRIX, r"\1+16]")),
    Bug(
        "rows are written 16 bytes on",
        PACK_B,
        80,
        sub(r"(st\.shared[\w.:]*[^;\n]*\[ ?%r\d+)(?: \+ 0)? ?\]", r"\1+16]", 2),
    ),
    Bug("copies are not swizzled", K1, 80, sub(r"xor\.b32([ \t]+%r\d+, %r\d+), %r\d+;", r"mov.b32\1;")),
    Bug(
        "the second step along K has the first's swizzle",
        K3,
        80,
        sub(r"xor\.b32([ \t]+%r\d+, %r\d+), 32;", r"xor.b32\1, 16;"),
    ),
    Bug("a product is left out", K1, 80, drop(r"mma\.sync", 3)),
    Bug(
        "two registers of A are exchanged",
        K4,
        80,
        sub(REGISTERS_A, r"\1, \3, \2"),
    ),
    Bug(
        "the accumulator is forgotten",
        B3,
        80,
        sub(r"^([ \t]*mma\.sync.*\{ ?)%r\d+(,[^{]*)$", r"\tmov.b32 %r0, 0;\n\1%r0\2"),
    ),
)

MASKS = (
    Bug("a store's rows end one late", K1, 80, store_mask(pick=0), quick=True),
    Bug("a store's columns end one late", K1, 90, store_mask(-1, pick=1)),
    Bug("a store's rows end one late", K3, 90, store_mask(None, pick=0)),
    Bug("a store's columns end one late", B2, 80, store_mask(-1, pick=1)),
    Bug("weights' columns end one late", K3, 80, copy_mask(-1, pick=0)),
    Bug("channels end one late", K1, 90, copy_mask(None, pick=0)),
    Bug("a border's bit is read the wrong way", K4, 80, copy_mask(0, pick=0)),
    Bug("a bias is read beyond its end", K4, 90, mask(r"ld\.global\.b32", r"@(%p\d+)", None)),
    Bug("bits are stored beyond the last filter", K3, 80, store_mask(access=r"st\.global\.b8", pick=1)),
    Bug("a store's predicate is negated", K4, 80, sub(r"@(%p\d+) st\.global\.v4", r"@!\1 st.global.v4")),
    Bug(
        "16 bytes are read where none should be", B3, 80, sub(r"selp\.b32([ \t]+%r\d+), 16, 0,", r"selp.b32\1, 0, 16,")
    ),
    Bug("copies read half of their bytes", B4, 80, sub(r"selp\.b32([ \t]+%r\d+), 16, 0,", r"selp.b32\1, 8, 0,")),
    Bug("packed filters end one late", PACK, 80, store_mask(access=r"st\.global\.b16")),
)

VALUES = (
    Bug("the largest of a window ignores NaNs", K2, 80, sub(*IGNORED), data=NANS),
    Bug("NaN is asked for the wrong way", K2, 80, sub(r"setp\.nan\.", "setp.num.", None), data=NANS),
    Bug("the last of equal values wins", K2, 80, sub(r"set\.gt\.u32\.f16x2", "set.ge.u32.f16x2", None), data=TIES),
    Bug("the tap that loses is kept", K2, 90, sub(r"(lop3\.b32[^;]*), 0xCA;", r"\1, 0xAC;")),
    Bug(
        "whether any value is NaN is asked with min",
        K2,
        90,
        sub(r"redux\.sync\.max", "redux.sync.min", None),
        data=NANS,
    ),
    Bug("a NaN's bit is not set", K3, 80, sub(*NO_BIT), data=NANS),
    Bug("ReLU keeps what is negative", K1, 80, sub(r"setp\.lt\.f32", "setp.gt.f32"), quick=True),
    Bug("halves are packed the wrong way round", PACK_B, 80, sub(r"0x5410U", "0x1054U")),
    Bug("results are cut off instead of rounded", K1, 90, sub(r"cvt\.rn\.bf16x2", "cvt.rz.bf16x2")),
    Bug("the halves of a result are exchanged", B3, 80, sub(PACKED, r"\1\3, \2;", None)),
    Bug("the bias is not added", K4, 90, sub(r"add\.f32([ \t]+%r\d+), (%r\d+), %r\d+;", r"mov.b32\1, \2;")),
    Bug("a sum over lanes takes another lane", B1, 80, more(r"shfl\.sync\.bfly\.b32[ \t]+%r\d+, %r\d+, (\d+), 31", 3)),
    Bug("a sum over rows leaves one out", B5, 80, sub(r"add\.f32([ \t]+%r\d+), (%r\d+), %r\d+;", r"mov.b32\1, \2;")),
    Bug(
        "another warp group's number is taken",
        B4,
        90,
        sub(r"(shfl\.sync\.idx\.b32[ \t]+%r\d+, )(%r\d+), 0,", r"xor.b32 %r0, \2, 4;\n\t\1%r0, 0,"),
    ),
    Bug("mask bits are read from the next byte", B1, 90, sub(r"(ld\.global\.b8 \{[^}]*\}, \[ %rd\d+) \+ 0", r"\1 + 1")),
    Bug("of a byte of bits only four count", B1, 80, sub(r"and\.b32([ \t]+%r\d+, %r\d+), 7;", r"and.b32\1, 3;")),
    Bug(
        "taps are compared the wrong way", B3, 80, sub(r"setp\.eq\.b32([ \t]+%p\d+, %r\d+, 0;)", r"setp.ne.b32\1", None)
    ),
)

ADDRESSES = (
    Bug(
        "units count for half their channels",
        K1,
        90,
        sub(r"shl\.b32([ \t]+%r\d+, %r\d+), 3;", r"shl.b32\1, 2;"),
        quick=True,
    ),
    Bug(
        "an element has four bytes", K3, 80, sub(r"mad\.wide\.s32([ \t]+%rd\d+, %r\d+), 2,", r"mad.wide.s32\1, 4,", -1)
    ),
    Bug(
        "a product of addresses forgets its sum",
        B2,
        90,
        sub(r"mad\.lo\.s32([ \t]+%r\d+, %r\d+, %r\d+), %r\d+;", r"mul.lo.s32\1;"),
    ),
    Bug(
        "row and column of a tile are exchanged",
        K1,
        80,
        sub(r"div\.s32([ \t]+%r\d+), (%r\d+), (%r\d+);", r"rem.s32\1, \2, \3;"),
    ),
    Bug("pixels are divided by the wrong side", B2, 80, sub(r"rem\.(u|s)32", r"div.\g<1>32")),
    Bug("the loop ends one step early", K3, 90, sub(COUNTED, _one_more, -1)),
    Bug(
        "the loop runs once",
        K4,
        80,
        sub(r"@(%p\d+) bra([ \t]+\$L__BB\d+_\d+;\n)(?=[ \t]*bra\.uni|\$L)", r"@!\1 bra\2", -1),
    ),
    Bug("every other step along K is left out", B2, 80, sub(r"add\.s32([ \t]+(%r\d+), \2), 1;", r"add.s32\1, 2;")),
)

TF32 = (
    Bug("a descriptor begins 16 bytes on", K3, 90, sub(WGMMA, NEXT_16), "fp32"),
    Bug("copies are waited for a group too late", B4, 90, more(LOOP_WAIT), "fp32"),
    Bug("products are waited for a group too late", K1, 90, more(WGMMA_WAIT), "fp32"),
    Bug(
        "four bytes are read where none should be",
        B4,
        90,
        sub(r"selp\.b32([ \t]+%r\d+), 4, 0,", r"selp.b32\1, 4, 4,", None),
        "fp32",
    ),
    Bug("two registers of A are exchanged", K4, 80, sub(REGISTERS_A, r"\1, \3, \2"), "fp32"),
    Bug("a store's rows end one late", B2, 80, store_mask(None), "fp32"),
)

MINUS, KEPT = r"sub\.f32([ \t]+%r\d+), (%r\d+), %r\d+;", r"mov.b32\1, \2;"
FMA = r"fma\.rn\.f32([ \t]+%r\d+), (%r\d+), (%r\d+), (%r\d+);"
TWICE = r"mul.rn.f32 %r0, \2, \3;\n\tadd.rn.f32\1, %r0, \4;"
A_LANE = r"shfl\.sync\.bfly\.b32[ \t]+%r\d+, %r\d+, (\d+), 31"

NORMS = tuple(
    bug._replace(data=NORMED)
    for bug in (
        Bug("the pivot is forgotten", N1, 80, sub(MINUS, KEPT), quick=True),
        Bug("no barrier in the reduction", N1, 90, drop(BARRIER)),
        Bug("a sum over lanes takes another lane", N1, 90, more(A_LANE, 3)),
        Bug("a row of parts ends one late", N1, 80, store_mask(-1, pick=1, access=r"st\.global\.b32")),
        Bug("the variance in the place of the deviation", N2, 80, sub(r"sqrt\.rn\.f32", "mov.b32", None)),
        Bug("a part of statistics is not stored", N2, 90, drop(r"st\.global\.b32", 1)),
        Bug("no barrier in the reduction", N2, 80, drop(BARRIER)),
        Bug("ReLU keeps what is negative", N3, 90, sub(r"setp\.lt\.(b?f)", r"setp.gt.\1", None)),
        Bug("a product is rounded before its sum", N3, 80, sub(FMA, TWICE, None), "fp32"),
        Bug("rows end one late", N3, 80, store_mask(None, pick=0)),
        Bug("what is masked passes", N4, 90, sub(r"setp\.le\.f32", "setp.gt.f32", None), quick=True),
        Bug("raw values are taken with their mean", N4, 80, sub(MINUS, KEPT)),
        Bug("a sum over lanes takes another lane", N4, 80, more(A_LANE, 3)),
        Bug("a coefficient is not stored", N5, 90, drop(r"st\.global\.b32", 1)),
        Bug("the variance in the place of the deviation", N5, 80, sub(r"sqrt\.rn\.f32", "mov.b32", None)),
        Bug("the statistics count where they do not", N6, 80, sub(r"setp\.eq\.f32", "setp.neu.f32", None)),
        Bug("the halves of a result are exchanged", N6, 90, sub(PACKED, r"\1\3, \2;", None)),
        Bug("columns end one late", N6, 80, store_mask(-1, pick=1)),
        Bug("raw values are taken with their mean", B2, 90, sub(MINUS, KEPT, None)),
    )
)

EQUIVALENT = (
    Bug("NaNs are ignored where there are none", K2, 80, sub(*IGNORED), equivalent="the same with NaNs in x is caught"),
    Bug("NaNs have no bit where there are none", K3, 80, sub(*NO_BIT), equivalent="the same with NaNs in x is caught"),
)
"""What only NaNs tell apart: why the bugs above need them."""

BUGS = (*ASYNCHRONOUS, *SHARED, *MASKS, *VALUES, *ADDRESSES, *TF32, *NORMS, *EQUIVALENT)
