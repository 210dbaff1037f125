"""The functional interface: checks a call, decides between kernels and eager PyTorch, and holds the autograd Function.

The Function stands outside the operators, so that torch.func and torch.compile see an ordinary one.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from inception_fused.block import batch_stats, folding
from inception_fused.block.call_types import BackwardCall, Saved
from inception_fused.block.chains import BLOCKS, VARIANTS, Variant, each, first
from inception_fused.block.reference import ACTIVATIONS, InceptionParams, inception_reference
from inception_fused.block.tensor_lists import BlockTensors, Flags, statistics
from inception_fused.block.views import accumulator_of
from inception_fused.errors import InceptionInputError
from inception_fused.op import backends, checking, flops, masked, operators, reasons, saved
from inception_fused.op import batching as _batching  # noqa: F401  registers the operators and their rules
from inception_fused.op.backends import parse
from inception_fused.op.calls import autocast_enabled, check_call, compute_dtype
from inception_fused.op.normed_autograd import normed_block

flops.register()

REAL_SET = frozenset((Tensor, Parameter))
KERNEL_DTYPES = frozenset(reasons.KERNEL_DTYPES)


def inception(x: Tensor, params: InceptionParams, *, activation: str | None = "relu") -> Tensor:
    """One Inception block as a function of its parameters.

    x: [N, C, H, W], floating, any strides; N may be 0. params: see :class:`InceptionParams`; same device and, outside
    autocast, same dtype as x. Returns [N, K, H, W], K the sum of the four branches, in channels_last memory whatever
    came in; its dtype is x's, or autocast's where that is on.

    Runs the kernels where they can run and eager PyTorch elsewhere; see :func:`inception_fused.backend`.

    Raises:
        InceptionInputError: on a wrong call, naming the argument, what it got and what it wants.
        KernelError: where the backend demands kernels that cannot run.
    """
    return convolved(x, params, activation=activation, variants=BLOCKS)


def convolved(
    x: Tensor, params: InceptionParams, *, activation: str | None, variants: Mapping[int, Variant] = VARIANTS
) -> Tensor:
    """:func:`inception` of any of these variants, by their number of convolutions, GoogLeNet's stem among them."""
    backend = backends.current()
    if activation not in ACTIVATIONS or not _is_usual(x, params, backend, variants):
        check_call(x, params, activation, variants)
        dtype = compute_dtype(x)
        reason = reasons.first(x.device, dtype, backend, x=x, params=params)
        if reason is not None:
            return eager(x, reason.text, backend, lambda x: inception_reference(x, params, activation))
        if x.dtype != dtype:
            x = x.to(dtype)
        if reasons.outlives_this_call():
            weights, biases, *more = folding.tensors_of(params)
            more = more if more[1] else ()
            exported = torch.ops.inception_fused._exported
            return exported(x, list(weights), list(biases), activation == "relu", backend, *more)
        if batch_stats.takes_batch(params.batch_norms):
            if x.numel() <= x.shape[1]:
                # One value a channel, which PyTorch refuses, or none.
                return channels_last(inception_reference(x, params, activation))
            return normed_block(x, params, relu=activation == "relu", backend=backend)[0]
    return _call(x, folding.tensors_of(params), activation == "relu", backend)


def _call(x: Tensor, tensors: BlockTensors, relu: bool, backend: str) -> Tensor:
    """The operator for inference, or the Function where gradients are wanted, for arguments that were checked."""
    needs = [t.requires_grad for t in (x, *tensors.flat)] if torch.is_grad_enabled() else []
    if needs and reasons.transforming():
        # A tensor that vmap has wrapped does not say whether gradients of what it wraps are wanted.
        needs = [True] * len(needs)
    if not any(needs):
        # The overload by its name: finding it costs 2 us a call.
        infer = torch.ops.inception_fused._infer
        weights, biases, norms, eps = map(list, tensors)
        if norms:
            y = infer.norms(x, weights, biases, relu, backend, norms, eps)
        else:
            y = infer.default(x, weights, biases, relu, backend)
    else:
        flags = Flags.of(needs, tensors.eps)
        if tensors.norms:
            tensors = folding.with_copies(tensors, flags)
        eps = (tuple(tensors.eps),) if tensors.eps else ()
        y = FusedInceptionFunction.apply(x, relu, backend, saved.saves(flags, relu), *tensors.flat, *eps)[0]
    if checking.on:
        checking.check_forward(y, x, folding.params_of(tensors), "relu" if relu else None)
    return y


def _exported(x, weights, biases, relu, backend, norms=(), eps=()):
    """What a graph keeps: :func:`_call`, or where torch.func or forward mode differentiates the reference, of whose
    operators PyTorch knows every derivative. Raises KernelError there where the backend demands kernels."""
    tensors = BlockTensors(weights, biases or (), norms or (), eps or ())
    if not reasons.transforming() and forward_ad._current_level < 0:
        return _call(x, tensors, relu, backend)
    if parse(backend).demands_kernels:
        raise reasons.refused(
            backend,
            "inside a compiled, exported or traced graph torch.func differentiates PyTorch's own operators; call it on "
            'the module outside of torch.compile, or compile, export or trace under backend("auto")',
        )
    with torch.autocast(x.device.type, enabled=False):
        return channels_last(_reference(x, tensors, relu))


for _overload in ("", ".norms"):
    operators.library.impl(f"_exported{_overload}", _exported, "CompositeImplicitAutograd")


class FusedInceptionFunction(torch.autograd.Function):
    """Autograd of one block: ``apply(x, relu, backend, (save_r, save_bits, save_taps), *weights, *biases)``.

    With BatchNorm ``apply(..., *weights, *biases, *norms, eps)``: norms of folding.flatten(), a tuple of eps.

    Returns (y, r, bits, taps) as the operator does; only y is differentiable. Saved for backward, as far as the wanted
    gradients read them: x, r, one bit per element of y, four bits per element of x, parameters; never y, so that
    ``ReLU(inplace=True)`` may follow the block, nor a bias, which may be changed before the backward (saved.py).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, relu: bool, backend: str, save: tuple[bool, bool, bool], *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, biases, norms, eps = map(list, _tensors_of(tensors))
        operator = torch.ops.inception_fused._forward
        if eps:
            return operator.norms(x, weights, biases, relu, *save, backend, norms, eps)
        return operator.default(x, weights, biases, relu, *save, backend)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.relu, ctx.backend, save, *tensors = inputs
        _, *outputs = output
        tensors = _tensors_of(tensors)
        ctx.eps = tensors.eps
        needs = _needs_of(ctx)
        if not all(save):
            wanted = saved.saves(needs, ctx.relu)
            if any(w and not s for w, s in zip(wanted, save, strict=True)):
                raise InceptionInputError(
                    f"save: got {tuple(save)}, wants {tuple(wanted)} (r, bits, taps) for the gradients asked for"
                )
        ctx.mark_non_differentiable(*outputs)
        ctx.set_materialize_grads(False)
        saved.keep(ctx, x, Saved(*outputs), tensors, None if reasons.transforming() else saved.reads(needs))

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, outputs, tensors = saved.kept(ctx)
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        needs = _needs_of(ctx)
        again = torch.is_grad_enabled() or forward_ad._current_level >= 0
        if again or saved.is_batched(dy) or folding.wants_statistics(needs):
            tensors = saved.with_unread(ctx, tensors, needs)
            dx, *grads = masked.differentiable_backward(dy, x, outputs, tensors, needs, ctx.relu)
        else:
            wanted = folding.operator_needs(needs)
            call = BackwardCall(dy, x, outputs, tensors.weights, ctx.dtypes, ctx.relu, wanted, ctx.backend)
            dx, *grads = _folded_backward(call, tensors, needs) if ctx.eps else _fused_backward(call)
        return (dx, None, None, None, *grads, *((None,) if ctx.eps else ()))


# apply() asks for the signature at every call: 10 us of the host, unless a function carries it.
FusedInceptionFunction.forward.__signature__ = inspect.signature(FusedInceptionFunction.forward)


def _fused_backward(call: BackwardCall) -> list[Tensor | None]:
    """The gradients of x, the weights and the biases if there are any, None where not wanted."""
    dy, x, outputs, weights, dtypes, relu, needs, backend = call
    names, wanted = saved.dtype_names(dtypes), needs.flat
    grads = torch.ops.inception_fused._backward.default(dy, x, *outputs, weights, names, relu, wanted, backend)
    if checking.on:
        checking.check_gradients(grads, call)
    return [g if need else None for g, need in zip(grads, wanted, strict=True)][: 1 + len(weights) + len(names)]


def _folded_backward(call: BackwardCall, tensors: BlockTensors, needs: Flags) -> list[Tensor | None]:
    """:func:`_fused_backward` of the block into which BatchNorm is folded, and the parameters' gradients from those.

    call: with the dtypes of biases and norms."""
    dtype = call.x.dtype
    folded = folding.Folded.of(tensors, dtype)
    dtypes = each(accumulator_of(dtype), folded.weights)
    dx, *found = _fused_backward(call._replace(weights=folded.weights, bias_dtypes=dtypes))
    dtypes = BlockTensors.of([*tensors.weights, *call.bias_dtypes], tensors.eps)
    return [dx, *folded.gradients(BlockTensors.of(found), tensors, dtypes, needs.tensors)]


def _reference(x: Tensor, tensors: BlockTensors, relu: bool) -> Tensor:
    """The reference in x's dtype."""
    weights, biases = ([t.to(x.dtype) for t in some] for some in (tensors.weights, tensors.biases))
    params = folding.params_of(tensors._replace(weights=weights, biases=biases))
    return inception_reference(x, params, "relu" if relu else None)


def eager(x: Tensor, reason: str, backend: str, run: Any, *, quiet: bool = False) -> Tensor:
    """``run`` on x in channels_last memory, behind :func:`announce_eager`."""
    announce_eager(x, reason, backend, quiet=quiet)
    y = run(channels_last(x))
    return channels_last(y) if isinstance(y, Tensor) and y.dim() == 4 else y


def announce_eager(x: object, reason: str, backend: str, *, quiet: bool = False) -> None:
    """Says that eager PyTorch runs in the kernels' place: a FallbackWarning on CUDA, a KernelError where kernels are
    demanded.

    The warning stays away where eager was asked for, on other devices, whose path it is, and where the reason is the
    usual state of things (``quiet``).
    """
    asked = parse(backend)
    if asked.demands_kernels:
        raise reasons.refused(backend, reason)
    on_card = isinstance(x, Tensor) and x.is_cuda
    if on_card and not asked.is_eager and not quiet and not torch.compiler.is_compiling():
        reasons.warn(reason, stacklevel=5)


def channels_last(x: Tensor) -> Tensor:
    """x in channels_last memory. Under vmap by permutation, since ``contiguous(memory_format=...)`` is not there;
    elsewhere not, since a view as output would forbid in-place operations that PyTorch's block allows."""
    if not reasons.transforming():
        return x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _tensors_of(arguments: Sequence[Any]) -> BlockTensors:
    """The Function's last arguments: weights, biases and, where there is BatchNorm, norms and eps."""
    if type(arguments[-1]) is not tuple:
        return BlockTensors.of(arguments)
    *flat, eps = arguments
    return BlockTensors.of(flat, eps)


def _needs_of(ctx: Any) -> Flags:
    """The gradients that autograd wants of the Function."""
    x, _relu, _backend, _save, *tensors = ctx.needs_input_grad
    if ctx.eps:
        tensors.pop()
    return Flags(x, BlockTensors.of(tensors, ctx.eps))


def _is_usual(x: object, params: object, backend: str, variants: Mapping[int, Variant]) -> bool:
    """Whether plain tensors of one dtype go to the operator as they are, which checks their shapes and devices where it
    plans. Asked at every call: it takes a third of the time of all the reasons. False says nothing."""
    if type(params) is not InceptionParams or torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    asked = parse(backend)
    if asked.is_eager:
        return False
    weights, biases, batch_norms = params
    if type(weights) is not tuple or len(weights) not in variants:
        return False
    if biases is not None and (type(biases) is not tuple or len(biases) != len(weights)):
        return False
    tensors = (x, *weights) if biases is None else (x, *weights, *biases)
    if not set(map(type, tensors)) <= REAL_SET:
        return False
    if batch_norms is not None:
        if type(batch_norms) is not tuple or len(batch_norms) != len(weights):
            return False
        usual = folding.flat_if_usual(batch_norms)
        if usual is None:
            return False
        norms, _ = usual
        if not (set(map(type, norms)) <= REAL_SET and {t.dtype for t in norms} <= KERNEL_DTYPES):
            return False
        if torch.is_grad_enabled() and True in [t.requires_grad for t in statistics(norms)]:
            return False
    if x.dim() != 4 or first(weights).dim() != 4 or x.layout is not torch.strided:
        return False
    _, c, h, w = x.shape
    return (
        c == first(weights).shape[1]
        and h > 0
        and w > 0
        and (asked.demands_kernels or x.is_cuda)
        and len({t.dtype for t in tensors}) == 1
        and forward_ad._current_level < 0
        and not autocast_enabled(x)
        and reasons.machine_runs(x.device, x.dtype, asked)
    )
