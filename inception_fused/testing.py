"""Parity with the truth: inputs, error measures and the one model of tolerances, for tests, benchmarks and users.

The truth is the reference in float64; how an error is measured and what it may be is in block/tolerance.py.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from inception_fused.block.chains import ends
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, spatial_size
from inception_fused.block.leaves import leaf
from inception_fused.block.reference import InceptionParams, inception_reference, parameters_of, with_parameters
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
    tolerance,
)
from inception_fused.conversion.fused_blocks import view_of
from inception_fused.errors import InceptionInputError
from inception_fused.op import autograd

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

    module: a :class:`FusedInception` or a converted block, whose BatchNorms' own gradients are left out; x:
    [N, C, H, W] on the parameters' device and, outside autocast, of their dtype. The bound is twice eager's own error
    plus :func:`tolerance`. Runs under the backend and autocast in force; gradients of module and x are left alone.
    """
    block = view_of(module)
    if block is None:
        raise InceptionInputError(f"module: got {type(module).__name__}, wants a FusedInception or a converted block")
    if block.eager_reason() is not None:
        raise InceptionInputError(f"module: got a block whose {block.eager_reason()}, wants one that kernels can run")
    params = block.params()
    given = [x, *parameters_of(params)]
    there = [True, *(b is not None for b in (*params.weights, *(params.biases or ())))]
    names = [name for name, kept in zip(gradient_names(params.weights), there, strict=False) if kept]
    channels = [w.shape[0] for w in ends(params.weights)]
    generator = torch.Generator().manual_seed(seed)
    shape = (x.shape[0], sum(channels), *x.shape[2:])
    dtype = autograd.compute_dtype(x)
    dy = torch.randn(shape, generator=generator).to(device=x.device, dtype=dtype)

    def run(call: Callable[[Tensor, InceptionParams], Tensor], double: bool) -> list[Tensor]:
        leaves = [leaf(t.detach().double() if double else t, backward) for t in given]
        with torch.set_grad_enabled(backward):
            y = call(leaves[0], with_parameters(params, leaves[1:]))
        grads = torch.autograd.grad(y, leaves, dy.to(y.dtype)) if backward else ()
        return [*y.detach().split(channels, dim=1), *grads]

    def reference(x: Tensor, p: InceptionParams) -> Tensor:
        return inception_reference(x, p, block.activation)

    ours = run(lambda x, p: autograd.inception(x, p, activation=block.activation), False)
    # autocast leaves float64 alone.
    eager, truth = run(reference, False), run(reference, True)
    what = [*SLICE_NAMES, *(f"d {name}" for name in names)]
    return [row(*each, x, params.weights, dtype) for each in zip(what, ours, eager, truth, strict=False)]


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
