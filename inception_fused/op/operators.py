"""The operators behind the block: schemas, fake implementations, device implementations.

``inception_fused::_infer`` (y alone, where nothing is saved for a backward: fewer outputs cost the host less),
``::_forward`` and ``::_backward`` are functional (nothing given is written) and private: their schemas may change in
any release. The first two have an overload ``norms``: BatchNorm in eval mode behind every convolution. An empty list
may arrive as None, as AOTInductor passes it. Their rules for torch.func are in batching.py. Autograd is not registered
here but lives in autograd.py, outside the operators, which refuse what they would have to differentiate.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inception_fused.block.call_types import BackwardCall, ForwardCall, Saved, Saves
from inception_fused.block.checks import check_device, check_operands, check_saved
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import BlockTensors, Needs
from inception_fused.block.views import ChannelSlice, row_stride
from inception_fused.op import dispatch, forward, gradients, reasons
from inception_fused.op.backends import parse
from inception_fused.op.calls import refuse_derivatives
from inception_fused.op.launcher import Launcher
from inception_fused.op.saved import dtype_names, dtypes_of
from inception_fused.plan import choice, launches
from inception_fused.runtime import replay

library = torch.library.Library("inception_fused", "DEF")
for _overload, _more in (("", ""), (".norms", ", Tensor[] norms, float[] eps")):
    # Not defaults: a list of tensors has none but None, and vmap does not look for batches in an optional list.
    library.define(
        f"_infer{_overload}(Tensor x, Tensor[] weights, Tensor[] biases, bool relu, str backend{_more}) -> Tensor"
    )
    library.define(
        f"_forward{_overload}(Tensor x, Tensor[] weights, Tensor[] biases, bool relu, bool save_r, bool save_bits, "
        f"bool save_taps, str backend{_more}) -> (Tensor y, Tensor r, Tensor bits, Tensor taps)"
    )
    # What a graph keeps that may be differentiated later; implemented in autograd.py, out of the others.
    library.define(
        f"_exported{_overload}(Tensor x, Tensor[] weights, Tensor[] biases, bool relu, str backend{_more}) -> Tensor"
    )
library.define(
    "_backward(Tensor dy, Tensor x, Tensor r, Tensor bits, Tensor taps, Tensor[] weights, str[] bias_dtypes, "
    "bool relu, bool[] needs, str backend) -> Tensor[]"
)


SAVES_NOTHING = Saves(False, False, False)


def fresh_output(x: Tensor, shape: BlockShape) -> Tensor:
    """Memory for y: channels_last whatever came in."""
    size = (shape.n, shape.k, shape.h, shape.w)
    return torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def outputs(x: Tensor, shape: BlockShape, saves: Saves) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fresh y, r, bits, taps: the one place that decides shapes and strides, for real and for fake tensors.

    r, bits and taps are [M, width], or [0] where they are not asked for.
    """
    y, rows = fresh_output(x, shape), shape.gemm_m
    r = x.new_empty((rows, shape.r_width) if saves.r else (0,))
    bits = x.new_empty((rows, shape.bits_width) if saves.bits else (0,), dtype=torch.uint8)
    taps = x.new_empty((rows, shape.taps_width) if saves.taps else (0,), dtype=torch.uint8)
    return y, r, bits, taps


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    relu: bool,
    save_r: bool,
    save_bits: bool,
    save_taps: bool,
    backend: str,
    norms: Sequence[Tensor] = (),
    eps: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block.

    x: [N, C, H, W], any strides. weights: one [K, C, R, R] a convolution, of any floating dtype; biases: one each or
    none.
    norms, eps: BatchNorm in eval mode behind every convolution as folding.flatten() gives it, or none.
    relu: whether every convolution is followed by ReLU. The saves are those of gradients.saves(). Kernels compute in
    x's dtype. Returns (y, r, bits, taps) as outputs() describes them.
    """
    biases, norms, eps = biases or (), norms or (), eps or ()
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_forward", (x, *weights, *biases, *norms))
    x = as_rows(x)
    with current_device(x):
        return tuple(
            replay.replayed(
                lambda: _planned_forward(
                    ForwardCall(
                        x, BlockTensors(weights, biases, norms, eps), relu, Saves(save_r, save_bits, save_taps), backend
                    )
                ),
                (x, *weights, *biases, *norms),
                *("forward", relu, save_r, save_bits, save_taps, backend, strict(x), len(norms), tuple(eps)),
            )
        )


def _infer(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    relu: bool,
    backend: str,
    norms: Sequence[Tensor] = (),
    eps: Sequence[float] = (),
) -> Tensor:
    """y of :func:`_forward`."""
    biases, norms, eps = biases or (), norms or (), eps or ()
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_infer", (x, *weights, *biases, *norms))
    x = as_rows(x)
    with current_device(x):
        return replay.replayed(
            lambda: _planned_forward(
                ForwardCall(x, BlockTensors(weights, biases, norms, eps), relu, SAVES_NOTHING, backend)
            )[:1],
            (x, *weights, *biases, *norms),
            *("infer", relu, backend, strict(x), len(norms), tuple(eps)),
        )[0]


def _planned_forward(call: ForwardCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_forward` for x that is a matrix of rows, with every check and decision made anew."""
    x, tensors, _, saves, backend = call
    check_operands(x, tensors)
    shape, stride = BlockShape.of(x, tensors.weights), row_stride(x)
    y, *more = outputs(x, shape, saves)
    if shape.gemm_m == 0:
        return y, *more
    chosen = chosen_forward(x, shape, backend)
    saved = Saved(*more)
    if not saves.r:
        saved = saved._replace(r=x.new_empty((shape.gemm_m, shape.r_width)))
    elif shape.r_padded:
        # Padding channels, which no kernel writes, would leave the operator with random output.
        saved.r.zero_()
    # The kernels' dtype is x's; autocast, if on, has already been obeyed by the caller.
    with torch.autocast(x.device.type, enabled=False):
        launcher = Launcher(chosen, ChannelSlice(x, stride, 0, shape.c), shape, x.dtype)
        forward.launch_forward(launcher, call, y, saved)
    return y, *more


def chosen_forward(x: Tensor, shape: BlockShape, backend: str) -> dict[str, str]:
    """The implementation of each kernel of a forward; warns where one is ATen's that nobody asked for. x: a matrix of
    rows. Raises KernelError where kernels are demanded that cannot run."""
    chosen = {
        kernel: c for kernel, c in dispatch.choices(backend, x.device, x.dtype).items() if kernel in choice.FORWARD
    }
    asked, too_large = parse(backend), choice.exceeds_int32(shape, row_stride(x) or shape.c)
    if too_large:
        if asked.demands_kernels:
            raise reasons.refused(backend, reasons.TOO_LARGE)
        chosen = dict.fromkeys(chosen, "eager")
    if x.is_cuda and any(c == "eager" and not asked.asks_eager(kernel) for kernel, c in chosen.items()):
        reason = reasons.first(x.device, x.dtype, too_large=too_large)
        # None where it has passed since the choice: the next call takes the kernels.
        if reason is not None:
            reasons.warn(reason.text, stacklevel=3)
    return chosen


def chosen_backward(x: Tensor, shape: BlockShape, backend: str) -> dict[str, str]:
    """The implementation of each kernel of a backward, whose forward has warned or refused."""
    chosen = dispatch.choices(backend, x.device, x.dtype)
    return dict.fromkeys(chosen, "eager") if choice.exceeds_int32(shape, row_stride(x) or shape.c) else chosen


def strict(x: Tensor) -> bool:
    """Whether x asks for fp32 without TF32, on which the choice of kernels depends."""
    return x.dtype == torch.float32 and not reasons.tf32_allowed()


def as_rows(x: Tensor) -> Tensor:
    """x, or a copy in channels_last memory where x is no matrix of rows."""
    return x if row_stride(x) is not None else x.contiguous(memory_format=torch.channels_last)


def current_device(x: Tensor) -> torch.cuda.device | nullcontext:
    """Triton launches on the current device, whatever its arguments' device is."""
    return (
        nullcontext() if not x.is_cuda or x.device.index == torch.cuda.current_device() else torch.cuda.device(x.device)
    )


def _backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    bits: Tensor,
    taps: Tensor,
    weights: Sequence[Tensor],
    bias_dtypes: Sequence[str],
    relu: bool,
    needs: Sequence[bool],
    backend: str,
) -> list[Tensor]:
    """The gradients of gradients.block_backward(); an empty tensor stands where one is not wanted.

    bias_dtypes: saved.dtype_names() of the biases or none. Not the biases, so that a compiled graph does not keep them
    for this. x and weights: where no value is read (saved.reads()), anything of their shapes and dtype.
    """
    bias_dtypes = bias_dtypes or ()
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_backward", (dy, x, *weights))
    x = as_rows(x)
    with current_device(x):
        return list(
            replay.replayed(
                lambda: _planned_backward(
                    BackwardCall(
                        dy, x, Saved(r, bits, taps), weights, dtypes_of(bias_dtypes), relu, Needs.of(needs), backend
                    )
                ),
                (dy, x, r, bits, taps, *weights),
                *("backward", relu, tuple(needs), backend, strict(x), tuple(bias_dtypes)),
            )
        )


def _planned_backward(call: BackwardCall) -> list[Tensor]:
    """:func:`_backward` for x that is a matrix of rows, with every check and decision made anew."""
    x, needs = call.x, call.needs
    check_operands(x, BlockTensors(call.weights))
    shape = BlockShape.of(x, call.weights)
    check_saved(shape, call.dy, x, call.saved, gradients.saves(needs, call.relu))
    chosen = chosen_backward(x, shape, call.backend)
    with torch.autocast(x.device.type, enabled=False):
        grads = gradients.block_backward(call, chosen)
    return [g if g is not None else x.new_empty(0) for g in grads]


def refuse_traced(operator: str, tensors: Sequence[Tensor]) -> None:
    """refuse_derivatives() of fake tensors, unless Inductor lowers a graph in which nothing is differentiated any more:
    it asks for shapes with the parameters themselves where they are constants, as in a package of AOTInductor."""
    virtualized = sys.modules.get("torch._inductor.virtualized")
    if virtualized is None or isinstance(virtualized.V.graph, virtualized.NullHandler):
        refuse_derivatives(operator, tensors)


@torch.library.register_fake("inception_fused::_infer.norms", lib=library)
@torch.library.register_fake("inception_fused::_infer", lib=library)
def _fake_infer(x, weights, biases, relu, backend, norms=(), eps=()):
    refuse_traced("_infer", (x, *weights, *biases, *norms))
    # One tensor on the meta device brings the others here.
    check_device(x, BlockTensors(weights, biases, norms))
    return outputs(x, BlockShape.of(x, weights), SAVES_NOTHING)[0]


@torch.library.register_fake("inception_fused::_forward.norms", lib=library)
@torch.library.register_fake("inception_fused::_forward", lib=library)
def _fake_forward(x, weights, biases, relu, save_r, save_bits, save_taps, backend, norms=(), eps=()):
    refuse_traced("_forward", (x, *weights, *biases, *norms))
    check_device(x, BlockTensors(weights, biases, norms))
    return outputs(x, BlockShape.of(x, weights), Saves(save_r, save_bits, save_taps))


@torch.library.register_fake("inception_fused::_backward", lib=library)
def _fake_backward(dy, x, r, bits, taps, weights, bias_dtypes, relu, needs, backend):
    refuse_traced("_backward", (dy, x, *weights))
    check_device(x, BlockTensors(weights))
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dtypes = dtypes_of(bias_dtypes) or [None] * len(weights)
    vectors = [x.new_empty(w.shape[0], dtype=dtype) for w, dtype in zip(weights, dtypes, strict=True)]
    wanted = [dx, *map(torch.empty_like, weights), *vectors]
    return [g if need else x.new_empty(0) for g, need in zip(wanted, needs, strict=True)]


for _device in ("CPU", "CUDA"):
    for _overload in ("", ".norms"):
        library.impl(f"_infer{_overload}", _infer, _device)
        library.impl(f"_forward{_overload}", _forward, _device)
    library.impl("_backward", _backward, _device)


def forward_launches(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor] = (),
    *,
    relu: bool = True,
    save: bool = False,
) -> list[tuple[str, Callable[[], None]]]:
    """The launches of one forward by name, in order, to run one by one; "pack" only where needed. Two that are made as
    one have both names, such as "K1+K2".

    x: [N, C, H, W] on a CUDA device (or a CPU under the interpreter). Buffers are allocated here once; each run()
    enqueues that kernel again on the current stream. The windows read what the reductions have written.
    save: whether r, bits and taps are written as for a backward pass.
    """
    from inception_fused.runtime.submit import record

    with torch.no_grad(), record() as recorded:
        torch.ops.inception_fused._forward(x, weights, biases, relu, save, save and relu, save, "kernels")
    x, shape, chosen = as_rows(x), BlockShape.of(x, weights), dispatch.choices("kernels", x.device, x.dtype)
    launcher = Launcher(chosen, ChannelSlice(x, row_stride(x), 0, shape.c), shape, x.dtype)
    names = [step.name for step in launcher.steps(launches.table_of(weights).rows["forward"])]
    return [(name, item.run) for name, item in zip(names[-len(recorded) :], recorded, strict=True)]


def backward_launches(
    dy: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *, relu: bool = True
) -> list[tuple[str, Callable[[], None]]]:
    """The launches of one backward for all gradients, as :func:`forward_launches`.

    dy: [N, K, H, W], any strides. The forward runs here, for what the backward reads. In this order each launch reads
    what those before it have written.
    """
    from inception_fused.runtime.submit import record

    needs = Needs(True, [True] * len(weights), [bool(biases)] * len(weights)).flat
    dtypes = dtype_names(b.dtype for b in biases)
    with torch.no_grad():
        saved = torch.ops.inception_fused._forward(x, weights, biases, relu, True, relu, True, "kernels")[1:]
    with torch.no_grad(), record() as recorded:
        torch.ops.inception_fused._backward(dy, x, *saved, weights, dtypes, relu, needs, "kernels")
    return [(name, item.run) for name, item in zip(launches.table_of(weights).names["backward"], recorded, strict=True)]
