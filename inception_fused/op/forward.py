"""The launches of one forward: a block's operands handed to the launchers in the table's order."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.call_types import ForwardCall, Saved
from inception_fused.block.chains import BlockTensors, each
from inception_fused.block.folding import params_of
from inception_fused.block.views import BatchNorm, Epilogue, Packed
from inception_fused.op.launcher import Launcher
from inception_fused.plan import choice, launches


def launch_forward(launcher: Launcher, call: ForwardCall, y: Tensor, saved: Saved) -> None:
    """The launches of a forward in order, each by the implementation chosen for it.

    saved: r always, bits and taps as far as call.saves asks for them.
    """
    shape, saves = launcher.shape, call.saves
    rows = launches.table_of(shape.filters).forward
    weights, shifts, scales = _packed(launcher, call.tensors)
    epilogues = [Epilogue(shift, scale, call.relu) for shift, scale in zip(shifts, scales, strict=True)]
    r = shape.r_slices(saved.r)
    outs = chains.from_outputs(shape.y_slices(y), r)
    none = [None] * len(outs)
    masks = chains.from_outputs(shape.bits_slices(saved.bits), [None] * len(r)) if saves.bits else none
    taps = saved.taps if saves.taps else None
    x, m = launcher.x, {"gemm_m": shape.gemm_m}
    image = m | {"image": shape.image}

    group, (bits, *_) = (tuple(chains.reductions(each)) for each in (weights, masks))
    given = m | {"epilogues": tuple(chains.reductions(epilogues))}
    calls = [(rows.reductions, (x, group, *chains.reductions(outs), bits), given)]
    w, y4, bits, epilogue = (chains.projection(each) for each in (weights, outs, masks, epilogues))
    calls.append((rows.projection, (x, w, y4, bits, taps), image | {"epilogue": epilogue}))
    windows = zip(rows.windows, r, *(chains.windows(each) for each in (weights, outs, masks, epilogues)), strict=True)
    for row, source, w, out, bits, epilogue in windows:
        calls.append((row, (source, w, out, bits), image | {"epilogue": epilogue}))
    launcher.in_order(calls)


def _packed(launcher: Launcher, tensors: BlockTensors) -> Packed:
    """Parameters as the kernels read them."""
    _, biases, norms = params_of(tensors)
    shifts: Sequence[Tensor | None] = _dense_and_alike(biases or each(None, tensors.weights))
    if norms is not None:
        norms = [norm and BatchNorm(*(_dense(t) for t in norm[:4]), norm.eps) for norm in norms]
    interpreted = choice.INTERPRETER_LIMITS._replace(BLOCK_M=choice.INTERPRETER_BLOCK, BLOCK_N=1, BLOCK_K=1, GROUP_M=1)
    pack = launcher.bind_untiled(launches.table_of(tensors.weights).forward.pack, interpreted)
    return pack(tensors.weights, shifts, launcher.dtype, norms)


def _dense_and_alike(biases: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Biases as an epilogue reads them: adjacent elements, and one dtype, since the reductions' launch selects between
    three of them."""
    alike = len({b.dtype for b in biases if b is not None}) < 2
    return [b if b is None else (b if alike else b.float()).contiguous() for b in biases]


def _dense(vector: Tensor | None) -> Tensor | None:
    return vector.contiguous() if vector is not None else None
