"""The convolutions of a block, or of GoogLeNet's stem, with weights as PyTorch draws them."""

from __future__ import annotations

import torch
from torch import nn

from inception_fused.block.googlenet_blocks import Config, StemConfig
from inception_fused.block.reference import Inception


def convolutions(
    config: Config, *, bias: bool = True, branch3: int = 5, double: bool = False, dtype: torch.dtype | None = None
) -> list[nn.Conv2d]:
    """One a convolution, in the order of every list. branch3: the side of a block's third branch's window; double: it
    has two windows of 3x3 instead."""
    if isinstance(config, StemConfig):
        c, reduced, k = config
        given = dict(bias=bias, dtype=dtype)
        return [nn.Conv2d(c, reduced, 1, **given), nn.Conv2d(reduced, k, 3, padding=1, **given)]
    third = dict(branch3_kernel_size=3, branch3_convs=2) if double else dict(branch3_kernel_size=branch3)
    block = Inception(*config, **third, bias=bias, dtype=dtype)
    return [conv for conv in block.children() if isinstance(conv, nn.Conv2d)]
