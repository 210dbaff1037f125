"""Whole networks: the seed's, KernelBench's problem 7, torchvision's shape, and pytorch-cifar's."""

from __future__ import annotations

SUITES = ("network", "kernelbench7", "torchvision", "cifar")


def test_network(case, timed):
    timed(case)
