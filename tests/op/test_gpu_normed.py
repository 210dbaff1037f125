"""On a CUDA device: BatchNorm in training, each launch by itself and steps beside eager. Run by ``pytest -m gpu``."""

import pytest
import torch

from batch_norm_cases import make_norms
from checks.block_cases import DTYPES, ODD, check_taps, check_values, make_block
from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.googlenet_blocks import spatial_size
from inception_fused.block.reference import InceptionParams, inception_reference
from inception_fused.op.normed_autograd import normed_block
from inception_fused.testing import Error, tolerance
from normed_checks import checked, run_normed, run_normed_backward

pytestmark = pytest.mark.gpu


def in_training(block):
    """BatchNorm of every convolution, with the statistics of the batch."""
    device = block.x.device
    return [
        norm._replace(gamma=norm.gamma.to(device), beta=norm.beta.to(device), mean=None, var=None)
        for norm in make_norms(block.weights)
    ]


def check(block, *, dy_rows=True):
    norms, tf32 = in_training(block), block.x.dtype == torch.float32
    with torch.no_grad(), checked():
        y, saved = run_normed(block, norms)
        raw = saved.raw.unflatten(0, (block.shape.n, *block.shape.image)).permute(0, 3, 1, 2)
        check_values(block._replace(relu=False), raw, saved.raw_r, sources=saved.r, tf32=tf32)
        check_taps(block, saved.taps)
        dy = torch.randn_like(y) if dy_rows else torch.randn(y.shape, dtype=y.dtype, device=y.device)
        grads = run_normed_backward(block, norms, saved, dy)
        again = run_normed(block, norms)
        twice = run_normed_backward(block, norms, again[1], dy)
    for one, other in zip((y, saved.stats, *grads), (again[0], again[1].stats, *twice), strict=True):
        assert torch.equal(one, other), "a repeat differs"


@pytest.mark.parametrize("batch", [1, 32])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GOOGLENET_BLOCKS)
def test_every_launch(name, dtype, batch):
    """Against float64 on the operands that it read, masks to the bit, and the same bits again."""
    side = spatial_size(name)
    block = make_block(GOOGLENET_BLOCKS[name], (batch, side, side), dtype, device="cuda", bias=False)
    check(block, dy_rows=name != "5b")


@pytest.mark.parametrize("dy_rows", [True, False], ids=["rows", "NCHW"])
@pytest.mark.parametrize("double", [False, True], ids=["5x5", "two 3x3"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_odd_channels(dtype, double, dy_rows):
    check(make_block(ODD, (2, 7, 5), dtype, device="cuda", double=double), dy_rows=dy_rows)


@pytest.mark.parametrize("name", GOOGLENET_BLOCKS)
def test_ten_steps_beside_eager(name):
    """Of one loss in fp32: parameters and statistics no further from eager in float64 than eager in TF32 would be."""
    torch.manual_seed(0)
    side = spatial_size(name)
    block = make_block(GOOGLENET_BLOCKS[name], (8, side, side), torch.float32, device="cuda", bias=False)
    found = {}
    for kind in ("kernels", "float64"):
        dtype = torch.float64 if kind == "float64" else torch.float32
        tensors = [t.detach().to(dtype).clone() for t in block.weights]
        norms = [n._replace(gamma=n.gamma.to(dtype).clone(), beta=n.beta.to(dtype).clone()) for n in in_training(block)]
        leaves = [*tensors, *(t for n in norms for t in n[:2])]
        optimizer = torch.optim.SGD([leaf.requires_grad_() for leaf in leaves], lr=1e-2)
        x = block.x.to(dtype)
        for _ in range(10):
            optimizer.zero_grad()
            params = InceptionParams(tuple(tensors), None, tuple(norms))
            if kind == "kernels":
                y, _ = normed_block(x, params, relu=True, backend="kernels")
            else:
                y = inception_reference(x, params, "relu")
            y.square().mean().backward()
            optimizer.step()
        found[kind] = y, leaves
    bound = 4 * tolerance(torch.float32, max(w[0].numel() for w in block.weights), tf32=True)
    (y, ours), (truth, theirs) = found["kernels"], found["float64"]
    assert Error.of(y.detach(), truth.detach()).within(bound)
    for one, other in zip(ours, theirs, strict=True):
        assert Error.of(one.detach(), other.detach()).within(bound)
