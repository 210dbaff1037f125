"""What a quick run of the tests leaves to ``pytest --full``: more of the same idea, never the only test of one.

Three ways of saying it: ``@full`` on a test, ``quick(values, ...)`` or ``more(value)`` on the values of a parameter,
and ``@each_once`` on a test with several parameters, of whose combinations a quick run takes so few that each value is
in one.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

import pytest

full = pytest.mark.full
each_once = pytest.mark.each_once


def more(*values: Any) -> Any:
    """A case of a parametrised test that --full adds."""
    return pytest.param(*values, marks=full)


def quick(values: Iterable[Any], *chosen: Any) -> list[Any]:
    """All values as cases of a parametrised test, of which a quick run takes the chosen ones; a tuple is several."""
    values = list(values)
    missing = [value for value in chosen if value not in values]
    if missing:
        raise ValueError(f"quick: {missing} is none of {values}")
    return [value if value in chosen else more(*value) if type(value) is tuple else more(value) for value in values]


def left_to_full(items: Iterable[pytest.Item]) -> list[pytest.Item]:
    """The items that a quick run does without."""
    left, groups = [], defaultdict(list)
    for item in items:
        if item.get_closest_marker("full"):
            left.append(item)
        elif item.get_closest_marker("each_once"):
            groups[item.nodeid.partition("[")[0]].append(item)
    for group in groups.values():
        # A value is itself, whatever it is equal to: parametrize hands out the same object in every combination.
        kept = covering([{name: id(value) for name, value in item.callspec.params.items()} for item in group])
        left += [item for i, item in enumerate(group) if i not in kept]
    return left


def covering(combinations: list[dict[str, int]]) -> set[int]:
    """Places of combinations that together have every value of every parameter, few of them.

    Of those with the most values that are new the one whose values were taken least often, then the first.
    """
    taken, kept = Counter(), set()
    wanted = {pair for combination in combinations for pair in combination.items()}

    def worth(place: int) -> tuple[int, int, int]:
        pairs = combinations[place].items()
        return sum(not taken[pair] for pair in pairs), -sum(taken[pair] for pair in pairs), -place

    while not wanted <= set(taken):
        best = max(range(len(combinations)), key=worth)
        kept.add(best)
        taken.update(combinations[best].items())
    return kept
