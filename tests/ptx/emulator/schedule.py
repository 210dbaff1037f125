"""In what order warps run, and when asynchronous work takes effect: a right program gives one result under all."""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import numpy as np

Order = Literal["together", "ascending", "descending", "random"]
Timing = Literal["late", "early", "random"]


class Schedule(NamedTuple):
    """order: all warps step by step, or one warp after the other up to the next barrier, from the first or from the
    last on, or any at each step. timing: when cp.async and wgmma read and write memory, at the wait for them (until
    then what they write is NaN), at once, or either, drawn for each."""

    order: Order = "together"
    timing: Timing = "late"
    seed: int = 0

    def checked(self) -> Schedule:
        for value, known in ((self.order, Order), (self.timing, Timing)):
            if value not in get_args(known):
                raise ValueError(f"schedule: got {value!r}, wants one of {', '.join(get_args(known))}")
        return self

    def draws(self) -> np.random.Generator:
        return np.random.default_rng(self.seed)
