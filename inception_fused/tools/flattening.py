"""Forwards that flatten with ``.view`` what a block returns, found in their source. PyTorch refuses that of
channels_last memory of more than one pixel.

A word too much is worse than none, so only what certainly is such memory counts: a block's output, or its input's in an
auxiliary head behind an average pool that leaves several pixels, followed through what keeps the size. Most models
have a global pool before their ``.view``, which works.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from inception_fused.modules.isolation import is_librarys
from inception_fused.op.viewing import CURE

IMAGE, PIXELS = "image", "pixels"
"""What is known of a value: channels_last memory behind a block of any size, or of several pixels. None: nothing."""

KEEPS = (nn.ReLU, nn.Identity, nn.modules.dropout._DropoutNd, nn.modules.batchnorm._BatchNorm, nn.LeakyReLU, nn.SiLU)

KEEPS_BY_NAME = {"relu", "relu_", "dropout", "dropout2d", "leaky_relu", "gelu", "silu", "batch_norm"}

POOLS = {
    "avg_pool2d": nn.AvgPool2d, "max_pool2d": nn.MaxPool2d, "adaptive_avg_pool2d": nn.AdaptiveAvgPool2d,
    "adaptive_max_pool2d": nn.AdaptiveMaxPool2d,
}  # fmt: skip
"""Functions, and the layers that do the same."""


def flattened(model: nn.Module, blocks: Iterable[nn.Module]) -> tuple[str, ...]:
    """A sentence on every ``.view`` that would fail, with its place. blocks: that are fused, or will be."""
    blocks = set(blocks)
    inside = {inner for block in blocks for inner in block.modules()}
    found: dict[str, None] = {}
    for module in model.modules() if blocks else ():
        if module not in inside and not is_librarys(type(module).__module__):
            found |= dict.fromkeys(_views(module, blocks))
    return tuple(f"{place}: {CURE}." for place in found)


def _views(module: nn.Module, blocks: set[nn.Module]) -> list[str]:
    kind = type(module)
    try:
        lines, start = inspect.getsourcelines(kind.forward)
        (function,) = ast.parse(textwrap.dedent("".join(lines))).body
        flow = _Flow(module, blocks, function)
        flow.follow(function.body)
    except Exception:  # no source, or code that is read wrongly: nothing is said
        return []
    return [f"{kind.__name__}.forward, line {start + node.lineno - 1}: {ast.unparse(node)}" for node in flow.found]


class _Flow(ast.NodeVisitor):
    """A forward's statements in their order, and what is known of its variables."""

    def __init__(self, module: nn.Module, blocks: set[nn.Module], function: ast.FunctionDef) -> None:
        self.module, self.blocks = module, blocks
        self.found: list[ast.Call] = []
        self.loops: dict[str, nn.Module] = {}
        this, *given = [arg.arg for arg in function.args.args]
        self.this = this
        # The input of a module with blocks comes from before them.
        owner = any(inner in blocks for inner in module.modules())
        self.known: dict[str, str | None] = {} if owner else dict.fromkeys(given, IMAGE)

    def follow(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self.visit(statement)

    def visit_Assign(self, node: ast.Assign) -> None:
        self.visit(node.value)
        value = self.value_of(node.value)
        for target in node.targets:
            for name in [target] if isinstance(target, ast.Name) else getattr(target, "elts", ()):
                if isinstance(name, ast.Name):
                    self.known[name.id] = value if name is target else None

    def visit_For(self, node: ast.For) -> None:
        layers = self.layer(node.iter)
        if isinstance(node.target, ast.Name) and layers is not None and len(layers._modules):
            self.loops[node.target.id] = list(layers._modules.values())[-1]
        self.follow(node.body)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        is_view = isinstance(node.func, ast.Attribute) and node.func.attr == "view" and not node.keywords
        if is_view and _flattens(node.args) and self.value_of(node.func.value) == PIXELS:
            self.found.append(node)

    def layer(self, node: ast.expr) -> nn.Module | None:
        """The module that an expression names: self.head.pool, self.stages[2], or a loop's variable."""
        if isinstance(node, ast.Name):
            return self.module if node.id == self.this else self.loops.get(node.id)
        owner = self.layer(node.value) if isinstance(node, ast.Attribute | ast.Subscript) else None
        if owner is None:
            return None
        if isinstance(node, ast.Attribute):
            return owner._modules.get(node.attr)
        found = owner[ast.literal_eval(node.slice)]
        return found if isinstance(found, nn.Module) else None

    def value_of(self, node: ast.expr) -> str | None:
        if isinstance(node, ast.Name):
            return self.known.get(node.id)
        if not isinstance(node, ast.Call) or not node.args:
            return None
        layer = self.layer(node.func)
        if layer is not None:
            return self.through(layer, self.value_of(node.args[0]))
        name = node.func.attr if isinstance(node.func, ast.Attribute) else ""
        if name in KEEPS_BY_NAME:
            return self.value_of(node.args[0])
        if name in POOLS:
            more = {keyword.arg: ast.literal_eval(keyword.value) for keyword in node.keywords}
            pool = POOLS[name](*map(ast.literal_eval, node.args[1:]), **more)
            return self.through(pool, self.value_of(node.args[0]))
        return None

    def through(self, layer: nn.Module, value: str | None) -> str | None:
        """What is known of a layer's output, of its input's value."""
        if layer in self.blocks:
            return PIXELS
        if isinstance(layer, KEEPS):
            return value
        if isinstance(layer, nn.Conv2d):
            return value if layer.stride == (1, 1) and layer.padding in ("same", _halves(layer.kernel_size)) else None
        if isinstance(layer, nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
            return PIXELS if value and {*_pair(layer.output_size)}.isdisjoint({1, None}) else None
        if isinstance(layer, nn.AvgPool2d | nn.MaxPool2d):
            kernel, stride, padding = map(_pair, (layer.kernel_size, layer.stride, layer.padding))
            if stride == (1, 1) and padding == _halves(kernel):
                return value
            # A global pool has its stride from its window, or 1.
            return PIXELS if value and all(1 < s < k for s, k in zip(stride, kernel, strict=True)) else None
        ordered = isinstance(layer, nn.Sequential) or self.block_of(layer) is None
        for child in layer._modules.values() if ordered and layer._modules else ():
            value = self.through(child, value) if child is not None else value
        return value if ordered and layer._modules else None

    def block_of(self, layer: nn.Module) -> nn.Module | None:
        return next((inner for inner in layer.modules() if inner in self.blocks), None)


def _flattens(shape: Sequence[ast.expr]) -> bool:
    """Whether a .view of this shape has at most two sides; not .view(dtype)."""
    if len(shape) == 1:
        return isinstance(shape[0], ast.Tuple | ast.List) and len(shape[0].elts) <= 2
    return len(shape) == 2


def _pair(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, tuple | list) else (value, value)


def _halves(sides: Sequence[int]) -> tuple[int, ...]:
    return tuple(side // 2 for side in sides)
