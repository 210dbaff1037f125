"""Where every launch goes, Triton's and the compiled extension's: run at once, or recorded instead.

Recording serves whoever needs a launch without its effect: the ahead-of-time gate, the count of launches, the timing
of one kernel. The caller has made the tensors' device current.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

import torch

from inception_fused.errors import KernelError

SYNCHRONISE = os.environ.get("INCEPTION_FUSED_SYNC") == "1"
"""INCEPTION_FUSED_SYNC=1 waits for every launch, so that an error while a kernel runs is reported by that kernel."""


class Runnable(Protocol):
    """A launch that is ready to go."""

    def run(self) -> None:
        """Enqueue on the current stream. Raises KernelError."""

    def describe(self) -> str:
        """Kernel and problem, for a message."""


_recorded: ContextVar[list[Runnable] | None] = ContextVar("inception_fused_recorded", default=None)


def submit(item: Runnable) -> None:
    """Run a launch, or append it to the list of the enclosing :func:`record`."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(item)
        return
    item.run()
    if SYNCHRONISE and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            raise KernelError(f"{item.describe()} failed while running: {error}") from error


@contextmanager
def record() -> Iterator[list[Runnable]]:
    """Within it launches are listed instead of run."""
    launches: list[Runnable] = []
    token = _recorded.set(launches)
    try:
        yield launches
    finally:
        _recorded.reset(token)
