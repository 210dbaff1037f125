"""The stages around the measurements: what is built, tuning, the benchmark suite, the timeline, the report."""

from __future__ import annotations

import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases.baselines import Point
from checks.device import DeviceLostError
from gpu.run import ROOT, Run, StageError, run_command
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, spatial_size
from inception_fused.plan import tuned
from inception_fused.plan.rules import PLANNED
from inception_fused.runtime import files, native, replay
from inception_fused.tools import measured
from inception_fused.tools.precompile import compile_together

RESULTS = ROOT / "benchmarks" / "results"

RESULT_FILES = ("results.json", "benchmark.json")

BUILD_DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp16": torch.float16}

TUNE_SHARE = 0.3
"""Most of the remaining budget that tuning may take."""

SUITE_SHARE = 0.6
"""Most of the remaining budget that the benchmark suite may take, before torch.compile gets what is left."""

SUITE_END_S = 20.0
"""What the suite needs beside its time limit: the case that runs then, PyTorch's import, the JSON."""

TIMELINE_POINTS = (("4d", 128, "bf16"), ("3a", 1, "bf16"))
"""A block in the middle of the network at the training batch, and one where launches are all."""


def build(run: Run) -> None:
    """The compiled extension on this card, and every Triton binary of GoogLeNet, so that no later stage compiles."""
    found: dict[str, Any] = {"extension": native.facts(), "obstacle": native.why_no_extension(torch.device(run.device))}
    run.stage["figures"] = found
    line = "built and runs here" if found["obstacle"] is None else found["obstacle"]
    print(f"  compiled extension: {line}", flush=True)
    found["binaries"] = {name: compile_network(dtype) for name, dtype in BUILD_DTYPES.items()}
    for name, figures in found["binaries"].items():
        print(f"  Triton binaries, {name}: {figures['count']} in {figures['seconds']:.1f} s", flush=True)
        run.save()
    failed = [reason for figures in found["binaries"].values() for reason in figures["failed"]]
    if failed:
        raise StageError(f"{len(failed)} binaries do not compile: {failed[0]}")
    if found["extension"]["built"] and found["obstacle"] is not None:
        raise StageError(f"the extension was built, but cannot run: {found['obstacle']}")


def compile_network(dtype: torch.dtype) -> dict[str, Any]:
    """{count, seconds, failed}: GoogLeNet's binaries for inference and training, compiled in threads."""
    from checks.launches import googlenet_launches
    from inception_fused.runtime.launch import binary_key

    capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else PLANNED
    launches = {binary_key(launch): launch for _, launch in googlenet_launches(dtype, capability=capability)}
    started = time.time()
    errors = compile_together([launch.compile for launch in launches.values()], os.cpu_count())
    failed = [f"{type(error).__name__}: {error}" for error in errors]
    return {"count": len(launches), "seconds": round(time.time() - started, 2), "failed": failed}


def tune(run: Run) -> None:
    """Tiles into the user's table for this card; the stages after it measure with them."""
    from tuner import session

    before = time.time()

    def progress(done: int, total: int, text: str) -> None:
        nonlocal before
        if time.time() - before > 10:
            before = time.time()
            print(f"  {done} of {total} problems: {text}", flush=True)
            # The sign of life that the supervising process waits for.
            run.save()

    found = session.tune(run.remaining() * TUNE_SHARE, on_progress=progress)
    run.stage["figures"] = found
    if found["cut"]:
        run.stage["cut"] = found["cut"]
    tuned.forget()
    replay.forget()
    print("  " + session.report(found).replace("\n", "\n  "), flush=True)
    if found["device_lost"]:
        raise DeviceLostError(f"while tuning: {found['ended']}")
    if found["failed"]:
        raise StageError(f"{len(found['failed'])} problems failed: {found['failed'][0]}")


def suite(run: Run) -> None:
    """pytest benchmarks, in a process of its own; its JSON and its closing table beside the results."""
    limit = run.remaining() * SUITE_SHARE - SUITE_END_S
    if limit < SUITE_END_S:
        run.stage["cut"] = 1
        print("  too little of the budget is left", flush=True)
        return
    path = run.out / "benchmark.json"
    arguments = f"-m pytest benchmarks --benchmark-only -q -p no:cacheprovider --time-limit {limit:.0f}"
    command = [sys.executable, *arguments.split(), f"--benchmark-json={path}"]
    code, text = run_command(command, limit + SUITE_END_S, run.out / "benchmark.log")
    found = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|errors?|skipped)", text[-500:])}
    run.stage["figures"] = {"exit_code": code, **found, "json": path.name if path.is_file() else None}
    print("  " + "\n  ".join(text.strip().splitlines()[-40:]), flush=True)
    if code is None:
        raise StageError(f"the suite did not end within {limit + SUITE_END_S:.0f} s; see benchmark.log")
    if code:
        raise StageError(f"the suite ended with exit code {code}: a wrong output is reported as a failed test")


def timeline(run: Run) -> None:
    """When each launch of a training step begins and ends, eager's and ours: rows for the picture."""
    from benchmarks.cases.timeline import record_timeline

    rows = []
    for block, batch, dtype in TIMELINE_POINTS:
        point = Point(block, GOOGLENET_BLOCKS[block], spatial_size(block), batch, dtype, "training")
        rows += record_timeline(point)
        run.stage["figures"] = {"timeline": rows}
        run.save()
    print(f"  {len(rows)} launches of {len(TIMELINE_POINTS)} points", flush=True)


def report(run: Run) -> None:
    """report.md and pictures from this run's files; of a GPU's run also into benchmarks/results/<gpu> and README.md."""
    from benchmarks import report as reporter
    from benchmarks.figures import readme
    from benchmarks.figures.pictures import MissingLibraryError

    inputs = [run.out / name for name in RESULT_FILES if (run.out / name).is_file()]
    code = reporter.main([*map(str, inputs), "--out", str(run.out)])
    if code:
        raise StageError(f"benchmarks/report.py ended with exit code {code}")
    gpu = run.results["stages"].get("environment", {}).get("figures", {}).get("gpu")
    if gpu:
        # Said before the copies are made, so that they hold this stage as it ends.
        run.stage["status"] = "ok"
        run.save()
        folder = publish(run.out, gpu)
        measured.write(gpu, run.results["stages"]["environment"]["figures"], time.strftime("%Y-%m-%d", time.gmtime()))
        print(f"  kept in {folder.relative_to(ROOT)}", flush=True)
        try:
            # Its figures are those of the newest file there, which a test of the suite insists on.
            print("  " + "\n  ".join(readme.update_readme(ROOT, RESULTS)), flush=True)
        except MissingLibraryError as error:
            print(f"  README.md is as it was: {error}; then python benchmarks/report.py --readme", flush=True)


def publish(out: Path, gpu: str) -> Path:
    """Copies what a report is made of, and the report, to the folder of a GPU's results; each file at once."""
    folder = RESULTS / re.sub(r"[^a-z0-9]+", "_", gpu.lower()).strip("_")
    folder.mkdir(parents=True, exist_ok=True)
    for path in sorted(out.iterdir()):
        if path.name in RESULT_FILES or path.suffix in (".md", ".png"):
            files.write(folder / path.name, path.read_bytes())
    return folder
