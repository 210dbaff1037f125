"""N1 to N6 alone: the cases of tests/kernels/test_norm*.py, executed from PTX with the tile that a GPU takes.

In wider rows of NaN, aligned and odd, several programs and ranges of rows, raw values that round to zero or are not
finite: N3 to the bit of its twin, N4 and N6 to the bit of N3's mask, sums against float64, the same bits again.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

import norm_operands
import test_norm_gradients as gradients
import test_norms as norms
from emulated import Emulation, emulating
from emulator import PtxError, Schedule
from inception_fused.plan import choice

ALIGNED, ODD = (150, 72), (100, 33)
"""Rows and channels: three tiles of rows, two of columns; and two of rows, of odd channels."""

BRANCHES = ((40, 8, 40, 24), (33, 1, 5, 7), (40,))


class Alone(NamedTuple):
    """A test, and its arguments."""

    test: Callable[..., None]
    arguments: tuple[Any, ...]

    @property
    def name(self) -> str:
        return f"{self.test.__name__} {self.arguments}"


def alone(dtype: torch.dtype, *, quick: bool = False) -> Iterator[Alone]:
    """Of one dtype. quick: every kernel, and each of its forms on one size."""
    for size, relu in itertools.product((ALIGNED, ODD), (True, False)):
        if quick and size == ODD and relu:
            continue
        yield Alone(norms.test_apply, (size, dtype, relu))
        layouts = ("NCHW",) if quick and size == ALIGNED and not relu else ("rows",) if quick else ("rows", "NCHW")
        for layout in layouts:
            yield Alone(gradients.test_gradient_of_any_layout, (layout, size, dtype, relu))
        if relu or not quick:
            yield Alone(gradients.test_gradient_sums, ("rows", size, dtype, relu))
            yield Alone(norms.test_parts, (size, dtype))
            yield Alone(norms.test_statistics, (None, size, dtype, torch.float32))
    for branches in BRANCHES[:2] if quick else BRANCHES:
        yield Alone(gradients.test_gradient_of_raw_values, (branches, dtype, True))
    for channels in (40,) if quick else (40, 33):
        yield Alone(gradients.test_coefficients, (None, channels, torch.float32, 9))


def run_alone(case: Alone, dtype: torch.dtype, capability: int, schedule: Schedule) -> tuple[Emulation, list[str]]:
    """What was executed, and what is wrong, in words."""
    emulation = Emulation(capability, schedule)
    tile = choice.RULES["N1"].rules[0].tile(dtype)
    torch.manual_seed(0)
    faults = []
    with torch.no_grad(), emulating(emulation), mock.patch.object(norm_operands, "TILE", tile):
        try:
            case.test(*case.arguments)
        except (AssertionError, PtxError) as error:
            faults.append(f"{type(error).__name__}: {error}")
    faults += [f"{record.name}: race: {race}" for record in emulation.records for race in record.races]
    return emulation, [f"{case.name}: {fault}" for fault in faults]
