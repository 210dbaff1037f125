"""GoogLeNet in five parts and a classifier.

Layer by layer on a 1x1x96x96 input: b1 64x24x24, b2 192x12x12, b3 480x6x6, b4 832x3x3, b5 1024, classifier 10.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, GOOGLENET_STEM
from inception_fused.errors import InceptionInputError
from inception_fused.modules.entry import FusedEntry
from inception_fused.modules.fused_inception import FusedInception
from inception_fused.modules.pools import FusedPool
from inception_fused.modules.stem import FusedStem


class GoogLeNet(nn.Sequential):
    """The network as a Sequential of b1, b2, b3, b4, b5 and classifier.

    Where all blocks are :class:`FusedInception` the kernels compute the two convolutions of b2 and the four max-pools
    of stride 2 too, with b1's bias and ReLU in its pool's. b1 and b2 are Sequentials and the pools MaxPool2d either
    way, of the same names.

    Args:
        num_classes: outputs of the final Linear.
        in_channels: channels of the image, 1 for the grey images of (Fashion-)MNIST and digits.
        block: the class (or function) that builds a block from an :class:`InceptionConfig`'s five values.
            ``functools.partial(FusedInception, branch3_kernel_size=3, branch3_convs=2)`` puts two 3x3 into branch 3.

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

        blocks: list[nn.Module] = []

        def stage(number: str) -> list[nn.Module]:
            made = [block(*config) for name, config in GOOGLENET_BLOCKS.items() if name.startswith(number)]
            blocks.extend(made)
            return made

        stem = GOOGLENET_STEM
        super().__init__(
            OrderedDict(
                b1=nn.Sequential(
                    nn.Conv2d(in_channels, stem.in_channels, kernel_size=7, stride=2, padding=3), nn.ReLU(), _pool()
                ),
                b2=nn.Sequential(
                    nn.Conv2d(stem.in_channels, stem.reduced, kernel_size=1),
                    nn.ReLU(),
                    nn.Conv2d(stem.reduced, stem.out_channels, kernel_size=3, padding=1),
                    nn.ReLU(),
                    _pool(),
                ),
                b3=nn.Sequential(*stage("3"), _pool()),
                b4=nn.Sequential(*stage("4"), _pool()),
                b5=nn.Sequential(*stage("5"), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten()),
                classifier=nn.Linear(1024, num_classes),
            )
        )
        if all(isinstance(made, FusedInception) for made in blocks):
            for part in (self.b1, self.b2, self.b3, self.b4):
                part[-1] = FusedPool(kernel_size=3, stride=2, padding=1)
            # Now, since the weights of a seed come in the order in which parts are made.
            self.b1 = FusedEntry(OrderedDict(self.b1.named_children()))
            self.b2 = FusedStem(OrderedDict(self.b2.named_children()))

    def layer_shapes(self, x: Tensor) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and output shape of each of the six parts, for the layer-by-layer table."""
        with torch.no_grad():
            for name, part in self.named_children():
                x = part(x)
                yield name, tuple(x.shape)


def _pool() -> nn.MaxPool2d:
    return nn.MaxPool2d(kernel_size=3, stride=2, padding=1)
