"""A third branch of two 3x3 through autograd: what is saved, every gradient alone, NaN and ties, repeats, graphs.

That each slice and gradient is right, in three dtypes and odd sizes, is asked where the kernels are: tests/kernels.
"""

import pytest
import torch

from batch_norm_cases import call, check_each_gradient, check_each_slice, forward, leaves_of, make_norms
from checks.block_cases import DTYPES, ODD, SMALL, backward, check_backward, check_gradients, check_kernels, make_block
from inception_fused import (
    FusedInception,
    Inception,
    InceptionConfig,
    InceptionInputError,
    InceptionParams,
    backend,
    inception,
)
from inception_fused.block.chains import DOUBLE
from inception_fused.block.tolerance import gradient_names
from inception_fused.op import operators
from inception_fused.op.gradients import saves
from inception_fused.testing import Error, tolerance
from marks import each_once, full, quick

NAMES = gradient_names(DOUBLE.names)
TINY = InceptionConfig(3, 2, (2, 3), (2, 2), 2)
VARIANT = {"branch3_kernel_size": 3, "branch3_convs": 2}


def leaves(block, needs=None):
    tensors = [block.x, *block.weights, *block.biases]
    return [t.clone().requires_grad_(needs is None or need) for t, need in zip(tensors, needs or tensors, strict=False)]


def run(given, activation="relu"):
    count = DOUBLE.count
    return inception(
        given[0], InceptionParams(tuple(given[1 : 1 + count]), tuple(given[1 + count :]) or None), activation=activation
    )


SUBSETS = {name: [n == name for n in NAMES] for name in NAMES} | {
    "frozen weights": [n == "x" for n in NAMES],
    "no dx": [n != "x" for n in NAMES],
    "biases only": [n.endswith("bias") for n in NAMES],
    "weights only": [n.endswith("weight") for n in NAMES],
}


@pytest.mark.parametrize("subset", quick(SUBSETS, "p3_1.weight", "p3_2.weight", "p3_2.bias", "p3_3.weight", "no dx"))
def test_only_the_wanted_gradients(subset):
    """Equal to the full set's, nothing else computed or held."""
    needs = SUBSETS[subset]
    block = make_block(SMALL, (2, 4, 5), double=True)
    dy = torch.randn(2, SMALL.out_channels, 4, 5)
    with backend("kernels"):
        full, some = leaves(block), leaves(block, needs)
        run(full).backward(dy)
        y = run(some)
        held = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8 and t.numel()]
        y.backward(dy)
    wanted = block.needs._replace(x=needs[0], weights=needs[1:8], biases=needs[8:])
    assert len(held) == sum(saves(wanted, True)[1:])
    for name, a, b, need in zip(NAMES, some, full, needs, strict=True):
        assert (a.grad is not None) == need, name
        if need:
            assert Error.of(a.grad, b.grad).within(tolerance(torch.float32, 10**3)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
def test_bytes_kept_for_the_backward(config, dtype):
    """As with one window, and t beside r3 and r5: each part in whole 16 bytes; no bits for t, which masks by itself."""
    pixels = 2 * 5 * 6
    kept = {}
    for double in (False, True):
        block = make_block(config, (2, 5, 6), dtype, double=double)
        kept[double] = [t.numel() * t.element_size() for t in block.forward()[1:]]
    t = -(-config.c3[1] * dtype.itemsize // 16) * 16
    r, bits, taps = kept[False]
    assert kept[True] == [r + pixels * t, bits, taps]


@each_once
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
def test_between_the_windows_any_number_of_channels(config, dtype):
    block = make_block(config, (2, 5, 4), dtype, double=True)
    reduced, middle, out = config.c3[0], config.c3[1] + 8, config.c3[1]
    weights, biases = list(block.weights), list(block.biases)
    weights[4:6] = [0.2 * torch.randn(k, c, 3, 3, dtype=dtype) for k, c in ((middle, reduced), (out, middle))]
    biases[4] = torch.randn(middle, dtype=dtype)
    block = block._replace(weights=weights, biases=biases)
    out = block.forward()
    check_kernels(block, out)
    check_gradients(block, out)


@pytest.mark.parametrize("activation", ["relu", None])
def test_nan_and_ties_pass_as_in_pytorch(activation):
    """A NaN at one pixel reaches what it reaches by way of t too; equal values, as behind ReLU, send their gradient to
    the first."""
    block = make_block(SMALL, (2, 7, 6), double=True, activation=activation)
    x = block.x.relu().mul(4).round().div(4)
    x[0, 3, 2, 2] = float("nan")
    block = block._replace(x=x)
    dy = torch.randn(2, SMALL.out_channels, 7, 6)
    found = {}
    for wish in ("kernels", "eager"):
        with backend(wish):
            given = leaves(block)
            y = run(given, activation)
            y.backward(dy)
        found[wish] = [y.detach(), *(t.grad for t in given)]
    assert found["eager"][0].isnan().any()
    assert not found["eager"][0].isnan().all()
    for name, ours, eager in zip(("y", *NAMES), found["kernels"], found["eager"], strict=True):
        assert torch.equal(ours.isnan(), eager.isnan()), name
        error = Error.of(ours.nan_to_num(), eager.nan_to_num())
        assert error.within(tolerance(torch.float32, 10**3)), name


def test_repeats_are_identical():
    block = make_block(SMALL, (3, 6, 5), torch.bfloat16, double=True)
    dy = torch.randn(3, SMALL.out_channels, 6, 5, dtype=torch.bfloat16)
    runs = []
    with backend("kernels"):
        for _ in range(4):
            given = leaves(block)
            y = run(given)
            y.backward(dy)
            runs.append([y.detach(), *(t.grad for t in given)])
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_launches_from_memory(monkeypatch):
    """From the third call on, on other tensors, beside a block with one window of the same channels."""
    planned = []
    for name in ("_planned_forward", "_planned_backward"):
        plan = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda call, _plan=plan: (planned.append(1), _plan(call))[1])
    for seed in range(4):
        for double in (True, False):
            block = make_block(SMALL, (2, 5, 4), torch.float16, double=double, seed=seed)
            out = block.forward()
            dy = torch.randn_like(out[0])
            grads = backward(block, out, dy)
            check_kernels(block, out)
            check_backward(block, out, dy, grads)
    assert len(planned) == 2 * 2 * 2


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("config", "dtype"), quick([(c, d) for c in (ODD, SMALL) for d in DTYPES], (ODD, torch.float16))
)
def test_batch_norm(config, dtype, bias):
    """In eval mode behind every convolution: each slice and each gradient alone, vectors in fp32."""
    block = make_block(config, (2, 5, 4), dtype, bias=bias, double=True)
    norms = make_norms(block.weights)
    out = forward(block, norms)
    check_each_slice(block, norms, out)
    given, dy = leaves_of(block, norms), torch.randn_like(out[0])
    y = call(given, block, norms)
    assert torch.equal(y, out[0])
    check_each_gradient(block, norms, torch.autograd.grad(y, given, dy), out, dy)


@full
@pytest.mark.parametrize("activation", ["relu", None])
def test_gradcheck_in_float64(activation):
    block = make_block(TINY, (1, 3, 2), torch.float64, double=True, activation=activation)
    given = leaves(block)
    with backend("kernels"):
        assert torch.autograd.gradcheck(lambda *some: run(some, activation), given, fast_mode=True)
        inner = (given[0], given[5])
        assert torch.autograd.gradgradcheck(
            lambda x, w: run((x, *given[1:5], w, *given[6:]), activation), inner, fast_mode=True
        )


@pytest.mark.parametrize("wish", ["kernels", "eager"])
def test_opcheck(wish):
    block = make_block(SMALL, (2, 4, 3), double=True)
    needs = block.needs
    args = (block.x, block.weights, block.biases, True, *saves(needs, True), wish)
    torch.library.opcheck(torch.ops.inception_fused._forward.default, args)
    y, *saved = torch.ops.inception_fused._forward(*args)
    args = (torch.randn_like(y), block.x, *saved, block.weights, block.bias_dtypes, True, needs.flat, wish)
    torch.library.opcheck(torch.ops.inception_fused._backward.default, args)


def test_one_graph():
    torch._dynamo.reset()
    block, x = FusedInception(*SMALL, **VARIANT), torch.randn(2, 24, 4, 3)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    found = []
    with backend("kernels"):
        for module in (block, compiled):
            given = x.clone().requires_grad_()
            block.zero_grad()
            y = module(given)
            y.square().sum().backward()
            found.append([y.detach(), given.grad, *(p.grad.clone() for p in block.parameters())])
    for ours, eager in zip(*found, strict=True):
        assert Error.of(ours, eager).within(tolerance(torch.float32, 10**3))


def test_torch_func():
    block = make_block(SMALL, (2, 4, 3), double=True)
    xs = torch.stack([block.x, 2 * block.x])

    def loss(x):
        return run((x, *block.weights, *block.biases)).square().sum()

    with backend("kernels"):
        ours = torch.func.vmap(torch.func.grad(loss))(xs)
    for given, grad in zip(xs, ours, strict=True):
        x = given.clone().requires_grad_()
        loss(x).backward()
        assert Error.of(grad, x.grad).within(tolerance(torch.float32, 10**3))


WRONG = {
    "convolutions": ({"branch3_convs": 3}, "branch3_convs: got 3, wants 1 or 2"),
    "a flag": ({"branch3_convs": True}, "branch3_convs: got True, wants 1 or 2"),
    "5x5": ({"branch3_convs": 2}, "branch3_convs: got 2 with branch3_kernel_size=5, wants branch3_kernel_size=3"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("kind", [Inception, FusedInception])
def test_wrong_arguments_are_named(kind, name):
    arguments, words = WRONG[name]
    with pytest.raises(InceptionInputError) as caught:
        kind(*SMALL, **arguments)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("wish", ["auto", "kernels"])
def test_wrong_parameters_are_named(wish):
    block = make_block(SMALL, (2, 4, 3), double=True)
    wide = [*block.weights]
    wide[4] = torch.randn(16, 8, 5, 5)
    between = [*block.weights]
    between[5] = torch.randn(16, 9, 3, 3)
    cases = [
        ((wide, block.biases), "p3_2.weight: got shape (16, 8, 5, 5), wants (K, 8, R, R) with kernel 3x3"),
        ((between, block.biases), "p3_3.weight: got shape (16, 9, 3, 3), wants (K, 16, R, R) with kernel 3x3"),
        ((block.weights, block.biases[:6]), "params.biases: got 6 items, wants seven tensors, one for each weight"),
        ((block.weights[:6], block.biases), "params.biases: got 7 items, wants six tensors, one for each weight"),
    ]
    for (weights, biases), words in cases:
        for _ in range(3):
            with backend(wish), pytest.raises(InceptionInputError) as caught:
                inception(block.x, InceptionParams(tuple(weights), tuple(biases)))
            assert words in str(caught.value)
