"""Executes the binaries of the kernels on the CPU, from their PTX, and compares them with float64.

Runs in a process where Triton does not interpret, over blocks that cases.py chooses:

    python tests/ptx/ptx_gate.py                  every binary of the gate (aot_gate.py) on sm_90, at random timing
    python tests/ptx/ptx_gate.py --cases orders   one binary a kernel, sm_80 and sm_90, all orders and timings
    python tests/ptx/ptx_gate.py --cases quick    one launch a kernel
    python tests/ptx/ptx_gate.py --cases stem     every binary and, of one tile, every order of the stem's launches
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.extend(str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "aot", "kernels", "../python"))

import torch
import triton

import aot_cases
import aot_gate
from cases import FEW, FEW_PIXELS, FEW_STEM, NANS, TIES, VARIANTS, Case, Outcome, covering, run_case, schedules
from checks.block_cases import ODD, ODD_STEM
from counter.compiling import DTYPES, some_of
from emulator import Schedule
from inception_fused.block.googlenet_blocks import StemConfig
from inception_fused.plan import choice
from norm_cases import Alone, alone, run_alone

PAIRED = Case("aligned, in pairs", FEW, FEW_PIXELS, {"save": True}, {})
ODDLY = Case("odd channels", ODD, (2, 7, 5), {"save": True}, {})
STEM = Case("stem", FEW_STEM, FEW_PIXELS, {"save": True}, {})
STEM_ODDLY = Case("stem, odd channels", ODD_STEM, (2, 7, 5), {"save": True}, {})
NORMED = Case("normed, in pairs", FEW, FEW_PIXELS, {"save": True, "normed": True}, {})
NORMED_ODDLY = Case("odd channels, normed", ODD, (2, 7, 5), {"save": True, "normed": True}, {})


def apart(dtype: str, case: Case = PAIRED) -> Case:
    """The launches of a case in pairs each by itself."""
    tile = choice.RULES["K2"].rules[0].tile(DTYPES[dtype])
    return case._replace(name=case.name.replace("in pairs", "apart"), tiles={"K2": tile})


class Job(NamedTuple):
    """One case to execute. same: whose results must be alike to the bit have this in common, None for no others."""

    case: Case | Alone
    dtype: str
    capability: int
    schedule: Schedule
    same: str | None = None

    @property
    def name(self) -> str:
        order, timing, seed = self.schedule
        return f"{self.case.name} {self.dtype} sm_{self.capability} {order} {timing} {seed}"


def run(job: Job) -> dict[str, Any]:
    torch.set_num_threads(1)
    begun = time.perf_counter()
    on = DTYPES[job.dtype], job.capability, job.schedule
    if isinstance(job.case, Alone):
        emulation, faults = run_alone(job.case, *on)
        outcome = Outcome(emulation.records, [], faults)
    else:
        outcome = run_case(job.case, *on)
    digest = hashlib.sha256()
    for result in outcome.results:
        digest.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    return {
        "name": job.name,
        "dtype": job.dtype,
        "capability": job.capability,
        "same": job.same,
        "digest": digest.hexdigest(),
        "seconds": time.perf_counter() - begun,
        "launches": [
            [record.name, hashlib.sha256(repr(record.key).encode()).hexdigest(), record.instructions, record.seconds]
            for record in outcome.records
        ],
        "faults": outcome.faults,
    }


def every(dtypes: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Jobs, and the names of binaries that none executes."""
    jobs, left = [], []
    for name in dtypes:
        chosen, missing = executing(aot_cases.every_case(), name)
        # Of forwards, whose pool depends on ties and NaN.
        others = [case._replace(name=f"{case.name}, {data}", data=data) for case in chosen for data in (TIES, NANS)]
        chosen += [case for case in others if case.variant in VARIANTS[:2]]
        jobs += at_random([*chosen, *alone(DTYPES[name])], name)
        left += missing
    return jobs, left


def stem(dtypes: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Of every() and orders() what the stem's two convolutions have."""
    jobs, left = [job for job in orders(dtypes)[0] if job.case in (STEM, STEM_ODDLY)], []
    for name in dtypes:
        chosen, missing = executing(aot_cases.stem_cases((90,)), name, of=StemConfig)
        jobs += at_random(chosen, name)
        left += missing
    return jobs, left


def executing(compiled: Iterable[aot_cases.Case], dtype: str, of: type | None = None) -> tuple[list[Case], list[str]]:
    """Cases that execute what the gate compiles of its cases on sm_90, and the names of what none does. of: whose
    configuration is of this class."""
    wanted = {job.key[:-1]: job.name for job in aot_gate.jobs(compiled, [dtype], [90])}
    chosen, missing = covering(set(wanted), DTYPES[dtype], 90, of)
    return chosen, [wanted[key] for key in missing]


def at_random(cases: Iterable[Case | Alone], dtype: str) -> list[Job]:
    return [Job(case, dtype, 90, Schedule("random", "random", i)) for i, case in enumerate(cases)]


def orders(dtypes: Sequence[str]) -> tuple[list[Job], list[str]]:
    """Aligned and odd, in the two dtypes that differ; fp16 has bf16's instructions."""
    jobs = [
        Job(case, dtype, capability, schedule, f"{case.name} {dtype} {capability}")
        for capability in (80, 90)
        for dtype in dtypes
        if dtype != "fp16"
        for case in (PAIRED, apart(dtype), ODDLY, STEM, STEM_ODDLY, apart(dtype, NORMED), NORMED_ODDLY)
        for schedule in schedules()
    ]
    jobs += [
        Job(case._replace(name=f"{case.name} {data}", data=data), dtype, capability, Schedule())
        for capability in (80, 90)
        for dtype in dtypes
        for case in (PAIRED, apart(dtype), ODDLY, NORMED, NORMED_ODDLY)
        for data in (TIES, NANS)
    ]
    jobs += [
        Job(case, dtype, 80, Schedule("random", "random"))
        for dtype in dtypes
        for case in alone(DTYPES[dtype], quick=True)
    ]
    return jobs, []


def quick(dtypes: Sequence[str]) -> tuple[list[Job], list[str]]:
    random = Schedule("random", "random")
    jobs = [Job(case, "bf16", 90, random) for case in (PAIRED, apart("bf16"), STEM, NORMED)]
    jobs += [Job(case, "fp32", 80, Schedule()) for case in (ODDLY, STEM_ODDLY, NORMED_ODDLY)]
    jobs += [Job(case, "bf16", 90, random) for case in alone(torch.bfloat16, quick=True)]
    return [job for job in jobs if job.dtype in dtypes], []


CASES = {"every": every, "orders": orders, "quick": quick, "stem": stem}


def differing(results: Iterable[dict[str, Any]]) -> list[str]:
    """Results that must be alike and are not."""
    found: dict[str, dict[str, str]] = {}
    for result in results:
        if result["same"] is not None:
            found.setdefault(result["same"], {})[result["digest"]] = result["name"]
    return [f"results differ: {', '.join(names.values())}" for names in found.values() if len(names) > 1]


def table(results: Iterable[dict[str, Any]]) -> str:
    """By kernel: binaries, launches, instructions, seconds."""
    binaries: dict[str, set[tuple[str, int]]] = {}
    launches, instructions, seconds = Counter(), Counter(), Counter()
    for result in results:
        for kernel, key, count, took in result["launches"]:
            binaries.setdefault(kernel, set()).add((key, result["capability"]))
            launches[kernel] += 1
            instructions[kernel] += count
            seconds[kernel] += took
    rows = [
        f"| {kernel} | {len(binaries[kernel])} | {launches[kernel]} | {instructions[kernel] / 1e6:.1f} | "
        f"{seconds[kernel]:.0f} |"
        for kernel in sorted(binaries)
    ]
    total = sum(map(len, binaries.values()))
    rows.append(f"| all | {total} | {launches.total()} | {instructions.total() / 1e6:.1f} | {seconds.total():.0f} |")
    head = "| kernel | binaries | launches | instructions of warps, millions | seconds |"
    return "\n".join((head, "|---|---|---|---|---|", *rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=CASES, default="every", help="every (default), orders, quick or stem")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=",".join(DTYPES))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write every figure here")
    args = parser.parse_args()
    begun = time.perf_counter()
    jobs, left = CASES[args.cases](args.dtypes)
    results = []
    with ProcessPoolExecutor(args.workers) as pool:
        for result in pool.map(run, jobs):
            results.append(result)
            print(f"{result['seconds']:6.1f} s  {result['name']}", *result["faults"], sep="\n    ", flush=True)
    faults = [fault for result in results for fault in result["faults"]] + differing(results)
    faults += [f"never executed: {name}" for name in left]
    print(table(results), *faults, sep="\n")
    print(f"Triton {triton.__version__}: {len(faults)} faults, {time.perf_counter() - begun:.0f} s")
    if args.json:
        args.json.write_text(json.dumps({"triton": triton.__version__, "results": results, "faults": faults}, indent=1))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
