"""The launches of a block, forward and backward: one table, a row each.

    pack   parameters cast, permuted to KRSC, BatchNorm folded     where they need it
    K1     grouped GEMM of the 1x1 reductions                      x  -> y's first slice, r3, r5
    K2     3x3 max-pool + 1x1                                      x  -> y's last slice, taps
    K3     3x3 convolution                                         r3 -> y's second slice
    K4     5x5 (or 3x3) convolution                                r5 -> y's third slice
           of two 3x3                                              r5 -> t, t -> y's third slice

    pack   weights transposed, flipped and cast
    B1     mask and bias sums                                      dy, bits -> g = [g2 | g3 | g4 | g1]
    B2     dgrad: 3x3, 5x5 (or 3x3), 1x1 of branch 4               g2, r3 -> dr3;  g3, r5 -> dr5;  g4 -> dpool
           of two 3x3                                              g3, t -> dt;  dt, r5 -> dr5
    B3     grouped 1x1 dgrad + the max-pool's gradient             [g1 | dr3 | dr5], dpool, taps -> dx
    B4     wgrad, split over pixels: 1x1, 3x3, 5x5, pool          [g1 | dr3 | dr5], x;  g2, r3;  g3, r5;  g4, x -> sums
    B5     parts added up                                          -> dw, db

A :class:`Kernel` is a file in kernels/ whose launcher has the file's name, as have its ATen twin and its form in CUDA
C++; :data:`KERNELS` alone joins a kernel's name and its file. A :class:`Row` is one launch of it: its role and the
convolutions it computes, which say its GEMM, what it reads and writes, and so FLOP and bytes (problems.py).
Operators, plan, floors, forecast, tuner, benchmarks and ``explain`` read this table; a variant of the block has its
own (:func:`table_of`), of the same kernels and rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from inception_fused.block import chains
from inception_fused.plan.rules import (
    AMPERE,
    ASYNCHRONOUS,
    HOPPER,
    MOST,
    SM_120,
    WAVE,
    NativeTiles,
    Rule,
    RuleSet,
    Tried,
)

PACK, FPROP, MASK, DGRAD, DGRAD_X, WGRAD, SUM = "pack", "fprop", "mask", "dgrad", "dgrad of x", "wgrad", "sum"
"""Roles: what a launch does with its convolutions. "dgrad of x" is that of all reductions, and of the pool."""

GEMMS = (FPROP, DGRAD, DGRAD_X, WGRAD)


class Kernel:
    """One kernel of a pass.

    name: what users call it. file: kernels/<file>.py, its launcher and its twins. direction: "forward" or "backward".
    does: in words. sets: its tiles, none where the launcher has its own. native: tiles of the form in CUDA C++, None
    where there is none.
    """

    def __init__(
        self, name: str, file: str, direction: str, does: str, *sets: RuleSet, native: NativeTiles | None = None
    ) -> None:
        self.name, self.file, self.direction, self.does, self.sets, self.native = (
            name, file, direction, does, sets, native
        )  # fmt: skip

    @property
    def function(self) -> str:
        """The name of the device code, as profilers have it."""
        return f"{self.file}_kernel"

    def __repr__(self) -> str:
        return f"{self.name} ({self.file})"


_USUAL = ((32, 64), (64, 32), (64, 64), (64, 128), (128, 64), (128, 128))
_WIDE = ((64, 128), (128, 64), (128, 128), (128, 256), (256, 128))
"""For eight warps, which have half as many elements of a tile each."""

_MASKS = ((16, 64), (32, 64), (64, 64), (128, 64), (16, 128), (32, 128), (64, 128))
_SQUARES = ((32, 32), (32, 64), (64, 32), (64, 64), (128, 32), (128, 64))

KERNELS = (
    Kernel("pack", "pack", "forward", "weights cast and permuted (forward: where they need it)"),
    Kernel(
        "K1", "grouped_gemm", "forward", "grouped GEMM of the three 1x1 reductions",
        # 128x128 tiles read 64 FLOP a byte from L2, which bounds them; 256x128 read 85: 188 -> 157 us over the nine
        # blocks at batch 128 in bf16, counted for sm_90. 75 of these (4a to 4d, batch 32) are one round, where 147 of
        # 128x128 are two of half the work, and would be one more tile. In fp32 128x256 spills on sm_100 beside the
        # 64-bit weight pointers of straddling columns (184 bytes, Triton 3.7 and 3.8), and so does 128x128 with four
        # warps. Elsewhere eight warps would compute twice as many addresses: 74 -> 80 us in 3b on sm_80. On sm_120 four
        # warps spill (64 bytes).
        RuleSet(
            "K1",
            Rule("wide", 256, 128, 128, 3, 8, min_tiles=64, above_n=64, itemsizes=(2,), chips=ASYNCHRONOUS),
            Rule("wide fp32", 128, 128, 128, 3, 8, min_tiles=64, above_n=64, itemsizes=(4,), chips=ASYNCHRONOUS),
            Rule("large sm_120", 128, 128, 128, 3, 8, min_tiles=WAVE, itemsizes=(2,), chips=SM_120),
            Rule("large", 128, 128, 128, 3, min_tiles=WAVE, itemsizes=(2,), chips=AMPERE),
            Rule("large fp32", 128, 64, 128, 3, min_tiles=WAVE, itemsizes=(4,)),
            Rule("small", 64, 64, 128, 3),
            tried=Tried(_USUAL, _WIDE),
        ),
        # 96 is there for the 176, 280 and 288 columns of 3a, 4c, 3b and 4d, which 128-wide tiles would fill to 69, 73
        # and 75%.
        native=NativeTiles(large=((128, 128), (128, 96))),
    ),
    Kernel(
        "K2", "pool_proj", "forward", "3x3 max-pool + 1x1",
        # One tile of columns up to 128 channels, else the pool is computed again for each. Nine loads of 64 pixels need
        # eight warps: with four, where a thread has two rows, training takes 255 registers and up to 136 bytes of stack
        # (fp32, sm_80), as it does with 128 bytes of channels at a time (224). One stage: the rows of a window come
        # from L1, where they are met nine times, and not from buffers of nine shifted copies. For few pixels 16 of
        # them: 115 -> 81 us for the nine blocks at batch 1 in bf16, 113 -> 101 with taps (counted for sm_90). 128x64
        # would take 27 instead of 37 us for 3a and 3b at batch 128, and two more binaries.
        RuleSet(
            "K2",
            Rule("narrow", 64, 64, 64, 1, 8, max_n=64, min_tiles=MOST),
            Rule("wide", 64, 128, 64, 1, 8, min_tiles=MOST),
            Rule("few", 16, 128, 64, 1),
            tried=Tried(((16, 64), (16, 128), (32, 64), (32, 128)), ((64, 64), (64, 128)), stages=(1, 2), covers="n"),
        ),
    ),
    Kernel(
        "K3", "conv_fprop", "forward", "3x3 convolution",
        # As K1: 396 -> 356 us. Of 96, 144 and 160 channels, which five blocks have, 128 bytes at a time leave a quarter
        # to a sixth of the products to zeros in 16-bit types, 64 bytes at most a tenth: 356 -> 326 us. These tiles are
        # K4's, and so are the binaries. Four stages, since a step is half as long (64x64: 260 -> 211 cycles of a warp).
        # With four warps mma.sync holds accumulator and operands of 128x128 in 255 registers. With 128x256 in 16-bit
        # types or of 64 bytes, and with 128x128 and eight warps in fp32, ptxas 12.8 lets each wgmma wait for the one
        # before (C7515). On sm_100 in fp32 256x128 spills (56 bytes), and under Triton 3.9 128x256 does (48).
        RuleSet(
            "K3",
            Rule("wide", 256, 128, 64, 4, 8, min_tiles=MOST, above_n=64, itemsizes=(2,), chips=ASYNCHRONOUS),
            Rule("wide fp32", 128, 256, 128, 3, 8, min_tiles=MOST, above_n=128, itemsizes=(4,), chips=HOPPER),
            Rule("large fp32 sm_90", 128, 128, 128, 3, min_tiles=MOST, itemsizes=(4,), chips=HOPPER),
            Rule("large", 128, 128, 64, 4, 8, min_tiles=MOST, itemsizes=(2,)),
            Rule("small", 64, 64, 64, 4, itemsizes=(2,)),
            Rule("large fp32", 128, 128, 128, 3, 8, min_tiles=MOST),
            Rule("small fp32", 64, 64, 128, 3),
            tried=Tried(_USUAL, _WIDE),
        ),
    ),
    Kernel(
        "K4", "conv_fprop", "forward", "5x5 (or 3x3) convolution",
        # 24 and 32 channels of a reduction fit one chunk of 64 bytes in 16-bit types; a 128-byte chunk would be half
        # empty. Six blocks have at most 64 filters, for which 256x64 reads 51 FLOP a byte from L2 and 64x64 32: 53 ->
        # 36 us for five of them at batch 128, counted for sm_90. Branch 3 has 32 to 128 filters, hence 128x32. In fp32
        # 256x128 spills on sm_100 (56 bytes), where four warps of 128x128 do too under Triton 3.9 (48); of eight every
        # wgmma waits for the one before, as in K3.
        RuleSet(
            "K4",
            Rule("tall", 256, 64, 64, 4, 8, min_tiles=MOST, max_n=64, itemsizes=(2,), chips=ASYNCHRONOUS),
            Rule("narrow", 64, 64, 64, 4, max_n=64),
            Rule("wide", 256, 128, 64, 4, 8, min_tiles=MOST, itemsizes=(2,), chips=ASYNCHRONOUS),
            Rule("large fp32", 128, 128, 64, 4, min_tiles=WAVE, itemsizes=(4,), chips=HOPPER),
            Rule("large", 128, 128, 64, 4, 8, min_tiles=WAVE),
            Rule("small", 64, 64, 64, 4),
            tried=Tried((*_USUAL, (128, 32)), _WIDE),
        ),
    ),
    Kernel("pack", "pack_dgrad", "backward", "weights transposed, flipped and cast"),
    Kernel(
        "B1", "mask_grad", "backward", "gradient behind the mask bits, sums for biases",
        # Nothing is multiplied: bytes in flight per program, and no dot, which is what Triton pipelines for.
        RuleSet("B1", Rule("only", 64, 64, 32, 1), tried=Tried(_MASKS, stages=(1,))),
        # dy that is no matrix of rows has a 64-bit address an element: 64 bytes of stack at 64x64 in fp32, Triton 3.6.
        RuleSet("B1 strided", Rule("only", 32, 64, 32, 1), tried=Tried(_MASKS, stages=(1,))),
    ),
    # Few tiles, since training must not compile more than MAX_BINARIES: those of the many columns of dx.
    Kernel(
        "B2", "conv_dgrad", "backward", "dgrad: 3x3, 5x5, 1x1 of branch 4",
        # Tiles of one height, since all windows leave as many sums of dr. 128x128 reads 64 FLOP a byte from L2, not 43:
        # 584 -> 408 us for the 3x3 of the nine blocks, counted for sm_90. Where L2 is no bound, columns computed for
        # nothing (144 and 160 of 256) cost more. 256x128 in fp32 puts 40 bytes on the stack.
        RuleSet(
            "B2",
            Rule("wide", 128, 128, 128, 3, 8, min_tiles=MOST, above_n=64, chips=ASYNCHRONOUS),
            Rule("narrow", 128, 64, 128, 3),
            tried=Tried(_USUAL, _WIDE, spill_in_fp32=((8, (256, 128)),)),
        ),
        RuleSet(
            "B2 1x1",
            Rule("fp32", 128, 128, 128, 3, itemsizes=(4,), chips=ASYNCHRONOUS),
            Rule("others", 128, 128, 128, 3, 8),
            tried=Tried(_USUAL, _WIDE),
        ),
    ),
    Kernel(
        "B3", "grouped_dgrad", "backward", "gradient of x: grouped 1x1 dgrad + max-pool's",
        # 128x128 beside the gather: 80 bytes of stack in 16-bit types, 616 in fp32.
        RuleSet("B3", Rule("only", 128, 64, 128, 3), tried=Tried(_USUAL[:-1], _WIDE[:3])),
        native=NativeTiles(large=((128, 128),)),
    ),
    Kernel(
        "B4", "conv_wgrad", "backward", "wgrad in parts: 3x3, 5x5, 1x1, pooled 1x1",
        # GEMM_M are 32 to 624 filters, GEMM_N 192 to 1728 columns, GEMM_K pixels. Both operands come from L2, and the
        # wide tile reads each half as often as 64x128: 620 instead of 980 us for nine blocks in bf16 at batch 128
        # (counted, at 7 TB/s of L2). A fourth stage in fp32 takes 255 registers. Where matrix instructions bound it,
        # rows and columns computed for nothing cost more: 3x3 on an RTX 4090 1637 us, of 64x128 1255.
        RuleSet(
            "B4",
            Rule("wide fp32", 128, 256, 64, 3, 8, itemsizes=(4,), chips=ASYNCHRONOUS),
            Rule("wide", 128, 256, 64, 4, 8, chips=ASYNCHRONOUS),
            Rule("large", 64, 128, 128, 3),
            tried=Tried(_USUAL, _WIDE),
        ),
        # The pool is computed again for each tile of filters. Six of the nine blocks have at most 64, for which a tile
        # of 128 moves g through shared memory twice as often: 600 instead of 850 cycles of 128 bytes a step in bf16.
        # One stage: copies that are pipelined pass by L1, which serves most of x's loads. A step is four products of at
        # least 16 pixels.
        RuleSet(
            "B4 pool",
            Rule("fp32", 64, 64, 256, 1, itemsizes=(4,)),
            Rule("only", 64, 64, 128, 1),
            tried=Tried(_SQUARES, _WIDE[1:3], stages=(1,), covers="m"),
            # Of four warps 144 bytes of stack in bf16 on sm_90, Triton 3.9.
            unaligned=Rule("unaligned", 32, 32, 256, 1, 8),
        ),
    ),
    Kernel("B5", "reduce", "backward", "parts added up in a fixed order"),
)  # fmt: skip

RULES: dict[str, RuleSet] = {found.key: found for kernel in KERNELS for found in kernel.sets}
"""BLOCK_K and the order of every reduction depend on kernel and channels only, never on the batch, so that an image's
result does not change with its batch."""


_NAMED = {(kernel.name, kernel.direction): kernel for kernel in KERNELS}
_CONVS = {conv.name: conv for variant in chains.VARIANTS.values() for conv in variant.convs}


class Row(NamedTuple):
    """One launch. name: among those of its pass; convs: the convolutions it computes; rules: key of its tiles, "" where
    the launcher has its own."""

    name: str
    kernel: Kernel
    role: str
    convs: tuple[str, ...]
    rules: str = ""

    @property
    def direction(self) -> str:
        return self.kernel.direction

    @property
    def pooled(self) -> bool:
        """Whether x passes the max-pool before the convolutions."""
        return _CONVS[self.convs[0]].role == chains.PROJECTION

    @property
    def reads_x(self) -> bool:
        return self.role in (FPROP, WGRAD) and all(_CONVS[conv].role != chains.WINDOW for conv in self.convs)


def _row(kernel: str, direction: str, role: str, convs: Iterable[str], suffix: str = "", rules: str = "") -> Row:
    return Row(f"{kernel} {suffix}".strip(), _NAMED[kernel, direction], role, tuple(convs), rules or kernel)


class Forward(NamedTuple):
    """The rows of a forward; windows: one for each of chains.windows()."""

    pack: Row
    reductions: Row
    projection: Row
    windows: tuple[Row, ...]


class Backward(NamedTuple):
    """The rows of a backward: of dgrad those behind the windows, in the order in which one needs the other, and behind
    the projection, that of x; of wgrad those of the reductions, the windows, the projection."""

    pack: Row
    mask: Row
    dgrad_windows: tuple[Row, ...]
    dgrad_projection: Row
    dgrad_x: Row
    wgrad_reductions: Row
    wgrad_windows: tuple[Row, ...]
    wgrad_projection: Row
    total: Row


def _in_order(found: Forward | Backward) -> tuple[Row, ...]:
    return tuple(row for part in found for row in ((part,) if isinstance(part, Row) else part))


class Table(NamedTuple):
    """The launches of a variant. rows, names: every launch of a pass, "forward" or "backward", in the order in which
    they are made."""

    forward: Forward
    backward: Backward
    rows: dict[str, tuple[Row, ...]]
    names: dict[str, tuple[str, ...]]


def _table(variant: chains.Variant) -> Table:
    names = variant.names
    reductions, windows, projection = chains.reductions(names), chains.windows(names), (chains.projection(names),)
    # Behind branch 2's window stand branch 3's. "5x5" is 3x3 where branch 3 is.
    twice = ("first", "second") if len(windows) > 2 else ()

    def window_rows(kernels: tuple[str, str], direction: str, role: str, suffixes: tuple[str, str]) -> tuple[Row, ...]:
        second, third = kernels
        named = zip(
            windows, (second, *[third] * len(windows[1:])), (suffixes[0], *(twice or suffixes[1:])), strict=True
        )
        return tuple(_row(kernel, direction, role, (conv,), suffix) for conv, kernel, suffix in named)

    forward = Forward(
        pack=Row("pack", _NAMED["pack", "forward"], PACK, names),
        reductions=_row("K1", "forward", FPROP, reductions),
        projection=_row("K2", "forward", FPROP, projection),
        windows=window_rows(("K3", "K4"), "forward", FPROP, ("", "")),
    )
    dgrad, *later = window_rows(("B2", "B2"), "backward", DGRAD, ("3x3", "5x5"))
    backward = Backward(
        pack=Row("pack", _NAMED["pack", "backward"], PACK, names),
        mask=_row("B1", "backward", MASK, names),
        dgrad_windows=(dgrad, *reversed(later)),
        dgrad_projection=_row("B2", "backward", DGRAD, projection, "1x1", "B2 1x1"),
        dgrad_x=_row("B3", "backward", DGRAD_X, reductions),
        wgrad_reductions=_row("B4", "backward", WGRAD, reductions, "1x1"),
        wgrad_windows=window_rows(("B4", "B4"), "backward", WGRAD, ("3x3", "5x5")),
        wgrad_projection=_row("B4", "backward", WGRAD, projection, "pool", "B4 pool"),
        total=Row("B5", _NAMED["B5", "backward"], SUM, names),
    )
    rows = {"forward": _in_order(forward), "backward": _in_order(backward)}
    return Table(forward, backward, rows, {direction: tuple(row.name for row in rows[direction]) for direction in rows})


TABLES = {variant.count: _table(variant) for variant in chains.VARIANTS.values()}


def table_of(values: Sequence[object]) -> Table:
    """The table of a variant. values: a list of one value a convolution."""
    return TABLES[len(values)]


USUAL = table_of(chains.USUAL.names)
"""Of GoogLeNet's blocks."""

ROWS, NAMES = USUAL.rows, USUAL.names

WGRAD_RULES = frozenset(row.rules for row in ROWS["backward"] if row.role == WGRAD)
"""Keys of tiles whose GEMM_K are the pixels."""
