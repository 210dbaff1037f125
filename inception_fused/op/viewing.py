"""``.view`` of what a block returns, which raises: its output is channels_last whatever came in.

Old models flatten with ``x.view(x.size(0), -1)``, which PyTorch refuses for such memory unless the image is one pixel.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

SAID = "view size is not compatible with input tensor's size and stride"
"""PyTorch's words; read in 2.13 and 2.14."""

CURE = "a fused block returns channels_last memory, which .view cannot flatten; write .flatten(1) or .reshape there"


def is_refused(error: BaseException) -> bool:
    """Whether this is the error that :class:`Advising` raises."""
    return isinstance(error, RuntimeError) and str(error).endswith(CURE)


def advice(error: BaseException) -> str:
    """PyTorch's words, where the ``.view`` stands and what to write instead. error: as :class:`Advising` raises it."""
    there = [frame for frame in traceback.extract_tb(error.__traceback__) if ".view" in (frame.line or "")]
    place = f"{there[-1].name}, line {there[-1].lineno}: {there[-1].line}: " if there else ""
    return f"{error.__cause__} {place}{CURE}"


class Advising(TorchFunctionMode):
    """Within it a ``.view`` that PyTorch refuses says what to write instead, where the memory is channels_last."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not Tensor.view:
            return func(*args, **(kwargs or {}))
        try:
            return func(*args, **(kwargs or {}))
        except RuntimeError as error:
            x = args[0]
            if SAID in str(error) and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
                raise RuntimeError(f"{error} {CURE}") from error
            raise
