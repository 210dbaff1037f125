"""The plan of the stem's two convolutions: binaries, tiles, partial sums, counts and the predicted time."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from checks.launches import googlenet_launches
from count_fakes import NOTHING
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, GOOGLENET_STEM, block_shape, spatial_size
from inception_fused.op import reasons
from inception_fused.plan import choice, counts
from inception_fused.plan.cards import CARDS, H200
from inception_fused.plan.forecast import LAUNCH, forecast
from inception_fused.plan.launches import WGRAD, table_of
from inception_fused.plan.problems import launch_of, launches_of
from inception_fused.runtime.launch import binary_key

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
SIDES = (spatial_size("stem"), spatial_size("stem", 96))
BATCHES = (1, 32, 128)
CAPABILITIES = ((8, 0), (8, 9), (9, 0), (10, 0), (12, 0))
US = 1e-6
ROWS = table_of(range(2)).rows


def stem(batch, precision, side=SIDES[0]):
    return block_shape(GOOGLENET_STEM, batch, side, PRECISIONS[precision])


def predicted(batch, precision, side=SIDES[0], card=H200, **options):
    found = forecast(stem(batch, precision, side), PRECISIONS[precision], card, precision=precision, **options)
    return {launch.name: launch for launch in found}


def test_no_launch_is_a_compiled_kernels():
    """The extension has K1 and B3, of which a stem has none."""
    names = {row.kernel.name for rows in ROWS.values() for row in rows}
    assert names.isdisjoint(choice.COMPILED)


def test_the_sizes_are_those_of_the_network():
    assert SIDES == (56, 24)
    shape = stem(128, "bf16")
    assert (shape.c, shape.k, shape.gemm_m, shape.r_width) == (64, 192, 401408, 64)


@pytest.mark.parametrize("row", [row for row in ROWS["forward"] if row.rules], ids=lambda row: row.name)
def test_order_of_a_reduction_does_not_depend_on_the_batch(row):
    for precision, dtype in PRECISIONS.items():
        block_k = {
            choice.tile_of(launch_of(row, stem(batch, precision, side), dtype, capability=capability)).BLOCK_K
            for batch, side, capability in itertools.product((1, 2, 32, 128, 4096), SIDES, CAPABILITIES)
        }
        assert len(block_k) == 1


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("capability", CAPABILITIES, ids=str)
def test_what_the_stem_adds_to_the_binaries_of_the_blocks(capability, precision, monkeypatch):
    """What packs parameters and adds up, of two convolutions, and in fp32 K3's small tile, which blocks have in pairs
    alone. The 1x1 of a training step writes no bits, as that of an inference."""
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    found = list(googlenet_launches(PRECISIONS[precision], capability=capability))
    of_blocks = {binary_key(launch) for name, launch in found if name != "stem"}
    added = {binary_key(launch): launch for name, launch in found if name == "stem"}
    names = sorted(launch.kernel.fn.__name__ for key, launch in added.items() if key not in of_blocks)
    small = ["conv_fprop_kernel"] * (2 if precision == "tf32" else 0)
    assert names == [*small, "pack_dgrad_kernel", "pack_kernel", "reduce_kernel"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_launch_is_aligned_and_its_partial_sums_stay_small(precision):
    dtype = PRECISIONS[precision]
    for batch, side in itertools.product(BATCHES, SIDES):
        shape, total = stem(batch, precision, side), 0
        assert {launch.unit for launch in choice.tiled(shape, dtype)} == {16 // dtype.itemsize}
        for launch in launches_of(shape, dtype, "backward"):
            if launch.row.role == WGRAD:
                part = 4 * choice.ranges(launch, choice.tile_of(launch)) * launch.gemm.m * launch.gemm.n
                assert part <= choice.PARTIAL_BYTES
                total += part
        assert total <= 2 * choice.PARTIAL_BYTES


def test_a_3x3_at_batch_128_by_hand():
    """401408 rows and 192 columns are 1568 x 2 tiles of 256x128, which 132 multiprocessors compute in 24 waves; the 64
    channels of a tap are two steps of 32, of the 1x1 both of all."""
    found = predicted(128, "bf16", known=NOTHING, card=replace(H200, l2=1e15))
    assert list(found) == ["K4 1x1", "K3"]
    assert [(f.programs, f.steps) for f in found.values()] == [(1568, 2), (3136, 18)]
    compute = 24 * 132 * 2 * 128 * 256 * 32 * 18 / 790e12
    assert found["K3"].predicted == pytest.approx(compute + 1.3 * US)
    moved = 2 * (401408 * (64 + 64) + 64 * 64) / 4.3e12
    assert found["K4 1x1"].units["DRAM"] == pytest.approx(moved)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_no_launch_is_faster_than_its_floor(card, precision):
    for batch, side in itertools.product(BATCHES, SIDES):
        both = predicted(batch, precision, side, card, training=True, packs=True)
        assert tuple(dict.fromkeys(both)) == tuple(dict.fromkeys(row.name for some in ROWS.values() for row in some))
        for launch in both.values():
            assert launch.predicted >= launch.floor + 0.99 * card.launch
            assert launch.low <= launch.predicted <= launch.high
            assert launch.bound in (*launch.units, LAUNCH)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_no_backward_reads_costs_a_training_step_nothing(precision):
    """Of an output that another convolution reads no bits are saved, and the count is that of an inference."""
    inference, training = (predicted(32, precision, training=step) for step in (False, True))
    assert training["K4 1x1"] == inference["K4 1x1"]
    assert training["K3"] != inference["K3"]
    assert {launch.stands_for for launch in training.values()} <= {"", "no product: bytes and programs"}
    windows = block_shape(GOOGLENET_BLOCKS["4e"], 32, 14, PRECISIONS[precision], branch3=(3, 3))
    for launch in launches_of(windows, PRECISIONS[precision], "forward")[1:]:
        saves = counts.key_of(launch, choice.tile_of(launch), True).saves
        assert saves == (launch.name != "K4 first")
