"""The first part of GoogLeNet's stem, b1, whose bias and ReLU the pool's kernel applies behind its maximum.

    y = pool(ReLU(conv 7x7(x))) = ReLU(pool(conv 7x7 without bias(x)) + bias)

A sum that is rounded, and ReLU, keep the order, so the result is the same; what the convolution gives, the largest
activation of the network, is read once, and neither written again nor kept for the backward. A bias that is not finite
keeps no order: where +inf meets -inf beside a larger number the layers give NaN and this inf, and of a NaN the gradient
goes to the largest pixel instead of the last. The convolution is PyTorch's. Private to :class:`GoogLeNet`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_fused.modules import own_convs
from inception_fused.modules.pools import FusedPool
from inception_fused.modules.structure import has_own_forward, is_hooked
from inception_fused.modules.tracers import announce_script, in_place_of
from inception_fused.modules.watch import Classes, is_pristine
from inception_fused.op import backends, reasons
from inception_fused.op.autograd import announce_eager, channels_last
from inception_fused.op.calls import autocast_enabled, compute_dtype
from inception_fused.op.pools_autograd import max_pool, obstacle

KINDS = {"0": nn.Conv2d, "1": nn.ReLU, "2": FusedPool}
"""Names of the children and their classes."""

_layers = Classes((nn.Conv2d, nn.ReLU, nn.Sequential))
"""The children's classes and their container's as they were when this was imported; the pool looks after its own."""

_PRISTINE = is_pristine((nn.Conv2d, nn.ReLU))


def _run(module: FusedEntry, x: Any) -> Any:
    """What :class:`FusedEntry` computes. x: whatever a Sequential is given."""
    layers = partial(nn.Sequential.forward, module)
    if not module.is_whole() or not _is_image(x) or reasons.outlives_this_call():
        return layers(x)
    backend, reason = backends.current(), module.eager_reason()
    if reason is not None:
        announce_eager(x, reason, backend)
        return layers(x)
    conv, _, pool = module._modules.values()
    bias = conv.bias
    if bias is not None and bias.dtype != conv.weight.dtype and not autocast_enabled(x):
        return layers(x)  # PyTorch says what is wrong; behind the pool any dtype would do
    found = obstacle(x, (conv.weight, bias), backend, compute_dtype(x))
    if found is not None:
        announce_eager(x, found.text, backend, quiet=True)
        return layers(x)
    return max_pool(module.convolved(x), padding=pool.border(), ceil_mode=pool.ceil_mode, bias=bias, relu=True)


def _is_image(x: Any) -> bool:
    """Whether x is a dense tensor [N, C, H, W]; symbolic tracing, for one, has none, and sees the layers."""
    if isinstance(x, torch.fx.Proxy) or not isinstance(x, Tensor):
        return False
    return x.dim() == 4 and x.layout is torch.strided and not x.is_quantized


def _as_rows(x: Tensor) -> Tensor:
    """x [N, C, H, W] such that a convolution of it gives rows of channels, beside which the image is small.

    A grey image is contiguous in either order: PyTorch goes by the strides of the one channel, which are to say so.
    """
    n, channels, h, w = x.shape
    return channels_last(x) if channels > 1 else x.reshape(n, h, w, 1).permute(0, 3, 1, 2)


class FusedEntry(nn.Sequential):
    """A Sequential of a convolution, ReLU and a :class:`FusedPool`.

    The same children and state_dict, and the same results as the Sequential's, of the kernels in channels_last memory.
    input [N, C, H, W] as those take it; where it is no such tensor, or somebody replaced, re-configured or hooked one
    of the three, they run one by one. Raises KernelError where the backend demands kernels that cannot run.
    """

    forward = in_place_of(nn.Sequential.forward, _run)

    def __prepare_scriptable__(self) -> FusedEntry:
        """What torch.jit.script asks of every module first. It then compiles the layers."""
        if self.is_whole():
            announce_script(self)
        return self

    def convolved(self, x: Tensor) -> Tensor:
        """What PyTorch's convolution gives, without its bias."""
        conv = self._modules["0"]
        return F.conv2d(_as_rows(x), conv.weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)

    def is_whole(self) -> bool:
        """Whether the three layers are there and nothing else: a slice of a Sequential is of its class, and has
        fewer."""
        return tuple(self._modules) == tuple(KINDS)

    def eager_reason(self) -> str | None:
        """What about the children and their classes keeps the kernel from standing in for the last two; None if
        nothing."""
        children = self._modules
        for name, kind in KINDS.items():
            child = children[name]
            if type(child) is not kind or is_hooked(d := child.__dict__) or has_own_forward(d):
                return own_convs.child_reason(name, child, kind)
        if children["0"].padding_mode != "zeros":
            return f"0 is configured as {children['0']}"
        reason = own_convs.class_reason("nn.Conv2d or nn.ReLU", _PRISTINE, _layers)
        return reason or children["2"].eager_reason()
