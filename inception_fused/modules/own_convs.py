"""The convolutions that a module of this package made itself: their parameters, and whether the kernels may stand in.

Each check has a fast form, made at every call, and a slow one that finds the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from inception_fused.block.chains import Variant, optional
from inception_fused.block.reference import InceptionParams
from inception_fused.modules.refusals import other_kind
from inception_fused.modules.structure import (
    FORWARDS,
    HOOKS,
    USUAL_SETTINGS,
    has_own_forward,
    has_settings,
    is_globally_hooked,
    is_hooked,
    is_same_conv,
)
from inception_fused.modules.watch import Classes

Children = Mapping[str, nn.Module]

CONV_ATTRIBUTES = len(nn.Conv2d(1, 1, 1, device="meta").__dict__)
"""Of which none is a method; what has more is looked at."""


def params_of(children: Children, names: Sequence[str]) -> InceptionParams:
    """The parameters of convolutions without BatchNorm, the very objects that they own."""
    # Not conv.weight, for which Module asks three dictionaries before that of the parameters: 0.3 us, twelve times.
    owned = [children[name]._parameters for name in names]
    try:
        weights, biases = tuple([p["weight"] for p in owned]), tuple([p["bias"] for p in owned])
    except KeyError:
        # Pruning and the like put a plain tensor in a parameter's place.
        convs = [children[name] for name in names]
        weights, biases = tuple([conv.weight for conv in convs]), tuple([conv.bias for conv in convs])
    return InceptionParams(weights, optional(biases))


def are_usual(children: Children, variant: Variant) -> bool:
    """Whether all convolutions are as a constructor makes them: a quarter of the time of finding reasons.

    False says nothing. Raises AttributeError or KeyError where a child is missing or no module of the kind.
    """
    biases, usual = 0, USUAL_SETTINGS[variant.count]
    for name in variant.names:
        d = children[name].__dict__
        if type(children[name]) is not nn.Conv2d or not has_settings(d, usual[name]) or is_hooked(d):
            return False
        if len(d) != CONV_ATTRIBUTES and has_own_forward(d):
            return False
        biases += d["_parameters"]["bias"] is not None
    return biases in (0, variant.count)


def conv_reason(children: Children, variant: Variant) -> str | None:
    """What about a convolution keeps the kernels from standing in for it; None if nothing."""
    for name in variant.names:
        child = children.get(name)
        reason = child_reason(name, child, nn.Conv2d)
        if reason is None and not is_same_conv(child, variant.sides[name]):
            reason = f"{name} is configured as {child}"
        if reason is not None:
            return reason
    if len({children[name]._parameters.get("bias") is None for name in variant.names}) > 1:
        return "some convolutions have a bias and some have none"
    return None


def class_reason(kinds: str, pristine: bool, layers: Classes) -> str | None:
    """What about the classes of the children, or hooks on all modules, keeps the kernels from standing in; None if
    nothing. kinds: the classes in words; pristine: whether they had PyTorch's forwards when layers was made of them."""
    if not torch.compiler.is_compiling() and is_globally_hooked():
        return "a global module hook is registered"
    if not pristine:
        return f"a forward of {kinds} is not PyTorch's"
    return layers.fault()


def child_reason(name: str, child: Any, kind: type[nn.Module]) -> str | None:
    """What about a child of this kind is not as it was made, its settings left out; None if nothing."""
    if type(child) is not kind:
        return f"{name} {other_kind(child, kind)}"
    if any(getattr(child, hooks) for hooks in HOOKS):
        return f"{name} has a hook"
    if any(method in child.__dict__ for method in FORWARDS):
        return f"{name} has a forward of its own"
    return None
