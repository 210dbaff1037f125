"""The kernels: file, words and tile rules of each. Which launches are made of them stands in launches.py.

A :class:`Kernel` is a file in kernels/ whose launcher has the file's name, as have its ATen twin and its form in CUDA
C++; :data:`KERNELS` alone joins a kernel's name and its file. A block's kernels have rows in the table of launches, the
pools' have none: each is the one launch of its operator (op/pools.py).
"""

from __future__ import annotations

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
_SUMS = tuple(block for block in _MASKS if block not in ((128, 64), (64, 128)))
"""Those two put up to 1128 bytes on the stack beside two sums an element."""

_SQUARES = ((32, 32), (32, 64), (64, 32), (64, 64), (128, 32), (128, 64))

_POOLS = Tried(((16, 64), (32, 64), (16, 128)), ((32, 64), (64, 64), (32, 128)), stages=(1,))

BLOCK_KERNELS = (
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
    Kernel(
        "N1", "norm_stats", "forward", "BatchNorm in training: partial statistics of the batch",
        # 71 registers and so seven programs a multiprocessor on sm_90; of 64x64 123 and four, in fp32 168 and three.
        RuleSet("N1", Rule("only", 32, 64, 32, 1), tried=Tried(_SUMS, stages=(1,))),
    ),
    Kernel("N2", "norm_combine", "forward", "BatchNorm in training: statistics, scale and shift"),
    Kernel(
        "N3", "norm_apply", "forward", "BatchNorm in training: normalised, behind ReLU",
        RuleSet("N3", Rule("only", 64, 64, 32, 1), tried=Tried(_MASKS, stages=(1,))),
    ),
    Kernel("pack", "pack_dgrad", "backward", "weights transposed, flipped and cast"),
    Kernel(
        "B1", "mask_grad", "backward", "gradient behind the mask bits, sums for biases",
        # Nothing is multiplied: bytes in flight per program, and no dot, which is what Triton pipelines for.
        RuleSet("B1", Rule("only", 64, 64, 32, 1), tried=Tried(_MASKS, stages=(1,))),
        # dy that is no matrix of rows has a 64-bit address an element: 64 bytes of stack at 64x64 in fp32, Triton 3.6.
        RuleSet("B1 strided", Rule("only", 32, 64, 32, 1), tried=Tried(_MASKS, stages=(1,))),
    ),
    Kernel(
        "N4", "norm_grad_stats", "backward", "BatchNorm in training: partial sums of the gradient",
        # As N1: 96 registers instead of 161.
        RuleSet("N4", Rule("only", 32, 64, 32, 1), tried=Tried(_SUMS, stages=(1,))),
        RuleSet("N4 strided", Rule("only", 32, 64, 32, 1), tried=Tried(_SUMS, stages=(1,))),
    ),
    Kernel("N5", "norm_grad_combine", "backward", "BatchNorm in training: its vectors' gradients"),
    Kernel(
        "N6", "norm_grad_apply", "backward", "BatchNorm in training: gradient of what it was given",
        RuleSet("N6", Rule("only", 64, 64, 32, 1), tried=Tried(_MASKS, stages=(1,))),
        RuleSet("N6 strided", Rule("only", 32, 64, 32, 1), tried=Tried(_MASKS, stages=(1,))),
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

# Rows are windows, or cells of 2x2. Nothing is multiplied, and DRAM is the bound. Of 32x64 in 16-bit types each of 256
# threads has one window of 16 bytes, or one cell, in fp32 two. Of an H200's 4.3 TB/s a warp's bytes then take 134
# cycles of a multiprocessor without taps, 140 with them and for the gradient; in fp32 267 and 274. Beside that, counted
# for sm_90 in bf16 and fp32, Triton 3.6.0:
#
#                         without taps     with taps        gradient
#     instructions issued   161, 308         345, 548         385, 489     four a cycle
#     cycles of integers     36, 82          102, 176         115, 152     two instructions a cycle
#
# Of sm_80 they are the same within a tenth.
POOL_KERNELS = (
    Kernel(
        "P1", "max_pool", "forward", "3x3 max-pool of stride 2, behind bias and ReLU",
        RuleSet("P1", Rule("only", 32, 64, 32, 1, 8), tried=_POOLS),
    ),
    Kernel(
        "P2", "max_pool_grad", "backward", "gradient of that pool, sums for the bias",
        RuleSet("P2", Rule("only", 32, 64, 32, 1, 8), tried=_POOLS),
    ),
)  # fmt: skip

KERNELS = (*BLOCK_KERNELS, *POOL_KERNELS)

RULES: dict[str, RuleSet] = {found.key: found for kernel in KERNELS for found in kernel.sets}
"""BLOCK_K and the order of every reduction depend on kernel and channels only, never on the batch, so that an image's
result does not change with its batch."""
