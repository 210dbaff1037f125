"""The networks that the training script knows, and with which blocks.

googlenet: :class:`inception_fused.GoogLeNet`, blocks with biases and ReLUs. With fused blocks every pass is the
kernels'.

cifar: the GoogLeNet of most projects for CIFAR-10. Images of 32x32 lose no pixel before the first block, a BatchNorm
follows every convolution, and branch 3 is 1x1 -> 3x3 -> 3x3. Its fused form is the plain network, converted: a training
step runs the kernels with the statistics of the batch, an evaluation with the running ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inception_fused import GOOGLENET_BLOCKS, FusedInception, GoogLeNet, Inception, InceptionConfig, convert_

BLOCKS: dict[str, Callable[..., nn.Module]] = {"fused": FusedInception, "eager": Inception}

WIDTH_DIVISORS = (1, 2, 4, 8)
"""The common divisors of all channel numbers in GoogLeNet's table."""


class NormedInception(nn.Module):
    """An Inception block with BatchNorm between every convolution and its ReLU, in plain PyTorch.

    Args:
        in_channels, c1, c2, c3, c4: as of :class:`inception_fused.Inception`; branch 3 is 1x1 -> 3x3 -> 3x3.

    x [N, in_channels, H, W] -> [N, c1 + c2[1] + c3[1] + c4, H, W].
    """

    def __init__(self, in_channels: int, c1: int, c2: tuple[int, int], c3: tuple[int, int], c4: int) -> None:
        super().__init__()
        self.point = _chain(in_channels, (c1, 1))
        self.three = _chain(in_channels, (c2[0], 1), (c2[1], 3))
        self.five = _chain(in_channels, (c3[0], 1), (c3[1], 3), (c3[1], 3))
        self.pool = nn.Sequential(nn.MaxPool2d(kernel_size=3, stride=1, padding=1), *_chain(in_channels, (c4, 1)))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([branch(x) for branch in self.children()], dim=1)


class CifarGoogLeNet(nn.Sequential):
    """GoogLeNet for small images, as a Sequential of stem, stage3, stage4, stage5 and classifier.

    Args:
        num_classes: outputs of the final Linear.
        in_channels: channels of the image.
        divisor: one of WIDTH_DIVISORS, by which all channel numbers are divided: a narrow network for a quick test.

    x: [N, in_channels, H, W], at least 8x8, which leaves 2x2 to the last stage: in training its BatchNorms want more
    than one pixel, even of a batch of one. Returns logits [N, num_classes].

    Raises:
        ValueError: divisor is none of WIDTH_DIVISORS.
    """

    def __init__(self, num_classes: int = 10, in_channels: int = 3, *, divisor: int = 1) -> None:
        if divisor not in WIDTH_DIVISORS:
            raise ValueError(f"divisor: got {divisor!r}, wants one of {', '.join(map(str, WIDTH_DIVISORS))}")
        configs = {name: _narrow(config, divisor) for name, config in GOOGLENET_BLOCKS.items()}

        def stage(number: str) -> list[nn.Module]:
            return [NormedInception(*config) for name, config in configs.items() if name.startswith(number)]

        def pool() -> nn.Module:
            return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

        super().__init__(
            OrderedDict(
                stem=_chain(in_channels, (configs["3a"].in_channels, 3)),
                stage3=nn.Sequential(*stage("3"), pool()),
                stage4=nn.Sequential(*stage("4"), pool()),
                stage5=nn.Sequential(*stage("5"), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
                classifier=nn.Linear(configs["5b"].out_channels, num_classes),
            )
        )

    layer_shapes = GoogLeNet.layer_shapes


class Network(NamedTuple):
    """What the training script asks of a network.

    title: what a picture calls it.
    build: called as build(num_classes, in_channels, block), block a key of BLOCKS: the network on the CPU, with the
        initial weights of its constructor, which are the same for either block.
    build_block: called as build_block(block, config): one of its Inception blocks.
    smallest_image: height and width in pixels.
    batch_norm: whether its blocks have BatchNorm.
    """

    title: str
    build: Callable[[int, int, str], nn.Module]
    build_block: Callable[[str, InceptionConfig], nn.Module]
    smallest_image: int
    batch_norm: bool


def build_googlenet(num_classes: int, in_channels: int, block: str) -> nn.Module:
    return GoogLeNet(num_classes, in_channels, block=BLOCKS[block])


def build_googlenet_block(block: str, config: InceptionConfig) -> nn.Module:
    return BLOCKS[block](*config)


def build_cifar(num_classes: int, in_channels: int, block: str, *, divisor: int = 1) -> nn.Module:
    """With "fused" blocks the network is converted, which leaves parameters, keys and random numbers as they are."""
    model = CifarGoogLeNet(num_classes, in_channels, divisor=divisor)
    return convert_(model, strict=True) if block == "fused" else model


def build_cifar_block(block: str, config: InceptionConfig) -> nn.Module:
    model = NormedInception(*config)
    return convert_(model, strict=True) if block == "fused" else model


NETWORKS = {
    "googlenet": Network("GoogLeNet", build_googlenet, build_googlenet_block, smallest_image=32, batch_norm=False),
    "cifar": Network("GoogLeNet for CIFAR", build_cifar, build_cifar_block, smallest_image=8, batch_norm=True),
}


def _chain(in_channels: int, *convs: tuple[int, int]) -> nn.Sequential:
    """Convolutions (channels, kernel size) that keep height and width, each with BatchNorm and ReLU."""
    layers: list[nn.Module] = []
    for channels, side in convs:
        layers += [nn.Conv2d(in_channels, channels, side, padding=side // 2), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers)


def _narrow(config: InceptionConfig, divisor: int) -> InceptionConfig:
    c, c1, c2, c3, c4 = config
    return InceptionConfig(
        c // divisor, c1 // divisor, (c2[0] // divisor, c2[1] // divisor), (c3[0] // divisor, c3[1] // divisor),
        c4 // divisor,
    )  # fmt: skip
