"""Reads the text of nvdisasm: instructions with their control words, and the loops among them.

An instruction of sm_80 to sm_120 has 128 bits. Bits 105 to 125 are the control word by which the compiler schedules:

    105-108  cycles until the next instruction of the warp may issue
    109      hint to stay with this warp
    110-112  barrier that is set until the result is written, 7 for none
    113-115  barrier that is set until the operands are read, 7 for none
    116-121  barriers that must be free before the instruction issues, one bit each

NVIDIA documents none of this; the layout is that of "Dissecting the NVIDIA Volta GPU Architecture via
Microbenchmarking" (Jia et al., 2018), which later architectures have kept.
"""

from __future__ import annotations

import re
from typing import NamedTuple

_INSTRUCTION = re.compile(r"\s*/\*([0-9a-f]+)\*/\s+(.*?)\s*;\s*/\* 0x([0-9a-f]{16}) \*/")
_SECOND_WORD = re.compile(r"\s*/\* 0x([0-9a-f]{16}) \*/")
_LABEL = re.compile(r"\s*(\.L_x_\d+):")
_PREDICATE = re.compile(r"(@!?U?P\w+)\s+(.*)")
_TARGET = re.compile(r"`\((\.L_x_\d+)\)")


class Control(NamedTuple):
    """A control word. writes, reads: the barrier that is set, None for none; waits: barriers waited for."""

    stall: int
    writes: int | None
    reads: int | None
    waits: tuple[int, ...]

    @classmethod
    def of(cls, second_word: int) -> Control:
        bits = second_word >> 41
        writes, reads = (bits >> 5) & 7, (bits >> 8) & 7
        return cls(
            bits & 15,
            None if writes == 7 else writes,
            None if reads == 7 else reads,
            tuple(i for i in range(6) if bits >> (11 + i) & 1),
        )


class Instruction(NamedTuple):
    """text: without its predicate, which is "" for an instruction that always runs."""

    address: int
    predicate: str
    text: str
    control: Control

    @property
    def opcode(self) -> str:
        """With its modifiers: "LDG.E.128"."""
        return self.text.split()[0]

    @property
    def name(self) -> str:
        """Without: "LDG"."""
        return self.opcode.partition(".")[0]


class Loop(NamedTuple):
    """Instructions from first up to, not with, last; inner: the loops inside."""

    first: int
    last: int
    inner: tuple[Loop, ...] = ()

    def own(self) -> list[int]:
        """The indices of instructions that are in no inner loop."""
        within = {i for loop in self.inner for i in range(loop.first, loop.last)}
        return [i for i in range(self.first, self.last) if i not in within]


class Code(NamedTuple):
    """A kernel. loops: the outermost, in order."""

    instructions: tuple[Instruction, ...]
    loops: tuple[Loop, ...]

    def every_loop(self) -> list[Loop]:
        """Inner loops behind those that hold them."""
        found: list[Loop] = []
        waiting = list(self.loops)
        while waiting:
            loop = waiting.pop(0)
            found.append(loop)
            waiting = [*loop.inner, *waiting]
        return found


def parse(text: str) -> Code:
    """Of a text with hexadecimal words: ``nvdisasm -c -hex``. The padding behind the last instruction is left out."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    pending: tuple[int, str] | None = None
    for line in text.splitlines():
        if pending is not None:
            if (word := _SECOND_WORD.match(line)) is not None:
                address, words = pending
                predicate, rest = "", words
                if (found := _PREDICATE.match(words)) is not None:
                    predicate, rest = found.groups()
                instructions.append(Instruction(address, predicate, rest, Control.of(int(word[1], 16))))
            pending = None
        elif (found := _INSTRUCTION.match(line)) is not None:
            pending = int(found[1], 16), found[2]
        elif (found := _LABEL.match(line)) is not None:
            labels[found[1]] = len(instructions)
    loops = _loops(instructions, labels)
    while instructions and (instructions[-1].name == "NOP" or _to_itself(instructions, labels)):
        instructions.pop()
    return Code(tuple(instructions), loops)


def _to_itself(instructions: list[Instruction], labels: dict[str, int]) -> bool:
    last = len(instructions) - 1
    return _target(instructions[last], labels) == last


def _target(instruction: Instruction, labels: dict[str, int]) -> int | None:
    found = _TARGET.search(instruction.text) if instruction.name == "BRA" else None
    return labels.get(found[1]) if found else None


def _loops(instructions: list[Instruction], labels: dict[str, int]) -> tuple[Loop, ...]:
    """Every branch backwards closes a loop; two that go back to one place close one."""
    ends: dict[int, int] = {}
    for i, instruction in enumerate(instructions):
        start = _target(instruction, labels)
        if start is not None and start < i:
            ends[start] = max(ends.get(start, 0), i + 1)
    return _nested(sorted(ends.items(), key=lambda span: (span[0], -span[1])))


def _nested(spans: list[tuple[int, int]]) -> tuple[Loop, ...]:
    found = []
    while spans:
        first, last = spans[0]
        inside = [span for span in spans[1:] if span[1] <= last]
        found.append(Loop(first, last, _nested(inside)))
        # One that begins inside and ends outside is no loop of ours: code that is entered from elsewhere.
        spans = [span for span in spans[1:] if span[0] >= last]
    return tuple(found)
