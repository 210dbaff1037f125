"""A block as four branches, each a chain of convolutions over the same x, and the flat lists that follow them.

    branch 1    reduction                                        p1_1
    branch 2    reduction -> 3x3 window                          p2_1 -> p2_2
    branch 3    reduction -> 5x5 or 3x3 window                   p3_1 -> p3_2
                or reduction -> 3x3 window -> 3x3 window         p3_1 -> p3_2 -> p3_3
    branch 4    3x3 max-pool -> projection                       p4_2

GoogLeNet's stem is the second chain alone, a reduction -> 3x3 window of its own names (:data:`STEM`): whatever works on
chains runs it too.

Every list of weights, biases, BatchNorm vectors, shapes or gradients holds one value a convolution, in the order of
its :class:`Variant`, of which its length tells; a list of all inputs is x, weights, biases, norms. This module and
tensor_lists.py alone count in such lists. Device code that names convolutions is written for the longest block
(:func:`longest`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from inception_fused.errors import InceptionInputError

T = TypeVar("T")

REDUCTION, WINDOW, PROJECTION = "reduction", "window", "projection"


class Conv(NamedTuple):
    """One convolution of a chain.

    name: of the child module. role: REDUCTION (1x1 over x), WINDOW (3x3 or 5x5 over the convolution before it) or
    PROJECTION (1x1 over the pooled x). sides: of its window, those that are allowed.
    """

    name: str
    role: str
    sides: tuple[int, ...] = (1,)


class Variant(NamedTuple):
    """A form of the block, or of a part of it. chains: its branches; branches: which of the longest block's they are.

    convs, names: of all its convolutions, in the order of every list; places: of each chain's in every list, as those
    of the others. reductions, windows, projection: by role, of which the last may be missing. ends: of the convolutions
    whose outputs are the branches' outputs, one a branch; inner: of those whose outputs another one reads.
    """

    chains: tuple[tuple[Conv, ...], ...]
    branches: tuple[int, ...]
    convs: tuple[Conv, ...]
    names: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]
    reductions: tuple[int, ...]
    windows: tuple[int, ...]
    projection: int | None
    ends: tuple[int, ...]
    inner: tuple[int, ...]

    @classmethod
    def of(cls, *chains: tuple[Conv, ...], branches: tuple[int, ...] = (0, 1, 2, 3)) -> Variant:
        convs = tuple(conv for chain in chains for conv in chain)
        names = tuple(conv.name for conv in convs)
        places = tuple(tuple(names.index(conv.name) for conv in chain) for chain in chains)
        reductions, windows, projections = (
            tuple(i for i, conv in enumerate(convs) if conv.role == role) for role in (REDUCTION, WINDOW, PROJECTION)
        )
        projection = projections[0] if projections else None
        ends = tuple(chain[-1] for chain in places)
        inner = tuple(i for i in range(len(convs)) if i not in ends)
        return cls(chains, branches, convs, names, places, reductions, windows, projection, ends, inner)

    @property
    def count(self) -> int:
        """How many convolutions it has."""
        return len(self.convs)

    @property
    def sides(self) -> dict[str, tuple[int, ...]]:
        """The allowed sides of each convolution's window, by its name."""
        return {conv.name: conv.sides for conv in self.convs}


_OTHERS = (Conv("p1_1", REDUCTION),), (Conv("p2_1", REDUCTION), Conv("p2_2", WINDOW, (3,)))
_POOLED = (Conv("p4_2", PROJECTION),)

USUAL = Variant.of(*_OTHERS, (Conv("p3_1", REDUCTION), Conv("p3_2", WINDOW, (3, 5))), _POOLED)
"""Branch 3 has one window, of 5x5 or 3x3."""

DOUBLE = Variant.of(
    *_OTHERS, (Conv("p3_1", REDUCTION), Conv("p3_2", WINDOW, (3,)), Conv("p3_3", WINDOW, (3,))), _POOLED
)
"""Branch 3 has two windows of 3x3."""

STEM = Variant.of((Conv("0", REDUCTION), Conv("2", WINDOW, (3,))), branches=(1,))
"""The two convolutions of GoogLeNet's b2, called as its children."""

BLOCKS = {variant.count: variant for variant in (USUAL, DOUBLE)}
"""What a caller may ask for."""

VARIANTS = BLOCKS | {STEM.count: STEM}
LONGEST = DOUBLE
COUNTS_IN_WORDS = {2: "two", 6: "six", 7: "seven"}
ORDER = f"six tensors in the order {', '.join(USUAL.names)}, or seven with p3_3 behind p3_2"
"""What a list of one value a convolution is, for messages."""

CONV_NAMES = USUAL.names


def variant_of(values: Sequence[Any]) -> Variant:
    """By a list of one value a convolution.

    Raises:
        InceptionInputError: on a list of another length, as an operator may be given.
    """
    variant = VARIANTS.get(len(values))
    if variant is None:
        raise InceptionInputError(f"weights: got {len(values)}, wants {ORDER}")
    return variant


def each(value: T, like: Sequence[Any]) -> list[T]:
    """The same value for every convolution. like: a list of one value a convolution."""
    return [value] * len(like)


def by_chain(values: Sequence[T]) -> tuple[tuple[T, ...], ...]:
    """A list of one value a convolution, cut into the chains."""
    return tuple(tuple(values[i] for i in places) for places in variant_of(values).places)


def reductions(values: Sequence[T]) -> list[T]:
    """The values of the convolutions that read x itself."""
    return [values[i] for i in variant_of(values).reductions]


def windows(values: Sequence[T]) -> list[T]:
    """The values of the convolutions that read another's output."""
    return [values[i] for i in variant_of(values).windows]


def projection(values: Sequence[T]) -> T | None:
    """The value of the convolution behind the pool; None where there is no pool."""
    place = variant_of(values).projection
    return values[place] if place is not None else None


def direct(filters: Sequence[int]) -> int:
    """Filters of the branch that is a reduction alone; 0 where there is none."""
    variant = variant_of(filters)
    return sum(filters[i] for i in variant.ends if i in variant.reductions)


def has_pool(values: Sequence[Any]) -> bool:
    """Whether one of the convolutions stands behind the pool."""
    return variant_of(values).projection is not None


def optional(values: Sequence[T | None]) -> Sequence[T] | None:
    """The list of what some convolutions may lack, as None; None where all do."""
    return values if any(value is not None for value in values) else None


def first(values: Sequence[T]) -> T:
    """The value of the first convolution, a reduction."""
    return values[0]


def heads(values: Sequence[T]) -> list[T]:
    """The values of the convolutions that read x, pooled or not: the first of each chain."""
    return [values[places[0]] for places in variant_of(values).places]


def third_windows(values: Sequence[T]) -> list[T]:
    """The values of branch 3's windows, in which the blocks differ; none where there is no such branch."""
    variant = variant_of(values)
    places = dict(zip(variant.branches, variant.places, strict=True)).get(2, ())
    return [values[i] for i in places[1:]]


def ends(values: Sequence[T]) -> list[T]:
    """The values of the convolutions whose outputs are the branches' outputs, one a branch."""
    return [values[i] for i in variant_of(values).ends]


def inner(values: Sequence[T]) -> list[T]:
    """The values of the convolutions whose outputs another one reads, in the order of :func:`windows`: a window's
    input is the inner output at its place."""
    return [values[i] for i in variant_of(values).inner]


def from_roles(reductions: Iterable[T], windows: Sequence[T], projection: T | None) -> list[T]:
    """One value a convolution, the inverse of :func:`reductions`, :func:`windows` and :func:`projection`."""
    variant = _with_windows(windows)
    parts = {REDUCTION: iter(reductions), WINDOW: iter(windows), PROJECTION: iter((projection,))}
    return [next(parts[conv.role]) for conv in variant.convs]


def from_outputs(ends: Iterable[T], inner: Sequence[T]) -> list[T]:
    """One value a convolution, the inverse of :func:`ends` and :func:`inner`."""
    variant = next(v for v in VARIANTS.values() if len(v.inner) == len(inner))
    outer, within = iter(ends), iter(inner)
    return [next(outer) if i in variant.ends else next(within) for i in range(variant.count)]


def inputs(x: Any, values: Sequence[Any]) -> list[Any]:
    """What each convolution reads: x for the reductions, x for the projection (pooled), else the value of the
    convolution before it. values: one a convolution."""
    found = [x for _ in values]
    for chain in variant_of(values).places:
        for before, i in pairwise(chain):
            found[i] = values[before]
    return found


def longest(values: Sequence[T], missing: T) -> list[T]:
    """One value a convolution of the longest block, for device code. missing: of what is not there, whole branches and
    windows, which stand before the last one of their chain."""
    return [value for given, wanted in _beside_longest(values) for value in _stretched(given, len(wanted), missing)]


def shortest(values: Sequence[T], like: Sequence[Any]) -> list[T]:
    """The inverse of :func:`longest`. like: a list of one value a convolution."""
    there = longest(each(True, like), False)
    return [value for value, kept in zip(values, there, strict=True) if kept]


def longest_windows(values: Sequence[T | None]) -> list[T | None]:
    """:func:`longest` of the windows alone, as :func:`windows` gives them; None for one that is not there."""
    whole = from_roles([None] * len(_with_windows(values).reductions), values, None)
    return windows(longest(whole, None))


def longest_filters(filters: Sequence[int]) -> list[int]:
    """:func:`longest` of filters: a window that is not there has as many as it would read, so that the one behind it
    reads the right number, and a branch that is not there none."""
    found = _beside_longest(filters)
    return [k for given, wanted in found for k in _stretched(given, len(wanted), given[0] if given else 0)]


def _beside_longest(values: Sequence[T]) -> Iterator[tuple[tuple[T, ...], tuple[Conv, ...]]]:
    """The values of each of the longest block's branches, none where one is not there, and its convolutions."""
    given = dict(zip(variant_of(values).branches, by_chain(values), strict=True))
    return ((given.get(i, ()), chain) for i, chain in enumerate(LONGEST.chains))


def _stretched(values: Sequence[T], length: int, missing: T) -> list[T]:
    return [*values[:-1], *[missing] * (length - len(values)), *values[-1:]]


def _with_windows(windows: Sequence[Any]) -> Variant:
    return next(v for v in VARIANTS.values() if len(v.windows) == len(windows))
