"""Check that this machine's GPU can be trusted with the kernels, and measure them: one command, one budget.

    python python/gpu_check.py [--budget SECONDS] [--stages a,b] [--out DIR] [--dry-run] [--list]

Stages (gpu_stages.py) run in a worker process. A stage that fails is recorded and the next one runs; if a
stage takes the device or the process down with it, or hangs, the stages after it run in a fresh worker.
Results are in DIR/results.json, written after every stage, and DIR/summary.md. The card's settings are
read, never written.

Exit code: 0 if every stage ended well (also if the budget cut some points), 1 if any failed, 2 without a
GPU or on a wrong command line; --dry-run says what would be done and needs no GPU.
"""

from __future__ import annotations

import argparse
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

ROOT = Path(__file__).resolve().parents[1]
# The checkout's own package and helpers, whether or not another version is installed.
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "python")]

import torch
from gpu_report import summary
from gpu_run import FULL, DeviceLostError, Matrix, Run
from gpu_stages import STAGES, Stage, card_state
from timing import HostStopwatch, stopwatch_for

DEVICE_LOST = 3
"""A worker's exit code after DeviceLostError."""

GRACE_S = 30.0
"""What a worker may run over the budget: its last point, compiling included, and its way out."""

Results = dict[str, Any]


def write(path: Path, text: str) -> None:
    """Replaces the file at once, so that a reader or a kill never sees half of it."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)


def load(out: Path) -> Results:
    return json.loads((out / "results.json").read_text())


def save(out: Path, results: Results) -> None:
    write(out / "results.json", json.dumps(results, indent=1))


def run_stages(run: Run, stages: Sequence[Stage]) -> None:
    """Runs the stages one after another, records how each ended in ``run.results`` and saves after each.

    Raises only DeviceLostError, after having recorded it.
    """
    for stage in stages:
        run.stage = run.results["stages"][stage.name] = {"status": "running"}
        start = time.time()
        if stage.needs_gpu and run.remaining() < 1:
            run.stage |= {"status": "cut", "error": "nothing of the budget was left"}
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
    run = Run(
        results, lambda: save(out, results), device="cuda", stopwatch=stopwatch, deadline=deadline, out=out
    )
    try:
        run_stages(run, [stage for stage in STAGES if stage.name in names])
    except DeviceLostError:
        return DEVICE_LOST
    return 0


def supervise(
    names: Sequence[str], out: Path, deadline: float, command: Callable[[Sequence[str]], list[str]]
) -> None:
    """Runs workers until every stage in ``names`` has an entry in the JSON, or the budget and GRACE_S are
    over.

    command: the command line of a worker for the stages that are left. A stage during which its worker died
    or had to be killed is recorded as failed, with the reason.
    """
    left = list(names)
    while left:
        process = subprocess.Popen(command(left), start_new_session=True)
        reason = None
        try:
            code = process.wait(timeout=max(1.0, deadline + GRACE_S - time.time()))
            if code != 0:
                reason = f"the worker process ended with exit code {code}"
        except subprocess.TimeoutExpired:
            reason = f"still running {GRACE_S:.0f} s after the end of the budget: killed"
        finally:
            # The whole group: tests and compilers may have children that hold the device.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        results = load(out)
        entries = results["stages"]
        hit = [name for name in left if entries.get(name, {}).get("status") == "running"]
        after = [name for name in left if name not in entries]
        if reason and not hit and len(after) == len(left):
            hit, after = left[:1], left[1:]
        for name in hit:
            entries.setdefault(name, {}).update(
                status="failed", error=reason or "the worker left it unfinished"
            )
        if time.time() > deadline:
            for name in after:
                entries[name] = {"status": "cut", "error": "nothing of the budget was left"}
            after = []
        save(out, results)
        left = after


def no_gpu_reason() -> str | None:
    """Why there is no GPU to check, with the remedy; None if there is one."""
    if torch.cuda.is_available():
        return None
    build = f"PyTorch {torch.__version__}"
    state = card_state()
    if torch.version.cuda is None:
        reason = (
            f"{build} is a build without CUDA: install a CUDA build of PyTorch (pytorch.org/get-started)"
        )
        return reason if state else reason + "; no NVIDIA driver answers nvidia-smi either"
    if state is None:
        return f"no NVIDIA driver answers nvidia-smi: run this on a machine with an NVIDIA GPU ({build} is ready)"
    return (
        f"the driver answers ({state.splitlines()[-1]}), but {build} for CUDA {torch.version.cuda} sees no GPU: "
        "update the driver or install a PyTorch built for its CUDA version, and look at CUDA_VISIBLE_DEVICES"
    )


def dry_run(
    stages: Sequence[Stage], out: Path, results: Results, budget: float, matrix: Matrix = FULL
) -> None:
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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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

        supervise(options.names, out, deadline, command)
        results = load(out)
    results["seconds"] = round(time.time() - start, 2)
    save(out, results)
    write(out / "summary.md", summary(results))
    print("\n" + summary(results, compact=True) + f"\nresults in {out}")
    if any(stage["status"] == "failed" for stage in results["stages"].values()):
        return 1
    if reason and not options.dry_run:
        print(f"nothing was measured: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
