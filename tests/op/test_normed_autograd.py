"""Autograd and operators of a block whose BatchNorm takes the statistics of the batch: subsets and orders of gradients,
what is kept, opcheck, kernels one by one, what is refused."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from batch_norm_cases import leaves_of, names_of, params_of
from checks.block_cases import ODD, SMALL, make_block
from inception_fused import InceptionInputError, inception
from inception_fused.block import batch_stats, folding
from inception_fused.block.chains import BLOCKS
from inception_fused.block.reference import InceptionParams, inception_reference
from inception_fused.op import calls
from inception_fused.plan import choice
from inception_fused.runtime.submit import count
from marks import full, more, quick
from normed_cases import KINDS, MIXED, TINY, call, check, forward, norms_of, wishes


def counted(run):
    with count() as names:
        result = run()
    return result, len(names)


@wishes
@pytest.mark.parametrize("kinds", ["all", more("mixed")])
@pytest.mark.parametrize("relu", ["relu", more(None)])
def test_only_the_wanted_gradients(kinds, relu, wish):
    """Each alone: the bits of all together, nothing kept that no gradient reads, and fewer launches."""
    block = make_block(SMALL, (2, 4, 5), activation=relu)
    norms = norms_of(block, KINDS[kinds])
    names, dy = names_of(block, norms), torch.randn(2, SMALL.out_channels, 4, 5)
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms, wish)
    expected, most = counted(lambda: torch.autograd.grad(y, leaves, dy, retain_graph=True))
    launched = {}
    for i, name in enumerate(names):
        if wish == "kernels" and name not in ("x", "p2_1.weight", "p1_1.weight", "p1_1 batch_norm.gamma"):
            continue
        some = leaves_of(block, norms, {name})
        y = call(some, block, norms, wish)
        (g,), launched[name] = counted(lambda y=y, t=some[i]: torch.autograd.grad(y, [t], dy))
        assert torch.equal(g, expected[i]), name
    if wish == "kernels":
        assert max(launched.values()) < most
        assert launched["p1_1.weight"] < launched["p2_1.weight"] < launched["x"]
        if kinds == "all":
            # N4, N5 and no more: what lies behind the sums is not asked for.
            assert launched["p1_1 batch_norm.gamma"] <= launched["p1_1.weight"]


@pytest.mark.parametrize("subset", range(6))
def test_any_subset_of_gradients(subset):
    block = make_block(SMALL, (2, 3, 4), double=subset % 2 == 1, branch3=3, bias=subset % 3 > 0)
    norms = norms_of(block, KINDS[("all", "mixed", "otherwise")[subset % 3]])
    names = names_of(block, norms)
    dy = torch.randn(2, SMALL.out_channels, 3, 4)
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms)
    expected = dict(zip(names, torch.autograd.grad(y, leaves, dy), strict=True))
    generator = torch.Generator().manual_seed(subset)
    for _ in range(12):
        chosen = {name for name in names if torch.rand((), generator=generator) < 0.3} or {names[0]}
        some = leaves_of(block, norms, chosen)
        call(some, block, norms).backward(dy)
        for name, t in zip(names, some, strict=True):
            assert (t.grad is not None) == (name in chosen), name
            assert t.grad is None or torch.equal(t.grad, expected[name]), (name, chosen)


def by_reference(leaves, block, norms):
    return inception_reference(leaves[0], params_of(leaves, block, norms), "relu" if block.relu else None)


def in_float64(config=TINY, shape=(2, 3, 2), kinds="all", **options):
    block = make_block(config, shape, torch.float64, **options)
    return block, norms_of(block, KINDS[kinds], dtype=torch.float64)


def batch_norm_thrice():
    """Whether PyTorch has third derivatives of its own BatchNorm: 2.14 refuses them."""
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    value = F.batch_norm(x, None, None, None, None, True, 0.0, 1e-3)
    for _ in range(2):
        (value,) = torch.autograd.grad(value.pow(3).sum(), x, create_graph=True)
    try:
        torch.autograd.grad(value.square().sum(), x)
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"double": True, "branch3": 3}, {"activation": None}, {"bias": False}], ids=str
)
def test_higher_derivatives(options, kinds):
    """Through the reference, with the masks of the forward, as often as PyTorch differentiates it."""
    block, norms = in_float64(kinds=kinds, **options)
    leaves, found, thrice = leaves_of(block, norms), [], batch_norm_thrice()
    for run in (call, by_reference):
        y = run(leaves, block, norms)
        firsts = torch.autograd.grad(y.square().sum() + y.sin().sum(), leaves, create_graph=True, allow_unused=True)
        total = sum((g * (g + 1)).sum() for g in firsts)
        seconds = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in seconds[:3])
        thirds = torch.autograd.grad(total, leaves, allow_unused=True) if thrice else ()
        found.append([y, *firsts, *seconds, *thirds])
    for ours, truth in zip(*found, strict=True):
        if ours is None or truth is None:
            assert all(g is None or g.abs().max() < 1e-9 for g in (ours, truth))
            continue
        torch.testing.assert_close(ours, truth, rtol=1e-8, atol=1e-8)


@full
@pytest.mark.parametrize("kinds", KINDS)
def test_gradcheck(kinds):
    block, norms = in_float64(kinds=kinds)
    leaves = leaves_of(block, norms)
    assert torch.autograd.gradcheck(lambda *some: call(list(some), block, norms), leaves, fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda *some: call(list(some), block, norms), leaves, fast_mode=True)


@wishes
def test_several_gradients_at_once(wish):
    """is_grads_batched, and one after the other through a retained graph."""
    block = make_block(SMALL, (2, 4, 3))
    norms = norms_of(block)
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms, wish)
    several = torch.randn(3, *y.shape)
    together = torch.autograd.grad(y, leaves, several, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(several):
        each = torch.autograd.grad(y, leaves, dy, retain_graph=True)
        for name, g, batched in zip(names_of(block, norms), each, together, strict=True):
            # The bias before a mean has a gradient of 0, or of what rounding leaves of it.
            assert (batched[i] - g).abs().max() <= 1e-5 * max(1, g.square().mean().sqrt()), name


def test_what_may_be_changed_before_the_backward():
    """Biases and betas, as beside PyTorch's own layers; not x, weights or gammas. y may be changed in place."""
    block = make_block(SMALL, (2, 4, 3))
    norms = norms_of(block)
    names = names_of(block, norms)
    dy = torch.randn(2, SMALL.out_channels, 4, 3)
    leaves = leaves_of(block, norms)
    expected = torch.autograd.grad(call(leaves, block, norms), leaves, dy)
    for i, name in enumerate(names):
        for second in (False, True):
            leaves = leaves_of(block, norms)
            y = call(leaves, block, norms)
            with torch.no_grad():
                leaves[i].add_(0.5)
            if name.endswith(("bias", "beta")):
                found = torch.autograd.grad(y, leaves, dy, create_graph=second)
                if not second:
                    assert all(map(torch.equal, found, expected)), name
            else:
                with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                    torch.autograd.grad(y, leaves, dy, create_graph=second)
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms)
    y.mul_(2).relu_()
    assert all(map(torch.equal, torch.autograd.grad(y, leaves, dy / 2), expected))


@pytest.mark.parametrize("kinds", quick(KINDS, "mixed"))
@pytest.mark.parametrize("options", [{}, {"double": True, "branch3": 3, "bias": False}], ids=str)
def test_opcheck(kinds, options):
    block = make_block(ODD, (2, 4, 3), **options)
    norms = norms_of(block, KINDS[kinds])
    weights, biases, vectors, eps = folding.tensors_of(
        InceptionParams(tuple(block.weights), tuple(block.biases) or None, norms)
    )
    modes = batch_stats.modes_of(norms)
    weights, biases, vectors = ([t.detach() for t in some] for some in (weights, biases, vectors))
    utils = ("test_schema", "test_faketensor", "test_autograd_registration")
    for saves in ([True] * 4, [False] * 4, [True, False, False, True]):
        args = (block.x, weights, biases, vectors, eps, modes, True, *saves, "auto")
        torch.library.opcheck(torch.ops.inception_fused._normed.default, args, test_utils=utils)
    out = forward(block, norms)
    dtypes = ["float32", "bfloat16", ""] * len(weights)
    for needs in ([True] * (1 + 2 * len(weights)), [True] + [False] * (2 * len(weights))):
        args = (torch.randn_like(out.y), block.x, *out.saved, weights, eps, modes, dtypes, True, needs, "auto")
        torch.library.opcheck(torch.ops.inception_fused._normed_backward.default, args, test_utils=utils)


@pytest.mark.parametrize("kernel", quick(choice.KERNELS, "N3"))
@pytest.mark.parametrize("dtype", [torch.float32, more(torch.bfloat16)], ids=str)
def test_single_kernels(kernel, dtype):
    """One by its twin, the others Triton's: the mask of the backward is the forward's, whichever made it."""
    block = make_block(SMALL, (2, 4, 5), dtype, double=True, branch3=3)
    norms = norms_of(block, MIXED)
    check(block, norms, ",".join(f"{name}={'eager' if name == kernel else 'triton'}" for name in choice.KERNELS))


@pytest.mark.parametrize("dtype", [torch.float32, more(torch.float16), more(torch.bfloat16)], ids=str)
def test_twins_and_kernels_normalise_alike(dtype):
    """From the same raw values and statistics the same bits of y, so the same mask."""
    block = make_block(ODD, (2, 7, 5), dtype)
    norms = norms_of(block, MIXED)
    names = [name for name in choice.KERNELS if name[0] == "N"]
    results = [
        forward(block, norms, ",".join([*(f"{k}=eager" for k in choice.KERNELS if k not in names[2:3]), f"N3={form}"]))
        for form in ("eager", "triton")
    ]
    assert torch.equal(results[0].saved.stats[:, block.shape.k :], results[1].saved.stats[:, block.shape.k :])
    for a, b in zip((results[0].y, *results[0].saved), (results[1].y, *results[1].saved), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("affine", [True, False])
def test_the_fast_form_of_what_operators_take(affine, kinds, monkeypatch):
    """That of every call of a network in training is the slow one's list, and as strict."""
    block = make_block(SMALL, (2, 4, 3))
    norms = norms_of(block, KINDS[kinds], affine)
    params = InceptionParams(tuple(block.weights), tuple(block.biases), norms)
    usual = affine and kinds == "all"
    assert (folding.flat_if_batch(norms) is not None) == usual
    assert calls._fits(block.x, params, BLOCKS) == usual
    found = folding.flatten(norms, block.x)
    monkeypatch.setattr(folding, "flat_if_batch", lambda _: None)
    for a, b in zip(found[0], folding.flatten(norms, block.x)[0], strict=True):
        assert a is b or (folding.is_missing(a) and folding.is_missing(b))
    assert found[1] == folding.flatten(norms, block.x)[1]


WRONG = {
    "p1_1 batch_norm.gamma: got shape": {"gamma": torch.ones(3)},
    "p1_1 batch_norm.beta: got float, wants a tensor": {"beta": 1.0},
    "p1_1 batch_norm.gamma: got float, wants a tensor": {"gamma": 1.0},
    "p1_1 batch_norm.gamma: got torch.int64, wants a floating": {"gamma": torch.ones(16).long()},
    "p1_1 batch_norm.eps: got nan": {"eps": float("nan")},
    "p1_1 batch_norm.eps: got -1": {"eps": -1},
    "p1_1 batch_norm.eps: got True": {"eps": True},
    "p1_1 batch_norm.mean: got None, wants a tensor, or None": {"var": torch.ones(16)},
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_named(words):
    block = make_block(SMALL, (2, 4, 3))
    norms = norms_of(block)
    norms = (norms[0]._replace(**WRONG[words]), *norms[1:])
    with pytest.raises(InceptionInputError, match=words):
        inception(block.x, InceptionParams(tuple(block.weights), tuple(block.biases), norms))
