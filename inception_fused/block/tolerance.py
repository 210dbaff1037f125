"""The one model of tolerances: how an error is measured, and what rounding explains of it.

An error is measured in two ways, both relative to the truth's RMS: the RMS of the difference, and its largest element,
so that one wrong border pixel cannot hide in an average.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inception_fused.block.chains import USUAL, ends, has_pool, variant_of
from inception_fused.errors import InceptionInputError

UNIT_ROUNDOFF = {torch.float64: 2.0**-53, torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half the distance from 1 to the next number; bfloat16 stores 8 significant bits, float16 11."""

TF32_ROUNDOFF = 2.0**-10
"""TF32 keeps 11 significant bits of an operand; a kernel may truncate where eager rounds to nearest (2**-11)."""

PEAK_FACTOR = 8.0
"""Largest element of an error over its RMS: rounding errors of normal data stay under 6 in 10**6 elements."""

SLICE_NAMES = ("branch 1", "branch 2", "branch 3", "branch 4")


def slice_names(weights: Sequence[object]) -> tuple[str, ...]:
    """Of the branches' outputs. weights: one value a convolution."""
    return SLICE_NAMES if has_pool(weights) else ("output",)


def gradient_names(weights: Sequence[object]) -> tuple[str, ...]:
    """ "x", then every weight's and every bias's name. weights: one value a convolution."""
    names = variant_of(weights).names
    return ("x", *(f"{n}.weight" for n in names), *(f"{n}.bias" for n in names))


GRADIENT_NAMES = gradient_names(USUAL.names)
"""x and the parameters in the order of every list of gradients."""


def tolerance(dtype: torch.dtype, reduction_length: int, *, tf32: bool = False) -> float:
    """The relative RMS error that rounding explains for sums of ``reduction_length`` products.

    One rounding of the result to dtype, and an accumulation in float32 (float64 for float64) whose error grows as the
    square root of the length (Higham and Mary, 2019, "A new approach to probabilistic rounding error analysis").
    tf32: operands are rounded, or truncated, to TF32 first.

    Raises:
        InceptionInputError: for a dtype other than float64, float32, float16, bfloat16, or a length below 1.
    """
    if dtype not in UNIT_ROUNDOFF:
        raise InceptionInputError(f"dtype: got {dtype!r}, wants one of {', '.join(map(str, UNIT_ROUNDOFF))}")
    if reduction_length < 1:
        raise InceptionInputError(f"reduction_length: got {reduction_length!r}, wants at least 1")
    accumulator = UNIT_ROUNDOFF[torch.float64 if dtype == torch.float64 else torch.float32]
    operands = TF32_ROUNDOFF if tf32 and dtype == torch.float32 else 0.0
    return UNIT_ROUNDOFF[dtype] + operands + 4 * accumulator * math.sqrt(reduction_length)


class Error(NamedTuple):
    """rms and peak of a difference, both over the RMS of the truth."""

    rms: float
    peak: float

    @classmethod
    def of(cls, out: Tensor, truth: Tensor, size: Tensor | None = None) -> Error:
        """NaN where out has a NaN that the truth has not; inf against a truth of zeros.

        size: the root of the squares that each element adds up. Where its RMS is larger than the truth's, it serves
        as the scale: the sums of a few elements may all happen to cancel, and their rounding errors do not.
        """
        difference = out.double() - truth.double()
        if difference.numel() == 0:
            return cls(0.0, 0.0)
        scale = max(t.double().square().mean().sqrt().item() for t in (truth, size) if t is not None)
        rms, peak = difference.square().mean().sqrt().item(), difference.abs().max().item()
        if scale == 0:
            return cls(0.0, 0.0) if peak == 0 else cls(math.inf, math.inf)
        return cls(rms / scale, peak / scale)

    def within(self, bound: float) -> bool:
        """False for NaN."""
        return self.rms <= bound and self.peak <= PEAK_FACTOR * bound


class Measure(NamedTuple):
    """One of the two measures of a row: kind ("rms" or "peak"), our error, eager's, and the bound for ours."""

    kind: str
    ours: float
    eager: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.ours <= self.bound

    @property
    def ratio(self) -> float:
        """Our error over its bound, at most 1 where ok; inf where it is no number."""
        return _ratio(self.ours, self.bound)

    @property
    def eager_ratio(self) -> float:
        """Eager's error over the bound for ours."""
        return _ratio(self.eager, self.bound)


class Row(NamedTuple):
    """One line of a parity table: ours and eager's error against float64, and the bound for ours."""

    what: str
    ours: Error
    eager: Error
    bound: float

    @property
    def ok(self) -> bool:
        return all(measure.ok for measure in self.measures)

    @property
    def measures(self) -> tuple[Measure, Measure]:
        """RMS and peak, each with its bound."""
        peak_bound = PEAK_FACTOR * max(self.bound, self.eager.peak)
        return (
            Measure("rms", self.ours.rms, self.eager.rms, self.bound),
            Measure("peak", self.ours.peak, self.eager.peak, peak_bound),
        )

    @property
    def decisive(self) -> Measure:
        """The measure that is worse."""
        return max(self.measures, key=lambda measure: (not measure.ok, measure.ratio))


def row(
    what: str, ours: Tensor, eager: Tensor, truth: Tensor, x: Tensor, weights: Sequence[Tensor], dtype: torch.dtype,
    size: Tensor | None = None,
) -> Row:  # fmt: skip
    """The row of one result of a block on x [N, C, H, W] with these weights that computes in dtype.

    what: one of :func:`slice_names`, "mean " or "var " and a convolution's name, "d x", or "d " and a parameter's name.
    ours, eager, truth: of one shape. size: as of :meth:`Error.of`. The bound is twice eager's error plus
    :func:`tolerance`.
    """
    # The longest sums behind a slice and behind a gradient: a reduction feeding a window, and every pixel or filter.
    longest = max(w.shape[1:].numel() for w in weights) + x.shape[1]
    if what == "d x":
        longest += sum(w.shape[0] for w in ends(weights))
    elif what.startswith(("d ", "mean ", "var ")):
        longest += max(x.shape[0] * x.shape[2] * x.shape[3], 1)
    eager_error = Error.of(eager, truth, size)
    bound = 2 * eager_error.rms + tolerance(dtype, longest, tf32=x.is_cuda and dtype == torch.float32)
    return Row(what, Error.of(ours, truth, size), eager_error, bound)


def _ratio(error: float, bound: float) -> float:
    ratio = error / bound
    return math.inf if math.isnan(ratio) else ratio
