"""Run the problems of native_problems.py on a simulated extension: in this process, or as a program of its own.

    python tests/native_suite.py MODULE [--element bf16] [--timings lazy,random] [--seeds 3] [--large] [--all]

As a program it survives what a broken kernel does to it, and it can run under sanitizers. It prints what failed, the
first failure only unless --all, and exits with 1 if anything did.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from native_problems import Case, Problem, large_problems, problems
from simulator import TIMINGS, Simulator


def attempt(simulator: Simulator, problem: Problem, timing: str, seed: int = 0) -> str | None:
    """What is wrong with one launch, or None."""
    print(f"{problem} | {timing}", file=sys.stderr, flush=True)  # the last word of a process that a kernel ends
    simulator.configure(timing, seed=seed)
    case = Case(problem)
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
    parser.add_argument("--element", help="only this element type")
    parser.add_argument("--timings", default=",".join(TIMINGS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--large", action="store_true", help="the large problems too")
    parser.add_argument("--all", action="store_true", help="do not stop at the first failure")
    options = parser.parse_args()
    wanted = [p for p in problems() + options.large * large_problems() if options.element in (None, p.element)]
    found = failures(Simulator(options.module), wanted, options.timings.split(","), options.seeds)
    failed = 0
    for failed, (problem, timing, wrong) in enumerate(found, 1):  # noqa: B007 - the count outlives the loop
        print(f"{problem} | {timing} | {wrong}", flush=True)
        if not options.all:
            break
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
