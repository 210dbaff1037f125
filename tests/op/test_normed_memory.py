"""What a block with BatchNorm in training keeps for its backward, ours beside eager's, counted by storage."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from benchmarks.cases.baselines import DTYPES, Point
from benchmarks.cases.roofline import kept_bytes
from inception_fused.block.batch_stats import STATISTICS, width
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, branch3_options
from inception_fused.block.reference import Inception, InceptionParams, inception_reference
from inception_fused.block.views import BatchNorm
from inception_fused.op.normed_autograd import normed_block

BATCH, SIDE = 2, 7


def held(call, leaves):
    """Bytes that autograd keeps of a call: every storage once and whole, but for those of the leaves."""
    known = {t.untyped_storage().data_ptr() for t in leaves}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            # The tensor too: of a freed one the address would serve twice.
            kept[storage.data_ptr()] = storage.nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = call()
    assert y.requires_grad
    return sum(size for size, _ in kept.values())


def kept_of(block, dtype, windows):
    """(ours, eager's) of one block, and its shape."""
    point = Point(block, GOOGLENET_BLOCKS[block], SIDE, BATCH, dtype, branch3=windows)
    config, kind = point.config, DTYPES[dtype]
    module = Inception(*config, bias=False, dtype=kind, **branch3_options(windows)).to(
        memory_format=torch.channels_last
    )
    weights = [m.weight for m in module.children() if isinstance(m, nn.Conv2d)]
    vectors = [[torch.ones(w.shape[0], requires_grad=True) for _ in range(2)] for w in weights]
    params = InceptionParams(tuple(weights), None, tuple(BatchNorm(*pair, None, None, 1e-3) for pair in vectors))
    x = torch.randn((BATCH, config.in_channels, SIDE, SIDE), dtype=kind).to(memory_format=torch.channels_last)
    leaves = [x.requires_grad_(), *weights, *(t for pair in vectors for t in pair)]
    ours = held(lambda: normed_block(x, params, relu=True, backend="auto")[0], leaves)
    return ours, held(lambda: inception_reference(x, params), leaves), point.shape


@pytest.mark.parametrize("windows", [(5,), (3,), (3, 3)], ids=str)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_at_most_half_of_eagers_is_kept(dtype, windows):
    """Of each of the nine blocks, and by the arithmetic of benchmarks/cases/roofline.py; what ours has more are the
    statistics, what eager has more are its BatchNorms' own."""
    total = [0, 0]
    for block in GOOGLENET_BLOCKS:
        ours, eager, shape = kept_of(block, dtype, windows)
        expected = kept_bytes(shape)
        assert ours == expected[0] + 4 * STATISTICS * width(shape), block
        # Mean and deviation of each channel in fp32, and of PyTorch's own bookkeeping a little.
        assert expected[1] <= eager <= expected[1] + 16 * sum(shape.filters), block
        assert ours <= 0.5 * eager, block
        total = [total[0] + ours, total[1] + eager]
    assert total[0] / total[1] == pytest.approx({"fp32": 0.38, "bf16": 0.32}[dtype], abs=0.05)
