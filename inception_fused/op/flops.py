"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators: what it counts for the eager block."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch.utils.flop_counter import register_flop_formula

from inception_fused.block.tensor_lists import Needs

Shape = Sequence[int]


def forward_flops(x: Shape, weights: Sequence[Shape], *_: object, **__: object) -> int:
    """Two for every product of the convolutions, taps in the padding included; from shapes."""
    return sum(_products(x, weights))


def backward_flops(
    dy: Shape, x: Shape, r: Shape, bits: Shape, taps: Shape, weights: Sequence[Shape], biases: Sequence[Shape],
    relu: bool, needs: Sequence[bool], *_: object, **__: object,
) -> int:  # fmt: skip
    """The wanted weights' gradients and the gradients to inputs on the way to what is wanted."""
    wanted = Needs.of(needs)
    each = zip(_products(x, weights), wanted.weights, wanted.to_inputs, strict=True)
    return sum(product * (need + to_input) for product, need, to_input in each)


def _products(x: Shape, weights: Sequence[Shape]) -> list[int]:
    n, _, h, w = x
    return [2 * n * h * w * prod(shape) for shape in weights]


def register() -> None:
    """Makes the formulas known to every counter that is made afterwards."""
    ops = torch.ops.inception_fused
    register_flop_formula([ops._infer, ops._forward])(forward_flops)
    register_flop_formula(ops._backward)(backward_flops)
