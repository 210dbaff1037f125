"""How running statistics move after a block whose BatchNorm trains, beside PyTorch's own layer."""

import copy

import pytest
import torch
from torch import nn

from inception_fused.conversion.batch_norm_training import move

SIZE = (3, 4, 2, 5)


def moved(norm, x, steps=3):
    """(layer moved by hand, layer that PyTorch has moved), after the same batches."""
    ours, theirs = norm, copy.deepcopy(norm)
    for i in range(steps):
        batch = x + i
        move([(ours, batch.mean((0, 2, 3)), batch.var((0, 2, 3), correction=0))], batch.numel() // batch.shape[1])
        theirs(batch)
    return ours, theirs


@pytest.mark.parametrize("pixels", [SIZE, (1, 4, 1, 2)], ids=["many", "two"])
@pytest.mark.parametrize("momentum", [0.1, 0.75, 0.0, None])
def test_as_pytorch_moves_them(momentum, pixels):
    norm = nn.BatchNorm2d(4, momentum=momentum).double()
    ours, theirs = moved(norm, torch.randn(pixels).double())
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 3
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)


@pytest.mark.parametrize("change", [lambda norm: norm.eval(), lambda norm: setattr(norm, "track_running_stats", False)])
def test_what_stays(change):
    """Of a layer in eval mode, and of one whose tracking was turned off later, as it is without."""
    norm = nn.BatchNorm2d(4).double()
    change(norm)
    ours, theirs = moved(norm, torch.randn(SIZE).double())
    for mine, before in zip(ours.buffers(), nn.BatchNorm2d(4).double().buffers(), strict=True):
        assert torch.equal(mine, before)
    if not norm.training:
        assert all(map(torch.equal, ours.buffers(), theirs.buffers()))
