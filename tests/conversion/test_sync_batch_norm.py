"""SyncBatchNorm: processes share the statistics of their batches; the truth is BatchNorm on the whole batch."""

import copy

import pytest
import torch
from torch import nn

import sync_ranks
from inception_fused import backend, convert_, explain, revert_
from inception_fused.block.reference import inception_reference
from inception_fused.op.normed_autograd import normed_block
from inception_fused.testing import Error, tolerance
from marks import full
from sync_ranks import SPREADS

ROUNDINGS = 1e-12
"""Of float64 sums in another order."""


@pytest.fixture(scope="module", params=["one without images", pytest.param("unequal", marks=full)])
def ranks(request, tmp_path_factory):
    """(images of each process, what each found)."""
    folder, spread = tmp_path_factory.mktemp("ranks"), SPREADS[request.param]
    torch.multiprocessing.spawn(sync_ranks.main, (str(folder), spread), nprocs=len(spread))
    return spread, [torch.load(folder / f"{rank}.pt") for rank in range(len(spread))]


def close(found, truth, bound=ROUNDINGS):
    size = truth.double().norm()
    assert (found.double() - truth.double()).norm() <= bound * max(1.0, size)


@pytest.mark.parametrize("double", [False, True], ids=["5x5", "two 3x3"])
def test_a_spread_batch_is_one_batch(double, ranks):
    """y and dx of each share; every other gradient added up; the statistics, which all have alike to the bit."""
    spread, found = ranks
    block = sync_ranks.block_of(double, sum(spread))
    leaves, params = sync_ranks.leaves_of(block, block.x)
    y = inception_reference(leaves[0], params)
    truth = sync_ranks.gradients(y, leaves, sync_ranks.gradient_for(sum(spread)))
    shares = [rank[double] for rank in found]
    close(torch.cat([share["y"] for share in shares]), y.detach())
    close(torch.cat([share["grads"][0] for share in shares]), truth[0])
    for i in range(1, len(truth)):
        close(sum(share["grads"][i] for share in shares), truth[i])
    _, whole = normed_block(leaves[0].detach(), params, relu=True, backend="auto")
    for i, own in enumerate(whole):
        assert (own is None) == (i in (1, 2)), "in eval mode, none at all"
        if own is None:
            continue
        for mine, expected in zip(shares[0]["statistics"][i], own, strict=True):
            close(mine, expected)
        for share in shares[1:]:
            assert all(map(torch.equal, share["statistics"][i], shares[0]["statistics"][i]))


def test_a_converted_model(ranks):
    """Outputs, gradients and running statistics are those of BatchNorm on the whole batch, in eval too."""
    spread, found = ranks
    model = sync_ranks.network()
    revert_(model)
    model = model.double()
    shares, dy = [rank["module"] for rank in found], sync_ranks.gradient_for(sum(spread))
    for step in range(2):
        model.zero_grad()
        x = torch.randn((sum(spread), 24, *sync_ranks.IMAGE), generator=torch.Generator().manual_seed(step)).double()
        y = model(x)
        y.backward(dy)
        ours = torch.cat([share["ys"][step] for share in shares])
        assert Error.of(ours, y.detach()).within(tolerance(torch.float32, 10**3))
    for name, p in model.named_parameters():
        total = sum(share["grads"][name] for share in shares)
        assert Error.of(total, p.grad).within(tolerance(torch.float32, 10**4)), name
    for name, buffer in model.named_buffers():
        for share in shares:
            close(share["buffers"][name], buffer, 1e-6)
            assert torch.equal(share["buffers"][name], shares[0]["buffers"][name])
    close(shares[0]["eval"], model.eval()(x).detach(), 1e-6)


def test_single_values_that_are_several_together(ranks):
    spread, found = ranks
    xs = [torch.randn((1, 24, 1, 1), generator=torch.Generator().manual_seed(rank)) for rank in range(len(spread))]
    model = sync_ranks.network()
    revert_(model)
    ours = torch.cat([rank["single values"] for rank in found])
    assert Error.of(ours, model.double()(torch.cat(xs).double()).detach()).within(tolerance(torch.float32, 10**3))


def test_one_process_is_batch_norm():
    """Without a process group, SyncBatchNorm is BatchNorm, on a CPU too."""
    model = sync_ranks.network()
    shared = nn.SyncBatchNorm.convert_sync_batchnorm(copy.deepcopy(model))
    convert_(shared)
    assert explain(shared).rows[0].state == "converted"
    x = torch.randn(2, 24, *sync_ranks.IMAGE)
    with backend("kernels"):
        assert torch.equal(shared(x), model(x))
    for ours, theirs in zip(shared.buffers(), model.buffers(), strict=True):
        assert torch.equal(ours, theirs)
