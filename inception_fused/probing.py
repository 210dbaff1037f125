"""What a device was once found able to run is remembered; why it could not, only where that will not pass."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps

import torch

PASSING = ("out of memory", "memoryallocation", "captur")
"""Words of errors, in lower case, after which another attempt may succeed: memory is freed, a capture ends."""

CAPTURED = (
    "its first call on this device is inside a CUDA graph's capture, where nothing can be tried or loaded; "
    "precompile(model, x), or one call before it"
)


def passes(reason: str) -> bool:
    """Whether another attempt may succeed."""
    return any(words in reason.lower() for words in PASSING)


class _PassingError(Exception):
    """A reason that is not remembered."""


def remembered(obstacle: Callable[[int], str | None]) -> Callable[[int], str | None]:
    """obstacle(device index) -> None or why not, called once for a device as long as its reason is not one that passes.

    During the capture of a CUDA graph it is not called at all.
    """

    @cache
    def ask(index: int) -> str | None:
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            raise _PassingError(CAPTURED)
        reason = obstacle(index)
        if reason is not None and passes(reason):
            raise _PassingError(reason)
        return reason

    @wraps(obstacle)
    def answer(index: int) -> str | None:
        try:
            return ask(index)
        except _PassingError as error:
            return str(error)

    return answer
