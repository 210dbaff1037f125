"""INCEPTION_FUSED_CHECK=1: every call that takes the kernels runs beside the reference, and the first difference stops.

A slice of y and a gradient are judged as :mod:`inception_fused.testing` judges them: against float64, with twice
eager's own error and the tolerance of the dtype as the bound. The gradients' truth has the masks, r and arg-max that
the kernels' forward saved, so that a ReLU that flips near zero neither hides an error nor is one. It is slow, waits for
the device and holds the block in float64. Calls with SyncBatchNorm, whose reference would need the other processes, are
left out.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn import Parameter

from inception_fused.block.batch_stats import BATCH
from inception_fused.block.call_types import BackwardCall, NormedSaved
from inception_fused.block.chains import by_chain, has_pool
from inception_fused.block.folding import params_of
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, InceptionConfig
from inception_fused.block.reference import InceptionParams, inception_reference, parameters_of, with_parameters
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import BlockTensors, Flags, named
from inception_fused.block.tolerance import gradient_names, row, slice_names
from inception_fused.errors import KernelError
from inception_fused.op import masked
from inception_fused.op.masked import masked_block
from inception_fused.op.viewing import Advising

ENVIRONMENT_VARIABLE = "INCEPTION_FUSED_CHECK"

on = os.environ.get(ENVIRONMENT_VARIABLE) == "1"
"""Whether calls are checked, in the whole process: autograd runs a CUDA backward on a thread of its own."""

if on:
    Advising().__enter__()


@contextmanager
def checked(active: bool = True) -> Iterator[None]:
    """Within it calls of the whole process are checked, or not, whatever the environment says. If they are, a ``.view``
    behind a block that fails on this thread names the cure."""
    global on
    outer, on = on, active
    try:
        with Advising() if active else nullcontext():
            yield
    finally:
        on = outer


def check_forward(y: Tensor, x: Tensor, params: InceptionParams, activation: str | None) -> None:
    """Compare y [N, K, H, W] of the kernels with the reference, slice by slice.

    x: [N, C, H, W] in the dtype in which the block computes; the parameters of any floating dtype.

    Raises:
        KernelError: naming block and slice, with the figures, at the first slice that is beyond its bound.
    """
    weights, parameters = params.weights, parameters_of(params)
    if not can_check(y, x, *parameters):
        return

    def run(dtype: torch.dtype) -> Tensor:
        cast = [t.detach().to(dtype) for t in (x, *parameters)]
        return inception_reference(cast[0], with_parameters(params, cast[1:]), activation)

    channels = BlockShape.of(x, weights).branch_channels
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        parts = [t.split(channels, dim=1) for t in (y, run(x.dtype), run(torch.float64))]
        for name, ours, eager, truth in zip(slice_names(weights), *parts, strict=True):
            _judge(name, ours, eager, truth, x, weights)


def check_gradients(grads: Sequence[Tensor], call: BackwardCall) -> None:
    """Compare the gradients of the operator for a call with :func:`masked_gradients`.

    grads: of x, each weight and each bias, of which those that ``call.needs`` does not want are not looked at.

    Raises:
        KernelError: naming block and gradient, with the figures, at the first gradient that is beyond its bound.
    """
    if not can_check(call.dy, call.x, *call.saved, *call.weights):
        return
    eager, truth = (masked_gradients(call, t) for t in (call.x.dtype, torch.float64))
    with torch.no_grad():
        for name, g, other, exact in zip(gradient_names(call.weights), grads, eager, truth, strict=True):
            if exact is not None:
                _judge(f"d {name}", g, other, exact, call.x, call.weights)


def check_normed_gradients(
    grads: Sequence[Tensor | None], dy: Tensor, x: Tensor, outputs: NormedSaved, tensors: BlockTensors, needs: Flags,
    *, modes: Sequence[int], relu: bool,
) -> None:  # fmt: skip
    """The same with :func:`normed_gradients`. grads: of x and of the tensors, in the order of needs."""
    if not can_check(dy, x, *outputs, *tensors.weights):
        return
    found = dict(zip(_names(tensors), grads, strict=True))
    given = (dy, x, outputs, tensors, needs, modes, relu)
    eager, truth = (normed_gradients(t, *given) for t in (x.dtype, torch.float64))
    with torch.no_grad():
        for name, exact in truth.items():
            _judge(f"d {name}", found[name], eager[name], exact, x, tensors.weights)


def normed_gradients(
    dtype: torch.dtype, dy: Tensor, x: Tensor, outputs: NormedSaved, tensors: BlockTensors, needs: Flags,
    modes: Sequence[int], relu: bool,
) -> dict[str, Tensor]:  # fmt: skip
    """The wanted gradients in dtype of a block whose BatchNorm takes the statistics of the batch, by name, by autograd
    of :func:`masked_block`.

    outputs, tensors: with everything that masked_block() reads. The gradient of a bias before such a BatchNorm is
    nothing but rounding in eager, and left out.
    """
    biases = [need and mode != BATCH for need, mode in zip(needs.tensors.biases, modes, strict=False)]
    wanted = Flags(needs.x, needs.tensors._replace(biases=biases))
    given = masked.saved_of(outputs, BlockShape.of(x, tensors.weights), relu)
    given = given._replace(r=given.r.to(dtype))
    vectors = [t if t is None or dtype == x.dtype else t.to(dtype) for t in tensors.vectors]
    some = BlockTensors.of([*(w.to(dtype) for w in tensors.weights), *vectors], tensors.eps)
    found = masked.differentiable_backward(dy.to(dtype), x.to(dtype), given, some, wanted, relu, modes)
    return {name: g for name, g in zip(_names(tensors), found, strict=True) if g is not None}


def _names(tensors: BlockTensors) -> list[str]:
    """Of x and of each of the tensors, those that are not there included."""
    return ["x", *(name for name, _ in named(tensors))]


def check_pool(y: Tensor, expected: Tensor) -> None:
    """Compare y of a max-pool of stride 2 with PyTorch's: the same numbers.

    Raises:
        KernelError: where one differs.
    """
    wrong = (y != expected) & ~(y.isnan() & expected.isnan())
    if wrong.any():
        raise KernelError(
            f"{ENVIRONMENT_VARIABLE}: max-pool {tuple(y.shape)} {y.dtype}: {int(wrong.sum())} numbers of y differ from "
            "PyTorch's"
        )


def check_pool_gradient(what: str, ours: Tensor, exact: Tensor, magnitude: Tensor, terms: int) -> None:
    """Compare a gradient of a max-pool with the same sums in float64.

    magnitude: the sums of the terms' magnitudes; terms: how many fp32 adds up at most. ``ours`` is rounded once more.

    Raises:
        KernelError: where one is beyond what rounding explains.
    """
    bound = (torch.finfo(ours.dtype).eps + terms * torch.finfo(torch.float32).eps) * magnitude
    wrong = ((ours.double() - exact).abs() > bound + torch.finfo(ours.dtype).tiny) & exact.to(ours.dtype).isfinite()
    if wrong.any():
        raise KernelError(
            f"{ENVIRONMENT_VARIABLE}: max-pool, d {what} {tuple(ours.shape)} {ours.dtype}: {int(wrong.sum())} numbers "
            "are beyond what rounding explains"
        )


def masked_gradients(call: BackwardCall, dtype: torch.dtype) -> list[Tensor | None]:
    """The gradients of x, each weight and each bias in dtype, None where not wanted, by autograd of
    :func:`masked_block`; independent of :func:`inception_fused.op.gradients.block_backward`."""
    x, weights = call.x, call.weights
    biases = [w.new_zeros(w.shape[0]) for w in weights]
    given = [t.detach().to(dtype) for t in (x, *weights, *biases)]
    leaves = [t.requires_grad_() for t, need in zip(given, call.needs.flat, strict=True) if need]
    with torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
        params = params_of(BlockTensors.of(given[1:]))
        y = masked_block(given[0], params, call.saved, relu=call.relu, shape=BlockShape.of(x, weights))
        found = iter(torch.autograd.grad(y, leaves, call.dy.to(dtype)))
    return [next(found) if need else None for need in call.needs.flat]


def can_check(first: Tensor, *others: Tensor) -> bool:
    """Whether there is something to compare, and nobody traces, transforms or captures the call."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if not {type(t) for t in (first, *others)} <= {Tensor, Parameter} or not first.numel():
        return False
    return not (first.is_cuda and torch.cuda.is_current_stream_capturing())


def _judge(what: str, ours: Tensor, eager: Tensor, truth: Tensor, x: Tensor, weights: Sequence[Tensor]) -> None:
    """Raise KernelError where ``ours`` is beyond its bound. What overflows in eager too is left out."""
    finite = eager.isfinite() & truth.isfinite()
    if not finite.all():
        ours, eager, truth = ours[finite], eager[finite], truth[finite]
    worst = row(what, ours, eager, truth, x, weights, x.dtype).decisive
    if not worst.ok:
        raise KernelError(
            f"{ENVIRONMENT_VARIABLE}: {_name(x, weights)}, x {tuple(x.shape)} {x.dtype} on {x.device}: {what} "
            f"differs from the reference: {worst.kind} error {worst.ours:.2e}, bound {worst.bound:.2e}, eager's own "
            f'{worst.eager:.2e}, relative to float64; backend("eager") goes on without the kernels, '
            "verify(model, x) checks every slice and gradient"
        )


def _name(x: Tensor, weights: Sequence[Tensor]) -> str:
    """A block by its sizes, and by its name where it is one of GoogLeNet's."""
    filters = by_chain([w.shape[0] for w in weights])
    if not has_pool(weights):
        return f"stem {(x.shape[1], *filters)}"
    config = InceptionConfig(x.shape[1], *(k if len(k) > 1 else k[0] for k in filters))
    names = [f"{name} " for name, known in GOOGLENET_BLOCKS.items() if known == config]
    return f"block {''.join(names)}{tuple(config)}"
