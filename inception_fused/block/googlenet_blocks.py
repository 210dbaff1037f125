"""GoogLeNet's nine Inception configurations as data, and that of the two convolutions of its stem.

Table 1 of "Going deeper with convolutions" (Szegedy et al., 2014).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from inception_fused.block.shapes import BlockShape


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


class StemConfig(NamedTuple):
    """Channels of the stem's two convolutions (chains.STEM): of x, of the 1x1's output, of the 3x3's."""

    in_channels: int
    reduced: int
    out_channels: int


Config = InceptionConfig | StemConfig

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

GOOGLENET_STEM = StemConfig(64, 64, 192)

GOOGLENET_LAUNCHED: dict[str, Config] = {"stem": GOOGLENET_STEM, **GOOGLENET_BLOCKS}
"""What the kernels compute of the network, in its order."""

STAGE_STRIDE = {"s": 4, "3": 8, "4": 16, "5": 32}
"""Input pixels per pixel of a stage, by the first letter of its blocks' names: 224 / 4 = 56 for the stem, 28 for 3a and
3b, 14 for 4a to 4e, 7 for 5a and 5b."""


def spatial_size(block: str, image_size: int = 224) -> int:
    """Height (= width) of the feature map of a block or the stem for square images; 96 gives 24, 12, 6, 3 as in the
    shape table."""
    return -(-image_size // STAGE_STRIDE[block[0]])


BRANCH3: dict[str, tuple[int, ...]] = {"5x5": (5,), "3x3": (3,), "two-3x3": (3, 3)}
"""Sides of branch 3's windows, by what command lines call them."""


def branch3_options(windows: Sequence[int]) -> dict[str, int]:
    """A block's arguments for branch 3's windows, given by their sides as in :data:`BRANCH3`."""
    return {"branch3_kernel_size": windows[0], "branch3_convs": len(windows)}


def branch3_name(windows: Sequence[int]) -> str:
    """The inverse of :data:`BRANCH3`."""
    return next(name for name, sides in BRANCH3.items() if sides == tuple(windows))


def block_shape(
    config: Config, batch: int, size: int, dtype: torch.dtype, *, branch3: Sequence[int] = (5,)
) -> BlockShape:
    """Sizes of a block, or of the stem's convolutions, without tensors. size: H = W of its feature map; dtype: of the
    kernels; branch3: sides of a block's third branch's windows, as in :data:`BRANCH3`."""
    if isinstance(config, StemConfig):
        return BlockShape(batch, size, size, config.in_channels, config[1:], (1, 3), dtype.itemsize)
    reduced, outputs = config.c3
    chain = [[config.c1], config.c2, [reduced, *(outputs for _ in branch3)], [config.c4]]
    sides = [[1], [1, 3], [1, *branch3], [1]]
    filters, sides = (tuple(value for part in parts for value in part) for parts in (chain, sides))
    return BlockShape(batch, size, size, config.in_channels, filters, sides, dtype.itemsize)
