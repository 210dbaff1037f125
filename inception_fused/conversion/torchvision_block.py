"""The block for torchvision's own plug-in point: ``GoogLeNet(blocks=[conv_block, TorchvisionInception, aux_block])``.

    branch1: conv_block 1x1
    branch2: conv_block 1x1 -> conv_block 3x3
    branch3: conv_block 1x1 -> conv_block 3x3              3x3 where the paper has 5x5, as in torchvision
    branch4: 3x3 max-pool -> conv_block 1x1

conv_block: a convolution without bias, BatchNorm and ReLU. Parameters, their names and a checkpoint's keys are
torchvision's, and from the same seed so are the values.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_fused.conversion.api import convert_


class ConvNormRelu(nn.Module):
    """A convolution without bias, BatchNorm with torchvision's eps of 1e-3, ReLU."""

    def __init__(self, in_channels: int, out_channels: int, **kwargs: object) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, K, H, W]."""
        return F.relu(self.bn(self.conv(x)), inplace=True)


class TorchvisionInception(nn.Module):
    """torchvision's Inception block, converted as soon as it is built; its arguments are torchvision's.

    Args:
        in_channels: C of the input.
        ch1x1, ch3x3, ch5x5, pool_proj: output channels of the four branches.
        ch3x3red, ch5x5red: channels of the reductions.
        conv_block: builds ``conv_block(in_channels, out_channels, **kwargs of Conv2d)``; default :class:`ConvNormRelu`.

    A conv_block that computes anything else than convolution, BatchNorm and ReLU is never replaced: a FallbackWarning
    says so.
    """

    def __init__(
        self,
        in_channels: int,
        ch1x1: int,
        ch3x3red: int,
        ch3x3: int,
        ch5x5red: int,
        ch5x5: int,
        pool_proj: int,
        conv_block: Callable[..., nn.Module] | None = None,
    ) -> None:
        super().__init__()
        conv = ConvNormRelu if conv_block is None else conv_block
        self.branch1 = conv(in_channels, ch1x1, kernel_size=1)
        self.branch2 = nn.Sequential(
            conv(in_channels, ch3x3red, kernel_size=1), conv(ch3x3red, ch3x3, kernel_size=3, padding=1)
        )
        self.branch3 = nn.Sequential(
            conv(in_channels, ch5x5red, kernel_size=1), conv(ch5x5red, ch5x5, kernel_size=3, padding=1)
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            conv(in_channels, pool_proj, kernel_size=1),
        )
        if type(self) is TorchvisionInception:
            # A subclass is not whole yet, and what it computes cannot be tried: convert_ takes it later.
            convert_(self)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, ch1x1 + ch3x3 + ch5x5 + pool_proj, H, W]."""
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), dim=1)
