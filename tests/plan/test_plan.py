"""The plan as data: rules, legality of tiles, places of slices."""

import itertools

import pytest
import torch

from checks.block_cases import ODD, REDUCE_24, SMALL, make_block
from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.googlenet_blocks import block_shape, spatial_size
from inception_fused.block.views import unit_of
from inception_fused.plan import choice, tile_table
from inception_fused.plan.launches import WGRAD, table_of
from inception_fused.plan.problems import launch_of, launches_of
from inception_fused.plan.rules import EVERY, MIN_SHARED_BYTES, is_asynchronous

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TILED = [row for row in table_of(range(6), normed=True).rows["forward"] if row.rules]
CAPABILITIES = [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)]


@pytest.mark.parametrize("kernel", choice.RULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_are_legal(dtype, kernel):
    for capability in CAPABILITIES:
        shared = 227 << 10 if is_asynchronous(capability) else MIN_SHARED_BYTES
        for tile in choice.RULES[kernel].tiles(dtype, capability):
            assert tile_table.illegal_tile(tile, dtype, shared) is None


def test_wide_tiles_are_for_asynchronous_matrix_units():
    """A problem's tile there and elsewhere: the others keep operands in registers, where 256x128 spills."""
    assert [is_asynchronous(capability) for capability in CAPABILITIES] == [False, False, True, True, False]
    for kernel, wide in (("K1", (256, 128)), ("K3", (256, 128)), ("K4", (256, 128)), ("B2", (128, 128))):
        n = 128 if kernel == "K4" else 192
        found = [
            choice.choose_tile(kernel, torch.bfloat16, gemm_m=128 * 784, gemm_n=n, unit=8, capability=capability)
            for capability in CAPABILITIES
        ]
        assert [tile[:2] == wide for tile in found] == [False, False, True, True, False], kernel
        assert len({tile.BLOCK_K for tile in found}) == 1


def test_few_columns_take_no_wide_tile():
    for kernel, n in (("K1", 64), ("K3", 64), ("K4", 64), ("B2", 64)):
        narrow, wide = (
            choice.choose_tile(kernel, torch.bfloat16, gemm_m=128 * 784, gemm_n=columns, unit=8)
            for columns in (n, n + 8)
        )
        assert narrow.BLOCK_M * narrow.BLOCK_N < wide.BLOCK_M * wide.BLOCK_N


def test_both_windows_share_their_binaries():
    """K3's tiles are among K4's, whose kernel it is: training must not compile more than MAX_BINARIES."""
    for dtype, capability in itertools.product((torch.float16, torch.bfloat16), CAPABILITIES):
        third, fourth = (set(choice.RULES[kernel].tiles(dtype, capability)) for kernel in ("K3", "K4"))
        assert third <= fourth


@pytest.mark.parametrize(("kernel", "height", "tiles"), [("K4", 256, 96)])
def test_few_filters_of_many_pixels_take_a_tall_tile(kernel, height, tiles):
    """Of 64 filters, where matrix instructions take both operands from shared memory."""
    blocks = {
        (count, capability): choice.choose_tile(
            kernel, torch.bfloat16, gemm_m=count * height, gemm_n=64, unit=8, capability=capability
        )[:2]
        for count, capability in itertools.product((tiles - 1, tiles), CAPABILITIES)
    }
    tall = {key for key, block in blocks.items() if block == (height, 64)}
    assert tall == {(tiles, (9, 0)), (tiles, (10, 0))}
    assert set(blocks.values()) == {(64, 64), (height, 64)}


@pytest.mark.parametrize("kernel", choice.RULES)
def test_the_last_rule_serves_everything(kernel):
    *_, last = choice.RULES[kernel].rules
    assert (last.min_tiles, last.above_n, last.max_n, last.itemsizes) == (0, 0, None, (2, 4, 8))
    assert last.chips == EVERY
    for m, n in itertools.product((1, 49, 10**6), (1, 17, 4096)):
        tile = choice.choose_tile(kernel, torch.float16, gemm_m=m, gemm_n=n, unit=8)
        assert tile in choice.RULES[kernel].tiles(torch.float16)


def test_no_tile_is_listed_that_no_problem_takes():
    """fp32 has tiles of its own before those for every dtype: on sm_90 of four warps, where others have eight."""
    for kernel, block in (("K3", (128, 128)), ("B2 1x1", (128, 128))):
        for dtype, warps in ((torch.float32, {4}), (torch.bfloat16, {8})):
            found = choice.RULES[kernel].tiles(dtype, (9, 0))
            assert {tile.num_warps for tile in found if tile[:2] == block} == warps
    assert {tile.BLOCK_K for tile in choice.RULES["B4 pool"].tiles(torch.float32)[:-1]} == {64}


@pytest.mark.parametrize("row", TILED, ids=lambda row: row.name)
def test_order_of_a_reduction_does_not_depend_on_the_batch(row):
    for config, dtype in itertools.product(GOOGLENET_BLOCKS.values(), DTYPES):
        block_k = set()
        for batch, capability in itertools.product((1, 2, 32, 128, 4096), CAPABILITIES):
            shape = block_shape(config, batch, 14, dtype)
            block_k.add(choice.tile_of(launch_of(row, shape, dtype, capability=capability)).BLOCK_K)
        assert len(block_k) == 1


def test_googlenet_is_aligned_in_every_kernel():
    for name, config in GOOGLENET_BLOCKS.items():
        side = spatial_size(name)
        for dtype in DTYPES:
            shape = block_shape(config, 1, side, dtype)
            assert {launch.unit for launch in choice.tiled(shape, dtype)} == {16 // dtype.itemsize}


def units(block, direction, **x):
    """The units of a pass by launch."""
    return {p.name: p.unit for p in launches_of(block.shape, torch.float16, direction, **x) if p.rules}


def test_unaligned_problems():
    block, odd = (make_block(config, (1, 3, 3), torch.float16) for config in (SMALL, ODD))
    shifted = dict(x_row_stride=SMALL.in_channels + 1)
    assert set(units(block, "forward").values()) == {8}
    assert units(block, "forward", **shifted) == {"K1": 1, "K2": 1, "K3": 8, "K4": 8}, "row stride, where x is read"
    assert units(block, "forward", aligned=False) == {"K1": 1, "K2": 1, "K3": 8, "K4": 8}, "address"
    assert set(units(odd, "forward", x_row_stride=17).values()) == {1}
    assert set(units(block, "backward").values()) == {8}
    for x in (shifted, {"aligned": False}):
        assert {name for name, unit in units(block, "backward", **x).items() if unit == 1} == {"B4 1x1", "B4 pool"}
    assert set(units(odd, "backward").values()) == {1}
    assert unit_of(torch.float16, 24) == 8
    assert unit_of(torch.float32, 24, 12) == 4
    assert unit_of(torch.float16, 24, 12) == 1


@pytest.mark.parametrize("config", [SMALL, ODD, REDUCE_24], ids=["small", "odd", "24"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slices_tile_their_buffers(dtype, config):
    shape = make_block(config, (2, 3, 4), dtype).shape
    y = torch.zeros(2, shape.k, 3, 4)
    ends = 0
    for part, k in zip(shape.y_slices(y), shape.branch_channels, strict=True):
        assert (part.c_offset, part.channels, part.row_stride) == (ends, k, shape.k)
        ends += k
    r3, r5 = shape.r_slices(torch.zeros(24, shape.r_width))
    assert r3.c_offset == 0
    assert r5.c_offset * dtype.itemsize % 16 == 0
    assert r5.c_offset >= r3.channels
    assert shape.r_width * dtype.itemsize % 16 == 0
    bits = shape.bits_slices(torch.zeros(24, shape.bits_width))
    assert [b.channels for b in bits] == [-(-k // 8) for k in shape.branch_channels]


@pytest.mark.parametrize("config", [SMALL, ODD, REDUCE_24], ids=["small", "odd", "24"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradient_slices_tile_their_buffer(dtype, config):
    """Four branches and two reductions share no column, and the operands of dx are one run of columns."""
    shape = make_block(config, (2, 3, 4), dtype).shape
    grads = torch.zeros(24, shape.grads_width)
    parts = [*shape.g_slices(grads), *shape.dr_slices(grads)]
    for i, part in enumerate(parts):
        assert not part.rows(24).any()
        part.rows(24).fill_(i + 1)
    assert [part.channels for part in parts] == [*shape.branch_channels, *shape.r_channels]
    together = shape.reductions_slice(grads, 0, shape.reductions_width).rows(24)
    for (first, last), mark in zip(shape.reductions, (1, 5, 6), strict=True):
        assert (together[:, first:last] == mark).all()
    padding = shape.r_width - sum(shape.r_channels)
    assert (together == 0).sum() == 24 * padding
    assert set(together.unique().tolist()) <= {0, 1, 5, 6}


@pytest.mark.parametrize("batch", [1, 32, 128, 1000])
@pytest.mark.parametrize("name", GOOGLENET_BLOCKS)
def test_partial_sums_stay_small(name, batch):
    """Whatever the batch: a weight's within 12 MiB, at batch 128 all within 38, the biases' in few rows."""
    side = spatial_size(name)
    m, total = batch * side**2, 0
    shape = block_shape(GOOGLENET_BLOCKS[name], batch, side, torch.bfloat16)
    for launch in launches_of(shape, torch.bfloat16, "backward"):
        if launch.row.role == WGRAD:
            part = 4 * choice.ranges(launch, choice.tile_of(launch)) * launch.gemm.m * launch.gemm.n
            assert part <= choice.PARTIAL_BYTES
            total += part
    assert total <= 38 << 20 or batch > 128
    count, each = choice.row_ranges(m, 64)
    assert count <= choice.MAX_RANGES
    assert (count - 1) * each * 64 < m <= count * each * 64


SPLITS = [
    (tiles, steps, weight)
    for tiles in (1, 2, 3, 7, 18, 36, 55, 100, 132, 133, 264, 265, 4000)
    for steps in (1, 3, 4, 5, 8, 49, 196, 392, 3137)
    for weight in (1000, 400_000, 10_000_000)
]


def test_ranges_of_wgrad():
    """Every range has steps, at least MIN_STEPS but for the last; four programs a multiprocessor and the bytes are the
    most. No fewer ranges end as soon on both GPUs."""
    for tiles, steps, weight in SPLITS:
        found = choice.split_k(tiles, steps, weight)
        span = -(-steps // found)
        assert (found - 1) * span < steps <= found * span
        if found == 1:
            continue
        assert span >= choice.MIN_STEPS
        assert tiles * found <= 4 * 132
        assert 4 * found * weight <= choice.PARTIAL_BYTES
        for other in range(1, found):
            assert any(
                -(-tiles * found // gpu) * (span + 5) < -(-tiles * other // gpu) * (-(-steps // other) + 5)
                for gpu in (108, 132)
            )


def test_ranges_fill_both_gpus():
    """108 programs, one for each multiprocessor of an A100, rather than 132, of which an A100 would have two rounds."""
    assert choice.split_k(2, 1080, 50_000) == 54
    assert choice.split_k(18, 784, 460_800) == 6
    assert choice.split_k(18, 784, 1_000_000) == 3, "the bytes"
    assert choice.split_k(4, 16, 1_000) == 4, "the steps"
    assert choice.split_k(132, 392, 90_000_000) == 1, "one range may take more than the bytes"


def test_sizes_beyond_32_bits_are_noticed():
    def shape(n=1, h=28, w=28, c=192, k2=128):
        return choice.BlockShape(n, h, w, c, (64, 96, k2, 16, 32, 32), (1, 1, 3, 1, 5, 1), 2)

    assert not choice.exceeds_int32(shape(n=4096), 192)
    assert not choice.exceeds_int32(shape(n=2**18, h=56, w=56), 192), "1.6e11 elements: bases advance in int64"
    assert choice.exceeds_int32(shape(n=2**22, h=64, w=64), 192), "row numbers"
    assert choice.exceeds_int32(shape(w=2**21), 1024), "offsets inside a tile"
    assert not choice.exceeds_int32(shape(w=2**18), 192)
    assert choice.exceeds_int32(shape(w=2**18, k2=2048), 192), "offsets inside a tile of gradients"
    assert choice.exceeds_int32(shape(k2=2**23), 192), "offsets into a weight"


def test_describe_names_every_rule():
    text = choice.describe()
    for kernel, found in choice.RULES.items():
        for rule in found.rules:
            assert any(kernel in line and rule.name in line and rule.condition() in line for line in text.splitlines())
    assert "unaligned" in text
