"""Single blocks, of two 3x3 in branch 3 and with BatchNorm in training too, KernelBench's problem 6 among them:
``pytest benchmarks --benchmark-only -k test_block``."""

from __future__ import annotations

SUITES = ("block", "two-3x3", "batch-norm", "kernelbench6")


def test_block(case, timed):
    timed(case)
