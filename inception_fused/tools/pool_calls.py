"""The max-pools of stride 2 of a model, b1's with its bias and ReLU, as ``precompile`` makes them ready."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.block.leaves import leaf
from inception_fused.modules.entry import FusedEntry
from inception_fused.modules.pools import FusedPool
from inception_fused.op import backends, pools_autograd
from inception_fused.op.saved import dtype_name
from inception_fused.runtime.submit import Runnable, record
from inception_fused.tools.capture import Item


def pools_of(model: nn.Module) -> dict[str, FusedPool | FusedEntry]:
    """Every such module by its name, once each; of b1 the whole, whose pool is not called then, unless its layers run
    one by one."""
    entries = [(name, m) for name, m in model.named_modules() if isinstance(m, FusedEntry) and m.is_whole()]
    found = {name: m for name, m in entries if m.eager_reason() is None}
    inner = {entry[-1] for entry in found.values()}
    return found | {n: m for n, m in model.named_modules() if isinstance(m, FusedPool) and m not in inner}


class PoolCall(NamedTuple):
    """A pool's call. x: what it pools; bias, relu: what comes before it; wanted: whether gradients are."""

    x: Tensor
    bias: Tensor | None
    relu: bool
    wanted: bool
    padding: int
    ceil_mode: bool

    @classmethod
    def of(cls, module: FusedPool | FusedEntry, item: Item) -> PoolCall | None:
        """The call as it was; None where there was none, or no kernel runs it."""
        if item.x is None or module.eager_reason() is not None:
            return None
        x, bias, pool, wanted = item.x, None, module, item.x_grad
        if isinstance(module, FusedEntry):
            pool, bias = module[-1], module[0].bias
            wanted = wanted or any(p.requires_grad for p in module.parameters())
            with torch.no_grad(), item.autocasting():
                x = module.convolved(x)
            bias = bias if bias is None else bias.detach().to(x.dtype)
        call = cls(x, bias, pool is not module, wanted, pool.border(), pool.ceil_mode)
        if not x.numel() or not pools_autograd.takes(x, call.padding, call.ceil_mode):
            return None
        return call if pools_autograd.obstacle(x, (bias,), backends.current(), x.dtype) is None else None

    def launches(self, backward: bool) -> list[Runnable]:
        """What the operators would launch. Nothing is run: outputs hold what they hold."""
        operators, backend = torch.ops.inception_fused, backends.current()
        given = (self.x, self.bias, self.relu, self.padding, self.ceil_mode)
        with torch.no_grad(), record() as found:
            operators._max_pool(*given, False, backend)
            if self.wanted:
                y, taps = operators._max_pool(*given, True, backend)
                kind = "" if self.bias is None else dtype_name(self.bias.dtype)
                place = (*self.x.shape[2:], self.padding, self.ceil_mode, kind)
                if backward:
                    operators._max_pool_backward(y, taps, *place, backend)
        return found

    def warm(self, backward: bool, runs: int) -> None:
        """Run the pool so often, on leaves of its own, whose gradients nobody keeps."""
        x, bias = (t if t is None else leaf(t, self.wanted) for t in (self.x, self.bias))

        def pool() -> Tensor:
            more = dict(padding=self.padding, ceil_mode=self.ceil_mode, bias=bias, relu=self.relu)
            return pools_autograd.max_pool(x, **more)

        for _ in range(runs):
            with torch.no_grad():
                pool()
            if self.wanted:
                with torch.enable_grad():
                    y = pool()
                if backward:
                    leaves = [t for t in (x, bias) if t is not None]
                    torch.autograd.grad(y, leaves, torch.ones_like(y))
