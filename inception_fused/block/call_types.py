"""What one call of the operators is given, as values: each layer hands on one of these, not a list of ten arguments.

M below is N * H * W of x, one row a pixel. "Normed" is a block with BatchNorm that takes the statistics of the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from inception_fused.block.tensor_lists import BlockTensors, Needs


class Saves(NamedTuple):
    """Which outputs beside y a forward writes for its backward, see :class:`Saved`."""

    r: bool
    bits: bool
    taps: bool


class Saved(NamedTuple):
    """The outputs of a forward beside y, each empty [0] where :class:`Saves` does not ask for it.

    r: [M, r_width] in x's dtype, the reductions' outputs side by side. bits: uint8 [M, bits_width], one mask bit an
    element of y. taps: uint8 [M, taps_width], four bits of the max-pool's arg-max an element of x.
    """

    r: Tensor
    bits: Tensor
    taps: Tensor


class ForwardCall(NamedTuple):
    """One call of the forward operator.

    x: [N, C, H, W], any strides. relu: whether every convolution is followed by ReLU. backend: the backend asked for.
    """

    x: Tensor
    tensors: BlockTensors
    relu: bool
    saves: Saves
    backend: str


class BackwardCall(NamedTuple):
    """One call of the backward operator, which is that of a block without BatchNorm.

    dy: [N, K, H, W], any strides. x: [N, C, H, W] and weights, one [K, C, R, R] a convolution: where no value is read,
    anything of their shapes and dtype. bias_dtypes: one a convolution, or none where it has no biases, of which no
    value is read. needs: the wanted gradients.
    """

    dy: Tensor
    x: Tensor
    saved: Saved
    weights: Sequence[Tensor]
    bias_dtypes: Sequence[torch.dtype]
    relu: bool
    needs: Needs
    backend: str


class NormedSaves(NamedTuple):
    """Which outputs beside y and the statistics such a forward keeps, see :class:`NormedSaved`."""

    raw: bool
    raw_r: bool
    r: bool
    taps: bool


class NormedSaved(NamedTuple):
    """The outputs of such a forward beside y, each empty [0] where :class:`NormedSaves` does not ask for it.

    raw: [M, K] and raw_r: [M, r_width] in x's dtype, what the convolutions gave. r, taps: as of :class:`Saved`. stats:
    fp32 [5, K + r_width], as batch_stats.py has them.
    """

    raw: Tensor
    raw_r: Tensor
    r: Tensor
    taps: Tensor
    stats: Tensor


class NormedCall(NamedTuple):
    """One call of such a forward. modes: of each convolution, as batch_stats.py has them. group: the name of the
    process group over which the batch is spread, "" for none. The rest as of :class:`ForwardCall`."""

    x: Tensor
    tensors: BlockTensors
    modes: Sequence[int]
    relu: bool
    saves: NormedSaves
    backend: str
    group: str = ""


class NormedBackwardCall(NamedTuple):
    """One call of its backward. eps: of each convolution, 1 where it has no BatchNorm. needs: of x, weights, and of any
    vector of each convolution. vectors: which gradients of (gamma, beta, bias) are wanted, each a dtype or None. The
    rest as of :class:`BackwardCall`."""

    dy: Tensor
    x: Tensor
    saved: NormedSaved
    weights: Sequence[Tensor]
    eps: Sequence[float]
    modes: Sequence[int]
    vectors: Sequence[tuple[torch.dtype | None, ...]]
    relu: bool
    needs: Needs
    backend: str
    group: str = ""
