"""GoogLeNet's max-pool of stride 2, which a kernel computes. Private to :class:`GoogLeNet`."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from inception_fused.block.pools import PADDINGS, STRIDE, WINDOW
from inception_fused.modules.tracers import announce_script, in_place_of, wants_layers
from inception_fused.modules.watch import Classes, is_pristine
from inception_fused.op import backends
from inception_fused.op.autograd import announce_eager
from inception_fused.op.pools_autograd import max_pool

# Symbolic tracing keeps the pool as one call instead of looking inside.
torch.fx.wrap("pooled")

_layers = Classes((nn.MaxPool2d,))
"""The parent's class as it was when this was imported."""

_PRISTINE = is_pristine((nn.MaxPool2d,))


def pooled(x: Tensor, padding: int, ceil_mode: bool) -> Tensor:
    """The pool as a function, by which a graph of torch.fx knows it; see op.pools_autograd.max_pool."""
    return max_pool(x, padding=padding, ceil_mode=ceil_mode)


def _run(module: FusedPool, x: Any) -> Any:
    """What :class:`FusedPool` computes. x: whatever a MaxPool2d is given."""
    layer = partial(nn.MaxPool2d.forward, module)
    reason = module.eager_reason()
    if isinstance(x, torch.fx.Proxy):
        if reason is not None or wants_layers(x):
            return layer(x)
    elif reason is not None or not isinstance(x, Tensor):
        announce_eager(x, reason or "x is no tensor", backends.current())
        return layer(x)
    return pooled(x, module.border(), module.ceil_mode)


class FusedPool(nn.MaxPool2d):
    """A MaxPool2d of the same arguments and the same results, of the kernels in channels_last memory.

    The kernels compute 3x3 windows of stride 2 with padding 0 or 1; with other settings, or where somebody replaced a
    method of nn.MaxPool2d, PyTorch's layer runs. A hook does not count, since it is called around either. Raises
    KernelError where the backend demands kernels that cannot run.
    """

    forward = in_place_of(nn.MaxPool2d.forward, _run)

    def __prepare_scriptable__(self) -> FusedPool:
        """What torch.jit.script asks of every module first. It then compiles PyTorch's layer."""
        announce_script(self)
        return self

    def border(self) -> int:
        """The padding as one number."""
        return self.padding[0] if isinstance(self.padding, tuple) else self.padding

    def eager_reason(self) -> str | None:
        """What about the settings and the class keeps the kernels from computing it; None if nothing."""
        if not _is_known(self):
            return f"its max-pool is configured as {self}" + " with return_indices" * (self.return_indices is not False)
        if not _PRISTINE:
            return "a forward of nn.MaxPool2d is not PyTorch's"
        return _layers.fault()


def _is_known(pool: nn.MaxPool2d) -> bool:
    return (
        pool.kernel_size in (WINDOW, (WINDOW, WINDOW))
        and pool.stride in (STRIDE, (STRIDE, STRIDE))
        and pool.padding in (*PADDINGS, *[(padding, padding) for padding in PADDINGS])
        and pool.dilation in (1, (1, 1))
        and pool.return_indices is False
        and isinstance(pool.ceil_mode, bool)
    )
