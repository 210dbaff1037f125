"""Parity with the truth: inputs, error measures and the one model of tolerances, for tests, benchmarks and users.

The truth is the reference in float64; how an error is measured and what it may be is in block/tolerance.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from inception_fused.block.batch_stats import takes_batch
from inception_fused.block.chains import ends, variant_of
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, spatial_size
from inception_fused.block.leaves import leaf, learned, with_learned
from inception_fused.block.reference import InceptionParams, batch_norm, inception_reference
from inception_fused.block.tolerance import (
    GRADIENT_NAMES,
    PEAK_FACTOR,
    SLICE_NAMES,
    TF32_ROUNDOFF,
    UNIT_ROUNDOFF,
    Error,
    Measure,
    Row,
    gradient_names,
    row,
    slice_names,
    tolerance,
)
from inception_fused.block.views import accumulator_of
from inception_fused.conversion.fused_blocks import view_of
from inception_fused.errors import InceptionInputError
from inception_fused.op import autograd, backends, reasons
from inception_fused.op.calls import check_call, compute_dtype
from inception_fused.op.normed_autograd import Statistics, gradients_given_masks, normed_block

__all__ = [
    "GRADIENT_NAMES",
    "PEAK_FACTOR",
    "SLICE_NAMES",
    "TF32_ROUNDOFF",
    "UNIT_ROUNDOFF",
    "Error",
    "Measure",
    "Row",
    "assert_parity",
    "gradient_names",
    "parity",
    "row",
    "sample_input",
    "tolerance",
]


def sample_input(
    block: str, batch: int = 1, *, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu",
    image_size: int = 224, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Normal data [batch, C, H, W] in channels_last memory for one of GoogLeNet's nine blocks ("3a" to "5b")."""
    if block not in GOOGLENET_BLOCKS:
        raise InceptionInputError(f"block: got {block!r}, wants one of {', '.join(GOOGLENET_BLOCKS)}")
    side = spatial_size(block, image_size)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((batch, GOOGLENET_BLOCKS[block].in_channels, side, side), generator=generator)
    return x.to(device=device, dtype=dtype, memory_format=torch.channels_last)


def parity(module: nn.Module, x: Tensor, *, backward: bool = True, seed: int = 0) -> list[Row]:
    """Errors of a block against float64, each branch's slice and each gradient on its own.

    module: a :class:`FusedInception`, a converted block or GoogLeNet's stem; x: [N, C, H, W] on the parameters' device
    and, outside autocast, of their dtype. Gradients are those of x, weights and biases. Where some BatchNorm of a
    converted block takes the statistics of the batch, those of every gamma and beta come with them, and where kernels
    run each mean and variance that they take; a bias before such a BatchNorm is left out, whose gradient is nothing but
    rounding. Where kernels run such a block, gradients are compared given the masks of their forward: with few pixels
    one ReLU that flips near zero is some percent of a sum. The bound is twice eager's own error plus
    :func:`tolerance`. Runs under the backend and autocast in force; gradients and buffers of the module and x are left
    alone.
    """
    block = view_of(module)
    if block is None:
        raise InceptionInputError(f"module: got {type(module).__name__}, wants a FusedInception or a converted block")
    if block.eager_reason() is not None:
        raise InceptionInputError(f"module: got a block whose {block.eager_reason()}, wants one that kernels can run")
    params = block.params()
    given, batch = {"x": x, **learned(params)}, _with_batch_statistics(params)
    channels = [w.shape[0] for w in ends(params.weights)]
    generator = torch.Generator().manual_seed(seed)
    shape = (x.shape[0], sum(channels), *x.shape[2:])
    dtype = compute_dtype(x)
    dy = torch.randn(shape, generator=generator).to(device=x.device, dtype=dtype)

    masked: dict[torch.dtype, dict[str, Tensor]] = {}

    def run(call: Callable[..., tuple[Tensor, Statistics]], double: bool) -> dict[str, Tensor]:
        leaves = [leaf(t.detach().double() if double else t, backward) for t in given.values()]
        with torch.set_grad_enabled(backward):
            y, statistics = call(leaves[0], with_learned(params, leaves[1:]), block.activation)
        if call is _fused and statistics and backward:
            masked.update({t: gradients_given_masks(y, dy, t) for t in (dtype, torch.float64)})
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype)) if backward else ()
        found = dict(zip(slice_names(params.weights), y.detach().split(channels, dim=1), strict=True))
        for name, pair in zip(batch, filter(None, statistics), strict=False):
            found[f"mean {name}"], found[f"var {name}"] = pair
        rest = zip(given, grads, strict=False)
        return found | {f"d {name}": g for name, g in rest if name.removesuffix(".bias") not in batch}

    ours = run(_fused, False)
    # autocast leaves float64 alone.
    eager, truth = run(_reference, False), run(_reference, True)
    for found, t in ((eager, dtype), (truth, torch.float64)):
        found.update({f"d {name}": g for name, g in masked.get(t, {}).items()})
    # Of a mean, which may lie on either side of zero, the deviation.
    sizes = {what: truth[what.replace("mean", "var")].sqrt() for what in ours if what.startswith("mean ")}
    return [
        row(what, t, eager[what], truth[what], x, params.weights, dtype, sizes.get(what)) for what, t in ours.items()
    ]


def _with_batch_statistics(params: InceptionParams) -> list[str]:
    """The convolutions whose BatchNorm takes the statistics of the batch."""
    norms = zip(variant_of(params.weights).names, params.batch_norms or (), strict=False)
    return [name for name, norm in norms if takes_batch([norm])]


def _fused(x: Tensor, params: InceptionParams, activation: str | None) -> tuple[Tensor, Statistics]:
    """y, and statistics as normed_block() gives them where kernels take them."""
    dtype, wish = compute_dtype(x), backends.current()
    batch = takes_batch(params.batch_norms)
    if not batch or reasons.first(x.device, dtype, wish, x=x, params=params) is not None:
        return autograd.convolved(x, params, activation=activation), []
    check_call(x, params, activation)
    return normed_block(x.to(dtype), params, relu=activation == "relu", backend=wish)


def _reference(x: Tensor, params: InceptionParams, activation: str | None) -> tuple[Tensor, Statistics]:
    """The same by the reference, with the statistics of what its convolutions give."""
    statistics: Statistics = []

    def norm(y: Tensor, i: int) -> Tensor:
        own = params.batch_norms[i]
        if takes_batch([own]):
            var, mean = torch.var_mean(y.detach().to(accumulator_of(y.dtype)), (0, 2, 3), correction=0)
            statistics.append((mean, var))
        return y if own is None else batch_norm(y, own)

    if not takes_batch(params.batch_norms):
        return inception_reference(x, params, activation), statistics
    return inception_reference(x, params._replace(batch_norms=None), activation, norm=norm), statistics


def assert_parity(module: nn.Module, x: Tensor, *, backward: bool = True, seed: int = 0) -> list[Row]:
    """:func:`parity`, raising AssertionError with the figures of every slice or gradient beyond its bound."""
    rows = parity(module, x, backward=backward, seed=seed)
    bad = [
        f"{row.what}: error {row.ours.rms:.2e} (peak {row.ours.peak:.2e}), "
        f"eager {row.eager.rms:.2e}, bound {row.bound:.2e}"
        for row in rows
        if not row.ok
    ]
    if bad:
        raise AssertionError(f"{module} on x {tuple(x.shape)} {x.dtype}:\n  " + "\n  ".join(bad))
    return rows
