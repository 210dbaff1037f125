"""What a block computes that is built of an Inception block's layers and computes something else, in words.

Its output is compared with those of forwards that are met: another activation or other places of ReLU, another pool or
none, branches in another order, the input added.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inception_fused.block.chains import PROJECTION, Variant

Function = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Function] = {
    "GELU": F.gelu,
    "GELU by tanh": lambda x: F.gelu(x, approximate="tanh"),
    "SiLU": F.silu,
    "LeakyReLU": F.leaky_relu,
    "LeakyReLU with slope 0.1": lambda x: F.leaky_relu(x, 0.1),
    "LeakyReLU with slope 0.2": lambda x: F.leaky_relu(x, 0.2),
    "ReLU6": F.relu6,
    "ELU": F.elu,
    "SELU": F.selu,
    "Mish": F.mish,
    "Hardswish": F.hardswish,
    "Softplus": F.softplus,
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
}

POOLS: dict[str, Function] = {
    "": lambda x: torch.max_pool2d(x, 3, 1, 1),
    "has no pool before its last convolution": lambda x: x,
    "has an average pool, as Inception v3 and v4 have": lambda x: F.avg_pool2d(x, 3, 1, 1),
    "has an average pool of its own kind": lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False),
}


class _Places(NamedTuple):
    """words: how a forward is described that has these activations. inner: between convolutions; outer: at the outputs
    of the branches."""

    words: str
    inner: Function
    outer: Function


def _nothing(x: Tensor) -> Tensor:
    return x


PLACES = (
    _Places("", torch.relu, torch.relu),
    _Places("", _nothing, _nothing),
    _Places("has ReLU at its outputs only, none between its convolutions", _nothing, torch.relu),
    _Places("has ReLU between its convolutions only, none at its outputs", torch.relu, _nothing),
    *(_Places(f"has {name} in place of ReLU", function, function) for name, function in ACTIVATIONS.items()),
)


def likely(y: Tensor, x: Tensor, variant: Variant, conv: Callable[[Tensor, int], Tensor], limit: float) -> str:
    """What a forward that gave y [N, K, H, W] for x [N, C, H, W], both float64, does otherwise than the block's, in
    words; "" where it is none of those that are met. conv: the i-th convolution with its BatchNorm, in eval mode;
    limit: the largest error over the RMS of a forward that is meant."""
    totals = [(y, "")]
    if x.shape == y.shape:
        totals.append((y - x, "adds its input (a residual connection)"))
    with torch.no_grad():
        for places in PLACES:
            *others, pooled = _branches(x, variant, conv, places)
            if x.shape == y.shape and places.outer is _nothing:
                whole = torch.cat([*(outputs[""] for outputs in others), pooled[""]], dim=1)
                if _same(y, torch.relu(whole + x), limit):
                    return _said("adds its input before its last ReLU (a residual connection)")
            for total, residual in totals:
                for order, pool in _matches(total, others, pooled, limit):
                    return _said(places.words, pool, order, residual)
    return ""


def _said(*words: str) -> str:
    given = " and ".join(filter(None, words))
    return f"its forward {given}; this is not supported" if given else ""


def _branches(
    x: Tensor, variant: Variant, conv: Callable[[Tensor, int], Tensor], places: _Places
) -> list[dict[str, Tensor]]:
    """Outputs of each branch by the words of its pool, "" of one without."""
    found = []
    for chain in variant.places:
        pools = POOLS if variant.convs[chain[0]].role == PROJECTION else {"": _nothing}
        outputs = {}
        for words, pool in pools.items():
            z = pool(x)
            for i in chain:
                z = conv(places.inner(z) if i != chain[0] else z, i)
            outputs[words] = places.outer(z)
        found.append(outputs)
    return found


def _matches(
    y: Tensor, others: Sequence[dict[str, Tensor]], pooled: dict[str, Tensor], limit: float
) -> Iterator[tuple[str, str]]:
    """(words of the order, words of the pool) for which the branches side by side are y."""
    for pool, last in pooled.items():
        branches = [*(outputs[""] for outputs in others), last]
        for order in permutations(range(len(branches))):
            parts = y.split([branches[i].shape[1] for i in order], dim=1)
            if all(_same(part, branches[i], limit) for part, i in zip(parts, order, strict=True)):
                said = ", ".join(str(i + 1) for i in order)
                yield "" if list(order) == sorted(order) else f"returns its branches in the order {said}", pool


def _same(a: Tensor, b: Tensor, limit: float) -> bool:
    return bool((a - b).abs().amax() <= limit * b.square().mean().sqrt())
