"""How warps meet, part and disturb each other in the emulator: barriers, races, branches; programs, parameters."""

from __future__ import annotations

import pytest

from emulator import Schedule, execute
from tiny_ptx import ADDRESSES, SCHEDULES, WORDS, lane_values, line_of, module, patterns, tensor

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


def test_lanes_of_one_warp_may_not_write_different_values_in_one_place():
    """Which of them stays is not said."""
    for value, races in (("%r1", False), ("%r300", True)):
        text = f"setp.lt.s32 %p1, %r300, 32;\n@%p1 st.shared.b32 [%r1+64], {value};\nmov.b32 %r9, 0;"
        assert bool(lane_values(text, [tensor(WORDS, 32)])[1].races) == races


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
