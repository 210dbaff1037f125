"""The launches of a max-pool of stride 2: bytes by hand, grids as they are launched, counts, and what bounds them."""

from __future__ import annotations

import math

import pytest
import torch

from checks.pool_launches import pool_cases
from count_fakes import NOTHING
from counter.counting import CAPABILITIES, named_pools
from inception_fused.block.pools import PoolShape
from inception_fused.plan import counts
from inception_fused.plan.cards import CARDS, H200
from inception_fused.plan.forecast import LAUNCH, NO_PRODUCT, UNCOUNTED
from inception_fused.plan.pool_forecast import Pool, pool_forecast, pool_launches
from inception_fused.plan.rules import MAX_POOL_BINARIES
from inception_fused.runtime.launch import binary_key

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
FIRST = PoolShape(128, 112, 112, 1)
"""Of GoogLeNet at 224x224, 64 channels, behind a bias and ReLU."""


def first(precision="bf16", **changed):
    return Pool(FIRST, 64, PRECISIONS[precision], epilogue=True)._replace(**changed)


def test_bytes_of_the_first_pool_by_hand():
    """128 images of 112x112 to 56x56; taps of half a byte; a sum of four bytes for each 32 of 57x57 cells."""
    x, y, taps = 2 * 64 * 128 * 112**2, 2 * 64 * 128 * 56**2, 32 * 128 * 56**2
    sums = 4 * 64 * math.ceil(128 * 57**2 / 32)
    moved = [(item.name, item.reads, item.writes) for item in pool_launches(first(), training=True)]
    assert moved == [
        ("P1", {"x": x}, {"y": y, "taps": taps}),
        ("P2", {"dy": y, "taps": taps}, {"dx": x, "sums": sums}),
        ("P2's sums", {"sums": sums}, {"db": 2 * 64}),
    ]
    (alone,) = pool_launches(first())
    assert (alone.reads, alone.writes) == ({"x": x}, {"y": y})
    plain = [item.name for item in pool_launches(first(epilogue=False), training=True)]
    assert plain == ["P1", "P2"]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_no_unit_takes_longer_than_dram(card, precision):
    """On every card, but that P2 with sums in 16-bit types is 1% longer busy with integers on an H200."""
    for item in pool_forecast(first(precision), card, precision=precision, training=True):
        assert item.stands_for in ("", NO_PRODUCT)
        assert item.predicted < 1.02 * item.floor + card.launch, (item.name, item.units)
        if (card, item.name) != (H200, "P2") or precision == "tf32":
            assert max(item.units, key=item.units.get) == "DRAM", item.units


def test_a_small_pool_costs_its_launch():
    (item,) = pool_forecast(Pool(PoolShape(1, 14, 14, 1), 832, torch.bfloat16), H200, precision="bf16")
    assert item.bound == LAUNCH
    assert item.units["DRAM"] < item.units["latency"] < item.predicted


def test_what_nobody_counted_goes_by_bytes_and_says_so():
    found = pool_forecast(first(), H200, precision="bf16", training=True, known=NOTHING)
    assert [item.stands_for for item in found] == [UNCOUNTED, UNCOUNTED, NO_PRODUCT]
    assert all(item.predicted >= item.floor for item in found)
    assert "instructions" not in found[0].units


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_the_plan_knows_grid_and_count_of_every_launch(dtype):
    """As they are launched, aligned and odd; fp16 by bf16's count."""
    known = counts.shipped()
    for name, case in pool_cases():
        for item in named_pools(case, dtype):
            assert item.problem.programs == math.prod(item.launch.grid), name
            assert item.problem.tile == item.launch.tile, name
            assert item.problem.kernel.function == item.launch.kernel.fn.__name__, name
            assert (item.launch.args[3] is not None) == item.problem.pool.epilogue, name
            if case["channels"] == 64:
                missing = [chip for chip in CAPABILITIES if (item.key, chip) not in known.binaries]
                assert not missing, f"{item.key}: run python python/count.py"


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_few_binaries(dtype, capability):
    """Of inference and training, with bias and ReLU and without, in units of 16 bytes."""
    launches = [item.launch for _, case in pool_cases(odd=False) for item in named_pools(case, dtype, capability)]
    assert len(set(map(binary_key, launches))) == MAX_POOL_BINARIES


def test_the_loop_for_nan_is_not_charged():
    """P1 with taps scans again only where NaN is left."""
    known = counts.shipped()
    (item, *_) = pool_launches(first(), training=True)
    found = known.find(item.key, 90).binary
    loops = [part for part in found.parts if part.kind == counts.OTHER]
    assert loops
    without = found._replace(parts=tuple(part for part in found.parts if part not in loops))
    edited = known._replace(binaries={**known.binaries, (item.key, 90): without})
    both = [pool_forecast(first(), H200, precision="bf16", training=True, known=some)[0] for some in (known, edited)]
    assert both[0] == both[1]
