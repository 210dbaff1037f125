"""SyncBatchNorm: processes share the statistics of their batches; the truth is BatchNorm on the whole batch."""

import copy

import pytest
import torch
from torch import nn

import sync_ranks
from inception_fused import backend, convert_, explain, revert_
from inception_fused.block import batch_stats
from inception_fused.block.reference import inception_reference
from inception_fused.block.views import ChannelSlice
from inception_fused.op import synchronised
from inception_fused.op.normed_autograd import normed_block
from inception_fused.runtime import aten_norms
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


def test_a_mean_far_from_zero(monkeypatch):
    """fp32 values of mean 1e4 and deviation 1 on two processes, the second with twice as many: rest keeps what their
    mean loses by rounding, in the statistics and in the gradient of raw values."""
    generator, c = torch.Generator().manual_seed(5), 8
    raws = [torch.randn(rows, c, generator=generator) + 1e4 for rows in (150, 300)]
    gs = [torch.randn(raw.shape, generator=generator) + 0.5 for raw in raws]
    vectors = [torch.rand(c, generator=generator) + 0.5, torch.randn(c, generator=generator), None, None]
    columns = [batch_stats.NormColumns(0, c, batch_stats.BATCH, *vectors, 1e-3)]
    tables = [ChannelSlice(torch.empty(batch_stats.SYNCHRONISED, c), c, 0, c) for _ in raws]
    coefficients = [ChannelSlice(torch.empty(batch_stats.COEFFICIENTS, c), c, 0, c) for _ in raws]

    def exchange(share):
        """One call on each process, of which the first only tells what it has."""
        sent = []
        for answer in (None, sent):
            for i in range(len(raws)):
                monkeypatch.setattr(
                    synchronised, "gathered",
                    lambda t, group, answer=answer: torch.stack(answer or [sent.append(t.clone()) or t]),
                )  # fmt: skip
                share(i)

    def statistics(i):
        raw, parts = ChannelSlice(raws[i], c, 0, c), torch.empty(1, 2, c)
        aten_norms.norm_stats(raw, parts, gemm_m=len(raws[i]), ranges=(1, 1))
        aten_norms.norm_combine(parts, raw, columns, tables[i], gemm_m=len(raws[i]), rows=len(raws[i]))
        synchronised.share_statistics(tables[i], columns, rows=len(raws[i]), group="")

    exchange(statistics)
    assert torch.equal(*(table.base for table in tables))
    leaves = [t.double().requires_grad_() for t in (torch.cat(raws), *vectors[:2])]
    y = nn.functional.batch_norm(leaves[0], None, None, *leaves[1:], True, 0.0, 1e-3)
    table = tables[0].base
    ours = batch_stats.normalised(torch.cat(raws), table, torch.float32)
    assert Error.of(ours, y.detach()).within(tolerance(torch.float32, 1))
    y.backward(torch.cat(gs).double())

    def sums(i):
        away = gs[i] * (raws[i] - table[batch_stats.MEAN])
        parts = torch.stack([gs[i].sum(0), away.sum(0)])[None]
        coefficients[i].base[0] = table[batch_stats.SCALE]
        synchronised.share_sums(parts, tables[i], columns, coefficients[i], group="")

    exchange(sums)
    c0, c1, c2 = coefficients[1].base
    ours = c0 * torch.cat(gs) - c1 * (torch.cat(raws) - table[batch_stats.MEAN]) - c2
    assert Error.of(ours, leaves[0].grad).within(tolerance(torch.float32, len(ours)))
