"""What a device was once found able to run is remembered; why it could not, as long as that cannot pass.

What can pass is asked again, by a call that comes FIRST_WAIT_S seconds later or more; each further failure doubles the
wait, up to LONGEST_WAIT_S. So a run that goes on failing for an hour makes 15 attempts, and one of a day about 150.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch

from inception_fused.runtime.failures import Failure

FIRST_WAIT_S, LONGEST_WAIT_S = 1.0, 600.0

CAPTURED = (
    "its first call on this device is inside a CUDA graph's capture, where nothing can be tried or loaded; "
    "precompile(model, x), or one call before it"
)

clock = time.monotonic


class _Waiting(NamedTuple):
    """The last failure, how long its repetition had to wait (seconds), and until when (of the clock)."""

    failure: Failure
    wait_s: float
    until: float


def remembered(probe: Callable[[int], Failure | str | None]) -> Callable[[int], str | None]:
    """probe(device index) -> None, or why not: a Failure, or a sentence for what cannot pass.

    An answer of None or of what cannot pass is for good, and costs a dictionary's lookup; for the rest see above. While
    failures are of one kind the words stay those of the first, so that a warning with them is not another one: the
    names of temporary files differ. During the capture of a CUDA graph probe is not called at all.
    """
    answers: dict[int, str | None] = {}
    waiting: dict[int, _Waiting] = {}

    @wraps(probe)
    def answer(index: int) -> str | None:
        try:
            return answers[index]
        except KeyError:
            pass
        last = waiting.get(index)
        if last is not None and clock() < last.until:
            return last.failure.text
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return CAPTURED if last is None else last.failure.text
        found = probe(index)
        if not isinstance(found, Failure) or not found.passes:
            waiting.pop(index, None)
            answers[index] = found.text if isinstance(found, Failure) else found
            return answers[index]
        if last is not None and last.failure.kind == found.kind:
            found = last.failure
        wait_s = FIRST_WAIT_S if last is None else min(2 * last.wait_s, LONGEST_WAIT_S)
        waiting[index] = _Waiting(found, wait_s, clock() + wait_s)
        return found.text

    return answer
