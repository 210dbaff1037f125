"""Every tile that the plan can choose, interpreted on problems of several tiles, with canaries around outputs."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from batch_norm_cases import make_norms
from checks.block_cases import ODD, ODD_STEM, REDUCE_24, Block, check_gradients, check_kernels, make_block
from inception_fused import InceptionConfig
from inception_fused.block.call_types import ForwardCall, Saved, Saves
from inception_fused.block.tensor_lists import BlockTensors
from inception_fused.block.views import ChannelSlice, Tile, row_stride
from inception_fused.op import forward, launcher
from inception_fused.op.launcher import Launcher
from inception_fused.plan import choice
from inception_fused.runtime.launch import Launch
from marks import each_once, more, quick
from normed_checks import checked, run_normed, run_normed_backward

FORWARD = ("K1", "K2", "K3", "K4")
"""Each with one launch of a forward; those of BatchNorm are asked below."""

TILES = sorted({tile for kernel in FORWARD for tile in choice.RULES[kernel].tiles(torch.float16)})
SEVERAL = InceptionConfig(40, 72, (72, 136), (40, 72), 136)
"""More columns than the widest tile in K2 and K3, groups of K1 that straddle tiles, channels beyond one BLOCK_K."""

MARGIN = 64
"""Canary bytes on either side of a buffer; a multiple of 16 so that the buffer keeps its alignment."""


@pytest.mark.parametrize("tile", quick(TILES, TILES[0]), ids=str)
def test_tile(tile, monkeypatch):
    monkeypatch.setattr(choice, "interpreter_tile", lambda *problem: tile)
    block = make_block(SEVERAL, (3, 8, 7), torch.float16)
    check_kernels(block, block.forward())


@pytest.mark.parametrize("group_m", [more(1), more(2), 3, more(8)])
def test_every_tile_is_visited_once_whatever_the_order(group_m, monkeypatch):
    monkeypatch.setattr(choice, "interpreter_tile", lambda *problem: Tile(16, 16, 16, group_m, num_stages=1))
    block = make_block(REDUCE_24, (1, 7, 10), torch.float16)
    check_kernels(block, block.forward())


NORMED = ("N1", "N3", "N4", "N4 strided", "N6", "N6 strided")
NORMED_TILES = sorted({tile for kernel in NORMED for tile in choice.RULES[kernel].tiles(torch.float16)})


@each_once
@pytest.mark.parametrize("config", [SEVERAL, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=["rows", "NCHW"])
@pytest.mark.parametrize("tile", NORMED_TILES, ids=str)
def test_tile_of_batch_norm(tile, layout, config, monkeypatch):
    """Each launch against float64 on what it read; dy both as a matrix of rows and not."""
    monkeypatch.setattr(choice, "interpreter_tile", lambda *problem: tile)
    block = make_block(config, (3, 8, 7), torch.float16)
    norms = [norm._replace(mean=None, var=None) for norm in make_norms(block.weights)]
    with torch.no_grad(), checked():
        y, saved = run_normed(block, norms)
        run_normed_backward(block, norms, saved, torch.randn_like(y).contiguous(memory_format=layout))


def _with_margins(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """(bytes of the whole storage filled with a pattern, a dense tensor of shape inside it)."""
    size = torch.Size(shape).numel() * dtype.itemsize
    storage = torch.full((size + 2 * MARGIN,), 0xA5, dtype=torch.uint8)
    return storage, storage[MARGIN : MARGIN + size].view(dtype).view(shape)


def _run(block: Block, only: str | None, y_rows, r, bits, taps) -> None:
    shape = block.shape
    chosen = dict.fromkeys(choice.KERNELS, "triton")
    x = ChannelSlice(block.x, row_stride(block.x), 0, shape.c)
    with ops_only(only):
        saves = Saves(True, bits is not None, taps is not None)
        call = ForwardCall(block.x, BlockTensors(block.weights, block.biases), block.relu, saves, "kernels")
        forward.launch_forward(Launcher(chosen, x, shape, block.x.dtype), call, y_rows, Saved(r, bits, taps))


class ops_only:  # noqa: N801  reads as the statement that it is
    """Within it only one kernel is launched, alone (None: all, as they are made)."""

    def __init__(self, only: str | None) -> None:
        self.only, self.original = only, launcher.function_of

    def __enter__(self) -> None:
        self.apart = launcher.apart() if self.only else nullcontext()
        self.apart.__enter__()
        if self.only is not None:
            launcher.function_of = self._function_of

    def __exit__(self, *_: object) -> None:
        launcher.function_of = self.original
        self.apart.__exit__(None, None, None)

    def _function_of(self, kernel, implementation):
        if kernel.name in (self.only, "pack"):
            return self.original(kernel, implementation)
        return lambda *args, **kwargs: None


@each_once
@pytest.mark.parametrize("config", [REDUCE_24, ODD, ODD_STEM], ids=["aligned", "odd", "odd stem"])
@pytest.mark.parametrize("tile", [Tile(16, 32, 16, 2, num_stages=1), choice.INTERPRETER_LIMITS], ids=["small", "large"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_nothing_is_written_outside(dtype, tile, config, monkeypatch):
    monkeypatch.setattr(choice, "interpreter_tile", lambda *problem: tile)
    block = make_block(config, (2, 5, 7), dtype)
    shape = block.shape
    m = shape.gemm_m
    buffers = {
        "y": _with_margins((m, shape.k), dtype),
        "r": _with_margins((m, shape.r_width), dtype),
        "bits": _with_margins((m, shape.bits_width), torch.uint8),
        "taps": _with_margins((m, shape.taps_width), torch.uint8),
    }
    operands = [t.clone() for t in (block.x, *block.weights, *block.biases)]
    _run(block, None, *(tensor for _, tensor in buffers.values()))
    for name, (storage, _) in buffers.items():
        edge = torch.full((MARGIN,), 0xA5, dtype=torch.uint8)
        assert torch.equal(storage[:MARGIN], edge), f"before {name}"
        assert torch.equal(storage[-MARGIN:], edge), f"after {name}"
    for before, after in zip(operands, (block.x, *block.weights, *block.biases), strict=True):
        assert torch.equal(before, after)
    r = buffers["r"][1]
    ends = (*shape.r_offsets[1:], shape.r_width)
    for offset, channels, stop in zip(shape.r_offsets, shape.r_channels, ends, strict=True):
        start = offset + channels
        assert (
            r.contiguous().view(torch.uint8).view(m, -1)[:, start * dtype.itemsize : stop * dtype.itemsize] == 0xA5
        ).all()


@pytest.mark.parametrize("config", [REDUCE_24, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("kernel", FORWARD)
def test_a_kernel_writes_its_own_slice_only(kernel, config):
    block = make_block(config, (2, 4, 5), torch.float32)
    shape = block.shape
    y = torch.full((shape.gemm_m, shape.k), 7.0)
    r = torch.full((shape.gemm_m, shape.r_width), 0.25)
    bits = torch.full((shape.gemm_m, shape.bits_width), 0xFF, dtype=torch.uint8)
    taps = torch.full((shape.gemm_m, shape.taps_width), 0xEE, dtype=torch.uint8)
    _run(block, kernel, y, r, bits, taps)
    own = {"K1": 0, "K3": 1, "K4": 2, "K2": 3}[kernel]
    for i, (part, bit) in enumerate(zip(shape.y_slices(y), shape.bits_slices(bits), strict=True)):
        untouched = (part.rows(shape.gemm_m) == 7.0).all() and (bit.rows(shape.gemm_m) == 0xFF).all()
        assert untouched == (i != own), f"slice {i}"
    assert (r == 0.25).all() == (kernel != "K1")
    assert (taps == 0xEE).all() == (kernel != "K2")


@each_once
@pytest.mark.parametrize("config", [REDUCE_24, ODD, ODD_STEM], ids=["aligned", "odd", "odd stem"])
@pytest.mark.parametrize("tile", [Tile(16, 32, 16, 2, num_stages=1), choice.INTERPRETER_LIMITS], ids=["small", "large"])
def test_no_access_outside_a_tensor(tile, config, monkeypatch):
    """Reads too: a masked store hides a load beyond the end here, a GPU may fault on it."""
    from triton.runtime import interpreter

    builder, ranges = interpreter.InterpreterBuilder, []
    run = Launch.run

    def run_within(launch):
        tensors = [t for arg in launch.args for t in (arg if isinstance(arg, tuple) else (arg,)) if torch.is_tensor(t)]
        ranges[:] = [(t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors]
        run(launch)

    def checked(original):
        def access(self, ptrs, *rest):
            mask = next(a for a in rest if a is not None and a.data.dtype == bool)
            size = ptrs.get_element_ty().primitive_bitwidth // 8
            used = np.broadcast_to(ptrs.data, mask.data.shape)[mask.data].astype(np.uint64)
            inside = np.zeros(used.shape, bool)
            for start, stop in ranges:
                inside |= (used >= start) & (used + size <= stop)
            assert inside.all(), f"{(~inside).sum()} of {used.size} elements outside every tensor"
            return original(self, ptrs, *rest)

        return access

    monkeypatch.setattr(choice, "interpreter_tile", lambda *problem: tile)
    monkeypatch.setattr(Launch, "run", run_within)
    for name in ("create_masked_load", "create_masked_store"):
        monkeypatch.setattr(builder, name, checked(getattr(builder, name)))
    block = make_block(config, (2, 5, 7), torch.float32)
    out = block.forward()
    check_kernels(block, out)
    check_gradients(block, out)
    assert ranges
