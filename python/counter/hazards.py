"""Whether a wgmma that reads registers is waited for before they are written.

ptxas of CUDA 12.8 and 12.9 (Triton 3.5 to 3.9 for sm_90) may let a later instruction write the registers of a wgmma
that still runs (triton#9433, triton#11781). A write is safe behind a WARPGROUP.DEPBAR that leaves no more groups open
than were closed after the instruction's own.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from counter.pipes import from_registers
from counter.sass import Code, Instruction

_WRITE_NONE = ("ST", "RED", "HGMMA", "LDGSTS")
"""Their first register is an address or, of wgmma, the accumulator, which is no operand of another."""


class Hazard(NamedTuple):
    """A wgmma with a register operand. distance: instructions until its registers are written or a wait ends it,
    whichever comes first; written: by what, "" where the wait comes first or nothing writes."""

    text: str
    distance: int
    written: str


def written(instruction: Instruction) -> set[int]:
    """The registers that an instruction writes."""
    name, opcode = instruction.name, instruction.opcode
    if name.startswith(_WRITE_NONE):
        return set()
    # A shuffle has one predicate before its register, a comparison two and no register.
    found = re.match(r"\S+\s+(?:P[T\d],\s*)?R(\d+)\b", instruction.text)
    if found is None:
        return set()
    first, width = int(found[1]), 1
    if name == "HMMA" or ".128" in opcode:
        width = 4
    elif ".64" in opcode or ".WIDE" in opcode or (name == "CS2R" and ".32" not in opcode):
        width = 2
    elif name == "LDSM":
        width = int(opcode[-1]) if opcode[-2] == "." else 1
    return set(range(first, first + width))


def register_operands(code: Code) -> list[Hazard]:
    """Every wgmma of a kernel that reads registers, with what follows it, around its loop as well."""
    found = []
    for i, instruction in enumerate(code.instructions):
        operand = set(from_registers(instruction))
        if operand:
            found.append(_after(code, i, operand))
    return found


def _after(code: Code, start: int, operand: set[int]) -> Hazard:
    """Follows the code behind an instruction: to the end of the innermost loop, once around it, then out of it."""
    path = list(range(start + 1, len(code.instructions)))
    loop = next((loop for loop in reversed(code.every_loop()) if loop.first <= start < loop.last), None)
    if loop is not None:
        path = [*range(start + 1, loop.last), *range(loop.first, start)]
    hazard = _along(code, start, path, operand)
    if loop is not None and not hazard.written:
        out = _along(code, start, [*range(start + 1, len(code.instructions))], operand)
        hazard = out if out.written else hazard
    return hazard


def _along(code: Code, start: int, path: list[int], operand: set[int]) -> Hazard:
    text = code.instructions[start].text
    # Its own group may still be open; those that are closed after it are younger.
    younger = 0 if "gsb0" in text else -1
    for distance, i in enumerate(path, 1):
        instruction = code.instructions[i]
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            open_groups = int(re.search(r"gsb0, 0x([0-9a-f]+)", instruction.text)[1], 16)
            if younger >= 0 and open_groups <= younger:
                return Hazard(text, distance, "")
        if written(instruction) & operand:
            return Hazard(text, distance, instruction.text)
        younger += instruction.name == "HGMMA" and "gsb0" in instruction.text
    return Hazard(text, len(path), "")
