"""Why layers are no Inception block, in words: which layer it is, what the block has, and the known variant that is not
supported, where it is one."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import permutations
from typing import Any

import torch
from torch import nn

from inception_fused.block.chains import BLOCKS, COUNTS_IN_WORDS, PROJECTION, variant_of

SILENT = (nn.ReLU, nn.Identity)
"""Layers that a structure may have anywhere."""

WANTED = "1x1 | 1x1, 3x3 | 1x1, 5x5 or 3x3 or 3x3 twice | 3x3 max-pool, 1x1"
"""The four branches."""

LATER = "as in Inception v3 and v4"

OTHERS = {
    (1, 1, 5, 1, 3, 3, 1): "the convolutions of Inception v3's first blocks",
    (1, 1, 3, 1, 3, 3, 1, 1): "the convolutions of an Inception-ResNet block",
    (1, 1, 3, 1, 3, 3): "the convolutions of a block whose pool has no 1x1 behind it",
    (1, 1, 3, 1, 5): "the convolutions of a block whose pool has no 1x1 behind it",
    (1, 3, 1, 5, 1): "the convolutions of a block that lacks one of its 1x1",
    (1, 1, 3, 5, 1): "the convolutions of a block whose 3x3 and 5x5 share a 1x1 (a fork)",
}
"""By the sides of their windows, blocks that are met and not supported."""

OTHER_DIMENSIONS = (
    nn.MaxPool1d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool3d, nn.ConvTranspose2d, nn.ConvTranspose1d, nn.ConvTranspose3d,
)  # fmt: skip

Leaves = Sequence[tuple[str, nn.Module]]
"""(dotted name, layer) in the order of registration."""


def is_conv(leaf: nn.Module) -> bool:
    """Whether a layer is a convolution of any kind, a quantized one too, which is no class of torch.nn's."""
    return isinstance(leaf, nn.modules.conv._ConvNd) or (_is_quantized(leaf) and "Conv" in type(leaf).__name__)


def _is_quantized(leaf: nn.Module) -> bool:
    return ".quantized." in type(leaf).__module__


def is_known(convs: Sequence[nn.Module]) -> bool:
    """Whether Conv2d layers have the windows of a block, or of one that is met and not supported."""
    sides = tuple(conv.kernel_size[0] for conv in convs)
    variant = BLOCKS.get(len(sides))
    fits = variant is not None and all(s in allowed for s, allowed in zip(sides, variant.sides.values(), strict=True))
    return fits or sides in OTHERS


def strange_layer(name: str, leaf: nn.Module) -> str:
    """What is wrong with one layer, wherever it stands; "" for nothing."""
    kind = type(leaf).__name__
    if isinstance(leaf, torch.jit.ScriptModule):
        return f"{name} is a scripted module, which nobody can look into"
    if _is_quantized(leaf):
        return f"{name} is a quantized {kind}, which is not supported"
    if isinstance(leaf, nn.Conv2d | nn.MaxPool2d | nn.modules.batchnorm._BatchNorm) or type(leaf) in SILENT:
        return ""
    if isinstance(leaf, OTHER_DIMENSIONS) or is_conv(leaf):
        return f"{name} is {named(kind)}; wants layers of images, Conv2d and MaxPool2d"
    if isinstance(leaf, nn.AvgPool2d):
        return f"{name} is {named(kind)}; a branch with an average pool, {LATER}, is not supported"
    if type(leaf).__module__ == nn.ReLU.__module__:
        return f"{name} is {named(kind)}; of activations ReLU or none is supported"
    return f"{name} is {named(kind)}, which an Inception block does not have"


def strange_window(name: str, leaf: nn.Module) -> str:
    """What is wrong with the window of a convolution or pool, wherever it stands; "" for nothing."""
    if set(_pair(leaf.stride)) != {1}:
        return f"{name} has stride {leaf.stride}; a block that makes the image smaller, {LATER}, is not supported"
    if isinstance(leaf, nn.Conv2d) and leaf.kernel_size[0] != leaf.kernel_size[1]:
        return f"{name} has a kernel {leaf.kernel_size}; a factorised convolution, {LATER}, is not supported"
    return ""


def strange_settings(name: str, conv: nn.Conv2d) -> str:
    """What about a convolution's settings, its window apart, is not the block's, which keep the size of the image."""
    if conv.groups != 1:
        return f"{name} has {conv.groups} groups; a grouped convolution is not supported"
    if set(_pair(conv.dilation)) != {1}:
        return f"{name} has dilation {conv.dilation}; a dilated convolution is not supported"
    if conv.padding_mode != "zeros":
        return f"{name} pads with padding_mode={conv.padding_mode!r}, wants zeros around the image"
    wanted = tuple(side // 2 for side in conv.kernel_size)
    if conv.padding not in ("same", wanted):
        return f"{name} has padding {conv.padding}, wants {wanted}, which keeps the size of the image"
    return f"{name} is configured as {conv}"


def wrong_number(convs: Leaves, pools: Leaves) -> str:
    """What is wrong with how many layers of a kind there are; "" for nothing."""
    if len(convs) not in BLOCKS:
        has = f"it has {counted(len(convs), 'convolution')}: {listed(convs)}"
        return f"{has}{_known(convs)}; wants {' or '.join(COUNTS_IN_WORDS[count] for count in BLOCKS)}: {WANTED}"
    if len(pools) > 1:
        return f"it has {counted(len(pools), 'max-pool')}: {listed(pools)}; wants one: {WANTED}"
    return ""


def wrong_place(convs: Leaves, pools: Sequence[tuple[int, str]]) -> str:
    """What stands where another layer should; "" for nothing. pools: (how many convolutions stand before it, name)."""
    variant = variant_of(convs)
    for (name, conv), sides in zip(convs, variant.sides.values(), strict=True):
        if conv.kernel_size[0] not in sides:
            kernel = " or ".join(f"{side}x{side}" for side in sides)
            why = f"{name} has a kernel {conv.kernel_size}, wants {kernel} in its place{_known(convs)}"
            return _other_order(convs, pools) or why
    if pools and pools[0][0] != variant.projection:
        behind = counted(variant.count - pools[0][0], "convolution")
        why = f"{pools[0][1]} stands before {behind}, wants before the last alone: {WANTED}"
        return _other_order(convs, pools) or why
    return ""


def _known(convs: Leaves) -> str:
    known = OTHERS.get(tuple(conv.kernel_size[0] for _, conv in convs))
    return f"; these are {known}, which are not supported" if known else ""


def _other_order(convs: Leaves, pools: Sequence[tuple[int, str]]) -> str:
    """Whether the layers are all there, branch by branch in another order, in words."""
    sides = [conv.kernel_size[0] for _, conv in convs]
    for branches in permutations(variant_of(convs).chains):
        order = [conv for branch in branches for conv in branch]
        place = next(i for i, conv in enumerate(order) if conv.role == PROJECTION)
        fits = all(side in conv.sides for side, conv in zip(sides, order, strict=True))
        if fits and all(before == place for before, _ in pools):
            return (
                f"its branches are assigned in another order ({listed(convs)}), which is not supported; assign them in "
                f"__init__ as {WANTED}"
            )
    return ""


def _pair(value: Any) -> Sequence[int]:
    return (value,) if isinstance(value, int) else value


def named(kind: str) -> str:
    """A class's name with its article."""
    spelt = kind[:2].isupper() and not kind.endswith("LU")
    vowel = kind[:1] in ("AEFHILMNORSX" if spelt else "AEIO") or kind.startswith(("Un", "Up"))
    return f"{'an' if vowel else 'a'} {kind}"


def other_kind(module: nn.Module | None, wanted: type[nn.Module]) -> str:
    """What a module of another class is, in words; its class may have the same name, as a quantized layer's has."""
    if module is None:
        return f"is missing, wants {named(wanted.__name__)} there"
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
        sides = _pair(leaf.kernel_size)
        found.append(f"{name} {'x'.join(map(str, sides if len(sides) > 1 else (*sides, *sides)))}")
    return ", ".join(found) or "none"
