"""BatchNorm in eval mode as the operators take it, and its gradients from those of the block into which it is folded.

    y = act(conv(x, w) * scale + shift)      scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale

The forward's kernels get w, scale and shift. Every formula of the backward (op/gradients.py) holds for the convolution
with the weights W = w * scale and the bias shift, since masks, r and taps are of what lies behind BatchNorm. From its
dW and dshift:

    dw      = dW * scale                     d bias = dshift * scale          d beta = dshift
    d gamma = (sum over c, r, s of dW * w + dshift * (bias - mean)) / sqrt(var + eps)

all in fp32 and rounded once. Nothing is divided by gamma, which may be 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import NoneType
from typing import NamedTuple

import torch
from torch import Tensor

from inception_fused.block.chains import each, first
from inception_fused.block.reference import InceptionParams
from inception_fused.block.tensor_lists import MISSING_SHAPE, BlockTensors, Flags, Needs, Norms, statistics
from inception_fused.block.views import BatchNorm, accumulator_of

MISSING = BatchNorm(None, None, None, None, 1.0)
"""Of a convolution with no BatchNorm behind it: scale 1, shift its bias. With an eps of 1 it is the identity too where
0 stands for a mean and a variance that nobody reads."""


def flatten(
    batch_norms: Sequence[BatchNorm | None] | None, like: Tensor | None = None
) -> tuple[list[Tensor], list[float]]:
    """(vectors, eps) in the order of tensor_lists.FIELDS; two empty lists of None.

    A tensor of 0 x 0 stands for a vector that is not there: a gamma or beta where others have one, all vectors of a
    convolution without BatchNorm. like: a tensor on their device, where there may be none of them.
    """
    if batch_norms is None:
        return [], []
    if not torch.compiler.is_compiling():
        usual = flat_if_usual(batch_norms) or flat_if_batch(batch_norms)
        if usual is not None:
            return usual
    gammas, betas, means, variances, eps = zip(*[norm or MISSING for norm in batch_norms], strict=True)
    vectors = [*means, *variances]
    if any(t is not None for t in (*gammas, *betas)):
        vectors += [*gammas, *betas]
    there = [t for t in vectors if t is not None]
    if len(there) < len(vectors):
        # One each: torch.compile refuses a Function that gets the same tensor twice.
        some = there[0] if there else like
        vectors = [missing(some) if t is None else t for t in vectors]
    return vectors, [float(e) for e in eps]


def flat_if_usual(batch_norms: Sequence[BatchNorm | None]) -> tuple[list[Tensor], list[float]] | None:
    """:func:`flatten` of one BatchNorm a convolution, alike in having gamma and beta or not; None for what is not so.
    Asked at every call, so types are compared in sets: torch.compile does not trace that."""
    if set(map(type, batch_norms)) != {BatchNorm}:
        return None
    gammas, betas, means, variances, eps = zip(*batch_norms, strict=True)
    vectors = [*means, *variances]
    if gammas[0] is not None:
        vectors += [*gammas, *betas]
    elif set(map(type, gammas + betas)) != {NoneType}:
        return None
    if NoneType in set(map(type, vectors)) or not set(map(type, eps)) <= {float, int}:
        return None
    return (vectors, [*map(float, eps)]) if _are_eps(eps) else None


def flat_if_batch(batch_norms: Sequence[BatchNorm | None]) -> tuple[list[Tensor], list[float]] | None:
    """The same of one BatchNorm a convolution with gamma, beta and the statistics of the batch, as in training."""
    if set(map(type, batch_norms)) != {BatchNorm}:
        return None
    gammas, betas, means, variances, eps = zip(*batch_norms, strict=True)
    if set(map(type, means + variances)) != {NoneType} or NoneType in set(map(type, gammas + betas)):
        return None
    if not set(map(type, eps)) <= {float, int} or not _are_eps(eps) or not isinstance(gammas[0], Tensor):
        return None
    none = missing(gammas[0])
    return [*[none] * len(means + variances), *gammas, *betas], [*map(float, eps)]


def _are_eps(eps: Sequence[float]) -> bool:
    """The sum is not at least 0 where one is NaN."""
    return min(eps) >= 0 and sum(eps) >= 0


def unflatten(
    norms: Sequence[Tensor | None], eps: Sequence[float], there: Sequence[bool] | None = None
) -> tuple[BatchNorm | None, ...] | None:
    """The inverse of :func:`flatten`. norms: None where a vector is not read. there: which convolutions have a
    BatchNorm; None for those that have a mean."""
    if not norms:
        return None
    means, variances, gammas, betas = Norms.of([None if is_missing(t) else t for t in norms])
    affine = zip(gammas or each(None, eps), betas or each(None, eps), means, variances, eps, strict=True)
    without = [is_missing(mean) for mean in Norms.of(norms).means] if there is None else [not own for own in there]
    return tuple([None if out else BatchNorm(*norm) for out, norm in zip(without, affine, strict=True)])


def missing(like: Tensor) -> Tensor:
    """What stands for a vector that is not there; nobody's vector has its shape."""
    return like.new_empty(MISSING_SHAPE)


def is_missing(t: Tensor | None) -> bool:
    """Whether this stands for a vector that is not there."""
    return t is not None and t.dim() == len(MISSING_SHAPE)


def tensors_of(params: InceptionParams) -> BlockTensors:
    """Parameters as the operators take them. Biases that are not there make BatchNorms of all convolutions, for only
    the launch that folds BatchNorm asks each convolution anew."""
    weights, biases, norms = params
    if biases is not None and any(b is None for b in biases):
        norms = norms or each(None, weights)
        biases = [missing(first(weights)) if b is None else b for b in biases]
    return BlockTensors(weights, biases or (), *flatten(norms, first(weights)))


def params_of(tensors: BlockTensors, there: Sequence[bool] | None = None) -> InceptionParams:
    """The inverse of :func:`tensors_of`. there: as of :func:`unflatten`."""
    weights, biases, norms, eps = tensors
    biases = tuple([None if is_missing(b) else b for b in biases])
    return InceptionParams(tuple(weights), biases or None, unflatten(norms, eps, there))


def operator_needs(needs: Flags) -> Needs:
    """Which gradients the operator computes, those of x, W and shift, for the wanted ones of x and the parameters."""
    weights, biases, norms, _ = needs.tensors
    if not norms:
        return Needs(needs.x, weights, biases or each(False, weights))
    _, _, gammas, betas = Norms.of(norms)
    gammas, betas = gammas or each(False, weights), betas or each(False, weights)
    weights_too = [w or gamma for w, gamma in zip(weights, gammas, strict=True)]
    shifts = [b or gamma or beta for b, gamma, beta in zip(biases or each(False, weights), gammas, betas, strict=True)]
    return Needs(needs.x, weights_too, shifts)


def with_copies(tensors: BlockTensors, needs: Flags) -> BlockTensors:
    """With the biases as copies where the gradient of gamma reads them. Eager reads the convolution's output there, so
    it lets a bias be changed in place."""
    gammas = Norms.of(needs.tensors.norms).gammas
    if not tensors.biases or not gammas:
        return tensors
    return tensors._replace(biases=[b.clone() if g else b for b, g in zip(tensors.biases, gammas, strict=True)])


def wants_statistics(needs: Flags) -> bool:
    """Whether a gradient of some mean or var is asked for, of which there is no formula here."""
    return any(statistics(needs.tensors.norms))


class Folded(NamedTuple):
    """One of each a convolution. given: the weights as the forward read them; weights: W [K, C, R, S]; scales, rstds:
    [K], rstd = 1 / sqrt(var + eps). All but given are fp32, each at memory of its own.

    Of a convolution without BatchNorm the vectors are None; of one whose var is None, since nothing reads it
    (op/saved.py), they are too, and the weight is any.
    """

    given: list[Tensor]
    weights: list[Tensor]
    scales: list[Tensor | None]
    rstds: list[Tensor | None]

    @classmethod
    def of(cls, tensors: BlockTensors, dtype: torch.dtype) -> Folded:
        """dtype: what the block computes in."""
        wide = accumulator_of(dtype)
        _, variances, gammas, _ = Norms.of(tensors.norms)
        there = [i for i, v in enumerate(variances) if v is not None and not is_missing(v)]
        scaled = [i for i in there if gammas and not is_missing(gammas[i])]
        rstds, products = [], []
        # One launch for all vectors, where the kernels of torch.optim's foreach take them.
        if there:
            rstds = torch._foreach_add([variances[i].to(wide) for i in there], [tensors.eps[i] for i in there])
            rstds = torch._foreach_reciprocal(torch._foreach_sqrt(rstds))
        found = dict(zip(there, rstds, strict=True))
        if scaled:
            products = torch._foreach_mul([found[i] for i in scaled], [gammas[i].to(wide) for i in scaled])
        scales = found | dict(zip(scaled, products, strict=True))
        rstds, scales = ([some.get(i) for i in range(len(variances))] for some in (found, scales))
        given = [w.to(dtype) for w in tensors.weights]
        folded = [
            # The gradient of a weight without BatchNorm must not be rounded to 16 bits on its way either.
            w.to(wide) if is_missing(var) else w if s is None else w * s[:, None, None, None]
            for w, s, var in zip(given, scales, variances, strict=True)
        ]
        return cls(given, folded, scales, rstds)

    def gradients(
        self, found: BlockTensors, tensors: BlockTensors, dtypes: BlockTensors, needs: BlockTensors
    ) -> list[Tensor | None]:
        """The gradients of weights, biases and norms, None where not wanted, each in its parameter's dtype and strides.

        found: dW and dshift. tensors: biases and norms are None where saved.reads() is False. dtypes: of biases and
        norms. needs: the wanted gradients.
        """
        means, _, gammas, _ = Norms.of(tensors.norms)
        wanted, kinds = Norms.of(needs.norms), Norms.of(dtypes.norms)
        dws, biases, d_gammas, d_betas = [], [], [], []
        for i, (dw, dshift) in enumerate(zip(found.weights, found.biases, strict=True)):
            scale = self.scales[i]
            wide = None if scale is None else scale[:, None, None, None]
            dws.append(_times(dw, wide, tensors.weights[i]) if needs.weights[i] else None)
            if needs.biases:
                factor = 1 if scale is None else scale
                biases.append((dshift * factor).to(dtypes.biases[i]) if needs.biases[i] else None)
            if not gammas:
                continue
            d_gamma = None
            if wanted.gammas[i]:
                mean = means[i].to(dshift.dtype)
                biased = tensors.biases and not is_missing(tensors.biases[i])
                centred = tensors.biases[i] - mean if biased else -mean
                total = (dw * self.given[i]).sum((1, 2, 3)) + dshift * centred
                d_gamma = _times(total, self.rstds[i], gammas[i])
            d_gammas.append(d_gamma)
            d_betas.append(dshift.to(kinds.betas[i]) if wanted.betas[i] else None)
        return [*dws, *biases, *(None for _ in statistics(tensors.norms)), *d_gammas, *d_betas]


def _times(a: Tensor, b: Tensor | None, like: Tensor) -> Tensor:
    """a * b, or a, rounded once to the dtype and with the strides of ``like``."""
    return torch.empty_like(like).copy_(a if b is None else a * b)
