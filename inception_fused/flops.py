"""What ``torch.utils.flop_counter.FlopCounterMode`` counts for the operators: what it counts for the eager block.

Its module imports Triton, 0.2 s that a user who counts nothing need not wait for. So the formulas are registered when
somebody else imports it, and a counter, which copies the table of formulas when it is made, always finds ours there.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from math import prod
from types import ModuleType
from typing import Any

import torch

from inception_fused.gradients import Wanted

COUNTER = "torch.utils.flop_counter"

Shape = Sequence[int]


def forward_flops(x: Shape, weights: Sequence[Shape], *_: object, **__: object) -> int:
    """Two for every product of the six convolutions, taps in the padding included; from shapes."""
    return sum(_products(x, weights))


def backward_flops(
    dy: Shape, x: Shape, r: Shape, bits: Shape, taps: Shape, weights: Sequence[Shape], biases: Sequence[Shape],
    relu: bool, needs: Sequence[bool], *_: object, **__: object,
) -> int:  # fmt: skip
    """The wanted weights' gradients and the gradients to inputs on the way to what is wanted."""
    products, wanted = _products(x, weights), Wanted.of(needs)
    to_inputs = (wanted.x, wanted.x, wanted.dr3, wanted.x, wanted.dr5, wanted.x)
    return sum(p * (need + to) for p, need, to in zip(products, needs[1:7], to_inputs, strict=True))


def _products(x: Shape, weights: Sequence[Shape]) -> list[int]:
    n, _, h, w = x
    return [2 * n * h * w * prod(shape) for shape in weights]


def register() -> None:
    """Register the formulas once torch.utils.flop_counter is imported; at once where it is already."""
    if COUNTER in sys.modules:
        _register(sys.modules[COUNTER])
    else:
        sys.meta_path.insert(0, _WhenImported())


def _register(counter: ModuleType) -> None:
    ops = torch.ops.inception_fused
    counter.register_flop_formula([ops._infer, ops._forward])(forward_flops)
    counter.register_flop_formula(ops._backward)(backward_flops)


class _WhenImported(MetaPathFinder):
    """Leaves the import to those behind it, and registers the formulas when the module is there."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if fullname != COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_register(module: ModuleType) -> None:
                execute(module)
                _register(module)

            spec.loader.exec_module = execute_and_register  # type: ignore[method-assign]
        return spec
