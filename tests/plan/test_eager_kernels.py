"""What eager's kernels of a block move, against the operators that PyTorch itself runs."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases.networks import BatchNormInception, CifarInception
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, block_shape, branch3_options, spatial_size
from inception_fused.block.reference import Inception
from inception_fused.plan.eager_kernels import eager_backward_kernels, eager_kernels
from operator_traffic import Traffic, by_name

aten = torch.ops.aten
BLOCKS = list(GOOGLENET_BLOCKS)
BATCH = 2


def meta_block(block: str, branch3: tuple[int, ...]) -> tuple[Inception, torch.Tensor]:
    """A block without biases, which its operators would name."""
    config, size = GOOGLENET_BLOCKS[block], spatial_size(block)
    place = dict(device="meta", dtype=torch.bfloat16)
    module = Inception(*config, bias=False, **place, **branch3_options(branch3))
    return module, torch.empty(BATCH, config.in_channels, size, size, **place)


def shape_of(block: str, branch3: tuple[int, ...]):
    return block_shape(GOOGLENET_BLOCKS[block], BATCH, spatial_size(block), torch.bfloat16, branch3=branch3)


@pytest.mark.parametrize(("branch3", "launches"), [((5,), 20), ((3, 3), 23)], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_eager_traffic_is_that_of_its_operators(block, branch3, launches):
    module, x = meta_block(block, branch3)
    with torch.no_grad(), Traffic() as traffic:
        module(x)
    moved, works = traffic.moved, by_name(eager_kernels(shape_of(block, branch3)))
    assert works["pool"] == moved[aten.max_pool2d_with_indices]
    assert sorted(works["conv"]) == sorted(moved[aten.convolution])
    # A bias in a kernel of its own reads and writes what ReLU reads and writes.
    assert sorted(works["relu"]) == sorted(works["bias"]) == sorted(moved[aten.relu])
    assert works["cat"] == moved[aten.cat]
    assert sum(map(len, works.values())) == launches


@pytest.mark.parametrize(("branch3", "launches"), [((5,), 29), ((3, 3), 33)], ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_eager_backward_traffic_is_that_of_its_operators(block, branch3, launches):
    """One operator does a convolution's dgrad and wgrad; the pool's names x, which its kernel does not read."""
    module, x = meta_block(block, branch3)
    shape = shape_of(block, branch3)
    y = module(x.requires_grad_())
    with FlopCounterMode(display=False) as counter, Traffic() as traffic:
        y.backward(torch.empty_like(y))
    moved, works = traffic.moved, by_name(eager_backward_kernels(shape))
    convolutions = [a + b - dy for a, b, dy in zip(works["dgrad"], works["wgrad"], works["db"], strict=True)]
    assert sorted(convolutions) == sorted(moved[aten.convolution_backward])
    assert sorted(works["relu'"]) == sorted(3 * dy for dy in works["db"]) == sorted(moved[aten.threshold_backward])
    assert works["zeros"] == [x.nbytes]
    assert works["pool'"] == [size - x.nbytes for size in moved[aten.max_pool2d_with_indices_backward]]
    assert works["add"] == moved[aten.add] + moved.get(aten.add_, [])
    assert sum(map(len, works.values())) == launches
    assert sum(work.flop for work in eager_backward_kernels(shape)) == counter.get_total_flops()


BATCH_NORM = [(BatchNormInception, (3,), (26, 35)), (CifarInception, (3, 3), (30, 40))]
"""Blocks with BatchNorm, their third branches, and eager's launches of a forward and of a backward."""


@pytest.mark.parametrize(("kind", "branch3", "launches"), BATCH_NORM, ids=["one window", "two"])
@pytest.mark.parametrize("block", ["3a", "4e", "5b"])
def test_eager_traffic_with_batch_norm_is_that_of_its_operators(block, branch3, launches, kind):
    """BatchNorm's operators name each tensor once, of which the kernels read their input twice."""
    config, size = GOOGLENET_BLOCKS[block], spatial_size(block)
    module = kind(*config).to(device="meta", dtype=torch.bfloat16)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Conv2d):
            layer.bias = None
    x = torch.empty(2, config.in_channels, size, size, device="meta", dtype=torch.bfloat16, requires_grad=True)
    with Traffic() as traffic:
        y = module(x)
        y.backward(torch.empty_like(y))
    moved = traffic.moved
    shape = shape_of(block, branch3)
    passes = eager_kernels(shape, normed=True), eager_backward_kernels(shape, normed=True)
    works = by_name(work for some in passes for work in some)
    assert sorted(works["conv"]) == sorted(moved[aten.convolution])
    assert sorted(works["relu"]) == sorted(moved[aten.relu])
    assert sorted(works["relu'"]) == sorted(moved[aten.threshold_backward])
    elements = sorted(2 * shape.gemm_m * k for k in shape.filters)
    vectors = 100 * max(shape.filters)
    for operator, tensors in ((aten.native_batch_norm, 2), (aten.native_batch_norm_backward, 3)):
        for found, size in zip(sorted(moved[operator]), elements, strict=True):
            assert tensors * size < found < tensors * size + vectors
    assert sorted(works["bn statistics"]) == elements
    assert sorted(works["bn"]) == [2 * size for size in elements] == sorted(works["bn' sums"])
    assert sorted(works["bn'"]) == [3 * size for size in elements]
    assert not {"bias", "db"} & set(works)
    assert tuple(map(len, passes)) == launches
