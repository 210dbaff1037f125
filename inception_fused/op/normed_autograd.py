"""A block whose BatchNorm takes the statistics of the batch, as a function that autograd knows.

The operators change nothing. Their caller gets the statistics beside y and moves running ones itself, so that
checkpointing, torch.compile and a graph's replay see what they would see of PyTorch's own layers.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inception_fused.block import batch_stats, folding
from inception_fused.block.batch_stats import BATCH, FIXED, NONE
from inception_fused.block.call_types import NormedSaved
from inception_fused.block.chains import each, heads
from inception_fused.block.reference import InceptionParams
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import BlockTensors, Flags, Needs, Norms
from inception_fused.errors import InceptionInputError
from inception_fused.op import checking, masked, normed, saved
from inception_fused.op import normed_operators as _operators  # noqa: F401  registers the operators

SAVES_NOTHING = normed.NormedSaves(False, False, False, False)

Seen = Callable[[Tensor], None] | None

Statistics = list[tuple[Tensor, Tensor] | None]
"""(mean, biased variance) [K] of each convolution's output in fp32, without gradients; None of one that does not take
them."""


def normed_block(
    x: Tensor, params: InceptionParams, *, relu: bool, backend: str, group: str = ""
) -> tuple[Tensor, Statistics]:
    """One block by its operators, for arguments that were checked and that kernels, or their twins, may compute.

    x: [N, C, H, W] in the dtype of the block. params: of which some BatchNorm has no mean and variance. Returns y
    [N, K, H, W] in channels_last memory and the statistics of the batch. group: the name of the process group over
    whose processes the batch is spread, "" for none: every process has to make the call, with as many wanted gradients,
    and gets the statistics of all rows.
    """
    y, stats = normed_call(x, params, relu=relu, backend=backend, group=group)
    modes = batch_stats.modes_of(params.batch_norms)
    found = batch_stats.batch_statistics(stats, BlockShape.of(x, params.weights))
    return y, [own if mode == BATCH else None for own, mode in zip(found, modes, strict=True)]


def normed_call(
    x: Tensor, params: InceptionParams, *, relu: bool, backend: str, group: str = "", seen: Seen = None
) -> tuple[Tensor, Tensor]:
    """y and the table of statistics that :func:`normed_block` reads.

    seen: called with that table before anything is kept for a backward, where torch.utils.checkpoint leaves a forward
    that it repeats. Not for torch.compile.
    """
    tensors = folding.tensors_of(params)
    modes = batch_stats.modes_of(params.batch_norms)
    flat = tensors.flat
    needs = [t.requires_grad for t in (x, *flat)] if torch.is_grad_enabled() else []
    if any(needs):
        saves = normed.saves(operator_needs(Flags.of(needs, tensors.eps)), relu)
        fixed = tuple(modes), tuple(tensors.eps), tuple(saves), group, seen
        y, *_, stats = NormedFunction.apply(x, relu, backend, *fixed, *flat)
    else:
        weights, biases, norms, eps = map(list, tensors)
        operator = torch.ops.inception_fused._normed.default
        y, *_, stats = operator(x, weights, biases, norms, eps, modes, relu, *SAVES_NOTHING, backend, group)
        if seen is not None:
            seen(stats)
    if checking.on and not group:
        checking.check_forward(y, x, params, "relu" if relu else None)
    return y, stats


def operator_needs(needs: Flags) -> Needs:
    """Of x, of each weight, and of any vector of each convolution."""
    weights, biases, norms, _ = needs.tensors
    _, _, gammas, betas = (kind or each(False, weights) for kind in Norms.of(norms))
    vectors = zip(biases or each(False, weights), gammas, betas, strict=True)
    return Needs(needs.x, list(weights), [any(wanted) for wanted in vectors])


def vector_dtypes(dtypes: BlockTensors, needs: Flags) -> list[str]:
    """What the backward's operator is told of gamma, beta and bias of each convolution: the dtype of a gradient, "" of
    one that is not wanted. dtypes: of the parameters, weights aside."""
    kinds, flags = Norms.of(dtypes.norms), Norms.of(needs.tensors.norms)
    per_kind = [
        (kinds.gammas, flags.gammas), (kinds.betas, flags.betas), (dtypes.biases, needs.tensors.biases),
    ]  # fmt: skip
    none = each("", dtypes.weights)
    named = [
        [saved.dtype_name(dtype) if need else "" for dtype, need in zip(*pair, strict=True)] or none
        for pair in per_kind
    ]
    return [name for three in zip(*named, strict=True) for name in three]


def reads(needs: Flags, modes: Sequence[int]) -> Flags:
    """Whether a backward of first or second order reads x and each parameter. Eager keeps the same, and as here neither
    biases nor betas, which may be changed before the backward."""
    wanted = operator_needs(needs)
    weights = [a or b for a, b in zip(wanted.to_inputs, wanted.weights, strict=True)]
    fixed, norms = [mode == FIXED for mode in modes], needs.tensors.norms
    kinds = zip(Norms._fields, Norms.of(norms), strict=True)
    read = {"means": fixed, "variances": fixed, "gammas": [mode != NONE for mode in modes], "betas": each(False, modes)}
    vectors = [flag for name, kind in kinds if kind for flag in read[name]]
    x = wanted.x or any(heads(wanted.weights))
    return Flags(x, BlockTensors(weights, [False] * len(needs.tensors.biases), vectors))


class NormedFunction(torch.autograd.Function):
    """Autograd of one block: ``apply(x, relu, backend, modes, eps, saves, group, seen, *weights, *biases,
    *norms)``.

    Returns the operator's outputs (y, raw, raw_r, r, taps, stats); only y is differentiable. norms: of
    folding.flatten(); modes, eps, saves: tuples. Saved for backward, as far as the wanted gradients read them: x, what
    the convolutions gave, r, four bits an element of x, the statistics, weights and gammas; never y.
    """

    @staticmethod
    def forward(
        x: Tensor, relu: bool, backend: str, modes: tuple[int, ...], eps: tuple[float, ...], saves: tuple[bool, ...],
        group: str, seen: Seen, *flat: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        weights, biases, norms, _ = map(list, BlockTensors.of(flat, eps))
        operator = torch.ops.inception_fused._normed.default
        outputs = operator(x, weights, biases, norms, list(eps), list(modes), relu, *saves, backend, group)
        if seen is not None:
            seen(outputs[-1])
        return outputs

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.relu, ctx.backend, ctx.modes, ctx.eps, _saves, ctx.group, _seen, *flat = inputs
        _, *outputs = output
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        tensors = BlockTensors.of(flat, ctx.eps)
        saved.keep(ctx, x, NormedSaved(*outputs), tensors, reads(_needs_of(ctx), ctx.modes))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        x, outputs, tensors = saved.kept(ctx)
        needs = _needs_of(ctx)
        if torch.is_grad_enabled() or forward_ad._current_level >= 0 or saved.is_batched(dy):
            if ctx.group:
                wants = "wants False with SyncBatchNorm, whose backward PyTorch does not differentiate either"
                raise InceptionInputError(f"backward: got create_graph=True, {wants}")
            tensors = _complete(ctx, tensors, needs)
            grads = _differentiable(dy, x, outputs, tensors, needs, ctx)
        else:
            grads = _backward(dy, x, outputs, tensors, needs, ctx)
        dx, *grads = grads
        return (dx, None, None, None, None, None, None, None, *grads)


# apply() asks for the signature at every call: 10 us of the host, unless a function carries it.
NormedFunction.forward.__signature__ = inspect.signature(NormedFunction.forward)


def gradients_given_masks(y: Tensor, dy: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
    """The gradients of y of :func:`normed_block` in dtype, by name, as checking.normed_gradients() gives them: by
    PyTorch's own operators with the masks, r and taps of this very forward. Called before its backward."""
    ctx = y.grad_fn
    needs, (x, outputs, tensors) = _needs_of(ctx), saved.kept(ctx)
    return checking.normed_gradients(dtype, dy, x, outputs, _complete(ctx, tensors, needs), needs, ctx.modes, ctx.relu)


def _needs_of(ctx: Any) -> Flags:
    """The gradients that autograd wants of the Function."""
    x, _relu, _backend, _modes, _eps, _saves, _group, _seen, *flat = ctx.needs_input_grad
    return Flags(x, BlockTensors.of(flat, ctx.eps))


def _complete(ctx: Any, tensors: BlockTensors, needs: Flags) -> BlockTensors:
    """With what the kernels' backward does not read: betas and biases that want a gradient, and the bias before a
    BatchNorm in eval mode whose gamma wants one."""
    gammas = Norms.of(needs.tensors.norms).gammas or each(False, tensors.weights)
    flags = zip(needs.tensors.biases, gammas, ctx.modes, strict=False)
    biases = [need or (gamma and mode == FIXED) for need, gamma, mode in flags]
    return saved.with_unread(ctx, tensors, Flags(needs.x, needs.tensors._replace(biases=biases)))


def _backward(
    dy: Tensor, x: Tensor, outputs: NormedSaved, tensors: BlockTensors, needs: Flags, ctx: Any
) -> list[Tensor | None]:
    """The gradients of x, weights, biases and norms, None where not wanted."""
    weights, wanted, flags = tensors.weights, operator_needs(needs), Norms.of(needs.tensors.norms)
    vectors = vector_dtypes(BlockTensors.of([*weights, *ctx.dtypes], ctx.eps), needs)
    found = torch.ops.inception_fused._normed_backward.default(
        dy, x, *outputs, weights, list(ctx.eps), list(ctx.modes), vectors, ctx.relu, wanted.flat, ctx.backend, ctx.group
    )
    count = len(weights)
    dx, *dws = [g if need else None for g, need in zip(found, wanted.flat[: 1 + count], strict=False)]
    rest = [g if name else None for g, name in zip(found[1 + count :], vectors, strict=True)]
    gammas, betas, biases = rest[0::3], rest[1::3], rest[2::3]
    statistics = [None for _ in (*flags.means, *flags.variances)]
    affine = [*gammas, *betas] if flags.gammas else []
    grads = [dx, *dws, *(biases if needs.tensors.biases else ()), *statistics, *affine]
    if checking.on and not ctx.group and not torch.compiler.is_compiling():
        tensors = _complete(ctx, tensors, needs)
        checking.check_normed_gradients(grads, dy, x, outputs, tensors, needs, modes=ctx.modes, relu=ctx.relu)
    return grads


def _differentiable(
    dy: Tensor, x: Tensor, outputs: NormedSaved, tensors: BlockTensors, needs: Flags, ctx: Any
) -> list[Tensor | None]:
    """The same by PyTorch's own operators with the forward's masks, r and taps, to any order."""
    saved = masked.saved_of(outputs, BlockShape.of(x, tensors.weights), ctx.relu)
    return masked.differentiable_backward(dy, x, saved, tensors, needs, ctx.relu, modes=ctx.modes)
