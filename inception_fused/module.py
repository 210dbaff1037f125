"""The drop-in module: ``Inception``'s constructor, children and weights, run by the kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from inception_fused import dispatch
from inception_fused.calls import check_input
from inception_fused.function import eager, inception
from inception_fused.reference import CONV_NAMES, Inception, InceptionParams
from inception_fused.structure import (
    FORWARDS,
    HOOKS,
    SIDES,
    is_globally_hooked,
    is_pool_3x3,
    is_same_conv,
)
from inception_fused.watch import Seen, is_pristine

# Symbolic tracing keeps the block as one call instead of looking inside.
torch.fx.wrap("inception")


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
    A child that was replaced, re-configured or given a hook is honoured: the block then runs its children one by one.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Raises InceptionInputError on a wrong x, KernelError where the backend demands kernels that cannot run."""
        reason = self.eager_reason()
        if reason is not None and isinstance(x, torch.fx.Proxy):
            return super().forward(x)
        if reason is not None:
            check_input(x)
            return eager(x, reason, dispatch.current(), super().forward)
        return inception(x, self.params(), activation=self.activation)

    def params(self) -> InceptionParams:
        """The block's parameters, the very objects that its children own."""
        children = self._modules
        # Not conv.weight, for which Module asks three dictionaries before that of the parameters: 0.3 us, twelve times.
        owned = [children[name]._parameters for name in CONV_NAMES]
        try:
            weights, biases = tuple([p["weight"] for p in owned]), tuple([p["bias"] for p in owned])
        except KeyError:
            # Pruning and the like put a plain tensor in a parameter's place.
            convs = [children[name] for name in CONV_NAMES]
            weights, biases = tuple([conv.weight for conv in convs]), tuple([conv.bias for conv in convs])
        return InceptionParams(weights, None if biases[0] is None else biases)

    def eager_reason(self) -> str | None:
        """What about the block's children and their classes keeps the kernels from standing in for them; None if
        nothing."""
        seen, compiling = self.__dict__.get(SEEN), torch.compiler.is_compiling()
        if seen is None or seen.modules[:1] != (self,) or not seen.holds():
            reason = self._reason()
            if reason is not None:
                return reason
            if not compiling and "_is_replica" not in self.__dict__:
                # What was judged need not be judged again until something is another.
                Seen([self, *(self._modules[name] for name in LAYERS)], key=SEEN)
        if not compiling and is_globally_hooked():
            return "a global module hook is registered"
        children = self._modules
        if len({children[name].__dict__["_parameters"].get("bias", 0) is None for name in CONV_NAMES}) == 2:
            return "some convolutions have a bias and some have none"
        return None

    def _reason(self) -> str | None:
        """:meth:`eager_reason` of what a Seen holds, in words."""
        for name in LAYERS:
            child = self._modules[name]
            kind = nn.MaxPool2d if name == "p4_1" else nn.Conv2d
            if type(child) is not kind:
                return f"{name} is a {type(child).__name__}, not a {kind.__name__}"
            if any(getattr(child, hooks) for hooks in HOOKS):
                return f"{name} has a hook"
            if any(method in child.__dict__ for method in FORWARDS):
                return f"{name} has a forward of its own"
            if not (is_pool_3x3(child) if name == "p4_1" else is_same_conv(child, SIDES.get(name, (1,)))):
                return f"{name} is configured as {child}"
        return _TORCHS.patched() or (None if _PRISTINE else "a forward of nn.Conv2d or nn.MaxPool2d is not PyTorch's")


LAYERS = (*CONV_NAMES, "p4_1")

SEEN = "_inception_fused_seen"
"""The attribute of a block that holds what its children and their classes were when they were last judged."""

_TORCHS = Seen([nn.Conv2d(1, 1, 1, device="meta"), nn.MaxPool2d(1)])
"""PyTorch's layers as they were when this was imported."""

_PRISTINE = is_pristine((nn.Conv2d, nn.MaxPool2d))
