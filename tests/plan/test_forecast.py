"""The predicted time of a block's launches, against hand arithmetic and against the floors that it cannot beat.

By hand it is done with counts made for the test (count_fakes.py), which no change of a kernel moves.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from count_fakes import NOTHING, binary, counts_of
from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.googlenet_blocks import block_shape, spatial_size
from inception_fused.plan import choice
from inception_fused.plan.cards import A100, CARDS, H200, MULTIPROCESSORS, RTX_4090
from inception_fused.plan.choice import tiled
from inception_fused.plan.forecast import LAUNCH, UNCOUNTED, forecast
from inception_fused.plan.launches import NAMES, TABLES
from tune_fakes import GPU, entry, put

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
US = 1e-6
DOUBLE = TABLES[7]


def launches(block="4d", batch=128, precision="bf16", card=H200, **options):
    dtype = PRECISIONS[precision]
    windows = options.pop("branch3", (5,))
    shape = block_shape(GOOGLENET_BLOCKS[block], batch, spatial_size(block), dtype, branch3=windows)
    found = forecast(shape, dtype, card, precision=precision, **options)
    return {launch.name: launch for launch in found}


def test_3x3_of_4d_at_batch_128_by_hand():
    """25088 rows and 288 columns are 98 x 3 tiles of 256x128, which 132 multiprocessors compute in three waves; the 144
    channels of a tap are five steps of 32."""
    tile = choice.RULES["K3"].rules[0].tile(torch.bfloat16)
    assert tile[:3] == (256, 128, 32)
    waves, steps = 3, 9 * 5
    known = counts_of("conv_fprop_kernel", tile, 3, binary(tile, step=150, alu=100, straight=1000))
    found = launches(known=known)["K3"]
    assert found.units["tensor cores"] == pytest.approx(waves * 132 * 2 * 128 * 256 * 32 * steps / 790e12)
    # Eight warps of a program on four schedulers, and integer instructions at half of their rate.
    assert found.units["instructions"] == pytest.approx(waves * 2 * (steps * 150 + 1000) / 1.7e9)
    assert found.units["integer instructions"] == pytest.approx(waves * 4 * (steps * 100 + 1000) / 1.7e9)
    # A tile of rows is read by three tiles of columns, a tile of columns by 98 of rows, at each of nine taps.
    assert found.units["L2"] == pytest.approx(2 * 9 * 144 * (3 * 25088 + 98 * 288) / 7e12)
    assert found.units["DRAM"] == pytest.approx(2 * (25088 * (144 + 288) + 9 * 144 * 288) / 4.3e12)
    assert (found.programs, found.steps) == (294, 45)
    assert found.bound == "tensor cores"
    assert found.predicted == pytest.approx(found.units["tensor cores"] + 1.3 * US)
    assert found.floor == pytest.approx(23.7 * US, rel=0.01)
    assert found.stands_for == ""


@pytest.mark.parametrize(
    ("options", "bound"),
    [
        (dict(step=3000, alu=10), "instructions"),
        (dict(step=2000, alu=2000), "integer instructions"),
        (dict(step=2000, imad=1990), "multiply-adds"),
        (dict(step=300, data=2000), "shared memory"),
        (dict(step=300, cycles=100000), "latency"),
        (dict(step=150), "tensor cores"),
    ],
)
def test_the_busiest_unit_is_the_bound(options, bound):
    tile = choice.RULES["K3"].rules[0].tile(torch.bfloat16)
    found = launches(known=counts_of("conv_fprop_kernel", tile, 3, binary(tile, **options)))["K3"]
    assert found.bound == bound
    assert found.predicted == pytest.approx(max(found.units.values()) + 1.3 * US)


def test_latency_is_that_of_the_rounds_in_which_programs_fit():
    """294 programs are at most three on a multiprocessor; of 200 registers and eight warps one fits at once, so three
    rounds; of 96 registers two; of 40 three, unless shared memory holds one."""
    tile = choice.RULES["K3"].rules[0].tile(torch.bfloat16)

    def latency(registers, shared):
        made = binary(tile, step=10, cycles=2000, straight=500, registers=registers, shared=shared)
        return launches(known=counts_of("conv_fprop_kernel", tile, 3, made))["K3"]

    one = (45 * 2000 + 500) / 1.7e9
    assert latency(200, 16384).units["latency"] == pytest.approx(3 * one)
    assert latency(96, 16384).units["latency"] == pytest.approx(2 * one)
    assert latency(40, 16384).units["latency"] == pytest.approx(one)
    found = latency(40, 200 << 10)
    assert found.units["latency"] == pytest.approx(3 * one)
    assert (found.low - 1.3 * US, found.high - 1.3 * US) == pytest.approx((0.7 * 3 * one, 1.3 * 3 * one))


def test_a_program_alone_is_slow():
    """At batch 1 the 13 tiles of 16 rows of 4d's K2 have a multiprocessor each: what the card has besides does not
    help, and a range says how well the latency is known."""
    tile = choice.RULES["K2"].rules[-1].tile(torch.bfloat16)
    known = counts_of("pool_proj_kernel", tile, 1, binary(tile, step=400, cycles=1500, straight=500))
    found = launches(batch=1, known=known, chosen={"K1": "native"})["K2"]
    assert (found.bound, found.programs, found.steps) == ("latency", 13, 16)
    assert found.low < found.predicted < found.high
    assert found.predicted == pytest.approx((16 * 1500 + 500) / 1.7e9 + 1.3 * US)


def test_few_programs_read_no_faster_than_their_ports():
    """13 programs of K2, whatever the other 119 multiprocessors could read."""
    found = launches(batch=1, known=NOTHING, chosen={"K1": "native"})["K2"]
    moved = 2 * 512 * (9 * 196 + 13 * 64)
    assert found.units["L2"] == pytest.approx(moved / 13 / (64 * 1.7e9))
    assert found.units["L2"] > moved / 7e12


def test_a_pool_reads_its_window_nine_times_past_l1_and_once_through_it():
    tile = choice.RULES["K2"].rules[0].tile(torch.bfloat16)
    for through_l1, times in ((False, 9), (True, (64 + 2 * 15) / 64)):
        made = binary(tile, step=1, through_l1=through_l1)
        found = launches(known=counts_of("pool_proj_kernel", tile, 1, made))["K2"]
        assert found.units["L2"] == pytest.approx(2 * 512 * (times * 25088 + 392 * 64) / 7e12)


def test_the_gather_of_b3_has_nine_trips():
    tile = choice.RULES["B3"].rules[0].tile(torch.bfloat16)
    known = counts_of("grouped_dgrad_kernel", tile, 1, binary(tile, step=100, other=700, straight=0))
    found = launches(training=True, known=known)["B3"]
    steps, waves = -(-288 // 64), -(-196 * 8 // 132)
    assert found.steps == steps
    assert found.units["instructions"] == pytest.approx(waves * (steps * 100 + 9 * 700) / 1.7e9)
    assert found.units["L2"] == pytest.approx(
        (2 * 288 * (8 * 25088 + 196 * 512) + 4 * 25088 * 512 * (2 + 0.5)) / 7e12
    )  # fmt: skip


def test_an_unrolled_loop_has_fewer_trips():
    tile = choice.RULES["K3"].rules[0].tile(torch.bfloat16)
    once, twice = (
        launches(known=counts_of("conv_fprop_kernel", tile, 3, binary(tile, step=300 * n, unrolled=n)))["K3"]
        for n in (1, 2)
    )
    # 45 steps are 23 trips of two.
    assert twice.units["instructions"] == pytest.approx(once.units["instructions"] * 46 / 45)


def test_wgrad_of_4d_by_hand():
    """288 filters and 9*144 columns are 3 x 6 tiles of 128x256; 25088 pixels are 784 steps, cut into ranges."""
    tile = choice.RULES["B4"].rules[1].tile(torch.bfloat16)
    assert tile[:3] == (128, 256, 32)
    found = launches(training=True, known=NOTHING)["B4 3x3"]
    shape = block_shape(GOOGLENET_BLOCKS["4d"], 128, 14, torch.bfloat16)
    problem = next(p for p in tiled(shape, torch.bfloat16) if p.name == "B4 3x3")
    ranges = choice.ranges(problem, tile)
    assert ranges > 1
    waves, steps = -(-18 * ranges // 132), -(-784 // ranges)
    assert (found.programs, found.steps) == (18 * ranges, steps)
    compute = waves * 132 * 2 * 128 * 256 * 32 * steps / 790e12
    moved = 2 * 25088 * (6 * 288 + 3 * 1296) + 4 * ranges * 288 * 1296
    # Nobody counted it: matrix units and bytes alone.
    assert found.units == pytest.approx(
        {"DRAM": found.units["DRAM"], "tensor cores": compute, "L2": moved / 7e12, "programs": 18 * ranges * 1e-9}
    )
    assert found.stands_for == UNCOUNTED


def test_of_another_tile_the_nearest_count_stands_in_and_is_named():
    tile = choice.RULES["K3"].rules[0].tile(torch.bfloat16)
    other = tile._replace(BLOCK_N=64)
    made = binary(other, step=300, straight=1000)
    found = launches(known=counts_of("conv_fprop_kernel", other, 3, made))["K3"]
    assert "256x64x32" in found.stands_for
    # Per warp a fifth more operands, and twice the result.
    assert found.units["instructions"] == pytest.approx(3 * 2 * (45 * 300 * 1.2 + 2 * 1000) / 1.7e9)
    assert found.units["tensor cores"] == pytest.approx(3 * 132 * 2 * 128 * 256 * 32 * 45 / 790e12)
    # Another kernel's does not.
    assert launches(known=counts_of("pool_proj_kernel", tile, 3, made))["K3"].stands_for == UNCOUNTED


def test_an_architecture_without_counts_takes_another_ones():
    tile = choice.RULES["K3"].rules[0].tile(torch.bfloat16)
    known = counts_of("conv_fprop_kernel", tile, 3, binary(tile, step=300))
    for capability, said in ((90, ""), (100, "sm_90's")):
        card = replace(H200, capability=capability)
        assert launches(known=known, card=card)["K3"].stands_for == said


def test_a_launch_that_only_moves_takes_its_bytes():
    found = launches(training=True, packs=True, known=NOTHING)
    for name in ("pack", "B1"):
        assert found[name].predicted == pytest.approx(found[name].floor + 1.3 * US)
    assert found["B1"].bound == "DRAM"
    assert found["pack"].bound == LAUNCH
    # All ranges of partial sums, through L2, where the floor has one of them.
    assert found["B5"].bound == "L2"
    assert found["B5"].units["L2"] > found["B5"].units["DRAM"]


def test_idle_programs_cost_something():
    """Of a grid that is made of weights: as many as the nearest block has, in proportion."""
    weights = sum(block_shape(GOOGLENET_BLOCKS["4d"], 1, 14, torch.bfloat16).weight_sizes)
    known = NOTHING._replace(grids={"reduce_kernel": [(weights // 2, 6000), (weights * 9, 1)]})
    found = launches(training=True, known=known)["B5"]
    assert found.programs == pytest.approx(12000, abs=1)
    assert (found.bound, found.units["programs"]) == ("programs", pytest.approx(12 * US))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("block", GOOGLENET_BLOCKS)
def test_no_launch_is_faster_than_its_floor(block, batch, precision):
    for options in ({}, {"chosen": {"K1": "native", "B3": "native"}}, {"branch3": (3,)}, {"branch3": (3, 3)}):
        for launch in launches(block, batch, precision, training=True, **options).values():
            assert launch.predicted >= launch.floor + 1.29 * US
            assert launch.low <= launch.predicted <= launch.high
            assert launch.bound in (*launch.units, LAUNCH)


def test_every_launch_is_there_in_order():
    assert list(launches()) == list(NAMES["forward"][1:])
    for windows, forward, backward in (
        ((5,), ("K1+K2", "K3+K4"), NAMES["backward"]),
        ((3, 3), ("K1+K2", "K3+K4 first", "K4 second"), DOUBLE.names["backward"]),
    ):
        both = forecast(
            block_shape(GOOGLENET_BLOCKS["3a"], 2, 28, torch.float32, branch3=windows),
            torch.float32, H200, precision="tf32", training=True, packs=True,
        )  # fmt: skip
        assert [launch.name for launch in both] == ["pack", *forward, *backward]
    assert len(DOUBLE.names["backward"]) == len(NAMES["backward"]) + 2


def test_the_card_counts():
    slow = replace(
        H200, bandwidth=H200.bandwidth / 2, flops={"bf16": 395e12}, multiprocessors=66, launch=3e-6, l2=70e12
    )
    by_name = launches(card=slow, known=NOTHING)
    # Five waves on half of the multiprocessors, each as fast as before.
    compute = 5 * 66 * 2 * 128 * 256 * 32 * 45 / 395e12
    assert by_name["K3"].predicted == pytest.approx(compute + 3 * US)
    assert by_name["K2"].units["DRAM"] == pytest.approx(2 * launches()["K2"].units["DRAM"])


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_every_card_has_a_multiprocessor(card):
    assert card.capability in MULTIPROCESSORS
    assert all(launch.predicted > launch.floor for launch in launches(card=card, training=True).values())
    assert card.multiprocessor.alu < 128 <= 32 * 4


def test_cards_differ_in_floats():
    assert (A100.multiprocessor.fma, RTX_4090.multiprocessor.fma) == (64, 128)


def test_the_third_branchs_window_counts():
    five, three = launches("4e", training=True), launches("4e", training=True, branch3=(3,))
    for name, ratio in (("K4", 0.6), ("B2 5x5", 0.6), ("B4 5x5", 1.0)):
        assert three[name].predicted < ratio * five[name].predicted
    assert {n for n in five if five[n] != three[n]} <= {"K4", "B2 5x5", "B4 3x3", "B4 5x5", "B4 1x1", "B4 pool"} | {
        "pack", "B5",
    }  # fmt: skip


def test_both_windows_of_4e_by_hand():
    """25088 rows and 128 columns are 98 tiles of 256x128, one wave; a tap's channels, 32 and 128, are one step of 32
    and four."""
    assert choice.RULES["K4"].rules[2].tile(torch.bfloat16)[:3] == (256, 128, 32)
    found = launches("4e", branch3=(3, 3), known=NOTHING, card=replace(H200, l2=1e15))
    for name, channels, steps in (("K4 first", 32, 9), ("K4 second", 128, 36)):
        compute = 132 * 2 * 256 * 128 * 32 * steps / 790e12
        moved = 2 * (25088 * (channels + 128) + 9 * channels * 128) / 4.3e12
        assert found[name].predicted == pytest.approx(max(compute, moved) + 1.3 * US)
        assert found[name].floor == pytest.approx(max(moved, 2 * 25088 * 128 * 9 * channels / 790e12))
    assert launches("4e", branch3=(3, 3))["K3"] == launches("4e")["K3"]


def test_a_compiled_kernel_has_its_own_tile():
    """288 columns of K1 in 4d are three of 96, of 128 rows: 588 tiles, five waves. Of 256x128 they are 294, three."""
    native, triton = launches(chosen={"K1": "native", "K3": "triton"}), launches(known=NOTHING)
    ratio = native["K1"].units["tensor cores"] / triton["K1"].units["tensor cores"]
    assert ratio == pytest.approx(5 * 96 / (3 * 256))
    assert native["K1"].stands_for == UNCOUNTED
    assert native["K3"] == launches()["K3"]


def test_what_was_timed_takes_what_it_took(tiles_folder):
    shape = block_shape(GOOGLENET_BLOCKS["4d"], 128, 14, torch.bfloat16)
    problems = {p.name: p for p in tiled(shape, torch.bfloat16)}
    k3, wgrad = problems["K3"], problems["B4 3x3"]
    put(
        entry("K3", "bf16", k3.gemm.m, k3.gemm.n, k3.gemm.k, choice.tile_of(k3), us=31.0, taps=9),
        entry("B4", "bf16", wgrad.gemm.m, wgrad.gemm.n, wgrad.gemm.k // 2, choice.tile_of(wgrad), us=20.0),
    )
    found = launches(training=True, gpu=GPU)
    assert (found["K3"].predicted, found["K3"].timed) == (pytest.approx(31 * US), True)
    # Of twice the pixels.
    assert (found["B4 3x3"].predicted, found["B4 3x3"].timed) == (pytest.approx(40 * US), True)
    assert found["K4"] == launches(training=True)["K4"]
    assert not found["K4"].timed


def test_what_was_timed_of_another_window_says_nothing(tiles_folder):
    """The first of two 3x3 has the channels of a 5x5, and less than half of its work."""
    first = next(
        p
        for p in tiled(block_shape(GOOGLENET_BLOCKS["4d"], 128, 14, torch.bfloat16, branch3=(3, 3)), torch.bfloat16)
        if p.name == "K4 first"
    )
    put(entry("K4", "bf16", *first.gemm[:3], choice.tile_of(first), us=31.0, taps=9))
    assert not launches(gpu=GPU)["K4"].timed
    found = launches(gpu=GPU, branch3=(3, 3))
    assert (found["K4 first"].timed, found["K4 second"].timed) == (True, False)
    assert launches(gpu=GPU, branch3=(3,))["K4"].predicted == found["K4 first"].predicted == pytest.approx(31 * US)
