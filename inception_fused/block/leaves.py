"""Leaves of autograd's graph, made of somebody's tensors, and which tensors of a block those are."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inception_fused.block.batch_stats import takes_batch
from inception_fused.block.chains import variant_of
from inception_fused.block.reference import InceptionParams, parameters_of, with_parameters


def is_tracked(t: Tensor) -> bool:
    """Whether autograd can save t: not what was made in inference mode. Of a parameter whose .data was assigned since,
    is_inference() does not tell, but it has no version."""
    try:
        return not t.is_inference() and t._version >= 0
    except RuntimeError:
        return False


def leaf(t: Tensor, wanted: bool = True) -> Tensor:
    """t as a leaf of its own, a copy where autograd could not save it; wanted: whether its gradient is."""
    return (t.detach() if is_tracked(t) else t.detach().clone()).requires_grad_(wanted)


def learned(params: InceptionParams) -> dict[str, Tensor]:
    """What a block learns, by name: weights, the biases that are there, and where some BatchNorm takes the statistics
    of the batch every gamma and then every beta that is there."""
    norms = params.batch_norms if takes_batch(params.batch_norms) else ()
    kinds = {
        ".weight": params.weights,
        ".bias": params.biases or (),
        " batch_norm.gamma": [norm and norm.gamma for norm in norms],
        " batch_norm.beta": [norm and norm.beta for norm in norms],
    }
    names = variant_of(params.weights).names
    return {
        f"{name}{kind}": t
        for kind, tensors in kinds.items()
        for name, t in zip(names, tensors, strict=False)
        if t is not None
    }


def with_learned(params: InceptionParams, tensors: Sequence[Tensor]) -> InceptionParams:
    """The same with other tensors in the order of :func:`learned`."""
    plain = len(parameters_of(params))
    params, rest = with_parameters(params, tensors[:plain]), iter(tensors[plain:])
    if not takes_batch(params.batch_norms):
        return params
    norms = list(params.batch_norms)
    for field in ("gamma", "beta"):
        norms = [
            norm._replace(**{field: next(rest)}) if norm and getattr(norm, field) is not None else norm
            for norm in norms
        ]
    return params._replace(batch_norms=tuple(norms))
