"""The whole networks that are timed, each written from its public structure, with inputs and weights for a fair gate.

Weights are in PyTorch's own layout, KCRS; who times a network says in which it does, see baselines.LAYOUTS.

googlenet: this package's own, as the original trains it (grey images of 96x96, 10 classes), and at 224x224 too.
kernelbench7: KernelBench level 3, problem 7, whose blocks have no activation. torchvision: convolutions without bias,
BatchNorm (eps 1e-3) and ReLU, a 3x3 in the third branch, pools that round up, auxiliary classifiers off, dropout 0 so
that runs agree. cifar: as kuangliu/pytorch-cifar has it for images of 32x32, two 3x3 in the third branch, BatchNorm
(eps 1e-5) behind convolutions that have a bias as well.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from inception_fused import GoogLeNet, Inception
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, InceptionConfig
from inception_fused.modules.pools import FusedPool

Block = Callable[..., nn.Module]


def _stage(number: str, block: Block) -> list[nn.Module]:
    return [block(*config) for name, config in GOOGLENET_BLOCKS.items() if name.startswith(number)]


def kernelbench7(block: Block = Inception) -> nn.Sequential:
    """Three channels to 1000 classes; ReLU after the stem's three convolutions only."""
    block, pool = partial(block, activation=None), partial(nn.MaxPool2d, 3, stride=2, padding=1)
    return nn.Sequential(
        *(nn.Conv2d(3, 64, 7, stride=2, padding=3), nn.ReLU(), pool()),
        *(nn.Conv2d(64, 64, 1), nn.ReLU(), nn.Conv2d(64, 192, 3, padding=1), nn.ReLU(), pool()),
        *(*_stage("3", block), pool()),
        *(*_stage("4", block), pool()),
        *(*_stage("5", block), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(1024, 1000)),
    )


class BatchNormConv(nn.Sequential):
    """Convolution, by default without bias, BatchNorm, ReLU."""

    def __init__(
        self, channels: int, outputs: int, side: int, stride: int = 1, *, bias: bool = False, eps: float = 1e-3
    ) -> None:
        conv = nn.Conv2d(channels, outputs, side, stride=stride, padding=side // 2, bias=bias)
        super().__init__(conv, nn.BatchNorm2d(outputs, eps=eps), nn.ReLU())


class BatchNormInception(nn.Module):
    """torchvision's block: every convolution a :class:`BatchNormConv`, both windows 3x3."""

    conv: Callable[..., BatchNormConv] = BatchNormConv

    def __init__(self, in_channels: int, c1: int, c2: tuple[int, int], c3: tuple[int, int], c4: int) -> None:
        super().__init__()
        conv = type(self).conv
        self.branch1 = conv(in_channels, c1, 1)
        self.branch2 = nn.Sequential(conv(in_channels, c2[0], 1), conv(*c2, 3))
        self.branch3 = self.third(in_channels, *c3)
        self.branch4 = nn.Sequential(nn.MaxPool2d(3, stride=1, padding=1), conv(in_channels, c4, 1))

    def third(self, in_channels: int, reduced: int, outputs: int) -> nn.Sequential:
        """The third branch."""
        return nn.Sequential(BatchNormConv(in_channels, reduced, 1), BatchNormConv(reduced, outputs, 3))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((self.branch1(x), self.branch2(x), self.branch3(x), self.branch4(x)), dim=1)


def batch_norm_block(*config: object, fused: bool, **_: object) -> nn.Module:
    """torchvision's block of a size; fused: converted. The options of other blocks are not asked."""
    from inception_fused import convert_

    block = BatchNormInception(*config)
    return convert_(block, strict=True) if fused else block


def torchvision_googlenet(block: Block = BatchNormInception) -> nn.Sequential:
    """Three channels to 1000 classes. block: any but BatchNormInception has no BatchNorm and is another network."""
    pool = partial(nn.MaxPool2d, stride=2, ceil_mode=True)
    return nn.Sequential(
        *(BatchNormConv(3, 64, 7, stride=2), pool(3), BatchNormConv(64, 64, 1), BatchNormConv(64, 192, 3), pool(3)),
        *(*_stage("3", block), pool(3)),
        *(*_stage("4", block), pool(2)),
        *(*_stage("5", block), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.0), nn.Linear(1024, 1000)),
    )


_CifarConv = partial(BatchNormConv, bias=True, eps=1e-5)


class CifarInception(BatchNormInception):
    """pytorch-cifar's block: two 3x3 behind the third branch's reduction, every convolution with a bias."""

    conv = _CifarConv

    def third(self, in_channels: int, reduced: int, outputs: int) -> nn.Sequential:
        return nn.Sequential(
            _CifarConv(in_channels, reduced, 1), _CifarConv(reduced, outputs, 3), _CifarConv(outputs, outputs, 3)
        )


def cifar_googlenet(block: Block = CifarInception) -> nn.Sequential:
    """Three channels of 32x32 to 10 classes: one 3x3 before the blocks, whose maps have 32, 16 and 8 pixels a side."""
    pool = partial(nn.MaxPool2d, 3, stride=2, padding=1)
    return nn.Sequential(
        *(_CifarConv(3, 192, 3), *_stage("3", block), pool(), *_stage("4", block), pool(), *_stage("5", block)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1024, 10)),
    )


@dataclass(frozen=True)
class Network:
    """build(block): the module. channels, image, classes: of its input and output. eager: its plain block. blocks:
    sizes of the Inception blocks by name, if FusedInception can stand in for them; None: they are converted.
    """

    build: Callable[[Block], nn.Module]
    channels: int
    image: int
    classes: int
    eager: type[nn.Module] = Inception
    activation: str | None = "relu"
    blocks: dict[str, InceptionConfig] | None = None


NETWORKS = {
    "googlenet": Network(lambda block: GoogLeNet(10, 1, block=block), 1, 96, 10, blocks=GOOGLENET_BLOCKS),
    "kernelbench7": Network(kernelbench7, 3, 224, 1000, activation=None, blocks=GOOGLENET_BLOCKS),
    "torchvision": Network(
        torchvision_googlenet,
        3,
        224,
        1000,
        eager=BatchNormInception,
    ),
    "cifar": Network(cifar_googlenet, 3, 32, 10, eager=CifarInception),
}

BLOCK_TYPES = (Inception, BatchNormInception, CifarInception)
"""What counts as one block where a network's work is added up."""


def initialise(network: nn.Module, activation: str | None) -> None:
    """Draws weights under which the signal keeps its size (He et al., 2015): PyTorch's own shrink it with every layer,
    until the logits are the last bias and no wrong block shows in them. activation: of the blocks."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            if module.bias is not None:
                nn.init.normal_(module.bias, std=0.1)
    if activation is None:
        for block in (module for module in network.modules() if isinstance(module, Inception)):
            for conv in (module for module in block.modules() if isinstance(module, nn.Conv2d)):
                nn.init.kaiming_normal_(conv.weight, nonlinearity="linear")


def build_network(name: str, *, fused: bool = False, stem: bool = True) -> nn.Module:
    """One of :data:`NETWORKS` in fp32 on the default device, its weights a function of the name alone.

    fused: with this package's blocks, or with its own converted. stem: and with its stem and pools, where it has them.
    """
    from inception_fused import FusedInception, convert_

    network = NETWORKS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = network.build(FusedInception if fused and network.blocks else network.eager)
        initialise(module, network.activation)
    if not stem:
        for part, layers in [*module.named_children()]:
            if isinstance(layers, nn.Sequential):
                setattr(module, part, layers_of(layers))
    return convert_(module, strict=True) if fused and not network.blocks else module


def layers_of(part: nn.Sequential) -> nn.Sequential:
    """The same layers, each called as PyTorch's, the pools as layers of PyTorch's too."""
    return nn.Sequential(OrderedDict((name, _pytorchs(layer)) for name, layer in part.named_children()))


def _pytorchs(layer: nn.Module) -> nn.Module:
    if not isinstance(layer, FusedPool):
        return layer
    return nn.MaxPool2d(layer.kernel_size, layer.stride, layer.padding, ceil_mode=layer.ceil_mode)
