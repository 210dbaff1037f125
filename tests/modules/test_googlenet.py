"""The network: shape table, keys, weights and outputs with the block swapped, in every layout."""

from functools import partial

import pytest
import torch

from inception_fused import GOOGLENET_BLOCKS, FusedInception, GoogLeNet, Inception, backend
from inception_fused.block.googlenet_blocks import spatial_size
from inception_fused.testing import Error, tolerance
from marks import full

SHAPES_AT_96 = {
    "b1": (64, 24, 24), "b2": (192, 12, 12), "b3": (480, 6, 6), "b4": (832, 3, 3), "b5": (1024,), "classifier": (10,),
}  # fmt: skip


def _networks(**kwargs) -> tuple[GoogLeNet, GoogLeNet]:
    nets = []
    for block in (FusedInception, Inception):
        torch.manual_seed(11)
        nets.append(GoogLeNet(block=block, **kwargs))
    return nets[0], nets[1]


@pytest.mark.parametrize("block", [FusedInception, Inception])
def test_shape_table(block):
    shapes = dict(GoogLeNet(block=block).layer_shapes(torch.zeros(1, 1, 96, 96)))
    assert shapes == {name: (1, *shape) for name, shape in SHAPES_AT_96.items()}


def test_keys_and_weights_from_the_same_seed():
    fused, eager = _networks()
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), eager.state_dict().values(), strict=True))
    assert sum(isinstance(m, FusedInception) for m in fused.modules()) == 9
    assert not any(isinstance(m, FusedInception) for m in eager.modules())


@full
@pytest.mark.parametrize("wish", ["auto", "kernels"])
def test_outputs_and_gradients_with_the_block_swapped(wish):
    fused, eager = _networks()
    x = torch.randn(1, 1, 64, 64)
    with backend(wish):
        ours = fused(x)
        ours.square().sum().backward()
    theirs = eager(x)
    theirs.square().sum().backward()
    bound = tolerance(torch.float32, 10**5)
    assert Error.of(ours, theirs).within(bound)
    for (name, a), b in zip(fused.named_parameters(), eager.parameters(), strict=True):
        # Twenty layers of rounding lie between the loss and the first weights; ReLU masks near zero flip on the way.
        assert Error.of(a.grad, b.grad).rms < 100 * bound, name


def test_nine_blocks_as_data():
    assert list(GOOGLENET_BLOCKS) == ["3a", "3b", "4a", "4b", "4c", "4d", "4e", "5a", "5b"]
    for before, after in (("3a", "3b"), ("4a", "4b"), ("4b", "4c"), ("4c", "4d"), ("4d", "4e"), ("5a", "5b")):
        assert GOOGLENET_BLOCKS[before].out_channels == GOOGLENET_BLOCKS[after].in_channels
    assert GOOGLENET_BLOCKS["5b"].out_channels == 1024
    sizes = {size: [spatial_size(block, size) for block in ("3a", "4c", "5b")] for size in (224, 96, 32)}
    assert sizes == {224: [28, 14, 7], 96: [12, 6, 3], 32: [4, 2, 1]}


def test_other_images_and_classes():
    net = GoogLeNet(num_classes=7, in_channels=3).to(memory_format=torch.channels_last)
    assert net(torch.randn(2, 3, 40, 33)).shape == (2, 7)


def test_two_convolutions_in_branch_3_of_every_block():
    nets = []
    for block in (FusedInception, Inception):
        torch.manual_seed(11)
        nets.append(GoogLeNet(block=partial(block, branch3_kernel_size=3, branch3_convs=2)))
    fused, eager = (net.to(memory_format=torch.channels_last) for net in nets)
    assert list(fused.state_dict()) == list(eager.state_dict())
    assert sum(name.endswith("p3_3.weight") for name in fused.state_dict()) == 9
    assert all(torch.equal(a, b) for a, b in zip(fused.state_dict().values(), eager.state_dict().values(), strict=True))
    fused.load_state_dict(eager.state_dict())
    x = torch.randn(2, 1, 33, 40).contiguous(memory_format=torch.channels_last)
    ours, theirs = fused(x), eager(x)
    assert ours.shape == (2, 10)
    assert Error.of(ours, theirs).within(tolerance(torch.float32, 10**5))
