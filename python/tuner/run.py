"""One run of the tuner: groups of problems one after another, each compiled, timed, decided, checked and written."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from checks.device import DeviceLostError
from inception_fused.block import chains
from inception_fused.block.googlenet_blocks import Config, block_shape, spatial_size
from inception_fused.block.views import Tile
from inception_fused.plan import choice, launches, pairs, tile_table, tuned
from inception_fused.plan.rules import PLANNED, Capability
from tuner.bench import Bench
from tuner.candidates import candidates
from tuner.choice import NOISE, choose, units
from tuner.operands import Case, problems_of
from tuner.record import Record, tile_text

KERNELS = {
    row.rules: row.kernel.name
    for normed in (False, True)
    for rows in launches.table_of(chains.USUAL.names, normed=normed).rows.values()
    for row in rows
    if row.rules
}
"""What is tuned, and whose it is; what BatchNorm in training adds stands last. Strided rules stay: one launch of the
network takes them, or two, for a dy that is no matrix of rows, and its time is that of element-wise reads, whatever the
tile."""

Progress = Callable[[int, int, str], None]

CHECK_S = 0.3
"""Seconds of a check where none has run yet: a float64 convolution and two launches."""


@dataclass(frozen=True)
class Group:
    """The problems that share a kernel's tiles: one kernel in one dtype, the largest batch first. alone: the tiles that
    the rules give it in launches of its own, and not as a half of a pair."""

    kernel: str
    dtype: str
    cases: tuple[Case, ...]
    alone: frozenset[Tile] = frozenset()

    @property
    def limit(self) -> int:
        """How many tiles the rules give it. Those that they give to halves of pairs alone are not counted, but for a
        second: what is timed is launched by itself, and would be more binaries."""
        tiles = {choice.tile_of(case.problem) for case in self.cases}
        return min(len(tiles), max(len(self.alone), 2))

    def __str__(self) -> str:
        return f"{self.kernel} {self.dtype}"


def make_groups(
    blocks: Mapping[str, Config], batches: Sequence[int], dtypes: Sequence[str], kernels: Sequence[str],
    image_size: int, branch3: Sequence[int] = (5,), capability: Capability = PLANNED,
) -> list[Group]:  # fmt: skip
    """Groups in the order in which they are worth most: dtypes as given, forward before backward, then what BatchNorm
    in training adds, likewise.

    blocks: or the stem. branch3: sides of the windows of the blocks' third branch. capability: of the GPU.

    Blocks whose problems are equal share one; what is not in units of 16 bytes keeps its rule and is left out.
    """
    found: dict[tuple[str, str], dict[str, Case]] = {(d, k): {} for d in dtypes for k in KERNELS if k in kernels}
    alone: dict[tuple[str, str], set[Tile]] = {key: set() for key in found}
    for dtype in dtypes:
        for batch in sorted(batches, reverse=True):
            for block, config in blocks.items():
                size = spatial_size(block, image_size)
                shape = block_shape(config, batch, size, tile_table.DTYPES[dtype], branch3=branch3)
                for step in pairs.steps(problems_of(shape, tile_table.DTYPES[dtype], capability=capability)):
                    for problem in step.halves:
                        key = dtype, problem.rules
                        if key not in found or problem.unit == 1:
                            continue
                        case = Case(block, config, batch, size, dtype, problem)
                        found[key].setdefault(case.key, case)
                        if step.pair is None:
                            alone[key].add(choice.tile_of(problem))
    return [
        Group(key[1], key[0], tuple(cases.values()), frozenset(alone[key])) for key, cases in found.items() if cases
    ]


class _CutError(Exception):
    """The budget ends here."""


class Tuner:
    """Where the figures come from and go to. path: the table's file; origin: "user" or "package"; deadline: on the
    clock of time.time(); tiles_per_kernel: instead of as many as the rules have."""

    def __init__(
        self, bench: Bench, record: Record, path: Path, facts: Mapping[str, Any], *, origin: str, deadline: float,
        warps: Sequence[int] = (4,), tiles_per_kernel: int | None = None, on_progress: Progress | None = None,
    ) -> None:  # fmt: skip
        self.bench, self.record, self.path, self.facts, self.origin = bench, record, path, facts, origin
        self.deadline, self.warps, self.tiles_per_kernel = deadline, tuple(warps), tiles_per_kernel
        self.on_progress = on_progress or (lambda done, total, text: None)
        self.entries: dict[tuple[str, str], list[tile_table.Entry]] = {}
        self.groups: list[dict[str, Any]] = []
        self.refused: list[str] = []
        self.failed: list[str] = []
        self.done = self.total = self.timings = 0
        self._check_s = self._case_s = CHECK_S

    def run(self, groups: Sequence[Group]) -> dict[str, Any]:
        """Walks the groups until the budget ends; what is finished is written after each. Returns figures for JSON."""
        self.total = sum(len(group.cases) for group in groups)
        started, ended, lost = time.time(), None, False
        self._load_entries()
        try:
            for group in groups:
                self._time_group(group)
                self._decide(group)
                self._write()
        except _CutError:
            ended = "budget spent"
        except KeyboardInterrupt:
            ended = "interrupted"
        except DeviceLostError as error:
            ended, lost = str(error), True
            self.failed.append(ended)
        self._keep(self.record.save)
        finished = [group for group in self.groups if group["rule_us"]]
        rule_us, us = (sum(group[name] for group in finished) for name in ("rule_us", "us"))
        return {
            "gpu": self.bench.gpu.name,
            "path": str(self.path),
            "problems": self.total,
            "timed": self.done,
            "cut": self.total - self.done,
            "ended": ended,
            "device_lost": lost,
            "timings": self.timings,
            "seconds": round(time.time() - started, 2),
            "gain": rule_us / us - 1 if us else None,
            "groups": self.groups,
            "winners": [tile_table.to_json(entry) for group in self.groups for entry in self.entries[_key(group)]],
            "rejected": [
                {"kernel": kernel, "dtype": dtype, "tile": tile_text(tile), "reason": reason}
                for (kernel, dtype), found in self.record.rejected.items()
                for tile, reason in found.items()
            ],
            "refused": self.refused,
            "failed": self.failed,
        }

    def _time_group(self, group: Group) -> None:
        """Fills the record with the group's times. Raises _CutError, DeviceLostError."""
        rejected = self.record.rejected.setdefault((group.kernel, group.dtype), {})
        missing = {case: [t for t in self._candidates(case) if t not in self._times(case)] for case in group.cases}
        smallest: dict[Tile, Case] = {}
        for case, tiles in missing.items():
            for tile in tiles:
                known = smallest.get(tile)
                if tile not in rejected and (known is None or case.problem.gemm.m < known.problem.gemm.m):
                    smallest[tile] = case
        if smallest:
            self._compile(group, smallest)
        for case in group.cases:
            before, tiles = time.time(), [tile for tile in missing[case] if tile not in rejected]
            if tiles and before + self._case_s + (len(group.cases) + 1) * self._check_s > self.deadline:
                raise _CutError
            self.record.cases[case.key] = case
            for tile in tiles:
                self._time(case, tile)
            if tiles:
                self._case_s = time.time() - before
            self._keep(lambda: self.record.save(now=False))
            self.done += 1
            self.on_progress(self.done, self.total, str(case))

    def _compile(self, group: Group, smallest: Mapping[Tile, Case]) -> None:
        """All tiles of a group in threads before the first is timed: a compiler beside would delay launches."""
        self.on_progress(self.done, self.total, f"{group}: compiling {len(smallest)} tiles")
        ready = 0
        for tile, reason in self.bench.compile([(case, tile) for tile, case in smallest.items()], self.deadline):
            ready += 1
            if reason is not None:
                self._reject(smallest[tile], tile, reason)
        if ready < len(smallest):
            raise _CutError

    def _time(self, case: Case, tile: Tile) -> None:
        try:
            self._times(case)[tile] = self.bench.time(case, tile)
            self.timings += 1
        except torch.OutOfMemoryError as error:
            self._fail(f"{case}: out of memory: {str(error).splitlines()[0]}")
        except Exception as error:
            self._reject(case, tile, f"{type(error).__name__}: {str(error)[-300:]}")
            self.bench.alive()

    def _reject(self, case: Case, tile: Tile, reason: str) -> None:
        """For all problems of the kernel and dtype. A rule's tile must run; that it spills is only a loss."""
        self.record.reject(case, tile, reason)
        if tile == choice.tile_of(case.problem) and not reason.startswith("spills"):
            self._fail(f"{case}: the rule's {tile_text(tile)}: {reason}")

    def _decide(self, group: Group) -> None:
        """The group's entries: few tiles for all its problems, every one checked where it won."""
        limit = self.tiles_per_kernel or group.limit
        cases = [
            case for case in self.record.cases.values() if self._belongs(case, group) and self._complete(case, group)
        ]
        while True:
            costs = self._costs(cases)
            problems = units(costs, {case.key: case.bond for case in cases})
            chosen = choose(problems, limit)
            wrong = next(
                (case for case in cases if case.key in chosen and not self._right(case, chosen[case.key])), None
            )
            if wrong is None:
                break
        for case in group.cases:
            if case.key not in chosen:
                self._fail(f"{case}: no tile is left")
        decided = [(case, chosen[case.key]) for case in cases if case.key in chosen]
        self.entries[group.kernel, group.dtype] = [self._entry(case, tile) for case, tile in decided]
        free = choose(problems, len({tile for known in costs.values() for tile in known}))
        ruled = [(case, tile) for case, tile in decided if choice.tile_of(case.problem) in self._times(case)]
        self.groups.append(
            {
                "kernel": group.kernel,
                "dtype": group.dtype,
                "problems": len(decided),
                "tiles": sorted({tile_text(tile) for _, tile in decided}),
                "limit": limit,
                "rule_us": sum(self._us(case, choice.tile_of(case.problem)) for case, _ in ruled),
                "us": sum(self._us(case, tile) for case, tile in ruled),
                "unlimited_us": sum(self._us(case, free[case.key]) for case, _ in ruled),
            }
        )

    def _costs(self, cases: Sequence[Case]) -> dict[str, dict[Tile, float]]:
        """Times, those of a batch as shares of the batch's total, so that batch 1 counts as much as batch 128."""
        known: dict[str, dict[Tile, float]] = {}
        totals: dict[int, float] = {}
        for case in cases:
            rejected = self.record.rejected.get((case.problem.rules, case.dtype), {})
            rule = choice.tile_of(case.problem)
            found = {
                tile: us * (1 if tile == rule else 1 + NOISE)
                for tile, (us, _) in self._times(case).items()
                if tile not in rejected and tile.BLOCK_K == rule.BLOCK_K
            }
            if found:
                known[case.key] = found
                totals[case.batch] = totals.get(case.batch, 0.0) + min(found.values())
        batches = {case.key: case.batch for case in cases}
        return {
            key: {tile: us / (totals[batches[key]] or 1.0) for tile, us in found.items()}
            for key, found in known.items()
        }

    def _right(self, case: Case, tile: Tile) -> bool:
        """Whether a winner computes what it should; refuses it for the whole group where it does not."""
        parity = self.record.parity.setdefault(case.key, {})
        if tile in parity:
            return True
        self.on_progress(self.done, self.total, f"{case}: checking")
        before = time.time()
        try:
            parity[tile] = self.bench.check(case, tile)
        except torch.OutOfMemoryError as error:
            # No verdict: the problem is left to its rule, the tile to the others.
            self._fail(f"{case}: out of memory in its check: {str(error).splitlines()[0]}")
            del self.record.times[case.key], self.record.cases[case.key]
            return False
        except Exception as error:
            reason = f"{case}: {tile_text(tile)} refused: {type(error).__name__}: {error}"
            self.refused.append(reason)
            self._reject(case, tile, reason)
            self.bench.alive()
            return False
        self._check_s = 0.8 * self._check_s + 0.2 * (time.time() - before)
        return True

    def _entry(self, case: Case, tile: Tile) -> tile_table.Entry:
        p, times = case.problem, self._times(case)
        rejected = self.record.rejected.get((p.rules, case.dtype), {})
        others = {other: us for other, (us, _) in times.items() if other != tile and other not in rejected}
        second = min(others, key=others.__getitem__, default=None)
        us, spread = times[tile]
        return tile_table.Entry(
            p.rules, case.dtype, p.gemm.m, p.gemm.n, p.gemm.k, tile, us,
            rule_us=times[choice.tile_of(p)][0] if choice.tile_of(p) in times else None,
            runner_up=None if second is None else (second, others[second]),
            spread=spread, parity=self.record.parity[case.key][tile], taps=p.gemm.taps,
        )  # fmt: skip

    def _load_entries(self) -> None:
        """The old table's, where it can still be used: groups that are not finished now keep them."""
        try:
            old = tile_table.read(self.path, self.bench.gpu, self.origin)
        except (FileNotFoundError, tile_table.TableError):
            return
        for entry in old.entries:
            self.entries.setdefault((entry.kernel, entry.dtype), []).append(entry)

    def _write(self) -> None:
        entries = [tile_table.to_json(entry) for found in self.entries.values() for entry in found]
        date = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        facts = {"schema": tile_table.SCHEMA, **self.facts, "date": date, "entries": entries}
        self._keep(lambda: tile_table.write(self.path, facts))
        tuned.forget()

    def _keep(self, write: Callable[[], None]) -> None:
        """Writes; a disk that is full meanwhile fails the run, but does not end it."""
        try:
            write()
        except OSError as error:
            self._fail(f"cannot be written: {error}")

    def _fail(self, text: str) -> None:
        if text not in self.failed:
            self.failed.append(text)

    def _candidates(self, case: Case, warps: Sequence[int] | None = None) -> list[Tile]:
        return candidates(case.problem, self.bench.shared_bytes, warps or self.warps)

    def _times(self, case: Case) -> dict[Tile, tuple[float, float]]:
        return self.record.times.setdefault(case.key, {})

    def _us(self, case: Case, tile: Tile) -> float:
        return self._times(case)[tile][0]

    def _belongs(self, case: Case, group: Group) -> bool:
        return (case.problem.rules, case.dtype) == (group.kernel, group.dtype)

    def _complete(self, case: Case, group: Group) -> bool:
        """Whether nothing is left to time; of cases that only earlier runs asked for, with four warps."""
        rejected = self.record.rejected.get((group.kernel, group.dtype), {})
        wanted = self._candidates(case, None if case in group.cases else (4,))
        return all(tile in self._times(case) or tile in rejected for tile in wanted)


def _key(group: Mapping[str, Any]) -> tuple[str, str]:
    return group["kernel"], group["dtype"]
