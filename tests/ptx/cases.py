"""Which blocks are executed so that every binary is: small ones, with the tiles of large ones forced on them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from batch_norm_cases import make_norms
from checks.block_cases import (
    ODD,
    ODD_STEM,
    Block,
    check_backward,
    check_kernels,
    check_taps,
    check_values,
    in_layout,
    make_block,
)
from checks.launches import block_launches
from emulated import (
    Emulation,
    Record,
    emulating,
    run_backward,
    run_forward,
    with_tiles,
)
from emulator import PtxError, Schedule
from inception_fused.block.googlenet_blocks import Config, InceptionConfig, StemConfig
from inception_fused.block.views import Tile
from inception_fused.plan import choice
from inception_fused.runtime.launch import binary_key
from normed_checks import checked, run_normed, run_normed_backward

SEVERAL = InceptionConfig(72, 136, (72, 136), (40, 72), 136)
"""More filters, columns and channels than any tile has, none of them a multiple of a tile; units of 16 bytes."""

SEVERAL_STEM = StemConfig(72, 136, 136)

PIXELS = (3, 10, 9)
"""270: more than a tile of 256 rows."""

FEW = InceptionConfig(32, 32, (32, 64), (32, 32), 32)
FEW_STEM = StemConfig(32, 32, 64)
FEW_PIXELS = (2, 5, 6)

PACKED = {"bias": False, "packed": True}
VARIANTS: tuple[dict[str, Any], ...] = (
    {"save": True},
    {"save": False},
    {"save": True, **PACKED},
    {"save": False, **PACKED},
    {"save": True, "double": True, **PACKED},
    {"save": False, "double": True, **PACKED},
    {"save": True, "branch3": 3, **PACKED},
    {"save": True, "double": True},
    {"save": True, "dy_rows": False, **PACKED},
    {"save": True, "dy_rows": False},
    {"save": True, "activation": None},
    {"save": True, "packed": True},
    {"save": True, "batch_norm": True},
    {"save": True, "batch_norm": True, **PACKED},
    {"save": True, "batch_norm": True, "bias": False},
    {"save": True, "normed": True, "bias": False},
    {"save": True, "normed": True},
    {"save": True, "normed": True, "dy_rows": False},
    {"save": True, "normed": True, "dy_rows": False, "bias": False},
    {"save": True, "normed": True, "activation": None, "bias": False},
    {"save": True, "normed": True, "double": True, **PACKED},
)
"""Arguments of block_launches(): what decides a binary beside tile and dtype."""

STEM_VARIANTS: tuple[dict[str, Any], ...] = (
    {"save": True},
    {"save": False},
    {"save": True, **PACKED},
    {"save": False, **PACKED},
    {"save": True, "dy_rows": False},
)
"""Those of the stem, which has binaries of its own of what packs parameters and adds up, for two convolutions."""


FENCES_COPIES = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
"""Whether this Triton emits a fence.proxy.async between a cp.async and the wgmma that reads what it copied, as the text
of the ISA asks for (triton-lang/triton#9610). Without it B200s have given wrong results, H100s have not
(pytorch/pytorch#181248)."""

NORMAL, TIES, NANS = "normal", "ties", "NaN"
"""Data of x: normal, of five values only, and those with one in fifty NaN, for which there is no backward."""


class Case(NamedTuple):
    """variant: one of VARIANTS. tiles: forced, by key of their rules."""

    name: str
    config: Config
    pixels: tuple[int, int, int]
    variant: dict[str, Any]
    tiles: dict[str, Tile]
    data: str = NORMAL

    def keys(self, dtype: torch.dtype, capability: int) -> set[tuple[Any, ...]]:
        """Of the binaries that it executes."""
        n, *image = self.pixels
        with with_tiles(self.tiles):
            launches = block_launches(
                self.config, n, tuple(image), dtype, **self.variant, capability=divmod(capability, 10)
            )
        return set(map(binary_key, launches))


def candidates(dtype: torch.dtype, capability: int) -> Iterator[Case]:
    """Every variant as the plan has it (in pairs), with every tile of the plan, and with odd channels."""
    listed = {
        key: [tile for tile in rules.tiles(dtype, divmod(capability, 10)) if tile != rules.unaligned.tile(dtype)]
        for key, rules in choice.RULES.items()
    }
    forms = [("", SEVERAL, ODD, variant) for variant in VARIANTS]
    forms += [("stem, ", SEVERAL_STEM, ODD_STEM, variant) for variant in STEM_VARIANTS]
    for of, several, odd, variant in forms:
        name = of + " ".join(f"{key}={value}" for key, value in variant.items())
        yield Case(f"{name}, as planned", several, PIXELS, variant, {})
        for turn in range(max(map(len, listed.values()))):
            tiles = {key: found[turn % len(found)] for key, found in listed.items()}
            yield Case(f"{name}, tiles {turn}", several, PIXELS, variant, tiles)
        yield Case(f"{name}, odd channels", odd, (2, 7, 5), variant, {})


def covering(
    wanted: set[tuple[Any, ...]], dtype: torch.dtype, capability: int, of: type | None = None
) -> tuple[list[Case], set]:
    """Cases that execute the wanted binaries, few of them, and the binaries that none executes. of: only cases whose
    configuration is of this class."""
    chosen, left = [], set(wanted)
    for case in candidates(dtype, capability):
        if of is not None and not isinstance(case.config, of):
            continue
        new = case.keys(dtype, capability) & left
        if new:
            chosen.append(case)
            left -= new
    return chosen, left


class Outcome(NamedTuple):
    """What a case gave: results in the order y, r, bits, taps, gradients; faults in words."""

    records: list[Record]
    results: list[Tensor]
    faults: list[str]


def run_case(case: Case, dtype: torch.dtype, capability: int, schedule: Schedule) -> Outcome:
    """Executes a block and compares it with float64 on the very operands that each kernel read."""
    emulation = Emulation(capability, schedule)
    variant, tf32, results = case.variant, dtype == torch.float32, []
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    made = {key: variant[key] for key in ("bias", "activation", "branch3", "double") if key in variant}
    block = make_block(case.config, case.pixels, dtype, **made)
    if variant.get("packed"):
        block = block._replace(weights=in_layout(block.weights, "KRSC"))
    block = block._replace(x=_data(block.x, case.data))
    n, h, w = case.pixels
    dy = torch.randn((n, block.shape.k, h, w), generator=torch.Generator().manual_seed(1)).to(dtype)
    if variant.get("dy_rows", True):
        dy = dy.contiguous(memory_format=torch.channels_last)
    norms = make_norms(block.weights) if variant.get("batch_norm") else None
    faults = []
    try:
        with torch.no_grad(), emulating(emulation, case.tiles):
            if variant.get("normed"):
                results += _run_normed(block, dy, variant["save"], tf32, backward=case.data != NANS)
            else:
                out = run_forward(block, save=variant["save"], batch_norms=norms)
                results += out
                _check_forward(block, norms, out, variant["save"], tf32)
                if variant["save"] and norms is None and case.data != NANS:
                    grads = run_backward(block, out, dy)
                    results += grads
                    check_backward(block, out, dy, grads, tf32=tf32)
    except (PtxError, AssertionError) as error:
        last = f"after {emulation.records[-1].name}" if emulation.records else "first launch"
        faults.append(f"{last}: {type(error).__name__}: {error}")
    faults += [f"{record.name}: race: {race}" for record in emulation.records for race in record.races]
    if FENCES_COPIES:
        faults += [
            f"{r.name}: no fence between cp.async and lines {r.unfenced}" for r in emulation.records if r.unfenced
        ]
    return Outcome(emulation.records, results, [f"{case.name}: {fault}" for fault in faults])


def _data(x: Tensor, kind: str) -> Tensor:
    """x with other values in its memory."""
    generator = torch.Generator().manual_seed(2)
    values = torch.randint(-2, 3, x.shape, generator=generator).to(x.dtype)
    if kind == NANS:
        values[torch.rand(x.shape, generator=generator) < 0.02] = float("nan")
    return x if kind == NORMAL else torch.empty_like(x).copy_(values)


def _check_forward(block: Block, norms: Any, out: tuple[Tensor, ...], saved: bool, tf32: bool) -> None:
    """norms: folded into weights and biases of float64 here."""
    if norms is not None:
        scales = [norm.gamma.double() / (norm.var.double() + norm.eps).sqrt() for norm in norms]
        biases = block.biases or [torch.zeros(len(w)) for w in block.weights]
        weights = [w.double() * s[:, None, None, None] for w, s in zip(block.weights, scales, strict=True)]
        shifts = [
            (b.double() - norm.mean.double()) * s + norm.beta.double()
            for b, norm, s in zip(biases, norms, scales, strict=True)
        ]
        block = block._replace(weights=weights, biases=shifts)
    if saved:
        check_kernels(block, out, tf32=tf32)
    else:
        check_values(block, *out[:2], tf32=tf32)


def _run_normed(block: Block, dy: Tensor, save: bool, tf32: bool, *, backward: bool) -> list[Tensor]:
    """Every launch of BatchNorm in training is checked as soon as it has run; the others by what they left."""
    norms = [norm._replace(mean=None, var=None) for norm in make_norms(block.weights)]
    with checked():
        y, saved = run_normed(block, norms, save=save)
        n, h, w = dy.shape[0], *dy.shape[2:]
        raw = saved.raw.unflatten(0, (n, h, w)).permute(0, 3, 1, 2)
        check_values(block._replace(relu=False), raw, saved.raw_r, sources=saved.r, tf32=tf32)
        if save:
            check_taps(block, saved.taps)
        grads = run_normed_backward(block, norms, saved, dy) if save and backward else []
    return [y, *saved, *grads]


def schedules() -> Iterator[Schedule]:
    """Every order and every timing."""
    for order, timing in itertools.product(("together", "ascending", "descending"), ("late", "early")):
        yield Schedule(order, timing)
