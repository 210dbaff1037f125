"""One launch of a block of a size: its GEMM, the unit of its loads, what it reads and writes, its FLOP and bytes."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

from inception_fused.block import chains
from inception_fused.block.shapes import BlockShape
from inception_fused.block.views import unit_of
from inception_fused.plan import launches
from inception_fused.plan.kernel_table import Kernel
from inception_fused.plan.launches import (
    COMBINE,
    DGRAD,
    DGRAD_X,
    FPROP,
    GEMMS,
    MASK,
    NORMALISE,
    PACK,
    STATISTICS,
    WGRAD,
    Row,
)  # fmt: skip
from inception_fused.plan.rules import PLANNED, Capability

PARTIAL_SUM_BYTES = 4

MASK_GEMM_K = 16
"""A mask sums nothing along GEMM_K; the number only stands in the key of a tuned tile."""


class Gemm(NamedTuple):
    """m, n: rows and columns of the result. k: channels of the sum, of which GEMM_K is ``taps`` times as much; pixels
    for wgrad, where the window is in n."""

    m: int
    n: int
    k: int
    taps: int = 1


class Launch(NamedTuple):
    """A row of the table for one block.

    gemm: None for what packs or adds up. unit: as unit_of() gives it; None for a forward's pack, which copies whole
    weights, and for what combines sums. capability: of the GPU that it is for.
    """

    row: Row
    shape: BlockShape
    dtype: torch.dtype
    gemm: Gemm | None
    unit: int | None
    capability: Capability = PLANNED

    @property
    def name(self) -> str:
        return self.row.name

    @property
    def kernel(self) -> Kernel:
        return self.row.kernel

    @property
    def rules(self) -> str:
        """The key of its tiles, in kernel_table.RULES and in a tuned table."""
        return self.row.rules

    @property
    def pixels(self) -> int:
        return self.shape.gemm_m

    @property
    def filters(self) -> list[int]:
        """Of each of its convolutions."""
        filters = dict(zip(self.shape.variant.names, self.shape.filters, strict=True))
        return [filters[conv] for conv in self.row.convs]

    @property
    def is_output(self) -> bool:
        """Whether one of its convolutions ends a branch: of others no forward saves bits."""
        ends = chains.ends(self.shape.variant.names)
        return any(conv in ends for conv in self.row.convs)

    @property
    def apart(self) -> bool:
        """Whether BatchNorm's launch has tiles of columns for each convolution: the gradient of y is written branch by
        branch, all else as one matrix."""
        return _apart(self.row, self.shape)

    def strided(self) -> Launch:
        """The same where the gradient of the output is no matrix of rows."""
        return self._replace(row=self.row._replace(rules=f"{self.rules} strided"))

    @property
    def flop(self) -> int:
        """On the matrix units, taps that fall on zero padding counted, as a GEMM does them."""
        if self.row.role not in GEMMS:
            return 0
        return 2 * self.shape.gemm_m * sum(self._of_weights())

    @property
    def bytes(self) -> int:
        """Through device memory: every input read once, every output written once."""
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def reads(self) -> dict[str, int]:
        """Bytes by operand. Left out are biases (1.5 KB a block)."""
        names = self.shape.variant.names
        s, e, rows, role = self.shape, self.shape.itemsize, self.shape.gemm_m, self.row.role
        sources = dict(zip(names, chains.inputs("x", names), strict=True))
        channels = dict(zip(names, s.inputs, strict=True))
        weights = {f"{conv}.weight": e * size for conv, size in zip(self.row.convs, self._of_weights(), strict=True)}
        outputs = {f"{conv}.grad": e * rows * k for conv, k in zip(self.row.convs, self.filters, strict=True)}
        first = self.row.convs[0]
        source = {sources[first]: e * rows * channels[first]}
        if role == PACK:
            return weights
        if role == FPROP:
            return source | weights
        if role == MASK:
            return {"dy": e * rows * s.k, "bits": rows * (s.k // 8)}
        if role in (STATISTICS, NORMALISE):
            return {f"{conv} raw": size for conv, size in zip(self.row.convs, outputs.values(), strict=True)} | (
                outputs if self.row.direction == "backward" else {}
            )
        if role == COMBINE:
            return {f"{conv} statistics": size for conv, size in self._statistics().items()}
        if role == DGRAD:
            raw = {"raw": source[sources[first]]} if self.row.centred else {}
            return outputs | weights | raw | (source if sources[first] != "x" else {})
        if role == DGRAD_X:
            return outputs | weights | {"dpool": e * rows * s.c, "taps": rows * (s.c // 2)}
        if role == WGRAD:
            return outputs | source
        return {f"{name} parts": PARTIAL_SUM_BYTES * (size // e) for name, size in weights.items()}

    @property
    def writes(self) -> dict[str, int]:
        """Bytes by operand. Left out are the bits and taps that a forward writes for its backward; of partial sums one
        part is charged, which is the least there can be."""
        s, e, rows, role = self.shape, self.shape.itemsize, self.shape.gemm_m, self.row.role
        weights = dict(zip(self.row.convs, self._of_weights(), strict=True))
        if role == FPROP:
            return {conv: e * rows * k for conv, k in zip(self.row.convs, self.filters, strict=True)}
        if role == MASK:
            return {"g": e * rows * s.k}
        if role == NORMALISE:
            kind = "g" if self.row.direction == "backward" else "normalised"
            return {f"{conv} {kind}": e * rows * k for conv, k in zip(self.row.convs, self.filters, strict=True)}
        if role in (STATISTICS, COMBINE):
            return {f"{conv} statistics": size for conv, size in self._statistics().items()}
        if role in (DGRAD, DGRAD_X):
            channels = dict(zip(s.variant.names, s.inputs, strict=True))[self.row.convs[0]]
            return {"dx" if role == DGRAD_X else "gradient of its input": e * rows * channels}
        width = PARTIAL_SUM_BYTES if role == WGRAD else e
        return {f"{conv} {'parts' if role == WGRAD else 'out'}": width * size for conv, size in weights.items()}

    def _statistics(self) -> dict[str, int]:
        """Bytes of two sums a channel."""
        return {conv: 2 * PARTIAL_SUM_BYTES * k for conv, k in zip(self.row.convs, self.filters, strict=True)}

    def _of_weights(self) -> list[int]:
        sizes = dict(zip(self.shape.variant.names, self.shape.weight_sizes, strict=True))
        return [sizes[conv] for conv in self.row.convs]


def launches_of(
    shape: BlockShape, dtype: torch.dtype, direction: str, *, x_row_stride: int | None = None, aligned: bool = True,
    capability: Capability = PLANNED, normed: bool = False,
) -> list[Launch]:  # fmt: skip
    """Every launch of a pass, in order; arguments as for :func:`launch_of`. normed: with statistics of the batch."""
    given = dict(x_row_stride=x_row_stride, aligned=aligned, capability=capability)
    rows = launches.table_of(shape.filters, normed=normed).rows[direction]
    return [launch_of(row, shape, dtype, **given) for row in rows]


def launch_of(
    row: Row, shape: BlockShape, dtype: torch.dtype, *, x_row_stride: int | None = None, aligned: bool = True,
    capability: Capability = PLANNED,
) -> Launch:  # fmt: skip
    """A row for one block. x_row_stride: of the block's input in elements, None for a dense one; aligned: whether its
    first element lies on 16 bytes."""
    return _launch_of(row, shape, dtype, shape.c if x_row_stride is None else x_row_stride, aligned, capability)


@lru_cache(maxsize=4096)
def _launch_of(
    row: Row, shape: BlockShape, dtype: torch.dtype, x_row_stride: int, aligned: bool, capability: Capability
) -> Launch:
    return Launch(row, shape, dtype, _gemm(row, shape), _unit(row, shape, dtype, x_row_stride, aligned), capability)


def _gemm(row: Row, s: BlockShape) -> Gemm | None:
    places = [s.variant.names.index(conv) for conv in row.convs]
    filters, channels, taps = sum(s.filters[i] for i in places), s.inputs[places[0]], s.sides[places[0]] ** 2
    if row.role == FPROP:
        return Gemm(s.gemm_m, filters, channels, taps)
    if row.role in (STATISTICS, NORMALISE):
        return Gemm(s.gemm_m, max(s.branch_channels) if _apart(row, s) else filters, MASK_GEMM_K)
    if row.role == MASK:
        return Gemm(s.gemm_m, max(s.branch_channels), MASK_GEMM_K)
    if row.role == DGRAD:
        # Padding channels of r are computed, and come out as zeros.
        widths = dict(zip(chains.windows(s.variant.names), s.r_widths, strict=True))
        return Gemm(s.gemm_m, widths.get(row.convs[0], s.c), filters, taps)
    if row.role == DGRAD_X:
        return Gemm(s.gemm_m, s.c, s.reductions_width)
    if row.role == WGRAD:
        # The reductions' columns with the padding between them.
        return Gemm(s.reductions[-1][1] if len(row.convs) > 1 else filters, taps * channels, s.gemm_m)
    return None


def _apart(row: Row, s: BlockShape) -> bool:
    backward = row.role == NORMALISE and row.direction == "backward"
    return backward and len(row.convs) == len(s.branch_channels)


def _unit(row: Row, s: BlockShape, dtype: torch.dtype, x_row_stride: int, aligned: bool) -> int | None:
    """Elements of a load: by what a forward kernel reads and writes; one for all of a backward, 1 if any channel count
    of the block is odd to it."""
    if row.role == COMBINE or (row.role == PACK and row.direction == "forward"):
        return None
    if row.reads_x and not aligned:
        return 1
    x = (x_row_stride,) if row.reads_x else ()
    if row.direction == "backward":
        return unit_of(dtype, s.c, *s.filters, *x)
    if row.role in (STATISTICS, NORMALISE):
        # r is padded.
        return unit_of(dtype, s.k) if len(row.convs) == len(s.branch_channels) else unit_of(dtype)
    places = [s.variant.names.index(conv) for conv in row.convs]
    offsets = chains.from_outputs(
        [sum(s.branch_channels[:i]) for i in range(len(s.branch_channels))], [0] * len(s.r_channels)
    )
    return unit_of(dtype, s.inputs[places[0]], s.k, *x, *(v[i] for v in (s.filters, offsets) for i in places))
