"""What N2 and N5 share, whose launches are of up to four convolutions whose columns lie side by side."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl

from inception_fused.block import batch_stats
from inception_fused.block.batch_stats import NormColumns

GROUPS = 4
"""Most convolutions of a launch."""

BATCH = tl.constexpr(batch_stats.BATCH)


@triton.jit
def of_group(group, first, second, third, fourth):
    """The value of a convolution, 0 to 3."""
    return tl.where(group < 2, tl.where(group == 0, first, second), tl.where(group == 2, third, fourth))


@triton.jit
def root(x):
    """sqrt(x), correctly rounded: sqrt_rn is there for fp32 alone."""
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


def filled(columns: Sequence[NormColumns]) -> list[NormColumns]:
    """As many as a kernel takes: those that are missing have no channels, and pointers so that no binary is made for
    them."""
    return [*columns, *[columns[0]._replace(channels=0)] * (GROUPS - len(columns))]
