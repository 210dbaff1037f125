"""The drop-in module: ``Inception``'s constructor, children and weights, run by the kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from inception_fused.block import chains
from inception_fused.block.chains import optional
from inception_fused.block.reference import Inception, InceptionParams
from inception_fused.modules.refusals import other_kind
from inception_fused.modules.structure import (
    FORWARDS,
    HOOKS,
    USUAL_SETTINGS,
    has_own_forward,
    has_settings,
    is_globally_hooked,
    is_hooked,
    is_pool_3x3,
    is_same_conv,
)
from inception_fused.modules.tracers import refuse_script, wants_layers
from inception_fused.modules.watch import Classes, is_pristine
from inception_fused.op import backends
from inception_fused.op.autograd import eager, inception
from inception_fused.op.calls import check_input

# Symbolic tracing keeps the block as one call instead of looking inside.
torch.fx.wrap("inception")


_layers = Classes((nn.Conv2d, nn.MaxPool2d))
"""The children's classes as they were when this was imported."""

_PRISTINE = is_pristine((nn.Conv2d, nn.MaxPool2d))


class Block(Protocol):
    """What the tools for whole models ask of a module that calls :func:`inception_fused.inception`."""

    activation: str | None

    def params(self) -> InceptionParams:
        """The block's parameters, the very objects that the module owns."""

    def eager_reason(self) -> str | None:
        """What about the module keeps the kernels from standing in for its children; None if nothing."""


class FusedInception(Inception):
    """The Inception block as four kernel launches; a drop-in for :class:`Inception`.

    Same arguments, children, state_dict and, from the same seed, the same weights. x [N, C, H, W] ->
    [N, c1 + c2[1] + c3[1] + c4, H, W], always in channels_last memory: a network in NCHW converts once, at its first
    block, and a ``.view`` that follows a block must become ``.flatten``.

    The children stay ordinary Conv2d and MaxPool2d modules that own the parameters; the kernels read those directly.
    A child that was replaced, re-configured or given a hook is honoured, as is another method of nn.Conv2d: the block
    then runs its children one by one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Raises InceptionInputError on a wrong x, KernelError where the backend demands kernels that cannot run."""
        reason = self.eager_reason()
        if isinstance(x, torch.fx.Proxy) and (reason is not None or wants_layers(x)):
            return super().forward(x)
        if reason is not None:
            if not (isinstance(x, Tensor) and x.is_quantized):  # which is the children's affair
                check_input(x)
            return eager(x, reason, backends.current(), super().forward)
        return inception(x, self.params(), activation=self.activation)

    def __prepare_scriptable__(self) -> FusedInception:
        """What torch.jit.script asks of every module first."""
        refuse_script(self)

    def params(self) -> InceptionParams:
        """The block's parameters, the very objects that its children own."""
        children = self._modules
        # Not conv.weight, for which Module asks three dictionaries before that of the parameters: 0.3 us, twelve times.
        names = variant_of(children).names
        owned = [children[name]._parameters for name in names]
        try:
            weights, biases = tuple([p["weight"] for p in owned]), tuple([p["bias"] for p in owned])
        except KeyError:
            # Pruning and the like put a plain tensor in a parameter's place.
            convs = [children[name] for name in names]
            weights, biases = tuple([conv.weight for conv in convs]), tuple([conv.bias for conv in convs])
        return InceptionParams(weights, optional(biases))

    def eager_reason(self) -> str | None:
        """What about the block's children and their classes keeps the kernels from standing in for them; None if
        nothing."""
        children = self._modules
        usual, compiling = _are_usual(children), torch.compiler.is_compiling()
        if usual and _PRISTINE and _layers.hold() and (compiling or not is_globally_hooked()):
            return None
        variant = variant_of(children)
        for name in (*variant.names, "p4_1"):
            child = children.get(name)
            kind = nn.MaxPool2d if name == "p4_1" else nn.Conv2d
            if type(child) is not kind:
                return f"{name} {other_kind(child, kind)}"
            if any(getattr(child, hooks) for hooks in HOOKS):
                return f"{name} has a hook"
            if any(method in child.__dict__ for method in FORWARDS):
                return f"{name} has a forward of its own"
            if not (is_pool_3x3(child) if name == "p4_1" else is_same_conv(child, variant.sides[name])):
                return f"{name} is configured as {child}"
        if not compiling and is_globally_hooked():
            return "a global module hook is registered"
        if len({children[name]._parameters.get("bias") is None for name in variant.names}) == 2:
            return "some convolutions have a bias and some have none"
        if not _PRISTINE:
            return "a forward of nn.Conv2d or nn.MaxPool2d is not PyTorch's"
        reason = _layers.patched() or None
        if reason is None and not compiling:
            # What was of no consequence need not be looked at again.
            _layers.renew()
        return reason


def variant_of(children: dict[str, nn.Module]) -> chains.Variant:
    """That of a block with these children."""
    return chains.DOUBLE if "p3_3" in children else chains.USUAL


CONV_ATTRIBUTES = len(nn.Conv2d(1, 1, 1, device="meta").__dict__)
"""Of which none is a method; what has more is looked at."""


def _are_usual(children: dict[str, nn.Module]) -> bool:
    """Whether all is as the constructor makes it: the check of every call, a quarter of the time of finding reasons.

    False says nothing.
    """
    biases, variant = 0, variant_of(children)
    usual = USUAL_SETTINGS[variant.count]
    try:
        for name in variant.names:
            d = children[name].__dict__
            if type(children[name]) is not nn.Conv2d or not has_settings(d, usual[name]) or is_hooked(d):
                return False
            if len(d) != CONV_ATTRIBUTES and has_own_forward(d):
                return False
            biases += d["_parameters"]["bias"] is not None
        d = children["p4_1"].__dict__
        pool = (d["kernel_size"], d["stride"], d["padding"], d["dilation"], d["return_indices"])
    except (AttributeError, KeyError):
        return False
    return (
        type(children["p4_1"]) is nn.MaxPool2d
        and pool == (3, 1, 1, 1, False)
        and not (is_hooked(d) or has_own_forward(d))
        and biases in (0, variant.count)
    )
