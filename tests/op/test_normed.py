"""BatchNorm with the statistics of the batch, by the ATen twins and by the kernels: each slice, statistic and gradient
alone against float64, on the very raw values, r and masks that the forward has stored."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batch_norm_cases import leaves_of, make_norms, names_of, params_of, partly_biased
from checks.block_cases import ODD, REDUCE_24, SMALL, Block, in_layout, make_block, products
from inception_fused import BatchNorm, InceptionConfig
from inception_fused.block import batch_stats, chains, folding
from inception_fused.block.call_types import NormedSaved
from inception_fused.block.chains import PROJECTION
from inception_fused.block.reference import InceptionParams, inception_reference
from inception_fused.op.normed_autograd import normed_block
from inception_fused.plan import choice
from inception_fused.runtime import aten
from inception_fused.runtime.submit import count
from inception_fused.testing import Error, gradient_names, tolerance
from marks import full, more, quick

TWINS = "auto"
"""On a CPU."""

wishes = pytest.mark.parametrize("wish", [TWINS, more("kernels")])
both = pytest.mark.parametrize("wish", [TWINS, "kernels"])

MIXED = ("batch", "fixed", "none", "batch", "none", "fixed", "batch")
OTHERWISE = ("fixed", "batch", "batch", "none", "batch", "none", "fixed")
KINDS = {"all": ("batch",) * 7, "mixed": MIXED, "otherwise": OTHERWISE}

TINY = InceptionConfig(3, 2, (2, 3), (2, 2), 2)


def norms_of(block, kinds=KINDS["all"], affine=True, dtype=torch.float32):
    """kinds: of each convolution "batch", "fixed" or "none"."""
    make = {
        "batch": lambda norm: norm._replace(mean=None, var=None),
        "fixed": lambda norm: norm,
        "none": lambda _: None,
    }
    made = make_norms(block.weights, affine, dtype)
    return tuple(make[kind](norm) for norm, kind in zip(made, kinds, strict=False))


class Forward(NamedTuple):
    """What the operator returned, all of it saved."""

    y: Tensor
    saved: NormedSaved


def forward(block: Block, norms, wish=TWINS) -> Forward:
    weights, biases, vectors, eps = folding.tensors_of(
        InceptionParams(tuple(block.weights), tuple(block.biases) or None, norms)
    )
    modes, saves = batch_stats.modes_of(norms), [True] * 4
    y, *saved = torch.ops.inception_fused._normed(
        block.x, weights, biases, vectors, eps, modes, block.relu, *saves, wish
    )
    return Forward(y, NormedSaved(*saved))


def call(leaves, block, norms, wish=TWINS):
    return normed_block(leaves[0], params_of(leaves, block, norms), relu=block.relu, backend=wish)[0]


def pictures(block, rows):
    """[M, C] -> [N, C, H, W]."""
    shape = block.shape
    return rows.unflatten(0, (shape.n, shape.h, shape.w)).permute(0, 3, 1, 2)


def by_conv(block, branches, inner):
    """One matrix of rows a convolution. branches: [M, K]; inner: [M, r_width]."""
    shape = block.shape
    ends = [part.rows(shape.gemm_m) for part in shape.y_slices(branches)]
    return chains.from_outputs(ends, [part.rows(shape.gemm_m) for part in shape.r_slices(inner)])


def check_forward(block: Block, norms, out: Forward) -> None:
    """Raw values against float64 of the operand that the convolution read, statistics and what is normalised against
    float64 of the raw values."""
    shape, saved, dtype = block.shape, out.saved, block.x.dtype
    wide = tolerance(torch.float64 if dtype == torch.float64 else torch.float32, shape.gemm_m)
    rows_of_y = out.y.permute(0, 2, 3, 1).flatten(0, 2)
    raws, results = by_conv(block, saved.raw, saved.raw_r), by_conv(block, rows_of_y, saved.r)
    read = chains.inputs(block.x, [pictures(block, result) for result in results])
    found = batch_stats.batch_statistics(saved.stats, shape)
    starts, biases = batch_stats.starts(shape), block.biases or chains.each(None, block.weights)
    for i, conv in enumerate(shape.variant.convs):
        w = block.weights[i].to(dtype)
        operand = read[i].double()
        if conv.role == PROJECTION:
            operand = F.max_pool2d(operand, 3, stride=1, padding=1)
        bias = biases[i]
        truth = F.conv2d(operand, w.double(), None if bias is None else bias.double(), padding=w.shape[-1] // 2)
        error = Error.of(pictures(block, raws[i]), truth)
        bound = tolerance(dtype, w[0].numel())
        assert error.within(bound), f"raw {conv.name}: {error}, bound {bound:.2e}"

        raw, norm = raws[i].double(), norms[i]
        mean, var = raw.mean(0), raw.var(0, correction=0)
        rest = saved.stats[batch_stats.REST, starts[i] : starts[i] + w.shape[0]]
        if norm is None or norm.mean is not None:
            expected = (0, 0) if norm is None else (norm.mean, norm.var)
            assert all(torch.all(a == b) for a, b in zip(found[i], expected, strict=True)), conv.name
            assert not rest.any(), conv.name
            mean, var = (0, 0) if norm is None else (norm.mean.double(), norm.var.double())
        else:
            some = var > 0
            # Beside the deviation: what the mean leaves of its last bits is in the rest.
            error = Error.of(
                (((found[i][0].double() + rest) - mean) / var.sqrt())[some] + 1, torch.ones_like(var[some])
            )
            assert error.within(wide), f"mean of {conv.name}: {error}, bound {wide:.2e}"
            error = Error.of((found[i][1] / var)[some], torch.ones_like(var[some]))
            assert error.within(wide), f"variance of {conv.name}: {error}, bound {wide:.2e}"
            assert not found[i][1][~some].any(), f"{conv.name}: the variance of a constant"
        truth = normalised(raw, norm, mean, var)
        truth = F.relu(truth) if block.relu else truth
        error = Error.of(results[i], truth)
        bound = tolerance(dtype, 1) + wide
        assert error.within(bound), f"{conv.name}: {error}, bound {bound:.2e}"
    belongs = torch.zeros(shape.r_width, dtype=torch.bool)
    for part in shape.r_slices(saved.r):
        belongs[part.c_offset : part.c_offset + part.channels] = True
    assert not saved.r[:, ~belongs].any(), "padding of r"
    _, indices = F.max_pool2d(block.x.double(), 3, stride=1, padding=1, return_indices=True)
    taps = aten.taps_of_indices(indices).permute(0, 2, 3, 1).flatten(0, 2)
    assert torch.equal(aten.unpack_taps(saved.taps, shape.c), taps.to(torch.uint8)), "taps"
    again = batch_stats.normalised(saved.raw, saved.stats[:, : shape.k], dtype)
    assert torch.equal(rows_of_y, F.relu(again) if block.relu else again), "the mask of the backward is another's"


def normalised(raw, norm, mean, var):
    """In float64. mean, var: [K]."""
    if norm is None:
        return raw
    gamma, beta = (t if t is None else t.double() for t in norm[:2])
    out = (raw - mean) / (var + norm.eps).sqrt()
    out = out if gamma is None else out * gamma
    return out if beta is None else out + beta


def truths(block: Block, norms, out: Forward, dy: Tensor) -> list[Tensor]:
    """Float64 gradients by autograd, with the raw values, r, masks and taps of the forward."""
    shape, dtype = block.shape, block.x.dtype
    leaves = [t.detach() for t in leaves_of(block, norms)]
    count = 1 + len(block.weights)
    # Of what the kernels read: weights in the compute dtype.
    leaves = [(t.to(dtype) if i < count else t).double().requires_grad_() for i, t in enumerate(leaves)]
    x, (weights, biases, given) = leaves[0], params_of(leaves, block, norms)
    stored = [t.double() for t in by_conv(block, out.saved.raw, out.saved.raw_r)]
    results = by_conv(block, out.y.permute(0, 2, 3, 1).flatten(0, 2), out.saved.r)
    pool = x.flatten(2).gather(2, indices_of(block, out).flatten(2)).view_as(x)
    outs = [None] * len(weights)
    for chain in shape.variant.places:
        for at, i in enumerate(chain):
            operand = pool if shape.variant.convs[i].role == PROJECTION else outs[chain[at - 1]] if at else x
            bias = biases[i] if biases is not None else None
            z = F.conv2d(operand, weights[i], bias, padding=weights[i].shape[-1] // 2)
            z = z + (pictures(block, stored[i]) - z).detach()
            z = z.permute(0, 2, 3, 1).flatten(0, 2)
            norm = given[i]
            if norm is not None:
                fixed = norm.mean is not None
                mean, var = (norm.mean.double(), norm.var.double()) if fixed else (z.mean(0), z.var(0, correction=0))
                z = normalised(z, norm, mean, var)
            if block.relu:
                z = torch.where(results[i] <= 0, 0, z)
            outs[i] = pictures(block, z + (results[i].double() - z).detach())
    y = torch.cat(chains.ends(outs), dim=1)
    grads = torch.autograd.grad(y, leaves, dy.double(), allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]


def size_of(truth):
    """As batch_norm_cases' own, but what reads an input channel that gamma has made constant has gradients of 0 where
    no border is, or of what rounding leaves of them."""
    if truth.dim() == 1:
        return torch.ones_like(truth)
    filters = truth.square().mean((1, 2, 3), keepdim=True).sqrt()
    filters[filters == 0] = 1
    return filters * (truth / filters).square().mean((0, 2, 3), keepdim=True).sqrt().clamp(min=0.1)


def indices_of(block, out):
    return aten.indices_of_taps(pictures(block, aten.unpack_taps(out.saved.taps, block.shape.c)))


def check_gradients(block: Block, norms, grads, out: Forward, dy: Tensor, extra: float = 1) -> None:
    """Each alone. A gradient on its way is stored twice a convolution: as dr, and as that of the raw values.

    extra: how many times the bound, where the few pixels of a batch leave little of a gradient but its rounding.
    """
    shape, dtype = block.shape, block.x.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    widest = max(w[0].numel() * shape.k // w.shape[0] for w in block.weights)
    bound = extra * tolerance(dtype, max(shape.gemm_m, widest))
    rounded = dict(zip(gradient_names(block.weights), products(block), strict=True))
    names, variant = names_of(block, norms), shape.variant
    in_batch = {variant.names[i] for i, norm in enumerate(norms) if norm is not None and norm.mean is None}
    ends = {variant.names[i] for i in variant.ends}
    for name, g, truth in zip(names, grads, truths(block, norms, out, dy), strict=True):
        conv, _, kind = name.replace(" batch_norm", "").partition(".")
        if kind == "bias" and conv in in_batch:
            assert not g.any(), f"gradient of {name}: not zero where a mean takes it out again"
            continue
        # gamma of 0: nothing passes to the filter.
        some = torch.ones_like(truth, dtype=torch.bool)
        if kind == "weight":
            some = (truth != 0).flatten(1).any(1)
            assert not g[~some].any(), f"gradient of {name}: not zero where it must be"
        limit = bound * 2 * (rounded.get(name) or rounded[f"{conv}.weight"])
        if conv in ends and kind in ("gamma", "beta", "bias"):
            # Sums of dy itself.
            limit = 4 * tolerance(wide, shape.gemm_m)
        limit += tolerance(g.dtype, 1) if g.dtype != wide else 0
        size = size_of(truth)
        error = Error.of((g / size)[some], (truth / size)[some])
        assert error.within(limit), f"gradient of {name}: {error}, bound {limit:.2e}"


def check(block: Block, norms, wish: str, extra: float = 1, repeats: bool = False) -> None:
    """Forward and backward of a block, of which autograd's forward is the operator's; repeats: a second one has the
    same bits."""
    out = forward(block, norms, wish)
    check_forward(block, norms, out)
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms, wish)
    assert torch.equal(y, out.y)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy, retain_graph=True)
    check_gradients(block, norms, grads, out, dy, extra)
    for g, t in zip(grads[1:], leaves[1:], strict=True):
        assert (g.dtype, g.stride()) == (t.dtype, t.stride())
    if repeats:
        for again in (y, call(leaves, block, norms, wish)):
            assert torch.equal(again, y)
            assert all(map(torch.equal, grads, torch.autograd.grad(again, leaves, dy, retain_graph=True)))


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
    """Whatever the strides, the same bits."""
    block = make_block(ODD, (2, 5, 4))
    norms, n, (c, k) = norms_of(block), 2, (17, ODD.out_channels)
    dy = torch.randn(n, k, 5, 4)

    def run(x, dy):
        leaves = leaves_of(block._replace(x=x), norms)
        leaves[0] = x.detach().requires_grad_()
        y = call(leaves, block._replace(x=x), norms, wish)
        return [y, *torch.autograd.grad(y, leaves, dy)]

    expected = run(block.x, dy.contiguous(memory_format=torch.channels_last))
    wider = torch.randn(n, 5, 4, c + 7).permute(0, 3, 1, 2)
    wider[:, 3 : 3 + c] = block.x
    apart = torch.randn(n, c, 10, 4)
    apart[:, :, ::2] = block.x
    for x in (block.x.contiguous(), wider[:, 3 : 3 + c], apart[:, :, ::2]):
        assert all(map(torch.equal, run(x, dy), expected))
    wider = torch.randn(n, k + 5, 5, 4).contiguous(memory_format=torch.channels_last)
    wider[:, 2 : 2 + k] = dy
    assert all(map(torch.equal, run(block.x, wider[:, 2 : 2 + k]), expected))
    one = torch.tensor(0.7).expand_as(dy)
    assert all(map(torch.equal, run(block.x, one), run(block.x, one.contiguous())))


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


@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize(
    "options", [{}, {"double": True, "branch3": 3}, {"activation": None}, {"bias": False}], ids=str
)
def test_higher_derivatives(options, kinds):
    """Through the reference, with the masks of the forward."""
    block, norms = in_float64(kinds=kinds, **options)
    leaves, found = leaves_of(block, norms), []
    for run in (call, by_reference):
        y = run(leaves, block, norms)
        firsts = torch.autograd.grad(y.square().sum() + y.sin().sum(), leaves, create_graph=True, allow_unused=True)
        total = sum((g * (g + 1)).sum() for g in firsts)
        seconds = torch.autograd.grad(total, leaves, create_graph=True, allow_unused=True)
        total = sum(g.square().sum() for g in seconds[:3])
        thirds = torch.autograd.grad(total, leaves, allow_unused=True)
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
