"""The operators of a block whose BatchNorm takes the statistics of the batch: schemas, fakes, implementations.

``inception_fused::_normed`` and ``::_normed_backward`` change nothing that they are given: the first returns the
statistics, from which the caller moves running ones. Private, as those in operators.py are, and like them without a
derivative. torch.func does not reach them: under it a block with BatchNorm in training is eager PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inception_fused.block import batch_stats, folding
from inception_fused.block.call_types import NormedBackwardCall, NormedCall, NormedSaved, NormedSaves
from inception_fused.block.checks import check_device, check_normed, check_operands
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import BlockTensors, Needs
from inception_fused.block.views import BatchNorm, ChannelSlice, row_stride
from inception_fused.op import dispatch, normed
from inception_fused.op.calls import refuse_derivatives
from inception_fused.op.launcher import Launcher
from inception_fused.op.operators import (
    as_rows,
    chosen_backward,
    chosen_forward,
    current_device,
    fresh_output,
    library,
    refuse_traced,
    strict,
)
from inception_fused.op.saved import dtype_name
from inception_fused.plan import launches
from inception_fused.runtime import replay
from inception_fused.runtime.submit import record

library.define(
    "_normed(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norms, float[] eps, int[] modes, bool relu, "
    "bool save_raw, bool save_raw_r, bool save_r, bool save_taps, str backend, str group='') "
    "-> (Tensor y, Tensor raw, Tensor raw_r, Tensor r, Tensor taps, Tensor stats)"
)
library.define(
    "_normed_backward(Tensor dy, Tensor x, Tensor raw, Tensor raw_r, Tensor r, Tensor taps, Tensor stats, "
    "Tensor[] weights, float[] eps, int[] modes, str[] vectors, bool relu, bool[] needs, str backend, str group='') "
    "-> Tensor[]"
)

VECTORS = 3
"""Of each convolution: gamma, beta, bias."""


def outputs(x: Tensor, shape: BlockShape, saves: NormedSaves, *, shared: bool = False) -> tuple[Tensor, NormedSaved]:
    """Fresh y and what stands beside it: the one place that decides shapes and strides, for real and fake tensors.
    shared: whether the batch is spread over several processes."""
    numbers = batch_stats.SYNCHRONISED if shared else batch_stats.STATISTICS
    raw = x.new_empty((shape.gemm_m, shape.k) if saves.raw else (0,))
    raw_r = _fresh_r(x, shape) if saves.raw_r else x.new_empty((0,))
    r = _fresh_r(x, shape) if saves.r else x.new_empty((0,))
    taps = x.new_empty((shape.gemm_m, shape.taps_width) if saves.taps else (0,), dtype=torch.uint8)
    return fresh_output(x, shape), NormedSaved(raw, raw_r, r, taps, batch_stats.fresh(x, shape, numbers))


def _fresh_r(x: Tensor, shape: BlockShape) -> Tensor:
    """Memory for [r3 | r5]. Padding channels, which no convolution writes, are read where all columns are."""
    return (x.new_zeros if shape.r_padded else x.new_empty)((shape.gemm_m, shape.r_width))


def _normed(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor],
    norms: Sequence[Tensor],
    eps: Sequence[float],
    modes: Sequence[int],
    relu: bool,
    save_raw: bool,
    save_raw_r: bool,
    save_r: bool,
    save_taps: bool,
    backend: str,
    group: str = "",
) -> tuple[Tensor, ...]:
    """One block. norms, eps: as folding.flatten() gives them; modes: as batch_stats.modes_of() does. The saves are
    those of normed.saves(). Returns (y, raw, raw_r, r, taps, stats) as outputs() describes them."""
    biases = biases or ()
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_normed", (x, *weights, *biases, *norms))
    x = as_rows(x)
    saves = NormedSaves(save_raw, save_raw_r, save_r, save_taps)
    with current_device(x):
        return tuple(
            replay.replayed(
                lambda: _planned(
                    NormedCall(x, BlockTensors(weights, biases, norms, eps), modes, relu, saves, backend, group)
                ),
                (x, *weights, *biases, *norms),
                *("normed", relu, saves, backend, strict(x), len(biases), tuple(eps), tuple(modes), group),
            )
        )  # fmt: skip


def _planned(call: NormedCall) -> tuple[Tensor, ...]:
    x, tensors, *_ = call
    check_operands(x, tensors)
    shape = BlockShape.of(x, tensors.weights)
    y, saved = outputs(x, shape, call.saves, shared=bool(call.group))
    if shape.gemm_m == 0:
        saved.stats.fill_(float("nan"))
        if call.group:
            normed.share_nothing(call, shape, saved.stats)
        return y, *saved
    chosen = chosen_forward(x, shape, call.backend)
    rows = y.permute(0, 2, 3, 1).flatten(0, 2)
    # Of what nobody wants raw, the normalised values lie where the raw ones were.
    raw = saved.raw if call.saves.raw else rows
    raw_r = saved.raw_r if call.saves.raw_r else _fresh_r(x, shape)
    r = saved.r if call.saves.r else _fresh_r(x, shape) if call.saves.raw_r else raw_r
    with torch.autocast(x.device.type, enabled=False):
        launcher = Launcher(chosen, ChannelSlice(x, row_stride(x), 0, shape.c), shape, x.dtype)
        normed.launch_normed(launcher, call, rows, saved._replace(raw=raw, raw_r=raw_r, r=r))
    return y, *saved


def _normed_backward(
    dy: Tensor,
    x: Tensor,
    raw: Tensor,
    raw_r: Tensor,
    r: Tensor,
    taps: Tensor,
    stats: Tensor,
    weights: Sequence[Tensor],
    eps: Sequence[float],
    modes: Sequence[int],
    vectors: Sequence[str],
    relu: bool,
    needs: Sequence[bool],
    backend: str,
    group: str = "",
) -> list[Tensor]:
    """The gradients of normed.normed_backward(); an empty tensor stands where one is not wanted.

    vectors: three a convolution, the dtypes of gamma, beta and bias whose gradients are wanted, "" of the others.
    needs: of x, weights, and any vector of each convolution. x and weights: where no value is read (saved.reads()),
    anything of their shapes and dtype.
    """
    if torch.is_grad_enabled() or forward_ad._current_level >= 0:
        refuse_derivatives("_normed_backward", (dy, x, *weights))
    x = as_rows(x)
    with current_device(x):
        return list(
            replay.replayed(
                lambda: _planned_backward(
                    NormedBackwardCall(
                        dy, x, NormedSaved(raw, raw_r, r, taps, stats), weights, eps, modes, _dtypes(vectors), relu,
                        Needs.of(needs), backend, group,
                    )
                ),
                (dy, x, raw, raw_r, r, taps, stats, *weights),
                *("normed_backward", relu, tuple(needs), backend, strict(x), group),
                *map(tuple, (eps, modes, vectors)),
            )
        )  # fmt: skip


def _planned_backward(call: NormedBackwardCall) -> list[Tensor]:
    x = call.x
    check_operands(x, BlockTensors(call.weights))
    shape = BlockShape.of(x, call.weights)
    check_normed(shape, call.dy, x, call.saved, normed.saves(call.needs, call.relu), shared=bool(call.group))
    chosen = chosen_backward(x, shape, call.backend)
    with torch.autocast(x.device.type, enabled=False):
        grads = normed.normed_backward(call, chosen)
    return [g if g is not None else x.new_empty(0) for g in grads]


def recorded_launches(
    x: Tensor, dy: Tensor, weights: Sequence[Tensor], norms: Sequence[BatchNorm], *, relu: bool = True
) -> dict[str, list[tuple[str, Callable[[], None]]]]:
    """The launches of one forward and of its backward for all gradients, as operators.forward_launches() has them, by
    pass; of convolutions without bias. norms: all with the statistics of the batch and affine.

    Those of both passes in this order, once, before any is timed: what they read is there then.
    """
    tensors, modes = BlockTensors(weights, (), *folding.flatten(norms)), batch_stats.modes_of(norms)
    vectors = [name for norm in norms for name in (dtype_name(norm.gamma.dtype), dtype_name(norm.beta.dtype), "")]
    needs = [True] * (1 + 2 * len(weights))
    with torch.no_grad(), record() as forward:
        _, *saved = _normed(x, weights, (), tensors.norms, tensors.eps, modes, relu, *[True] * 4, "kernels")
    with torch.no_grad(), record() as backward:
        _normed_backward(dy, x, *saved, weights, tensors.eps, modes, vectors, relu, needs, "kernels")
    shape, chosen = BlockShape.of(x, weights), dispatch.choices("kernels", x.device, x.dtype)
    table = launches.table_of(weights, normed=True)
    steps = Launcher(chosen, ChannelSlice(x, row_stride(x), 0, shape.c), shape, x.dtype).steps(table.rows["forward"])
    names = {"forward": [step.name for step in steps][-len(forward) :], "backward": table.names["backward"]}
    return {
        name: [(launch, item.run) for launch, item in zip(names[name], items, strict=True)]
        for name, items in (("forward", forward), ("backward", backward))
    }


def _dtypes(vectors: Sequence[str]) -> list[tuple[torch.dtype | None, ...]]:
    """vectors of :func:`_normed_backward`, three a convolution."""
    found = [getattr(torch, name) if name else None for name in vectors]
    return [tuple(found[i : i + VECTORS]) for i in range(0, len(found), VECTORS)]


@torch.library.register_fake("inception_fused::_normed", lib=library)
def _fake_normed(
    x, weights, biases, norms, eps, modes, relu, save_raw, save_raw_r, save_r, save_taps, backend, group=""
):
    biases, norms = biases or (), norms or ()
    refuse_traced("_normed", (x, *weights, *biases, *norms))
    check_device(x, BlockTensors(weights, biases, norms))
    y, saved = outputs(
        x, BlockShape.of(x, weights), NormedSaves(save_raw, save_raw_r, save_r, save_taps), shared=bool(group)
    )
    return y, *saved


@torch.library.register_fake("inception_fused::_normed_backward", lib=library)
def _fake_normed_backward(
    dy, x, raw, raw_r, r, taps, stats, weights, eps, modes, vectors, relu, needs, backend, group=""
):  # fmt: skip
    refuse_traced("_normed_backward", (dy, x, *weights))
    check_device(x, BlockTensors(weights))
    dx = torch.empty_like(x, memory_format=torch.channels_last)
    wanted = zip([dx, *map(torch.empty_like, weights)], needs, strict=False)
    grads = [g if need else x.new_empty(0) for g, need in wanted]
    for w, dtypes in zip(weights, _dtypes(vectors), strict=True):
        grads += [x.new_empty(0) if dtype is None else x.new_empty(w.shape[0], dtype=dtype) for dtype in dtypes]
    return grads


for _device in ("CPU", "CUDA"):
    library.impl("_normed", _normed, _device)
    library.impl("_normed_backward", _normed_backward, _device)
