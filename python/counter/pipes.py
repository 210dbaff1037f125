"""Which unit of a multiprocessor runs an instruction, and how much it moves or multiplies.

The columns of a count (plan/counts.py), an instruction of a warp each but where it says otherwise:

    issue    every instruction
    alu      integer, logic, comparison, selection, conversion between packed floats
    imad     integer multiply-add, which also moves, shifts and adds
    fma      floating-point add, multiply, multiply-add
    xu       reciprocal and the like, conversion between integer and float, population count
    lsu      loads, stores, shuffles
    tensor   matrix instructions
    uniform  arithmetic that is one for the warp
    control  branches, barriers, waits
    data     128 bytes each through shared memory or L1, of loads, stores and what a matrix instruction reads there
    macs     multiply-adds of matrix instructions, in units of MACS_UNIT

Which pipe an opcode takes is nowhere documented but by its rate (CUDA C++ Programming Guide, "Throughput of Native
Arithmetic Instructions"); what is not listed here counts as control.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from counter.sass import Instruction
from inception_fused.plan.counts import COLUMNS, MACS_UNIT

_OPCODES = {
    "alu": "IADD3 LOP3 ISETP SHF LEA SEL PRMT PLOP3 FMNMX IMNMX VIMNMX VIADD FSETP FSEL HMNMX2 HSETP2 SGXT P2R R2P IABS"
    " LOP BMSK F2FP MOV VOTE VOTEU CS2R HSET2 IADD VIADDMNMX VIMNMX3 FMNMX3 LOP32I FSET ISCADD MOV32I I2FP F2IP",
    "imad": "IMAD IMUL XMAD",
    "fma": "FFMA FADD FMUL HADD2 HFMA2 HMUL2 FADD2 FFMA2 FMUL2 FSWZADD DADD DFMA DMUL",
    "xu": "MUFU I2F F2I F2F POPC FLO BREV I2I FRND",
    "lsu": "LDGSTS LDG STG LDS STS LDSM STSM LDL STL LD ST LDC MATCH SHFL ATOMG ATOMS ATOM RED REDG STAS LDT STT",
    "tensor": "HGMMA HMMA QGMMA IMMA IGMMA UTCHMMA",
}
_PIPES = {opcode: pipe for pipe, opcodes in _OPCODES.items() for opcode in opcodes.split()}
_MOVES = frozenset(["LDGSTS", "LDG", "STG", "LDS", "STS", "LDSM", "STSM", "LDL", "STL", "LD", "ST"])
_HGMMA = re.compile(r"\.(\d+)x(\d+)x(\d+)")
_MATRICES = re.compile(r"\.MT?88(?:\.(\d))?$")
_HMMA = re.compile(r"\.(\d{4,5})\.")
_HMMA_SHAPES = {"1688": (16, 8, 8), "16816": (16, 8, 16), "1684": (16, 8, 4)}


def pipe(instruction: Instruction) -> str:
    name = instruction.name
    if name in _PIPES:
        return _PIPES[name]
    if name.startswith("U") or name in ("R2UR", "S2UR", "S2R"):
        return "uniform"
    return "control"


def macs(instruction: Instruction) -> int:
    """Multiply-adds of a matrix instruction, of one warp: a quarter of those of the four that issue one of wgmma."""
    if instruction.name.endswith("GMMA"):
        m, n, k = map(int, _HGMMA.search(instruction.opcode).groups())
        return m * n * k // 4
    found = _HMMA.search(instruction.opcode + ".")
    if instruction.name != "HMMA" or found is None:
        return 0
    m, n, k = _HMMA_SHAPES[found[1]]
    return m * n * k


def from_registers(instruction: Instruction) -> tuple[int, ...]:
    """The registers from which a wgmma reads its first operand; none where it lies in shared memory."""
    found = re.match(r"HGMMA\S* R\d+, R(\d+), gdesc", instruction.text)
    return tuple(range(int(found[1]), int(found[1]) + 4)) if found else ()


def data(instruction: Instruction) -> float:
    """128 bytes each that pass through shared memory or L1, for one warp whose lanes all take part."""
    opcode = instruction.opcode
    if instruction.name == "HGMMA":
        m, n, k = map(int, _HGMMA.search(opcode).groups())
        width = 4 if ".TF32" in opcode else 2
        rows = n + (0 if from_registers(instruction) else m)
        return rows * k * width / 128 / 4
    if instruction.name not in _MOVES:
        return 0
    if instruction.name in ("LDSM", "STSM"):
        # Of one, two or four matrices of 8x8 16-bit elements.
        return int(_MATRICES.search(opcode)[1] or 1)
    bits = 128 if ".128" in opcode else 64 if ".64" in opcode else 32
    return max(1, bits // 32)


def count(instructions: Iterable[Instruction]) -> dict[str, float]:
    """The columns of some instructions."""
    found = dict.fromkeys(COLUMNS, 0.0)
    for instruction in instructions:
        found["issue"] += 1
        found[pipe(instruction)] += 1
        found["data"] += data(instruction)
        found["macs"] += macs(instruction) / MACS_UNIT
    return found
