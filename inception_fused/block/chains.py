"""A block as four branches, each a chain of convolutions over the same x, and the flat lists that follow them.

    branch 1    reduction                                        p1_1
    branch 2    reduction -> 3x3 window                          p2_1 -> p2_2
    branch 3    reduction -> 5x5 or 3x3 window                   p3_1 -> p3_2
                or reduction -> 3x3 window -> 3x3 window         p3_1 -> p3_2 -> p3_3
    branch 4    3x3 max-pool -> projection                       p4_2

Every list of weights, biases, BatchNorm vectors, shapes or gradients holds one value a convolution, in the order of
its :class:`Variant`, of which its length tells; a list of all inputs is x, weights, biases, norms. This module alone
counts in such lists. Device code that names convolutions is written for the longest block (:func:`longest`).
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
    """A form of the block. chains: its branches.

    convs, names: of all its convolutions, in the order of every list; places: of each chain's in every list, as those
    of the others. reductions, windows, projection: by role. ends: of the convolutions whose outputs are the branches'
    outputs, one a branch; inner: of those whose outputs another one reads.
    """

    chains: tuple[tuple[Conv, ...], ...]
    convs: tuple[Conv, ...]
    names: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]
    reductions: tuple[int, ...]
    windows: tuple[int, ...]
    projection: int
    ends: tuple[int, ...]
    inner: tuple[int, ...]

    @classmethod
    def of(cls, *chains: tuple[Conv, ...]) -> Variant:
        convs = tuple(conv for chain in chains for conv in chain)
        names = tuple(conv.name for conv in convs)
        places = tuple(tuple(names.index(conv.name) for conv in chain) for chain in chains)
        reductions, windows, (projection,) = (
            tuple(i for i, conv in enumerate(convs) if conv.role == role) for role in (REDUCTION, WINDOW, PROJECTION)
        )
        ends = tuple(chain[-1] for chain in places)
        inner = tuple(i for i in range(len(convs)) if i not in ends)
        return cls(chains, convs, names, places, reductions, windows, projection, ends, inner)

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

VARIANTS = {variant.count: variant for variant in (USUAL, DOUBLE)}
LONGEST = DOUBLE
COUNTS_IN_WORDS = {6: "six", 7: "seven"}
ORDER = f"six tensors in the order {', '.join(USUAL.names)}, or seven with p3_3 behind p3_2"
"""What a list of one value a convolution is, for messages."""

CONV_NAMES = USUAL.names
FIELDS = ("mean", "var", "gamma", "beta")
"""BatchNorm's vectors in the order of a flat list: one of each a convolution, or of the first two alone where it is not
affine."""
MISSING_SHAPE = (0, 0)
"""Of the tensor that stands in a flat list for a bias or a vector of BatchNorm that a convolution does not have."""
_COUNT_OF_NORMS = {kinds * count: count for count in VARIANTS for kinds in (2, 4)}
"""Of how many convolutions so many vectors are."""
_COUNT_OF_PAIRS = {kinds * count: count for count in VARIANTS for kinds in (1, 2)}
"""Of how many convolutions so many weights, or weights and biases, are."""


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


def projection(values: Sequence[T]) -> T:
    """The value of the convolution behind the pool."""
    return values[variant_of(values).projection]


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
    """The values of branch 3's windows, in which the variants differ."""
    return [values[i] for i in variant_of(values).places[2][1:]]


def ends(values: Sequence[T]) -> list[T]:
    """The values of the convolutions whose outputs are the branches' outputs, one a branch."""
    return [values[i] for i in variant_of(values).ends]


def inner(values: Sequence[T]) -> list[T]:
    """The values of the convolutions whose outputs another one reads, in the order of :func:`windows`: a window's
    input is the inner output at its place."""
    return [values[i] for i in variant_of(values).inner]


def from_roles(reductions: Iterable[T], windows: Sequence[T], projection: T) -> list[T]:
    """One value a convolution, the inverse of :func:`reductions`, :func:`windows` and :func:`projection`."""
    variant = next(v for v in VARIANTS.values() if len(v.windows) == len(windows))
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
    """One value a convolution of the longest block, for device code. missing: of the windows that are not there, which
    stand before the last one of their chain."""
    chains = zip(by_chain(values), LONGEST.chains, strict=True)
    return [value for given, wanted in chains for value in _stretched(given, len(wanted), missing)]


def shortest(values: Sequence[T], like: Sequence[Any]) -> list[T]:
    """The inverse of :func:`longest`. like: a list of one value a convolution."""
    there = longest(each(True, like), False)
    return [value for value, kept in zip(values, there, strict=True) if kept]


def longest_windows(values: Sequence[T | None]) -> list[T | None]:
    """:func:`longest` of the windows alone, as :func:`windows` gives them; None for one that is not there."""
    whole = from_roles([None] * len(LONGEST.reductions), values, None)
    return windows(longest(whole, None))


def longest_filters(filters: Sequence[int]) -> list[int]:
    """:func:`longest` of filters: a window that is not there has as many as it would read, so that the one behind it
    reads the right number."""
    chains = zip(by_chain(filters), LONGEST.chains, strict=True)
    return [k for given, wanted in chains for k in _stretched(given, len(wanted), given[0])]


def _stretched(values: Sequence[T], length: int, missing: T) -> list[T]:
    return [*values[:-1], *[missing] * (length - len(values)), values[-1]]


def statistics(norms: Sequence[T]) -> Sequence[T]:
    """Of a flat list of BatchNorm's vectors the means and variances."""
    return norms[: 2 * _COUNT_OF_NORMS[len(norms)]] if norms else norms


class Norms(NamedTuple):
    """BatchNorm's vectors by kind, each of one value a convolution; gammas and betas are empty where it is not
    affine."""

    means: Sequence[Any]
    variances: Sequence[Any]
    gammas: Sequence[Any]
    betas: Sequence[Any]

    @classmethod
    def of(cls, norms: Sequence[Any]) -> Norms:
        """From the flat list; four empty ones where there is no BatchNorm."""
        count = _COUNT_OF_NORMS[len(norms)] if norms else 0
        return cls(*[norms[i * count : (i + 1) * count] for i in range(len(FIELDS))])


class BlockTensors(NamedTuple):
    """Parameters of a block as the operators take them, or one value for each of them.

    weights: one [K, C, R, R] a convolution. biases: one [K] a convolution, or none. norms: flat, in the order of
    :data:`FIELDS`, or none. eps: one float a convolution, or none.
    """

    weights: Sequence[Any]
    biases: Sequence[Any] = ()
    norms: Sequence[Any] = ()
    eps: Sequence[float] = ()

    @classmethod
    def of(cls, flat: Sequence[Any], eps: Sequence[float] = ()) -> BlockTensors:
        """From weights, biases and norms in one list; norms are there only where eps are."""
        if not eps:
            count = _COUNT_OF_PAIRS.get(len(flat), USUAL.count)
            return cls(flat[:count], flat[count:])
        count = len(eps)
        start = 2 * count if len(flat) % (2 * count) == 0 else count
        return cls(flat[:count], flat[count:start], flat[start:], eps)

    @property
    def flat(self) -> list[Any]:
        """Weights, biases and norms in one list."""
        return [*self.weights, *self.biases, *self.norms]

    @property
    def vectors(self) -> list[Any]:
        """Biases and norms in one list."""
        return [*self.biases, *self.norms]

    def fault(self) -> str:
        """What about the lengths of the lists is wrong, in words; "" for nothing."""
        weights, biases, norms, eps = map(len, self)
        if weights not in VARIANTS:
            return f"weights: got {weights} and {biases} biases, wants {ORDER}, and as many biases or none"
        count = COUNTS_IN_WORDS[weights]
        if biases not in (0, weights):
            return f"weights: got {weights} and {biases} biases, wants {count}, and {count} or none"
        if norms not in (0, 2 * weights, 4 * weights) or eps != (weights if norms else 0):
            wants = f"{2 * weights} or {4 * weights} vectors of BatchNorm and {count} eps"
            return f"norms: got {norms} and {eps} eps, wants {wants}, or none of either"
        return ""


class Flags(NamedTuple):
    """One flag for x and one for each parameter of a block: whether its gradient is wanted, or its value read."""

    x: bool
    tensors: BlockTensors

    @classmethod
    def of(cls, flat: Sequence[bool], eps: Sequence[float] = ()) -> Flags:
        """From flags for x, weights, biases and norms in one list; norms are there only where eps are."""
        return cls(flat[0], BlockTensors.of(flat[1:], eps))

    @property
    def flat(self) -> list[bool]:
        return [self.x, *self.tensors.flat]


class Needs(NamedTuple):
    """Which gradients of the backward operator, which knows no BatchNorm, are wanted: of x, each weight, each bias."""

    x: bool
    weights: Sequence[bool]
    biases: Sequence[bool]

    @classmethod
    def of(cls, flags: Sequence[bool]) -> Needs:
        """From one flag for x, each weight and each bias; those of biases may be missing.

        Raises:
            InceptionInputError: on another number of flags.
        """
        rest = list(flags[1:])
        count = _COUNT_OF_PAIRS.get(len(rest))
        if count is None:
            wants = ", ".join(str(1 + length) for length in sorted(_COUNT_OF_PAIRS))
            raise InceptionInputError(f"needs: got {len(flags)} flags, wants {wants}")
        weights = rest[:count]
        return cls(flags[0], weights, rest[count:] or each(False, weights))

    @property
    def flat(self) -> list[bool]:
        return [self.x, *self.weights, *self.biases]

    @property
    def to_inputs(self) -> list[bool]:
        """Whether each convolution's gradient to its input is on the way to what is wanted."""
        found = []
        for places in variant_of(self.weights).places:
            before = self.x
            for i in places:
                found.append(before)
                before = before or self.weights[i] or self.biases[i]
        return found


def named(tensors: BlockTensors) -> Iterator[tuple[str, Any]]:
    """Every parameter, None among them, with the name that messages call it by."""
    kinds = [(".weight", tensors.weights), (".bias", tensors.biases)]
    kinds += [(f" batch_norm.{field}", values) for field, values in zip(FIELDS, Norms.of(tensors.norms), strict=True)]
    for kind, values in kinds:
        # A list of a wrong length is somebody else's to refuse.
        for name, value in zip(VARIANTS.get(len(values), LONGEST).names, values, strict=False):
            yield f"{name}{kind}", value
