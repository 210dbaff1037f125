"""The functional interface: checks a call, decides between kernels and eager PyTorch, and holds the autograd Function.

The Function stands outside the operators, so that torch.func and torch.compile see an ordinary one.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from inception_fused import batching as _batching  # noqa: F401  registers the operators and their rules
from inception_fused import dispatch, flops, gradients, ops
from inception_fused.errors import FallbackWarning, InceptionInputError, KernelError
from inception_fused.reference import (
    ACTIVATIONS,
    CONV_NAMES,
    InceptionParams,
    check_activation,
    inception_reference,
)
from inception_fused.shapes import check_device, check_parameter_shapes, named_parameters

flops.register()

PLAIN_TENSORS = (Tensor, Parameter, FakeTensor)
PLAIN_SET = frozenset(PLAIN_TENSORS)
REAL_SET = frozenset((Tensor, Parameter))


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
        if torch.compiler.is_exporting():
            weights, biases = list(params.weights), list(params.biases or ())
            return torch.ops.inception_fused._exported.default(x, weights, biases, activation == "relu", wish)
    return _call(x, params.weights, params.biases or (), activation == "relu", wish)


def _call(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor], relu: bool, wish: str) -> Tensor:
    """The operator for inference, or the Function where gradients are wanted, for arguments that were checked."""
    tensors = (*weights, *biases)
    needs = [t.requires_grad for t in (x, *tensors)] if torch.is_grad_enabled() else []
    if needs and _transforming():
        # A tensor that vmap has wrapped does not say whether gradients of what it wraps are wanted.
        needs = [True] * len(needs)
    if not any(needs):
        # The overload by its name: finding it costs 2 us a call.
        return torch.ops.inception_fused._infer.default(x, list(weights), list(biases), relu, wish)
    needs += [False] * (gradients.NUM_INPUTS - len(needs))
    return FusedInceptionFunction.apply(x, relu, wish, gradients.saves(needs, relu), *tensors)[0]


# What a graph of torch.export keeps. An exported Function would be its bare operator: a forward that saves what nobody
# reads, and no gradients. This one decides anew at every call, and tracing after the export looks inside.
ops.library.define("_exported(Tensor x, Tensor[] weights, Tensor[] biases, bool relu, str backend) -> Tensor")
ops.library.impl("_exported", _call, "CompositeImplicitAutograd")


class FusedInceptionFunction(torch.autograd.Function):
    """Autograd of one block: ``apply(x, relu, wish, (save_r, save_bits, save_taps), *weights, *biases)``.

    Returns (y, r, bits, taps) as the operator does; only y is differentiable. Saved for backward: x, r, one bit per
    element of y, four bits per element of x; never y, so that ``ReLU(inplace=True)`` may follow the block.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, relu: bool, wish: str, save: tuple[bool, bool, bool], *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return torch.ops.inception_fused._forward.default(x, list(tensors[:6]), list(tensors[6:]), relu, *save, wish)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        x, ctx.relu, ctx.wish, save, *tensors = inputs
        _, r, bits, taps = output
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        wanted = gradients.saves(needs + [False] * (gradients.NUM_INPUTS - len(needs)), ctx.relu)
        if any(w and not s for w, s in zip(wanted, save, strict=True)):
            raise InceptionInputError(f"save: got {save}, wants {wanted} (r, bits, taps) for the gradients asked for")
        ctx.mark_non_differentiable(r, bits, taps)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, r, bits, taps, *tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
        x, r, bits, taps, *tensors = ctx.saved_tensors
        needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[4:]]
        if dy is None:
            return (None,) * (4 + len(tensors))
        if torch.is_grad_enabled() or _is_batched(dy):
            grads = _differentiable_backward(dy, (x, *tensors), needs, ctx.relu)
        else:
            grads = _fused_backward(dy, x, r, bits, taps, tensors, needs, ctx.relu, ctx.wish)
        return (grads[0], None, None, None, *grads[1:])


# apply() asks for the signature at every call: 10 us of the host, unless a function carries it.
FusedInceptionFunction.forward.__signature__ = inspect.signature(FusedInceptionFunction.forward)


def _fused_backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    bits: Tensor,
    taps: Tensor,
    tensors: Sequence[Tensor],
    needs: list[bool],
    relu: bool,
    wish: str,
) -> list[Tensor | None]:
    needs = needs + [False] * (gradients.NUM_INPUTS - len(needs))
    weights, biases = list(tensors[:6]), list(tensors[6:])
    grads = torch.ops.inception_fused._backward.default(dy, x, r, bits, taps, weights, biases, relu, needs, wish)
    return [g if need else None for g, need in zip(grads, needs, strict=True)][: 1 + len(tensors)]


def _differentiable_backward(
    dy: Tensor, inputs: tuple[Tensor, ...], needs: list[bool], relu: bool
) -> list[Tensor | None]:
    """The gradients by recomputing the block with the reference, for whoever differentiates them again."""
    wanted = [i for i, need in enumerate(needs) if need]

    def block(*some: Tensor) -> Tensor:
        given = list(inputs)
        for i, t in zip(wanted, some, strict=True):
            given[i] = t
        x, *tensors = (t.to(inputs[0].dtype) for t in given)
        params = InceptionParams(tuple(tensors[:6]), tuple(tensors[6:]) or None)
        return inception_reference(x, params, "relu" if relu else None)

    with torch.autocast(dy.device.type, enabled=False):
        found = torch.func.vjp(block, *(inputs[i] for i in wanted))[1](dy)
    grads: list[Tensor | None] = [None] * len(inputs)
    for i, g in zip(wanted, found, strict=True):
        grads[i] = g
    return grads


def eager(x: Tensor, reason: str, wish: str, run: Any) -> Tensor:
    """``run`` on x in channels_last memory, with a FallbackWarning on CUDA or a KernelError where kernels are demanded.

    The warning stays away where eager was asked for, and on other devices, whose path it is.
    """
    if dispatch.demands_kernels(wish):
        raise KernelError(f'backend "{wish}" demands kernels that cannot run: {reason}')
    if x.is_cuda and wish != "eager" and not torch.compiler.is_compiling():
        warnings.warn(f"the Inception block runs in eager PyTorch: {reason}", FallbackWarning, stacklevel=4)
    return _channels_last(run(_channels_last(x)))


def _channels_last(x: Tensor) -> Tensor:
    """x in channels_last memory. Under vmap by permutation, since ``contiguous(memory_format=...)`` is not there;
    elsewhere not, since a view as output would forbid in-place operations that PyTorch's block allows."""
    if not _transforming():
        return x.contiguous(memory_format=torch.channels_last)
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def _is_usual(x: object, params: object, wish: str) -> bool:
    """Whether plain tensors of one dtype go to the operator as they are, which checks their shapes and devices where it
    plans. Asked at every call: it takes a third of the time of all the reasons. False says nothing."""
    if type(params) is not InceptionParams or wish == "eager" or torch.compiler.is_compiling():
        return False
    weights, biases = params
    if type(weights) is not tuple or len(weights) != 6:
        return False
    if biases is not None and (type(biases) is not tuple or len(biases) != 6):
        return False
    tensors = (x, *weights) if biases is None else (x, *weights, *biases)
    if not set(map(type, tensors)) <= REAL_SET:
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
        and not _autocast_enabled(x)
        and (dispatch.refusal(wish, device, dtype) if demanded else dispatch.obstacle(device, dtype)) is None
    )


def _obstacle(x: Tensor, params: InceptionParams, dtype: torch.dtype, wish: str) -> str | None:
    """Why this call takes the eager path; None where the operator takes it."""
    if wish == "eager":
        return "backend is eager"
    tensors = (x, *params.weights, *(params.biases or ()))
    if not set(map(type, tensors)) <= PLAIN_SET:
        kinds = {type(t).__name__ for t in tensors if type(t) not in PLAIN_TENSORS}
        return f"tensor subclass {', '.join(sorted(kinds))}"
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
    """Whether a torch.func transform (vmap, grad, ...) is running. torch.compile traces those itself."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is not None


def _is_batched(t: Tensor) -> bool:
    """Whether autograd hands over several gradients at once (``is_grads_batched=True``)."""
    return not torch.compiler.is_compiling() and (
        torch._C._functorch.is_batchedtensor(t) or torch._C._functorch.is_legacy_batchedtensor(t)
    )


def compute_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or autocast's where it is on; autocast leaves float64 alone, as in PyTorch."""
    if _autocast_enabled(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def _autocast_enabled(x: Tensor) -> bool:
    """Asking about a device without autocast, such as meta, raises."""
    kind = x.device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def check_call(x: Tensor, params: InceptionParams, activation: str | None) -> None:
    """Raise InceptionInputError unless the arguments of :func:`inception` fit together."""
    check_activation(activation)
    if not torch.compiler.is_compiling() and _fits(x, params):
        return
    if not isinstance(params, InceptionParams):
        raise InceptionInputError(f"params: got {type(params).__name__}, wants InceptionParams(weights, biases)")
    weights, biases = params
    _check_tensors("params.weights", weights)
    if biases is not None:
        _check_tensors("params.biases", biases)
    check_parameter_shapes(weights, biases or ())
    check_input(x, weights[0].shape[1])
    check_device(x, weights, biases or ())
    autocast = _autocast_enabled(x)
    for name, t in named_parameters(weights, biases or ()):
        if t.dtype != x.dtype and not autocast:
            raise InceptionInputError(
                f"x: got {x.dtype}, {name} is {t.dtype}; wants one dtype for both: use x.to({t.dtype}), or autocast"
            )


def _fits(x: object, params: object) -> bool:
    """Whether a call of plain tensors of one dtype is right: the check of every call, a third of the time of finding
    out what is wrong. False says nothing."""
    if type(x) not in PLAIN_TENSORS or type(params) is not InceptionParams:
        return False
    weights, biases = params
    if type(weights) is not tuple or len(weights) != 6:
        return False
    if biases is not None and (type(biases) is not tuple or len(biases) != 6):
        return False
    tensors = weights if biases is None else weights + biases
    dtype, device = x.dtype, x.device
    try:
        return (
            set(map(type, tensors)) <= PLAIN_SET
            and {t.dtype for t in tensors} == {dtype}
            and {t.device for t in tensors} == {device}
            and dtype.is_floating_point
            and x.layout is torch.strided
            and _shapes_fit(x.shape[1:], *[t.shape for t in tensors])
        )
    except TypeError:
        # A tracer's symbolic sizes cannot be looked up.
        return False


@lru_cache(maxsize=256)
def _shapes_fit(image: tuple[int, ...], *shapes: tuple[int, ...]) -> bool:
    """Whether x [N, *image], six weights and six biases or none make a block of images that are not empty."""
    if len(image) != 3 or len(shapes) not in (6, 12) or any(len(shape) != 4 or 0 in shape for shape in shapes[:6]):
        return False
    w1, w2_reduce, w2, w3_reduce, w3, w4 = shapes[:6]
    pointwise = (image[0], 1, 1)
    return (
        0 not in image
        and w1[1:] == w2_reduce[1:] == w3_reduce[1:] == w4[1:] == pointwise
        and w2[1:] == (w2_reduce[0], 3, 3)
        and w3[1:] in ((w3_reduce[0], 5, 5), (w3_reduce[0], 3, 3))
        and all(b == w[:1] for w, b in zip(shapes[:6], shapes[6:], strict=False))
    )


def _check_tensors(name: str, tensors: object) -> None:
    if not isinstance(tensors, (tuple, list)) or len(tensors) != 6:
        got = f"{len(tensors)} items" if isinstance(tensors, (tuple, list)) else type(tensors).__name__
        raise InceptionInputError(f"{name}: got {got}, wants six tensors in the order {', '.join(CONV_NAMES)}")
    for conv, t in zip(CONV_NAMES, tensors, strict=True):
        if not isinstance(t, Tensor):
            raise InceptionInputError(f"{name}: got {type(t).__name__} for {conv}, wants a tensor")
        if not t.is_floating_point():
            raise InceptionInputError(f"{name}: got {t.dtype} for {conv}, wants a floating point dtype")


def check_input(x: object, channels: int | str = "C") -> None:
    """Raise InceptionInputError unless x is [N, channels, H, W], floating and dense; "C" stands for any number."""
    if not isinstance(x, Tensor):
        raise InceptionInputError(f"x: got {type(x).__name__}, wants a tensor [N, {channels}, H, W]")
    shape = tuple(x.shape)
    if len(shape) != 4:
        hint = "; add the batch dimension with x.unsqueeze(0)" if len(shape) == 3 else ""
        raise InceptionInputError(f"x: got {len(shape)} dimensions {shape}, wants [N, {channels}, H, W]{hint}")
    if shape[1] != channels and channels != "C":
        hint = "; x looks like NHWC, wants x.permute(0, 3, 1, 2)" if shape[3] == channels else ""
        raise InceptionInputError(f"x: got {shape[1]} channels in shape {shape}, wants {channels}{hint}")
    if shape[2] < 1 or shape[3] < 1:
        raise InceptionInputError(f"x: got an empty image {shape[2]}x{shape[3]}, wants at least 1x1")
    if not x.is_floating_point():
        raise InceptionInputError(f"x: got {x.dtype}, wants a floating point dtype such as torch.float32")
    if x.layout is not torch.strided:
        raise InceptionInputError(f"x: got layout {x.layout}, wants a dense tensor: x.to_dense()")
