"""GoogLeNet's stem in small sizes, built so and as a plain Sequential, for the tests of modules, tools and compat."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.modules.stem import FusedStem
from inception_fused.testing import Error, tolerance

LAYERS = [nn.Conv2d, nn.ReLU, nn.Conv2d, nn.ReLU, nn.MaxPool2d]

BOUND = tolerance(torch.float32, 10**4)


class Sizes(NamedTuple):
    """Channels of x, of the 1x1 and of the 3x3."""

    c: int
    k: int
    out: int


SMALL = Sizes(24, 16, 32)
ODD = Sizes(17, 9, 13)
"""No count is a multiple of 8."""


def plain(
    sizes: Sizes = SMALL, *, bias: bool = True, pool: bool = True, dtype: torch.dtype | None = None, seed: int = 3
):
    """The layers of b2 as a Sequential. pool: whether the pool stands behind them."""
    c, k, out = sizes
    torch.manual_seed(seed)
    layers = [
        nn.Conv2d(c, k, 1, bias=bias, dtype=dtype), nn.ReLU(),
        nn.Conv2d(k, out, 3, padding=1, bias=bias, dtype=dtype), nn.ReLU(),
    ]  # fmt: skip
    return nn.Sequential(*layers, *[nn.MaxPool2d(3, 2, 1)] * pool)


def fused(*args, **kwargs) -> FusedStem:
    """The same layers as a FusedStem."""
    return fused_of(plain(*args, **kwargs))


def fused_of(sequential: nn.Sequential) -> FusedStem:
    return FusedStem(OrderedDict(copy.deepcopy(sequential).named_children()))


def pair(*args, **kwargs) -> tuple[FusedStem, nn.Sequential]:
    sequential = plain(*args, **kwargs)
    return fused_of(sequential), sequential


def replica_of(module: nn.Sequential) -> nn.Sequential:
    """As DataParallel copies a module: parameters that are computed and registered nowhere."""
    replica = module._replicate_for_data_parallel()
    for name, layer in module.named_children():
        copied = layer._replicate_for_data_parallel()
        for kind, p in layer.named_parameters():
            setattr(copied, kind, p * 1)
        replica._modules[name] = copied
    return replica


def images(*shape: int, c: int = SMALL.c, seed: int = 1) -> Tensor:
    """Of (N, H, W), (2, 5, 4) where none is given."""
    n, h, w = shape or (2, 5, 4)
    return torch.randn((n, c, h, w), generator=torch.Generator().manual_seed(seed))


def step(module: nn.Module, x: Tensor, run: Callable[[Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The output and every gradient that there is, of x too where it wants one."""
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    y = (run or module)(x)
    y.double().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | ({"x": x.grad} if x.grad is not None else {}) | grads


def assert_alike(ours: dict[str, Tensor], theirs: dict[str, Tensor], bound: float = BOUND) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert t.dtype == theirs[name].dtype, name
        assert Error.of(t, theirs[name]).within(bound), name
