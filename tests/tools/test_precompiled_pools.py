"""precompile() makes GoogLeNet's max-pools of stride 2 ready, b1's with bias and ReLU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from inception_fused import FusedInception, backend, precompile
from inception_fused.modules.entry import FusedEntry
from inception_fused.modules.pools import FusedPool
from inception_fused.op import pools
from inception_fused.tools.capture import Item
from inception_fused.tools.pool_calls import PoolCall, pools_of

CONFIG = (24, 16, (8, 24), (8, 16), 8)


@pytest.fixture
def planned(monkeypatch):
    """What of the pools was planned, in order."""
    calls = []
    for name in ("_planned_forward", "_planned_backward"):
        plan = getattr(pools, name)
        monkeypatch.setattr(pools, name, lambda *args, _n=name, _p=plan: (calls.append(_n), _p(*args))[1])
    return calls


def model(*, bias=True):
    torch.manual_seed(1)
    conv = nn.Conv2d(1, 24, 7, stride=2, padding=3, bias=bias)
    b1 = FusedEntry(conv, nn.ReLU(), FusedPool(3, 2, 1))
    return nn.Sequential(b1, FusedInception(*CONFIG), FusedPool(3, 2, 0, ceil_mode=True))


X = torch.randn(2, 1, 21, 26, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_afterwards_nothing_is_planned(bias, autocast, planned):
    net = model(bias=bias)
    with backend("kernels"), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = precompile(net, X, progress=False)
        assert (found.blocks, found.skipped) == (("1",), {})
        assert {"_planned_forward", "_planned_backward"} == set(planned)
        planned.clear()
        net(X).square().mean().backward()
        with torch.no_grad():
            net(X)
    assert planned == []


def test_the_model_is_left_as_it_was():
    net = model()
    before = {name: p.clone() for name, p in net.named_parameters()}
    with backend("kernels"):
        precompile(net, X, progress=False)
    assert all(p.grad is None and torch.equal(p, before[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize("frozen", [False, True])
def test_what_has_no_backward_compiles_none(frozen, planned):
    net = model().requires_grad_(not frozen)
    with backend("kernels"):
        precompile(net, X, backward=False, progress=False)
    assert "_planned_backward" not in planned


def test_a_pool_that_pytorch_computes_is_left_out(planned):
    """One with dilation, one that was not called; and all of them where no kernel runs."""
    net = model()
    net[2].dilation = 2
    with backend("kernels"):
        assert PoolCall.of(net[2], Item("2", None, torch.ones(1, 24, 9, 9))) is None
        assert PoolCall.of(net[0], Item("0", None, None)) is None
    precompile(net, X, progress=False)
    assert planned == []


def test_the_pool_within_b1_is_b1s():
    """Unless its layers run one by one."""
    net = model()
    assert list(pools_of(net)) == ["0", "2"]
    net[0][1].register_forward_hook(lambda layer, args, y: y)
    assert list(pools_of(net)) == ["0.2", "2"]
    assert list(pools_of(net[0][2:])) == ["2"]
