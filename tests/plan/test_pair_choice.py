"""Which launches of a forward are made as one, and what that is predicted to cost."""

from __future__ import annotations

import itertools

import pytest
import torch

from count_fakes import binary, counts_of
from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.googlenet_blocks import block_shape, spatial_size
from inception_fused.plan import choice, counts, pairs
from inception_fused.plan.cards import A100, H200, RTX_4090
from inception_fused.plan.explain_plan import explain
from inception_fused.plan.forecast import Planned, forecast
from inception_fused.plan.launches import NAMES
from inception_fused.plan.pairs import PAIRS
from inception_fused.plan.problems import launches_of
from tune_fakes import GPU, entry, put

US = 1e-6
PLAIN = list(NAMES["forward"][1:])
PAIRED = ["pack", "K1+K2", "K3+K4"]


def shape_of(block, batch, dtype=torch.bfloat16, windows=(5,)):
    return block_shape(GOOGLENET_BLOCKS[block], batch, spatial_size(block), dtype, branch3=windows)


def names(block, batch, dtype=torch.bfloat16, capability=(9, 0), windows=(5,), gpu=None, chosen=None, **x):
    found = launches_of(shape_of(block, batch, dtype, windows), dtype, "forward", capability=capability, **x)
    return [step.name for step in pairs.steps(found, gpu, chosen)]


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_googlenet_is_paired_at_batch_1_and_apart_at_128(dtype, capability):
    for block in GOOGLENET_BLOCKS:
        assert names(block, 1, dtype, capability) == PAIRED
        assert names(block, 128, dtype, capability) == list(NAMES["forward"])


def test_5a_and_5b_are_paired_at_batch_32():
    assert {block for block in GOOGLENET_BLOCKS if names(block, 32) == PAIRED} == {"5a", "5b"}


def test_the_last_of_two_windows_stays_alone():
    assert names("4b", 1, windows=(3, 3)) == ["pack", "K1+K2", "K3+K4 first", "K4 second"]


def test_a_half_of_another_form_is_made_alone():
    assert names("4b", 1, chosen={"K1": "native", "K2": "triton", "K3": "triton", "K4": "eager"}) == list(
        NAMES["forward"]
    )


def test_what_is_not_in_units_of_16_bytes_is_made_alone():
    assert names("4b", 1, x_row_stride=513) == names("4b", 1, aligned=False) == ["pack", "K1", "K2", "K3+K4"]


def test_a_timed_tile_comes_before_a_pair(tiles_folder):
    (k3,) = (p for p in choice.tiled(shape_of("4b", 1), torch.bfloat16) if p.name == "K3")
    tile = choice.tile_of(k3)
    for other, found in ((tile._replace(num_warps=8), ["pack", "K1+K2", "K3", "K4"]), (tile, PAIRED)):
        put(entry("K3", "bf16", *k3.gemm[:3], other, taps=9))
        assert names("4b", 1, gpu=GPU) == found


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8, 12, 16, 24, 32, 48, 64, 96])
@pytest.mark.parametrize("card", [H200, A100, RTX_4090], ids=lambda card: card.name)
def test_a_pair_is_taken_where_it_is_counted_faster(card, batch):
    """Beside the same two tiles, each in a launch of its own."""
    for block, (precision, dtype), training in itertools.product(
        GOOGLENET_BLOCKS, (("bf16", torch.bfloat16), ("tf32", torch.float32)), (False, True)
    ):
        shape, options = shape_of(block, batch, dtype), dict(precision=precision, training=training)
        made = forecast(shape, dtype, card, **options)
        alone = {item.name: item for item in forecast(shape, dtype, card, **options, planned={})}
        for item in made:
            halves = item.name.split("+")
            if len(halves) > 1:
                assert item.predicted < sum(alone[half].predicted for half in halves)
                assert item.predicted >= max(alone[half].predicted for half in halves)


def counts_for(pair, cycles):
    """What is counted of both halves of K3 and K4, which are one binary."""
    (tile,) = {half.rule.tile(torch.bfloat16) for half in pair.halves}
    return counts_of("conv_fprop_kernel", tile, 1, binary(tile, step=10, cycles=cycles))


def test_4d_at_batch_1_by_hand():
    """20 tiles of K3 and 4 of K4 have a multiprocessor each: the pair ends with the one that ends last."""
    shape, known = shape_of("4d", 1), counts_for(PAIRS[1], 2000)
    (found,) = (
        item for item in forecast(shape, torch.bfloat16, H200, precision="bf16", known=known) if "K3" in item.name
    )
    assert (found.name, found.programs, found.steps, found.bound) == ("K3+K4", 24, 45, "latency")
    assert found.predicted == pytest.approx((45 * 2000) / 1.7e9 + 1.3 * US)
    k3, k4 = (9 * 144 * 288, 25 * 32 * 64)
    moved = 2 * (196 * (144 + 288 + 32 + 64) + k3 + k4)
    assert found.floor == pytest.approx(max(moved / 4.3e12, 2 * 196 * (k3 + k4) / 790e12))
    assert found.units["DRAM"] == pytest.approx(moved / 4.3e12)
    assert found.units["programs"] == pytest.approx(24e-9)
    # One program a multiprocessor, of either half: 45 steps of K3, 25 of K4, four warps on four schedulers.
    assert found.units["instructions"] == pytest.approx(45 * 10 / 1.7e9)


def test_a_multiprocessor_with_more_programs_has_some_of_both():
    shape, known = shape_of("5b", 32), counts_for(PAIRS[1], 2000)
    found = forecast(shape, torch.bfloat16, H200, precision="bf16", known=known)[-1]
    assert found.programs == 200
    assert found.units["instructions"] == pytest.approx((2 * 54 + 50) * 10 / 1.7e9)


def test_a_pair_that_does_not_fit_waits_twice():
    """5b at batch 32 has 150 programs of K3 and 50 of K4: two on a multiprocessor, which may hold but one."""
    shape, small = shape_of("5b", 32), counts_for(PAIRS[1], 2000)
    large = small._replace(binaries={key: found._replace(shared=120 << 10) for key, found in small.binaries.items()})
    for known, cycles in ((small, 54 * 2000), (large, (2 * 54 + 50) * 2000)):
        found = forecast(shape, torch.bfloat16, H200, precision="bf16", known=known)[-1]
        assert found.units["latency"] == pytest.approx(cycles / 1.7e9)


def test_planned_says_what_is_a_pair():
    shape, options = shape_of("4d", 1), dict(precision="bf16")
    made = forecast(shape, torch.bfloat16, H200, **options)
    again = forecast(shape, torch.bfloat16, H200, **options, planned={item.name: item.taken for item in made})
    assert again == made
    assert isinstance(made[0].taken, Planned)
    assert made[0].taken.second is not None
    apart = forecast(shape, torch.bfloat16, H200, **options, planned={})
    assert [item.name for item in apart] == PLAIN


def test_the_table_names_both():
    lines = explain(GOOGLENET_BLOCKS["4d"], 1, 14, torch.bfloat16, backward=False).splitlines()[1:]
    assert [line.split()[0] for line in lines] == PLAIN
    assert "with K1 " in lines[1]
    assert "with K3 " in lines[3]
    assert counts.shipped() is not None
