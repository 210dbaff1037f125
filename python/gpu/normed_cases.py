"""Blocks whose BatchNorm takes the statistics of the batch, for sanitizer_cases.py: one call, and its judgement.

Judged on the CPU, so that nothing else is launched: convolutions, statistics and what is normalised against float64 on
what each has read, gradients against the ATen twins in float64 on the very raw values, r and taps of the forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from checks.block_cases import Block, products
from inception_fused import BatchNorm
from inception_fused.block import batch_stats, chains, folding
from inception_fused.block.batch_stats import BATCH, FIXED, MEAN, NONE, REST, SCALE, SHIFT, VAR
from inception_fused.block.call_types import NormedSaved, NormedSaves
from inception_fused.op import normed_operators
from inception_fused.op.saved import dtype_name
from inception_fused.testing import Error, gradient_names, tolerance

SINGLE = 2.0**-20
"""Of sums and roots in fp32, with some room."""


class Normed(NamedTuple):
    """BatchNorm behind every convolution of a block. modes: of batch_stats, one a convolution."""

    norms: list[Tensor]
    eps: list[float]
    modes: list[int]
    given: list[BatchNorm | None]

    def forward(self, block: Block, wish: str) -> tuple[Tensor, ...]:
        """y, raw, raw_r, r, taps, stats."""
        return torch.ops.inception_fused._normed(
            block.x, block.weights, block.biases, self.norms, self.eps, self.modes, block.relu, *[True] * 4, wish
        )

    def backward(self, block: Block, out: Sequence[Tensor], dy: Tensor, wish: str) -> list[Tensor]:
        """All gradients: of x, weights, and of gamma, beta and bias of each convolution, empty where it has none."""
        vectors = [name for norm in self.given for name in self._vectors(norm, block)]
        needs = [True] * (1 + 2 * len(block.weights))
        return torch.ops.inception_fused._normed_backward(
            dy, block.x, *out[1:], block.weights, self.eps, self.modes, vectors, block.relu, needs, wish
        )

    @staticmethod
    def _vectors(norm: BatchNorm | None, block: Block) -> list[str]:
        vectors = [None, None] if norm is None else [norm.gamma, norm.beta]
        kinds = [None if t is None else t.dtype for t in vectors] + [block.x.dtype if block.biases else None]
        return ["" if kind is None else dtype_name(kind) for kind in kinds]


def make_normed(block: Block, modes: Sequence[int]) -> Normed:
    """Vectors in fp32, gamma of either sign and never near zero."""
    generator = torch.Generator().manual_seed(1)
    given: list[BatchNorm | None] = []
    for w, mode in zip(block.weights, modes, strict=True):
        gamma, beta, mean, var = torch.rand(4, w.shape[0], generator=generator).to(w.device)
        fixed = (0.3 * mean, var + 0.5) if mode == FIXED else (None, None)
        gamma = (gamma + 0.5) * torch.where(beta < 0.3, -1, 1)
        given.append(None if mode == NONE else BatchNorm(gamma, beta - 0.5, *fixed, 1e-3))
    return Normed(*folding.flatten(given, block.x), list(modes), given)


def raw_values(block: Block, out: Sequence[Tensor]) -> tuple[Block, Tensor, Tensor]:
    """What the convolutions gave, as the checks of a forward take it: (block without ReLU, y, r)."""
    saved, shape = NormedSaved(*out[1:]), block.shape
    return block._replace(relu=False), saved.raw.unflatten(0, (shape.n, *shape.image)).permute(0, 3, 1, 2), saved.raw_r


def check_normed(block: Block, normed: Normed, out: Sequence[Tensor]) -> None:
    """Raises AssertionError where statistics on the CPU, or what is normalised with them, are wrong."""
    y, saved, shape = out[0], NormedSaved(*out[1:]), block.shape
    starts = batch_stats.starts(shape)
    parts = [part.rows(shape.gemm_m) for part in (*shape.y_slices(saved.raw), *shape.r_slices(saved.raw_r))]
    count = len(shape.branch_channels)
    for i, rows in enumerate(chains.from_outputs(parts[:count], parts[count:])):
        table, name = saved.stats[:, starts[i] : starts[i] + rows.shape[1]].double(), shape.variant.names[i]
        _check_statistics(name, normed.given[i], rows.double(), table)
    for name, before, after, offset in (("y", saved.raw, _rows(y), 0), ("r", saved.raw_r, saved.r, shape.k)):
        table = saved.stats[:, offset : offset + before.shape[1]]
        expected = batch_stats.normalised(before, table, y.dtype)
        expected = F.relu(expected) if block.relu else expected
        assert torch.equal(after, expected), f"{name}: other bits than its raw values and statistics make"


def _check_statistics(name: str, norm: BatchNorm | None, raw: Tensor, table: Tensor) -> None:
    mean, var, scale = raw.mean(0), raw.var(0, correction=0), torch.ones_like(table[SCALE])
    if norm is None:
        mean, var, shift = torch.zeros_like(mean), torch.zeros_like(var), torch.zeros_like(mean)
    else:
        if norm.mean is not None:
            mean, var = norm.mean.cpu().double(), norm.var.cpu().double()
        scale = norm.gamma.cpu().double() / (var + norm.eps).sqrt()
        shift = norm.beta.cpu().double() - table[REST] * table[SCALE]
    for what, found, truth, size in (
        ("mean", table[MEAN] + table[REST], mean, raw.abs().amax(0)),
        ("variance", table[VAR], var, var),
        ("scale", table[SCALE], scale, scale.abs()),
        ("shift", table[SHIFT], shift, 1 + shift.abs()),
    ):
        assert ((found - truth).abs() <= SINGLE * size + 1e-30).all(), f"{what} of {name}"


def check_normed_gradients(
    block: Block, normed: Normed, out: Sequence[Tensor], dy: Tensor, grads: Sequence[Tensor], *, tf32: bool
) -> None:
    """Raises AssertionError where a gradient on the CPU is wrong."""
    shape, dtype = block.shape, block.x.dtype
    host = block._replace(x=block.x.double(), weights=[w.double() for w in block.weights])
    truths = normed.backward(host, _widened(block, host, out), dy.double(), "eager")
    widest = max(w[0].numel() * shape.k // w.shape[0] for w in block.weights)
    bound = tolerance(dtype, max(shape.gemm_m, widest), tf32=tf32)
    convs = len(block.weights)
    known = gradient_names(block.weights)
    behind = dict(zip(known, products(block), strict=True))
    names = [*known[: 1 + convs], *(f"{name}.{kind}" for name in shape.variant.names for kind in VECTORS)]
    for name, grad, truth in zip(names, grads, truths, strict=True):
        conv = name.partition(".")[0]
        limit = 2 * bound * behind["x" if name == "x" else f"{conv}.weight"]
        limit += tolerance(grad.dtype, 1)
        error = Error.of(grad, truth)
        assert error.within(limit), f"gradient of {name}: {error}, bound {limit:.2e}"


def _widened(block: Block, host: Block, out: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """What a forward gave in float64, whose slices of r begin elsewhere."""
    saved, m = NormedSaved(*out[1:]), block.shape.gemm_m
    y, wide = normed_operators.outputs(host.x, host.shape, NormedSaves(True, True, True, True))
    for to, given in ((y, out[0]), (wide.raw, saved.raw), (wide.taps, saved.taps)):
        to.copy_(given)
    for to, given in ((wide.raw_r, saved.raw_r), (wide.r, saved.r)):
        for part, values in zip(host.shape.r_slices(to), block.shape.r_slices(given), strict=True):
            part.rows(m).copy_(values.rows(m))
    places = zip(batch_stats.starts(host.shape), batch_stats.starts(block.shape), block.shape.filters, strict=True)
    for to, start, channels in places:
        wide.stats[:, to : to + channels] = saved.stats[:, start : start + channels]
    return y, *wide


VECTORS = ("gamma", "beta", "bias")


def _rows(y: Tensor) -> Tensor:
    return y.permute(0, 2, 3, 1).flatten(0, 2)


ALL = (BATCH,) * 6
"""Of a block with one window in branch 3."""

DOUBLE = (BATCH,) * 7
"""Of one with two 3x3."""

MIXED = (BATCH, FIXED, NONE, BATCH, BATCH, FIXED)
