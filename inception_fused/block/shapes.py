"""Sizes of one block, and where everything of it lies: slices of the output, of its mask bits, of its gradients."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.views import ChannelSlice, bits_width, taps_width


class BlockShape(NamedTuple):
    """Sizes of one block and the places of its slices.

    n, h, w: images and their size; c: channels of x. filters, sides: K and R of every weight [K, C, R, R], in the order
    of its variant. itemsize: bytes of an element.
    """

    n: int
    h: int
    w: int
    c: int
    filters: tuple[int, ...]
    sides: tuple[int, ...]
    itemsize: int

    @classmethod
    def of(cls, x: Tensor, weights: Sequence[Tensor]) -> BlockShape:
        """From x [N, C, H, W] and the weights."""
        n, c, h, w = x.shape
        sizes = [weight.shape for weight in weights]
        return cls(n, h, w, c, tuple([s[0] for s in sizes]), tuple([s[-1] for s in sizes]), x.element_size())

    @property
    def variant(self) -> chains.Variant:
        return chains.variant_of(self.filters)

    @property
    def gemm_m(self) -> int:
        return self.n * self.h * self.w

    @property
    def image(self) -> tuple[int, int]:
        return self.h, self.w

    @property
    def k(self) -> int:
        """Output channels of the block."""
        return self._widths.k

    @property
    def branch_channels(self) -> tuple[int, ...]:
        return self._widths.branches

    @property
    def inputs(self) -> list[int]:
        """Input channels of every convolution."""
        return chains.inputs(self.c, self.filters)

    @property
    def weight_sizes(self) -> list[int]:
        """Elements of every weight."""
        return [k * c * side**2 for k, c, side in zip(self.filters, self.inputs, self.sides, strict=True)]

    @property
    def r_channels(self) -> tuple[int, ...]:
        """Channels of r's parts: the outputs of the convolutions that another one reads."""
        return self._widths.r_channels

    @property
    def r_widths(self) -> tuple[int, ...]:
        """Channels of r's parts, each padded to 16 bytes."""
        return self._widths.r_widths

    @property
    def r_offsets(self) -> tuple[int, ...]:
        """Where the parts of r begin."""
        return self._widths.r_offsets

    @property
    def r5(self) -> int:
        """Where r5 begins; where [r3 | r5] ends if there is none."""
        return (*self.r_offsets, self.reduced_width)[1]

    @property
    def r_width(self) -> int:
        """Channels of r = [r3 | r5], or [r3 | r5 | t], each part padded to 16 bytes."""
        return self._widths.r_width

    @property
    def r_padded(self) -> bool:
        """Whether r has channels that belong to no convolution."""
        return self.r_width != sum(self.r_channels)

    @property
    def bits_width(self) -> int:
        """Bytes of mask bits per pixel; every branch begins a byte of its own."""
        return sum(map(bits_width, self.branch_channels))

    @property
    def taps_width(self) -> int:
        """Bytes of arg-max taps per pixel; 0 where there is no pool."""
        return taps_width(self.c) if chains.has_pool(self.filters) else 0

    def y_slices(self, y: Tensor) -> list[ChannelSlice]:
        """The branches' slices of y [N, k, H, W] in channels_last memory."""
        return _side_by_side(y, self.k, self.branch_channels, self.branch_channels)

    def bits_slices(self, bits: Tensor) -> list[ChannelSlice]:
        """The branches' slices of bits [gemm_m, bits_width]; channels counts bytes."""
        widths = [bits_width(k) for k in self.branch_channels]
        return _side_by_side(bits, self.bits_width, widths, widths)

    def r_slices(self, r: Tensor) -> list[ChannelSlice]:
        """r3, r5 and, where branch 3 has two windows, the t between those, in r [gemm_m, r_width]."""
        return _side_by_side(r, self.r_width, self.r_channels, self.r_widths)

    @property
    def grads_width(self) -> int:
        """Channels of the backward pass's buffer of rows: [g2 | g3 | g4 | g1 | dr3 | dr5 | dt].

        In this order the operands of the reductions' gradients lie side by side and are one matrix. dt is there where r
        has t.
        """
        return self.k + self.r_width

    def g_slices(self, grads: Tensor) -> list[ChannelSlice]:
        """The branches' masked gradients in grads [gemm_m, grads_width]."""
        first, *others = self.branch_channels
        *found, g1 = _side_by_side(grads, self.grads_width, *[(*others, first)] * 2)
        return [g1, *found]

    def dr_slices(self, grads: Tensor) -> list[ChannelSlice]:
        """The gradients of r's parts in grads [gemm_m, grads_width]."""
        parts = self.r_slices(grads)
        return [part._replace(row_stride=self.grads_width, c_offset=self.k + part.c_offset) for part in parts]

    def reductions_slice(self, grads: Tensor, first: int, last: int) -> ChannelSlice:
        """Columns first to last of [g1 | dr3 | dr5] in grads [gemm_m, grads_width]."""
        return ChannelSlice(grads, self.grads_width, self.k - self._widths.direct + first, last - first)

    @property
    def reductions_width(self) -> int:
        """Columns of [g1 | dr3 | dr5]."""
        return self._widths.direct + self.reduced_width

    @property
    def reduced_width(self) -> int:
        """Columns of [dr3 | dr5], and of [r3 | r5]."""
        return self._widths.reduced_width

    @property
    def reductions(self) -> tuple[tuple[int, int], ...]:
        """(first, last) column of g1, dr3 and dr5 in [g1 | dr3 | dr5], whose last two are padded to 16 bytes."""
        k1 = self._widths.direct
        reduced = [k1 + o for o in self.r_offsets if o < self.reduced_width]
        inner = [(start, start + k) for start, k in zip(reduced, self.r_channels, strict=False)]
        return ((0, k1), *inner) if k1 else tuple(inner)

    @property
    def _widths(self) -> _Widths:
        try:
            return _widths_of(self.filters, self.itemsize)
        except TypeError:
            # A tracer's symbolic sizes cannot be looked up.
            return _widths_of.__wrapped__(self.filters, self.itemsize)


class _Widths(NamedTuple):
    """What the filters alone say, and every slice asks for. direct: channels of the branch that is a reduction alone, 0
    where there is none."""

    branches: tuple[int, ...]
    direct: int
    k: int
    r_channels: tuple[int, ...]
    r_widths: tuple[int, ...]
    r_offsets: tuple[int, ...]
    r_width: int
    reduced_width: int


@lru_cache(maxsize=256)
def _widths_of(filters: tuple[int, ...], itemsize: int) -> _Widths:
    variant, unit = chains.variant_of(filters), 16 // itemsize
    branches, r_channels = tuple(chains.ends(filters)), tuple(chains.inner(filters))
    r_widths = tuple([-(-channels // unit) * unit for channels in r_channels])
    # They come first: the chain with two windows is the last that begins with a reduction.
    reduced = sum(width for i, width in zip(variant.inner, r_widths, strict=True) if i in variant.reductions)
    starts = tuple(_starts(r_widths))
    return _Widths(
        branches, chains.direct(filters), sum(branches), r_channels, r_widths, starts, sum(r_widths), reduced
    )


def _starts(widths: Sequence[int]) -> list[int]:
    return [sum(widths[:i]) for i in range(len(widths))]


def _side_by_side(base: Tensor, row_stride: int, channels: Sequence[int], widths: Sequence[int]) -> list[ChannelSlice]:
    return [ChannelSlice(base, row_stride, o, c) for o, c in zip(_starts(widths), channels, strict=True)]
