"""BatchNorm in eval mode as the operators take it, and its gradients from those of the block into which it is folded.

    y = act(conv(x, w) * scale + shift)      scale = gamma / sqrt(var + eps), shift = beta + (bias - mean) * scale

The forward's kernels get w, scale and shift. Every formula of the backward (gradients.py) holds for the convolution
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

from inception_fused.kernels.views import BatchNorm, accumulator_of

FIELDS = ("mean", "var", "gamma", "beta")
"""The order of a flat list: six of each, or of the first two alone where BatchNorm is not affine."""


def is_uniform(batch_norms: Sequence[BatchNorm]) -> bool:
    """Whether all six have gamma and beta, or none has either: what a flat list can say."""
    return sum([t is None for norm in batch_norms for t in norm[:2]]) in (0, 12)


def flatten(batch_norms: Sequence[BatchNorm] | None) -> tuple[list[Tensor], list[float]]:
    """(vectors, six eps) of six uniform BatchNorms, in the order of :data:`FIELDS`; two empty lists of None."""
    if batch_norms is None:
        return [], []
    gammas, betas, means, variances, eps = zip(*batch_norms, strict=True)
    return [*means, *variances, *(() if gammas[0] is None else gammas + betas)], list(eps)


def unflatten(norms: Sequence[Tensor], eps: Sequence[float]) -> tuple[BatchNorm, ...] | None:
    """The inverse of :func:`flatten`."""
    if not norms:
        return None
    means, variances, gammas, betas = norms[:6], norms[6:12], norms[12:18] or (None,) * 6, norms[18:] or (None,) * 6
    return tuple([BatchNorm(*norm) for norm in zip(gammas, betas, means, variances, eps, strict=True)])


def split(tensors: Sequence[Tensor], eps: Sequence[float]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(weights, biases, norms) of one list of them. Six or no biases; norms only where there are eps."""
    biases = 6 if not eps or len(tensors) % 12 == 0 else 0
    start = len(tensors) if not eps else 6 + biases
    return list(tensors[:6]), list(tensors[6:start]), list(tensors[start:])


def operator_needs(needs: Sequence[bool], eps: Sequence[float]) -> list[bool]:
    """Which gradients the operator computes: 13 flags for x, W and shift, from flags for x, weights, biases, norms."""
    if not eps:
        return [*needs, *[False] * (13 - len(needs))]
    x, *needs = needs
    weights, biases, norms = split(needs, eps)
    biases = biases or [False] * 6
    gammas, betas = norms[12:18] or [False] * 6, norms[18:] or [False] * 6
    weights_too = [w or gamma for w, gamma in zip(weights, gammas, strict=True)]
    shifts = [b or gamma or beta for b, gamma, beta in zip(biases, gammas, betas, strict=True)]
    return [x, *weights_too, *shifts]


def with_copies(biases: Sequence[Tensor], norms: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    """The biases, as copies where the gradient of gamma reads them. Eager reads the convolution's output there, so it
    lets a bias be changed in place. needs: a flag for each of the norms."""
    return [b.clone() if gamma else b for b, gamma in zip(biases, needs[12:18] or [False] * 6, strict=True)]


def wants_statistics(needs: Sequence[bool], eps: Sequence[float]) -> bool:
    """Whether a gradient of some mean or var is asked for, of which there is no formula here. needs: as above."""
    return bool(eps) and any(split(needs[1:], eps)[2][:12])


class Folded(NamedTuple):
    """given: the weights as the forward read them; weights: six W [K, C, R, S]; scales, rstds: six [K],
    rstd = 1 / sqrt(var + eps). All but given are fp32, each at memory of its own.

    Of a convolution whose var is None, since nothing reads it (saved.py), the weight is any and the vectors None.
    """

    given: list[Tensor]
    weights: list[Tensor]
    scales: list[Tensor | None]
    rstds: list[Tensor | None]

    @classmethod
    def of(
        cls, weights: Sequence[Tensor], norms: Sequence[Tensor | None], eps: Sequence[float], dtype: torch.dtype
    ) -> Folded:
        """dtype: what the block computes in."""
        wide = accumulator_of(dtype)
        variances, gammas = norms[6:12], norms[12:18]
        there = [i for i, v in enumerate(variances) if v is not None]
        # One launch for six vectors, where the kernels of torch.optim's foreach take them.
        rstds = torch._foreach_add([variances[i].to(wide) for i in there], [eps[i] for i in there])
        rstds = torch._foreach_reciprocal(torch._foreach_sqrt(rstds))
        scales = torch._foreach_mul(rstds, [gammas[i].to(wide) for i in there]) if gammas else rstds
        rstds, scales = ([dict(zip(there, some, strict=True)).get(i) for i in range(6)] for some in (rstds, scales))
        given = [w.to(dtype) for w in weights]
        folded = [w if s is None else w * s[:, None, None, None] for w, s in zip(given, scales, strict=True)]
        return cls(given, folded, scales, rstds)

    def gradients(
        self,
        found: Sequence[Tensor],
        weights: Sequence[Tensor],
        biases: Sequence[Tensor | None],
        norms: Sequence[Tensor | None],
        dtypes: Sequence[torch.dtype],
        needs: Sequence[bool],
    ) -> list[Tensor | None]:
        """The gradients of weights, biases and norms, None where not wanted, each in its parameter's dtype and strides.

        found: dW and dshift, twelve. biases, norms: None where saved.reads() is False. dtypes: theirs. needs: a flag
        for each of weights, biases and norms.
        """
        dtypes = [*[w.dtype for w in weights], *dtypes]
        grads: list[Tensor | None] = [None] * len(dtypes)
        first_bias, first_gamma = 6, len(dtypes) - 12
        affine = len(norms) == 24
        for i in range(6):
            dw, dshift = found[i], found[6 + i]
            if needs[i]:
                grads[i] = _times(dw, self.scales[i][:, None, None, None], weights[i])
            if biases and needs[first_bias + i]:
                grads[first_bias + i] = (dshift * self.scales[i]).to(dtypes[first_bias + i])
            if affine and needs[first_gamma + i]:
                mean = norms[i].to(dshift.dtype)
                centred = biases[i] - mean if biases else -mean
                total = (dw * self.given[i]).sum((1, 2, 3)) + dshift * centred
                grads[first_gamma + i] = _times(total, self.rstds[i], norms[12 + i])
            if affine and needs[first_gamma + 6 + i]:
                grads[first_gamma + 6 + i] = dshift.to(dtypes[first_gamma + 6 + i])
        return grads


def _times(a: Tensor, b: Tensor, like: Tensor) -> Tensor:
    """a * b, rounded once to the dtype and with the strides of ``like``."""
    return torch.empty_like(like).copy_(a * b)
