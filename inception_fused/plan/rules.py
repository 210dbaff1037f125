"""Tiles by rule: what a rule is, when it serves, and the rules that more than one kernel shares. Data, no launches."""

from __future__ import annotations

from typing import NamedTuple

import torch

from inception_fused.block.views import Tile

MIN_SHARED_BYTES = 99 << 10
"""What one thread block may use on sm_86, sm_89 and sm_120, the least of sm_80 and up (CUDA C++ Programming Guide,
"Technical Specifications per Compute Capability"). Every tile fits whose rule serves all."""

WAVE = 128
"""Tiles from which on the large tile is taken: about one per multiprocessor of an A100 (108), H100 or H200 (132)."""

MOST = 96
"""The same for tiles of eight warps: three quarters of the multiprocessors. 98 tiles of 128x128 at once (K3 of 4a to
4c, batch 32) take half of what 392 of 64x64 take in three rounds, counted for sm_90."""

Capability = tuple[int, int]

PLANNED: Capability = (9, 0)
"""The compute capability that a plan is for where it is given no GPU: that of cards.H200."""

Chips = tuple[Capability, Capability]
"""Compute capabilities from the first on, up to the second without it."""

EVERY: Chips = ((8, 0), (99, 0))
AMPERE: Chips = ((8, 0), (9, 0))
ASYNCHRONOUS: Chips = ((9, 0), (12, 0))
HOPPER: Chips = ((9, 0), (10, 0))
SM_120: Chips = ((12, 0), (13, 0))
CHIP_WORDS = {
    EVERY: "", AMPERE: "sm_80 to sm_89", ASYNCHRONOUS: "sm_90 to sm_110", HOPPER: "sm_90", SM_120: "sm_120 and sm_121",
}  # fmt: skip


def is_asynchronous(capability: Capability) -> bool:
    """Whether matrix instructions read both operands from shared memory (wgmma, tcgen05), of which a block may use 227
    KB. Others hold operands in registers, where 128x256 spills."""
    return ASYNCHRONOUS[0] <= capability < ASYNCHRONOUS[1]


MAX_BINARIES = 36
"""Most that inference and training of a network may compile for a dtype: a first step must not take minutes. As many in
fp32 on sm_90, 5 of them the stem's alone."""

MAX_POOL_BINARIES = 6
"""Of the max-pools of stride 2, beside those: P1 with bias and ReLU and without, with taps and without, and P2 with
sums and without. Inference takes two, training the others."""

MAX_NORMED_BINARIES = 40
"""The same of a network with BatchNorm, 39 in fp32 on sm_90: inference folds it into scale and shift, training writes
raw values, so no kernel of a forward has one binary for both. Training alone, 28 at most, keeps to MAX_BINARIES."""


class Rule(NamedTuple):
    """``tile`` serves problems with above_n < GEMM_N <= max_n that it cuts into at least min_tiles tiles, in dtypes of
    itemsizes bytes, on chips.

    BLOCK_K is stated in bytes (block_k_bytes) and becomes elements by dtype, so one rule serves fp16, bf16 and fp32.
    """

    name: str
    block_m: int
    block_n: int
    block_k_bytes: int
    num_stages: int
    num_warps: int = 4
    min_tiles: int = 0
    above_n: int = 0
    max_n: int | None = None
    itemsizes: tuple[int, ...] = (2, 4, 8)
    chips: Chips = EVERY

    def tile(self, dtype: torch.dtype) -> Tile:
        block_k = max(16, self.block_k_bytes // dtype.itemsize)
        return Tile(self.block_m, self.block_n, block_k, num_warps=self.num_warps, num_stages=self.num_stages)

    def fits(self, itemsize: int, capability: Capability) -> bool:
        """Whether it is for a dtype and a GPU."""
        return itemsize in self.itemsizes and self.chips[0] <= capability < self.chips[1]

    def covers(self, other: Rule) -> bool:
        """Whether it serves all sizes that another one does, so that nobody asks the other behind it."""
        columns = self.above_n <= other.above_n and self.max_n in (None, other.max_n)
        same_block = (self.block_m, self.block_n) == (other.block_m, other.block_n)
        return columns and (self.min_tiles == 0 or (same_block and self.min_tiles <= other.min_tiles))

    def serves(self, itemsize: int, gemm_m: int, gemm_n: int, capability: Capability) -> bool:
        tiles = -(-gemm_m // self.block_m) * -(-gemm_n // self.block_n)
        columns = self.above_n < gemm_n and (self.max_n is None or gemm_n <= self.max_n)
        return tiles >= self.min_tiles and columns and self.fits(itemsize, capability)

    def condition(self) -> str:
        parts = []
        if self.chips != EVERY:
            parts.append(CHIP_WORDS[self.chips])
        if self.above_n:
            parts.append(f"GEMM_N > {self.above_n}")
        if self.max_n is not None:
            parts.append(f"GEMM_N <= {self.max_n}")
        if len(self.itemsizes) == 1:
            parts.append(f"{self.itemsizes[0]}-byte dtypes")
        if self.min_tiles:
            parts.append(f"at least {self.min_tiles} tiles")
        return " and ".join(parts) or "otherwise"


UNALIGNED = Rule("unaligned", 32, 32, 64, 2)
"""For channels, offsets or strides that are no multiples of 16 bytes: every load is one element wide, and the address
arithmetic of a larger tile spills (64x64x64: 248 bytes of stack)."""

Block = tuple[int, int]
"""(BLOCK_M, BLOCK_N)."""


class Tried(NamedTuple):
    """What the tuner times beside the rules.

    shapes, wide_shapes: with four and with eight warps. stages: None for the tuner's usual ones. spill_in_fp32: (warps,
    block) of those that spill there. covers: which of a problem's sizes, GEMM_M or GEMM_N ("m", "n"), one tile has to
    cover up to 128.
    """

    shapes: tuple[Block, ...]
    wide_shapes: tuple[Block, ...] = ()
    stages: tuple[int, ...] | None = None
    spill_in_fp32: tuple[tuple[int, Block], ...] = ()
    covers: str = ""


class RuleSet:
    """The tiles of one form of a kernel. key: what a tuned table calls it. rules: the first that serves wins, the last
    has no condition. unaligned: for what is not in units of 16 bytes."""

    def __init__(self, key: str, *rules: Rule, tried: Tried, unaligned: Rule = UNALIGNED) -> None:
        self.key, self.rules, self.tried, self.unaligned = key, rules, tried, unaligned

    def choose(self, dtype: torch.dtype, gemm_m: int, gemm_n: int, unit: int, capability: Capability = PLANNED) -> Rule:
        """The rule that serves a problem. unit: as unit_of() gives it."""
        if unit == 1:
            return self.unaligned
        return next(rule for rule in self.rules if rule.serves(dtype.itemsize, gemm_m, gemm_n, capability))

    def tiles(self, dtype: torch.dtype, capability: Capability = PLANNED) -> list[Tile]:
        """Every tile that :meth:`choose` can lead to for a dtype and a GPU, without repeats."""
        found: list[Rule] = []
        for rule in self.rules:
            if rule.fits(dtype.itemsize, capability) and not any(earlier.covers(rule) for earlier in found):
                found.append(rule)
        return list(dict.fromkeys(rule.tile(dtype) for rule in (*found, self.unaligned)))


NATIVE_BLOCK_K_BYTES, NATIVE_STAGES, NATIVE_WARPS = 64, 3, 4
"""Fixed in csrc/gemm_tile.cuh, for every kernel and tile alike."""


class NativeTiles(NamedTuple):
    """(BLOCK_M, BLOCK_N) of the tiles of one kernel of the extension: the tables in csrc/<file>.cu."""

    large: tuple[tuple[int, int], ...]
    small: tuple[int, int] = (64, 64)
    unaligned: tuple[int, int] = (64, 64)

    def choose(self, dtype: torch.dtype, gemm_m: int, gemm_n: int, unit: int) -> Tile:
        """Of the large tiles the one that wastes the fewest columns; the small one where that would leave
        multiprocessors without a tile.

        Every tile sums in the same order, so an image's result does not depend on its batch.
        """

        def tiles(block: tuple[int, int]) -> int:
            return -(-gemm_m // block[0]) * -(-gemm_n // block[1])

        large = min(self.large, key=lambda block: -(-gemm_n // block[1]) * block[1])
        block = self.unaligned if unit == 1 else large if tiles(large) >= WAVE else self.small
        return Tile(*block, NATIVE_BLOCK_K_BYTES // dtype.itemsize, num_stages=NATIVE_STAGES)
