"""Blocks whose BatchNorm takes the statistics of the batch, and what each slice, statistic and gradient should be."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from batch_norm_cases import leaves_of, make_norms, names_of, params_of
from checks.block_cases import Block, products
from inception_fused import InceptionConfig
from inception_fused.block import batch_stats, chains, folding
from inception_fused.block.call_types import NormedSaved
from inception_fused.block.chains import PROJECTION
from inception_fused.block.reference import InceptionParams
from inception_fused.op.normed_autograd import normed_block
from inception_fused.runtime import aten
from inception_fused.testing import Error, gradient_names, tolerance
from marks import more

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
