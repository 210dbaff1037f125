"""BatchNorm in eval mode under compilers, transforms and autocast, and wrong calls with it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from batch_norm_cases import (
    OTHER_DTYPES,
    USUAL_DTYPES,
    call,
    check_each_gradient,
    check_each_slice,
    forward,
    leaves_of,
    make_norms,
    params_of,
)
from checks.block_cases import ODD, SMALL, make_block
from inception_fused import InceptionInputError, InceptionParams, KernelError, backend, inception
from inception_fused.block.folding import flatten
from inception_fused.block.reference import inception_reference
from inception_fused.block.tensor_lists import FIELDS
from inception_fused.op import autograd
from inception_fused.testing import Error, tolerance
from marks import each_once, more


@pytest.mark.parametrize("affine", [more(True), False])
def test_opcheck(affine):
    block = make_block(SMALL, (2, 4, 3))
    more = flatten(make_norms(block.weights, affine))
    args = (block.x, block.weights, block.biases, True)
    for save in (True, False):
        torch.library.opcheck(
            torch.ops.inception_fused._forward.norms, (*args, save, save, save, "kernels", *more)
        )  # fmt: skip
    torch.library.opcheck(torch.ops.inception_fused._infer.norms, (*args, "kernels", *more))


@each_once
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("wish", ["kernels", "auto"])
def test_compiles_as_one_graph(wish, affine):
    torch._dynamo.reset()
    block = make_block(SMALL, (2, 4, 3))
    norms = make_norms(block.weights, affine)
    results = []
    for compiled in (False, True):
        leaves = leaves_of(block, norms)

        def run(x, params):
            return inception(x, params).square().sum()

        run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        with backend(wish):
            loss = run(leaves[0], params_of(leaves, block, norms))
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert Error.of(a, b).within(tolerance(torch.float32, 10**3))
        assert a.stride() == b.stride()


@pytest.mark.parametrize("affine", [more(True), False])
def test_torch_func(affine):
    """Per-sample gradients, an ensemble, statistics that differ from item to item, and a batch of x."""
    block = make_block(SMALL, (2, 4, 3))
    norms = make_norms(block.weights, affine)
    xs = torch.stack([block.x, 2 * block.x, -block.x])
    leaves = [t.detach() for t in leaves_of(block, norms)[1:]]
    ensemble = [torch.stack([t, 2 * t]) for t in leaves]
    stacked = torch.stack([norms[0].mean, norms[0].mean + 1])

    def loss(leaves, x):
        return inception(x, params_of([x, *leaves], block, norms)).square().sum()

    def shifted(mean):
        return inception(block.x, params_of([block.x, *leaves], block, (norms[0]._replace(mean=mean), *norms[1:])))

    results = []
    for wish in ("kernels", "eager"):
        with backend(wish):
            grads = torch.func.grad(loss)(leaves, block.x)
            per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(leaves, xs)
            outs = torch.func.vmap(loss, in_dims=(0, None))(ensemble, block.x)
            batched = torch.func.vmap(lambda x: inception(x, params_of([x, *leaves], block, norms)))(xs)
            moved = torch.func.vmap(shifted)(stacked)
        results.append([*grads, *per_sample, outs, batched, moved])
    for ours, theirs in zip(*results, strict=True):
        assert Error.of(ours, theirs).within(tolerance(torch.float32, 10**4))


def test_statistics_that_are_to_be_learnt():
    """PyTorch has no gradient of them either, and says so."""
    block = make_block(SMALL, (1, 4, 3))
    norms = make_norms(block.weights)
    leaves = leaves_of(block, norms)
    for field in ("mean", "var"):
        learnt = list(norms)
        learnt[2] = norms[2]._replace(**{field: getattr(norms[2], field).clone().requires_grad_()})
        with pytest.raises(KernelError, match="a gradient of BatchNorm's mean or var is wanted"):
            call(leaves, block, learnt)
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_"):
            call(leaves, block, learnt, "auto")
        with torch.no_grad():
            assert torch.equal(call(leaves, block, learnt), forward(block, norms)[0])
        # The Function itself, which finds out when its gradients are asked for.
        vectors, eps = flatten(learnt)
        y, *_ = autograd.FusedInceptionFunction.apply(
            block.x, True, "kernels", (True, True, True), *block.weights, *block.biases, *vectors, tuple(eps)
        )
        with pytest.raises(RuntimeError, match="not differentiable"):
            torch.autograd.grad(y.sum(), getattr(learnt[2], field))


def test_affine_and_not_in_one_block():
    block = make_block(SMALL, (1, 4, 3))
    norms = make_norms(block.weights)
    plain = norms[3]._replace(gamma=None, beta=None)
    others = plain, norms[3]._replace(gamma=None), norms[3]._replace(beta=None)
    mixed = [(*norms[:3], one, *norms[4:]) for one in others]
    for given in (*mixed, tuple(n._replace(beta=None) for n in norms)):
        params = InceptionParams(tuple(block.weights), tuple(block.biases), given)
        truth = inception_reference(block.x, params)
        with backend("kernels"):
            assert Error.of(inception(block.x, params), truth).within(tolerance(torch.float32, 10**3))


@pytest.mark.parametrize(("dtype", "vectors"), USUAL_DTYPES + OTHER_DTYPES, ids=str)
def test_the_reference(dtype, vectors):
    """As the modules would compute it, in any dtypes, and on the path of a CPU in channels_last memory."""
    block = make_block(ODD, (2, 5, 4), dtype)
    norms = make_norms(block.weights, True, vectors)
    params = InceptionParams(tuple(block.weights), tuple(block.biases), norms)

    def conv(x, i):
        module = nn.Sequential(nn.Conv2d(*block.weights[i].shape[1::-1], block.weights[i].shape[2], padding="same"))
        module.append(nn.BatchNorm2d(block.weights[i].shape[0], eps=norms[i].eps)).append(nn.ReLU()).double().eval()
        names = {"0.weight": block.weights[i], "0.bias": block.biases[i]}
        names |= {"1.weight": norms[i].gamma, "1.bias": norms[i].beta}
        names |= {"1.running_mean": norms[i].mean, "1.running_var": norms[i].var}
        module.load_state_dict(names, strict=False)
        return module(x)

    x = block.x.double()
    pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    truth = torch.cat([conv(x, 0), conv(conv(x, 1), 2), conv(conv(x, 3), 4), conv(pooled, 5)], dim=1)
    for y in (inception_reference(block.x, params), inception(block.x, params)):
        assert y.dtype == dtype
        for ours, part in zip(*(t.split(block.shape.branch_channels, dim=1) for t in (y, truth)), strict=True):
            assert Error.of(ours, part).within(4 * tolerance(dtype, 10**3))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_autocast():
    block = make_block(SMALL, (2, 5, 4))
    norms = make_norms(block.weights)
    leaves = leaves_of(block, norms)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(leaves, block, norms)
    assert y.dtype == torch.bfloat16
    rounded = block._replace(x=block.x.bfloat16(), weights=[w.bfloat16() for w in block.weights])
    out = forward(rounded, norms)
    check_each_slice(rounded, norms, out)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    assert {g.dtype for g in grads} == {torch.float32}
    # gamma's gradient is that of the weights as they were given.
    check_each_gradient(rounded, norms, grads, out, dy, tolerance(torch.bfloat16, 1))


def test_an_empty_batch():
    block = make_block(SMALL, (0, 4, 3))
    norms = make_norms(block.weights)
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms)
    assert y.shape == (0, SMALL.out_channels, 4, 3)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), leaves[1:]))


def wrong(index=1, **changes):
    """A call of SMALL's block with one BatchNorm changed."""
    block = make_block(SMALL, (1, 3, 3))
    norms = list(make_norms(block.weights))
    norms[index] = norms[index]._replace(**changes)
    return lambda: inception(block.x, InceptionParams(tuple(block.weights), tuple(block.biases), tuple(norms)))


def wrong_norms(change):
    block = make_block(SMALL, (1, 3, 3))
    norms = change(make_norms(block.weights))
    return lambda: inception(block.x, InceptionParams(tuple(block.weights), None, norms))


WRONG_CALLS = {
    "p2_1 batch_norm.mean: got shape (7,), wants (8,)": wrong(mean=torch.zeros(7)),
    "p2_1 batch_norm.var: got shape (1, 8), wants (8,)": wrong(var=torch.ones(1, 8)),
    "p4_2 batch_norm.gamma: got shape (9,), wants (8,)": wrong(5, gamma=torch.zeros(9)),
    "p2_2 batch_norm.beta: got shape (), wants (24,)": wrong(2, beta=torch.zeros(())),
    "x: got device cpu, p2_1 batch_norm.beta is on meta": wrong(beta=torch.zeros(8, device="meta")),
    "p2_1 batch_norm.mean: got torch.int64, wants a floating": wrong(mean=torch.zeros(8).long()),
    "p2_1 batch_norm.gamma: got torch.int32, wants a floating": wrong(gamma=torch.zeros(8).int()),
    "p2_1 batch_norm.var: got None, wants a tensor, or None for both": wrong(var=None),
    "p2_1 batch_norm.gamma: got float, wants a tensor": wrong(gamma=1.0),
    "p2_1 batch_norm.eps: got -1.0, wants a number of at least 0": wrong(eps=-1.0),
    "p2_1 batch_norm.eps: got nan, wants a number": wrong(eps=float("nan")),
    "p2_1 batch_norm.eps: got None, wants a number": wrong(eps=None),
    "params.batch_norms: got 5 items, wants six BatchNorm": wrong_norms(lambda n: n[:5]),
    "params.batch_norms: got 0 items, wants six BatchNorm": wrong_norms(lambda n: ()),
    "params.batch_norms: got BatchNorm2d, wants six BatchNorm": wrong_norms(lambda n: nn.BatchNorm2d(8)),
    "params.batch_norms: got tuple for p3_1, wants six BatchNorm": wrong_norms(lambda n: (*n[:3], tuple(n[3]), *n[4:])),
}


@pytest.mark.parametrize("wish", ["auto", "kernels"])
@pytest.mark.parametrize("words", WRONG_CALLS)
def test_wrong_call(words, wish):
    for _ in range(3):
        with backend(wish), pytest.raises(InceptionInputError) as caught:
            WRONG_CALLS[words]()
        assert words in str(caught.value)


@pytest.mark.parametrize("eps", [0, more(1), more(0.0)])
def test_eps_that_are_odd_but_right(eps):
    block = make_block(SMALL, (1, 4, 3))
    norms = [n._replace(eps=eps) for n in make_norms(block.weights)]
    check_each_slice(block, norms, forward(block, norms))
    with backend("kernels"):
        y = inception(block.x, InceptionParams(tuple(block.weights), tuple(block.biases), norms))
    assert torch.equal(y, forward(block, norms)[0])


def test_the_operators_check_their_lists():
    block = make_block(SMALL, (1, 3, 3))
    norms, eps = flatten(make_norms(block.weights))
    for given, words in (
        ((norms[:18], eps), "norms: got 18 and 6 eps, wants 12 or 24"),
        ((norms, eps[:5]), "norms: got 24 and 5 eps"),
        ((norms, []), "norms: got 24 and 0 eps"),
        (([*norms[:23], norms[0]], eps), "p4_2 batch_norm.beta: got shape .16,., wants .8,."),
    ):
        with pytest.raises(InceptionInputError, match=words):
            torch.ops.inception_fused._infer(*block, "kernels", *given)
    assert FIELDS == ("mean", "var", "gamma", "beta")


@pytest.mark.parametrize("before", [0, 3], ids=["planned", "remembered"])
def test_what_was_swapped_between_forward_and_backward(before):
    block = make_block(SMALL, (2, 5, 4))
    for i in range(before + 1):
        norms = make_norms(block.weights)
        leaves = leaves_of(block, norms)
        y = call(leaves, block, norms)
        if i < before:
            y.sum().backward()
    norms[2].var.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
