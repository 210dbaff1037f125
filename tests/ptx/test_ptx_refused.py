"""What the emulator must refuse, naming the line of the PTX."""

from __future__ import annotations

import re

import pytest

import emulator.run
from emulator import PtxError, execute
from tiny_ptx import ADDRESSES, lane_values, line_of, module, tensor

PARTED = "do not execute"
D = "{%r30, %r31, %r32, %r33}"
MMA = f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {D}, {{%r10, %r11, %r12, %r13}}, {{%r14, %r15}}, {D};"
ROW = "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r8];"
HALF = "setp.lt.s32 %p1, %r300, 16;\n"

REFUSED = {
    "an unknown instruction": ("frobnicate.sync.b32 %r9, %r300;", "frobnicate"),
    "a known name with an unknown type": ("add.q17 %r9, %r300, %r300;", "add.q17"),
    "an element behind a buffer": ("ld.global.b32 %r9, [%rd3+16];", "bounds"),
    "a vector that begins before a buffer": ("ld.global.v2.b32 {%r9, %r10}, [%rd1+-8];", "bounds"),
    "an element before a buffer": ("ld.global.b32 %r9, [%rd3+-4];", "bounds"),
    "a store before a buffer": ("st.global.b16 [%rd1+-2], %rs1;", "bounds"),
    "a store behind a buffer": ("st.global.b8 [%rd3+16], %rs1;", "bounds"),
    "a copy behind a buffer": (
        "cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 16 ], 0x10, 0x10;\n"
        "cp.async.commit_group;\ncp.async.wait_group 0;",
        "bounds",
    ),
    "a null pointer": ("mov.b64 %rd9, 0;\nld.global.b32 %r9, [%rd9];", "bounds"),
    "a misaligned load": ("ld.global.b32 %r9, [%rd3+2];", "align"),
    "a misaligned vector": ("ld.global.v2.b32 {%r9, %r10}, [%rd3+4];", "align"),
    "a misaligned shared load": ("ld.shared.b32 %r9, [%r3+2];", "align"),
    "a misaligned row of a matrix": (f"add.s32 %r8, %r1, 8;\n{ROW}", "align"),
    "shared memory behind its end": ("ld.shared.b32 %r9, [%r3+2048];", "shared"),
    "shared memory before its begin": ("st.shared.b32 [%r3+-4], %r300;", "shared"),
    "a matrix behind shared memory": (f"add.s32 %r8, %r1, 4096;\n{ROW}", "shared"),
    "half a warp at a product": (f"{HALF}@%p1 {MMA}", PARTED),
    "half a warp at a matrix": (f"{HALF}mov.b32 %r8, %r1;\n@%p1 {ROW}", PARTED),
    "half a warp at a shuffle": (f"{HALF}@%p1 shfl.sync.bfly.b32 %r9, %r300, 1, 31, -1;", PARTED),
    "half a warp at a barrier": (f"{HALF}@%p1 bar.sync 0;", PARTED),
    "half a warp behind a branch at a product": (
        f"{HALF}@%p1 bra $L__BB0_1;\n{MMA}\n$L__BB0_1:", PARTED,
    ),
    "half a warp group at a fence": (
        "setp.lt.s32 %p1, %r300, 64;\n@!%p1 bra $L__BB0_1;\nwgmma.fence.sync.aligned;\n"
        "$L__BB0_1:\nadd.s32 %r9, %r300, 1;",
        PARTED,
    ),
    "half a warp group at a product": (
        "setp.lt.s32 %p1, %r300, 64;\nmov.b64 %rd9, 0;\nmov.pred %p2, -1;\n"
        f"@%p1 wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {D}, %rd9, %rd9, %p2, 1, 1, 0, 0;",
        PARTED,
    ),
    "warps that wait at two barriers": (
        "setp.lt.s32 %p1, %r300, 32;\n@%p1 bra $L__BB0_1;\nbar.sync 0;\n$L__BB0_1:\nbar.sync 1;", "barrier|deadlock",
    ),
    "a loop without end": ("$L__BB0_1:\nadd.s32 %r9, %r300, 1;\nbra.uni $L__BB0_1;", "not at its end"),
    "a parameter too many": ("ld.param.b64 %rd9, [tiny_param_7];", "param"),
    "a label that is nowhere": ("bra.uni $L__BB0_77;", "BB0_77"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name, monkeypatch):
    monkeypatch.setattr(emulator.run, "MOST_STEPS", 200)
    text, words = REFUSED[name]
    lines = [*ADDRESSES, "mov.b16 %rs1, 1;", *text.strip().splitlines()]
    ptx = module("\n".join(lines), parameters=["u64"])
    with pytest.raises(PtxError, match=f"(?i){words}") as caught:
        execute(ptx, (1,), [tensor([1] * 512, 32)], shared=2048)
    if name not in ("a label that is nowhere", "a loop without end"):
        # The lines of the text, or the end of the kernel, where what is still on its way is noticed.
        last = line_of(ptx, r"^\tret;")
        lines = range(last - len(text.strip().splitlines()), last + 1)
        assert any(re.search(rf"\b{line}\b", str(caught.value)) for line in lines), (lines, str(caught.value))


@pytest.mark.parametrize("text", ["@%p1 ld.global.b32 %r9, [%rd3+2048];", "@%p1 st.shared.b32 [%r3+2048], %r300;"])
def test_a_lane_that_does_not_access_is_not_asked(text):
    found, _ = lane_values(
        f"mov.b32 %r9, 3;\nsetp.gt.s32 %p1, %r300, 500;\n{text}", [tensor([1] * 512, 32)], shared=2048
    )
    assert found == [3] * 128


@pytest.mark.parametrize(
    ("tensor_number", "distance"), [(0, 2048), (0, 2560), (0, 4000), (1, -4), (1, -512), (1, -2000)]
)
def test_one_tensor_is_not_reached_from_another(tensor_number, distance):
    """Whatever lies between them, an address beyond one may not fall into the other."""
    load = [f"ld.param.b64 %rd9, [tiny_param_{tensor_number}];", f"ld.global.b32 %r9, [%rd9+{distance}];"]
    ptx = module("\n".join([*ADDRESSES, *load]), parameters=["u64", "u64"])
    with pytest.raises(PtxError, match="bounds"):
        execute(ptx, (1,), [tensor([1] * 512, 32), tensor([2] * 512, 32)], shared=2048)
