"""Two launches as one: to the bit what each computes alone, and nothing else written."""

from __future__ import annotations

import pytest
import torch

from checks.block_cases import DTYPES, ODD, REDUCE_24, SMALL, check_kernels, make_block
from inception_fused.block.views import Tile
from inception_fused.op import launcher
from inception_fused.plan import choice
from inception_fused.plan.pairs import PAIRS
from inception_fused.runtime.submit import record
from marks import each_once

THIRD = {"5x5": {"branch3": 5}, "3x3": {"branch3": 3}, "two 3x3": {"double": True}}


def names(block, **options):
    with record() as launches:
        block.forward(**options)
    return [launch.kernel.fn.__name__ for launch in launches][1:]


def both(block, **options):
    """What a forward writes with pairs, and without."""
    paired = block.forward(**options)
    with launcher.apart():
        return paired, block.forward(**options)


def same(some, others):
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(some, others, strict=True))
    assert all(torch.equal(a.isnan(), b.isnan()) for a, b in zip(some, others, strict=True))


@pytest.mark.parametrize("third", THIRD)
def test_two_launches_a_forward(third):
    block = make_block(REDUCE_24, (1, 5, 4), torch.bfloat16, **THIRD[third])
    last = ["conv_fprop_kernel"] if third == "two 3x3" else []
    assert names(block) == ["pool_and_reduce_kernel", "conv_pair_kernel", *last]
    with launcher.apart():
        assert names(block) == ["grouped_gemm_kernel", "pool_proj_kernel", *["conv_fprop_kernel"] * (2 + len(last))]


@each_once
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("save", [False, True], ids=["inference", "training"])
@pytest.mark.parametrize("third", THIRD)
def test_to_the_bit(third, save, dtype, monkeypatch):
    """Several tiles of rows and of columns in each half, the last of them in part, images of odd size."""
    tiles = iter(range(10**6))

    def tile(*_):
        # Each half has a tile of its own.
        return (Tile(16, 32, 16, 2, num_stages=1), Tile(32, 16, 32, num_stages=1))[next(tiles) % 2]

    monkeypatch.setattr(choice, "interpreter_tile", tile)
    for bias in (True, False):
        block = make_block(REDUCE_24, (3, 5, 7), dtype, bias=bias, **THIRD[third])
        paired, alone = both(block, save=save)
        same(paired, alone)
        if save:
            check_kernels(block, paired)


def test_the_first_of_two_windows_saves_no_bits():
    block = make_block(SMALL, (2, 4, 5), double=True)
    paired, alone = both(block)
    same(paired, alone)
    check_kernels(block, paired)


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("config", [SMALL, REDUCE_24], ids=["small", "24 channels"])
def test_nan_and_infinity_stay_where_they_were(config, activation):
    block = make_block(config, (2, 4, 5), torch.float16, activation=activation)
    block.x[0, 3, 1, 2], block.x[1, 0, 3, 4] = float("nan"), float("inf")
    same(*both(block))


def test_odd_channels_are_launched_alone():
    assert len(names(make_block(ODD, (1, 4, 5)))) == 4


@pytest.mark.parametrize("kernel", ["K1", "K2", "K3", "K4"])
def test_a_kernel_that_is_switched_off_leaves_the_other_alone(kernel):
    block = make_block(SMALL, (1, 4, 5))
    left = names(block, backend=f"{kernel}=eager,{','.join(f'{k}=triton' for k in choice.KERNELS if k != kernel)}")
    assert len(left) == 2
    assert len({pair.function for pair in PAIRS} & set(left)) == 1


def test_a_forced_tile_is_launched_alone():
    """The other half's warps may be others."""
    with launcher.forced("K2", Tile(16, 16, 16, 8, num_stages=1)):
        assert names(make_block(SMALL, (1, 4, 5)))[:2] == ["grouped_gemm_kernel", "pool_proj_kernel"]
