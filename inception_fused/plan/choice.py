"""Which implementation and which tile a launch takes: data and rules, no launches.

The launches stand in launches.py, their rules in kernel_table.py. Some kernels exist twice, in CUDA C++ (native) and in
Triton; ROUTES says which one an architecture takes.

``print(choice.describe())`` shows every rule and its tile, ``python -m inception_fused plan`` what each launch of a
block takes and why. The rules' tiles come from arithmetic and from what compiles without spills for sm_80 to sm_120;
none has been timed on a GPU yet. ``python python/tune.py`` times tiles on a GPU and writes a table, which then comes
before the rules there (tuned.py).
"""

from __future__ import annotations

from functools import lru_cache

import torch

from inception_fused.block.shapes import BlockShape
from inception_fused.block.views import Tile
from inception_fused.plan import kernel_table, launches, problems, tile_table, tuned
from inception_fused.plan.kernel_table import RULES
from inception_fused.plan.problems import Launch
from inception_fused.plan.rules import (
    NATIVE_BLOCK_K_BYTES,
    NATIVE_STAGES,
    NATIVE_WARPS,
    PLANNED,
    UNALIGNED,
    WAVE,
    Capability,
    Rule,
)

FORWARD, BACKWARD = (
    tuple(
        kernel.name for kernel in kernel_table.BLOCK_KERNELS if kernel.direction == direction and kernel.name != "pack"
    )
    for direction in ("forward", "backward")
)
"""Of a block."""

POOLS = tuple(kernel.name for kernel in kernel_table.POOL_KERNELS)
KERNELS = (*FORWARD, *BACKWARD, *POOLS)

COMPILED = tuple(kernel.name for kernel in kernel_table.KERNELS if kernel.native is not None)
"""Kernels that the extension has too."""

IMPLEMENTATIONS = {k: ("native", "triton", "eager") if k in COMPILED else ("triton", "eager") for k in KERNELS}
"""What can compute each kernel. "eager" is the ATen twin."""

ROUTES = (
    ((8, 0), "native"),
    ((9, 0), "triton"),
    ((10, 0), "triton"),
    ((12, 0), "native"),
)
"""The implementation of a COMPILED kernel from a compute capability on. A guess until measured: Triton emits wgmma for
sm_90 and tcgen05 for sm_100, the native kernels mma.sync for all, which is also the fastest instruction that sm_80, 86,
89 and 120 have. ``python python/gpu_check.py --stages native`` measures both forms of both."""

INTERPRETER_LIMITS = Tile(512, 256, 256, GROUP_M=2, num_stages=1)
"""The interpreter's cost is Python per program and operation, so few large tiles."""

INTERPRETER_BLOCK = 1 << 17
"""Elements of a program that only copies or adds; Triton's largest tensor has 2**20."""

PARTIAL_BYTES = 12 << 20
"""Most that the partial sums of one launch may take. The four of a block of GoogLeNet take at most 38 MiB at batch 128,
which stays in an L2 of 40 MB and more until B5 adds them; 48 MiB in any block, 60 of two windows in branch 3."""

MULTIPROCESSORS = (108, 132)
"""Of an A100, of an H100 and H200: whose rounds of programs :func:`split_k` counts."""

MAX_RANGES = 512
"""Most rows of the mask's partial sums: with four or more tiles of columns enough programs, and little to add up."""

END_OF_RANGE, MOST_TILES = 3, 16
"""Of how many tiles what ends a range of statistics takes the time, and of how many tiles a range is at most longer."""

MIN_STEPS = 4
"""Fewest steps of GEMM_K in a range of wgrad, below which writing and adding up the partial sums costs more."""

MOST_PROGRAMS = 4
"""Most programs a multiprocessor into which wgrad is cut: from there on it gains less than the parts cost."""

EXTRA_STEPS = 5
"""Of how many steps a program of wgrad has the instructions before and behind its loop (counted: 4 to 8)."""


@lru_cache(maxsize=1024)
def split_k(tiles: int, steps: int, weight: int, together: int = 1) -> int:
    """Ranges into which wgrad cuts GEMM_K: those with which it ends first, as far as steps and PARTIAL_BYTES allow.

    tiles: of one launch; steps: of GEMM_K in all; weight: elements of its weight; together: programs that one
    multiprocessor computes as soon as one. By shape and tile alone, never by the card: where the rules give the same
    tile (sm_90 and sm_100; all others), a sum has the same order on every GPU.

    The multiprocessor with the most programs has ceil(programs / multiprocessors) of them, each with its range's steps
    and EXTRA_STEPS more. The cost is the sum of that time, in steps of the whole GPU, over MULTIPROCESSORS: programs
    just beyond what fits are a round for few, and 132 of them would leave an A100 idle for 39% of its time, where 108
    leave an H200 idle for 18%. A GPU of another size gets what suits these.
    """
    most = min(MOST_PROGRAMS * max(MULTIPROCESSORS) // tiles, steps // MIN_STEPS, PARTIAL_BYTES // (4 * weight))

    def cost(ranges: int) -> int:
        rounds = sum(-(-tiles * ranges // (count * together)) * count for count in MULTIPROCESSORS)
        return rounds * (-(-steps // ranges) + EXTRA_STEPS)

    best = min(range(1, max(1, most) + 1), key=cost)
    # As many as are not empty where each has as many steps as the longest.
    return -(-steps // -(-steps // best))


def border_words(image: tuple[int, int]) -> int:
    """Words of borders that B1 writes for B4: a step from an image's last pixel on ends within them."""
    return image[0] * image[1] + tile_table.MAX_BLOCK


def row_ranges(gemm_m: int, block_m: int) -> tuple[int, int]:
    """(number of ranges, tiles of rows in each) into which the mask's launch cuts its rows."""
    tiles = -(-gemm_m // block_m)
    each = -(-tiles // MAX_RANGES)
    return -(-tiles // each), each


def statistics_ranges(launch: Launch, tile: Tile) -> tuple[int, int]:
    """:func:`row_ranges` of a launch that takes BatchNorm's statistics, of a forward or of a gradient.

    What ends a range takes as long as two to three tiles (counted: N1 410 instructions, a tile 155), so ranges of
    several tiles take less, as long as three programs a multiprocessor are left to keep DRAM busy: 158 -> 103 us of
    instructions for N1 of the nine blocks at batch 128 in bf16 on an H200 in tiles of 64 rows, where the bytes take 97
    (counted).
    """
    slices = launch.filters if launch.apart else [sum(launch.filters)]
    columns = sum(-(-channels // tile.BLOCK_N) for channels in slices)
    return _statistics_ranges(-(-launch.pixels // tile.BLOCK_M), columns)


@lru_cache(maxsize=1024)
def _statistics_ranges(tiles: int, columns: int) -> tuple[int, int]:
    least = -(-tiles // MAX_RANGES)

    def programs(each: int) -> int:
        return -(-tiles // each) * columns

    def cost(each: int) -> int:
        return sum(-(-programs(each) // count) * count for count in MULTIPROCESSORS) * (each + END_OF_RANGE)

    several = range(least, least + MOST_TILES)
    fitting = [each for each in several if each == least or programs(each) >= 3 * max(MULTIPROCESSORS)]
    each = min(fitting, key=cost)
    return -(-tiles // each), each


def interpreter_tile(gemm_m: int, gemm_n: int, channels: int) -> Tile:
    """The tile for the interpreter: one for the whole problem, up to INTERPRETER_LIMITS."""

    def cover(size: int, limit: int) -> int:
        return max(16, min(limit, 1 << (size - 1).bit_length()))

    m, n, k = INTERPRETER_LIMITS[:3]
    return INTERPRETER_LIMITS._replace(BLOCK_M=cover(gemm_m, m), BLOCK_N=cover(gemm_n, n), BLOCK_K=cover(channels, k))


def choose_tile(
    rules: str, dtype: torch.dtype, *, gemm_m: int, gemm_n: int, unit: int, gemm_k: int = 0, taps: int = 1,
    gpu: tuned.Gpu | None = None, capability: Capability = PLANNED,
) -> Tile:  # fmt: skip
    """The tile for one problem: a tuned table's where one is in force and knows the problem, else the rule's.

    rules: a key of RULES; gemm_m, gemm_n, gemm_k, taps: as problems.Gemm has them, of which only a table asks
    for the last two; unit: as unit_of() gives it; gpu: as tuned.key() gives it; capability: which the rules ask.
    """
    if gpu is not None and unit != 1:
        entry = tuned.lookup(gpu, rules, dtype, gemm_m, gemm_n, gemm_k, taps)
        if entry is not None:
            return entry.tile
    return _ruled(rules, dtype, gemm_m, gemm_n, unit, capability)


@lru_cache(maxsize=4096)
def _ruled(rules: str, dtype: torch.dtype, gemm_m: int, gemm_n: int, unit: int, capability: Capability) -> Tile:
    return RULES[rules].choose(dtype, gemm_m, gemm_n, unit, capability).tile(dtype)


def tile_of(launch: Launch, gpu: tuned.Gpu | None = None) -> Tile:
    """The tile of a launch's Triton kernel; see :func:`choose_tile`."""
    gemm = launch.gemm
    sizes = dict(gemm_m=gemm.m, gemm_n=gemm.n, gemm_k=gemm.k, taps=gemm.taps)
    return choose_tile(
        launch.rules, launch.dtype, **sizes, unit=launch.unit, gpu=gpu, capability=launch.capability
    )  # fmt: skip


def native_tile_of(launch: Launch) -> Tile:
    """The tile of the form in CUDA C++."""
    return launch.kernel.native.choose(launch.dtype, launch.gemm.m, launch.gemm.n, launch.unit)


def rule_of(launch: Launch) -> Rule:
    """The rule that serves a launch where no table does."""
    return RULES[launch.rules].choose(launch.dtype, launch.gemm.m, launch.gemm.n, launch.unit, launch.capability)


def tuned_of(launch: Launch, gpu: tuned.Gpu | None) -> tuned.Found | None:
    """What a tuned table in force says of a launch; None where the rule serves it."""
    if gpu is None or launch.unit == 1:
        return None
    return tuned.lookup(gpu, launch.rules, launch.dtype, *launch.gemm)


def tiled(
    shape: BlockShape, dtype: torch.dtype, *, backward: bool = True, capability: Capability = PLANNED,
    normed: bool = False,
) -> list[Launch]:  # fmt: skip
    """The launches of a block whose tile the plan chooses, in order, for a dense input and a channels_last gradient.
    normed: with statistics of the batch."""
    directions = ("forward", "backward") if backward else ("forward",)
    given = dict(capability=capability, normed=normed)
    passes = [problems.launches_of(shape, dtype, direction, **given) for direction in directions]
    return [launch for found in passes for launch in found if launch.rules]


def ranges(launch: Launch, tile: Tile) -> int:
    """Ranges into which a launch cuts GEMM_K."""
    if launch.row.role != launches.WGRAD:
        return 1
    gemm = launch.gemm
    tiles = -(-gemm.m // tile.BLOCK_M) * -(-gemm.n // tile.BLOCK_N)
    # Without a pipeline one program waits for its loads while another computes.
    together = 2 if tile.num_stages == 1 else 1
    return split_k(tiles, -(-gemm.k // tile.BLOCK_K), gemm.m * gemm.n, together)


def route(kernel: str, capability: tuple[int, int]) -> str:
    """ "native" or "triton": what "auto" takes for a kernel on a compute capability, (8, 0) or higher."""
    if kernel not in COMPILED:
        return "triton"
    return [implementation for lowest, implementation in ROUTES if capability >= lowest][-1]


def describe() -> str:
    """The rules as a table."""
    rows = [("kernel", "rule", "applies if", "BLOCK_M", "BLOCK_N", "BLOCK_K bytes", "stages", "warps")]
    for key, found in RULES.items():
        rows += [(key, rule.name, rule.condition(), *_figures(rule)) for rule in found.rules]
    special = [(key, found.unaligned) for key, found in RULES.items() if found.unaligned != UNALIGNED]
    for key, rule in (*special, ("others", UNALIGNED)):
        rows.append((key, rule.name, "not in units of 16 bytes, before all others", *_figures(rule)))
    for kernel in kernel_table.KERNELS:
        if kernel.native is None:
            continue
        fewer = "the fewer columns, " if len(kernel.native.large) > 1 else ""
        native = [("large", f"{fewer}at least {WAVE} tiles", block) for block in kernel.native.large]
        native += [("small", "otherwise", kernel.native.small)]
        native += [("unaligned", "not in units of 16 bytes", kernel.native.unaligned)]
        for name, condition, block in native:
            figures = (*block, NATIVE_BLOCK_K_BYTES, NATIVE_STAGES, NATIVE_WARPS)
            rows.append((f"{kernel.name} native", name, condition, *map(str, figures)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    routes = ", ".join(f"{implementation} from sm_{major}{minor}" for (major, minor), implementation in ROUTES)
    return "\n".join([*lines, f"{' and '.join(COMPILED)} computed by: {routes}"])


def _figures(rule: Rule) -> tuple[str, ...]:
    return tuple(map(str, (rule.block_m, rule.block_n, rule.block_k_bytes, rule.num_stages, rule.num_warps)))


@lru_cache(maxsize=1024)
def exceeds_int32(shape: BlockShape, x_row_stride: int) -> bool:
    """Whether an offset inside a tile, a row number or an offset into a weight would not fit into 32 bits, forward or
    backward.

    Inside a tile lie its rows and, for a 5x5 window, two image rows and two pixels on either side.
    """
    rows = tile_table.MAX_BLOCK + 2 * (2 * shape.w + 2)
    widest = max(x_row_stride, shape.grads_width, shape.c)
    # A weight's rows reach a tile beyond its end, masked but computed; in the backward pass they are its columns.
    block = tile_table.MAX_BLOCK
    k = shape.branch_channels[0] + shape.r_width
    sizes = [(k, shape.c)]
    for filters, channels, side in zip(shape.filters, shape.inputs, shape.sides, strict=True):
        sizes += [(filters, side**2 * channels), (side**2 * filters, channels)]
    weight = max((a + block) * (b + block) for a, b in sizes)
    # 1024: what csrc/tile_table.h keeps free below 2**31 for its last tile and step.
    return max(rows * widest, shape.gemm_m + max(rows, 1024), weight) >= 2**31
