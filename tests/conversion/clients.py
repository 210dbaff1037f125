"""The Inception block as it stands in other people's code: small models of the same structure, written anew."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

C, C1, C2, C3, C4 = 24, 16, (8, 24), (8, 16), 8


class OldD2l(nn.Module):
    """d2l's first editions: p1_1 to p4_2."""

    def __init__(self, in_channels, c1, c2, c3, c4, **kwargs):
        super().__init__(**kwargs)
        self.p1_1 = nn.Conv2d(in_channels, c1, kernel_size=1)
        self.p2_1 = nn.Conv2d(in_channels, c2[0], kernel_size=1)
        self.p2_2 = nn.Conv2d(c2[0], c2[1], kernel_size=3, padding=1)
        self.p3_1 = nn.Conv2d(in_channels, c3[0], kernel_size=1)
        self.p3_2 = nn.Conv2d(c3[0], c3[1], kernel_size=5, padding=2)
        self.p4_1 = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
        self.p4_2 = nn.Conv2d(in_channels, c4, kernel_size=1)

    def forward(self, x):
        p1 = F.relu(self.p1_1(x))
        p2 = F.relu(self.p2_2(F.relu(self.p2_1(x))))
        p3 = F.relu(self.p3_2(F.relu(self.p3_1(x))))
        p4 = F.relu(self.p4_2(self.p4_1(x)))
        return torch.cat((p1, p2, p3, p4), dim=1)


class NewD2l(nn.Module):
    """d2l 1.0: b1_1 to b4_2, input channels from the first input."""

    def __init__(self, c1, c2, c3, c4):
        super().__init__()
        self.b1_1 = nn.LazyConv2d(c1, kernel_size=1)
        self.b2_1 = nn.LazyConv2d(c2[0], kernel_size=1)
        self.b2_2 = nn.LazyConv2d(c2[1], kernel_size=3, padding=1)
        self.b3_1 = nn.LazyConv2d(c3[0], kernel_size=1)
        self.b3_2 = nn.LazyConv2d(c3[1], kernel_size=5, padding=2)
        self.b4_1 = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
        self.b4_2 = nn.LazyConv2d(c4, kernel_size=1)

    def forward(self, x):
        b1 = F.relu(self.b1_1(x))
        b2 = F.relu(self.b2_2(F.relu(self.b2_1(x))))
        b3 = F.relu(self.b3_2(F.relu(self.b3_1(x))))
        b4 = F.relu(self.b4_2(self.b4_1(x)))
        return torch.cat((b1, b2, b3, b4), dim=1)


class Bare(nn.Module):
    """KernelBench's: four branches without activation."""

    def __init__(self, in_channels, out_1x1, reduce_3x3, out_3x3, reduce_5x5, out_5x5, pool_proj):
        super().__init__()
        self.branch1x1 = nn.Conv2d(in_channels, out_1x1, kernel_size=1)
        self.branch3x3 = nn.Sequential(
            nn.Conv2d(in_channels, reduce_3x3, kernel_size=1), nn.Conv2d(reduce_3x3, out_3x3, kernel_size=3, padding=1)
        )
        self.branch5x5 = nn.Sequential(
            nn.Conv2d(in_channels, reduce_5x5, kernel_size=1), nn.Conv2d(reduce_5x5, out_5x5, kernel_size=5, padding=2)
        )
        self.branch_pool = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1), nn.Conv2d(in_channels, pool_proj, kernel_size=1)
        )

    def forward(self, x):
        return torch.cat((self.branch1x1(x), self.branch3x3(x), self.branch5x5(x), self.branch_pool(x)), 1)


class BasicConv2d(nn.Module):
    """torchvision's convolution: no bias, BatchNorm, ReLU in place."""

    def __init__(self, in_channels, out_channels, **kwargs):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, bias=False, **kwargs)
        self.bn = nn.BatchNorm2d(out_channels, eps=0.001)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)), inplace=True)


class Torchvision(nn.Module):
    """torchvision's block, a 3x3 in the third branch."""

    def __init__(self, in_channels, ch1x1, ch3x3red, ch3x3, ch5x5red, ch5x5, pool_proj, conv_block=None):
        super().__init__()
        conv_block = conv_block or BasicConv2d
        self.branch1 = conv_block(in_channels, ch1x1, kernel_size=1)
        self.branch2 = nn.Sequential(
            conv_block(in_channels, ch3x3red, kernel_size=1),
            conv_block(ch3x3red, ch3x3, kernel_size=3, padding=1),
        )
        self.branch3 = nn.Sequential(
            conv_block(in_channels, ch5x5red, kernel_size=1),
            conv_block(ch5x5red, ch5x5, kernel_size=3, padding=1),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(kernel_size=3, stride=1, padding=1, ceil_mode=True),
            conv_block(in_channels, pool_proj, kernel_size=1),
        )

    def _forward(self, x: Tensor) -> list[Tensor]:
        return [self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)]

    def forward(self, x):
        return torch.cat(self._forward(x), 1)


class SomebodysCopy(nn.Module):
    """Other names, ReLU as layers, the pool as a function, one list of branches."""

    def __init__(self):
        super().__init__()

        def conv(c, k, r):
            return nn.Sequential(nn.Conv2d(c, k, r, padding="same"), nn.ReLU(inplace=True))

        self.arms = nn.ModuleList(
            [
                conv(C, C1, 1),
                nn.Sequential(conv(C, C2[0], 1), conv(*C2, 3)),
                nn.Sequential(conv(C, C3[0], 1), conv(*C3, 5)),
            ]
        )
        self.proj = conv(C, C4, 1)

    def forward(self, inputs):
        pooled = F.max_pool2d(inputs, 3, 1, 1)
        return torch.cat([*(arm(inputs) for arm in self.arms), self.proj(pooled)], dim=1)


FLAT = (C, C1, *C2, *C3, C4)


def d2l(forward, base=OldD2l, *sizes):
    """A class whose forward is ``forward(self, x, y)``, y being the base's; an instance of it."""

    class Client(base):
        def forward(self, x):
            return forward(self, x, super().forward(x))

    return Client(*(sizes or (FLAT if base is Torchvision else (C, C1, C2, C3, C4))))


CLIENTS = {
    "old d2l": lambda: OldD2l(C, C1, C2, C3, C4),
    "bare": lambda: Bare(*FLAT),
    "torchvision": lambda: Torchvision(*FLAT),
    "somebody's copy": SomebodysCopy,
}


def images(n: int = 2, h: int = 7, w: int = 5) -> Tensor:
    """What every client takes."""
    return torch.randn(n, C, h, w)


def drawn(module: nn.Module) -> nn.Module:
    """With statistics and affine parameters that are no identity."""
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        if norm.running_mean is not None:
            norm.running_mean.normal_(std=0.3)
            norm.running_var.uniform_(0.5, 2)
        if norm.affine:
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, std=0.3)
    return module
