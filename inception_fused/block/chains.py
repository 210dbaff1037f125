"""A block as four branches, each a chain of convolutions over the same x, and the flat lists that follow them.

    branch 1    reduction                                        p1_1
    branch 2    reduction -> 3x3 window                          p2_1 -> p2_2
    branch 3    reduction -> 5x5 or 3x3 window                   p3_1 -> p3_2
    branch 4    3x3 max-pool -> projection                       p4_2

Every list of weights, biases, BatchNorm vectors, shapes or gradients holds one value a convolution, in the order of
:data:`CONVS`; a list of all inputs is x, weights, biases, norms. This module alone counts in such lists. A variant of
the block begins with another :data:`CHAINS`; device code that names convolutions is written for the longest block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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


CHAINS: tuple[tuple[Conv, ...], ...] = (
    (Conv("p1_1", REDUCTION),),
    (Conv("p2_1", REDUCTION), Conv("p2_2", WINDOW, (3,))),
    (Conv("p3_1", REDUCTION), Conv("p3_2", WINDOW, (3, 5))),
    (Conv("p4_2", PROJECTION),),
)

CONVS = tuple(conv for chain in CHAINS for conv in chain)
CONV_NAMES = tuple(conv.name for conv in CONVS)
COUNT = len(CONVS)
PLACES: tuple[tuple[int, ...], ...] = tuple(tuple(CONV_NAMES.index(conv.name) for conv in chain) for chain in CHAINS)
"""Of each chain's convolutions in every list."""
FIELDS = ("mean", "var", "gamma", "beta")
"""BatchNorm's vectors in the order of a flat list: one of each a convolution, or of the first two alone where it is not
affine."""
NORM_COUNTS = (2 * COUNT, 4 * COUNT)
"""How many vectors there are where BatchNorm is not affine, and where it is."""

_ROLES = {role: tuple(i for i, conv in enumerate(CONVS) if conv.role == role) for role in (REDUCTION, WINDOW)}
_PROJECTION = CONV_NAMES.index("p4_2")
_VARYING = next(i for i, conv in enumerate(CONVS) if len(conv.sides) > 1)
_ENDS = tuple(sum(map(len, CHAINS[: i + 1])) - 1 for i in range(len(CHAINS)))
_INNER = tuple(i for i in range(COUNT) if i not in _ENDS)
_NAMES_OF_NUMBERS = {6: "six", 7: "seven"}
COUNT_IN_WORDS = _NAMES_OF_NUMBERS.get(COUNT, str(COUNT))
"""For messages: "wants six tensors"."""
BEFORE_POOL = _PROJECTION
"""How many convolutions stand before the pool in the order of every list."""


def each(value: T) -> list[T]:
    """The same value for every convolution."""
    return [value] * COUNT


def by_chain(values: Sequence[T]) -> tuple[tuple[T, ...], ...]:
    """A list of one value a convolution, cut into the chains."""
    rest = iter(values)
    return tuple(tuple(next(rest) for _ in chain) for chain in CHAINS)


def reductions(values: Sequence[T]) -> list[T]:
    """The values of the convolutions that read x itself."""
    return [values[i] for i in _ROLES[REDUCTION]]


def windows(values: Sequence[T]) -> list[T]:
    """The values of the convolutions that read another's output."""
    return [values[i] for i in _ROLES[WINDOW]]


def projection(values: Sequence[T]) -> T:
    """The value of the convolution behind the pool."""
    return values[_PROJECTION]


def optional(values: Sequence[T | None]) -> Sequence[T] | None:
    """The list of what all convolutions have or none has; None where none has it."""
    return None if values[0] is None else values


def first(values: Sequence[T]) -> T:
    """The value of the first convolution, a reduction."""
    return values[0]


def heads(values: Sequence[T]) -> list[T]:
    """The values of the convolutions that read x, pooled or not: the first of each chain."""
    return [values[places[0]] for places in PLACES]


def varying_window(values: Sequence[T]) -> T:
    """The value of the convolution whose window is of several sizes: branch 3's, of 5x5 or 3x3."""
    return values[_VARYING]


def ends(values: Sequence[T]) -> list[T]:
    """The values of the convolutions whose outputs are the branches' outputs, one a branch."""
    return [values[i] for i in _ENDS]


def inner(values: Sequence[T]) -> list[T]:
    """The values of the convolutions whose outputs another one reads, in the order of :func:`windows`: a window's
    input is the inner output at its place."""
    return [values[i] for i in _INNER]


def from_roles(reductions: Iterable[T], windows: Iterable[T], projection: T) -> list[T]:
    """One value a convolution, the inverse of :func:`reductions`, :func:`windows` and :func:`projection`."""
    parts = {REDUCTION: iter(reductions), WINDOW: iter(windows), PROJECTION: iter((projection,))}
    return [next(parts[conv.role]) for conv in CONVS]


def from_outputs(ends: Iterable[T], inner: Iterable[T]) -> list[T]:
    """One value a convolution, the inverse of :func:`ends` and :func:`inner`."""
    outer, within = iter(ends), iter(inner)
    return [next(outer) if i in _ENDS else next(within) for i in range(COUNT)]


def inputs(x: Any, values: Sequence[Any]) -> list[Any]:
    """What each convolution reads: x for the reductions, x for the projection (pooled), else the value of the
    convolution before it. values: one a convolution."""
    return from_roles([x] * len(_ROLES[REDUCTION]), inner(values), x)


def statistics(norms: Sequence[T]) -> Sequence[T]:
    """Of a flat list of BatchNorm's vectors the means and variances."""
    return norms[: NORM_COUNTS[0]]


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
        return cls(*[norms[i * COUNT : (i + 1) * COUNT] for i in range(len(FIELDS))])


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
            return cls(flat[:COUNT], flat[COUNT:])
        start = 2 * COUNT if len(flat) % (2 * COUNT) == 0 else COUNT
        return cls(flat[:COUNT], flat[COUNT:start], flat[start:], eps)

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
        if weights != COUNT or biases not in (0, COUNT):
            wants = f"{COUNT_IN_WORDS}, and {COUNT_IN_WORDS} or none"
            return f"weights: got {weights} and {biases} biases, wants {wants}"
        if norms not in (0, *NORM_COUNTS) or eps != (COUNT if norms else 0):
            wants = f"{NORM_COUNTS[0]} or {NORM_COUNTS[1]} vectors of BatchNorm and {COUNT_IN_WORDS} eps"
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
        if len(flags) not in (1 + COUNT, 1 + 2 * COUNT):
            raise InceptionInputError(f"needs: got {len(flags)} flags, wants {1 + COUNT} or {1 + 2 * COUNT}")
        x, *rest = flags
        return cls(x, rest[:COUNT], rest[COUNT:] or each(False))

    @property
    def flat(self) -> list[bool]:
        return [self.x, *self.weights, *self.biases]

    @property
    def to_inputs(self) -> list[bool]:
        """Whether each convolution's gradient to its input is on the way to what is wanted."""
        found = []
        for places in PLACES:
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
        for name, value in zip(CONV_NAMES, values, strict=False):
            yield f"{name}{kind}", value
