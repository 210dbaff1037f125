"""BatchNorm behind some convolutions only, of some kinds; a bias on some only; an eps that is an integer."""

import pytest
import torch

from batch_norm_cases import (
    call,
    check_each_gradient,
    check_each_slice,
    doubled,
    forward,
    leaves_of,
    make_norms,
    operands,
    params_of,
    partial_norms,
    partly_biased,
)
from checks.block_cases import DTYPES, ODD, SMALL, make_block
from inception_fused import InceptionInputError, InceptionParams, backend, inception
from inception_fused.block.folding import missing
from inception_fused.block.reference import inception_reference
from inception_fused.op.gradients import saves
from inception_fused.runtime.submit import count
from inception_fused.testing import Error, tolerance
from marks import each_once, quick

KINDS = {
    "some BatchNorms": lambda block: (block, partial_norms(block.weights)),
    "some biases and BatchNorms": lambda block: (partly_biased(block), partial_norms(block.weights)),
    "some biases": lambda block: (partly_biased(block), tuple(None for _ in block.weights)),
    "no bias": lambda block: (block._replace(biases=[]), partial_norms(block.weights)),
}


@each_once
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("double", [False, True], ids=["one window", "two windows"])
@pytest.mark.parametrize("config", [ODD, SMALL], ids=["odd", "aligned"])
def test_each_slice_and_gradient(config, double, dtype, kind):
    block, norms = KINDS[kind](make_block(config, (2, 5, 4), dtype, double=double))
    out = forward(block, norms)
    check_each_slice(block, norms, out)
    given, dy = leaves_of(block, norms), torch.randn_like(out[0])
    y = call(given, block, norms)
    assert torch.equal(y, out[0])
    grads = torch.autograd.grad(y, given, dy)
    check_each_gradient(block, norms, grads, out, dy)
    for g, t in zip(grads, given, strict=True):
        assert (g.dtype, g.shape) == (t.dtype, t.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_the_twins_are_right_too(kind):
    block, norms = KINDS[kind](make_block(SMALL, (2, 5, 4)))
    every = ",".join(f"{kernel}=eager" for kernel in ("K1", "K2", "K3", "K4", "B1", "B2", "B3", "B4", "B5"))
    out = forward(block, norms, every)
    check_each_slice(block, norms, out)
    given, dy = leaves_of(block, norms), torch.randn_like(out[0])
    check_each_gradient(block, norms, torch.autograd.grad(call(given, block, norms, every), given, dy), out, dy)


@pytest.mark.parametrize("wanted", ["p2_1.weight", "p2_1.bias", "p2_2.bias", "p3_1 batch_norm.gamma", "x"])
def test_one_gradient_alone(wanted):
    block = make_block(SMALL, (2, 4, 5))
    norms = partial_norms(block.weights)
    dy = torch.randn(2, SMALL.out_channels, 4, 5)
    every, alone = leaves_of(block, norms), leaves_of(block, norms, [wanted])
    full = torch.autograd.grad(call(every, block, norms), every, dy)
    (leaf,) = [t for t in alone if t.requires_grad]
    (place,) = [i for i, t in enumerate(alone) if t is leaf]
    (found,) = torch.autograd.grad(call(alone, block, norms), [leaf], dy)
    assert Error.of(found, full[place]).within(tolerance(torch.float32, 10**3))


def test_derivatives_of_second_order():
    block, norms = KINDS["some biases and BatchNorms"](make_block(SMALL, (1, 3, 2), torch.float64))
    norms = tuple(map(doubled, norms))
    found = []
    for wish in ("kernels", "eager"):
        given = leaves_of(block, norms)
        firsts = torch.autograd.grad(call(given, block, norms, wish).square().sum(), given, create_graph=True)
        found.append(torch.autograd.grad(sum(g.square().sum() for g in firsts), given))
    for ours, truth in zip(*found, strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", KINDS)
def test_torch_func(kind):
    """Gradients, per-sample gradients, an ensemble, a batch of x."""
    block, norms = KINDS[kind](make_block(SMALL, (2, 4, 3)))
    leaves = [t.detach() for t in leaves_of(block, norms)[1:]]
    xs, ensemble = torch.stack([block.x, 2 * block.x]), [torch.stack([t, 2 * t]) for t in leaves]

    def run(leaves, x):
        return inception(x, params_of([x, *leaves], block, norms))

    def loss(leaves, x):
        return run(leaves, x).square().sum()

    found = []
    for wish in ("kernels", "eager"):
        with backend(wish):
            grads = torch.func.grad(loss)(leaves, block.x)
            per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(leaves, xs)
            outs = torch.func.vmap(run, in_dims=(0, None))(ensemble, block.x)
            batched = torch.func.vmap(run, in_dims=(None, 0))(leaves, xs)
        found.append([*grads, *per_sample, outs, batched])
    for ours, theirs in zip(*found, strict=True):
        assert Error.of(ours, theirs).within(tolerance(torch.float32, 10**4))


def test_the_epilogues_have_one_launch_more_and_no_other():
    """Where a bias is missing pack makes every shift; where all is there nothing is packed."""
    block = make_block(SMALL, (1, 3, 2))
    block = block._replace(weights=[w.contiguous(memory_format=torch.channels_last) for w in block.weights])
    launches = []
    for biases in (block.biases, partly_biased(block).biases):
        with torch.no_grad(), backend("kernels"), count() as names:
            inception(block.x, InceptionParams(tuple(block.weights), tuple(biases)))
        launches.append(len(names))
    assert launches == [2, 3]


@pytest.mark.parametrize("wish", ["kernels", "eager"])
def test_opcheck(wish):
    block, norms = KINDS["some biases and BatchNorms"](make_block(SMALL, (2, 4, 3)))
    weights, biases, vectors, eps = operands(block, norms)
    args = (block.x, weights, biases, True, *saves(block.needs, True), wish, vectors, eps)
    torch.library.opcheck(torch.ops.inception_fused._forward.norms, args)


def test_one_graph():
    torch._dynamo.reset()
    block, norms = KINDS["some biases and BatchNorms"](make_block(SMALL, (2, 4, 3)))

    def run(*given):
        return inception(given[0], params_of(given, block, norms))

    found = []
    with backend("kernels"):
        for function in (run, torch.compile(run, fullgraph=True, backend="aot_eager")):
            given = leaves_of(block, norms)
            y = function(*given)
            found.append([y.detach(), *torch.autograd.grad(y.square().sum(), given)])
    for ours, eager in zip(*found, strict=True):
        assert Error.of(ours, eager).within(tolerance(torch.float32, 10**3))


def test_gradients_under_autocast_are_rounded_once():
    """Those of fp32 parameters with and without BatchNorm: sums of fp32, of which most are no bf16."""
    block = make_block(SMALL, (2, 4, 3))
    norms = partial_norms(block.weights)
    given = leaves_of(block, norms)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(given, block, norms)
    grads = torch.autograd.grad(y.float().square().sum(), given[1 : 1 + len(block.weights)])
    for name, g in zip(block.shape.variant.names, grads, strict=True):
        some = g[g != 0]
        assert g.dtype == torch.float32
        assert (some.bfloat16() != some).float().mean() > 0.5, name


@pytest.mark.parametrize("double", quick([False, True], False))
def test_an_integer_for_eps(double):
    """As BatchNorm2d(n, n) has it: the same bits as with the float, from memory at the third call."""
    block = make_block(SMALL, (1, 4, 3), double=double)
    norms = make_norms(block.weights)
    found = {}
    for kind in (int, float):
        given = tuple(norm._replace(eps=kind(3 + i)) for i, norm in enumerate(norms))
        params = InceptionParams(tuple(block.weights), tuple(block.biases), given)
        with torch.no_grad(), backend("kernels"):
            found[kind] = [inception(block.x, params) for _ in range(3)][-1]
        truth = inception_reference(block.x, params)
        assert Error.of(found[kind], truth).within(tolerance(torch.float32, 24 * 25))
    assert torch.equal(found[int], found[float])


@pytest.mark.parametrize("wish", ["auto", "kernels"])
def test_an_empty_vector_is_no_missing_one(wish):
    block = make_block(SMALL, (1, 4, 3))
    norms = list(make_norms(block.weights))
    norms[1] = norms[1]._replace(mean=torch.empty(0), var=torch.empty(0))
    biases = [torch.empty(0), *block.biases[1:]]
    for given in ((block.biases, norms), (biases, None), (biases, make_norms(block.weights))):
        given, vectors = given
        params = InceptionParams(tuple(block.weights), tuple(given), vectors and tuple(vectors))
        with backend(wish), pytest.raises(InceptionInputError, match="got no elements|got shape \\(0,\\)"):
            inception(block.x, params)


def test_the_operator_refuses_half_of_a_batch_norm():
    block = make_block(SMALL, (1, 4, 3))
    weights, biases, vectors, eps = operands(block, make_norms(block.weights))
    vectors[2] = missing(block.x)
    with pytest.raises(InceptionInputError, match="p2_2 batch_norm: got one of mean and var, wants both or"):
        torch.ops.inception_fused._infer.norms(block.x, weights, biases, True, "kernels", vectors, eps)


WRONG = {
    "a flag for eps": ({"eps": True}, "p3_1 batch_norm.eps: got True, wants a number of at least 0"),
    "no mean": ({"mean": None}, "p3_1 batch_norm.mean: got None, wants a tensor, or None for both"),
    "a short beta": ({"beta": torch.zeros(2)}, "p3_1 batch_norm.beta: got shape (2,), wants (8,)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_named(name):
    block = make_block(SMALL, (1, 4, 3))
    norms = list(partial_norms(block.weights))
    change, words = WRONG[name]
    norms[3] = norms[3]._replace(**change)
    with pytest.raises(InceptionInputError) as caught:
        inception(block.x, InceptionParams(tuple(block.weights), tuple(block.biases), tuple(norms)))
    assert words in str(caught.value)
