"""Seeded faults in copies of the package, each of which the tests must catch: what the test suite is measured with.

    python tests/seeded_faults.py [NAME ...] [--full] [--jobs N]
    python tests/seeded_faults.py --list

The faults are in fault_list.py. For each the tree is copied into a temporary folder, a piece of text is replaced, and
the tests named beside it run there until the first fails; a row of the table appears as soon as a fault is judged.
Caught is what fails a test: neither what cannot be collected, nor what makes the process die or hang. The tests that
failed must then pass in an unchanged copy. Exit code 1 if a fault is missed or the unchanged copy fails.

--full is handed to pytest. --jobs: so many faults at a time. The compiled extension has native_mutants.py.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

from fault_kinds import Fault
from fault_list import FAULTS

ROOT = Path(__file__).resolve().parents[1]

LEFT_OUT = (".*", "__pycache__", "build", "dist", "*.egg-info", "data", "runs", "shared", "venv")
"""What no test of the kernels reads: history, caches, environments, results."""

LIMIT_S = 300.0
"""A fault whose tests run longer than this hangs; most take seconds, the longest a minute."""

PASSES = "every test passes"


class Verdict(NamedTuple):
    """caught_by: the first test that failed, "" for none. how: in words, what happened otherwise."""

    fault: Fault
    caught_by: str
    how: str
    seconds: float

    @property
    def row(self) -> str:
        found = self.caught_by or f"NOT CAUGHT: {self.how}"
        return f"| {self.fault.name} | {self.fault.file} | {found} | {self.seconds:.0f} |"


class Runner:
    """Runs pytest in copies of ``root``, several at a time where several threads ask; :meth:`stop` ends them all."""

    def __init__(self, root: Path = ROOT, *, full: bool = False, limit_s: float = LIMIT_S) -> None:
        self.root, self.full, self.limit_s = root, full, limit_s
        self.running: set[subprocess.Popen[str]] = set()
        self.lock, self.stopped = threading.Lock(), False

    def judge(self, fault: Fault, limit_s: float | None = None) -> Verdict:
        """Raises ValueError where the fault's text does not occur exactly once."""
        begun = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="seeded_fault_", ignore_cleanup_errors=True) as name:
            copy = Path(name) / "tree"
            shutil.copytree(self.root, copy, ignore=shutil.ignore_patterns(*LEFT_OUT))
            if fault.file:
                (copy / fault.file).write_text(fault.apply((copy / fault.file).read_text()))
            caught_by, how = self.run_tests(copy, fault.tests, limit_s or self.limit_s)
        return Verdict(fault, caught_by, how, time.monotonic() - begun)

    def run_tests(self, copy: Path, tests: Sequence[str], limit_s: float) -> tuple[str, str]:
        """(first failed test, "") or ("", what happened) of the tests of a copy."""
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-rfE", "-p", "no:cacheprovider", *tests]
        # The copy's package for the processes that tests start, too.
        path = os.pathsep.join(filter(None, (str(copy), os.environ.get("PYTHONPATH"))))
        environment = os.environ | {"PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
        with self.lock:
            if self.stopped:
                return "", "was not run"
            # A session of its own, so that what the tests have started ends with them.
            process = subprocess.Popen(
                command + ["--full"] * self.full, cwd=copy, env=environment, text=True, start_new_session=True,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )  # fmt: skip
            self.running.add(process)
        try:
            output = process.communicate(timeout=limit_s)[0]
        except subprocess.TimeoutExpired:
            kill(process)
            process.communicate()
            return "", f"hangs for {limit_s:.0f} s"
        finally:
            with self.lock:
                self.running.discard(process)
        return read(process.returncode, output)

    def stop(self) -> None:
        """Ends what is running and starts nothing more."""
        with self.lock:
            self.stopped = True
            for process in self.running:
                kill(process)


def kill(process: subprocess.Popen[str]) -> None:
    """The process and what it has started."""
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        process.kill()


def read(code: int, output: str) -> tuple[str, str]:
    """(first failed test, "") or ("", what happened) from pytest's exit code and output."""
    # An id in the summary, before what the failure says; its parameters may hold anything.
    failed, errors = (
        re.findall(rf"^{word} (\S+?(?:\[.*?\])?)(?= - |$)", output, re.MULTILINE) for word in ("FAILED", "ERROR")
    )
    if code == 1 and failed and not errors:
        return failed[0], ""
    if code == 0:
        return "", PASSES
    if code < 0:
        return "", f"the process dies of {signal.Signals(-code).name}"
    last = ([line for line in output.splitlines() if line.strip()] or ["nothing"])[-1]
    return "", f"pytest ends with {code}, no failed test: {errors[0] if errors else last}"


def run_all(runner: Runner, faults: Sequence[Fault], jobs: int = 1) -> int:
    """Prints the table row by row and the count. Returns the exit code."""
    begun, caught_by = time.monotonic(), []
    print("| fault | file | caught by | s |\n|---|---|---|---|", flush=True)
    pool = ThreadPoolExecutor(jobs)
    try:
        for future in as_completed([pool.submit(runner.judge, fault) for fault in faults]):
            verdict = future.result()
            caught_by += filter(None, [verdict.caught_by])
            print(verdict.row, flush=True)
        # Each of these tests has run within the limit, now they run one after the other.
        control = Fault("unchanged", "", "", "", "", "", tuple(dict.fromkeys(caught_by)))
        unchanged = pool.submit(runner.judge, control, len(faults) * runner.limit_s).result() if caught_by else None
    finally:
        # After Ctrl-C too: what runs is ended, and every copy removed.
        runner.stop()
        pool.shutdown(cancel_futures=True)
    print(f"{len(caught_by)} of {len(faults)} caught, {time.monotonic() - begun:.0f} s")
    if unchanged is not None and unchanged.how != PASSES:
        print(f"the unchanged copy fails: {unchanged.caught_by or unchanged.how}", file=sys.stderr)
        return 1
    return int(len(caught_by) < len(faults))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="faults whose name contains this; all by default")
    parser.add_argument("--full", action="store_true", help="give pytest --full")
    parser.add_argument("--list", action="store_true", help="print the faults and run nothing")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="faults at a time (default: 1)")
    options = parser.parse_args()
    unknown = [name for name in options.names if not any(name in fault.name for fault in FAULTS)]
    if unknown or options.jobs < 1:
        parser.error(f"no fault's name contains {unknown[0]!r}; see --list" if unknown else "--jobs: wants at least 1")
    chosen = [f for f in FAULTS if not options.names or any(name in f.name for name in options.names)]
    if options.list:
        print("| fault | kind | file | what it breaks | tests |\n|---|---|---|---|---|")
        for f in chosen:
            print(f"| {f.name} | {f.kind} | {f.file} | {f.breaks} | {' '.join(f.tests)} |")
        return 0
    try:
        return run_all(Runner(full=options.full), chosen, options.jobs)
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
