"""Where every launch goes, Triton's and the compiled extension's: run at once, or recorded instead.

Recording serves whoever needs a launch without its effect: the ahead-of-time gate, the count of a forward's launches,
the timing of one kernel. Counting serves whoever wants the effect as well, and the backward's launches with it;
observing, whoever wants to launch the same again on other tensors (replay.py). The caller has made the tensors' device
current.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from inception_fused.errors import KernelError

SYNCHRONISE = os.environ.get("INCEPTION_FUSED_SYNC") == "1"
"""INCEPTION_FUSED_SYNC=1 waits for every launch, so that an error while a kernel runs is reported by that kernel."""


class Operands(NamedTuple):
    """What a launch that was prepared finds in its slots: addresses, and the tensors at them.

    device: its index; stream: the CUDA stream to launch on, both 0 on a CPU.
    """

    addresses: Sequence[int]
    tensors: Sequence[Tensor]
    device: int
    stream: int


PreparedLaunch = Callable[[Operands], None]
"""Enqueues one launch on the current stream. Raises KernelError."""

Place = Callable[[Tensor], tuple[int, int]]
"""(slot, bytes from its beginning) where an operand will be found. Raises LookupError."""


class Runnable(Protocol):
    """A launch that is ready to go."""

    def run(self) -> None:
        """Enqueue on the current stream. Raises KernelError."""

    def describe(self) -> str:
        """Kernel and problem, for a message."""

    def prepare(self, place: Place) -> PreparedLaunch:
        """The same launch for the operands of another call. Raises LookupError where it cannot be prepared."""


_recorded: ContextVar[list[Runnable] | None] = ContextVar("inception_fused_recorded", default=None)

_observed: ContextVar[list[Runnable] | None] = ContextVar("inception_fused_observed", default=None)

_counts: list[list[str]] = []
"""The lists of the :func:`count` in force. Of the whole process, not of a thread or context as _recorded is: autograd
runs the backward of CUDA tensors on a thread of its own."""

_counts_lock = threading.Lock()

_launching: ContextVar[bool] = ContextVar("inception_fused_launching", default=False)


def submit(item: Runnable) -> None:
    """Run a launch, or append it to the list of the enclosing :func:`record`."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded.append(item)
        return
    observed = _observed.get()
    if observed is not None:
        observed.append(item)
    if _counts or observed is not None:
        _run_watched(item)
    else:
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


@contextmanager
def observe() -> Iterator[list[Runnable]]:
    """Within it launches of this thread are listed and run."""
    launches: list[Runnable] = []
    token = _observed.set(launches)
    try:
        yield launches
    finally:
        _observed.reset(token)


watchers: list[Callable[[], bool]] = []
"""Each says whether somebody else wants to hear of every launch, such as a profiler through Triton's hooks."""


def plain() -> bool:
    """Whether launches just run: nobody records, counts or watches them or waits for each."""
    if SYNCHRONISE or _counts or _recorded.get() is not None:
        return False
    for watching in watchers:  # noqa: SIM110  a generator takes as long again
        if watching():
            return False
    return True


@contextmanager
def count() -> Iterator[list[str]]:
    """Within it every launch that runs, on whatever thread, adds its description to the list; none is held back.

    Launches that an enclosing :func:`record` lists instead do not count, nor does one that failed. Another thread that
    runs blocks of its own meanwhile is counted along.
    """
    names: list[str] = []
    with _counts_lock:
        _counts.append(names)
    try:
        yield names
    finally:
        with _counts_lock:
            # By identity: two counts with equal lists are not the same count.
            _counts[:] = [other for other in _counts if other is not names]


def launching() -> bool:
    """Whether this thread is inside a launch that is counted or observed. What the interpreter calls there is part of
    the launch, which whoever looks at ATen's operators beside it has to know."""
    return _launching.get()


def _run_watched(item: Runnable) -> None:
    token = _launching.set(True)
    try:
        item.run()
    finally:
        _launching.reset(token)
    name = item.describe()
    with _counts_lock:
        for names in _counts:
            names.append(name)
