"""A tuner whose kernels are interpreted, and a check of whose results one element is spoilt on purpose."""

from __future__ import annotations

import pytest

from gpu_fakes import Fixed
from inception_fused.plan import choice
from tuner.bench import DeviceBench
from tuner.operands import Case, Workload


class Few(DeviceBench):
    """The interpreter takes its time: two tiles of each kernel, and a stopwatch that runs nothing after the warm-up."""

    def __init__(self) -> None:
        super().__init__("cpu", Fixed(), seconds=0.0001)

    def compile(self, jobs, deadline):
        for case, tile in jobs:
            wanted = tile == choice.tile_of(case.problem) or (tile[:2] == (32, 64) and tile.num_stages in (1, 3))
            yield tile, None if wanted else "left out by this test"


def assert_sees(case: Case, spoilt: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of a case passes, and does not where one element of a result is another. spoilt: the result's name."""
    work, tile = Workload(case, "cpu"), choice.tile_of(case.problem)
    work.check(tile)
    original = work._judge

    def judged(where, name, result, *others):
        if name == spoilt and "not saving" not in where:
            flat = result.reshape(-1) if result.is_contiguous() else result[-1]
            flat[-1] = flat[-1] + 3 if result.is_floating_point() else flat[-1] ^ 1
        return original(where, name, result, *others)

    monkeypatch.setattr(work, "_judge", judged)
    with pytest.raises(AssertionError, match=f"{spoilt} (is wrong|differ)"):
        work.check(tile)
