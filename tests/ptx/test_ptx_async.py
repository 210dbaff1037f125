"""What runs beside the lanes in the emulator: copies, groups, products, the waits and fences that they need."""

from __future__ import annotations

import math

import pytest

from emulator import PtxError, Schedule
from isa_rules import decoded
from tiny_ptx import SCHEDULES, WORDS, lane_values, patterns, tensor


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: f"{s.order}-{s.timing}")
@pytest.mark.parametrize(("op", "size"), [("cg", 16), ("ca", 16), ("ca", 8), ("ca", 4)])
def test_copies_fill_with_zeros(op, size, schedule):
    """9.7.9.25.3.1 cp.async: src-size bytes are read, the rest of cp-size is zero; with 0 nothing is read at all."""
    sizes = [0, size, 4, size // 2] if size > 4 else [0, 4, 4, 0]
    text = f"""
        and.b32 %r4, %r300, 3;
        setp.eq.s32 %p1, %r4, 0;
        setp.eq.s32 %p2, %r4, 1;
        setp.eq.s32 %p3, %r4, 2;
        selp.b32 %r5, {sizes[2]}, {sizes[3]}, %p3;
        selp.b32 %r6, {sizes[1]}, %r5, %p2;
        selp.b32 %r7, {sizes[0]}, %r6, %p1;
        selp.b64 %rd4, 0, %rd3, %p1;
        mov.b32 %r8, -1;
        st.shared.v4.b32 [%r3], {{%r8, %r8, %r8, %r8}};
        // begin inline asm
        cp.async.{op}.shared.global [ %r3 + 0 ], [ %rd4 + 0 ], {size:#x}, %r7;
        // end inline asm
        cp.async.commit_group;
        cp.async.wait_group 0;
        bar.sync 0;
        xor.b32 %r10, %r2, 16;
        add.s32 %r11, %r1, %r10;
        ld.shared.v4.b32 {{%r12, %r13, %r14, %r15}}, [%r11];
        st.global.v4.b32 [%rd3], {{%r12, %r13, %r14, %r15}};
        mov.b32 %r9, 0;
    """
    given = tensor(WORDS, 32)
    _, report = lane_values(text, [given], schedule=schedule)
    assert not report.races
    wanted = []
    for lane in range(128):
        other = lane ^ 1
        source, count = WORDS[4 * other : 4 * other + 4], sizes[other & 3]
        wanted += [(source[i] if 4 * i < count else 0) if 4 * i < size else 0xFFFFFFFF for i in range(4)]
    assert patterns(given).tolist() == wanted


GROUPS = """
    // begin inline asm
    @%p1 cp.async.ca.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x4, 0x4;
    // end inline asm
    cp.async.commit_group;
    @%p1 cp.async.ca.shared.global [ %r3 + 4 ], [ %rd3 + 4 ], 0x4, 0x4;
    cp.async.commit_group;
    cp.async.commit_group;
    cp.async.wait_group WAIT;
    ld.shared.b32 %r9, [%r3+AT];
"""


@pytest.mark.parametrize(
    ("wait", "at", "arrived"), [(3, 0, False), (2, 0, True), (2, 4, False), (1, 4, True), (0, 4, True)]
)
def test_groups_are_waited_for_in_order(wait, at, arrived):
    """9.7.9.25.3.3 wait_group N: at most the N latest groups are still pending; an empty group counts."""
    text = "setp.lt.u32 %p1, %r300, 999;" + GROUPS.replace("WAIT", str(wait)).replace("AT", str(at))
    for timing in ("late", "early"):
        found, report = lane_values(text, [tensor(WORDS, 32)], schedule=Schedule(timing=timing))
        right = found == WORDS[at // 4 :: 4]
        if arrived:
            assert right
            assert not report.races
        else:
            # Early the value may have come: then it is the race that tells.
            assert report.races or all(math.isnan(decoded(value, "f32")) for value in found)
            assert timing == "early" or not right


def test_a_copy_that_is_in_no_group_is_never_waited_for():
    text = """
        cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, 0x10;
        cp.async.wait_group 0;
        ld.shared.b32 %r9, [%r3];
    """
    found, _ = lane_values(text, [tensor(WORDS, 32)], schedule=Schedule(timing="late"))
    assert found != WORDS[::4]


def test_a_lane_waits_for_its_own_copies_only():
    """What another lane copied is there after its wait and a barrier, not after one's own wait."""
    text = """
        cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, 0x10;
        cp.async.commit_group;
        cp.async.wait_group 0;
        BARRIER
        xor.b32 %r10, %r2, 1024;
        add.s32 %r11, %r1, %r10;
        ld.shared.b32 %r9, [%r11];
    """
    wanted = [WORDS[4 * (lane ^ 64)] for lane in range(128)]
    for schedule in SCHEDULES:
        found, report = lane_values(text.replace("BARRIER", "bar.sync 0;"), [tensor(WORDS, 32)], schedule=schedule)
        assert (found, report.races) == (wanted, [])
        _, report = lane_values(text.replace("BARRIER", ""), [tensor(WORDS, 32)], schedule=schedule)
        assert report.races


WGMMA = "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%r10, %r11, %r12, %r13}, %rd11, %rd11, %p1, 1, 1, 0, 0;"

PRODUCT = f"""
    mov.b32 %r8, 0x3F803F80;
    st.shared.v4.b32 [%r3], {{{{%r8, %r8, %r8, %r8}}}};
    FENCE
    bar.sync 0;
    bfe.u32 %r7, %r1, 4, 14;
    cvt.u64.u32 %rd10, %r7;
    or.b64 %rd11, %rd10, {8 << 16 | 16 << 32};
    mov.b32 %r10, 0;
    mov.b32 %r11, 0;
    mov.b32 %r12, 0;
    mov.b32 %r13, 0;
    mov.pred %p1, -1;
    wgmma.fence.sync.aligned;
    {WGMMA}
    wgmma.commit_group.sync.aligned;
    AGAIN
    WAIT
    mov.b32 %r9, %r10;
    LAST
""".replace("{{", "{").replace("}}", "}")
SIXTEEN = 0x41800000


def run_product(timing: str, **parts: str) -> tuple[list[int], object]:
    given = {
        "FENCE": "fence.proxy.async.shared::cta;",
        "AGAIN": "",
        "WAIT": "wgmma.wait_group.sync.aligned 0;",
        "LAST": "",
    }
    text = PRODUCT
    for word, instead in (given | parts).items():
        text = text.replace(word, instead)
    return lane_values(text, [tensor(WORDS, 32)], shared=4096, schedule=Schedule(timing=timing))


@pytest.mark.parametrize("timing", ["late", "early"])
def test_a_product_is_there_after_its_wait(timing):
    found, report = run_product(timing)
    assert (found, report.races) == ([SIXTEEN] * 128, [])
    found, _ = run_product(timing, WAIT="wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 1;",
                           LAST="wgmma.wait_group.sync.aligned 0;")  # fmt: skip
    assert found == [SIXTEEN] * 128


def found_out(**parts: str) -> bool:
    """Whether a wrong product is told of: an error, a race, or late a result that is not the right one."""
    told = []
    for timing in ("late", "early"):
        try:
            found, report = run_product(timing, **parts)
        except PtxError:
            told.append(True)
        else:
            told.append(bool(report.races) or found != [SIXTEEN] * 128)
    return any(told)


@pytest.mark.parametrize("parts", [
    {"FENCE": ""},
    {"WAIT": "", "LAST": "wgmma.wait_group.sync.aligned 0;"},
    {"WAIT": "wgmma.wait_group.sync.aligned 1;", "LAST": "wgmma.wait_group.sync.aligned 0;"},
    {"WAIT": ""},
    {"WAIT": "st.shared.v4.b32 [%r3], {%r300, %r300, %r300, %r300};\nwgmma.wait_group.sync.aligned 0;"},
], ids=["no fence", "read before the wait", "a group too few", "no wait", "operand overwritten"])  # fmt: skip
def test_a_wrong_product_is_found(parts):
    assert found_out(**parts)


def test_a_fence_counts_on_either_side_of_the_barrier():
    found, report = run_product("late", FENCE="bar.sync 0;\nfence.proxy.async.shared::cta;")
    assert (found, report.races) == ([SIXTEEN] * 128, [])


@pytest.mark.parametrize("fence", ["", "fence.proxy.async.shared::cta;"])
def test_operands_copied_asynchronously_without_a_fence_are_told(fence):
    """Apart from races: Triton before 3.7 emits none."""
    copy = "cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, 0x10;"
    stores = PRODUCT[PRODUCT.index("st.shared") : PRODUCT.index("bar.sync")]
    text = PRODUCT.replace(stores, f"{copy}\ncp.async.commit_group;\ncp.async.wait_group 0;\n{fence}\n")
    text = text.replace("WAIT", "wgmma.wait_group.sync.aligned 0;").replace("AGAIN", "").replace("LAST", "")
    found, report = lane_values(text, [tensor([0x3F803F80] * 512, 32)])
    assert (found, report.races) == ([SIXTEEN] * 128, [])
    assert bool(report.unfenced) is not bool(fence)


def test_what_a_copy_overwrites_needs_no_fence_of_stores():
    """Of two writers only the last is read: the epilogue of one step and the copies of the next share memory."""
    copy = "cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, 0x10;"
    text = PRODUCT.replace("FENCE", f"bar.sync 0;\n{copy}\ncp.async.commit_group;\ncp.async.wait_group 0;")
    text = text.replace("0x3F803F80", "0x40004000").replace("WAIT", "wgmma.wait_group.sync.aligned 0;")
    text = text.replace("AGAIN", "").replace("LAST", "")
    for timing in ("late", "early"):
        found, report = lane_values(text, [tensor([0x3F803F80] * 512, 32)], schedule=Schedule(timing=timing))
        assert (found, report.races) == ([SIXTEEN] * 128, [])
        assert report.unfenced
