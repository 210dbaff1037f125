"""What the tuner has measured, in a file beside the table: a cut or stopped run goes on where it ended."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inception_fused.block.googlenet_blocks import Config, block_shape
from inception_fused.block.views import Tile
from inception_fused.plan import tile_table
from inception_fused.plan.rules import Capability
from tuner.operands import Case, problems_of

SCHEMA = 2
SAVE_EVERY_S = 5.0


def tile_text(tile: Tile) -> str:
    return "x".join(map(str, tile))


def tile_of(text: str) -> Tile:
    return Tile(*map(int, text.split("x")))


class Record:
    """Times, verdicts and checks by case.

    ids: what must be equal for old figures to count. times: case's key -> tile -> (us, spread). rejected: (kernel,
    dtype) -> tile -> reason, for all its problems. parity: case's key -> tile -> error over bound.
    """

    def __init__(self, path: Path | None, ids: Mapping[str, Any]) -> None:
        self.path, self.ids = path, dict(ids)
        self.cases: dict[str, Case] = {}
        self.times: dict[str, dict[Tile, tuple[float, float]]] = {}
        self.rejected: dict[tuple[str, str], dict[Tile, str]] = {}
        self.parity: dict[str, dict[Tile, float]] = {}
        self._saved = time.time()

    @classmethod
    def load(
        cls, path: Path | None, ids: Mapping[str, Any], blocks: Mapping[str, Config], *, again: bool = False
    ) -> Record:
        """The file's record; an empty one where there is none, it is of other kernels or versions, or ``again``."""
        record = cls(path, ids)
        if path is None or again:
            return record
        try:
            facts = json.loads(path.read_text())
            if facts["schema"] != SCHEMA or facts["ids"] != record.ids:
                return record
            for key, place in facts["cases"].items():
                case = _case(key, place, blocks, tuple(ids["capability"]))
                if case is not None:
                    record.cases[key] = case
                    record.times[key] = {tile_of(t): tuple(found) for t, found in facts["times"][key].items()}
                    record.parity[key] = {tile_of(t): found for t, found in facts["parity"].get(key, {}).items()}
            for name, reasons in facts["rejected"].items():
                kernel, dtype = name.rsplit(" ", 1)
                record.rejected[kernel, dtype] = {tile_of(t): reason for t, reason in reasons.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            # It only saves time: whatever is wrong with it, the figures are taken again.
            return cls(path, ids)
        return record

    def reject(self, case: Case, tile: Tile, reason: str) -> None:
        self.rejected.setdefault((case.problem.rules, case.dtype), {})[tile] = reason

    def save(self, *, now: bool = True) -> None:
        """Writes the file; with now=False only if the last time was a while ago. Raises OSError."""
        if self.path is None or (not now and time.time() - self._saved < SAVE_EVERY_S):
            return
        self._saved = time.time()
        tile_table.write(
            self.path,
            {
                "schema": SCHEMA,
                "ids": self.ids,
                "cases": {
                    key: {"block": c.block, "branch3": c.branch3, "batch": c.batch, "size": c.size, "dtype": c.dtype}
                    for key, c in self.cases.items()
                },
                "times": {key: {tile_text(t): v for t, v in found.items()} for key, found in self.times.items()},
                "parity": {key: {tile_text(t): v for t, v in found.items()} for key, found in self.parity.items()},
                "rejected": {
                    " ".join(group): {tile_text(t): v for t, v in found.items()}
                    for group, found in self.rejected.items()
                },
            },
        )


def _case(key: str, place: Mapping[str, Any], blocks: Mapping[str, Config], capability: Capability) -> Case | None:
    """The case of a key; None where this version's blocks have no such problem."""
    block, batch, size, dtype = (place[name] for name in ("block", "batch", "size", "dtype"))
    if block not in blocks or dtype not in tile_table.DTYPES:
        return None
    of_dtype = tile_table.DTYPES[dtype]
    shape = block_shape(blocks[block], batch, size, of_dtype, branch3=tuple(place["branch3"]))
    problems = problems_of(shape, of_dtype, capability=capability)
    cases = (Case(block, blocks[block], batch, size, dtype, problem) for problem in problems)
    return next((case for case in cases if case.key == key), None)
