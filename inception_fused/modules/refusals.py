"""Why layers are no Inception block, in words: which layer it is, what the block has, and the known variant that is not
supported, where it is one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from inception_fused.block.chains import COUNTS_IN_WORDS, VARIANTS, variant_of

SILENT = (nn.ReLU, nn.Identity)
"""Layers that a structure may have anywhere."""

WANTED = "1x1 | 1x1, 3x3 | 1x1, 5x5 or 3x3 or 3x3 twice | 3x3 max-pool, 1x1"
"""The four branches."""

LATER = "as in Inception v3 and v4"

OTHERS = {
    (1, 1, 5, 1, 3, 3, 1): "the convolutions of Inception v3's first blocks",
    (1, 1, 3, 1, 3, 3, 1, 1): "the convolutions of an Inception-ResNet block",
    (1, 1, 3, 1, 3, 3): "the convolutions of a block whose pool has no 1x1 behind it",
}
"""By the sides of their windows, blocks that are met and not supported."""

AVERAGE = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)

Leaves = Sequence[tuple[str, nn.Module]]
"""(dotted name, layer) in the order of registration."""


def strange_layer(name: str, leaf: nn.Module) -> str:
    """What is wrong with one layer, wherever it stands; "" for nothing."""
    kind = type(leaf).__name__
    if isinstance(leaf, nn.modules.conv._ConvNd):
        return "" if isinstance(leaf, nn.Conv2d) else f"{name} is {named(kind)}; wants convolutions of images, Conv2d"
    if isinstance(leaf, nn.modules.batchnorm._BatchNorm | nn.MaxPool2d) or type(leaf) in SILENT:
        return ""
    if isinstance(leaf, AVERAGE):
        return f"{name} is {named(kind)}; a branch with an average pool, {LATER}, is not supported"
    if type(leaf).__module__ == nn.ReLU.__module__:
        return f"{name} is {named(kind)}; of activations ReLU or none is supported"
    return f"{name} is {named(kind)}, which an Inception block does not have"


def strange_window(name: str, leaf: nn.Module) -> str:
    """What is wrong with the window of a convolution or pool, wherever it stands; "" for nothing."""
    strides = leaf.stride if isinstance(leaf.stride, tuple) else (leaf.stride,)
    if set(strides) != {1}:
        return f"{name} has stride {leaf.stride}; a block that makes the image smaller, {LATER}, is not supported"
    if isinstance(leaf, nn.Conv2d) and leaf.kernel_size[0] != leaf.kernel_size[1]:
        return f"{name} has a kernel {leaf.kernel_size}; a factorised convolution, {LATER}, is not supported"
    return ""


def wrong_number(convs: Leaves, pools: Leaves) -> str:
    """What is wrong with how many layers of a kind there are; "" for nothing."""
    known = OTHERS.get(tuple(conv.kernel_size[0] for _, conv in convs))
    if len(convs) not in VARIANTS:
        has = f"it has {counted(len(convs), 'convolution')}: {listed(convs)}"
        said = f"; these are {known}, which are not supported" if known else ""
        return f"{has}{said}; wants {' or '.join(COUNTS_IN_WORDS.values())}: {WANTED}"
    if len(pools) > 1:
        return f"it has {counted(len(pools), 'max-pool')}: {listed(pools)}; wants one: {WANTED}"
    return ""


def wrong_place(convs: Leaves, pools: Sequence[tuple[int, str]]) -> str:
    """What stands where another layer should; "" for nothing. pools: (how many convolutions stand before it, name)."""
    variant = variant_of(convs)
    known = OTHERS.get(tuple(conv.kernel_size[0] for _, conv in convs))
    for (name, conv), sides in zip(convs, variant.sides.values(), strict=True):
        if conv.kernel_size[0] not in sides:
            kernel = " or ".join(f"{side}x{side}" for side in sides)
            said = f"; these are {known}, which are not supported" if known else ""
            return f"{name} has a kernel {conv.kernel_size}, wants {kernel} in its place{said}"
    if pools and pools[0][0] != variant.projection:
        behind = counted(variant.count - pools[0][0], "convolution")
        return f"{pools[0][1]} stands before {behind}, wants before the last alone: {WANTED}"
    return ""


def named(kind: str) -> str:
    """A class's name with its article."""
    return f"an {kind}" if kind[:1] in "AEIO" else f"a {kind}"


def other_kind(module: nn.Module, wanted: type[nn.Module]) -> str:
    """What a module of another class is, in words; its class may have the same name, as a quantized layer's has."""
    kinds = (type(module), wanted)
    names = [kind.__name__ for kind in kinds]
    if names[0] == names[1]:
        names = [f"{kind.__module__}.{kind.__qualname__}" for kind in kinds]
    return f"is {named(names[0])}, not {named(names[1])}"


def counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number != 1)}"


def listed(leaves: Leaves) -> str:
    """Names and windows."""
    found = []
    for name, leaf in leaves:
        sides = leaf.kernel_size if isinstance(leaf.kernel_size, tuple) else (leaf.kernel_size,) * 2
        found.append(f"{name} {'x'.join(map(str, sides))}")
    return ", ".join(found) or "none"
