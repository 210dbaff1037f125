"""Leaves of autograd's graph, made of somebody's tensors."""

from __future__ import annotations

from torch import Tensor


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
