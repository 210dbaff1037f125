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
from typing import NamedTuple

import torch
from torch import Tensor

from inception_fused.block.chains import BlockTensors, Flags, Needs, Norms, each, statistics
from inception_fused.block.reference import InceptionParams
from inception_fused.block.views import BatchNorm, accumulator_of


def is_uniform(batch_norms: Sequence[BatchNorm]) -> bool:
    """Whether all have gamma and beta, or none has either: what a flat list can say."""
    return len({t is None for norm in batch_norms for t in (norm.gamma, norm.beta)}) < 2


def flatten(batch_norms: Sequence[BatchNorm] | None) -> tuple[list[Tensor], list[float]]:
    """(vectors, eps) of uniform BatchNorms, in the order of chains.FIELDS; two empty lists of None."""
    if batch_norms is None:
        return [], []
    gammas, betas, means, variances, eps = zip(*batch_norms, strict=True)
    return [*means, *variances, *(() if gammas[0] is None else gammas + betas)], list(eps)


def unflatten(norms: Sequence[Tensor], eps: Sequence[float]) -> tuple[BatchNorm, ...] | None:
    """The inverse of :func:`flatten`."""
    if not norms:
        return None
    means, variances, gammas, betas = Norms.of(norms)
    affine = zip(gammas or each(None, eps), betas or each(None, eps), means, variances, eps, strict=True)
    return tuple([BatchNorm(*norm) for norm in affine])


def tensors_of(params: InceptionParams) -> BlockTensors:
    """Parameters whose BatchNorms are uniform, as the operators take them."""
    return BlockTensors(params.weights, params.biases or (), *flatten(params.batch_norms))


def params_of(tensors: BlockTensors) -> InceptionParams:
    """The inverse of :func:`tensors_of`."""
    weights, biases, norms, eps = tensors
    return InceptionParams(tuple(weights), tuple(biases) or None, unflatten(norms, eps))


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

    Of a convolution whose var is None, since nothing reads it (op/saved.py), the weight is any and the vectors None.
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
        there = [i for i, v in enumerate(variances) if v is not None]
        # One launch for all vectors, where the kernels of torch.optim's foreach take them.
        rstds = torch._foreach_add([variances[i].to(wide) for i in there], [tensors.eps[i] for i in there])
        rstds = torch._foreach_reciprocal(torch._foreach_sqrt(rstds))
        scales = torch._foreach_mul(rstds, [gammas[i].to(wide) for i in there]) if gammas else rstds
        rstds, scales = (
            [dict(zip(there, some, strict=True)).get(i) for i in range(len(variances))] for some in (rstds, scales)
        )
        given = [w.to(dtype) for w in tensors.weights]
        folded = [w if s is None else w * s[:, None, None, None] for w, s in zip(given, scales, strict=True)]
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
            dws.append(_times(dw, scale[:, None, None, None], tensors.weights[i]) if needs.weights[i] else None)
            if needs.biases:
                biases.append((dshift * scale).to(dtypes.biases[i]) if needs.biases[i] else None)
            if not gammas:
                continue
            d_gamma = None
            if wanted.gammas[i]:
                mean = means[i].to(dshift.dtype)
                centred = tensors.biases[i] - mean if tensors.biases else -mean
                total = (dw * self.given[i]).sum((1, 2, 3)) + dshift * centred
                d_gamma = _times(total, self.rstds[i], gammas[i])
            d_gammas.append(d_gamma)
            d_betas.append(dshift.to(kinds.betas[i]) if wanted.betas[i] else None)
        return [*dws, *biases, *(None for _ in statistics(tensors.norms)), *d_gammas, *d_betas]


def _times(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a * b, rounded once to the dtype and with the strides of ``like``."""
    return torch.empty_like(like).copy_(a * b)
