"""The predicted time of a block's launches, against hand arithmetic and against the floors that it cannot beat."""

from __future__ import annotations

import pytest
import torch

from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.googlenet_blocks import block_shape, spatial_size
from inception_fused.plan import choice
from inception_fused.plan.choice import tiled
from inception_fused.plan.floors import H200, Ceilings
from inception_fused.plan.forecast import forecast
from inception_fused.plan.launches import NAMES, TABLES
from tune_fakes import GPU, entry, put

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
US = 1e-6
DOUBLE = TABLES[7]


def launches(block="4d", batch=128, precision="bf16", **options):
    dtype = PRECISIONS[precision]
    windows = options.pop("branch3", (5,))
    shape = block_shape(GOOGLENET_BLOCKS[block], batch, spatial_size(block), dtype, branch3=windows)
    found = forecast(shape, dtype, H200, precision=precision, **options)
    return {launch.name: launch for launch in found}


def test_3x3_of_4d_at_batch_128_by_hand():
    """25088 rows and 288 columns are 196 x 3 tiles of 128x128, which 132 multiprocessors compute in five waves; the 144
    channels of a tap are three steps of 64."""
    assert choice.RULES["K3"].rules[0].tile(torch.bfloat16)[:3] == (128, 128, 64)
    waves, steps = 5, 9 * 3
    compute = waves * 132 * 2 * 128 * 128 * 64 * steps / 790e12
    assert launches()["K3"].predicted == pytest.approx(compute + 1.3 * US)
    assert launches()["K3"].floor == pytest.approx(23.7 * US, rel=0.01)


def test_wgrad_of_4d_by_hand():
    """288 filters and 9*144 columns are 5 x 11 tiles of 64x128; 25088 pixels are 392 steps, cut into ranges."""
    tile = choice.RULES["B4"].rules[0].tile(torch.bfloat16)
    assert tile[:3] == (64, 128, 64)
    weights = sum(a * b * t for a, b, t in ((512, 112 + 144 + 32 + 64, 1), (144, 288, 9), (32, 64, 25)))
    ranges = choice.split_k(55, 392, weights)
    assert ranges > 1
    waves, steps = -(-55 * ranges // 132), -(-392 // ranges)
    compute = waves * 132 * 2 * 64 * 128 * 64 * steps / 790e12
    assert launches(training=True)["B4 3x3"].predicted == pytest.approx(compute + 1.3 * US)


def test_a_launch_that_only_moves_takes_its_bytes():
    found = launches(training=True, packs=True)
    for name in ("pack", "B1", "B5"):
        assert found[name].predicted == pytest.approx(found[name].floor + 1.3 * US)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("block", GOOGLENET_BLOCKS)
def test_no_launch_is_faster_than_its_floor(block, batch, precision):
    for options in ({}, {"chosen": {"K1": "native", "B3": "native"}}, {"branch3": (3,)}, {"branch3": (3, 3)}):
        for launch in launches(block, batch, precision, training=True, **options).values():
            assert launch.predicted >= launch.floor + 1.29 * US


def test_every_launch_is_there_in_order():
    assert list(launches()) == list(choice.FORWARD)
    for windows, forward, backward in (
        ((5,), choice.FORWARD, NAMES["backward"]),
        ((3, 3), ("K1", "K2", "K3", "K4 first", "K4 second"), DOUBLE.names["backward"]),
    ):
        both = forecast(
            block_shape(GOOGLENET_BLOCKS["3a"], 2, 28, torch.float32, branch3=windows),
            torch.float32, H200, precision="tf32", training=True, packs=True,
        )  # fmt: skip
        assert [launch.name for launch in both] == ["pack", *forward, *backward]
    assert len(DOUBLE.names["backward"]) == len(NAMES["backward"]) + 2


def test_the_card_counts():
    slow = Ceilings("half", H200.bandwidth / 2, {"bf16": 395e12}, 66, 3e-6)
    shape = block_shape(GOOGLENET_BLOCKS["4d"], 128, 14, torch.bfloat16)
    by_name = {launch.name: launch for launch in forecast(shape, torch.bfloat16, slow, precision="bf16")}
    # Nine waves on half of the multiprocessors, each as fast as before.
    compute = 9 * 66 * 2 * 128 * 128 * 64 * 27 / 395e12
    assert by_name["K3"].predicted == pytest.approx(compute + 3 * US)
    # Memory-bound, and the launch is another.
    assert by_name["K2"].predicted == pytest.approx(2 * (launches()["K2"].predicted - 1.3 * US) + 3 * US)


def test_the_third_branchs_window_counts():
    five, three = launches("4e", training=True), launches("4e", training=True, branch3=(3,))
    for name, ratio in (("K4", 0.6), ("B2 5x5", 0.6), ("B4 5x5", 1.0)):
        assert three[name].predicted < ratio * five[name].predicted
    assert {n for n in five if five[n] != three[n]} <= {"K4", "B2 5x5", "B4 3x3", "B4 5x5", "B4 1x1", "B4 pool"} | {
        "pack", "B5",
    }  # fmt: skip


def test_both_windows_of_4e_by_hand():
    """25088 rows and 128 columns are 196 tiles of 128x128, two waves; a tap's channels, 32 and 128, are one step of 32
    and four."""
    assert choice.RULES["K4"].rules[1].tile(torch.bfloat16)[:3] == (128, 128, 32)
    found = launches("4e", branch3=(3, 3))
    for name, channels, steps in (("K4 first", 32, 9), ("K4 second", 128, 36)):
        compute = 2 * 132 * 2 * 128 * 128 * 32 * steps / 790e12
        moved = 2 * (25088 * (channels + 128) + 9 * channels * 128) / 4.3e12
        assert found[name].predicted == pytest.approx(max(compute, moved) + 1.3 * US)
        assert found[name].floor == pytest.approx(max(moved, 2 * 25088 * 128 * 9 * channels / 790e12))
    assert found["K3"] == launches("4e")["K3"]


def test_a_compiled_kernel_has_its_own_tile():
    """288 columns of K1 in 4d are three of 96 rather than three of 128."""
    native, triton = launches(chosen={"K1": "native", "K3": "triton"}), launches()
    ratio = (native["K1"].predicted - 1.3 * US) / (triton["K1"].predicted - 1.3 * US)
    assert ratio == pytest.approx(96 / 128)
    assert native["K3"] == triton["K3"]


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
    assert found["K4"] == launches()["K4"]
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
