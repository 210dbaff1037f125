"""What the forward keeps of its arguments for the backward: what is read there, and nothing else.

Autograd raises where a tensor that it keeps was changed in place before the backward, such as a bias by an optimizer's
step between two backward passes. Eager's convolution keeps input and weight wherever its output requires grad, never
the bias; its BatchNorm input, gamma, mean and var, never beta. A block keeps no parameter beyond those, but reads what
eager has at hand as a convolution's or the pool's output:

    d gamma of a convolution that wants no gradient itself     its input (x) and its frozen weight
    d weight of p4_2 where no other gradient reads x           x

so changing these there raises, where eager runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from inception_fused.errors import InceptionInputError
from inception_fused.folding import operator_needs, split
from inception_fused.gradients import Wanted


def reads(needs: Sequence[bool], eps: Sequence[float]) -> list[bool]:
    """Whether a backward of first or second order reads x and each of weights, biases and norms.

    needs: a flag for each of them, whether its gradient is wanted; trainable weights and gammas count as read, as the
    measure of their gradients.
    """
    if False not in needs[:7]:
        # The usual case, which spares the host 3 us.
        weights, found = [True] * 6, [True] * 7
    else:
        operator = operator_needs(needs, eps)
        wanted = Wanted.of(operator)
        upstream = (wanted.x, wanted.x, wanted.dr3, wanted.x, wanted.dr5, wanted.x)
        weights = [a or b for a, b in zip(upstream, operator[1:7], strict=True)]
        found = [wanted.x or wanted.w4 or bool(wanted.group), *weights]
    if not eps:
        return found + [False] * (len(needs) - 7)
    _, biases, norms = split(needs[1:], eps)
    means, variances, gammas = norms[:6], norms[6:12], norms[12:18] or [False] * 6
    scales = [a or b for a, b in zip(weights, biases or [False] * 6, strict=True)]
    found += gammas if biases else []
    found += [a or b for a, b in zip(gammas, means, strict=True)]
    found += [a or b for a, b in zip(scales, variances, strict=True)]
    return found + (scales + [False] * 6 if len(norms) == 24 else [])


def keep(
    ctx: Any, x: Tensor, outputs: Sequence[Tensor], tensors: Sequence[Tensor], needs: Sequence[bool], everything: bool
) -> None:
    """Keep on the Function's ctx what :func:`kept` gives back.

    outputs: r, bits and taps. tensors: weights, biases, norms. everything: also what is not read, as under torch.func,
    whose wrapped tensors must not outlive it as attributes.
    """
    read = [True] * (1 + len(tensors)) if everything else reads(needs, ctx.eps)
    weights, vectors, vectors_read = tensors[:6], tensors[6:], read[7:]
    if False in read[:7]:
        x, *weights = [t if r else _stand_in(t) for t, r in zip((x, *weights), read, strict=False)]
    ctx.vectors_read, ctx.dtypes = vectors_read, [t.dtype for t in vectors]
    unread = vectors
    if True in vectors_read:
        unread = [None if r else t for t, r in zip(vectors, vectors_read, strict=True)]
        vectors = [t for t, r in zip(vectors, vectors_read, strict=True) if r]
    else:
        vectors = ()
    ctx.save_for_backward(x, *outputs, *weights, *vectors)
    if not torch.compiler.is_compiling():
        # For gradients of second order, which go to a bias although nothing reads it.
        ctx.unread, ctx.histories = unread, [t if t is None else t.grad_fn for t in unread]


def kept(ctx: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor | None]]:
    """(x, r, bits, taps, weights, biases and norms) of :func:`keep`. x or a weight that is not read is a stand-in of
    its shape, a bias or one of the norms None."""
    x, r, bits, taps, *tensors = ctx.saved_tensors
    rest = iter(tensors[6:])
    return x, r, bits, taps, tensors[:6], [next(rest) if read else None for read in ctx.vectors_read]


def with_unread(ctx: Any, vectors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor | None]:
    """biases and norms of :func:`kept`, and those that are not read but want a gradient by needs, a flag for each.

    Raises:
        InceptionInputError: where one was computed, and written again since: its history is another now.
    """
    found = list(vectors)
    for i, (t, history) in enumerate(zip(ctx.unread, ctx.histories, strict=True)):
        if t is None or not needs[i]:
            continue
        if t.grad_fn is not history:
            raise InceptionInputError(
                f"params: got a bias or beta {tuple(t.shape)} that was computed and then modified by an inplace "
                "operation before a differentiable backward, wants it as it was in the forward; clone it first"
            )
        found[i] = t
    return found


def dtype_names(dtypes: Iterable[torch.dtype]) -> list[str]:
    """["float32", ...]: how an operator is told dtypes. torch.library.opcheck cannot pass on a list of dtypes."""
    return [str(dtype)[len("torch.") :] for dtype in dtypes]


def dtypes_of(names: Sequence[str]) -> list[torch.dtype]:
    """The inverse of :func:`dtype_names`."""
    return [getattr(torch, name) for name in names]


def _stand_in(t: Tensor) -> Tensor:
    """One element as large as t: its shape and dtype, for what asks for no more."""
    return t.new_empty(()).expand(t.shape)
