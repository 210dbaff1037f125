"""python/counter reads machine code: on a small text whose loops are counted by hand, and on one of nvdisasm's own."""

from __future__ import annotations

import math
from argparse import ArgumentTypeError

import pytest

from counter import counting, hazards, latency, pipes, printing, sass
from counter.compiling import DTYPES, some_of
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, block_shape, spatial_size
from inception_fused.op import reasons
from inception_fused.plan import counts
from inception_fused.plan.cards import H200
from inception_fused.plan.counts import COLUMNS, MAIN, OTHER, OUTER
from inception_fused.plan.forecast import forecast


def line(address, text, stall=1, writes=7, reads=7, waits=()):
    """An instruction as nvdisasm prints it, with a control word."""
    control = stall | writes << 5 | reads << 8 | sum(1 << (11 + barrier) for barrier in waits)
    return (
        f"        /*{address:04x}*/                   {text} ;       /* 0x000000ff00057b82 */\n"
        f"                                                           /* 0x{control << 41:016x} */\n"
    )


def program(*parts):
    """Labels as they are, instructions sixteen bytes apart."""
    text, address = ".text.some_kernel:\n", 0
    for part in parts:
        if isinstance(part, str) and part.startswith("."):
            text += f"{part}:\n"
        else:
            text += line(address, *part) if isinstance(part, tuple) else line(address, part)
            address += 16
    return text


SMALL = program(
    "MOV R1, c[0x0][0x28]",
    ("LDG.E.128 R4, desc[UR4][R2.64]", 1, 0),
    ".L_x_1",
    ("IADD3 R8, R8, 0x1, RZ", 4),
    "@P0 IMAD.WIDE R10, R8, 0x2, R2",
    ("HMMA.16816.F32.BF16 R12, R4, R10, R12", 2, 7, 7, (0,)),
    "LDGSTS.E.BYPASS.128 [R22+0x1000], desc[UR10][R2.64], P0",
    "@P1 BRA `(.L_x_1)",
    "FADD R12, R12, R13",
    ".L_x_2",
    "FMUL R12, R12, R13",
    "MUFU.RCP R12, R13",
    "@!P1 BRA `(.L_x_2)",
    "STG.E.64 desc[UR4][R2.64], R12",
    "EXIT",
    ".L_x_3",
    "BRA `(.L_x_3)",
    "NOP",
    "NOP",
)


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
@pytest.mark.parametrize(("block", "batch"), [("3a", 128), ("5b", 1)])
def test_the_forecast_knows_the_grids_of_batch_norm(block, batch, dtype, monkeypatch):
    """As many programs as are launched, with the tile that is counted; of them B2 by a key of its own."""
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    config, side = GOOGLENET_BLOCKS[block], spatial_size(block)
    case = dict(config=config, batch=batch, image=(side, side), save=True, normed=True)
    found = [item for item in counting.named(case, dtype) if item.of_batch_norm]
    assert {item.problem.name for item in found} >= {"N1 r", "N2 r", "N3 y", "N4 y", "N5 y", "N6 r", "B2 3x3"}
    shape = block_shape(config, batch, side, DTYPES[dtype])
    options = dict(precision={"fp32": "tf32"}.get(dtype, dtype), training=True, normed=True, known=counts.shipped())
    forecasts = {item.name: item for item in forecast(shape, DTYPES[dtype], H200, **options)}
    for item in found:
        said = forecasts[item.problem.name]
        assert said.programs == math.prod(item.launch.grid), item.problem.name
        assert (said.stands_for, item.key.saves) == ("", False), item.problem.name
        assert item.key.kernel.endswith(" centred") == item.problem.row.centred


def test_instructions_loops_and_padding():
    code = sass.parse(SMALL)
    assert [instruction.name for instruction in code.instructions][-2:] == ["STG", "EXIT"]
    assert len(code.instructions) == 13
    assert [(loop.first, loop.last) for loop in code.loops] == [(2, 7), (8, 11)]
    guarded = code.instructions[3]
    assert (guarded.predicate, guarded.opcode, guarded.name, guarded.address) == ("@P0", "IMAD.WIDE", "IMAD", 48)


def test_control_words():
    load, add, mma = (sass.parse(SMALL).instructions[i].control for i in (1, 2, 4))
    assert load == (1, 0, None, ())
    assert add == (4, None, None, ())
    assert mma == (2, None, None, (0,))
    # As ptxas wrote one: a load of a constant that sets barrier 0 and lets the next instruction follow at once.
    assert sass.Control.of(0x000E220000002500) == (1, 0, None, ())
    assert sass.Control.of(0x000FE20000000000) == (1, None, None, ())
    assert sass.Control.of(0x004FCA0000000000) == (5, None, None, (2,))


def test_counts_by_hand():
    before, between, after, main, other = counting.parts_of(sass.parse(SMALL))
    assert [part.kind for part in (before, between, after, main, other)] == [
        "before", "between", "after", MAIN, OTHER,
    ]  # fmt: skip

    def figures(part):
        return {name: part.of(name) for name in COLUMNS if part.of(name)}

    assert figures(main) == {
        "issue": 5, "alu": 1, "imad": 1, "tensor": 1, "lsu": 1, "control": 1, "data": 4, "macs": 2,
    }  # fmt: skip
    assert figures(other) == {"issue": 3, "fma": 1, "xu": 1, "control": 1}
    assert figures(before) == {"issue": 2, "alu": 1, "lsu": 1, "data": 4}
    assert figures(between) == {"issue": 1, "fma": 1}
    assert figures(after) == {"issue": 2, "lsu": 1, "control": 1, "data": 2}


def test_a_loop_around_another_has_what_is_its_own():
    text = program(
        "MOV R1, R2",
        ".L_x_1", "IADD3 R8, R8, 0x1, RZ",
        ".L_x_2", "HMMA.1688.F32.TF32 R12, R4, R10, R12", "@P0 BRA `(.L_x_2)",
        "IADD3 R9, R9, 0x1, RZ", "@P1 BRA `(.L_x_1)",
        "EXIT",
    )  # fmt: skip
    parts = counting.parts_of(sass.parse(text))
    assert [(part.kind, part.of("issue")) for part in parts] == [
        ("before", 1), ("after", 1), (OUTER, 3), (MAIN, 2),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "pipe", "data", "macs"),
    [
        ("LDSM.16.MT88.4 R4, [R2]", "lsu", 4, 0),
        ("LDSM.16.M88 R4, [R2]", "lsu", 1, 0),
        ("LDG.E R4, desc[UR4][R2.64]", "lsu", 1, 0),
        ("STS.128 [R4], R8", "lsu", 4, 0),
        ("ULDC.64 UR4, c[0x0][0x208]", "uniform", 0, 0),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "control", 0, 0),
        ("HSETP2.BF16_V2.GT.AND P0, PT, R4, R5, PT", "alu", 0, 0),
        ("HFMA2.MMA R4, -RZ, RZ, 0, 0", "fma", 0, 0),
        ("HMMA.16816.F32 R4, R8, R12, R4", "tensor", 0, 2048),
        # 64 rows, of which four warps issue a quarter each; both operands from shared memory, of 32 bytes a row.
        ("HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], R24", "tensor", (64 + 128) * 32 / 128 / 4, 64 * 128 * 16 // 4),
        ("HGMMA.64x64x8.F32.TF32 R24, R56, gdesc[UR12], R24, gsb0", "tensor", 64 * 32 / 128 / 4, 64 * 64 * 8 // 4),
    ],
)
def test_what_an_instruction_takes(text, pipe, data, macs):
    (instruction,) = sass.parse(program(text)).instructions
    assert (pipes.pipe(instruction), pipes.data(instruction), pipes.macs(instruction)) == (pipe, data, macs)


def test_latency_of_a_warp_in_order():
    """A trip: 4 cycles behind the sum, 1 behind the product's operand, which is there after the first, 2, 1, 1."""
    straight, trips = latency.cycles(sass.parse(SMALL))
    loops = sass.parse(SMALL).loops
    assert [trips[loop] for loop in loops] == [9, 3]
    # MOV, LDG, FADD, STG and EXIT.
    assert straight == 5


def test_a_load_in_a_loop_is_waited_for():
    text = program(
        ".L_x_1", ("LDG.E R4, desc[UR4][R2.64]", 1, 3), ("IADD3 R5, R4, 0x1, RZ", 1, 7, 7, (3,)), "@P0 BRA `(.L_x_1)",
        "EXIT",
    )  # fmt: skip
    code = sass.parse(text)
    assert latency.cycles(code)[1][code.loops[0]] == latency.LATENCIES["LDG"] + 2


def test_copies_are_waited_for_by_groups():
    """Of two groups in flight the older one is waited for, which a trip behind has nearly arrived."""

    def trip(left):
        text = program(
            ".L_x_1", "LDGSTS.E.BYPASS.128 [R22], desc[UR10][R2.64]", "LDGDEPBAR", f"DEPBAR.LE SB0, 0x{left}",
            "@P0 BRA `(.L_x_1)", "EXIT",
        )  # fmt: skip
        code = sass.parse(text)
        return latency.cycles(code)[1][code.loops[0]]

    assert trip(0) == latency.COPY + 2
    assert trip(1) == pytest.approx(latency.COPY / 2, rel=0.02)


REGISTER = "HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR12], R24{}"
CLOSED = REGISTER.format(", gsb0")
YOUNGER = "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24, gsb0"
WAIT, LATER = "WARPGROUP.DEPBAR.LE gsb0, 0x0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"


@pytest.mark.parametrize(
    ("instructions", "written"),
    [
        ((CLOSED, WAIT, "MOV R57, R1"), ""),
        ((CLOSED, "MOV R57, R1", WAIT), "MOV R57, R1"),
        ((CLOSED, "MOV R60, R57", WAIT), ""),
        ((CLOSED, "LDS.128 R52, [R2]", WAIT), ""),
        ((CLOSED, "LDS.128 R56, [R2]", WAIT), "LDS.128 R56, [R2]"),
        ((CLOSED, "STS.128 [R56], R8", WAIT), ""),
        ((CLOSED, "ISETP.GE.AND P0, PT, R56, R57, PT", WAIT), ""),
        ((CLOSED, "SHFL.BFLY PT, R59, R24, 0x10, 0x1f", WAIT), "SHFL.BFLY PT, R59, R24, 0x10, 0x1f"),
        # One group may stay open: its own, unless a younger one is closed behind it.
        ((CLOSED, LATER, "MOV R57, R1"), "MOV R57, R1"),
        ((CLOSED, YOUNGER, LATER, "MOV R57, R1"), ""),
        # Its own group is closed by the next.
        ((REGISTER.format(""), YOUNGER, LATER, "MOV R57, R1"), "MOV R57, R1"),
        # Around a loop, and out of it.
        ((".L_x_1", "MOV R57, R1", CLOSED, "@P0 BRA `(.L_x_1)", WAIT), "MOV R57, R1"),
        ((".L_x_1", CLOSED, "@P0 BRA `(.L_x_1)", "MOV R57, R1", WAIT), "MOV R57, R1"),
        ((".L_x_1", "MOV R57, R1", CLOSED, WAIT, "@P0 BRA `(.L_x_1)", "MOV R58, R1"), ""),
    ],
)  # fmt: skip
def test_registers_that_a_wgmma_still_reads(instructions, written):
    (hazard,) = hazards.register_operands(sass.parse(program(*instructions, "EXIT")))
    assert hazard.written == written


def test_through_l1():
    past = sass.parse(SMALL)
    assert not counting.through_l1(past)
    assert counting.through_l1(sass.parse(SMALL.replace("LDGSTS.E.BYPASS.128", "LDGSTS.E.128")))


def test_a_listing_names_units_and_waits():
    code = sass.parse(SMALL)
    lines = printing.listing(code, code.loops[0].own())
    assert len(lines) == 5
    assert "tensor" in lines[2]
    assert "HMMA.16816" in lines[2]


def test_a_list_of_an_argument_says_what_it_wants():
    parse = some_of((80, 90))
    assert parse("90,80") == [90, 80]
    with pytest.raises(ArgumentTypeError, match="got 70, wants some of 80,90"):
        parse("80,70")
