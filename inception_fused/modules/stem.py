"""The second part of GoogLeNet's stem, b2, whose two convolutions the kernels compute.

    y = pool(ReLU(conv 3x3(ReLU(conv 1x1(x)))))

A chain of a reduction and a window, as branch 2 of a block (block/chains.py, STEM): the block's operators and launches
run it. The pool is a module of its own behind them (pools.py). Private to :class:`GoogLeNet`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inception_fused.block.chains import STEM
from inception_fused.block.reference import InceptionParams
from inception_fused.modules import own_convs
from inception_fused.modules.structure import has_own_forward, is_globally_hooked, is_hooked
from inception_fused.modules.tracers import announce_script, in_place_of, wants_layers
from inception_fused.modules.watch import Classes, is_pristine
from inception_fused.op import backends
from inception_fused.op.autograd import announce_eager, convolved, eager

# Symbolic tracing keeps the two convolutions as one call instead of looking inside.
torch.fx.wrap("stem")

RELUS = ("1", "3")
LAYERS = ("0", "1", "2", "3")
"""Names of the children that one call stands for; what follows is called one by one."""

_layers = Classes((nn.Conv2d, nn.ReLU, nn.Sequential))
"""The children's classes and their container's as they were when this was imported."""

_PRISTINE = is_pristine((nn.Conv2d, nn.ReLU))


def stem(x: Tensor, params: InceptionParams) -> Tensor:
    """The two convolutions, each with its ReLU.

    x: [N, C, H, W]. params: weights (K, C, 1, 1) and (L, K, 3, 3), biases or none. Returns [N, L, H, W] in
    channels_last memory.
    """
    return convolved(x, params, activation="relu", variants={STEM.count: STEM})


def _run(module: FusedStem, x: Any) -> Any:
    """What :class:`FusedStem` computes. x: whatever a Sequential is given."""
    layers = partial(nn.Sequential.forward, module)
    if not module.is_whole():
        return layers(x)
    reason, backend = module.eager_reason(), backends.current()
    if isinstance(x, torch.fx.Proxy):
        if reason is not None or wants_layers(x):
            return layers(x)
    elif not (isinstance(x, Tensor) and x.dim() == 4 and x.layout is torch.strided and not x.is_quantized):
        announce_eager(x, reason or "x is no dense tensor [N, C, H, W]", backend)
        return layers(x)
    elif reason is not None:
        return eager(x, reason, backend, layers)
    y = stem(x, module.params())
    for name, layer in module._modules.items():
        if name not in LAYERS:
            y = layer(y)
    return y


class FusedStem(nn.Sequential):
    """A Sequential of a 1x1 convolution, ReLU, a 3x3 convolution, ReLU and anything behind them.

    The same children and state_dict, and the same results as the Sequential's, in channels_last memory. input
    [N, C, H, W] as those take it; where it is no such tensor, or somebody replaced, re-configured or hooked one of the
    four, they run one by one. Raises KernelError where the backend demands kernels that cannot run.
    """

    activation = "relu"

    forward = in_place_of(nn.Sequential.forward, _run)

    def __prepare_scriptable__(self) -> FusedStem:
        """What torch.jit.script asks of every module first. It then compiles the layers."""
        if self.is_whole():
            announce_script(self)
        return self

    def is_whole(self) -> bool:
        """Whether the four layers are there by name: a slice of a Sequential is of its class, and has fewer."""
        return tuple(self._modules)[: len(LAYERS)] == LAYERS

    def params(self) -> InceptionParams:
        """The parameters of the two convolutions, the very objects that they own."""
        return own_convs.params_of(self._modules, STEM.names)

    def eager_reason(self) -> str | None:
        """What about the first four children and their classes keeps the kernels from standing in for them; None if
        nothing."""
        children, compiling = self._modules, torch.compiler.is_compiling()
        usual = _are_usual(children)
        if usual and _PRISTINE and _layers.hold() and (compiling or not is_globally_hooked()):
            return None
        reason = own_convs.conv_reason(children, STEM)
        for name in RELUS:
            reason = reason or own_convs.child_reason(name, children.get(name), nn.ReLU)
        if reason is not None:
            return reason
        return own_convs.class_reason("nn.Conv2d or nn.ReLU", _PRISTINE, _layers)


def _are_usual(children: dict[str, nn.Module]) -> bool:
    """Whether the first four are as GoogLeNet makes them: the check of every call. False says nothing."""
    try:
        if tuple(children)[: len(LAYERS)] != LAYERS or not own_convs.are_usual(children, STEM):
            return False
        relus = [children[name] for name in RELUS]
    except (AttributeError, KeyError):
        return False
    return all(type(relu) is nn.ReLU and not (is_hooked(d := relu.__dict__) or has_own_forward(d)) for relu in relus)
