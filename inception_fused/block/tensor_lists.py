"""A block's parameters, or one value for each of them, as flat lists: weights, biases, BatchNorm's vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

from inception_fused.block.chains import COUNTS_IN_WORDS, LONGEST, ORDER, USUAL, VARIANTS, each, variant_of
from inception_fused.errors import InceptionInputError

T = TypeVar("T")

FIELDS = ("mean", "var", "gamma", "beta")
"""BatchNorm's vectors in the order of a flat list: one of each a convolution, or of the first two alone where it is not
affine."""

MISSING_SHAPE = (0, 0)
"""Of the tensor that stands in a flat list for a bias or a vector of BatchNorm that a convolution does not have."""

_COUNT_OF_NORMS = {kinds * count: count for count in VARIANTS for kinds in (2, 4)}
"""Of how many convolutions so many vectors are."""

_COUNT_OF_PAIRS = {kinds * count: count for count in VARIANTS for kinds in (1, 2)}
"""Of how many convolutions so many weights, or weights and biases, are."""


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
