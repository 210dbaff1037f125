"""The plan as data: rules, legality of tiles, places of slices."""

import itertools

import pytest
import torch
from cases import ODD, REDUCE_24, SMALL, make_block

from inception_fused import GOOGLENET_BLOCKS, plan
from inception_fused.googlenet import spatial_size
from inception_fused.kernels.views import unit_of

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("kernel", plan.KERNELS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tiles_are_legal(dtype, kernel):
    for tile in plan.tiles(kernel, dtype):
        assert all(block >= 16 and block & (block - 1) == 0 for block in tile[:3]), (
            "a dot needs powers of two from 16 on"
        )
        assert tile.BLOCK_N % 8 == 0, "mask bits are written by the byte"
        assert tile.num_warps <= 4, "8 warps have miscompiled convolution templates before (pytorch#173068)"
        operands = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * dtype.itemsize
        assert operands * tile.num_stages <= plan.MIN_SHARED_BYTES


@pytest.mark.parametrize("kernel", plan.KERNELS)
def test_the_last_rule_serves_everything(kernel):
    *_, last = plan.RULES[kernel]
    assert (last.min_tiles, last.max_n, last.itemsizes) == (0, None, (2, 4, 8))
    for m, n in itertools.product((1, 49, 10**6), (1, 17, 4096)):
        tile = plan.choose_tile(kernel, torch.float16, gemm_m=m, gemm_n=n, unit=8)
        assert tile in plan.tiles(kernel, torch.float16)


@pytest.mark.parametrize("kernel", plan.KERNELS)
def test_order_of_a_reduction_does_not_depend_on_the_batch(kernel):
    for config, dtype in itertools.product(GOOGLENET_BLOCKS.values(), DTYPES):
        block_k = set()
        for batch in (1, 2, 32, 128, 4096):
            shape = plan.BlockShape(
                batch, 14, 14, config.in_channels, config.c1, *config.c2, *config.c3, config.c4, dtype.itemsize
            )
            block_k.add(shape.config(kernel, dtype, config.in_channels)[0].BLOCK_K)
        assert len(block_k) == 1


def test_googlenet_is_aligned_in_every_kernel():
    for name, config in GOOGLENET_BLOCKS.items():
        side = spatial_size(name)
        for dtype, kernel in itertools.product(DTYPES, plan.KERNELS):
            shape = plan.BlockShape(
                1, side, side, config.in_channels, config.c1, *config.c2, *config.c3, config.c4, dtype.itemsize
            )
            assert shape.config(kernel, dtype, config.in_channels)[1] == 16 // dtype.itemsize


def test_unaligned_problems():
    shape = make_block(SMALL, (1, 3, 3), torch.float16).shape
    assert shape.config("K1", torch.float16, SMALL.in_channels)[1] == 8
    assert shape.config("K1", torch.float16, SMALL.in_channels + 1)[1] == 1, "row stride"
    assert shape.config("K2", torch.float16, SMALL.in_channels, aligned=False)[1] == 1, "address"
    assert shape.config("K3", torch.float16, SMALL.in_channels + 1)[1] == 8, "K3 does not read x"
    odd = make_block(ODD, (1, 3, 3), torch.float16).shape
    assert {odd.config(kernel, torch.float16, 17)[1] for kernel in plan.KERNELS} == {1}
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


def test_sizes_beyond_32_bits_are_noticed():
    def shape(n=1, h=28, w=28, c=192, k2=128):
        return plan.BlockShape(n, h, w, c, 64, 96, k2, 16, 32, 32, 2)

    assert not shape(n=4096).exceeds_int32(192)
    assert not shape(n=2**18, h=56, w=56).exceeds_int32(192), "1.6e11 elements: bases advance in int64"
    assert shape(n=2**22, h=64, w=64).exceeds_int32(192), "row numbers"
    assert shape(w=2**21).exceeds_int32(1024), "offsets inside a tile"
    assert shape(k2=2**23).exceeds_int32(192), "offsets into a weight"


def test_describe_names_every_rule():
    text = plan.describe()
    for kernel, rules in plan.RULES.items():
        for rule in rules:
            assert any(kernel in line and rule.name in line and rule.condition() in line for line in text.splitlines())
    assert "unaligned" in text
