"""Which kernels a block takes, what they read and write, and with which tile: data and rules, no launches.

A forward is four launches and at most one before them:

    pack  parameters that need casting, permuting to KRSC or BatchNorm's scale and shift
    K1    grouped GEMM of the three 1x1 reductions      x  -> y's first slice, r3, r5
    K2    3x3 max-pool + 1x1                            x  -> y's last slice, taps
    K3    3x3 convolution                               r3 -> y's second slice
    K4    5x5 (or 3x3) convolution                      r5 -> y's third slice

A backward for all gradients is ten and one before them:

    pack  weights transposed, flipped and cast
    B1    mask and bias sums                            dy, bits -> g = [g2 | g3 | g4 | g1]
    B2    dgrad: 3x3, 5x5 (or 3x3), 1x1 of branch 4     g2, r3 -> dr3;  g3, r5 -> dr5;  g4 -> dpool
    B3    grouped 1x1 dgrad + the max-pool's gradient   [g1 | dr3 | dr5], dpool, taps -> dx
    B4    wgrad, split over pixels: 3x3, 5x5, 1x1, pool [g1 | dr3 | dr5], x;  g2, r3;  g3, r5;  g4, x -> partial sums
    B5    partial sums added up                         -> dw, db

K1 and B3 exist twice, in CUDA C++ (native) and in Triton; ROUTES says which one an architecture takes.

``print(plan.describe())`` shows every rule and its tile, ``python -m inception_fused plan`` what each launch of a block
takes and why. The rules' tiles come from arithmetic and from what compiles without spills for sm_80 to sm_120; none has
been timed on a GPU yet. ``python python/tune.py`` times tiles on a GPU and writes a table, which then comes before the
rules there (tuned.py).
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from inception_fused import tile_table, tuned
from inception_fused.kernels.views import Tile, unit_of
from inception_fused.shapes import BlockShape

FORWARD, BACKWARD = ("K1", "K2", "K3", "K4"), ("B1", "B2", "B3", "B4", "B5")
KERNELS = (*FORWARD, *BACKWARD)

COMPILED = ("K1", "B3")
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

MIN_SHARED_BYTES = 99 << 10
"""What one thread block may use on sm_86, sm_89 and sm_120, the least of sm_80 and up (CUDA C++ Programming Guide,
"Technical Specifications per Compute Capability"). Every rule's tile fits, so that the rules serve all."""


class Rule(NamedTuple):
    """``tile`` serves problems with GEMM_N <= max_n that it cuts into at least min_tiles tiles, in dtypes of
    itemsizes bytes.

    BLOCK_K is stated in bytes (block_k_bytes) and becomes elements by dtype, so one rule serves fp16, bf16 and fp32.
    """

    name: str
    block_m: int
    block_n: int
    block_k_bytes: int
    num_stages: int
    min_tiles: int = 0
    max_n: int | None = None
    itemsizes: tuple[int, ...] = (2, 4, 8)

    def tile(self, dtype: torch.dtype) -> Tile:
        return Tile(
            self.block_m, self.block_n, max(16, self.block_k_bytes // dtype.itemsize), num_stages=self.num_stages
        )

    def serves(self, itemsize: int, gemm_m: int, gemm_n: int) -> bool:
        tiles = -(-gemm_m // self.block_m) * -(-gemm_n // self.block_n)
        return tiles >= self.min_tiles and itemsize in self.itemsizes and (self.max_n is None or gemm_n <= self.max_n)

    def condition(self) -> str:
        parts = []
        if self.max_n is not None:
            parts.append(f"GEMM_N <= {self.max_n}")
        if len(self.itemsizes) == 1:
            parts.append(f"{self.itemsizes[0]}-byte dtypes")
        if self.min_tiles:
            parts.append(f"at least {self.min_tiles} tiles")
        return " and ".join(parts) or "otherwise"


WAVE = 128
"""Tiles from which on the large tile is taken: about one per multiprocessor of an A100 (108), H100 or H200 (132)."""

RULES: dict[str, tuple[Rule, ...]] = {
    # In fp32 128x128 spills beside the 64-bit weight pointers of straddling columns: 224 bytes on sm_100, Triton 3.9.
    "K1": (
        Rule("large", 128, 128, 128, 3, min_tiles=WAVE, itemsizes=(2,)),
        Rule("large fp32", 128, 64, 128, 3, min_tiles=WAVE, itemsizes=(4,)),
        Rule("small", 64, 64, 128, 3),
    ),
    # One tile of columns up to 128 channels, else the pool is computed again for each. 32 bytes of channels at a time:
    # with 64 the wide tile needed 255 registers on sm_90 and spilled under Triton 3.9, now 176, and in the narrow one,
    # whose operand comes from registers, ptxas 12.8 (Triton 3.6) lets the next step write what wgmma still reads.
    "K2": (
        Rule("narrow", 64, 64, 32, 2, max_n=64),
        Rule("wide", 64, 128, 32, 2),
    ),
    "K3": (
        Rule("large", 128, 128, 128, 3, min_tiles=WAVE),
        Rule("small", 64, 64, 128, 3),
    ),
    # 24 and 32 channels of a reduction fit one chunk of 64 bytes in 16-bit types; a 128-byte chunk would be half empty.
    "K4": (
        Rule("narrow", 64, 64, 64, 3, max_n=64),
        Rule("large", 128, 128, 64, 3, min_tiles=WAVE),
        Rule("small", 64, 64, 64, 3),
    ),
    "B1": (Rule("only", 64, 64, 32, 1),),
    # dy that is no matrix of rows has a 64-bit address an element: 64 bytes of stack at 64x64 in fp32, Triton 3.6.
    "B1 strided": (Rule("only", 32, 64, 32, 1),),
    # One tile each, since training must not compile more than 25 binaries: that of the many columns of dx.
    "B2": (Rule("only", 128, 64, 128, 3),),
    "B3": (Rule("only", 128, 64, 128, 3),),
    # GEMM_M are 32 to 624 filters, GEMM_N 192 to 1728 columns, GEMM_K pixels.
    "B4": (Rule("only", 64, 128, 128, 3),),
    # Up to 128 filters in one tile, else the pool is computed again for each.
    "B4 pool": (Rule("only", 128, 64, 32, 2),),
}
"""First rule that serves wins; the last of each kernel has no condition. BLOCK_K and the order of every reduction
depend on kernel and channels only, never on the batch, so that an image's result does not change with its batch."""

UNALIGNED = Rule("unaligned", 32, 32, 64, 2)
"""For channels, offsets or strides that are no multiples of 16 bytes: every load is one element wide, and the address
arithmetic of a larger tile spills (64x64x64: 248 bytes of stack)."""

UNALIGNED_POOL = Rule("unaligned", 32, 32, 32, 2)
"""For wgrad behind the pool: nine such loads for 32 pixels at once spilled on sm_90 (32 bytes)."""

NATIVE_BLOCK_K_BYTES, NATIVE_STAGES = 64, 3
"""Fixed in csrc/gemm_tile.cuh, for every kernel and tile alike."""


class NativeTiles(NamedTuple):
    """(BLOCK_M, BLOCK_N) of the tiles of one kernel of the extension."""

    large: tuple[tuple[int, int], ...]
    small: tuple[int, int] = (64, 64)
    unaligned: tuple[int, int] = (64, 64)


NATIVE_TILES = {"K1": NativeTiles(large=((128, 128), (128, 96))), "B3": NativeTiles(large=((128, 128),))}
"""The tables in csrc/grouped_gemm.cu and csrc/grouped_dgrad.cu. 96 is there for the 176, 280 and 288 columns of 3a, 4c,
3b and 4d, which 128-wide tiles would fill to 69, 73 and 75%."""

B1_GEMM_K = 16
"""B1 sums nothing along GEMM_K; the number only stands in the key of a tuned tile."""

INTERPRETER_LIMITS = Tile(512, 256, 256, GROUP_M=2, num_stages=1)
"""The interpreter's cost is Python per program and operation, so few large tiles."""

INTERPRETER_BLOCK = 1 << 17
"""Elements of a program that only copies or adds; Triton's largest tensor has 2**20."""


PARTIAL_BYTES = 16 << 20
"""Most that the partial sums of a block's weight gradients may take, so that they stay in an L2 of 40 MB and more."""

MAX_RANGES = 512
"""Most rows of B1's partial sums: with four or more tiles of columns enough programs, and little to add up."""

MIN_STEPS = 4
"""Fewest steps of GEMM_K in a range of wgrad, below which writing and adding up the partial sums costs more."""


def split_k(tiles: int, steps: int, weights: int) -> int:
    """Ranges into which B4 cuts GEMM_K: two waves of programs, as far as steps and PARTIAL_BYTES allow.

    tiles: of one launch; steps: of GEMM_K in all; weights: elements of all six weights of the block. By shape alone,
    so that a sum has the same order on every GPU.
    """
    return max(1, min(-(-2 * WAVE // tiles), steps // MIN_STEPS, PARTIAL_BYTES // (4 * weights)))


def row_ranges(gemm_m: int, block_m: int) -> tuple[int, int]:
    """(number of ranges, tiles of rows in each) into which B1 cuts its rows."""
    tiles = -(-gemm_m // block_m)
    each = -(-tiles // MAX_RANGES)
    return -(-tiles // each), each


def interpreter_tile(gemm_m: int, gemm_n: int, channels: int) -> Tile:
    """The tile for the interpreter: one for the whole problem, up to INTERPRETER_LIMITS."""

    def cover(size: int, limit: int) -> int:
        return max(16, min(limit, 1 << (size - 1).bit_length()))

    m, n, k = INTERPRETER_LIMITS[:3]
    return INTERPRETER_LIMITS._replace(BLOCK_M=cover(gemm_m, m), BLOCK_N=cover(gemm_n, n), BLOCK_K=cover(channels, k))


def choose_tile(
    kernel: str, dtype: torch.dtype, *, gemm_m: int, gemm_n: int, unit: int, gemm_k: int = 0,
    gpu: tuned.Gpu | None = None,
) -> Tile:  # fmt: skip
    """The tile for one problem: a tuned table's where one is in force and knows the problem, else the rule's.

    kernel: a key of RULES; gemm_m: N*H*W, or filters for B4; gemm_k: channels of the sum (without a window's taps),
    pixels for B4, and B1_GEMM_K for B1, which only a table asks for; unit: as unit_of() gives it; gpu: as tuned.key()
    gives it.
    """
    if gpu is not None and unit != 1:
        entry = tuned.lookup(gpu, kernel, dtype, gemm_m, gemm_n, gemm_k)
        if entry is not None:
            return entry.tile
    return choose_rule(kernel, dtype, gemm_m=gemm_m, gemm_n=gemm_n, unit=unit).tile(dtype)


def choose_rule(kernel: str, dtype: torch.dtype, *, gemm_m: int, gemm_n: int, unit: int) -> Rule:
    """The rule that serves a problem; arguments as for :func:`choose_tile`."""
    if unit == 1:
        return _unaligned(kernel)
    return next(rule for rule in RULES[kernel] if rule.serves(dtype.itemsize, gemm_m, gemm_n))


def tiles(kernel: str, dtype: torch.dtype) -> list[Tile]:
    """Every tile that :func:`choose_tile` can return for a kernel and dtype, without repeats."""
    rules = [rule for rule in (*RULES[kernel], _unaligned(kernel)) if dtype.itemsize in rule.itemsizes]
    return list(dict.fromkeys(rule.tile(dtype) for rule in rules))


def _unaligned(kernel: str) -> Rule:
    return UNALIGNED_POOL if kernel == "B4 pool" else UNALIGNED


def route(kernel: str, capability: tuple[int, int]) -> str:
    """ "native" or "triton": what "auto" takes for a kernel on a compute capability, (8, 0) or higher."""
    if kernel not in COMPILED:
        return "triton"
    return [implementation for lowest, implementation in ROUTES if capability >= lowest][-1]


def native_tile(kernel: str, dtype: torch.dtype, *, gemm_m: int, gemm_n: int, unit: int) -> Tile:
    """The tile of a COMPILED kernel: of its large ones that which computes the fewest columns, where it gives every
    multiprocessor one.

    Every tile sums in the same order, so an image's result does not depend on its batch.
    """

    def tiles(block: tuple[int, int]) -> int:
        return -(-gemm_m // block[0]) * -(-gemm_n // block[1])

    known = NATIVE_TILES[kernel]
    large = min(known.large, key=lambda block: -(-gemm_n // block[1]) * block[1])
    block = known.unaligned if unit == 1 else large if tiles(large) >= WAVE else known.small
    return Tile(*block, NATIVE_BLOCK_K_BYTES // dtype.itemsize, num_stages=NATIVE_STAGES)


def describe() -> str:
    """The rules as a table."""
    rows = [("kernel", "rule", "applies if", "BLOCK_M", "BLOCK_N", "BLOCK_K bytes", "stages")]
    for kernel, rules in RULES.items():
        for rule in rules:
            figures = (rule.block_m, rule.block_n, rule.block_k_bytes, rule.num_stages)
            rows.append((kernel, rule.name, rule.condition(), *map(str, figures)))
    for kernel, rule in (("B4 pool", UNALIGNED_POOL), ("others", UNALIGNED)):
        figures = (rule.block_m, rule.block_n, rule.block_k_bytes, rule.num_stages)
        rows.append((kernel, rule.name, "not in units of 16 bytes, before all others", *map(str, figures)))
    for kernel, known in NATIVE_TILES.items():
        fewer = "the fewer columns, " if len(known.large) > 1 else ""
        native = [("large", f"{fewer}at least {WAVE} tiles", block) for block in known.large]
        native += [("small", "otherwise", known.small), ("unaligned", "not in units of 16 bytes", known.unaligned)]
        for name, condition, block in native:
            figures = (*block, NATIVE_BLOCK_K_BYTES, NATIVE_STAGES)
            rows.append((f"{kernel} native", name, condition, *map(str, figures)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    routes = ", ".join(f"{implementation} from sm_{major}{minor}" for (major, minor), implementation in ROUTES)
    return "\n".join([*lines, f"{' and '.join(COMPILED)} computed by: {routes}"])


def config(
    shape: BlockShape, kernel: str, dtype: torch.dtype, x_row_stride: int, *, aligned: bool = True,
    native: bool = False, gpu: tuned.Gpu | None = None,
) -> tuple[Tile, int]:  # fmt: skip
    """(tile, unit) of one of a block's forward kernels.

    x_row_stride: of the block's input, in elements; aligned: whether its first element lies on 16 bytes;
    native: for the compiled kernel rather than Triton's; gpu: as for :func:`choose_tile`.
    """
    gemm_n, channels = shape.gemm(kernel)
    unit = forward_unit(shape, kernel, dtype, x_row_stride, aligned=aligned)
    if native:
        return native_tile(kernel, dtype, gemm_m=shape.gemm_m, gemm_n=gemm_n, unit=unit), unit
    sizes = dict(gemm_m=shape.gemm_m, gemm_n=gemm_n, gemm_k=channels)
    return choose_tile(kernel, dtype, **sizes, unit=unit, gpu=gpu), unit


def forward_unit(shape: BlockShape, kernel: str, dtype: torch.dtype, x_row_stride: int, *, aligned: bool = True) -> int:
    """The unit of one of a block's forward kernels; arguments as for :func:`config`."""
    y2, y3, y4 = shape.k1, shape.k1 + shape.k2, shape.k1 + shape.k2 + shape.k3
    others = {
        "K1": (x_row_stride, shape.k1, shape.k2_reduce, shape.k3_reduce),
        "K2": (x_row_stride, shape.k4, y4),
        "K3": (shape.k2, y2),
        "K4": (shape.k3, y3),
    }[kernel]
    if not aligned and kernel in ("K1", "K2"):
        return 1
    return unit_of(dtype, shape.gemm(kernel)[1], shape.k, *others)


def backward_unit(shape: BlockShape, dtype: torch.dtype, x_row_stride: int = 0, *, aligned: bool = True) -> int:
    """The unit of the backward kernels: one for all, 1 if any channel count of the block is odd to it.

    x_row_stride, aligned: for the kernels that read x, as in :func:`config`.
    """
    channels = (shape.c, *shape.branch_channels, shape.k2_reduce, shape.k3_reduce)
    return unit_of(dtype, *channels, x_row_stride) if aligned else 1


def exceeds_int32(shape: BlockShape, x_row_stride: int) -> bool:
    """Whether an offset inside a tile, a row number or an offset into a weight would not fit into 32 bits, forward or
    backward.

    Inside a tile lie its rows and, for a 5x5 window, two image rows and two pixels on either side.
    """
    rows = tile_table.MAX_BLOCK + 2 * (2 * shape.w + 2)
    widest = max(x_row_stride, shape.grads_width, shape.c)
    # A weight's rows reach a tile beyond its end, masked but computed; in the backward pass they are its columns.
    block = tile_table.MAX_BLOCK
    pairs = (
        (shape.k1 + shape.r_width, shape.c),
        (shape.k2, 9 * shape.k2_reduce),
        (9 * shape.k2, shape.k2_reduce),
        (shape.k3, 25 * shape.k3_reduce),
        (25 * shape.k3, shape.k3_reduce),
        (shape.k4, shape.c),
    )
    weight = max((a + block) * (b + block) for a, b in pairs)
    # 1024: what csrc/tile_table.h keeps free below 2**31 for its last tile and step.
    return max(rows * widest, shape.gemm_m + max(rows, 1024), weight) >= 2**31
