"""What runs beside the lanes and between them in the emulator: copies, groups, barriers, races, waits."""

from __future__ import annotations

import itertools
import math

import pytest

from emulator import PtxError, Schedule, execute
from isa_rules import decoded
from tiny_ptx import ADDRESSES, lane_values, line_of, module, patterns, tensor

SCHEDULES = [Schedule(order=order, timing=timing, seed=3)
             for order, timing in itertools.product(["together", "ascending", "descending", "random"],
                                                    ["late", "early", "random"])]  # fmt: skip

WORDS = [1000 + i for i in range(128 * 4)]


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


EXCHANGED = """
    st.shared.b32 [%r3], %r300;
    BARRIER
    xor.b32 %r10, %r2, DISTANCE;
    add.s32 %r11, %r1, %r10;
    ld.shared.b32 %r9, [%r11];
"""


def exchanged(distance: int, barrier: str, schedule: Schedule) -> tuple[list[int], object]:
    return lane_values(EXCHANGED.replace("BARRIER", barrier).replace("DISTANCE", str(distance)), [tensor(WORDS, 32)],
                       schedule=schedule)  # fmt: skip


@pytest.mark.parametrize("schedule", SCHEDULES[::2], ids=lambda s: f"{s.order}-{s.timing}")
def test_what_another_warp_wrote_needs_a_barrier(schedule):
    found, report = exchanged(512, "bar.sync 0;", schedule)
    assert (found, report.races) == ([lane ^ 32 for lane in range(128)], [])
    _, report = exchanged(512, "", schedule)
    assert report.races
    ptx = module("\n".join([*ADDRESSES, *EXCHANGED.strip().splitlines()]), parameters=["u64", "u64"])
    told = "".join(map(str, report.races))
    for pattern in (r"st\.shared", r"ld\.shared"):
        assert str(line_of(ptx, pattern)) in told, "a race names both lines"


def test_writing_what_others_still_read_is_a_race():
    text = """
        st.shared.b32 [%r3], %r300;
        bar.sync 0;
        xor.b32 %r10, %r2, 512;
        add.s32 %r11, %r1, %r10;
        ld.shared.b32 %r9, [%r11];
        BARRIER
        st.shared.b32 [%r3], %r9;
    """
    for schedule in SCHEDULES[::3]:
        assert lane_values(text.replace("BARRIER", ""), [tensor(WORDS, 32)], schedule=schedule)[1].races
        assert not lane_values(text.replace("BARRIER", "bar.sync 0;"), [tensor(WORDS, 32)], schedule=schedule)[1].races


@pytest.mark.parametrize("schedule", SCHEDULES[::3], ids=lambda s: s.order)
@pytest.mark.parametrize(("value", "races"), [("%r1", False), ("%r300", True)])
def test_equal_values_from_two_warps_are_harmless(value, races, schedule):
    text = f"""
        st.shared.b32 [%r1+64], {value};
        bar.sync 0;
        ld.shared.b32 %r9, [%r1+64];
    """
    found, report = lane_values(text, [tensor(WORDS, 32)], schedule=schedule)
    assert bool(report.races) == races
    assert len(set(found)) == 1


@pytest.mark.parametrize("width", [1, 16])
def test_programs_may_not_write_different_values_in_one_place(width):
    text = [*ADDRESSES, "mov.u32 %r20, %ctaid.x;", "add.s32 %r21, %r20, %r300;", "st.global.b32 [%rd3], VALUE;"]
    for value, races in (("%r300", False), ("%r21", True)):
        ptx = module("\n".join(text).replace("VALUE", value), parameters=["u64"])
        report = execute(ptx, (2,), [tensor(WORDS, 32)], shared=2048, width=width)
        assert bool(report.races) == races, value


def test_barriers_and_loops():
    """Values that go round the block, a step a turn, through a loop with two barriers."""
    text = """
        mov.b32 %r9, %r300;
        mov.b32 %r20, 0;
        $L__BB0_1:
        st.shared.b32 [%r3], %r9;
        bar.sync 0;
        add.s32 %r10, %r2, 16;
        and.b32 %r10, %r10, 2047;
        add.s32 %r11, %r1, %r10;
        ld.shared.b32 %r9, [%r11];
        bar.sync 0;
        add.s32 %r20, %r20, 1;
        setp.lt.s32 %p1, %r20, 37;
        @%p1 bra $L__BB0_1;
    """
    for schedule in SCHEDULES:
        found, report = lane_values(text, [tensor(WORDS, 32)], schedule=schedule)
        assert (found, report.races) == ([(lane + 37) % 128 for lane in range(128)], [])


def test_branches_by_index_and_by_predicate():
    """9.7.12.3 brx.idx; lanes of one warp go four ways, and come together."""
    text = """
        and.b32 %r20, %r300, 3;
        mov.b32 %r9, 5;
        $L_brx_0: .branchtargets
            $L__BB0_1,
            $L__BB0_2,
            $L__BB0_3,
            $L__BB0_2;
        brx.idx %r20, $L_brx_0;
        $L__BB0_1:
        mov.b32 %r9, 100;
        bra.uni $L__BB0_4;
        $L__BB0_2:
        setp.gt.s32 %p1, %r300, 63;
        @%p1 bra $L__BB0_4;
        mov.b32 %r9, 200;
        bra.uni $L__BB0_4;
        $L__BB0_3:
        mov.b32 %r9, 300;
        $L__BB0_4:
        add.s32 %r9, %r9, %r300;
        setp.ge.s32 %p2, %r300, 128;
        @%p2 ret;
        shfl.sync.bfly.b32 %r9, %r9, 0, 31, -1;
    """
    found, _ = lane_values(text, [tensor(WORDS, 32)])
    ways = [lambda lane: 100, lambda lane: 5 if lane > 63 else 200, lambda lane: 300]
    assert found == [ways[(0, 1, 2, 1)[lane & 3]](lane) + lane for lane in range(128)]


def test_blocks_have_their_own_shared_memory_and_numbers():
    lines = [*ADDRESSES, "mov.u32 %r20, %ctaid.x;", "mov.u32 %r21, %ctaid.y;", "mad.lo.s32 %r22, %r21, 3, %r20;",
             "st.shared.b32 [%r3], %r22;", "bar.sync 0;", "xor.b32 %r10, %r2, 512;", "add.s32 %r11, %r1, %r10;",
             "ld.shared.b32 %r9, [%r11];", "mad.lo.s32 %r23, %r22, 128, %r300;", "mul.wide.s32 %rd9, %r23, 4;",
             "add.s64 %rd10, %rd1, %rd9;", "st.global.b32 [%rd10], %r9;"]  # fmt: skip
    out = tensor([0] * 128 * 6, 32)
    report = execute(module("\n".join(lines), parameters=["u64"]), (3, 2), [out], shared=2048)
    assert patterns(out).tolist() == [block for block in range(6) for _ in range(128)]
    assert not report.races


def test_a_report_says_which_lines_ran():
    lines = [*ADDRESSES, "setp.lt.s32 %p1, %r300, 999;", "@%p1 bra $L__BB0_2;", "not.b32 %r9, %r9;", "$L__BB0_2:",
             "add.s32 %r9, %r9, 1;"]  # fmt: skip
    ptx = module("\n".join(lines), parameters=["u64"])
    report = execute(ptx, (1,), [tensor(WORDS, 32)], shared=4096)
    assert line_of(ptx, "add.s32 %r9") in report.executed
    assert line_of(ptx, "not.b32") not in report.executed


def test_parameters_of_every_kind():
    """Words, double words, and a parameter that is read through its address, of which a lane takes its own."""
    text = """
        ld.param.b32 %r10, [tiny_param_1];
        ld.param.b64 %rd10, [tiny_param_2];
        cvt.u32.u64 %r11, %rd10;
        shr.u64 %rd11, %rd10, 32;
        cvt.u32.u64 %r12, %rd11;
        xor.b32 %r13, %r11, %r12;
        add.s32 %r14, %r10, %r13;
        setp.lt.s32 %p1, %r300, 2;
        mov.b64 %rd12, tiny_param_1;
        mov.b64 %rd13, tiny_param_3;
        selp.b64 %rd14, %rd12, %rd13, %p1;
        ld.param.b32 %r15, [%rd14];
        mov.b32 %r16, tiny_param_3;
        ld.param.b32 %r17, [%r16];
        sub.s32 %r18, %r17, %r15;
        add.s32 %r9, %r14, %r18;
        setp.gt.s32 %p2, %r300, 3;
        @%p2 ret;
    """
    lines = [*ADDRESSES, *text.strip().splitlines(), "sub.s32 %r19, 0, %r300;", "mul.wide.s32 %rd15, %r19, 12;",
             "add.s64 %rd16, %rd3, %rd15;", "add.s64 %rd17, %rd16, 16;", "st.global.b32 [%rd17+-16], %r9;"]  # fmt: skip
    out = tensor([0] * 4, 32)
    ptx = module("\n".join(lines), parameters=["u64", "u32", "u64", "u32"])
    ptx = ptx.replace(".ptr .global .align 1 tiny_param_2", "tiny_param_2")
    execute(ptx, (1,), [out, -5, 0x0000000700000009, 1000])
    words = -5 + (7 ^ 9)
    assert patterns(out).tolist() == [words + 1005] * 2 + [words] * 2


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
    text = (
        PRODUCT.replace("FENCE", "")
        .replace("AGAIN", "")
        .replace("WAIT", "wgmma.wait_group.sync.aligned 0;")
        .replace("LAST", "")
    )
    copy = "cp.async.cg.shared.global [ %r3 + 0 ], [ %rd3 + 0 ], 0x10, 0x10;"
    stores = text[text.index("st.shared") : text.index("bar.sync")]
    text = text.replace(stores, f"{copy}\ncp.async.commit_group;\ncp.async.wait_group 0;\n{fence}\n")
    found, report = lane_values(text, [tensor([0x3F803F80] * 512, 32)])
    assert (found, report.races) == ([SIXTEEN] * 128, [])
    assert bool(report.unfenced) is not bool(fence)
