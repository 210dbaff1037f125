"""What aot_gate.py compiles: every form of every launch, by the architectures on which it is judged."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import torch

from checks.block_cases import ODD_STEM
from checks.launches import block_launches, googlenet_cases
from checks.pool_launches import pool_cases, pool_launches
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, GOOGLENET_STEM, InceptionConfig, spatial_size
from inception_fused.runtime.launch import Launch

CAPABILITIES = (80, 90, 100)
EVERY_CAPABILITY = (80, 89, 90, 100, 120)
"""One of each kind: sm_86 is sm_89's but for its shared memory, which is the same."""

LOOPED = (80, 90)
"""Whose main loops are judged; sm_89 has sm_80's instructions and slower matrix units beside them."""

ODD_BLOCK = InceptionConfig(17, 13, (9, 20), (7, 11), 5)


def launches_of(kwargs: dict[str, Any], dtype: torch.dtype, capability: int) -> list[Launch]:
    """Of a block, or of a max-pool."""
    make = pool_launches if "pool" in kwargs else block_launches
    return make(**kwargs, dtype=dtype, capability=divmod(capability, 10))


Case = tuple[str, dict[str, Any], tuple[int, ...], slice]
"""(label, block_launches' arguments, architectures, which launches)."""


def every_case() -> Iterator[Case]:
    """Every tile of the plan in every form."""
    everywhere, every = CAPABILITIES, slice(None)
    for block, batch in itertools.product(GOOGLENET_BLOCKS, (1, 32, 128)):
        side = spatial_size(block)
        at = {"config": GOOGLENET_BLOCKS[block], "batch": batch, "image": (side, side), "bias": False, "packed": True}
        for save in (False, True):
            yield f"{block}x{batch}", at | {"save": save}, everywhere, every
            if batch < 128:
                yield f"{block}x{batch} apart", at | {"save": save, "pairs": False}, everywhere, slice(0, 4)
        if batch == 1:
            yield f"{block}x{batch} 3x3 pair", at | {"save": False, "branch3": 3}, everywhere, slice(1, 2)
        yield f"{block}x{batch} 3x3", at | {"save": True, "branch3": 3}, everywhere, slice(-1, None)
        yield f"{block}x{batch} two 3x3", at | {"save": True, "double": True}, everywhere, every
    yield "odd", {"config": ODD_BLOCK, "batch": 2, "image": (7, 5), "save": True}, everywhere, every
    yield from stem_cases(everywhere)
    # Tiles that no block of GoogLeNet takes at these batches: K1's of 64 columns in fp32, K4's between wide and small.
    few = {"config": InceptionConfig(64, 16, (16, 128), (16, 128), 16), "batch": 96, "image": (14, 14), "packed": True}
    yield "few columns", few | {"save": True}, everywhere, every
    block = {"config": GOOGLENET_BLOCKS["4b"], "batch": 128, "image": (14, 14), "save": True}
    # With a bias on sm_90: launch_path().
    yield "4b bias", block, (80, 100), every
    yield "4b NCHW dy", block | {"packed": True, "dy_rows": False}, everywhere, slice(5, 6)
    odd = {"config": ODD_BLOCK, "batch": 2, "image": (7, 5), "save": True, "dy_rows": False}
    yield "odd NCHW dy", odd, everywhere, slice(6, 7)
    # With a scale in the epilogue. The wide tiles put 40 to 136 bytes on the stack on sm_100 then, which DESIGN.md says
    # and this does not ask about.
    yield "4bx1 norm", block | {"batch": 1, "batch_norm": True}, everywhere, slice(0, 3)
    yield "4bx1 norm apart", block | {"batch": 1, "batch_norm": True, "pairs": False}, everywhere, slice(0, 5)
    yield "4bx128 norm", block | {"batch_norm": True}, (80, 90), slice(0, 5)
    yield "odd norm", odd | {"batch_norm": True}, everywhere, slice(0, 5)
    yield "4b no act", block | {"activation": None}, (90,), every
    yield from normed_cases(everywhere)
    in_batch = block | {"normed": True, "bias": False}
    yield "4b normed, bias", in_batch | {"bias": True}, everywhere, every
    yield "4b normed, two 3x3", in_batch | {"double": True, "packed": True}, everywhere, every
    yield "4b normed, no act", in_batch | {"activation": None}, everywhere, every
    yield "odd normed", odd | {"normed": True}, everywhere, every
    yield "odd normed, rows", odd | {"normed": True, "dy_rows": True}, everywhere, every


def stem_cases(capabilities: tuple[int, ...]) -> Iterator[Case]:
    """The stem's convolutions with bias and without, packed or not, with all of its tiles, and with odd channels."""
    side = spatial_size("stem")
    for batch, save in itertools.product((1, 32, 128), (False, True)):
        at = {"config": GOOGLENET_STEM, "batch": batch, "image": (side, side), "save": save}
        for form in ({}, {"bias": False, "packed": True}):
            yield f"stemx{batch}", at | form, capabilities, slice(None)
    for dy_rows in (True, False):
        odd = {"config": ODD_STEM, "batch": 2, "image": (7, 5), "save": True, "dy_rows": dy_rows}
        yield "odd stem", odd, capabilities, slice(None)


def rule_cases() -> Iterator[Case]:
    """What GoogLeNet compiles, its stem too, the rules' aligned tiles with bias and ReLU, on every architecture."""
    for block, case in googlenet_cases():
        yield f"{block}x{case['batch']}", case, EVERY_CAPABILITY, slice(None)
    yield from normed_cases(EVERY_CAPABILITY)
    yield from cases_of_pools(EVERY_CAPABILITY, odd=False)


def normed_cases(capabilities: tuple[int, ...]) -> Iterator[Case]:
    """What GoogLeNet compiles for training with BatchNorm."""
    for block, case in googlenet_cases(normed=True):
        if case["save"]:
            yield f"{block}x{case['batch']} normed", case, capabilities, slice(None)


def with_pools(cases: Iterable[Case], capabilities: tuple[int, ...]) -> Iterator[Case]:
    """These, and every binary of the max-pools of stride 2."""
    yield from cases
    yield from cases_of_pools(capabilities)


def cases_of_pools(capabilities: tuple[int, ...], *, odd: bool = True) -> Iterator[Case]:
    """odd: those of single channels too."""
    for name, case in pool_cases(odd=odd):
        yield name, case, capabilities, slice(None)


def quick_cases() -> Iterator[Case]:
    """GoogLeNet's binaries on sm_80, those of sm_90 being launch_path()'s, the halves of its pairs, and odd channels on
    both, without BatchNorm and with one that trains."""
    for label, case, _, which in rule_cases():
        yield label, case, (80,), which
    apart = {"config": GOOGLENET_BLOCKS["4b"], "batch": 1, "image": (14, 14), "pairs": False}
    for save in (False, True):
        yield "4bx1 apart", apart | {"save": save}, (80,), slice(0, 5)
    odd = {"config": ODD_BLOCK, "batch": 2, "image": (7, 5), "save": True}
    yield "odd", odd, (80, 90), slice(None)
    yield "odd stem", odd | {"config": ODD_STEM}, (80, 90), slice(None)
    for double, at in (
        ("4b", {"config": GOOGLENET_BLOCKS["4b"], "batch": 32, "image": (14, 14), "save": True}),
        ("odd", odd),
    ):
        yield f"{double} two 3x3", at | {"double": True}, (80, 90), slice(None)
    for dy_rows in (True, False):
        yield "odd normed", odd | {"normed": True, "dy_rows": dy_rows}, (80, 90), slice(None)


CASES = {
    "every": lambda: with_pools(every_case(), EVERY_CAPABILITY),
    "rules": rule_cases,
    "quick": lambda: with_pools(quick_cases(), LOOPED),
    "pools": lambda: with_pools((), EVERY_CAPABILITY),
    "stem": lambda: stem_cases(EVERY_CAPABILITY),
}
