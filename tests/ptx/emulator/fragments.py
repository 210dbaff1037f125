"""Where the elements of a matrix lie: in the registers of a warp or a warp group, and in shared memory.

Each function gives indices for numpy: of registers (``registers[register, lane]``) or bytes. Sections are those of the
PTX ISA 9.0; test_ptx_matrix.py and test_ptx_wgmma.py hold them against tables transcribed from there.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from .arithmetic import HALVES, tf32_values

LANES = np.arange(32)
GROUP, MEMBER = LANES >> 2, LANES & 3
"""groupID and threadID_in_group of 9.7.14.5 (Matrix Fragments)."""


def a_places(register: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, first column) of what a lane's register of A [16, 256 bits] holds: m16n8k16 of 16 bits, m16n8k8 of TF32.
    Registers are (rows 0 to 7, low columns), (rows 8 to 15, low), (0 to 7, high), (8 to 15, high)."""
    elements = 32 // bits
    return GROUP + 8 * (register & 1), elements * (MEMBER + 4 * (register >> 1))


def b_places(register: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(first row, column) of what a lane's register of B [256 bits, 8] holds."""
    elements = 32 // bits
    return elements * (MEMBER + 4 * register), GROUP


def c_places(register: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) of a lane's register of C and D [16, 8] in fp32."""
    return GROUP + 8 * (register >> 1), 2 * MEMBER + (register & 1)


EIGHTS = GROUP, 2 * MEMBER
"""(row, first of two columns) of what a lane's register of an 8x8 matrix of 16-bit elements holds, as ldmatrix and
stmatrix have it (9.7.14.5.15)."""


def group_accumulator(registers: int) -> tuple[np.ndarray, np.ndarray]:
    """(row, column) [registers, 128] of D [64, 2 * registers] in a warp group (9.7.15.5.1.1): each warp has 16 rows."""
    lane = np.arange(128)
    register = np.arange(registers)[:, None]
    row = 16 * (lane >> 5) + (lane >> 2 & 7) + 8 * (register >> 1 & 1)
    return row, 8 * (register >> 2) + 2 * (lane & 3) + (register & 1)


SWIZZLE_BYTES = {0: 16, 1: 128, 2: 64, 3: 32}
"""Width of a row of a core matrix, by the descriptor's bits 62 and 63 (9.7.15.5.1.2.2: none, 128, 64, 32 bytes)."""


class Descriptor(NamedTuple):
    """A matrix in shared memory (9.7.15.5.1.2.2). start, leading, stride: bytes. row: SWIZZLE_BYTES of its mode."""

    start: int
    leading: int
    stride: int
    row: int
    base_offset: int

    @classmethod
    def of(cls, word: int) -> Descriptor:
        start, leading, stride = ((word >> at & 0x3FFF) << 4 for at in (0, 16, 32))
        return cls(start, leading, stride, SWIZZLE_BYTES[word >> 62 & 3], word >> 49 & 7)

    def addresses(self, outer: int, inner: int, size: int, transposed: bool) -> np.ndarray:
        """[outer, inner] first bytes of elements of size bytes; outer is M or N, inner is K.

        K-major, eight rows of the outer dimension are a core matrix, and groups of eight lie stride apart; without
        swizzle its rows have 16 bytes, and the next 16 bytes of K lie leading apart. MN-major (transposed), a core
        matrix is eight of K with a row of the outer dimension each; the next eight of K lie stride apart, the next row
        of the outer dimension leading apart (without swizzle the other way round).
        """
        m, k = np.arange(outer)[:, None], np.arange(inner)[None, :]
        if not transposed:
            offset = (m // 8) * self.stride + (m % 8) * self.row
            offset = offset + (k * size // 16 * self.leading + k * size % 16 if self.row == 16 else k * size)
        else:
            along = self.row // size
            far, near = (self.stride, self.leading) if self.row == 16 else (self.leading, self.stride)
            offset = (m // along) * far + (m % along) * size + (k % 8) * self.row + (k // 8) * near
        return swizzled(self.start + offset, self.row)


def swizzled(address: np.ndarray, row: int) -> np.ndarray:
    """Units of 16 bytes exchanged by the bits of an absolute address above 128 bytes: three of them for rows of 128
    bytes, two for 64, one for 32 (9.7.15.5.1.2.1)."""
    return address ^ ((address >> 7 & (row // 16 - 1)) << 4)


def matrix_values(bits: np.ndarray, kind: str) -> np.ndarray:
    """fp32 values of a matrix operand's elements."""
    return tf32_values(bits) if kind == "tf32" else HALVES[kind][0](bits)


def fragment_values(registers: list[np.ndarray], kind: str) -> np.ndarray:
    """A [warps, 16, 256 bits] of its four registers, [warps, 32] each."""
    bits = 32 if kind == "tf32" else 16
    found = np.zeros((len(registers[0]), 16, 256 // bits), np.uint32 if bits == 32 else np.uint16)
    for i, register in enumerate(registers):
        row, column = a_places(i, bits)
        for part in range(32 // bits):
            found[:, row, column + part] = register >> np.uint32(bits * part) if part else register.astype(found.dtype)
    return matrix_values(found, kind)
