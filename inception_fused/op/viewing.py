"""``.view`` of what a block returns, which raises: its output is channels_last whatever came in.

Old models flatten with ``x.view(x.size(0), -1)``, which PyTorch refuses for such memory unless the image is one pixel.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import traceback
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

SAID = "view size is not compatible with input tensor's size and stride"
"""PyTorch's words, from 2.0 to 2.14."""

CURE = "a fused block returns channels_last memory, which .view cannot flatten; write .flatten(1) or .reshape there"


def is_view_error(error: BaseException) -> bool:
    """Whether this is PyTorch's refusal of a ``.view``, of whatever memory."""
    return isinstance(error, RuntimeError) and SAID in str(error)


def advice(error: BaseException) -> str:
    """Where the ``.view`` stands and what to write instead."""
    last = traceback.extract_tb(error.__traceback__)
    there = [frame for frame in last if ".view" in (frame.line or "")]
    place = f"{there[-1].name}, line {there[-1].lineno}: {there[-1].line}: " if there else ""
    return f"{place}{CURE}"


class Advising(TorchFunctionMode):
    """Within it a ``.view`` that PyTorch refuses says what to write instead, where the memory is channels_last."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.view:
            return func(*args, **(kwargs or {}))
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            x = args[0]
            if is_view_error(error) and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
                raise RuntimeError(f"{error} {CURE}") from error
            raise


def views_in(module: nn.Module) -> list[str]:
    """Calls of ``.view`` in the forward of a module's class, each as "Net.forward, line 12: x.view(x.size(0), -1)";
    none where there is no source to read."""
    kind = type(module)
    try:
        lines, start = inspect.getsourcelines(kind.forward)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, TypeError, SyntaxError):
        return []
    return [
        f"{kind.__name__}.forward, line {start + node.lineno - 1}: {ast.unparse(node)}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "view"
    ]
