"""What the launches of BatchNorm in training wrote, against float64 on the very operands that each of them read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from checks.block_cases import Block
from inception_fused.block import batch_stats, folding
from inception_fused.block.batch_stats import (
    COEFFICIENTS,
    MEAN,
    REST,
    SCALE,
    SHIFT,
    STATISTICS,
    VAR,
    NormColumns,
    VectorGrads,
    normalised,
)
from inception_fused.block.call_types import NormedBackwardCall, NormedCall, NormedSaved, NormedSaves
from inception_fused.block.tensor_lists import BlockTensors, Needs
from inception_fused.block.views import BatchNorm, ChannelSlice, row_stride
from inception_fused.op import launcher, normed, normed_operators
from inception_fused.op.launcher import Launcher
from inception_fused.plan import choice
from inception_fused.runtime import aten, aten_norms

FP32, FP16, BF16, TF32 = 2.0**-20, 2.0**-10, 2.0**-7, 2.0**-9
"""Of a sum in fp32, a result rounded to 16 bits, and a product whose operands are cut to 11 bits."""

ROUNDED = {torch.float32: FP32, torch.float16: FP16, torch.bfloat16: BF16}


ALL_TRITON = dict.fromkeys(choice.KERNELS, "triton")


def close(what: str, found: Tensor, truth: Tensor, size: Tensor | float, bound: float = FP32) -> None:
    """Within bound times size, or half of its dtype's smallest number; NaN where truth is and nowhere else."""
    kind = torch.finfo(found.dtype)
    found, truth = found.double(), truth.double()
    assert torch.equal(found.isnan(), truth.isnan()), f"{what}: NaN elsewhere than in float64"
    error = (found - truth).abs().nan_to_num(0, 0) - bound * torch.as_tensor(
        size, device=found.device
    ).double().nan_to_num(0).abs()
    assert (error <= kind.smallest_normal * kind.eps / 2 + 1e-30).all(), (
        f"{what}: {error.max():.2e} beyond {bound:.1e} of its size"
    )


def exactly(what: str, found: Tensor, truth: Tensor) -> None:
    """To the bit, NaN for NaN."""
    assert torch.equal(found.nan_to_num(7.5), truth.nan_to_num(7.5)), f"{what}: other bits"
    assert torch.equal(found.isnan(), truth.isnan()), f"{what}: NaN elsewhere"


def norm_stats(_: Any, x: ChannelSlice, parts: Tensor, *, gemm_m: int, ranges: tuple[int, int], tile: Any) -> None:
    raw = x.rows(gemm_m).double()
    each = (raw - raw[0]).split(tile.BLOCK_M * ranges[1])
    assert len(each) == len(parts)
    close("means", parts[:, 0], _each(each, lambda part: part.mean(0)), (raw - raw[0]).abs().amax(0))
    squares = _each(each, lambda part: part.var(0, correction=0) * len(part))
    close("squares", parts[:, 1], squares, squares + 1e-9)


def norm_combine(
    _: Any, parts: Tensor, x: ChannelSlice, columns: Sequence[NormColumns], stats: ChannelSlice,
    *, gemm_m: int, rows: int, **options: Any,
) -> None:  # fmt: skip
    raw, found = x.rows(gemm_m).double(), stats.rows(STATISTICS)
    truth = raw.new_zeros(STATISTICS, x.channels)
    aten_norms.norm_combine(parts.double(), _dense(raw), columns, _dense(truth), gemm_m=gemm_m, rows=rows)
    own = _own(columns, x.channels, raw.device)
    mean, rest, var, scale, shift = found[:, own].double()
    truth, size = truth[:, own], raw.abs().amax(0)[own]
    close("mean", mean + rest, truth[MEAN] + truth[REST], size)
    close("variance", var, truth[VAR], truth[VAR])
    close("scale", scale, truth[SCALE], truth[SCALE])
    beta = truth[SHIFT] + truth[REST] * truth[SCALE]
    close("shift", shift + rest * scale, beta, beta.abs() + (rest * scale).abs())


def norm_apply(
    before: ChannelSlice, x: ChannelSlice, stats: ChannelSlice, y: ChannelSlice,
    *, gemm_m: int, relu: bool, **options: Any,
) -> None:  # fmt: skip
    truth = normalised(before.rows(gemm_m), stats.rows(STATISTICS), x.base.dtype)
    exactly("normalised", y.rows(gemm_m), F.relu(truth) if relu else truth)


def norm_grad_stats(
    _: Any, dy: Tensor, x: ChannelSlice, stats: ChannelSlice, parts: Tensor, borders: Tensor,
    *, relu: bool, ranges: tuple[int, int], tile: Any,
) -> None:  # fmt: skip
    g, centred = _masked(dy, dy, x, stats, relu)
    for name, found, terms in (("sums", parts[:, 0], g), ("dots", parts[:, 1], g * centred)):
        each = terms.split(tile.BLOCK_M * ranges[1])
        assert len(each) == len(parts)
        close(name, found, _each(each, lambda part: part.sum(0)), _each(each, lambda part: part.abs().sum(0)))
    exactly("borders", borders, aten.border_words(tuple(dy.shape[2:]), borders.numel(), borders.device))


def norm_grad_combine(
    _: Any, parts: Tensor, stats: ChannelSlice, columns: Sequence[NormColumns], coefficients: ChannelSlice,
    outs: Sequence[VectorGrads], *, gemm_m: int, **options: Any,
) -> None:  # fmt: skip
    wide, table = parts.double(), stats.rows(STATISTICS).double()
    found, own = coefficients.rows(COEFFICIENTS), _own(columns, stats.channels, table.device)
    truth, size = (torch.zeros_like(table[:COEFFICIENTS]) for _ in range(2))
    # The size of what is added up: everything positive, and nothing subtracted.
    positive = table.abs() * table.new_tensor([1, -1, 1, 1, 1])[:, None]
    for sums, statistics, numbers, vectors in (
        (wide, table, truth, wanted := [_vectors(out) for out in outs]),
        (wide.abs(), positive, size, sizes := [_vectors(out) for out in outs]),
    ):
        aten_norms.norm_grad_combine(sums, _dense(statistics), columns, _dense(numbers), vectors, gemm_m=gemm_m)
    close("coefficients", found[:, own], truth[:, own], size[:, own].abs() + truth[:, own].abs())
    for out, expected, bound in zip(outs, wanted, sizes, strict=True):
        for name, one, other, limit in zip(VectorGrads._fields, out, expected, bound, strict=True):
            if one is not None:
                close(f"gradient of {name}", one, other, limit.abs() + other.abs(), ROUNDED[one.dtype])


def norm_grad_apply(
    before: Tensor, dy: Tensor, x: ChannelSlice, stats: ChannelSlice, coefficients: ChannelSlice,
    g: Sequence[ChannelSlice], *, relu: bool, **options: Any,
) -> None:  # fmt: skip
    masked, centred = _masked(before, dy, x, stats, relu)
    c0, c1, c2 = coefficients.rows(COEFFICIENTS).double()
    terms = c0 * masked, -c1 * torch.where(c1 == 0, 0, centred), -c2.expand_as(masked)
    truth, size = sum(terms), sum(term.abs() for term in terms)
    found = torch.cat([part.rows(len(masked)) for part in g], dim=1)
    close("gradient of raw values", found, truth, size, ROUNDED[found.dtype])


def conv_dgrad(
    _: Any, g: ChannelSlice, w_t: Tensor, r: ChannelSlice | None, dr: ChannelSlice, sums: ChannelSlice | None,
    *, gemm_m: int, image: tuple[int, int], centred: Any = None, tile: Any, **options: Any,
) -> None:  # fmt: skip
    if centred is None:
        return
    images, w = g.rows(gemm_m).double().unflatten(0, (-1, *image)).permute(0, 3, 1, 2), w_t.double().permute(0, 3, 1, 2)
    exact, size = (
        F.conv2d(*operands, padding=w_t.shape[1] // 2).permute(0, 2, 3, 1).flatten(0, 2)
        for operands in ((images, w), (images.abs(), w.abs()))
    )
    if r is not None:
        passes = ~(r.rows(gemm_m) <= 0)
        exact, size = exact * passes, size * passes
    bound = TF32 if g.base.dtype == torch.float32 else FP32
    away = centred.raw.rows(gemm_m).double() - centred.stats.rows(MEAN + 1)[MEAN].double()
    for name, place, factor in (("sums of dr", sums, 1), ("dots of dr", centred.dots, away)):
        found = place.rows(-(-gemm_m // tile.BLOCK_M))
        terms, sizes = ((value * factor).split(tile.BLOCK_M) for value in (exact, size))
        close(name, found, _each(terms, lambda part: part.sum(0)), _each(sizes, lambda part: part.abs().sum(0)), bound)
    close("dr", dr.rows(gemm_m), exact, size, max(bound, ROUNDED[dr.base.dtype]))


def _masked(dy: Tensor, like: Tensor, x: ChannelSlice, stats: ChannelSlice, relu: bool) -> tuple[Tensor, Tensor]:
    """(dy as rows behind the mask, raw values less their mean) in fp64."""
    raw, table = x.rows(like.numel() // like.shape[1]), stats.rows(STATISTICS)
    g = dy.permute(0, 2, 3, 1).flatten(0, 2).double()
    if relu:
        g = torch.where(normalised(raw, table, raw.dtype) <= 0, 0, g)
    return g, raw.double() - table[MEAN].double()


def _each(parts: Sequence[Tensor], reduce: Callable[[Tensor], Tensor]) -> Tensor:
    return torch.stack([reduce(part) for part in parts])


def _dense(rows: Tensor) -> ChannelSlice:
    return ChannelSlice(rows.contiguous(), rows.shape[1], 0, rows.shape[1])


def _own(columns: Sequence[NormColumns], width: int, device: torch.device) -> Tensor:
    """Whether a column is some convolution's."""
    own = torch.zeros(width, dtype=torch.bool, device=device)
    for start, channels, *_ in columns:
        own[start : start + channels] = True
    return own


def _vectors(out: VectorGrads) -> VectorGrads:
    return VectorGrads(*(None if grad is None else torch.empty_like(grad, dtype=torch.float64) for grad in out))


CHECKS = {
    check.__name__: check
    for check in (
        norm_stats, norm_combine, norm_apply, norm_grad_stats, norm_grad_combine, norm_grad_apply, conv_dgrad,
    )
}  # fmt: skip


@contextmanager
def checked() -> Iterator[None]:
    """Within it every launcher of these is followed by its check, which raises AssertionError."""
    function_of = launcher.function_of

    def with_check(kernel: Any, implementation: str) -> Callable[..., Any]:
        function, check = function_of(kernel, implementation), CHECKS.get(kernel.file)

        def run(*args: Any, **kwargs: Any) -> None:
            # The first operand, where the launch may write in its place.
            first = args[0]._replace(base=args[0].base.clone()) if isinstance(args[0], tuple) else args[0].clone()
            function(*args, **kwargs)
            check(first, *args, **{name: value for name, value in kwargs.items() if name != "unit"})

        return run if check else function

    with mock.patch.object(launcher, "function_of", with_check):
        yield


def run_normed(block: Block, norms: Sequence[BatchNorm], *, save: bool = True) -> tuple[Tensor, NormedSaved]:
    """y and what stands beside it, of BatchNorm with the statistics of the batch, taps alone where they are saved.

    norms: without mean and var.
    """
    saves = NormedSaves(True, True, True, save)
    y, saved = normed_operators.outputs(block.x, block.shape, saves)
    tensors = BlockTensors(block.weights, block.biases, *folding.flatten(norms))
    x = ChannelSlice(block.x, row_stride(block.x), 0, block.shape.c)
    call = NormedCall(block.x, tensors, batch_stats.modes_of(norms), block.relu, saves, "kernels")
    normed.launch_normed(
        Launcher(ALL_TRITON, x, block.shape, block.x.dtype), call, y.permute(0, 2, 3, 1).flatten(0, 2), saved
    )
    return y, saved


def run_normed_backward(block: Block, norms: Sequence[BatchNorm], saved: NormedSaved, dy: Tensor) -> list[Tensor]:
    """All gradients."""
    every = [True] * len(norms)
    dtypes = [(n.gamma.dtype, n.beta.dtype, block.x.dtype if block.biases else None) for n in norms]
    eps, modes = [n.eps for n in norms], batch_stats.modes_of(norms)
    needs = Needs(True, every, every)
    call = NormedBackwardCall(dy, block.x, saved, block.weights, eps, modes, dtypes, block.relu, needs, "kernels")
    return [grad for grad in normed.normed_backward(call, ALL_TRITON) if grad is not None]
