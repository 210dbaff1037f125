"""Blocks whose launches are executed by the emulator instead of a GPU: compiled for an architecture, run on the CPU.

In a process that does not interpret Triton's kernels, which would replace their compiler.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any
from unittest import mock

from torch import Tensor

from checks.block_cases import Block
from counter.compiling import compile_launch
from emulator import Kernel, Schedule
from inception_fused.block import folding
from inception_fused.block.call_types import BackwardCall, ForwardCall, Saved, Saves
from inception_fused.block.tensor_lists import BlockTensors
from inception_fused.block.views import Tile
from inception_fused.op import forward, gradients, launcher, operators
from inception_fused.op.launcher import Launcher
from inception_fused.plan import choice
from inception_fused.runtime.launch import Launch, binary_key


@dataclass
class Record:
    """One launch that was executed. key: of its binary; seconds: of the emulator alone; unfenced: as in Report."""

    name: str
    key: tuple[Any, ...]
    instructions: int
    seconds: float
    races: list[str]
    unfenced: set[int]


@dataclass
class Emulation:
    """capability: such as 90."""

    capability: int
    schedule: Schedule = field(default_factory=Schedule)
    records: list[Record] = field(default_factory=list)

    def run(self, launch: Launch) -> None:
        """Executes a launch, on the tensors that it was given."""
        kernel, shared = compiled(launch, self.capability)
        begun = time.perf_counter()
        report = kernel.run(launch.grid, list(arguments(launch.args)), shared=shared, schedule=self.schedule)
        name = launch.kernel.fn.__name__
        seconds = time.perf_counter() - begun
        key = binary_key(launch)
        self.records.append(Record(name, key, report.instructions, seconds, report.races, report.unfenced))


_kernels: dict[Any, tuple[Kernel, int]] = {}


def compiled(launch: Launch, capability: int) -> tuple[Kernel, int]:
    """A launch's binary, and its bytes of shared memory."""
    key = (*binary_key(launch), capability)
    if key not in _kernels:
        binary = compile_launch(launch, capability)
        _kernels[key] = Kernel(binary.asm["ptx"]), binary.metadata.shared
    return _kernels[key]


def arguments(value: Any) -> Iterator[Tensor | int | float]:
    """What a launch's arguments are to the kernel: None is none, a tuple is its items."""
    if isinstance(value, tuple):
        for item in value:
            yield from arguments(item)
    elif value is not None:
        yield value


@contextmanager
def emulating(emulation: Emulation, tiles: Mapping[str, Tile] | None = None) -> Iterator[None]:
    """Within it every launch is executed by the emulator. tiles: as for :func:`with_tiles`."""
    run = mock.patch.object(Launch, "run", lambda launch: emulation.run(launch))
    with run, launcher.planned_for(divmod(emulation.capability, 10)), with_tiles(tiles or {}):
        yield


@contextmanager
def with_tiles(tiles: Mapping[str, Tile]) -> Iterator[None]:
    """Within it launches take these tiles, by key of their rules, each launch by itself; without any, what the plan
    says, pairs as well."""
    with ExitStack() as stack:
        for rules, tile in tiles.items():
            stack.enter_context(launcher.forced(rules, tile))
        yield


def run_forward(block: Block, *, save: bool = True, batch_norms: Any = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y, r, bits, taps of a block, by Triton's kernels."""
    saves = Saves(True, save and block.relu, save)
    shape = block.shape
    y, *outputs = operators.outputs(block.x, shape, saves)
    saved = Saved(*outputs)
    if shape.r_padded:
        # As the operator does: no kernel writes padding channels.
        saved.r.zero_()
    norms, eps = folding.flatten(batch_norms) if batch_norms else (None, None)
    call = ForwardCall(block.x, BlockTensors(block.weights, block.biases, norms, eps), block.relu, saves, "kernels")
    x = operators.ChannelSlice(block.x, operators.row_stride(block.x), 0, shape.c)
    forward.launch_forward(Launcher(all_triton(), x, shape, block.x.dtype), call, y, saved)
    return y, *saved


def run_backward(block: Block, out: tuple[Tensor, ...], dy: Tensor) -> list[Tensor]:
    """All gradients."""
    dtypes = [bias.dtype for bias in block.biases]
    call = BackwardCall(dy, block.x, Saved(*out[1:]), block.weights, dtypes, block.relu, block.needs, "kernels")
    return [grad for grad in gradients.block_backward(call, all_triton()) if grad is not None]


@cache
def all_triton() -> dict[str, str]:
    return dict.fromkeys(choice.KERNELS, "triton")
