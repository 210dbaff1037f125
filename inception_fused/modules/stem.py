"""The second part of GoogLeNet's stem, b2, whose two convolutions the kernels compute.

    y = pool(ReLU(conv 3x3(ReLU(conv 1x1(x)))))

A chain of a reduction and a window, as branch 2 of a block (block/chains.py, STEM): the block's operators and launches
run it. The pool stays PyTorch's. Private to :class:`GoogLeNet`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from inception_fused.block.chains import STEM
from inception_fused.block.reference import InceptionParams
from inception_fused.modules import own_convs
from inception_fused.modules.structure import has_own_forward, is_globally_hooked, is_hooked
from inception_fused.modules.tracers import wants_layers
from inception_fused.modules.watch import Classes, is_pristine
from inception_fused.op import backends
from inception_fused.op.autograd import convolved, eager

# Symbolic tracing keeps the two convolutions as one call instead of looking inside.
torch.fx.wrap("stem")

RELUS = ("1", "3")
LAYERS = ("0", "1", "2", "3")
"""Names of the children that one call stands for; what follows is called one by one."""

_layers = Classes((nn.Conv2d, nn.ReLU))
"""The children's classes as they were when this was imported."""

_PRISTINE = is_pristine((nn.Conv2d, nn.ReLU))


def stem(x: Tensor, params: InceptionParams) -> Tensor:
    """The two convolutions, each with its ReLU.

    x: [N, C, H, W]. params: weights (K, C, 1, 1) and (L, K, 3, 3), biases or none. Returns [N, L, H, W] in
    channels_last memory.
    """
    return convolved(x, params, activation="relu", variants={STEM.count: STEM})


class FusedStem(nn.Sequential):
    """A Sequential of a 1x1 convolution, ReLU, a 3x3 convolution, ReLU and anything behind them.

    The same children and state_dict, and the same results as the Sequential's. x [N, C, H, W] as those take it; where
    x is no such tensor, or somebody replaced, re-configured or hooked one of the four, they run one by one.
    """

    activation = "relu"

    def forward(self, x: Tensor) -> Tensor:
        """Raises KernelError where the backend demands kernels that cannot run."""
        reason = self.eager_reason()
        if isinstance(x, torch.fx.Proxy) and (reason is not None or wants_layers(x)):
            return super().forward(x)
        if isinstance(x, Tensor) and (x.dim() != 4 or x.is_quantized or x.layout is not torch.strided):
            return super().forward(x)
        if reason is not None:
            # Fewer layers are a slice of this, which nobody expects the kernels to run.
            return eager(x, reason, backends.current(), super().forward, quiet=len(self) < len(LAYERS))
        x = stem(x, self.params())
        for name, layer in self._modules.items():
            if name not in LAYERS:
                x = layer(x)
        return x

    def __prepare_scriptable__(self) -> nn.Sequential:
        """What torch.jit.script compiles in this one's place: the layers."""
        return nn.Sequential(self._modules)

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
        if tuple(children)[: len(LAYERS)] != LAYERS:
            return f"it has the layers {', '.join(children) or 'none'}"
        reason = own_convs.conv_reason(children, STEM)
        for name in RELUS:
            reason = reason or own_convs.child_reason(name, children[name], nn.ReLU)
        if reason is not None:
            return reason
        if not compiling and is_globally_hooked():
            return "a global module hook is registered"
        if not _PRISTINE:
            return "a forward of nn.Conv2d or nn.ReLU is not PyTorch's"
        reason = _layers.patched() or None
        if reason is None and not compiling:
            # What was of no consequence need not be looked at again.
            _layers.renew()
        return reason


def _are_usual(children: dict[str, nn.Module]) -> bool:
    """Whether the first four are as GoogLeNet makes them: the check of every call. False says nothing."""
    try:
        if tuple(children)[: len(LAYERS)] != LAYERS or not own_convs.are_usual(children, STEM):
            return False
        relus = [children[name] for name in RELUS]
    except (AttributeError, KeyError):
        return False
    return all(type(relu) is nn.ReLU and not (is_hooked(d := relu.__dict__) or has_own_forward(d)) for relu in relus)
