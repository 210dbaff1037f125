"""Cycles of one warp that has its scheduler to itself, from control words and assumed latencies.

The warp issues in order. It waits as many cycles as an instruction's control word says, and before an instruction for
the barriers that its word names; a barrier is free when the instruction that set it has its result. Copies into shared
memory are waited for by groups (DEPBAR), wgmma by groups as well (WARPGROUP.DEPBAR). What the other warps of a program
do is not looked at: a program is as slow as one of its warps.

All assumed latencies stand in :data:`LATENCIES` and the four figures below it. They are of an H100, from published
microbenchmarks where there are any ("Benchmarking and Dissecting the Nvidia Hopper GPU Architecture via
Microbenchmarking", Luo et al., 2024) and a guess where there are none; other chips are close enough for a figure that
is stated as +-30%.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from statistics import mean

from counter.sass import Code, Instruction, Loop

LATENCIES = {
    "LDS": 30, "LDSM": 33, "STS": 25, "STSM": 28, "LDC": 35, "ULDC": 20, "SHFL": 28,
    "LDG": 270, "STG": 20, "LDL": 40, "STL": 20, "ATOMG": 300,
    "MUFU": 25, "I2F": 25, "F2I": 25, "F2F": 20, "POPC": 20, "FLO": 20, "F2FP": 8,
    "S2R": 25, "S2UR": 30, "R2UR": 12, "HMMA": 33, "BAR": 25, "SYNCS": 20,
}  # fmt: skip
"""Cycles until a barrier is free. LDG: a hit in L2, since of the nine loads of a window some miss L1."""

OTHERS = 6
OPERANDS_READ = 15
"""At most, until a store or copy has read its operands."""
COPY = 330
"""From a cp.async that hits L2 until its group is complete."""
MMA = 60
"""From the end of a group of wgmma on the matrix unit until who waits for it goes on; one of 64xN takes N / 2."""

ROUNDS = 12
"""Trips of a loop that are followed; the later half counts, in which the pipeline is full. Of one, two or three groups
of copies in flight it holds whole turns."""


class Warp:
    """The clock of a warp."""

    def __init__(self) -> None:
        self.now = 0.0
        self.barriers = [0.0] * 6
        self.copies: list[float] = []
        self.copy_groups: list[float] = []
        self.mma_free = 0.0
        self.mma_groups: list[float] = []

    def issue(self, instruction: Instruction) -> None:
        control, name = instruction.control, instruction.name
        for barrier in control.waits:
            self.now = max(self.now, self.barriers[barrier])
        if name == "LDGDEPBAR":
            self.copy_groups.append(max(self.copies, default=self.now))
            self.copies = []
        elif name == "DEPBAR":
            self.copy_groups = self._wait(self.copy_groups, _left(instruction.text, "SB0"))
        elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            self.mma_groups = self._wait(self.mma_groups, _left(instruction.text, "gsb0"))
        elif name == "HGMMA":
            columns = int(re.search(r"x(\d+)x", instruction.opcode)[1])
            self.mma_free = max(self.mma_free, self.now) + columns / 2
            if "gsb0" in instruction.text:
                self.mma_groups.append(self.mma_free + MMA)
        elif name == "LDGSTS":
            self.copies.append(self.now + COPY)
        elif name == "BAR":
            self.now += LATENCIES["BAR"]
        latency = LATENCIES.get(name, OTHERS)
        if control.writes is not None:
            self.barriers[control.writes] = max(self.barriers[control.writes], self.now + latency)
        if control.reads is not None:
            read = self.now + min(latency, OPERANDS_READ)
            self.barriers[control.reads] = max(self.barriers[control.reads], read)
        self.now += max(1, control.stall)

    def _wait(self, groups: list[float], left: int) -> list[float]:
        """Until no more than ``left`` of the groups are open, which are returned."""
        done = groups[: len(groups) - left] if len(groups) > left else []
        self.now = max(self.now, *done) if done else self.now
        return groups[len(done) :]


def _left(text: str, barrier: str) -> int:
    found = re.search(rf"{barrier}, 0x([0-9a-f]+)", text)
    return int(found[1], 16) if found else 0


def cycles(code: Code) -> tuple[float, dict[Loop, float]]:
    """(cycles of everything outside of loops, cycles of a trip through each loop without those inside it)."""
    warp, trips = Warp(), {}
    straight = _run(warp, code.instructions, 0, len(code.instructions), code.loops, trips)
    return straight, {loop: mean(found[ROUNDS // 2 :]) for loop, found in trips.items()}


def _run(
    warp: Warp, instructions: Sequence[Instruction], first: int, last: int, loops: Sequence[Loop],
    trips: dict[Loop, list[float]],
) -> float:  # fmt: skip
    """Issues from first up to last, each loop inside ROUNDS times. Returns the cycles outside of loops."""
    spent, at = 0.0, first
    for loop in (*loops, None):
        begun = warp.now
        for instruction in instructions[at : last if loop is None else loop.first]:
            warp.issue(instruction)
        spent += warp.now - begun
        if loop is not None:
            for _ in range(ROUNDS):
                own = _run(warp, instructions, loop.first, loop.last, loop.inner, trips)
                trips.setdefault(loop, []).append(own)
            at = loop.last
    return spent
