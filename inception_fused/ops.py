"""The operators behind the block: schemas, fake implementations, device implementations.

``inception_fused::_infer`` (y alone, where nothing is saved for a backward: fewer outputs cost the host less),
``::_forward`` and ``::_backward`` are functional (nothing given is written) and private: their schemas may change in
any release. The first two have an overload ``norms``: BatchNorm in eval mode behind every convolution. Their rules for
torch.func are in batching.py. Autograd is not registered here but lives in function.py, outside the operators, which
refuse what they would have to differentiate.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inception_fused import dispatch, gradients, native, plan, replay, tuned
from inception_fused.calls import refuse_derivatives
from inception_fused.errors import FallbackWarning, KernelError
from inception_fused.folding import unflatten
from inception_fused.kernels import aten
from inception_fused.kernels.views import BatchNorm, ChannelSlice, Epilogue, row_stride
from inception_fused.saved import dtype_names, dtypes_of
from inception_fused.shapes import BlockShape, check_device, check_operands, check_saved

BACKWARD_LAUNCHES = (
    "pack", "B1", "B2 3x3", "B2 5x5", "B2 1x1", "B3", "B4 1x1", "B4 3x3", "B4 5x5", "B4 pool", "B5",
)  # fmt: skip
"""The launches of one backward for all gradients, in order; "5x5" is 3x3 where branch 3 is."""

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
    # What a graph keeps that may be differentiated later; implemented in function.py, out of the others.
    library.define(
        f"_exported{_overload}(Tensor x, Tensor[] weights, Tensor[] biases, bool relu, str backend{_more}) -> Tensor"
    )
library.define(
    "_backward(Tensor dy, Tensor x, Tensor r, Tensor bits, Tensor taps, Tensor[] weights, str[] bias_dtypes, "
    "bool relu, bool[] needs, str backend) -> Tensor[]"
)


def _outputs(x: Tensor, shape: BlockShape, save_r: bool, save_bits: bool, save_taps: bool) -> tuple[Tensor, ...]:
    """Fresh y, r, bits, taps: the one place that decides shapes and strides, for real and for fake tensors.

    y is channels_last whatever came in. r, bits and taps are [M, width], or [0] where they are not asked for.
    """
    y = torch.empty(
        (shape.n, shape.k, shape.h, shape.w), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )
    rows = shape.gemm_m
    r = x.new_empty((rows, shape.r_width) if save_r else (0,))
    bits = x.new_empty((rows, shape.bits_width) if save_bits else (0,), dtype=torch.uint8)
    taps = x.new_empty((rows, shape.taps_width) if save_taps else (0,), dtype=torch.uint8)
    return y, r, bits, taps


def _forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    relu: bool,
    save_r: bool,
    save_bits: bool,
    save_taps: bool,
    wish: str,
    norms: Sequence[Tensor] = (),
    eps: Sequence[float] = (),
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One block. x: [N, C, H, W], any strides; weights: six [K, C, R, R] of any floating dtype; biases: six or none.

    norms, eps: BatchNorm in eval mode behind every convolution as folding.flatten() gives it, or none.
    relu: whether every convolution is followed by ReLU. The saves are those of gradients.saves(). Kernels compute in
    x's dtype. Returns (y, r, bits, taps) as _outputs() describes them.
    """
    biases = biases or ()
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_forward", (x, *weights, *biases, *norms))
    x = _as_rows(x)
    with _current_device(x):
        return tuple(
            replay.replayed(
                lambda: _planned_forward(x, weights, biases, relu, save_r, save_bits, save_taps, wish, norms, eps),
                (x, *weights, *biases, *norms),
                *("forward", relu, save_r, save_bits, save_taps, wish, _strict(x), len(norms), tuple(eps)),
            )
        )


def _infer(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    relu: bool,
    wish: str,
    norms: Sequence[Tensor] = (),
    eps: Sequence[float] = (),
) -> Tensor:
    """y of :func:`_forward`."""
    biases = biases or ()
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_infer", (x, *weights, *biases, *norms))
    x = _as_rows(x)
    with _current_device(x):
        return replay.replayed(
            lambda: _planned_forward(x, weights, biases, relu, False, False, False, wish, norms, eps)[:1],
            (x, *weights, *biases, *norms),
            *("infer", relu, wish, _strict(x), len(norms), tuple(eps)),
        )[0]


def _planned_forward(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    relu: bool,
    save_r: bool,
    save_bits: bool,
    save_taps: bool,
    wish: str,
    norms: Sequence[Tensor],
    eps: Sequence[float],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`_forward` for x that is a matrix of rows, with every check and decision made anew."""
    check_operands(x, weights, biases, norms, eps)
    chosen = {kernel: c for kernel, c in dispatch.choices(wish, x.device, x.dtype).items() if kernel in plan.FORWARD}
    shape, stride = BlockShape.of(x, weights), row_stride(x)
    y, r, bits, taps = outputs = _outputs(x, shape, save_r, save_bits, save_taps)
    if shape.gemm_m == 0:
        return outputs
    too_large = "sizes beyond the 32-bit offsets inside a tile" if plan.exceeds_int32(shape, stride) else None
    if too_large is not None:
        if dispatch.demands_kernels(wish):
            raise KernelError(f'backend "{wish}" demands kernels that cannot run: {too_large}; split the batch')
        chosen = dict.fromkeys(chosen, "eager")
    unasked = wish != "eager" and any(c == "eager" and f"{kernel}=eager" not in wish for kernel, c in chosen.items())
    if unasked and x.is_cuda:
        reason = dispatch.obstacle(x.device, x.dtype) or too_large
        # None where an obstacle has passed since the choice: the next call takes the kernels.
        if reason is not None:
            warnings.warn(f"the Inception block runs in eager PyTorch: {reason}", FallbackWarning, stacklevel=2)
    if not save_r:
        r = x.new_empty((shape.gemm_m, shape.r_width))
    elif shape.r_padded:
        # Padding channels, which no kernel writes, would leave the operator with random output.
        r.zero_()
    # The kernels' dtype is x's; autocast, if on, has already been obeyed by the caller.
    with torch.autocast(x.device.type, enabled=False):
        _run(
            ChannelSlice(x, stride, 0, shape.c), weights, biases, relu, shape, chosen,
            y, r, bits if save_bits else None, taps if save_taps else None, unflatten(norms, eps),
        )  # fmt: skip
    return y, r if save_r else outputs[1], bits, taps


def _run(
    x: ChannelSlice,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    relu: bool,
    shape: BlockShape,
    chosen: dict[str, str],
    y: Tensor,
    r: Tensor,
    bits: Tensor | None,
    taps: Tensor | None,
    batch_norms: Sequence[BatchNorm] | None = None,
) -> None:
    """pack, K1, K2, K3, K4 in this order, each by the implementation chosen for it."""
    dtype = x.base.dtype
    shifts: Sequence[Tensor | None] = _dense_and_alike(biases) or (None,) * 6
    if any(chosen[kernel] == "triton" for kernel in plan.FORWARD):
        from inception_fused.kernels.pack import pack

        block = {"block": plan.INTERPRETER_BLOCK} if dispatch.interpreting() else {}
        if batch_norms is not None:
            batch_norms = [BatchNorm(*(_dense(t) for t in norm[:4]), norm.eps) for norm in batch_norms]
        weights, shifts, scales = pack(weights, shifts, dtype, batch_norms, **block)
    else:
        weights, shifts, scales = aten.pack(weights, shifts, dtype, batch_norms)
    e = [Epilogue(shift, scale, relu) for shift, scale in zip(shifts, scales, strict=True)]
    w1, w2_reduce, w2, w3_reduce, w3, w4 = weights
    y1, y2, y3, y4 = shape.y_slices(y)
    m1, m2, m3, m4 = shape.bits_slices(bits) if bits is not None else (None,) * 4
    r3, r5 = shape.r_slices(r)
    m, image = shape.gemm_m, (shape.h, shape.w)

    aligned, gpu = x.base.is_meta or x.base.data_ptr() % 16 == 0, tuned.key(x.base.device)

    def launcher(kernel: str) -> Callable[..., None]:
        if chosen[kernel] == "eager":
            return {"K1": aten.grouped_gemm, "K2": aten.pool_proj}.get(kernel, aten.conv_fprop)
        if chosen[kernel] == "native":
            tile, unit = plan.config(shape, kernel, dtype, x.row_stride, aligned=aligned, native=True)
            return partial(native.grouped_gemm, tile=tile, unit=unit)
        tile, unit = plan.config(shape, kernel, dtype, x.row_stride, aligned=aligned, gpu=gpu)
        if dispatch.interpreting():
            tile = plan.interpreter_tile(shape.gemm_m, *shape.gemm(kernel))
        return partial(_triton(kernel), tile=tile, unit=unit)

    launcher("K1")(x, (w1, w2_reduce, w3_reduce), y1, r3, r5, m1, gemm_m=m, epilogues=(e[0], e[1], e[3]))
    launcher("K2")(x, w4, y4, m4, taps, gemm_m=m, image=image, epilogue=e[5])
    launcher("K3")(r3, w2, y2, m2, gemm_m=m, image=image, epilogue=e[2])
    launcher("K4")(r5, w3, y3, m3, gemm_m=m, image=image, epilogue=e[4])


def _dense_and_alike(biases: Sequence[Tensor]) -> list[Tensor]:
    """Biases as an epilogue reads them: adjacent elements, and one dtype, since K1 selects between three of them."""
    alike = len({b.dtype for b in biases}) < 2
    return [(b if alike else b.float()).contiguous() for b in biases]


def _dense(vector: Tensor | None) -> Tensor | None:
    return vector.contiguous() if vector is not None else None


def _triton(kernel: str) -> Callable[..., None]:
    """The launcher of one kernel. Imported late: Triton is not everywhere."""
    from inception_fused.kernels.conv_fprop import conv_fprop
    from inception_fused.kernels.grouped_gemm import grouped_gemm
    from inception_fused.kernels.pool_proj import pool_proj

    return {"K1": grouped_gemm, "K2": pool_proj}.get(kernel, conv_fprop)


def _strict(x: Tensor) -> bool:
    """Whether x asks for fp32 without TF32, on which the choice of kernels depends."""
    return x.dtype == torch.float32 and not dispatch.tf32_allowed()


def _as_rows(x: Tensor) -> Tensor:
    """x, or a copy in channels_last memory where x is no matrix of rows."""
    return x if row_stride(x) is not None else x.contiguous(memory_format=torch.channels_last)


def _current_device(x: Tensor) -> torch.cuda.device | nullcontext:
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
    wish: str,
) -> list[Tensor]:
    """The gradients of gradients.block_backward(); an empty tensor stands where one is not wanted.

    bias_dtypes: saved.dtype_names() of six biases or none. Not the biases, so that a compiled graph does not keep them
    for this. x and weights: where no value is read (saved.reads()), anything of their shapes and dtype.
    """
    bias_dtypes = bias_dtypes or ()
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_backward", (dy, x, *weights))
    x = _as_rows(x)
    with _current_device(x):
        return list(
            replay.replayed(
                lambda: _planned_backward(dy, x, r, bits, taps, weights, bias_dtypes, relu, needs, wish),
                (dy, x, r, bits, taps, *weights),
                *("backward", relu, tuple(needs), wish, _strict(x), tuple(bias_dtypes)),
            )
        )


def _planned_backward(
    dy: Tensor,
    x: Tensor,
    r: Tensor,
    bits: Tensor,
    taps: Tensor,
    weights: Sequence[Tensor],
    bias_dtypes: Sequence[str],
    relu: bool,
    needs: Sequence[bool],
    wish: str,
) -> list[Tensor]:
    """:func:`_backward` for x that is a matrix of rows, with every check and decision made anew."""
    check_operands(x, weights, ())
    shape, dtypes = BlockShape.of(x, weights), dtypes_of(bias_dtypes)
    check_saved(shape, dy, x, r, bits, taps, gradients.saves(needs, relu))
    chosen = dispatch.choices(wish, x.device, x.dtype)
    if plan.exceeds_int32(shape, row_stride(x) or shape.c):
        # The forward has said so, or refused.
        chosen = dict.fromkeys(chosen, "eager")
    with torch.autocast(x.device.type, enabled=False):
        grads = gradients.block_backward(dy, x, r, bits, taps, weights, dtypes, relu=relu, needs=needs, chosen=chosen)
    return [g if g is not None else x.new_empty(0) for g in grads]


@torch.library.register_fake("inception_fused::_infer.norms", lib=library)
@torch.library.register_fake("inception_fused::_infer", lib=library)
def _fake_infer(x, weights, biases, relu, backend, norms=(), eps=()):
    refuse_derivatives("_infer", (x, *weights, *biases, *norms))
    # One tensor on the meta device brings the others here.
    check_device(x, weights, biases, norms)
    return _outputs(x, BlockShape.of(x, weights), False, False, False)[0]


@torch.library.register_fake("inception_fused::_forward.norms", lib=library)
@torch.library.register_fake("inception_fused::_forward", lib=library)
def _fake_forward(x, weights, biases, relu, save_r, save_bits, save_taps, backend, norms=(), eps=()):
    refuse_derivatives("_forward", (x, *weights, *biases, *norms))
    check_device(x, weights, biases, norms)
    return _outputs(x, BlockShape.of(x, weights), save_r, save_bits, save_taps)


@torch.library.register_fake("inception_fused::_backward", lib=library)
def _fake_backward(dy, x, r, bits, taps, weights, bias_dtypes, relu, needs, backend):
    refuse_derivatives("_backward", (dy, x, *weights))
    check_device(x, weights, ())
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    dtypes = dtypes_of(bias_dtypes) or (None,) * 6
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
    """The launches of one forward, to run one by one: [("pack", run), ("K1", run), ...], "pack" only where needed.

    x: [N, C, H, W] on a CUDA device (or a CPU under the interpreter). Buffers are allocated here once; each run()
    enqueues that kernel again on the current stream. K3 and K4 read what K1 has written, so run it first.
    save: whether r, bits and taps are written as for a backward pass.
    """
    from inception_fused.kernels.submit import record

    with torch.no_grad(), record() as launches:
        torch.ops.inception_fused._forward(x, weights, biases, relu, save, save and relu, save, "kernels")
    names = ("pack", *plan.FORWARD)
    return [(name, item.run) for name, item in zip(names[-len(launches) :], launches, strict=True)]


def backward_launches(
    dy: Tensor, x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor] = (), *, relu: bool = True
) -> list[tuple[str, Callable[[], None]]]:
    """The launches of one backward for all gradients, as :func:`forward_launches`: [("pack", run), ("B1", run), ...].

    dy: [N, K, H, W], any strides. The forward runs here, for what the backward reads. In this order each launch reads
    what those before it have written.
    """
    from inception_fused.kernels.submit import record

    needs, dtypes = [True] * 7 + [bool(biases)] * 6, dtype_names(b.dtype for b in biases)
    with torch.no_grad():
        saved = torch.ops.inception_fused._forward(x, weights, biases, relu, True, relu, True, "kernels")[1:]
    with torch.no_grad(), record() as launches:
        torch.ops.inception_fused._backward(dy, x, *saved, weights, dtypes, relu, needs, "kernels")
    return [(name, item.run) for name, item in zip(BACKWARD_LAUNCHES, launches, strict=True)]
