"""GoogLeNets for CIFAR images whose third branch is 1x1 -> 3x3 -> 3x3: small models of the structure that stands most
often in other people's code, written anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Sizes(NamedTuple):
    """A block's channels: of its input, of branch 1, of reduction and output of branches 2 and 3, of branch 4."""

    inputs: int
    c1: int
    c2_reduced: int
    c2: int
    c3_reduced: int
    c3: int
    c4: int

    @property
    def outputs(self) -> int:
        return self.c1 + self.c2 + self.c3 + self.c4


FULL = {
    "a3": Sizes(192, 64, 96, 128, 16, 32, 32),
    "b3": Sizes(256, 128, 128, 192, 32, 96, 64),
    "a4": Sizes(480, 192, 96, 208, 16, 48, 64),
    "b4": Sizes(512, 160, 112, 224, 24, 64, 64),
    "c4": Sizes(512, 128, 128, 256, 24, 64, 64),
    "d4": Sizes(512, 112, 144, 288, 32, 64, 64),
    "e4": Sizes(528, 256, 160, 320, 32, 128, 128),
    "a5": Sizes(832, 256, 160, 320, 32, 128, 128),
    "b5": Sizes(832, 384, 192, 384, 48, 128, 128),
}
"""The nine blocks as published."""

ALIGNED = Sizes(24, 16, 8, 24, 8, 16, 8)
ODD = Sizes(17, 13, 9, 20, 7, 11, 5)
"""Sizes of blocks alone: all multiples of what a kernel counts in, and none."""


def divided(divisor: int) -> dict[str, Sizes]:
    """The nine blocks with a part of the channels, which still fit one behind the other."""
    if any(channels % divisor for sizes in FULL.values() for channels in sizes):
        raise ValueError(f"divisor: got {divisor}, wants one of 1, 2, 4, 8")
    return {name: Sizes(*(channels // divisor for channels in sizes)) for name, sizes in FULL.items()}


class Kuangliu(nn.Module):
    """kuangliu/pytorch-cifar: branches b1 to b4, of convolution with bias, BatchNorm and ReLU in place."""

    def __init__(self, in_planes, n1x1, n3x3red, n3x3, n5x5red, n5x5, pool_planes):
        super().__init__()
        self.b1 = nn.Sequential(nn.Conv2d(in_planes, n1x1, kernel_size=1), nn.BatchNorm2d(n1x1), nn.ReLU(True))
        self.b2 = nn.Sequential(
            *(nn.Conv2d(in_planes, n3x3red, kernel_size=1), nn.BatchNorm2d(n3x3red), nn.ReLU(True)),
            *(nn.Conv2d(n3x3red, n3x3, kernel_size=3, padding=1), nn.BatchNorm2d(n3x3), nn.ReLU(True)),
        )
        self.b3 = nn.Sequential(
            *(nn.Conv2d(in_planes, n5x5red, kernel_size=1), nn.BatchNorm2d(n5x5red), nn.ReLU(True)),
            *(nn.Conv2d(n5x5red, n5x5, kernel_size=3, padding=1), nn.BatchNorm2d(n5x5), nn.ReLU(True)),
            *(nn.Conv2d(n5x5, n5x5, kernel_size=3, padding=1), nn.BatchNorm2d(n5x5), nn.ReLU(True)),
        )
        self.b4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            *(nn.Conv2d(in_planes, pool_planes, kernel_size=1), nn.BatchNorm2d(pool_planes), nn.ReLU(True)),
        )

    def forward(self, x):
        y1 = self.b1(x)
        y2 = self.b2(x)
        y3 = self.b3(x)
        y4 = self.b4(x)
        return torch.cat([y1, y2, y3, y4], 1)


class Weiaicunzai(nn.Module):
    """weiaicunzai/pytorch-cifar100: branch1 to branch4; a BatchNorm whose second argument, its eps, is an integer."""

    def __init__(self, input_channels, n1x1, n3x3_reduce, n3x3, n5x5_reduce, n5x5, pool_proj):
        super().__init__()
        self.branch1 = nn.Sequential(
            nn.Conv2d(input_channels, n1x1, kernel_size=1), nn.BatchNorm2d(n1x1), nn.ReLU(inplace=True)
        )
        self.branch2 = nn.Sequential(
            nn.Conv2d(input_channels, n3x3_reduce, kernel_size=1),
            nn.BatchNorm2d(n3x3_reduce),
            nn.ReLU(inplace=True),
            nn.Conv2d(n3x3_reduce, n3x3, kernel_size=3, padding=1),
            nn.BatchNorm2d(n3x3),
            nn.ReLU(inplace=True),
        )
        self.branch3 = nn.Sequential(
            nn.Conv2d(input_channels, n5x5_reduce, kernel_size=1),
            nn.BatchNorm2d(n5x5_reduce),
            nn.ReLU(inplace=True),
            nn.Conv2d(n5x5_reduce, n5x5, kernel_size=3, padding=1),
            nn.BatchNorm2d(n5x5, n5x5),
            nn.ReLU(inplace=True),
            nn.Conv2d(n5x5, n5x5, kernel_size=3, padding=1),
            nn.BatchNorm2d(n5x5),
            nn.ReLU(inplace=True),
        )
        self.branch4 = nn.Sequential(
            nn.MaxPool2d(3, stride=1, padding=1),
            nn.Conv2d(input_channels, pool_proj, kernel_size=1),
            nn.BatchNorm2d(pool_proj),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        return torch.cat([self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)], dim=1)


class Soapisnotfat(nn.Module):
    """soapisnotfat/pytorch-cifar10: kuangliu's layers under other names of the arguments, branch by branch in one
    list."""

    def __init__(self, in_planes, kernel_1_x, kernel_3_in, kernel_3_x, kernel_5_in, kernel_5_x, pool_planes):
        super().__init__()
        self.b1 = self._branch((in_planes, kernel_1_x, 1))
        self.b2 = self._branch((in_planes, kernel_3_in, 1), (kernel_3_in, kernel_3_x, 3))
        self.b3 = self._branch((in_planes, kernel_5_in, 1), (kernel_5_in, kernel_5_x, 3), (kernel_5_x, kernel_5_x, 3))
        self.b4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), *self._branch((in_planes, pool_planes, 1)))

    @staticmethod
    def _branch(*convs):
        layers = []
        for c, k, side in convs:
            layers += [nn.Conv2d(c, k, side, padding=side // 2), nn.BatchNorm2d(k), nn.ReLU(True)]
        return nn.Sequential(*layers)

    def forward(self, x):
        return torch.cat([branch(x) for branch in (self.b1, self.b2, self.b3, self.b4)], 1)


class KuangliuNet(nn.Module):
    """Ten classes of images of four times ``side``, which the last pool takes as a number."""

    block = Kuangliu

    def __init__(self, sizes: dict[str, Sizes], side: int):
        super().__init__()
        stem = sizes["a3"].inputs
        self.pre_layers = nn.Sequential(
            nn.Conv2d(3, stem, kernel_size=3, padding=1), nn.BatchNorm2d(stem), nn.ReLU(True)
        )
        self.a3, self.b3 = (self.block(*sizes[name]) for name in ("a3", "b3"))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.a4, self.b4, self.c4, self.d4, self.e4 = (self.block(*sizes[f"{letter}4"]) for letter in "abcde")
        self.a5, self.b5 = (self.block(*sizes[name]) for name in ("a5", "b5"))
        self.avgpool = nn.AvgPool2d(side, stride=1)
        self.linear = nn.Linear(sizes["b5"].outputs, 10)

    def forward(self, x):
        out = self.pre_layers(x)
        out = self.b3(self.a3(out))
        out = self.maxpool(out)
        out = self.e4(self.d4(self.c4(self.b4(self.a4(out)))))
        out = self.maxpool(out)
        out = self.avgpool(self.b5(self.a5(out)))
        out = out.view(out.size(0), -1)
        return self.linear(out)


class SoapisnotfatNet(KuangliuNet):
    block = Soapisnotfat


class WeiaicunzaiNet(nn.Module):
    """A hundred classes of images of any size: three convolutions without bias before the blocks, dropout of whole
    channels behind them."""

    def __init__(self, sizes: dict[str, Sizes], side: int):
        super().__init__()
        stem, narrow = sizes["a3"].inputs, sizes["a3"].c1
        self.prelayer = nn.Sequential(
            nn.Conv2d(3, narrow, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, narrow, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(narrow),
            nn.ReLU(inplace=True),
            nn.Conv2d(narrow, stem, kernel_size=3, padding=1, bias=False),
            nn.BatchNorm2d(stem),
            nn.ReLU(inplace=True),
        )
        for name in ("a3", "b3"):
            self.add_module(name, Weiaicunzai(*sizes[name]))
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        for name in ("a4", "b4", "c4", "d4", "e4", "a5", "b5"):
            self.add_module(name, Weiaicunzai(*sizes[name]))
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.dropout = nn.Dropout2d(p=0.4)
        self.linear = nn.Linear(sizes["b5"].outputs, 100)

    def forward(self, x):
        x = self.prelayer(x)
        x = self.maxpool(x)
        x = self.b3(self.a3(x))
        x = self.maxpool(x)
        x = self.e4(self.d4(self.c4(self.b4(self.a4(x)))))
        x = self.maxpool(x)
        x = self.b5(self.a5(x))
        x = self.dropout(self.avgpool(x))
        x = x.view(x.size()[0], -1)
        return self.linear(x)


class Client(NamedTuple):
    """Somebody's block and network. shrinks: how many times smaller the last blocks' images are."""

    block: Callable[..., nn.Module]
    network: Callable[[dict[str, Sizes], int], nn.Module]
    shrinks: int


CLIENTS = {
    "kuangliu": Client(Kuangliu, KuangliuNet, 4),
    "weiaicunzai": Client(Weiaicunzai, WeiaicunzaiNet, 8),
    "soapisnotfat": Client(Soapisnotfat, SoapisnotfatNet, 4),
}


def network(name: str, divisor: int = 8, side: int = 2) -> nn.Module:
    """A whole network with a part of the channels. side: of the last blocks' images."""
    return CLIENTS[name].network(divided(divisor), side)


def images(name: str, n: int = 2, side: int = 2) -> Tensor:
    """What a network of :func:`network` takes."""
    whole = side * CLIENTS[name].shrinks
    return torch.randn(n, 3, whole, whole)
