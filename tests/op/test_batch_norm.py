"""BatchNorm in eval mode behind every convolution: each slice and gradient against float64."""

import pytest
import torch

from batch_norm_cases import (
    CASES,
    KINDS,
    call,
    check_each_gradient,
    check_each_slice,
    forward,
    leaves_of,
    make_norms,
    names_of,
    params_of,
)
from checks.block_cases import REDUCE_24, SMALL, in_layout, make_block
from inception_fused import BatchNorm, InceptionConfig, backend, inception
from inception_fused.block.folding import flatten, operator_needs
from inception_fused.block.tensor_lists import Flags
from inception_fused.op import operators
from inception_fused.op.saved import saves
from inception_fused.runtime import replay
from inception_fused.runtime.submit import count
from inception_fused.testing import Error, tolerance
from marks import each_once, full, more, quick

EPS = [1e-5] * 6


@pytest.mark.parametrize(("dtype", "vectors", "config", "bias", "affine"), quick(CASES, CASES[0], CASES[-1]))
def test_each_slice_and_gradient(dtype, vectors, config, bias, affine):
    block = make_block(config, (2, 5, 4), dtype, bias=bias)
    norms = make_norms(block.weights, affine, vectors)
    out = forward(block, norms)
    check_each_slice(block, norms, out)
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms)
    assert torch.equal(y, out[0])
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    check_each_gradient(block, norms, grads, out, dy)
    for g, t in zip(grads[1:], leaves[1:], strict=True):
        assert (g.dtype, g.stride()) == (t.dtype, t.stride())


@pytest.mark.parametrize("options", [{"activation": None}, {"branch3": 3}], ids=str)
def test_variants(options):
    block = make_block(SMALL, (2, 5, 4), torch.bfloat16, **options)
    norms = make_norms(block.weights)
    out = forward(block, norms)
    check_each_slice(block, norms, out)
    leaves, dy = leaves_of(block, norms), torch.randn_like(out[0])
    check_each_gradient(block, norms, torch.autograd.grad(call(leaves, block, norms), leaves, dy), out, dy)


@pytest.mark.parametrize("layout", ["KRSC", more("strided"), more("transposed")])
def test_layouts_of_weights_and_vectors(layout):
    block = make_block(SMALL, (2, 5, 4))
    block = block._replace(weights=in_layout(block.weights, layout))
    norms = [BatchNorm(*(torch.stack((t, t), dim=1)[:, 0] for t in n[:4]), n.eps) for n in make_norms(block.weights)]
    check_each_slice(block, norms, forward(block, norms))
    leaves = [block.x, *block.weights, *block.biases, *flatten(norms)[0][12:]]
    leaves = [t.requires_grad_() for t in leaves]
    y = call(leaves, block, norms)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        out = forward(block, norms)
    check_each_gradient(block, norms, grads, out, dy)
    assert all(g.stride() == torch.empty_like(t).stride() for g, t in zip(grads[1:], leaves[1:], strict=True))


@each_once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("wish", "affine"), [("eager", True), ("eager", False), *((f"K{k}=triton", True) for k in (1, 2, 3, 4))]
)
def test_twins(wish, affine, dtype):
    """In ATen a product is rounded to dtype before it is scaled, which a mean beside it makes larger."""
    block = make_block(SMALL, (2, 4, 5), dtype)
    norms = make_norms(block.weights, affine)
    with count() as names:
        out = forward(block, norms, wish)
    assert len(names) == (0 if wish == "eager" else 2), "pack and the kernel"
    check_each_slice(block, norms, out, factor=2)
    dy = torch.randn_like(out[0])
    leaves = leaves_of(block, norms)
    if wish != "eager":
        grads = torch.autograd.grad(call(leaves, block, norms, wish), leaves, dy)
        check_each_gradient(block, norms, grads, out, dy, tolerance(dtype, 1))


def test_the_compiled_kernel(installed):
    block = make_block(REDUCE_24, (1, 5, 4), torch.bfloat16)
    norms = make_norms(block.weights)
    wish = "K1=native,K2=triton,K3=triton,K4=triton"
    for _ in range(3):
        installed.calls()
        out = forward(block, norms, wish)
        assert [name for name, _ in installed.calls()].count("launch") == 1
        check_each_slice(block, norms, out)


@pytest.mark.parametrize(
    "fields", [more(("gamma",)), more(("beta",)), ("weight",), more(("bias",)), more(("x",)), ("gamma", "x")], ids=str
)
def test_only_the_wanted_gradients(fields):
    block = make_block(SMALL, (2, 4, 5))
    norms = make_norms(block.weights)
    names = names_of(block, norms)
    needs = {name for name in names if (name == "x" and "x" in fields) or name.split(".")[-1] in fields}
    full, some = leaves_of(block, norms), leaves_of(block, norms, needs)
    y = call(full, block, norms)
    dy = torch.randn_like(y)
    y.backward(dy)
    y = call(some, block, norms)
    held = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8 and t.numel()]
    y.backward(dy)
    flags = [name in needs for name in names]
    flags[13:13] = [False] * 12
    _, *bytes_saved = saves(Flags.of(flags, EPS), True)
    assert len(held) == sum(bytes_saved)
    for name, a, b in zip(names, some, full, strict=True):
        assert (a.grad is not None) == (name in needs), name
        if name in needs:
            assert torch.equal(a.grad, b.grad), name


def test_what_the_operator_is_asked_for():
    """gamma wants W and shift, beta shift, of its own convolution."""
    nothing = [False] * 13
    for affine, biases in ((24, 6), (24, 0), (12, 6), (12, 0)):
        for i in range(7 + biases + affine):
            needs = [j == i for j in range(7 + biases + affine)]
            k = (i - 7 - biases) % 6
            expected = list(nothing)
            for place in (
                (i,) if i < 7 + biases
                else () if i < 19 + biases
                else (1 + k, 7 + k) if i < 25 + biases
                else (7 + k,)
            ):  # fmt: skip
                expected[place] = True
            assert operator_needs(Flags.of(needs, EPS)).flat == expected
    assert operator_needs(Flags.of([True] * 7)).flat == [True] * 7 + [False] * 6


@pytest.mark.parametrize(("bias", "affine"), quick(KINDS, (True, True)))
def test_launches(bias, affine):
    """pack and two, whether the weights want it or not; eleven for the gradients."""
    block = make_block(SMALL, (2, 4, 5), bias=bias)
    for layout in ("KCRS", "KRSC"):
        given = block._replace(weights=in_layout(block.weights, layout))
        norms = make_norms(block.weights, affine)
        leaves = leaves_of(given, norms)
        with count() as names:
            y = call(leaves, given, norms)
        assert len(names) == 3
        assert names[0].startswith("pack_kernel")
        with count() as names:
            y.sum().backward()
        assert len(names) == 11
        with torch.no_grad(), count() as names:
            call(leaves, given, norms)
        assert len(names) == 3


TINY = InceptionConfig(3, 2, (2, 3), (2, 2), 2)


@full
@pytest.mark.parametrize(("bias", "affine"), [more(True, True), (False, False)])
def test_gradcheck_in_float64(bias, affine):
    """Gradients of the kernels by finite differences, and theirs through the reference."""
    block = make_block(TINY, (1, 3, 2), torch.float64, bias=bias)
    norms = make_norms(block.weights, affine, torch.float64)
    leaves = leaves_of(block, norms)

    def run(*leaves):
        return inception(leaves[0], params_of(list(leaves), block, norms))

    with backend("kernels"):
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    second = {}
    for wish in ("kernels", "eager"):
        with backend(wish):
            firsts = torch.autograd.grad(run(*leaves).square().sum(), leaves, create_graph=True)
            second[wish] = torch.autograd.grad(sum(g.square().sum() for g in firsts), leaves)
    for ours, truth in zip(second["kernels"], second["eager"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vectors", [torch.float32, more(torch.bfloat16), more(torch.float64)], ids=str)
def test_second_order_beside_16_bits(vectors):
    """The reference takes vectors of any dtype there too."""
    block = make_block(SMALL, (1, 3, 3), torch.bfloat16, activation=None)
    norms = make_norms(block.weights, True, vectors)
    results = []
    for wish in ("kernels", "eager"):
        leaves = leaves_of(block, norms)
        (dx,) = torch.autograd.grad(call(leaves, block, norms, wish).square().sum(), leaves[0], create_graph=True)
        dx.float().square().sum().backward()
        results.append([t.grad for t in leaves])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert Error.of(a, b).within(10 * tolerance(torch.bfloat16, 10**3))


@full
@pytest.mark.parametrize(("affine", "dtype"), [(True, torch.float32), more(False, torch.bfloat16)])
def test_from_the_third_call_on(affine, dtype, monkeypatch):
    """From memory, bit for bit, and it sees statistics that were written through .data."""
    block = make_block(SMALL, (2, 5, 4), dtype)
    norms = make_norms(block.weights, affine)
    leaves = leaves_of(block, norms)
    params = params_of(leaves, block, norms)
    plans = []
    for name in ("forward", "backward"):
        plan = getattr(operators, f"_planned_{name}")
        monkeypatch.setattr(
            operators, f"_planned_{name}", lambda *a, plan=plan, name=name: plans.append(name) or plan(*a)
        )  # fmt: skip
    runs = []
    for seed in range(5):
        if seed == 3:
            params.batch_norms[1].mean.data.add_(1)
            params.batch_norms[4].var.data.mul_(3)
        with backend("kernels"):
            y = inception(leaves[0], params)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        runs.append([y, *torch.autograd.grad(y, leaves, dy)])
        if seed == 3:
            out = forward(block, norms)
            assert torch.equal(y, out[0])
            check_each_slice(block, norms, out)
            check_each_gradient(block, norms, runs[-1][1:], out, dy)
    assert plans == ["forward", "backward"] * 2
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
    assert not torch.equal(runs[2][0], runs[3][0])
    with torch.no_grad(), backend("kernels"):
        ys = [inception(leaves[0], params) for _ in range(3)]
    assert all(torch.equal(y, runs[4][0]) for y in ys)
    assert plans.count("forward") == 4


def test_what_makes_a_kind():
    """eps and having gamma at all are no property of the tensors before them."""
    block = make_block(SMALL, (1, 4, 3))
    for _ in range(3):
        for norms in (
            make_norms(block.weights),
            make_norms(block.weights, affine=False),
            [n._replace(eps=0.5) for n in make_norms(block.weights)],
            make_norms(block.weights, dtype=torch.float16),
        ):
            out = forward(block, norms)
            check_each_slice(block, norms, out)
            with torch.no_grad():
                assert torch.equal(call(leaves_of(block, norms), block, norms), out[0]), "inference"
        plain = block.forward()
        assert torch.equal(plain[0], make_block(SMALL, (1, 4, 3)).forward()[0])
    recipes = sum(type(recipe) is replay.Recipe for recipe in replay._recipes.values())
    assert recipes == 4 + 4 + 1, "with saves, for inference, without BatchNorm"
