"""What the programs of a launch do: how many there are, the steps of each, and what they read through L2.

steps     BLOCK_K elements of GEMM_K each; wgrad's are cut into ranges (choice.ranges)
operands  a tile of rows is read once by every tile of columns and the other way round, once for each tap; what a
          mask leaves out is not read
window    a max-pool over pixels reads x nine times past L1, or its clamped window once through L1
"""

from __future__ import annotations

from typing import NamedTuple

from inception_fused.block.views import Tile
from inception_fused.plan import choice, launches
from inception_fused.plan.problems import PARTIAL_SUM_BYTES, Launch

TAPS = 9
"""Of the pool's window, and trips of a loop that gathers its gradient."""

GATHER_READS = 4
"""How often B3's gather reads dpool and taps through L2, of nine times: a guess, the rows above and below come again
while L1 still holds them."""


class Walk(NamedTuple):
    """programs: of the grid; steps: of GEMM_K, of one program; l2: bytes that all programs read through L2."""

    programs: int
    steps: int
    l2: float


def walk(launch: Launch, tile: Tile, ranges: int, *, through_l1: bool = False) -> Walk:
    """Of a launch with a product. ranges: into which its GEMM_K is cut; through_l1: whether its main loop reads through
    L1 (counts.Binary)."""
    gemm, e, role = launch.gemm, launch.shape.itemsize, launch.row.role
    rows, columns = -(-gemm.m // tile.BLOCK_M), -(-gemm.n // tile.BLOCK_N)
    steps = -(-gemm.taps * -(-gemm.k // tile.BLOCK_K) // ranges)
    m_reads, n_reads = float(columns), float(rows)
    if launch.row.pooled and role == launches.FPROP:
        m_reads *= window_reads(tile.BLOCK_M, launch.shape.w, through_l1)
    if launch.row.pooled and role == launches.WGRAD:
        n_reads *= window_reads(tile.BLOCK_K, launch.shape.w, through_l1)
    moved = e * gemm.taps * gemm.k * (m_reads * gemm.m + n_reads * gemm.n)
    if role == launches.DGRAD_X:
        # Half a byte of taps beside each element of dpool.
        moved += GATHER_READS * gemm.m * gemm.n * (e + 0.5)
    if role == launches.WGRAD:
        moved += part_bytes(launch, ranges)
    return Walk(rows * columns * ranges, steps, moved)


def part_bytes(launch: Launch, ranges: int) -> float:
    """Of the partial sums that a wgrad writes, and B5 reads: through L2, which they fit into."""
    return PARTIAL_SUM_BYTES * ranges * launch.gemm.m * launch.gemm.n


def window_reads(pixels: int, width: int, through_l1: bool) -> float:
    """How often a max-pool reads x through L2 whose program takes so many pixels at a time: nine times past L1, or
    through L1 the pixels with a row of the image and one pixel on either side, once."""
    return min(TAPS, (pixels + 2 * (width + 1)) / pixels) if through_l1 else TAPS


def mask_programs(launch: Launch, tile: Tile) -> int:
    """Programs of B1: ranges of rows by tiles of each branch's columns."""
    columns = sum(-(-channels // tile.BLOCK_N) for channels in launch.shape.branch_channels)
    return choice.row_ranges(launch.gemm.m, tile.BLOCK_M)[0] * columns


def moved(launch: Launch, tile: Tile | None, rows: int) -> Walk:
    """Of a launch of BatchNorm's, without a product: its steps are tiles of rows, or of ``rows`` partial sums. tile:
    None where nobody says how its partial sums are combined."""
    filters = launch.filters
    if launch.row.role == launches.COMBINE:
        read = 2 * PARTIAL_SUM_BYTES * rows * sum(filters)
        if tile is None:
            return Walk(0, 0, read)
        return Walk(-(-max(filters) // tile.BLOCK_N) * len(filters), -(-rows // tile.BLOCK_M), read)
    read = sum(launch.reads.values())
    slices = filters if launch.apart else (sum(filters),)
    columns = sum(-(-channels // tile.BLOCK_N) for channels in slices)
    if launch.row.role == launches.STATISTICS:
        count, each = choice.statistics_ranges(launch, tile)
        return Walk(count * columns, each, read)
    return Walk(-(-launch.pixels // tile.BLOCK_M) * columns, 1, read)


def part_rows(launch: Launch, tile: Tile) -> int:
    """Partial sums of each channel that BatchNorm's combine adds up behind a launch: of its ranges, or of its tiles of
    rows."""
    if launch.row.role == launches.STATISTICS:
        return choice.statistics_ranges(launch, tile)[0]
    return -(-launch.pixels // tile.BLOCK_M)
