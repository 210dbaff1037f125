"""The launches of one forward: a block's operands handed to the launchers in the table's order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.call_types import ForwardCall, Saved
from inception_fused.block.chains import each
from inception_fused.block.folding import params_of
from inception_fused.block.tensor_lists import BlockTensors
from inception_fused.block.views import BatchNorm, ChannelSlice, Epilogue, Packed
from inception_fused.op.launcher import Launcher
from inception_fused.plan import choice, launches
from inception_fused.plan.launches import Forward, Row

Calls = list[tuple[Row, tuple[Any, ...], dict[str, Any]]]
"""As Launcher.in_order() takes them."""


class Outputs(NamedTuple):
    """Where a forward writes. branches, inner: the slices of y, and of r in the order of chains.inner(); bits: one a
    branch, None where none are saved; taps: None likewise."""

    branches: Sequence[ChannelSlice]
    inner: Sequence[ChannelSlice]
    bits: Sequence[ChannelSlice | None]
    taps: Tensor | None


def launch_forward(launcher: Launcher, call: ForwardCall, y: Tensor, saved: Saved) -> None:
    """The launches of a forward in order, each by the implementation chosen for it.

    saved: r always, bits and taps as far as call.saves asks for them.
    """
    shape, saves = launcher.shape, call.saves
    rows = launches.table_of(shape.filters).forward
    r, none = shape.r_slices(saved.r), [None] * len(shape.branch_channels)
    bits = shape.bits_slices(saved.bits) if saves.bits else none
    outputs = Outputs(shape.y_slices(y), r, bits, saved.taps if saves.taps else None)
    heads, windows = calls_of(launcher, rows, packed(launcher, call.tensors), outputs, r, relu=call.relu)
    launcher.in_order(heads + windows)


def calls_of(
    launcher: Launcher, rows: Forward, params: Packed, outputs: Outputs, sources: Sequence[ChannelSlice], *, relu: bool
) -> tuple[Calls, Calls]:
    """The calls of the convolutions that read x, and of the windows. sources: what each window reads."""
    weights, shifts, scales = params
    epilogues = [Epilogue(shift, scale, relu) for shift, scale in zip(shifts, scales, strict=True)]
    outs = chains.from_outputs(outputs.branches, outputs.inner)
    masks = chains.from_outputs(outputs.bits, [None] * len(outputs.inner))
    x, m = launcher.x, {"gemm_m": launcher.shape.gemm_m}
    image = m | {"image": launcher.shape.image}

    group, several = (tuple(chains.reductions(each)) for each in (weights, epilogues))
    reduced, (bits, *_) = (chains.reductions(each) for each in (outs, masks))
    heads: Calls = []
    if rows.projection is None:
        (w,), (out,), (epilogue,) = group, reduced, several
        heads.append((rows.reductions, (x, w, out, bits), image | {"epilogue": epilogue}))
    else:
        heads.append((rows.reductions, (x, group, *reduced, bits), m | {"epilogues": several}))
        w, y4, bits, epilogue = (chains.projection(each) for each in (weights, outs, masks, epilogues))
        heads.append((rows.projection, (x, w, y4, bits, outputs.taps), image | {"epilogue": epilogue}))
    each_window = (chains.windows(each) for each in (weights, outs, masks, epilogues))
    windows = [
        (row, (source, w, out, bits), image | {"epilogue": epilogue})
        for row, source, w, out, bits, epilogue in zip(rows.windows, sources, *each_window, strict=True)
    ]
    return heads, windows


def packed(launcher: Launcher, tensors: BlockTensors) -> Packed:
    """Parameters as the kernels read them."""
    _, biases, norms = params_of(tensors)
    shifts: Sequence[Tensor | None] = _dense_and_alike(biases or each(None, tensors.weights))
    if norms is not None:
        norms = [norm and BatchNorm(*(dense(t) for t in norm[:4]), norm.eps) for norm in norms]
    interpreted = choice.INTERPRETER_LIMITS._replace(BLOCK_M=choice.INTERPRETER_BLOCK, BLOCK_N=1, BLOCK_K=1, GROUP_M=1)
    pack = launcher.bind_untiled(launches.table_of(tensors.weights).forward.pack, interpreted)
    return pack(tensors.weights, shifts, launcher.dtype, norms)


def _dense_and_alike(biases: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Biases as an epilogue reads them: adjacent elements, and one dtype, since the reductions' launch selects between
    three of them."""
    alike = len({b.dtype for b in biases if b is not None}) < 2
    return [b if b is None else (b if alike else b.float()).contiguous() for b in biases]


def dense(vector: Tensor | None) -> Tensor | None:
    return vector.contiguous() if vector is not None else None
