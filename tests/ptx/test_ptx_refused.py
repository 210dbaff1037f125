"""What the emulator must refuse, naming the line of the PTX."""

from __future__ import annotations

import re

import pytest
from program import PtxError
from run_ptx import execute

from tiny_ptx import ADDRESSES, lane_values, line_of, module, tensor

REFUSED = {
    "an unknown instruction": ("frobnicate.sync.b32 %r9, %r300;", "frobnicate"),
    "a known name with an unknown type": ("add.q17 %r9, %r300, %r300;", "add.q17"),
    "an element behind a buffer": ("ld.global.b32 %r9, [%rd3+4];", "bounds"),
    "a vector that ends behind a buffer": ("ld.global.v4.b32 {%r9, %r10, %r11, %r12}, [%rd1+2036];", "align"),
    "an element before a buffer": ("ld.global.b32 %r9, [%rd3+-4];", "bounds"),
    "a store before a buffer": ("st.global.b16 [%rd1+-2], %rs1;", "bounds"),
    "a store behind a buffer": ("st.global.b8 [%rd3+16], %rs1;", "bounds"),
    "a copy behind a buffer": ("cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 16 ], 0x10, 0x10;\n"
                               "cp.async.wait_all;", "bounds"),
    "a null pointer": ("mov.b64 %rd9, 0;\nld.global.b32 %r9, [%rd9];", "bounds"),
    "a misaligned load": ("ld.global.b32 %r9, [%rd3+2];", "align"),
    "a misaligned vector": ("ld.global.v2.b32 {%r9, %r10}, [%rd3+4];", "align"),
    "a misaligned shared load": ("ld.shared.b32 %r9, [%r3+2];", "align"),
    "a misaligned row of a matrix": ("add.s32 %r8, %r1, 8;\n"
                                     "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r8];", "align"),
    "shared memory behind its end": ("ld.shared.b32 %r9, [%r3+2048];", "shared"),
    "shared memory before its begin": ("st.shared.b32 [%r3+-4], %r300;", "shared"),
    "a matrix behind shared memory": ("add.s32 %r8, %r1, 4096;\n"
                                      "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r9, %r10, %r11, %r12}, [%r8];",
                                      "shared"),
    "half a warp at a product": ("and.b32 %r20, %r300, 1;\nsetp.eq.s32 %p1, %r20, 0;\n"
                                 "@%p1 mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r30, %r31, %r32, %r33}, "
                                 "{%r10, %r11, %r12, %r13}, {%r14, %r15}, {%r30, %r31, %r32, %r33};", "diverge"),
    "half a warp at a matrix": ("setp.lt.s32 %p1, %r300, 16;\n"
                                "@%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r9}, [%r1];", "diverge"),
    "half a warp at a barrier": ("setp.lt.s32 %p1, %r300, 16;\n@%p1 bar.sync 0;", "diverge|barrier|deadlock"),
    "warps that wait at two barriers": ("setp.lt.s32 %p1, %r300, 32;\n@%p1 bra $L__BB0_1;\nbar.sync 0;\n$L__BB0_1:\n"
                                        "bar.sync 1;", "deadlock"),
    "a loop without end": ("$L__BB0_1:\nadd.s32 %r9, %r300, 1;\nbra.uni $L__BB0_1;", "step|end|limit|loop"),
    "half a warp group at a wgmma": ("setp.lt.s32 %p1, %r300, 64;\n@!%p1 bra $L__BB0_1;\nwgmma.fence.sync.aligned;\n"
                                     "$L__BB0_1:\nadd.s32 %r9, %r300, 1;", "diverge|group"),
    "an argument too few": ("ld.param.b64 %rd9, [tiny_param_7];", "param"),
    "a label that is nowhere": ("bra.uni $L__BB0_77;", "BB0_77"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    text, words = REFUSED[name]
    lines = [*ADDRESSES, "mov.b16 %rs1, 1;", *text.strip().splitlines()]
    ptx = module("\n".join(lines), parameters=["u64"])
    with pytest.raises(PtxError, match=f"(?i){words}") as caught:
        execute(ptx, (1,), [tensor([1] * 512, 32)], shared=2048)
    if "label" not in name:
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
