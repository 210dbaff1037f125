"""Few tiles for many problems: the set of at most n tiles with which all problems together take the least time.

Every tile is a binary that a first step has to compile, so a kernel may have as many as its rules give it; every
problem then takes the best of the set.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import combinations
from math import comb, inf
from typing import TypeVar

from inception_fused.block.views import Tile

Key = TypeVar("Key")

NOISE = 0.01
"""A tile has to be this much faster than the rule's to take its place: medians of two runs differ by as much."""

EXHAUSTIVE = 20_000
"""Most sets that are all tried; beyond it tiles are added one by one, each time the one that saves most."""


class Unit:
    """Problems that choose together: one, or those of a bond, whose tiles must have one BLOCK_M.

    costs: for each problem tile -> cost.
    """

    def __init__(self, keys: Sequence[Key], costs: Sequence[Mapping[Tile, float]]) -> None:
        self.keys, self.costs = keys, costs

    def best(self, tiles: Collection[Tile]) -> tuple[float, dict[Key, Tile]]:
        """(cost, tile of each problem) with the best of ``tiles``; (inf, {}) where they do not serve all."""
        if len(self.keys) == 1:
            known = self.costs[0]
            tile = min((tile for tile in tiles if tile in known), key=known.__getitem__, default=None)
            return (inf, {}) if tile is None else (known[tile], {self.keys[0]: tile})
        found: tuple[float, dict[Key, Tile]] = (inf, {})
        for height in sorted({tile.BLOCK_M for tile in tiles}):
            alike = [tile for tile in tiles if height == tile.BLOCK_M]
            parts = [Unit([key], [costs]).best(alike) for key, costs in zip(self.keys, self.costs, strict=True)]
            total = sum(cost for cost, _ in parts)
            if total < found[0]:
                found = total, {key: tile for _, part in parts for key, tile in part.items()}
        return found


def units(costs: Mapping[Key, Mapping[Tile, float]], bonds: Mapping[Key, object]) -> list[Unit]:
    """costs: problem -> tile -> cost; bonds: equal, not None, for problems that must agree in BLOCK_M."""
    together: dict[object, list[Key]] = {}
    for key in costs:
        bond = bonds.get(key)
        together.setdefault(("alone", key) if bond is None else ("bond", bond), []).append(key)
    return [Unit(keys, [costs[key] for key in keys]) for keys in together.values()]


def choose(problems: Sequence[Unit], limit: int) -> dict[Key, Tile]:
    """The tile of each problem, of at most ``limit`` tiles in all, or of as few more as serve every problem.

    Problems that no tile serves are left out.
    """
    tiles = list(dict.fromkeys(tile for unit in problems for costs in unit.costs for tile in costs))
    problems = [unit for unit in problems if unit.best(tiles)[1]]
    for size in range(min(limit, len(tiles)), len(tiles) + 1):
        cost, chosen = _all(problems, tiles, size) if comb(len(tiles), size) <= EXHAUSTIVE else _one_by_one(
            problems, tiles, size
        )  # fmt: skip
        if cost < inf:
            return {key: tile for unit in problems for key, tile in unit.best(chosen)[1].items()}
    return {}


def _total(problems: Sequence[Unit], tiles: Collection[Tile]) -> float:
    total = 0.0
    for unit in problems:
        total += unit.best(tiles)[0]
        if total == inf:
            break
    return total


def _all(problems: Sequence[Unit], tiles: Sequence[Tile], size: int) -> tuple[float, Collection[Tile]]:
    return min(((_total(problems, some), some) for some in combinations(tiles, size)), key=lambda item: item[0])


def _one_by_one(problems: Sequence[Unit], tiles: Sequence[Tile], size: int) -> tuple[float, Collection[Tile]]:
    chosen: list[Tile] = []

    def value(tile: Tile) -> tuple[int, float]:
        """(problems not served, cost of the served ones)."""
        costs = [unit.best([*chosen, tile])[0] for unit in problems]
        return sum(cost == inf for cost in costs), sum(cost for cost in costs if cost < inf)

    for _ in range(size):
        chosen.append(min((tile for tile in tiles if tile not in chosen), key=value))
    return _total(problems, chosen), chosen
