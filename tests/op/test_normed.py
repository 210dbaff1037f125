"""BatchNorm with the statistics of the batch, by the ATen twins and by the kernels: each slice, statistic and gradient
alone against float64, on the very raw values, r and masks that the forward has stored."""

from __future__ import annotations

import pytest
import torch

from batch_norm_cases import leaves_of, names_of, params_of, partly_biased
from checks.block_cases import ODD, REDUCE_24, SMALL, in_layout, make_block
from inception_fused import BatchNorm
from inception_fused.block import batch_stats
from inception_fused.block.reference import inception_reference
from inception_fused.op import normed_operators
from inception_fused.runtime import replay
from inception_fused.testing import Error, tolerance
from marks import more, quick
from normed_cases import KINDS, MIXED, both, call, check, check_forward, check_gradients, forward, norms_of, wishes

DTYPES = [
    (torch.float32, torch.float32), (torch.float16, torch.float32), (torch.bfloat16, torch.float32),
    (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.bfloat16),
]  # fmt: skip
"""Of the block and of BatchNorm's vectors."""


@wishes
@pytest.mark.parametrize("config", [SMALL, ODD, more(REDUCE_24)], ids=["small", "odd", "24"])
@pytest.mark.parametrize(("dtype", "vectors"), quick(DTYPES, *DTYPES[:3]))
def test_each_slice_statistic_and_gradient(dtype, vectors, config, wish):
    block = make_block(config, (2, 5, 4), dtype)
    check(block, norms_of(block, dtype=vectors), wish, repeats=True)


VARIANTS = {
    "no activation": (SMALL, {"activation": None}, "all"),
    "3x3": (SMALL, {"branch3": 3}, "all"),
    "two 3x3": (SMALL, {"branch3": 3, "double": True}, "all"),
    "two 3x3, odd": (ODD, {"branch3": 3, "double": True}, "all"),
    "no biases": (SMALL, {"bias": False}, "all"),
    "mixed": (SMALL, {}, "mixed"),
    "otherwise": (ODD, {"bias": False}, "otherwise"),
    "two 3x3, mixed": (SMALL, {"branch3": 3, "double": True}, "mixed"),
    "two 3x3, otherwise": (ODD, {"branch3": 3, "double": True, "activation": None}, "otherwise"),
}


@both
@pytest.mark.parametrize("affine", [True, more(False)], ids=["affine", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, more(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("variant", quick(VARIANTS, "mixed", "two 3x3, otherwise"))
def test_variants(variant, dtype, affine, wish):
    config, options, kinds = VARIANTS[variant]
    block = make_block(config, (2, 5, 4), dtype, **options)
    check(block, norms_of(block, KINDS[kinds], affine), wish)


@wishes
def test_some_biases_and_vectors_missing(wish):
    """A bias of two, gamma and beta of one, beta of another."""
    block = partly_biased(make_block(SMALL, (2, 5, 4)))
    norms = list(norms_of(block))
    norms[1], norms[4] = norms[1]._replace(gamma=None, beta=None, eps=2), norms[4]._replace(beta=None)
    check(block, tuple(norms), wish)


SHAPES = {"1x1": (9, 1, 1), "1x9": (1, 1, 9), "9x1": (1, 9, 1), "2x2": (7, 2, 2), "more rows than a tile": (5, 9, 8)}


@wishes
@pytest.mark.parametrize("dtype", [torch.float32, more(torch.bfloat16)], ids=str)
@pytest.mark.parametrize("name", quick(SHAPES, "1x1", "more rows than a tile"))
def test_odd_images(name, dtype, wish):
    block = make_block(ODD, SHAPES[name], dtype)
    check(block, norms_of(block), wish, extra=4)


@wishes
@pytest.mark.parametrize("layout", quick(["KRSC", "strided", "transposed"], "strided"))
def test_layouts_of_parameters(layout, wish):
    block = make_block(SMALL, (2, 5, 4))
    block = block._replace(weights=in_layout(block.weights, layout))
    norms = tuple(
        n and BatchNorm(*(t if t is None else torch.stack((t, t), dim=1)[:, 0] for t in n[:4]), n.eps)
        for n in norms_of(block, MIXED)
    )
    leaves = [block.x, *block.weights, *block.biases, *(n[field] for field in (0, 1) for n in norms if n)]
    leaves = [t.requires_grad_() for t in leaves]
    y = call(leaves, block, norms, wish)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    with torch.no_grad():
        out = forward(block, norms, wish)
    check_forward(block, norms, out)
    check_gradients(block, norms, grads, out, dy)
    assert all(g.stride() == torch.empty_like(t).stride() for g, t in zip(grads[1:], leaves[1:], strict=True))


@wishes
def test_memory_of_x_and_dy(wish):
    """Whatever the strides, the kernels' same bits. PyTorch's products round by strides (oneDNN with AVX-512)."""
    block = make_block(ODD, (2, 5, 4))
    bound = tolerance(torch.float32, 25 * ODD.c3[0] + ODD.in_channels + 2 * 5 * 4)
    norms, n, (c, k) = norms_of(block), 2, (17, ODD.out_channels)
    dy = torch.randn(n, k, 5, 4)

    def run(x, dy):
        leaves = leaves_of(block._replace(x=x), norms)
        leaves[0] = x.detach().requires_grad_()
        y = call(leaves, block._replace(x=x), norms, wish)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    def same(found, expected):
        if wish == "kernels":
            return torch.equal(found, expected)
        # At least 1, since the gradient of a bias before BatchNorm is rounding alone.
        return Error.of(found, expected, torch.ones_like(expected)).within(bound)

    expected = run(block.x, dy.contiguous(memory_format=torch.channels_last))
    wider = torch.randn(n, 5, 4, c + 7).permute(0, 3, 1, 2)
    wider[:, 3 : 3 + c] = block.x
    apart = torch.randn(n, c, 10, 4)
    apart[:, :, ::2] = block.x
    for x in (block.x.contiguous(), wider[:, 3 : 3 + c], apart[:, :, ::2]):
        assert all(map(same, run(x, dy), expected))
    wider = torch.randn(n, k + 5, 5, 4).contiguous(memory_format=torch.channels_last)
    wider[:, 2 : 2 + k] = dy
    assert all(map(same, run(block.x, wider[:, 2 : 2 + k]), expected))
    one = torch.tensor(0.7).expand_as(dy)
    assert all(map(same, run(block.x, one), run(block.x, one.contiguous())))


@wishes
def test_a_mean_far_larger_than_the_deviation(wish):
    """1e4 beside 1, which 24 bits of a sum of squares would not tell from noise."""
    block = make_block(SMALL, (2, 7, 5))
    for w, b in zip(block.weights, block.biases, strict=True):
        w.mul_(0.6 / w.square().sum((1, 2, 3), keepdim=True).sqrt().clamp(min=1e-3))
        b.add_(1e4)
    norms = norms_of(block)
    out = forward(block, norms, wish)
    means, variances = zip(*batch_stats.batch_statistics(out.saved.stats, block.shape), strict=True)
    assert all(mean.abs().min() > 5e3 for mean in means)
    assert all(1e-3 < var.median() < 1e2 for var in variances)
    check(block, norms, wish)


@wishes
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_constant_channels(dtype, wish):
    """Variance 0 and y = act(beta), exactly, and what passes the mask is finite."""
    block = make_block(SMALL, (2, 5, 4), dtype)
    for w in block.weights:
        w[::3] = 0
    norms = norms_of(block)
    out = forward(block, norms, wish)
    check_forward(block, norms, out)
    ends = [(i, y) for i, y in zip(block.shape.variant.ends, out.y.split(block.shape.branch_channels, 1), strict=True)]
    for i, y in ends:
        _, var = batch_stats.batch_statistics(out.saved.stats, block.shape)[i]
        assert not var[::3].any()
        assert torch.equal(y[:, ::3], norms[i].beta[::3, None, None].relu().to(dtype).expand_as(y[:, ::3]))
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms, wish)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    assert all(g.isfinite().all() for g in grads)
    for (i, _), own in zip(ends, (dy * (y > 0)).split(block.shape.branch_channels, 1), strict=True):
        # gammas come after x, weights and biases, betas after them.
        error = Error.of(grads[19 + i][::3], own.double().sum((0, 2, 3))[::3])
        assert error.within(4 * tolerance(torch.float32, 40)), f"d beta {i}: {error}"


@wishes
@pytest.mark.parametrize("value", [float("nan"), more(float("inf")), more(float("-inf"))], ids=str)
@pytest.mark.parametrize("kinds", ["all", more("mixed")])
def test_what_is_not_finite(value, kinds, wish):
    """Is not finite in y and in every gradient where it is not in eager PyTorch."""
    block = make_block(SMALL, (2, 5, 4))
    block.x[1, 5, 2, 1] = value
    norms = norms_of(block, KINDS[kinds])
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms, wish)
    expected = inception_reference(leaves[0], params_of(leaves, block, norms), "relu")
    dy = torch.randn_like(y)
    assert torch.equal(y.isnan(), expected.isnan())
    names = names_of(block, norms)
    for name, ours, eager in zip(
        names, torch.autograd.grad(y, leaves, dy), torch.autograd.grad(expected, leaves, dy), strict=True
    ):
        assert not ours[~eager.isfinite()].isfinite().any(), name


@wishes
@pytest.mark.parametrize("dtype", [torch.float16, more(torch.bfloat16)], ids=str)
def test_x_of_fewer_bits_than_the_parameters(dtype, wish):
    """As under autocast: weights are rounded, gradients are the parameters' fp32."""
    block = make_block(SMALL, (2, 5, 4))
    check(block._replace(x=block.x.to(dtype)), norms_of(block), wish)


@pytest.mark.parametrize("double", [False, True], ids=["5x5", "two 3x3"])
@pytest.mark.parametrize("dtype", quick([torch.float32, torch.float16, torch.bfloat16], torch.bfloat16), ids=str)
def test_launches_from_memory(dtype, double, monkeypatch):
    """Both passes from the third call on, on other tensors, with the bits of planned ones."""
    planned, calls = [], []
    for name in ("_planned", "_planned_backward"):
        plan = getattr(normed_operators, name)
        monkeypatch.setattr(normed_operators, name, lambda call, _plan=plan: (planned.append(1), _plan(call))[1])

    def step(seed):
        block = make_block(SMALL, (2, 5, 4), dtype, double=double, seed=seed)
        norms = norms_of(block)
        leaves = leaves_of(block, norms)
        y = call(leaves, block, norms, "kernels")
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        return [y.detach(), *torch.autograd.grad(y, leaves, dy.contiguous(memory_format=torch.channels_last))]

    replay.forget()
    for seed in range(4):
        calls.append(step(seed))
    assert len(planned) == 2 * 2
    for seed in (2, 3):
        replay.forget()
        assert all(map(torch.equal, step(seed), calls[seed]))
    assert len(planned) == 4 * 2
