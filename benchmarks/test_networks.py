"""Whole networks: the seed's, KernelBench's problem 7, and torchvision's shape."""

from __future__ import annotations

SUITES = ("network", "kernelbench7", "torchvision")


def test_network(case, timed):
    timed(case)
