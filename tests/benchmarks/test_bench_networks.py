"""The networks that are timed, and their work, against what PyTorch counts and against hand arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases.baselines import Point
from benchmarks.cases.networks import BLOCK_TYPES, NETWORKS, BatchNormInception, CifarInception, build_network
from benchmarks.cases.roofline import network_works
from benchmarks.cases.suite import NETWORK_LIMITS, meta_subject
from inception_fused import FusedInception, Inception, explain
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, spatial_size
from inception_fused.plan.floors import block_work


@pytest.mark.parametrize("name", NETWORKS)
def test_flop_are_those_that_pytorch_counts(name):
    module, x = meta_subject(name, NETWORKS[name].image, 3)
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.grad(y.sum(), tuple(module.parameters()))
    works = network_works(module, x, "bf16", blocks=BLOCK_TYPES)
    assert sum(work.flop for work in works) == forward.get_total_flops()
    training = network_works(module, x, "bf16", blocks=BLOCK_TYPES, training=True)
    assert sum(work.flop for work in training) == forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
def test_work_of_the_seed_network_is_that_of_its_parts(dtype, training):
    """Three convolutions, nine blocks and the classifier at 96x96, batch 5; a pool shrinks what is written."""
    e, n = {"bf16": 2, "tf32": 4}[dtype], 5
    works = network_works(*meta_subject("googlenet", 96, n), dtype, blocks=BLOCK_TYPES, training=training)
    assert len(works) == 13
    c1 = (n * 96 * 96, n * 64 * 24 * 24, 64 * 49)
    c2 = (n * 64 * 24 * 24, n * 64 * 24 * 24, 64 * 64)
    c3 = (n * 64 * 24 * 24, n * 192 * 12 * 12, 192 * 64 * 9)
    linear = (n * 1024, n * 10, 10240)
    for index, (x, y, w) in ((0, c1), (1, c2), (2, c3), (12, linear)):
        reads = 1 if not training else 2 if index == 0 else 3
        assert works[index].bytes == e * (reads * (x + w) + (1 + training) * y), index
    assert works[0].flop == (2 if training else 1) * 2 * n * 48 * 48 * 64 * 49
    for index, (name, config) in enumerate(GOOGLENET_BLOCKS.items(), 3):
        alone = block_work(Point(name, config, spatial_size(name, 96), n, dtype).shape, training=training)
        # A pool follows 3b, 4e and 5b: 6 from 6x6 to 3x3, from 12x12 to 6x6, and to one pixel.
        left = {"3b": 0.25, "4e": 0.25, "5b": 1 / 9}.get(name, 1)
        full = e * (1 + training) * n * config.out_channels * spatial_size(name, 96) ** 2
        # ceil: 6x6 shrinks to 3x3 and 12x12 to 6x6.
        assert works[index].flop == alone.flop
        assert works[index].bytes == pytest.approx(alone.bytes - full * (1 - left), abs=0.5)


def test_kernelbench_7_is_what_it_says():
    module, x = meta_subject("kernelbench7", 224, 2)
    assert tuple(module(x).shape) == (2, 1000)
    blocks = [block for block in module.modules() if isinstance(block, Inception)]
    assert {block.activation for block in blocks} == {None}
    found = [
        (b.p1_1.in_channels, b.p1_1.out_channels, (b.p2_1.out_channels, b.p2_2.out_channels),
         (b.p3_1.out_channels, b.p3_2.out_channels), b.p4_2.out_channels)
        for b in blocks
    ]  # fmt: skip
    assert found == [tuple(config) for config in GOOGLENET_BLOCKS.values()]
    assert sum(isinstance(layer, nn.ReLU) for layer in module.modules()) == 3
    pools = [m for m in module if isinstance(m, nn.MaxPool2d)]
    assert [(p.kernel_size, p.stride, p.padding) for p in pools] == [(3, 2, 1)] * 4
    # Weights and biases by hand: the stem, nine blocks, the classifier.
    stem = (64 * 3 * 49 + 64) + (64 * 64 + 64) + (192 * 64 * 9 + 192)
    six = sum(c * a + c * b[0] + 9 * b[0] * b[1] + c * d[0] + 25 * d[0] * d[1] + c * f for c, a, b, d, f in found)
    biases = sum(a + sum(b) + sum(d) + f for _, a, b, d, f in found)
    assert sum(p.numel() for p in module.parameters()) == stem + six + biases + 1024 * 1000 + 1000


def test_torchvision_shape():
    """Its published parameters without the auxiliary classifiers: 6,624,904."""
    module, x = meta_subject("torchvision", 224, 2)
    assert sum(p.numel() for p in module.parameters()) == 6_624_904
    shapes = []
    for layer in module.modules():
        if isinstance(layer, BatchNormInception):
            layer.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    assert tuple(module(x).shape) == (2, 1000)
    assert shapes == [
        *((256, 28, 28), (480, 28, 28), (512, 14, 14), (512, 14, 14), (512, 14, 14), (528, 14, 14)),
        *((832, 14, 14), (832, 7, 7), (1024, 7, 7)),
    ]
    assert {m.eps for m in module.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-3}
    assert all(m.bias is None for m in module.modules() if isinstance(m, nn.Conv2d))
    fused = build_network("torchvision", fused=True)
    assert [row.state for row in explain(fused).rows] == ["converted"] * 9
    assert list(fused.state_dict()) == list(build_network("torchvision").state_dict())


def test_cifar_shape():
    """Three convolutions a third branch, one before the blocks, a bias beside every BatchNorm; parameters by hand."""
    module, x = meta_subject("cifar", 32, 2)
    blocks = [layer for layer in module.modules() if isinstance(layer, CifarInception)]
    shapes = []
    for block in blocks:
        assert [conv.kernel_size for conv in block.branch3.modules() if isinstance(conv, nn.Conv2d)] == [
            (1, 1), (3, 3), (3, 3),
        ]  # fmt: skip
        block.register_forward_hook(lambda _, __, y: shapes.append(tuple(y.shape[1:])))
    assert tuple(module(x).shape) == (2, 10)
    assert shapes == [
        *((256, 32, 32), (480, 32, 32), (512, 16, 16), (512, 16, 16), (512, 16, 16), (528, 16, 16)),
        *((832, 16, 16), (832, 8, 8), (1024, 8, 8)),
    ]
    assert {m.eps for m in module.modules() if isinstance(m, nn.BatchNorm2d)} == {1e-5}
    count = 27 * 192 + 3 * 192 + 1024 * 10 + 10
    for c, c1, (r2, k2), (r3, k3), c4 in GOOGLENET_BLOCKS.values():
        weights = c * (c1 + r2 + r3 + c4) + 9 * (r2 * k2 + r3 * k3 + k3 * k3)
        # A bias, gamma and beta each.
        count += weights + 3 * (c1 + r2 + k2 + r3 + 2 * k3 + c4)
    assert sum(p.numel() for p in module.parameters()) == count
    fused = build_network("cifar", fused=True).eval()
    rows = explain(fused).rows
    assert [row.state for row in rows] == ["converted"] * 9
    assert {row.what for row in rows} == {"two 3x3 in branch 3, BatchNorm"}
    assert list(fused.state_dict()) == list(build_network("cifar").state_dict())


@pytest.mark.parametrize("name", ["googlenet", "kernelbench7"])
def test_ours_has_the_same_weights_and_no_block_is_left(name):
    ours, eager = build_network(name, fused=True), build_network(name)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), eager.parameters(), strict=True))
    assert sum(isinstance(m, FusedInception) for m in ours.modules()) == 9
    assert not any(isinstance(m, FusedInception) for m in eager.modules())


@pytest.mark.parametrize("name", NETWORKS)
def test_the_signal_keeps_its_size(name):
    network = NETWORKS[name]
    with torch.no_grad():
        y = build_network(name).eval()(torch.randn(2, network.channels, 64, 64))
    assert 0.1 < y.std() < 100


@pytest.mark.parametrize("branch", range(4))
@pytest.mark.parametrize("name", [name for name, network in NETWORKS.items() if network.blocks])
def test_a_branch_that_computes_nothing_shows_in_the_logits(name, branch):
    """In each of the nine blocks, by more than the widest limit of the gate."""
    module = build_network(name, fused=True).eval()
    x = torch.randn(2, NETWORKS[name].channels, 64, 64)

    def silence(block, _, y):
        last = (block.p1_1, block.p2_2, block.p3_2, block.p4_2)
        parts = list(y.split([conv.out_channels for conv in last], dim=1))
        parts[branch] = torch.zeros_like(parts[branch])
        return torch.cat(parts, dim=1)

    with torch.no_grad():
        y = module(x)
        for block in (b for b in module.modules() if isinstance(b, FusedInception)):
            handle = block.register_forward_hook(silence)
            wrong = module(x)
            handle.remove()
            assert (wrong - y).norm() > max(limit for limit, _ in NETWORK_LIMITS.values()) * y.norm()
