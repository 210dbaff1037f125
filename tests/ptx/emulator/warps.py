"""Some programs of a launch, all their lanes side by side: registers, program counters, barriers.

Every step takes the lanes that stand at the lowest basic block, of all warps or of one (schedule.Order), and executes
the block for them. Lanes of a warp that have parted meet again where the first of them waits for no other: the lowest
block first is the order in which the compilers lay out structured code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np

from .integers import UINT
from .memory import GlobalMemory
from .program import Constant, Instruction, Program, Register, Symbol
from .schedule import Schedule
from .shared import SharedMemory

GARBAGE = 0xDEADBEEFDEADBEEF
"""Of a register that nobody has written: LLVM's undef, which is read where nothing depends on it."""

LOCAL_BASE = 0x7F00_0000_0000
PARAMETER_BASE = 0x10_0000
END = 1 << 30
"""Program counter of a lane that has ended."""

Mask = np.ndarray | None
"""Which lanes; None for all."""

Step = Callable[["Wave", Mask], None]


class Wave:
    """programs: their numbers in the grid."""

    def __init__(
        self, program: Program, memory: GlobalMemory, parameters: np.ndarray, programs: np.ndarray,
        grid: tuple[int, int, int], shared: int, schedule: Schedule,
    ) -> None:  # fmt: skip
        self.program, self.memory, self.schedule, self.draws = program, memory, schedule, schedule.draws()
        self.parameters = parameters
        self.threads, self.count = program.threads, len(programs)
        self.size = self.threads * self.count
        self.lane = np.arange(self.size)
        self.warp = self.lane // 32
        self.of_program = self.lane // self.threads
        self.number = programs[self.of_program].astype(np.int32)
        groups = max(self.threads // 128, 1)
        self.shared = SharedMemory(shared, self.count, groups, self.race)
        self.local = np.full((self.size, program.local_bytes), 0xFF, np.uint8)
        self.registers = self._special(grid)
        self.executed: Counter[int] = Counter()
        self.findings: list[str] = []
        self.unfenced: set[int] = set()
        """Lines of products that read what cp.async wrote without a fence.proxy.async in between."""
        self.asynchronous: Any = None
        """asynchronous.Asynchronous, which knows this class."""

    def _special(self, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
        x, y, _ = grid
        thread = (self.lane % self.threads).astype(np.uint32)
        index = (self.number % x, self.number // x % y, self.number // (x * y))
        found = {"%tid.x": thread, "%laneid": thread & 31, "%warpid": thread >> 5}
        found |= {"%tid.y": np.zeros(1, np.uint32), "%tid.z": np.zeros(1, np.uint32)}
        found |= {"%ntid.x": np.full(1, self.threads, np.uint32)}
        found |= {"%ntid.y": np.ones(1, np.uint32), "%ntid.z": np.ones(1, np.uint32)}
        found |= {f"%ctaid.{axis}": i.astype(np.uint32) for axis, i in zip("xyz", index, strict=True)}
        found |= {f"%nctaid.{axis}": np.full(1, n, np.uint32) for axis, n in zip("xyz", grid, strict=True)}
        return found

    def read(self, register: Register) -> np.ndarray:
        """Its bit pattern, of all lanes or, where they agree, of one."""
        value = self.registers.get(register.name)
        if value is None:
            if register.bits == 1:
                return np.zeros(1, bool)
            value = np.full(1, GARBAGE & (1 << register.bits) - 1, UINT[register.bits])
        return ~value if register.negated else value

    def write(self, register: Register, value: np.ndarray, mask: Mask) -> None:
        """value: of its width."""
        self.registers[register.name] = value if mask is None else np.where(mask, value, self.read(register))

    def full(self, value: np.ndarray) -> np.ndarray:
        return np.broadcast_to(value, (self.size,))

    def lanes(self, mask: Mask) -> np.ndarray:
        return self.lane if mask is None else np.flatnonzero(self.full(mask))

    def whole_warps(self, mask: Mask, instruction: Instruction, lanes: int = 32) -> np.ndarray:
        """Numbers of the warps (lanes: 128 for warp groups) that execute, all lanes of each."""
        if mask is None:
            return np.arange(self.size // lanes)
        active = self.full(mask).reshape(-1, lanes)
        if (active.any(1) != active.all(1)).any():
            raise instruction.error(f"some lanes of a {'warp group' if lanes == 128 else 'warp'} do not execute this")
        return np.flatnonzero(active.any(1))

    def race(self, words: str) -> None:
        if len(self.findings) < 20 and words not in self.findings:
            self.findings.append(words)

    def run(self, steps: dict[int, Step], most: int) -> None:
        """steps: by the number of a basic block. most: steps before the program counts as endless."""
        self.counter = np.zeros(self.size, np.int64)
        self.waiting = np.zeros(self.size, bool)
        in_program = self.warp % (self.threads // 32)
        unit = in_program // 4 if self.program.uses_warp_groups else in_program
        for _ in range(most):
            ready = ~self.waiting & (self.counter != END)
            if not ready.any():
                if not self.waiting.any():
                    self.asynchronous.end()
                    return
                self._release()
                continue
            if self.schedule.order != "together":
                ready &= unit == self._choose(np.unique(unit[ready]))
            block = int(self.counter[ready].min())
            self._execute(block, ready & (self.counter == block), steps)
        at = self.program.blocks[int(self.counter[self.counter != END].min())].start
        raise self.program.instructions[at].error(f"not at its end after {most} steps, some lanes are here")

    def _choose(self, units: np.ndarray) -> int:
        if self.schedule.order == "random":
            return int(self.draws.choice(units))
        return int(units[-1] if self.schedule.order == "descending" else units[0])

    def _execute(self, block: int, active: np.ndarray, steps: dict[int, Step]) -> None:
        mask = None if active.all() else active
        self.executed[block] += int(active.reshape(-1, 32).any(1).sum())
        steps[block](self, mask)
        last = self.program.instructions[self.program.blocks[block].end - 1]
        self.counter[active] = block + 1
        kind = last.opcode.split(".")[0]
        taken = active if last.predicate is None else active & self.full(self.read(last.predicate))
        if kind == "bra":
            self.counter[taken] = self.program.target(_label(last, 0))
        elif kind == "brx":
            table = np.array([self.program.target(label) for label in self.program.tables[_label(last, 1)]])
            index = self.full(self.read(last.operands[0]))[taken]
            if (index >= len(table)).any():
                raise last.error(f"index {int(index.max())} of a table of {len(table)}")
            self.counter[taken] = table[index]
        elif kind in ("ret", "exit"):
            self.counter[taken] = END
        elif kind in ("bar", "barrier"):
            if last.opcode not in ("bar.sync", "barrier.sync.aligned") or last.operands != (Constant(0),):
                raise last.error("unknown barrier")
            self.whole_warps(None if taken.all() else taken, last)
            self.waiting |= taken

    def _release(self) -> None:
        """Lets programs go on: nobody can, so all their lanes have come to their barrier, or ended."""
        self.waiting[:] = False
        self.shared.barrier(range(self.count))


def _label(instruction: Instruction, place: int) -> str:
    operand = instruction.operands[place]
    if not isinstance(operand, Symbol):
        raise instruction.error("no label")
    return operand.name
