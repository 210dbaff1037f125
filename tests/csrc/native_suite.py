"""Run the problems of every compiled kernel on a simulated extension: in this process, or as a program of its own.

    python tests/csrc/native_suite.py MODULE [--kernel grouped_gemm] [--element bf16] [--timings lazy,random]
                                 [--seeds 3] [--large] [--all]

As a program it survives what a broken kernel does to it, and it can run under sanitizers. It prints what failed, the
first failure only unless --all, and exits with 1 if anything did.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import native_dgrad_problems
import native_problems
from simulator import KERNELS, TIMINGS, Simulator

PROBLEMS = dict(zip(KERNELS, (native_problems, native_dgrad_problems), strict=True))
"""The module that has each kernel's problems."""

CASES = {module.Problem: module.Case for module in PROBLEMS.values()}

Problem = native_problems.Problem | native_dgrad_problems.Problem


def wanted_problems(kernel: str | None = None, *, large: bool) -> list[Problem]:
    """The problems of one kernel, or of all."""
    modules = [module for name, module in PROBLEMS.items() if kernel in (None, name)]
    return [p for module in modules for p in module.problems() + large * module.large_problems()]


def attempt(simulator: Simulator, problem: Problem, timing: str, seed: int = 0) -> str | None:
    """What is wrong with one launch, or None."""
    print(f"{problem} | {timing}", file=sys.stderr, flush=True)  # the last word of a process that a kernel ends
    simulator.configure(timing, seed=seed)
    case = CASES[type(problem)](problem)
    simulator.allow(case.inputs())
    try:
        case.run(simulator.module)
    except RuntimeError as error:
        return str(error)
    finally:
        simulator.allow(())
    return case.check()


def failures(
    simulator: Simulator, wanted: Sequence[Problem], timings: Sequence[str], seeds: int
) -> Iterator[tuple[Problem, str, str]]:
    """(problem, timing, what is wrong) of every launch that fails. seeds: launches in random timing."""
    for timing in timings:
        for problem in wanted:
            for seed in range(seeds if timing == "random" else 1):
                wrong = attempt(simulator, problem, timing, seed)
                if wrong is not None:
                    yield problem, timing, wrong
                    break


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("module", type=Path)
    parser.add_argument("--kernel", choices=KERNELS, help="only this kernel")
    parser.add_argument("--element", help="only this element type")
    parser.add_argument("--timings", default=",".join(TIMINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="the large problems too")
    parser.add_argument("--all", action="store_true", help="do not stop at the first failure")
    options = parser.parse_args()
    wanted = wanted_problems(options.kernel, large=options.large)
    wanted = [p for p in wanted if options.element in (None, p.element)]
    found = failures(Simulator(options.module), wanted, options.timings.split(","), options.seeds)
    failed = 0
    for failed, (problem, timing, wrong) in enumerate(found, 1):  # noqa: B007 - the count outlives the loop
        print(f"{problem} | {timing} | {wrong}", flush=True)
        if not options.all:
            break
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
