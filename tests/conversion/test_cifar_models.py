"""convert_ on GoogLeNets for CIFAR images, whose third branch has two 3x3: whole networks and single blocks."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batch_norm_cases import check_each_gradient, check_each_slice, forward, make_norms
from checks.block_cases import DTYPES, Block
from cifar_models import ALIGNED, CLIENTS, FULL, ODD, images, network
from clients import drawn
from inception_fused import backend, convert, convert_, explain, inception, revert_
from inception_fused.conversion.fused_blocks import view_of
from inception_fused.conversion.inspection import eager_reason
from inception_fused.plan.pairs import PAIRS
from inception_fused.runtime.submit import count
from inception_fused.testing import assert_parity
from marks import each_once, more, quick

LAUNCHES = 6
"""Of a block's forward: pack, the reductions, the projection, three windows."""

PAIRED = tuple(pair.function for pair in PAIRS)


def kernels(launches):
    """Launches, of which a pair is two."""
    return sum(1 + name.startswith(PAIRED) for name in launches)


EVERY_NAME = pytest.mark.parametrize("name", CLIENTS)
EVERY_NETWORK = pytest.mark.parametrize("name", quick(CLIENTS, "kuangliu", "weiaicunzai"))


@EVERY_NAME
def test_every_block_converts_and_reverts(name):
    net = network(name)
    kinds, state = [type(m) for m in net.modules()], net.state_dict()
    parameters, strides = list(net.parameters()), [p.stride() for p in net.parameters()]
    convert_(net, strict=True)
    found = explain(net.eval())
    assert [(row.name, row.state) for row in found.rows] == [(key, "converted") for key in FULL]
    assert found.notes == (), "their .view is behind a global pool"
    assert all(eager_reason(getattr(net, key)) is None for key in FULL)
    assert list(net.state_dict()) == list(state)
    assert all(a is b for a, b in zip(net.parameters(), parameters, strict=True))
    assert [p.stride() for p in net.parameters()] == strides
    revert_(net)
    assert [type(m) for m in net.modules()] == kinds


@EVERY_NETWORK
def test_evaluation_is_the_originals(name):
    plain = drawn(network(name)).eval()
    fused, x = convert(plain, strict=True), images(name)
    with torch.no_grad():
        truth, eager = copy.deepcopy(plain).double()(x.double()), plain(x)
        with backend("kernels"), count() as launches:
            y = fused(x)
        usual = fused(x)
    assert kernels(launches) == len(FULL) * LAUNCHES
    assert truth.norm() > 0
    least = 1e-6 * truth.norm()
    for found in (y, usual):
        assert (found - truth).norm() < 2 * (eager - truth).norm() + least
        torch.testing.assert_close(found, eager, rtol=1e-5, atol=1e-5)


@EVERY_NETWORK
def test_training_is_the_originals_bit_for_bit(name):
    """With batch statistics every block runs its own forward, in channels_last."""

    def train(net):
        optimizer = torch.optim.SGD(net.parameters(), 0.02, momentum=0.9)
        torch.manual_seed(1)
        losses = []
        for _ in range(2):
            x = images(name, 6).contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(net(x), torch.randint(10, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain = network(name).to(memory_format=torch.channels_last)
    fused = convert(plain, strict=True)
    assert train(fused) == train(plain)
    for (key, a), (_, b) in zip(fused.state_dict().items(), plain.state_dict().items(), strict=True):
        assert torch.equal(a, b), key
    for key in FULL:
        assert eager_reason(getattr(fused, key)) is None


def block_of(name, sizes):
    return drawn(CLIENTS[name].block(*sizes)).eval()


@each_once
@EVERY_NAME
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", [ALIGNED, ODD], ids=["aligned", "odd"])
def test_each_slice_and_gradient_with_frozen_statistics(name, dtype, sizes):
    """Of a block in eval mode whose parameters are all trainable."""
    plain = CLIENTS[name].block(*sizes).eval()
    convs, layers = ([m for m in plain.modules() if type(m) is kind] for kind in (nn.Conv2d, nn.BatchNorm2d))
    with torch.no_grad():
        for layer, norm in zip(layers, make_norms([conv.weight for conv in convs]), strict=True):
            for kept, value in zip(
                (layer.weight, layer.bias, layer.running_mean, layer.running_var), norm, strict=False
            ):
                kept.copy_(value)
    fused = convert(plain.to(dtype), strict=True)
    x = torch.randn(2, sizes.inputs, 5, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    params = view_of(fused).params()
    norms = params.batch_norms
    block = Block(x, list(params.weights), list(params.biases), True)
    with torch.no_grad():
        out = forward(block, norms)
    check_each_slice(block, norms, out)
    leaves = [x.requires_grad_(), *params.weights, *params.biases]
    leaves += [getattr(norm, field) for field in ("gamma", "beta") for norm in norms]
    assert len(leaves) == 1 + len(list(fused.parameters()))
    with backend("kernels"), count() as launches:
        y = fused(x)
    assert kernels(launches) == LAUNCHES
    assert torch.equal(y, out[0])
    dy = torch.randn_like(y)
    check_each_gradient(block, norms, torch.autograd.grad(y, leaves, dy), out, dy)


@EVERY_NAME
def test_a_block_is_as_exact_as_eager(name):
    """Each slice and gradient of the block as its user calls it."""
    block, x = convert_(block_of(name, ODD), strict=True), torch.randn(2, ODD.inputs, 5, 4)
    with backend("kernels"):
        assert_parity(block, x)
    assert_parity(block, x)


@EVERY_NAME
def test_nan_passes_as_in_the_original(name):
    plain = block_of(name, ODD)
    fused, x = convert(plain, strict=True), torch.randn(2, ODD.inputs, 7, 6)
    x[0, 3, 2, 2] = float("nan")
    with torch.no_grad(), backend("kernels"):
        y, truth = fused(x), plain(x)
    assert truth.isnan().any()
    assert not truth.isnan().all()
    assert torch.equal(y.isnan(), truth.isnan())


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
@EVERY_NAME
def test_copies_and_pickles_are_converted_too(name, twin):
    fused, x = convert_(block_of(name, ODD), strict=True), torch.randn(1, ODD.inputs, 4, 3)
    other = twin(fused)
    with torch.no_grad(), backend("kernels"):
        assert torch.equal(other(x), fused(x))


@pytest.mark.parametrize("name", ["weiaicunzai", more("kuangliu")])
def test_a_traced_or_compiled_block_is_the_same(name):
    block, x = convert_(block_of(name, ODD), strict=True), torch.randn(2, ODD.inputs, 4, 3)
    with torch.no_grad(), backend("kernels"):
        y = block(x)
        compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(compiled(x), y)
        torch.testing.assert_close(torch.fx.symbolic_trace(block)(x), y, rtol=1e-5, atol=1e-5)


def test_an_integer_eps_is_the_number_that_it_is():
    """weiaicunzai's eps is as many as the channels."""
    fused, x = convert_(block_of("weiaicunzai", ODD), strict=True), torch.randn(2, ODD.inputs, 4, 3)
    assert type(fused.branch3[4].eps) is int
    params = view_of(fused).params()
    as_float = params._replace(batch_norms=tuple(n._replace(eps=float(n.eps)) for n in params.batch_norms))
    with torch.no_grad(), backend("kernels"):
        assert torch.equal(fused(x), inception(x, as_float))
