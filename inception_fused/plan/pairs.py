"""Two launches of a forward as one, where neither has programs enough for the card.

    K1+K2    grouped GEMM of the 1x1 reductions, and 3x3 max-pool + 1x1
    K3+K4    3x3 convolution, and 5x5 (or 3x3), of two 3x3 the first

Neither reads what the other writes. A program does the work of the one or of the other, with that launch's tile, so the
results are the same to the bit. A pair is taken where both halves are Triton's and the plan gives both the small tiles
of PAIRS: by shape, dtype and compute capability alone, as tiles are. Large tiles have no pairs: they fill the
card by themselves, and every pair of tiles would be a binary of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from inception_fused.plan import choice, launches, tuned
from inception_fused.plan.kernel_table import RULES
from inception_fused.plan.problems import Launch
from inception_fused.plan.rules import Rule


class Half(NamedTuple):
    """A kernel of a pair, and the rule whose tile it has there."""

    kernel: str
    rule: Rule


class Pair(NamedTuple):
    """Two launches that can be made as one. file: kernels/<file>.py, whose launcher takes the calls of
    both."""

    file: str
    halves: tuple[Half, Half]

    @property
    def function(self) -> str:
        """The name of the device code, as profilers have it."""
        return f"{self.file}_kernel"


def _half(kernel: str, rule: str) -> Half:
    return Half(kernel, next(found for found in RULES[kernel].rules if found.name == rule))


PAIRS = (
    Pair("pool_and_reduce", (_half("K1", "small"), _half("K2", "few"))),
    Pair("conv_pair", (_half("K3", "small"), _half("K4", "small"))),
    Pair("conv_pair", (_half("K3", "small fp32"), _half("K4", "small"))),
)
"""Launches of a forward, one behind the other, that are made as one where they take these tiles, of as many warps.
Their device code is these kernels' own."""


class Step(NamedTuple):
    """One launch as it is made. halves: the launch of the table that it is, or both of a pair."""

    halves: tuple[Launch, ...]
    pair: Pair | None = None

    @property
    def name(self) -> str:
        return "+".join(launch.name for launch in self.halves)

    @property
    def function(self) -> str:
        """The name of the device code."""
        return self.pair.function if self.pair else self.halves[0].kernel.function


def steps(found: Sequence[Launch], gpu: tuned.Gpu | None = None, chosen: Mapping[str, str] | None = None) -> list[Step]:
    """The launches of a pass as they are made, in order.

    gpu: whose tuned tables are asked, as tuned.key() gives it. chosen: implementations by kernel, as
    dispatch.choices() gives them; None for Triton's.
    """
    made: list[Step] = []
    rest = list(found)
    while rest:
        pair = pair_of(rest[0], rest[1], gpu, chosen) if len(rest) > 1 else None
        some = 2 if pair else 1
        made.append(Step(tuple(rest[:some]), pair))
        del rest[:some]
    return made


def pair_of(
    first: Launch, second: Launch, gpu: tuned.Gpu | None = None, chosen: Mapping[str, str] | None = None
) -> Pair | None:
    """The pair that two launches are made as, None where each is made alone."""
    both = (first, second)
    if any(launch.row.role != launches.FPROP for launch in both):
        return None
    if chosen is not None and any(chosen.get(launch.kernel.name, "triton") != "triton" for launch in both):
        return None
    for pair in PAIRS:
        if all(
            launch.kernel.name == half.kernel and choice.tile_of(launch, gpu) == half.rule.tile(launch.dtype)
            for launch, half in zip(both, pair.halves, strict=True)
        ):
            return pair
    return None
