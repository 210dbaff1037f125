"""The drop-in module: ``Inception``'s constructor, children and weights, run by the kernels."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from inception_fused.block import chains
from inception_fused.block.reference import Inception, InceptionParams
from inception_fused.modules import own_convs
from inception_fused.modules.structure import has_own_forward, is_globally_hooked, is_hooked, is_pool_3x3
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
        return own_convs.params_of(children, variant_of(children).names)

    def eager_reason(self) -> str | None:
        """What about the block's children and their classes keeps the kernels from standing in for them; None if
        nothing."""
        children = self._modules
        usual, compiling = _are_usual(children), torch.compiler.is_compiling()
        if usual and _PRISTINE and _layers.hold() and (compiling or not is_globally_hooked()):
            return None
        reason = own_convs.conv_reason(children, variant_of(children))
        if reason is None:
            reason = own_convs.child_reason("p4_1", children.get("p4_1"), nn.MaxPool2d)
        if reason is None and not is_pool_3x3(children["p4_1"]):
            reason = f"p4_1 is configured as {children['p4_1']}"
        if reason is not None:
            return reason
        return own_convs.class_reason("nn.Conv2d or nn.MaxPool2d", _PRISTINE, _layers)


def variant_of(children: dict[str, nn.Module]) -> chains.Variant:
    """That of a block with these children."""
    return chains.DOUBLE if "p3_3" in children else chains.USUAL


def _are_usual(children: dict[str, nn.Module]) -> bool:
    """Whether all is as the constructor makes it: the check of every call. False says nothing."""
    try:
        if not own_convs.are_usual(children, variant_of(children)):
            return False
        d = children["p4_1"].__dict__
        pool = (d["kernel_size"], d["stride"], d["padding"], d["dilation"], d["return_indices"])
    except (AttributeError, KeyError):
        return False
    return (
        type(children["p4_1"]) is nn.MaxPool2d
        and pool == (3, 1, 1, 1, False)
        and not (is_hooked(d) or has_own_forward(d))
    )
