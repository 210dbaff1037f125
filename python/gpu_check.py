"""Check that this machine's GPU can be trusted with the kernels, and measure them: one command, one budget.

    python python/gpu_check.py [--budget SECONDS] [--stages a,b] [--out DIR] [--dry-run] [--list]

Stages (gpu/stages.py) run in a worker process. A stage that fails is recorded and the next one runs; if a
stage takes the device or the process down with it, or hangs, the stages after it run in a fresh worker.
Results are in DIR/results.json, written after every stage, and DIR/summary.md. The card's settings are
read, never written.

Exit code: 0 if every stage ended well (also if the budget cut some points), 1 if any failed, 2 without a
GPU or on a wrong command line; --dry-run says what would be done and needs no GPU.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# The checkout's own package and helpers, whether or not another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.figures.gpu_report import summary
from checks.device import DeviceLostError
from gpu.run import FULL, Matrix, Run, no_gpu_reason
from gpu.stages import STAGES, Stage
from inception_fused.runtime import files
from inception_fused.tools.timing import HostStopwatch, stopwatch_for

DEVICE_LOST = 3
"""A worker's exit code after DeviceLostError."""

GRACE_S = 30.0
"""What a worker may run over the budget: its last point, compiling included, and its way out."""

PATIENCE_S = 120.0
"""Longest silence of a worker in a stage that names no other: one point, all its compiling included."""

POLL_S = 0.5

CUT = {"status": "cut", "error": "nothing of the budget was left"}

Results = dict[str, Any]


def load(out: Path) -> Results:
    return json.loads((out / "results.json").read_text())


def save(out: Path, results: Results) -> None:
    files.write(out / "results.json", json.dumps(results, indent=1).encode())


def run_stages(run: Run, stages: Sequence[Stage]) -> None:
    """Runs the stages one after another, records how each ended in ``run.results`` and saves after each.

    Raises only DeviceLostError, after having recorded it.
    """
    for stage in stages:
        run.stage = run.results["stages"][stage.name] = {"status": "running"}
        start = time.time()
        if stage.needs_gpu and run.remaining() < 1:
            run.stage |= CUT
            run.save()
            continue
        run.save()
        print(f"{stage.name}: {stage.what} ({run.remaining():.0f} s left)", flush=True)
        try:
            stage.run(run)
            run.stage["status"] = "cut" if run.stage.get("cut") else "ok"
        except Exception as error:
            run.stage |= {"status": "failed", "error": traceback.format_exc()}
            print(f"  FAILED: {type(error).__name__}: {error}", flush=True)
            if isinstance(error, DeviceLostError):
                raise
        finally:
            run.stage["seconds"] = round(time.time() - start, 2)
            run.save()


def worker(names: Sequence[str], out: Path, deadline: float) -> int:
    """The process that touches the device. Returns its exit code."""
    results = load(out)
    stopwatch = stopwatch_for("cuda")
    run = Run(results, lambda: save(out, results), device="cuda", stopwatch=stopwatch, deadline=deadline, out=out)
    try:
        run_stages(run, [stage for stage in STAGES if stage.name in names])
    except DeviceLostError:
        # At once: what would be torn down in an orderly exit is on a device that no longer answers.
        sys.stdout.flush()
        os._exit(DEVICE_LOST)
    return 0


def supervise(
    names: Sequence[str],
    out: Path,
    deadline: float,
    command: Callable[[Sequence[str]], list[str]],
    patience: Callable[[str], float],
) -> None:
    """Runs workers until every stage in ``names`` has an entry in the JSON.

    command: the command line of a worker for the stages that are left. patience: seconds without a write to
    the JSON after which a stage counts as hanging. A stage during which its worker died or had to be killed
    is recorded as failed, with the reason; stages that found no budget left as cut.
    """
    left = list(names)
    while left:
        reason = _watch(subprocess.Popen(command(left), start_new_session=True), out, deadline, patience)
        results = load(out)
        entries = results["stages"]
        hit = [name for name in left if entries.get(name, {}).get("status") == "running"]
        if not hit and left[0] not in entries:
            hit = left[:1]
        for name in hit:
            entries.setdefault(name, {}).update(status="failed", error=reason)
        left = [name for name in left if name not in entries]
        if time.time() > deadline:
            entries.update({name: dict(CUT) for name in left})
            left = []
        save(out, results)


def _watch(process: subprocess.Popen, out: Path, deadline: float, patience: Callable[[str], float]) -> str:
    """Waits for a worker, killing it when it hangs or overruns; returns how it ended."""
    started = time.time()
    try:
        while process.poll() is None:
            time.sleep(POLL_S)
            now = time.time()
            running = [name for name, e in load(out)["stages"].items() if e["status"] == "running"]
            limit = patience(running[0] if running else "")
            if now > deadline + GRACE_S:
                return f"killed: still running {GRACE_S:.0f} s after the end of the budget"
            if now - max(started, (out / "results.json").stat().st_mtime) > limit:
                return f"killed: no sign of life for {limit:.0f} s (a kernel that hangs?)"
        return f"the worker process ended with exit code {process.returncode} before the stage did"
    finally:
        end(process)


def end(process: subprocess.Popen) -> None:
    """Ends a worker and everything it started: politely first, so that it can end the tests it runs."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=5)
    # A group outlives its leader while compilers or tests that hold the device are in it.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def dry_run(stages: Sequence[Stage], out: Path, results: Results, budget: float, matrix: Matrix = FULL) -> None:
    """Prints what each stage would do, then runs those that need no GPU."""
    total = sum(stage.cost(matrix) for stage in stages)
    print(f"would run, about {total:.0f} s in all on a data-centre card, cut at {budget:.0f} s:")
    for stage in stages:
        points = stage.points(matrix) if stage.points else []
        print(f"  {stage.name}: {stage.what}; about {stage.cost(matrix):.0f} s", flush=True)
        if points:
            modes = ", ".join(dict.fromkeys(point.mode for point in points))
            print(f"    {len(points)} points ({modes}): {points[0]} ... {points[-1]}")
    run = Run(
        results,
        lambda: save(out, results),
        device="cpu",
        stopwatch=HostStopwatch(),
        deadline=time.time() + budget,
        out=out,
        matrix=matrix,
    )
    run_stages(run, [stage for stage in stages if not stage.needs_gpu])


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds for everything (default 540)")
    parser.add_argument("--stages", help="comma-separated names; default all, in their own order")
    parser.add_argument("--out", type=Path, default=Path("gpu_check"), help="folder for the results")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done; needs no GPU")
    parser.add_argument("--list", action="store_true", help="list the stages")
    parser.add_argument("--worker-deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    known = [stage.name for stage in STAGES]
    wanted = options.stages.split(",") if options.stages else known
    wrong = [name for name in wanted if name not in known]
    if wrong:
        parser.error(f"--stages: got {', '.join(map(repr, wrong))}, wants some of {', '.join(known)}")
    if options.budget <= 0:
        parser.error(f"--budget: got {options.budget:g}, wants a positive number of seconds")
    options.names = [name for name in known if name in wanted]
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = parse(arguments)
    stages = [stage for stage in STAGES if stage.name in options.names]
    if options.list:
        print("\n".join(f"{stage.name:12} {stage.what}" for stage in stages))
        return 0
    out = options.out.resolve()
    if options.worker_deadline is not None:
        return worker(options.names, out, options.worker_deadline)
    out.mkdir(parents=True, exist_ok=True)
    start = time.time()
    results: Results = {
        "schema": 1,
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(start)),
        "budget_seconds": options.budget,
        "stages": {},
    }
    save(out, results)
    reason = no_gpu_reason()
    if options.dry_run or reason:
        print(f"no GPU: {reason}" if reason else "a GPU is there; dry run", flush=True)
        dry_run(stages, out, results, options.budget)
    else:
        deadline = start + options.budget

        def command(names: Sequence[str]) -> list[str]:
            own = [sys.executable, str(Path(__file__).resolve()), "--stages", ",".join(names)]
            return [*own, "--out", str(out), "--worker-deadline", repr(deadline)]

        own_patience = {stage.name: stage.patience for stage in STAGES if stage.patience}
        supervise(options.names, out, deadline, command, lambda name: own_patience.get(name, PATIENCE_S))
        results = load(out)
    results["seconds"] = round(time.time() - start, 2)
    save(out, results)
    files.write(out / "summary.md", summary(results).encode())
    print("\n" + summary(results, compact=True) + f"\nresults in {out}")
    if reason and not options.dry_run:
        print(f"nothing was measured: {reason}", file=sys.stderr)
        return 2
    return int(any(stage["status"] == "failed" for stage in results["stages"].values()))


if __name__ == "__main__":
    # As an exception, so that whoever is stopped from outside still ends the processes it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
