"""Every refusal of a wrong operand.

The checks stand between a wrong call and a kernel that reads beyond a tensor; launches from memory (runtime/replay.py)
rely on those of the planned calls before them.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice

import torch
from torch import Tensor

from inception_fused.block import batch_stats, chains
from inception_fused.block.call_types import NormedSaved, NormedSaves, Saved, Saves
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import MISSING_SHAPE, BlockTensors, Norms, named
from inception_fused.block.views import accumulator_of
from inception_fused.errors import InceptionInputError


def check_parameter_shapes(tensors: BlockTensors) -> None:
    """One weight [K, C, R, R] a convolution, R one of its sides and C what it reads: x's channels or the filters of the
    convolution before it; a bias [K] for each, or none; vectors [K] of BatchNorm, None where one is not given."""
    weights = tensors.weights
    shape = chains.first(weights).shape
    read = chains.inputs(shape[1] if len(shape) == 4 else "C", [w.shape[0] if w.dim() else None for w in weights])
    for conv, w, channels in zip(chains.variant_of(weights).convs, weights, read, strict=True):
        shape = tuple(w.shape)
        if len(shape) != 4 or shape[1] != channels or shape[2] != shape[3] or shape[2] not in conv.sides or 0 in shape:
            kernel = " or ".join(f"{side}x{side}" for side in conv.sides)
            raise InceptionInputError(
                f"{conv.name}.weight: got shape {shape}, wants (K, {channels}, R, R) with kernel {kernel}"
            )
    for (name, t), w in zip(islice(named(tensors), len(weights), None), cycle(weights), strict=False):
        if t is not None and tuple(t.shape) not in ((w.shape[0],), MISSING_SHAPE):
            raise InceptionInputError(f"{name}: got shape {tuple(t.shape)}, wants ({w.shape[0]},)")
    means, variances, *_ = Norms.of(tensors.norms)
    for name, mean, var in zip(chains.variant_of(weights).names, means, variances, strict=False):
        if mean is not None and var is not None and mean.dim() != var.dim():
            raise InceptionInputError(f"{name} batch_norm: got one of mean and var, wants both or, for none, neither")


def check_operands(x: Tensor, tensors: BlockTensors) -> None:
    """Raise InceptionInputError unless all parameters belong to x [N, C, H, W] and lie on its device.

    :func:`inception_fused.inception` has checked its call; what a backward is given may have changed since, and
    ``FusedInceptionFunction`` may be called by anyone.
    """
    fault = tensors.fault()
    if fault:
        raise InceptionInputError(fault)
    check_parameter_shapes(tensors)
    c = chains.first(tensors.weights).shape[1]
    if x.dim() != 4 or x.shape[1] != c:
        raise InceptionInputError(f"x: got shape {tuple(x.shape)}, wants [N, {c}, H, W]")
    check_device(x, tensors)
    check_memory("x", x, x)
    for name, t in named_parameters(tensors):
        check_memory(name, t, x)


def check_device(x: Tensor, tensors: BlockTensors) -> None:
    """Raise InceptionInputError unless all lie on x's device."""
    for name, t in named_parameters(tensors):
        if t.device != x.device:
            raise InceptionInputError(f"x: got device {x.device}, {name} is on {t.device}; wants one device for both")


def named_parameters(tensors: BlockTensors) -> Iterator[tuple[str, Tensor]]:
    """Weights, biases and BatchNorm's vectors that are there, with the names that messages call them by."""
    return ((name, t) for name, t in named(tensors) if t is not None)


def check_saved(shape: BlockShape, dy: Tensor, x: Tensor, saved: Saved, saves: Saves) -> None:
    """Raise InceptionInputError unless dy, r, bits and taps are what a forward of this shape gave or asks for.

    saves: which of r, bits and taps the wanted gradients need; the others may be empty.
    """
    check_gradient(shape, dy, x)
    expected = Saved((shape.r_width, x.dtype), (shape.bits_width, torch.uint8), (shape.taps_width, torch.uint8))
    for name, t, needed, (width, dtype) in zip(Saved._fields, saved, saves, expected, strict=True):
        check_memory(name, t, x)
        if needed or t.numel():
            check_matrix(name, t, (shape.gemm_m, width), dtype)


def check_normed(
    shape: BlockShape, dy: Tensor, x: Tensor, saved: NormedSaved, saves: NormedSaves, *, shared: bool
) -> None:
    """:func:`check_saved` of a forward with the statistics of the batch. shared: of several processes' batch."""
    check_gradient(shape, dy, x)
    m, r = shape.gemm_m, (shape.gemm_m, shape.r_width)
    taps = (m, shape.taps_width), torch.uint8
    numbers = batch_stats.SYNCHRONISED if shared else batch_stats.STATISTICS
    stats = (numbers, batch_stats.width(shape)), accumulator_of(x.dtype)
    expected = NormedSaved(((m, shape.k), x.dtype), (r, x.dtype), (r, x.dtype), taps, stats)
    for name, t, needed, (size, dtype) in zip(NormedSaved._fields, saved, (*saves, True), expected, strict=True):
        check_memory(name, t, x)
        if needed or t.numel():
            check_matrix(name, t, size, dtype)


def check_gradient(shape: BlockShape, dy: Tensor, x: Tensor) -> None:
    """Raise InceptionInputError unless dy is the gradient of an output of this shape."""
    if tuple(dy.shape) != (shape.n, shape.k, shape.h, shape.w):
        wants = f"({shape.n}, {shape.k}, {shape.h}, {shape.w})"
        raise InceptionInputError(f"dy: got shape {tuple(dy.shape)}, wants {wants}, by what the forward was given")
    check_memory("dy", dy, x)


def check_matrix(name: str, t: Tensor, size: tuple[int, int], dtype: torch.dtype) -> None:
    """Raise InceptionInputError unless t is a dense matrix as the forward saved it."""
    if tuple(t.shape) != size or t.dtype != dtype or not t.is_contiguous():
        got = f"{t.dtype} {tuple(t.shape)} with strides {t.stride()}"
        raise InceptionInputError(f"{name}: got {got}, wants dense {dtype} {size} as the forward saved it")


def check_memory(what: str, t: Tensor, x: Tensor) -> None:
    """Raise InceptionInputError unless t is on x's device, and there at all."""
    check_place(what, t, x)
    if t.numel() and not t.is_meta and not t.data_ptr():
        raise InceptionInputError(f"{what}: its memory was freed (a storage of 0 bytes), wants {t.numel()} elements")


def check_place(what: str, t: Tensor, x: Tensor) -> None:
    """Raise InceptionInputError unless t is on x's device."""
    if t.device != x.device:
        raise InceptionInputError(f"{what}: got device {t.device}, x is on {x.device}; wants one device for both")
