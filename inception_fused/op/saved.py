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

from inception_fused.block.call_types import NormedSaved, Saved, Saves
from inception_fused.block.chains import each, has_pool, heads
from inception_fused.block.folding import operator_needs
from inception_fused.block.tensor_lists import BlockTensors, Flags, Norms
from inception_fused.errors import InceptionInputError
from inception_fused.op import gradients


def saves(needs: Flags, relu: bool) -> Saves:
    """Which outputs of the forward the wanted gradients need."""
    if needs.x and False not in needs.tensors.weights:
        # The usual case, which spares the host 3 us here and 2 in reads().
        return Saves(True, relu, has_pool(needs.tensors.weights))
    return gradients.saves(operator_needs(needs), relu)


def reads(needs: Flags) -> Flags:
    """Whether a backward of first or second order reads x and each of weights, biases and norms.

    needs: whether the gradient of each is wanted; trainable weights and gammas count as read, as the measure of their
    gradients.
    """
    _, biases, norms, _ = needs.tensors
    if needs.x and False not in needs.tensors.weights:
        x, weights = True, each(True, needs.tensors.weights)
    else:
        operator = operator_needs(needs)
        weights = [a or b for a, b in zip(operator.to_inputs, operator.weights, strict=True)]
        x = operator.x or any(heads(operator.weights))
    if not norms:
        return Flags(x, BlockTensors(weights, [False] * len(biases)))
    means, variances, gammas, _ = Norms.of(norms)
    gammas_read = gammas or each(False, weights)
    scales = [a or b for a, b in zip(weights, biases or each(False, weights), strict=True)]
    read = [a or b for a, b in zip(gammas_read, means, strict=True)]
    read += [a or b for a, b in zip(scales, variances, strict=True)]
    if gammas:
        read += scales + each(False, weights)
    return Flags(x, BlockTensors(weights, gammas_read if biases else (), read))


def keep(ctx: Any, x: Tensor, outputs: Saved | NormedSaved, tensors: BlockTensors, read: Flags | None) -> None:
    """Keep on the Function's ctx what :func:`kept` gives back.

    read: what a backward reads, as :func:`reads` says it; None for everything, as under torch.func, whose wrapped
    tensors must not outlive it as attributes.
    """
    weights, vectors = tensors.weights, tensors.vectors
    if read is None:
        vectors_read = [True] * len(vectors)
    else:
        vectors_read = read.tensors.vectors
        if not read.x:
            x = _stand_in(x)
        if False in read.tensors.weights:
            weights = [t if r else _stand_in(t) for t, r in zip(weights, read.tensors.weights, strict=True)]
    ctx.kept, ctx.dtypes, ctx.outputs = each(True, weights) + vectors_read, [t.dtype for t in vectors], type(outputs)
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


def kept(ctx: Any) -> tuple[Tensor, Saved | NormedSaved, BlockTensors]:
    """x, the outputs and the parameters of :func:`keep`. x or a weight that is not read is a stand-in of its shape, a
    bias or one of the norms None."""
    x, *tensors = ctx.saved_tensors
    rest = iter(tensors)
    outputs = ctx.outputs(*[next(rest) for _ in ctx.outputs._fields])
    flat = [next(rest) if there else None for there in ctx.kept]
    return x, outputs, BlockTensors.of(flat, ctx.eps)


def with_unread(ctx: Any, tensors: BlockTensors, needs: Flags) -> BlockTensors:
    """Parameters of :func:`kept`, with those that are not read but want a gradient.

    Raises:
        InceptionInputError: where one was computed, and written again since: its history is another now.
    """
    vectors = tensors.vectors
    flags = zip(needs.tensors.vectors, ctx.unread, ctx.histories, strict=True)
    for i, (need, t, history) in enumerate(flags):
        if t is None or not need:
            continue
        if t.grad_fn is not history:
            raise InceptionInputError(
                f"params: got a bias or beta {tuple(t.shape)} that was computed and then modified by an inplace "
                "operation before a differentiable backward, wants it as it was in the forward; clone it first"
            )
        vectors[i] = t
    return BlockTensors.of([*tensors.weights, *vectors], ctx.eps)


def is_batched(t: Tensor) -> bool:
    """Whether autograd hands over several gradients at once (``is_grads_batched=True``)."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)
    )


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" and the like: how an operator is told a dtype."""
    return str(dtype)[len("torch.") :]


def dtype_names(dtypes: Iterable[torch.dtype]) -> list[str]:
    """One each. torch.library.opcheck cannot pass on a list of dtypes."""
    return [dtype_name(dtype) for dtype in dtypes]


def dtypes_of(names: Sequence[str]) -> list[torch.dtype]:
    """The inverse of :func:`dtype_names`."""
    return [getattr(torch, name) for name in names]


def _stand_in(t: Tensor) -> Tensor:
    """One element as large as t: its shape and dtype, for what asks for no more."""
    return t.new_empty(()).expand(t.shape)
