"""Single blocks, KernelBench's problem 6 among them: ``pytest benchmarks --benchmark-only -k test_block``."""

from __future__ import annotations

SUITES = ("block", "kernelbench6")


def test_block(case, timed):
    timed(case)
