"""Runs a kernel's PTX on tensors on the CPU, program by program, and says what it found wrong."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from . import accesses, issue, warp_wide
from .asynchronous import Asynchronous
from .integers import UINT
from .memory import GlobalMemory
from .program import Program, PtxError
from .schedule import Schedule
from .translate import Translator
from .warps import Wave

METHODS = (*accesses.INSTRUCTIONS, *warp_wide.INSTRUCTIONS, *issue.INSTRUCTIONS)

MOST_STEPS = 50_000
"""Basic blocks that a wave may execute."""

USUAL = Schedule()

WIDTH = 16
"""Programs that run side by side: as many lanes share a step."""


@dataclass
class Report:
    """races: findings in words, each with its line of the PTX. unfenced: lines of wgmmas that read what cp.async wrote
    without a fence.proxy.async in between. executed: those lines that some lane reached. instructions: executed by
    warps, in all."""

    races: list[str] = field(default_factory=list)
    unfenced: set[int] = field(default_factory=set)
    executed: set[int] = field(default_factory=set)
    instructions: int = 0


class Kernel:
    """PTX that was read and translated, to be run more than once."""

    def __init__(self, ptx: str) -> None:
        self.program = Program(ptx)
        self.translator = Translator(
            self.program, (*accesses.INSTRUCTIONS, *warp_wide.INSTRUCTIONS, *issue.INSTRUCTIONS)
        )
        self.steps = self.translator.translated()

    def run(
        self, grid: Sequence[int], arguments: Sequence[torch.Tensor | int | float], *, shared: int = 0,
        schedule: Schedule = USUAL, width: int = WIDTH,
    ) -> Report:  # fmt: skip
        """arguments: in the order of the parameters; tensors are read and written in place, what lies beyond their
        elements is out of bounds; parameters behind them are 0. shared: bytes of shared memory of a program.

        Raises PtxError: what no schedule can make right, with the line; a race is only a finding.
        """
        memory = GlobalMemory([a for a in arguments if isinstance(a, torch.Tensor)])
        parameters, report = self._parameters(memory, arguments), Report()
        x, y, z = (*grid, 1, 1)[:3]
        with np.errstate(all="ignore"):
            for first in range(0, x * y * z, width):
                numbers = np.arange(first, min(first + width, x * y * z))
                wave = Wave(self.program, memory, parameters, numbers, (x, y, z), shared, schedule.checked())
                wave.asynchronous = Asynchronous(wave)
                wave.run(self.steps, MOST_STEPS)
                self._note(report, wave)
        memory.give_back()
        return report

    def _parameters(self, memory: GlobalMemory, arguments: Sequence[torch.Tensor | int | float]) -> np.ndarray:
        params = self.program.params
        if len(arguments) > len(params):
            raise PtxError(f"{self.program.name}: got {len(arguments)} arguments, has {len(params)} parameters")
        found = np.zeros(self.translator.parameter_bytes, np.uint8)
        for (name, bits), argument in zip(params, arguments, strict=False):
            if isinstance(argument, torch.Tensor):
                argument = memory.address(argument)
            if isinstance(argument, float):
                value = np.array([argument], np.float32).view(np.uint32)
            else:
                value = np.array([argument & (1 << bits) - 1], UINT[bits])
            at = self.translator.parameter_at[name]
            found[at : at + bits // 8] = value.view(np.uint8)
        return found

    def _note(self, report: Report, wave: Wave) -> None:
        report.races += [race for race in wave.findings if race not in report.races]
        report.unfenced |= wave.unfenced
        for number, count in wave.executed.items():
            block = self.program.blocks[number]
            instructions = self.program.instructions[block.start : block.end]
            report.executed |= {instruction.line for instruction in instructions}
            report.instructions += count * len(instructions)


def execute(
    ptx: str, grid: Sequence[int], arguments: Sequence[torch.Tensor | int | float], *, shared: int = 0,
    schedule: Schedule = USUAL, width: int = WIDTH,
) -> Report:  # fmt: skip
    """:meth:`Kernel.run` of PTX that is read for this once."""
    return Kernel(ptx).run(grid, arguments, shared=shared, schedule=schedule, width=width)
