"""Which lane, register and byte holds which element of a matrix: tables of PTX ISA 9.0, transcribed.

Written from the text of the manual and from no emulator, so that a mistake shared by an emulator's loads and products
cannot cancel.
"""

from __future__ import annotations

from typing import NamedTuple


class Fragment(NamedTuple):
    """Where a lane's elements e0, e1, ... lie. With groupID = lane >> 2 and threadID_in_group = lane & 3:

    element i lies at (groupID + elements[i][0], step * threadID_in_group + elements[i][1]), turned round where
    ``turned`` (matrix B, whose columns go by groupID). packed: elements a 32-bit register, the first in its low bits.
    """

    rows: int
    columns: int
    step: int
    elements: tuple[tuple[int, int], ...]
    packed: int = 1
    turned: bool = False

    def place(self, lane: int, element: int) -> tuple[int, int]:
        """(row, column) of a lane's element."""
        group, thread = lane >> 2, lane & 3
        by_group, by_thread = self.elements[element]
        at = group + by_group, self.step * thread + by_thread
        return at[::-1] if self.turned else at


# 9.7.14.5.8 Matrix Fragments for mma.m16n8k16 with floating point type. A: "row = groupID for ai where 0 <= i < 2 or
# 4 <= i < 6, groupID + 8 otherwise; col = threadID_in_group * 2 + (i & 1) for i < 4, + 8 for i >= 4".
M16N8K16_A = Fragment(16, 16, 2, ((0, 0), (0, 1), (8, 0), (8, 1), (0, 8), (0, 9), (8, 8), (8, 9)), packed=2)
# B: "row = threadID_in_group * 2 + (i & 1) for i < 2, + 8 for i >= 2; col = groupID".
M16N8K16_B = Fragment(16, 8, 2, ((0, 0), (0, 1), (0, 8), (0, 9)), packed=2, turned=True)
# C and D, here and in 9.7.14.5.7: "row = groupID for c0 and c1, groupID + 8 for c2 and c3; col = threadID_in_group * 2
# + (i & 1)".
M16N8_C = Fragment(16, 8, 2, ((0, 0), (0, 1), (8, 0), (8, 1)))
# 9.7.14.5.7 Matrix Fragments for mma.m16n8k8, .tf32. A: "row = groupID for a0 and a2, groupID + 8 for a1 and a3; col =
# threadID_in_group for a0 and a1, threadID_in_group + 4 for a2 and a3".
M16N8K8_A = Fragment(16, 8, 1, ((0, 0), (8, 0), (0, 4), (8, 4)))
# B: "row = threadID_in_group for b0, threadID_in_group + 4 for b1; col = groupID".
M16N8K8_B = Fragment(8, 8, 1, ((0, 0), (0, 4)), turned=True)
# 9.7.14.5.15 ldmatrix, 9.7.14.5.16 stmatrix: a group of four lanes has a row, each lane two elements of 16 bits; .trans
# reads the matrix by columns.
M8N8 = Fragment(8, 8, 2, ((0, 0), (0, 1)), packed=2)
M8N8_TRANS = M8N8._replace(turned=True)

LDMATRIX_ADDRESSES = {1: (range(8),), 2: (range(8), range(8, 16)),
                      4: (range(8), range(8, 16), range(16, 24), range(24, 32))}  # fmt: skip
"""9.7.14.5.15: the lanes whose addresses are rows 0 to 7 of matrix 0, 1, 2, 3, of .x1, .x2, .x4."""


def wgmma_d(n: int) -> Fragment:
    """9.7.15.5.1.1.1 and .2, figures 149 and 151: a warp's 16 rows of D, by its place in the warp group. Of each 8
    columns a lane has four elements as in mma's C; the next four are 8 columns on."""
    return Fragment(16, n, 2, tuple((row, 8 * j + column) for j in range(n // 8) for row, column in M16N8_C.elements))


WGMMA_A16 = M16N8K16_A
"""Figure 148: a warp's 16 rows of A in registers, .f16 and .bf16."""

WGMMA_A_TF32 = M16N8K8_A
"""Figure 150."""


SWIZZLES = {
    128: ("01234567", "10325476", "23016745", "32107654", "45670123", "54761032", "67452301", "76543210"),
    64: ("0123", "0123", "1032", "1032", "2301", "2301", "3210", "3210"),
    32: ("01", "01", "01", "01", "10", "10", "10", "10"),
    0: ("0",) * 8,
}
"""9.7.15.5.1.2 Shared Memory Matrix Layout, figures 156 to 163: which 16 bytes of a row of the atom hold chunk 0, 1,
..., for the eight rows of the atom, which begins at a multiple of eight of its rows."""

SWIZZLE_MODES = {0: 0, 128: 1, 64: 2, 32: 3}
"""9.7.15.5.1.2.2 Matrix Descriptor Format, bits 63-62."""

CANONICAL = {
    ("MN", 0): ((1, 16, "SBO"), (8, 16, "LBO")),
    ("MN", 32): ((2, 16, "LBO"), (8, 32, "SBO")),
    ("MN", 64): ((4, 16, "LBO"), (8, 64, "SBO")),
    ("MN", 128): ((8, 16, "LBO"), (8, 128, "SBO")),
    ("K", 0): ((1, 16, "LBO"), (8, 16, "SBO")),
    ("K", 32): ((2, 16, None), (8, 32, "SBO")),
    ("K", 64): ((4, 16, None), (8, 64, "SBO")),
    ("K", 128): ((8, 16, None), (8, 128, "SBO")),
}
"""9.7.15.5.1.2.1.3 Canonical Layouts, in units of 128 bits: (major-ness, swizzle in bytes) -> for the units along the
leading dimension, and for the other dimension: (how many are ``stride`` bytes apart, that stride, what the next such
group is apart)."""


def swizzled(address: int, swizzle: int) -> int:
    """Where a byte of the layout without swizzling lies: the pattern goes by the address itself."""
    table = SWIZZLES[swizzle]
    chunks = len(table[0])
    row, chunk = address // 16 // chunks % 8, address // 16 % chunks
    return address + 16 * (int(table[row][chunk]) - chunk)


def operand_byte(major: str, swizzle: int, size: int, start: int, lbo: int, sbo: int, mn: int, k: int) -> int:
    """The address of element (mn, k) of an operand in shared memory. size: bytes an element."""
    along, across = (mn, k) if major == "MN" else (k, mn)
    offsets = {"LBO": lbo, "SBO": sbo, None: 0}
    unit, within = divmod(along * size, 16)
    address = start + within
    for index, (count, stride, beyond) in zip((unit, across), CANONICAL[major, swizzle], strict=True):
        assert beyond or index < count, "K beyond the swizzle"
        address += index % count * stride + index // count * offsets[beyond]
    return swizzled(address, swizzle)


def descriptor(swizzle: int, lbo: int, sbo: int, start: int = 0, base_offset: int = 0) -> int:
    """9.7.15.5.1.2.2: bits 13-0 start address, 29-16 leading dimension byte offset, 45-32 stride dimension byte offset,
    each as (x & 0x3FFFF) >> 4; 51-49 base offset; 63-62 the mode of swizzling."""
    fields = ((start, 0), (lbo, 16), (sbo, 32))
    encoded = sum(((x & 0x3FFFF) >> 4) << bit for x, bit in fields)
    return encoded | base_offset << 49 | SWIZZLE_MODES[swizzle] << 62
