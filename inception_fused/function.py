"""The functional interface: checks a call, decides between kernels and eager PyTorch, and holds the autograd Function.

The Function stands outside the operators, so that torch.func and torch.compile see an ordinary one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from inception_fused import batching as _batching  # noqa: F401  registers the operators and their rules
from inception_fused import checking, dispatch, flops, folding, gradients, masked, ops, saved
from inception_fused.calls import PLAIN_SET, PLAIN_TENSORS, autocast_enabled, check_call, compute_dtype, is_plain
from inception_fused.errors import FallbackWarning, InceptionInputError, KernelError
from inception_fused.kernels.views import accumulator_of
from inception_fused.reference import ACTIVATIONS, InceptionParams, inception_reference

flops.register()

REAL_SET = frozenset((Tensor, Parameter))
KERNEL_DTYPES = frozenset(dispatch.KERNEL_DTYPES)


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
    wish = dispatch.current()
    if activation not in ACTIVATIONS or not _is_usual(x, params, wish):
        check_call(x, params, activation)
        dtype = compute_dtype(x)
        reason = _obstacle(x, params, dtype, wish)
        if reason is not None:
            return eager(x, reason, wish, lambda x: inception_reference(x, params, activation))
        if x.dtype != dtype:
            x = x.to(dtype)
        if _outlives_this_call():
            weights, biases = list(params.weights), list(params.biases or ())
            more = folding.flatten(params.batch_norms) if params.batch_norms is not None else ()
            return torch.ops.inception_fused._exported(x, weights, biases, activation == "relu", wish, *more)
    norms, eps = folding.flatten(params.batch_norms)
    return _call(x, params.weights, params.biases or (), activation == "relu", wish, norms, eps)


def _call(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    relu: bool,
    wish: str,
    norms: Sequence[Tensor] = (),
    eps: Sequence[float] = (),
) -> Tensor:
    """The operator for inference, or the Function where gradients are wanted, for arguments that were checked."""
    tensors = (*weights, *biases, *norms)
    needs = [t.requires_grad for t in (x, *tensors)] if torch.is_grad_enabled() else []
    if needs and _transforming():
        # A tensor that vmap has wrapped does not say whether gradients of what it wraps are wanted.
        needs = [True] * len(needs)
    if not any(needs):
        # The overload by its name: finding it costs 2 us a call.
        infer = torch.ops.inception_fused._infer
        if norms:
            y = infer.norms(x, list(weights), list(biases), relu, wish, list(norms), list(eps))
        else:
            y = infer.default(x, list(weights), list(biases), relu, wish)
    else:
        save = gradients.saves(folding.operator_needs(needs, eps), relu)
        if biases and norms:
            tensors = (*weights, *folding.with_copies(biases, norms, needs[13:]), *norms)
        y = FusedInceptionFunction.apply(x, relu, wish, save, *tensors, *((tuple(eps),) if eps else ()))[0]
    if checking.on:
        params = InceptionParams(tuple(weights), tuple(biases) or None, folding.unflatten(norms, eps))
        checking.check_forward(y, x, params, "relu" if relu else None)
    return y


def _exported(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    relu: bool,
    wish: str,
    norms: Sequence[Tensor] = (),
    eps: Sequence[float] = (),
) -> Tensor:
    """What a graph keeps: :func:`_call`, or where torch.func or forward mode differentiates the reference, of whose
    operators PyTorch knows every derivative. Raises KernelError there where the backend demands kernels."""
    biases = biases or ()
    if not _transforming() and forward_ad._current_level < 0:
        return _call(x, weights, biases, relu, wish, norms, eps)
    if dispatch.demands_kernels(wish):
        raise KernelError(
            f'backend "{wish}" demands kernels that cannot run: inside a compiled, exported or traced graph torch.func '
            "differentiates PyTorch's own operators; call it on the module outside of torch.compile, or compile, "
            'export or trace under backend("auto")'
        )
    with torch.autocast(x.device.type, enabled=False):
        return _channels_last(_reference(x, (*weights, *biases, *norms), relu, eps))


for _overload in ("", ".norms"):
    ops.library.impl(f"_exported{_overload}", _exported, "CompositeImplicitAutograd")


class FusedInceptionFunction(torch.autograd.Function):
    """Autograd of one block: ``apply(x, relu, wish, (save_r, save_bits, save_taps), *weights, *biases)``.

    With BatchNorm ``apply(..., *weights, *biases, *norms, eps)``: norms of folding.flatten(), a tuple of eps.

    Returns (y, r, bits, taps) as the operator does; only y is differentiable. Saved for backward, as far as the wanted
    gradients read them: x, r, one bit per element of y, four bits per element of x, parameters; never y, so that
    ``ReLU(inplace=True)`` may follow the block, nor a bias, which may be changed before the backward (saved.py).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, relu: bool, wish: str, save: tuple[bool, bool, bool], *tensors: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        tensors, eps = _eps_of(tensors)
        weights, biases, norms = folding.split(tensors, eps)
        operator = torch.ops.inception_fused._forward
        if eps:
            return operator.norms(x, weights, biases, relu, *save, wish, norms, list(eps))
        return operator.default(x, weights, biases, relu, *save, wish)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.relu, ctx.wish, save, *tensors = inputs
        tensors, ctx.eps = _eps_of(tensors)
        _, r, bits, taps = output
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4 : 4 + len(tensors)]]
        if not all(save):
            wanted = gradients.saves(folding.operator_needs(needs, ctx.eps), ctx.relu)
            if any(w and not s for w, s in zip(wanted, save, strict=True)):
                raise InceptionInputError(
                    f"save: got {save}, wants {wanted} (r, bits, taps) for the gradients asked for"
                )
        ctx.mark_non_differentiable(r, bits, taps)
        ctx.set_materialize_grads(False)
        saved.keep(ctx, x, (r, bits, taps), tensors, needs, everything=_transforming())

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        *given, weights, vectors = saved.kept(ctx)
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4 : 10 + len(vectors)]]
        if dy is None:
            return (None,) * len(ctx.needs_input_grad)
        again = torch.is_grad_enabled() or forward_ad._current_level >= 0
        if again or _is_batched(dy) or folding.wants_statistics(needs, ctx.eps):
            tensors = [*weights, *saved.with_unread(ctx, vectors, needs[7:])]
            grads = masked.differentiable_backward(dy, *given, tensors, needs, ctx.relu, ctx.eps)
        elif ctx.eps:
            grads = _folded_backward(dy, *given, weights, vectors, ctx.dtypes, needs, ctx.relu, ctx.wish, ctx.eps)
        else:
            grads = _fused_backward(dy, *given, weights, ctx.dtypes, needs, ctx.relu, ctx.wish)
        return (grads[0], None, None, None, *grads[1:], *((None,) if ctx.eps else ()))


# apply() asks for the signature at every call: 10 us of the host, unless a function carries it.
FusedInceptionFunction.forward.__signature__ = inspect.signature(FusedInceptionFunction.forward)


def _fused_backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    bits: Tensor,
    taps: Tensor,
    weights: list[Tensor],
    bias_dtypes: Sequence[torch.dtype],
    needs: list[bool],
    relu: bool,
    wish: str,
) -> list[Tensor | None]:
    needs = needs + [False] * (gradients.NUM_INPUTS - len(needs))
    names = saved.dtype_names(bias_dtypes)
    grads = torch.ops.inception_fused._backward.default(dy, x, r, bits, taps, weights, names, relu, needs, wish)
    if checking.on:
        checking.check_gradients(grads, dy, x, r, bits, taps, weights, relu, needs)
    return [g if need else None for g, need in zip(grads, needs, strict=True)][: 7 + len(names)]


def _folded_backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    bits: Tensor,
    taps: Tensor,
    weights: list[Tensor],
    vectors: Sequence[Tensor | None],
    dtypes: Sequence[torch.dtype],
    needs: list[bool],
    relu: bool,
    wish: str,
    eps: Sequence[float],
) -> list[Tensor | None]:
    """:func:`_fused_backward` of the block into which BatchNorm is folded, and the parameters' gradients from those."""
    weights, biases, norms = folding.split([*weights, *vectors], eps)
    folded = folding.Folded.of(weights, norms, eps, x.dtype)
    shifts = [accumulator_of(x.dtype)] * 6
    dx, *found = _fused_backward(
        dy, x, r, bits, taps, folded.weights, shifts, folding.operator_needs(needs, eps), relu, wish
    )  # fmt: skip
    return [dx, *folded.gradients(found, weights, biases, norms, dtypes, needs[1:])]


def _reference(x: Tensor, tensors: Sequence[Tensor], relu: bool, eps: Sequence[float]) -> Tensor:
    """The reference in x's dtype. tensors: weights, biases and norms in one list."""
    weights, biases, norms = folding.split(tensors, eps)
    weights, biases = (tuple([t.to(x.dtype) for t in parameters]) for parameters in (weights, biases))
    params = InceptionParams(weights, biases or None, folding.unflatten(norms, eps))
    return inception_reference(x, params, "relu" if relu else None)


def eager(x: Tensor, reason: str, wish: str, run: Any, *, quiet: bool = False) -> Tensor:
    """``run`` on x in channels_last memory, with a FallbackWarning on CUDA or a KernelError where kernels are demanded.

    The warning stays away where eager was asked for, on other devices, whose path it is, and where the reason is the
    usual state of things (``quiet``).
    """
    if dispatch.demands_kernels(wish):
        raise KernelError(f'backend "{wish}" demands kernels that cannot run: {reason}')
    if x.is_cuda and wish != "eager" and not quiet and not torch.compiler.is_compiling():
        warnings.warn(f"the Inception block runs in eager PyTorch: {reason}", FallbackWarning, stacklevel=4)
    y = run(_channels_last(x))
    return _channels_last(y) if isinstance(y, Tensor) and y.dim() == 4 else y


def _channels_last(x: Tensor) -> Tensor:
    """x in channels_last memory. Under vmap by permutation, since ``contiguous(memory_format=...)`` is not there;
    elsewhere not, since a view as output would forbid in-place operations that PyTorch's block allows."""
    if not _transforming():
        return x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _eps_of(tensors: Sequence[Any]) -> tuple[Sequence[Tensor], tuple[float, ...]]:
    """(tensors, eps) of the Function's last arguments, eps empty where there is no BatchNorm."""
    return (tensors[:-1], tensors[-1]) if type(tensors[-1]) is tuple else (tensors, ())


def _is_usual(x: object, params: object, wish: str) -> bool:
    """Whether plain tensors of one dtype go to the operator as they are, which checks their shapes and devices where it
    plans. Asked at every call: it takes a third of the time of all the reasons. False says nothing."""
    if type(params) is not InceptionParams or wish == "eager" or torch.compiler.is_compiling():
        return False
    if torch._C._get_tracing_state() is not None:
        return False
    weights, biases, batch_norms = params
    if type(weights) is not tuple or len(weights) != 6:
        return False
    if biases is not None and (type(biases) is not tuple or len(biases) != 6):
        return False
    tensors = (x, *weights) if biases is None else (x, *weights, *biases)
    if not set(map(type, tensors)) <= REAL_SET:
        return False
    if batch_norms is not None:
        if not is_plain(batch_norms):
            return False
        norms, _ = folding.flatten(batch_norms)
        if not (set(map(type, norms)) <= REAL_SET and {t.dtype for t in norms} <= KERNEL_DTYPES):
            return False
        if torch.is_grad_enabled() and True in [t.requires_grad for t in norms[:12]]:
            return False
    if x.dim() != 4 or weights[0].dim() != 4 or x.layout is not torch.strided:
        return False
    demanded = dispatch.demands_kernels(wish)
    (_, c, h, w), dtype, device = x.shape, x.dtype, x.device
    return (
        c == weights[0].shape[1]
        and h > 0
        and w > 0
        and (demanded or x.is_cuda)
        and len({t.dtype for t in tensors}) == 1
        and forward_ad._current_level < 0
        and not autocast_enabled(x)
        and (dispatch.refusal(wish, device, dtype) if demanded else dispatch.obstacle(device, dtype)) is None
    )


def _obstacle(x: Tensor, params: InceptionParams, dtype: torch.dtype, wish: str) -> str | None:
    """Why this call takes the eager path; None where the operator takes it."""
    if wish == "eager":
        return "backend is eager"
    batch_norms = params.batch_norms
    norms = [t for norm in batch_norms for t in norm[:4] if t is not None] if batch_norms is not None else []
    tensors = (x, *params.weights, *(params.biases or ()), *norms)
    if not set(map(type, tensors)) <= PLAIN_SET:
        kinds = {type(t).__name__ for t in tensors if type(t) not in PLAIN_TENSORS}
        return f"tensor subclass {', '.join(sorted(kinds))}"
    if batch_norms is not None:
        if not folding.is_uniform(batch_norms):
            return "some BatchNorms have gamma or beta and some have not"
        if torch.is_grad_enabled() and any(norm.mean.requires_grad or norm.var.requires_grad for norm in batch_norms):
            return "a gradient of BatchNorm's mean or var is wanted"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation"
    if not x.is_cuda and not dispatch.demands_kernels(wish):
        return f"x is on {x.device}"
    if torch.compiler.is_compiling():
        # The operator asks again at run time, where the answer depends on the machine and cannot be traced.
        return None
    if dispatch.demands_kernels(wish):
        return dispatch.refusal(wish, x.device, dtype)
    return dispatch.obstacle(x.device, dtype)


def _transforming() -> bool:
    """Whether a torch.func transform (vmap, grad, ...) is running, or is being traced by torch.compile.

    In the words that Dynamo folds rightly: to it a stack of interpreters is never empty.
    """
    return torch._C._are_functorch_transforms_active()


def _outlives_this_call() -> bool:
    """Whether a graph keeps what this call does, of which gradients may be asked later or in another way than now.

    A Function in a graph of torch.export or torch.jit.trace is its bare operator, which has none; in one of
    torch.compile under a transform it has no rule for vmap, and torch.func looks through it.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or _transforming()
    return torch._C._get_tracing_state() is not None


def _is_batched(t: Tensor) -> bool:
    """Whether autograd hands over several gradients at once (``is_grads_batched=True``)."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)
    )
