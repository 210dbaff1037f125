"""Counts of every binary of GoogLeNet's launches, into the package's file (inception_fused/plan/counts.py)."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, NamedTuple

import triton

from checks.launches import block_launches, googlenet_cases
from checks.pool_launches import pool_cases, pool_launches
from counter import latency, pipes, sass
from counter.compiling import DTYPES, compile_launch, disassembled, resources
from counter.hazards import register_operands
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, block_shape
from inception_fused.plan import counts, launches, pool_forecast, problems
from inception_fused.plan.counts import MAIN, OTHER, OUTER, Binary, Counts, Key, Part
from inception_fused.plan.sources import kernel_sources
from inception_fused.runtime.launch import Launch, binary_key

CAPABILITIES = (80, 89, 90)


class Named(NamedTuple):
    """A recorded launch and the row of the plan that it is."""

    problem: problems.Launch
    launch: Launch
    saves: bool

    @property
    def key(self) -> Key:
        problem = self.problem
        if not self.launch.constexprs.get("ROWS", True):
            problem = problem.strided()
        return counts.key_of(problem, self.launch.tile, self.saves)

    @property
    def of_batch_norm(self) -> bool:
        """Whether there is such a launch only where BatchNorm takes the statistics of the batch."""
        return self.problem.row.centred or self.problem.row.role in launches.NORMS


def named(
    case: dict[str, Any], dtype: str, capability: int = 90, *, double: bool = False, packed: bool = False
) -> list[Named]:
    """The launches of block_launches(), in order, each with its row. capability: 90 for sm_90, by which the plan
    chooses tiles. packed: the forward begins without pack. The halves of a pair are launches of their own: what its
    programs do is what theirs do."""
    given, plan = DTYPES[dtype], dict(capability=divmod(capability, 10))
    found = block_launches(**case, dtype=given, **plan, pairs=False)
    (side, _), windows = case["image"], (3, 3) if double else (5,)
    shape = block_shape(case["config"], case["batch"], side, given, branch3=windows)
    directions = ("forward", "backward") if case["save"] else ("forward",)
    plan |= dict(normed=case.get("normed", False))
    rows = [row for direction in directions for row in problems.launches_of(shape, given, direction, **plan)][packed:]
    return [Named(row, launch, case["save"]) for row, launch in zip(rows, found, strict=True)]


def googlenet(dtype: str, capability: int = 90) -> Iterator[Named]:
    """Every launch of the stem and the nine blocks, inference and training at batch 1, 32 and 128."""
    for _, _, item in _googlenet(dtype, capability):
        yield item


def _googlenet(dtype: str, capability: int) -> Iterator[tuple[dict[str, Any], int, Named]]:
    """The same with its case and its place there; of BatchNorm in training only what others have not."""
    for name, case in googlenet_cases():
        yield from ((case, index, item) for index, item in enumerate(named(case, dtype, capability)))
        if case["save"] and name in GOOGLENET_BLOCKS:
            normed = case | {"normed": True}
            found = enumerate(named(normed, dtype, capability))
            yield from ((normed, index, item) for index, item in found if item.of_batch_norm)


class NamedPool(NamedTuple):
    """A recorded launch of a max-pool and what the plan says of it."""

    problem: pool_forecast.PoolLaunch
    launch: Launch

    @property
    def key(self) -> Key:
        return self.problem.key._replace(tile=self.launch.tile)


def named_pools(case: dict[str, Any], dtype: str, capability: int = 90) -> list[NamedPool]:
    """The launches of a max-pool, in order. case: arguments of pool_launches()."""
    given, plan = DTYPES[dtype], dict(capability=divmod(capability, 10))
    found = pool_launches(**case, dtype=given, **plan)
    pool = pool_forecast.Pool(case["pool"], case["channels"], given, case["epilogue"])
    planned = [row for row in pool_forecast.pool_launches(pool, training=case["save"], **plan) if row.kernel]
    return [NamedPool(row, launch) for row, launch in zip(planned, found, strict=True)]


class Job(NamedTuple):
    """A binary to count. source: how another process finds the launch; keys: what it serves."""

    source: tuple[dict[str, Any], str, int]
    keys: tuple[Key, ...]
    capability: int


def jobs(dtypes: Sequence[str], capabilities: Sequence[int], kernels: str = "") -> list[Job]:
    """One job a binary of the blocks; kernels: part of their names."""
    found = (
        (capability, dtype, *place)
        for dtype, capability in itertools.product(dtypes, capabilities)
        for place in _googlenet(dtype, capability)
    )
    return _jobs(found, kernels)


def pool_jobs(dtypes: Sequence[str], capabilities: Sequence[int], kernels: str = "") -> list[Job]:
    """The same of the network's own max-pools."""
    found = (
        (capability, dtype, case, index, item)
        for dtype, capability in itertools.product(dtypes, capabilities)
        for _, case in pool_cases(odd=False)
        for index, item in enumerate(named_pools(case, dtype, capability))
    )
    return _jobs(found, kernels)


def _jobs(found: Iterable[tuple[int, str, dict[str, Any], int, Named | NamedPool]], kernels: str) -> list[Job]:
    sources: dict[Any, tuple[dict[str, Any], str, int]] = {}
    keys: dict[Any, set[Key]] = {}
    for capability, dtype, case, index, item in found:
        identity = (capability, binary_key(item.launch))
        sources.setdefault(identity, (case, dtype, index))
        keys.setdefault(identity, set()).add(item.key)
    return [
        Job(source, tuple(sorted(keys[identity])), identity[0])
        for identity, source in sources.items()
        if any(kernels in str(key) for key in keys[identity])
    ]


def run(job: Job) -> Binary:
    case, dtype, index = job.source
    items = named_pools if "pool" in case else named
    launch = items(case, dtype, job.capability)[index].launch
    return counted(compile_launch(launch, job.capability), job.capability)


def counted(binary: Any, capability: int) -> Binary:
    """The record of a compiled kernel."""
    code = sass.parse(disassembled(binary))
    parts, used = parts_of(code), resources(binary)
    overwritten = sum(bool(hazard.written) for hazard in register_operands(code))
    return Binary(capability, used["registers"], used["stack"], used["shared"], through_l1(code), overwritten, parts)


def parts_of(code: sass.Code) -> tuple[Part, ...]:
    """What is before, between and after the loops, then each loop without those inside it."""
    straight_cycles, trips = latency.cycles(code)
    own = {loop: pipes.count(code.instructions[i] for i in loop.own()) for loop in code.every_loop()}
    first = code.loops[0].first if code.loops else len(code.instructions)
    last = code.loops[-1].last if code.loops else first
    within = {i for loop in code.loops for i in range(loop.first, loop.last)}
    spans = {
        "before": range(first),
        "between": [i for i in range(first, last) if i not in within],
        "after": range(last, len(code.instructions)),
    }
    total = max(1, sum(map(len, spans.values())))
    parts = []
    for kind, places in spans.items():
        if len(places):
            figures = pipes.count(code.instructions[i] for i in places)
            parts.append(_part(kind, figures, straight_cycles * len(places) / total))
    for loop in own:
        kind = MAIN if own[loop]["macs"] else OUTER if loop.inner else OTHER
        parts.append(_part(kind, own[loop], trips[loop]))
    return tuple(parts)


def _part(kind: str, figures: dict[str, float], cycles: float) -> Part:
    # As the file has them, so that what was read equals what was counted.
    rounded = tuple(round(figures[name], 1) for name in counts.COLUMNS)
    return Part(kind, rounded, round(cycles))


def through_l1(code: sass.Code) -> bool:
    """Whether the loops with matrix instructions read more from device memory through L1 than past it."""
    through = past = 0.0
    for loop in code.every_loop():
        inside = [code.instructions[i] for i in loop.own()]
        if any(map(pipes.macs, inside)):
            past += sum(pipes.data(i) for i in inside if i.name == "LDGSTS" and ".BYPASS" in i.opcode)
            through += sum(pipes.data(i) for i in inside if i.name in ("LDG", "LDGSTS") and ".BYPASS" not in i.opcode)
    return through > past


def grids() -> dict[str, list[tuple[int, int]]]:
    """(elements of a block's weights, programs) of the launches whose grid is made of weights, in bf16."""
    found: dict[str, set[tuple[int, int]]] = {}
    for _, case in googlenet_cases():
        if case["save"]:
            for item in named(case, "bf16"):
                if item.problem.row.role in (launches.PACK, launches.SUM):
                    programs = 1
                    for size in item.launch.grid:
                        programs *= size
                    kernel = item.problem.kernel.function
                    found.setdefault(kernel, set()).add((sum(item.problem.shape.weight_sizes), programs))
    return {kernel: sorted(some) for kernel, some in found.items()}


def count(todo: Iterable[Job], workers: int) -> Counts:
    """Compiles and counts."""
    todo = list(todo)
    binaries = {}
    with ProcessPoolExecutor(workers) as pool:
        for job, binary in zip(todo, pool.map(run, todo), strict=True):
            binaries |= {(key, job.capability): binary for key in job.keys}
    return Counts(triton.__version__, kernel_sources(), binaries, grids())
