"""GoogLeNet in five parts and a classifier; the nine Inception configurations as data.

Layer by layer on a 1x1x96x96 input: b1 64x24x24, b2 192x12x12, b3 480x6x6, b4 832x3x3, b5 1024, classifier 10.
The configurations are table 1 of "Going deeper with convolutions" (Szegedy et al., 2014).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.errors import InceptionInputError
from inception_fused.module import FusedInception
from inception_fused.shapes import BlockShape


class InceptionConfig(NamedTuple):
    """Positional arguments of a block: ``FusedInception(*GOOGLENET_BLOCKS["3a"])``."""

    in_channels: int
    c1: int
    c2: tuple[int, int]
    c3: tuple[int, int]
    c4: int

    @property
    def out_channels(self) -> int:
        return self.c1 + self.c2[1] + self.c3[1] + self.c4


GOOGLENET_BLOCKS: dict[str, InceptionConfig] = {
    "3a": InceptionConfig(192, 64, (96, 128), (16, 32), 32),
    "3b": InceptionConfig(256, 128, (128, 192), (32, 96), 64),
    "4a": InceptionConfig(480, 192, (96, 208), (16, 48), 64),
    "4b": InceptionConfig(512, 160, (112, 224), (24, 64), 64),
    "4c": InceptionConfig(512, 128, (128, 256), (24, 64), 64),
    "4d": InceptionConfig(512, 112, (144, 288), (32, 64), 64),
    "4e": InceptionConfig(528, 256, (160, 320), (32, 128), 128),
    "5a": InceptionConfig(832, 256, (160, 320), (32, 128), 128),
    "5b": InceptionConfig(832, 384, (192, 384), (48, 128), 128),
}

STAGE_STRIDE = {"3": 8, "4": 16, "5": 32}
"""Input pixels per pixel of a stage's blocks: 224 / 8 = 28 for 3a and 3b, 14 for 4a to 4e, 7 for 5a and 5b."""


def spatial_size(block: str, image_size: int = 224) -> int:
    """Height (= width) of a block's feature map for square images; 96 gives 12, 6, 3 as in the shape table."""
    return -(-image_size // STAGE_STRIDE[block[0]])


def block_shape(
    config: InceptionConfig, batch: int, size: int, dtype: torch.dtype, *, branch3_kernel_size: int = 5
) -> BlockShape:
    """Sizes of a block without tensors. size: H = W of its feature map; dtype: of the kernels."""
    chain = [[config.c1], config.c2, config.c3, [config.c4]]
    sides = [[1], [1, 3], [1, branch3_kernel_size], [1]]
    filters, sides = (tuple(value for part in parts for value in part) for parts in (chain, sides))
    return BlockShape(batch, size, size, config.in_channels, filters, sides, dtype.itemsize)


class GoogLeNet(nn.Sequential):
    """The network as a Sequential of b1, b2, b3, b4, b5 and classifier.

    Args:
        num_classes: outputs of the final Linear.
        in_channels: channels of the image, 1 for the grey images of (Fashion-)MNIST and digits.
        block: the class (or function) that builds a block from an :class:`InceptionConfig`'s five values.

    x: [N, in_channels, H, W], at least 32x32 for a feature map of 1x1 before the average pool.
    Returns logits [N, num_classes].
    """

    def __init__(
        self, num_classes: int = 10, in_channels: int = 1, *, block: Callable[..., nn.Module] = FusedInception
    ) -> None:
        for name, value in (("num_classes", num_classes), ("in_channels", in_channels)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InceptionInputError(f"{name}: got {value!r}, wants a positive integer")
        if not callable(block):
            raise InceptionInputError(f"block: got {block!r}, wants a module class such as FusedInception")

        def stage(number: str) -> list[nn.Module]:
            return [block(*config) for name, config in GOOGLENET_BLOCKS.items() if name.startswith(number)]

        super().__init__(
            OrderedDict(
                b1=nn.Sequential(nn.Conv2d(in_channels, 64, kernel_size=7, stride=2, padding=3), nn.ReLU(), _pool()),
                b2=nn.Sequential(
                    nn.Conv2d(64, 64, kernel_size=1),
                    nn.ReLU(),
                    nn.Conv2d(64, 192, kernel_size=3, padding=1),
                    nn.ReLU(),
                    _pool(),
                ),
                b3=nn.Sequential(*stage("3"), _pool()),
                b4=nn.Sequential(*stage("4"), _pool()),
                b5=nn.Sequential(*stage("5"), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
                classifier=nn.Linear(1024, num_classes),
            )
        )

    def layer_shapes(self, x: Tensor) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and output shape of each of the six parts, for the layer-by-layer table."""
        with torch.no_grad():
            for name, part in self.named_children():
                x = part(x)
                yield name, tuple(x.shape)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
