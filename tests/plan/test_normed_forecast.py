"""The predicted launches of a block whose BatchNorm takes the statistics of the batch, against hand arithmetic."""

from __future__ import annotations

import itertools

import pytest
import torch

from count_fakes import NOTHING, binary, counts_of
from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.googlenet_blocks import block_shape, spatial_size
from inception_fused.plan import choice, counts, traffic
from inception_fused.plan.cards import CARDS, H200
from inception_fused.plan.counts import OTHER, Part
from inception_fused.plan.forecast import UNCOUNTED, forecast
from inception_fused.plan.launches import NORMED_TABLES, STATISTICS
from inception_fused.plan.problems import launches_of

US = 1e-6
M, Y, R = 25088, 528, 176
"""Of 4d at batch 128: pixels, channels of y, of [r3 | r5]."""


def shape_of(block="4d", batch=128, dtype=torch.bfloat16, windows=(5,)):
    return block_shape(GOOGLENET_BLOCKS[block], batch, spatial_size(block), dtype, branch3=windows)


def launches(known=NOTHING, card=H200, **options):
    found = forecast(shape_of(), torch.bfloat16, card, precision="bf16", normed=True, known=known, **options)
    return {launch.name: launch for launch in found}


def moving(tile, kernel, loops=1, *, straight=100, step=0, cycles=0):
    """Counts of a kernel without a product: code before its loops, and loops, of which the last has ``step``."""
    made = binary(tile, straight=straight)
    before = made.parts[0]._replace(cycles=2 * straight)
    figures = [step] + [0] * (len(counts.COLUMNS) - 1)
    empty = Part(OTHER, (0,) * len(counts.COLUMNS), 0)
    parts = (before, *[empty] * (loops - 1), Part(OTHER, tuple(figures), cycles))
    return counts_of(kernel, tile, 1, made._replace(parts=parts))


@pytest.mark.parametrize("windows", [(5,), (3, 3)], ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_every_launch_is_there_in_order(windows, training):
    names = NORMED_TABLES[6 + (len(windows) > 1)].names
    options = dict(precision="bf16", normed=True, packs=True, training=training, planned={})
    found = forecast(shape_of(windows=windows), torch.bfloat16, H200, **options)
    assert [launch.name for launch in found] == [*names["forward"], *(names["backward"] if training else ())]
    made = forecast(shape_of("5b", 1, windows=windows), torch.bfloat16, H200, **options | {"planned": None})
    paired = [launch.name for launch in made if "+" in launch.name]
    assert paired == ["K1+K2", "K3+K4" if windows == (5,) else "K3+K4 first"]


def test_bytes_of_4d_by_hand():
    """Every pass over y and r in bf16, two bytes a channel; two sums of fp32 beside."""
    shape = shape_of()
    sizes = {
        launch.name: (sum(launch.reads.values()), sum(launch.writes.values()))
        for direction in ("forward", "backward")
        for launch in launches_of(shape, torch.bfloat16, direction, normed=True)
    }
    y, r = 2 * M * Y, 2 * M * R
    assert sizes["N1 y"] == (y, 8 * Y)
    assert sizes["N1 r"] == (r, 8 * R)
    assert sizes["N3 y"] == (y, y)
    assert sizes["N3 r"] == (r, r)
    assert sizes["N4 y"] == (2 * y, 8 * Y)
    assert sizes["N6 y"] == (2 * y, y)
    assert sizes["N6 r"] == (2 * r, r)
    for name, channels in (("N2 y", Y), ("N2 r", R), ("N5 y", Y), ("N5 r", R)):
        assert sizes[name] == (8 * channels, 8 * channels)
    plain = {launch.name: launch.bytes for launch in launches_of(shape, torch.bfloat16, "backward")}
    # r's raw values for the second sum.
    assert sum(sizes["B2 3x3"]) - plain["B2 3x3"] == 2 * M * 144
    assert sum(sizes["B2 5x5"]) - plain["B2 5x5"] == 2 * M * 32
    for name in ("N1 y", "N3 y", "N4 y", "N6 y"):
        found = launches(training=True)[name]
        assert (found.bound, found.stands_for) == ("DRAM", UNCOUNTED)
        assert found.predicted == pytest.approx(sum(sizes[name]) / H200.bandwidth + 1.3 * US)


def test_statistics_of_4d_by_hand():
    """784 tiles of 32 rows, 14 a range, and nine of 64 columns: 504 programs, four on a multiprocessor."""
    tile = choice.RULES["N1"].rules[0].tile(torch.bfloat16)
    assert tile[:2] == (32, 64)
    found = launches(moving(tile, "norm_stats_kernel", step=300))["N1 y"]
    assert (found.programs, found.steps, found.stands_for) == (56 * 9, 14, "")
    assert found.units["instructions"] == pytest.approx(4 * (100 + 14 * 300) / 1.7e9)
    assert "tensor cores" not in found.units
    # 3136 tiles of 3a's rows, 20 a range, and four of columns.
    (three_a,) = (
        item for item in forecast(
            shape_of("3a"), torch.bfloat16, H200, precision="bf16", normed=True,
            known=moving(tile, "norm_stats_kernel", step=300),
        ) if item.name == "N1 y"
    )  # fmt: skip
    assert (three_a.programs, three_a.steps) == (157 * 4, 20)
    assert three_a.units["instructions"] == pytest.approx(5 * (100 + 20 * 300) / 1.7e9)


def test_the_loop_over_borders_runs_once():
    tile = choice.RULES["N4"].rules[0].tile(torch.bfloat16)
    known = moving(tile, "norm_grad_stats_kernel", loops=2, step=300)
    assert launches(known, training=True)["N4 y"].units["instructions"] == pytest.approx(4 * (100 + 14 * 300) / 1.7e9)


def test_gradients_of_y_are_written_branch_by_branch():
    """112, 288, 64 and 64 columns are 2 + 5 + 1 + 1 tiles of 64; 528 as one matrix are nine."""
    found = launches(training=True, known=moving(choice.RULES["N6"].rules[0].tile(torch.bfloat16), "x"))
    assert GOOGLENET_BLOCKS["4d"][1:] == (112, (144, 288), (32, 64), 64)
    assert found["N6 y"].programs == 392 * 9
    assert found["N6 r"].programs == found["N3 r"].programs == 392 * 3
    assert found["N3 y"].programs == 392 * 9


def test_what_combines_waits_for_its_loop():
    """The tile is the launcher's own, which the counts say; the sums of N1 are ranges, those of r's gradient one a tile
    of B2's rows."""
    tile = choice.Tile(512, 8, 1, GROUP_M=1, num_stages=1)
    for kernel, name, rows, widest, convs in (
        ("norm_combine_kernel", "N2 y", 56, 288, 4),
        ("norm_combine_kernel", "N2 r", 157, 144, 2),
        ("norm_grad_combine_kernel", "N5 y", 56, 288, 4),
        ("norm_grad_combine_kernel", "N5 r", 196, 144, 2),
    ):
        found = launches(moving(tile, kernel, cycles=900), training=True)[name]
        steps = -(-rows // 512)
        assert (found.programs, found.steps) == (-(-widest // 8) * convs, steps)
        assert found.units["latency"] == pytest.approx((200 + steps * 900) / 1.7e9)
        assert found.units["L2"] >= 8 * rows * sum(_filters(name)) / H200.l2
        assert launches(training=True)[name].bound == "launch"


def _filters(name):
    return (112, 288, 64, 64) if name.endswith("y") else (144, 32)


def test_sums_of_ranges_and_of_tiles():
    shape = shape_of("3a")
    rows = {item.name: item for item in launches_of(shape, torch.bfloat16, "backward", normed=True)}
    tile = choice.tile_of(rows["N4 y"])
    assert traffic.part_rows(rows["N4 y"], tile) == 157
    assert traffic.part_rows(rows["B2 3x3"], choice.tile_of(rows["B2 3x3"])) == 100352 // 128


def test_only_the_pool_saves_for_the_backward():
    """Four bits an element of x; what convolutions give is written anyway. So K1, K3 and K4 are counted as without
    gradients, K2 as with them."""
    shape, options = shape_of(), dict(precision="bf16", planned={})
    plain, saving, normed = (
        {item.name: item for item in forecast(shape, torch.bfloat16, H200, **options, **kind)}
        for kind in ({}, {"training": True}, {"training": True, "normed": True})
    )
    for name in ("K1", "K3", "K4"):
        assert normed[name] == plain[name] != saving[name]
    assert normed["K2"] == saving["K2"] != plain["K2"]


def test_a_centred_dgrad_has_a_count_of_its_own():
    (row,) = (p for p in launches_of(shape_of(), torch.bfloat16, "backward", normed=True) if p.name == "B2 3x3")
    tile = choice.tile_of(row)
    assert counts.key_of(row, tile, False).kernel == "conv_dgrad_kernel centred"
    for kernel, said in (("conv_dgrad_kernel", UNCOUNTED), ("conv_dgrad_kernel centred", "")):
        known = counts_of(kernel, tile, 3, binary(tile, step=10))
        assert launches(known, training=True)["B2 3x3"].stands_for == said


@pytest.mark.parametrize("card", CARDS.values(), ids=lambda card: card.name)
def test_no_launch_is_faster_than_its_floor(card):
    for block, batch, (precision, dtype) in itertools.product(
        ("3a", "5b"), (1, 128), (("bf16", torch.bfloat16), ("tf32", torch.float32))
    ):
        for item in forecast(
            shape_of(block, batch, dtype), dtype, card, precision=precision, training=True, normed=True
        ):
            assert item.low <= item.predicted <= item.high
            assert item.predicted >= item.floor + 0.99 * card.launch


@pytest.mark.parametrize("batch", [1, 32, 128, 131])
def test_ranges_of_statistics(batch):
    """Every row is in one range, none is empty, and three programs a multiprocessor are left, if there are as many."""
    for name in GOOGLENET_BLOCKS:
        shape = shape_of(name)._replace(n=batch)
        found = launches_of(shape, torch.bfloat16, "forward", normed=True)
        for launch in (item for item in found if item.row.role == STATISTICS):
            tile = choice.tile_of(launch)
            count, each = choice.statistics_ranges(launch, tile)
            tiles, columns = -(-launch.pixels // tile.BLOCK_M), -(-sum(launch.filters) // tile.BLOCK_N)
            assert (count - 1) * each < tiles <= count * each
            assert count <= choice.MAX_RANGES
            assert count * columns >= min(396, tiles * columns)
