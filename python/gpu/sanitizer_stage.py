"""The stage that runs sanitizer_cases.py under NVIDIA's compute-sanitizer, and the verdict on what the tool says.

A pass needs three things that are independent of each other: the tool's own summary of nothing found, the program's
last line (a tool that cannot run a program has been seen to report no errors), and an error reported where
one was made on purpose.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gpu.run import Row, Run, StageError, run_command
from inception_fused.plan.kernel_table import KERNELS
from inception_fused.plan.pairs import PAIRS

PROGRAM = Path(__file__).with_name("sanitizer_cases.py")

SHARE = 0.5
"""Most of the remaining budget that the stage may take."""

LEAST_S = 5.0
"""A run that has less than this is not begun."""

ERROR_EXIT_CODE = 86
"""The tool's exit code where it found something: none that Python or a signal gives."""

FIRST_LINES = 12
"""Lines of the tool that a row repeats."""

ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
"""Every tensor an allocation of its own: in the caching allocator's blocks an overrun meets its neighbour."""

OPTIONS = (
    # Importing torch takes longer than the tool's own 10 s on a cold disk; the run has a limit of its own.
    ("--launch-timeout", "0"),
    # Triton starts compilers; they are not what is watched.
    ("--target-processes", "application-only"),
    # An error ends its launch and not the process, so that one run lists them all.
    ("--destroy-on-device-error", "kernel"),
)

MEMCHECK_OPTIONS = (
    # Libraries ask the driver for functions that it may lack, and handle the answer; ours raise theirs.
    ("--report-api-errors", "no"),
    # Allocations may lie side by side, and a write from one into the next would count as valid.
    ("--padding", "1024"),
)

NATIVE_KERNELS = tuple(kernel.function for kernel in KERNELS if kernel.native is not None)
TRITON_KERNELS = tuple(dict.fromkeys(kernel.function for kernel in (*KERNELS, *PAIRS)))

UNSUPPORTED = re.compile(r"device not supported", re.IGNORECASE)


@dataclass(frozen=True)
class Check:
    """One run. name: of row and log. tool: of compute-sanitizer, None without it. kernels: parts of the names of the
    kernels that are watched. faulty: the program errs on purpose. optional: no failure if the time does not suffice.
    """

    name: str
    tool: str | None
    arguments: tuple[str, ...] = ()
    kernels: tuple[str, ...] = NATIVE_KERNELS
    faulty: bool = False
    optional: bool = False


CHECKS = (
    Check("alone", None),
    Check("self-check", "memcheck", ("--overrun",), faulty=True),
    Check("memcheck", "memcheck"),
    Check("racecheck", "racecheck"),
    Check("synccheck", "synccheck"),
    Check("memcheck-triton", "memcheck", ("--kernels", "triton"), TRITON_KERNELS, optional=True),
)


def find_tool() -> str | None:
    """compute-sanitizer on PATH, in a CUDA toolkit or in NVIDIA's wheel; None where there is none."""
    wheel = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "compute-sanitizer"
    folders = [
        *(Path(os.environ[name]) / "bin" for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)),
        Path("/usr/local/cuda/bin"),
        wheel,
    ]
    path = os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, folders)])
    return shutil.which("compute-sanitizer", path=path)


NO_TOOL = (
    "compute-sanitizer is neither on PATH nor in $CUDA_HOME/bin or /usr/local/cuda/bin: "
    "install a CUDA toolkit, or pip install nvidia-cuda-sanitizer-api"
)


def command_of(check: Check, tool: str | None, known: str) -> list[str]:
    """The command line of a check. known: the tool's own help; options that it does not name are left out."""
    program = [sys.executable, str(PROGRAM), *check.arguments]
    if check.tool is None or tool is None:
        return program
    wanted = [*OPTIONS, *(MEMCHECK_OPTIONS if check.tool == "memcheck" else ())]
    wanted += [("--kernel-name", f"kernel_substring={name}") for name in check.kernels]
    options = [word for option in wanted if re.search(rf"{option[0]}\b", known) for word in option]
    return [tool, "--tool", check.tool, "--error-exitcode", str(ERROR_EXIT_CODE), *options, *program]


def lines_of(text: str) -> list[str]:
    """What the tool itself said, its prefix and banner and empty lines left out."""
    lines = [line.lstrip("= ").rstrip() for line in text.splitlines() if line.startswith("=========")]
    return [line for line in lines if line and line != "COMPUTE-SANITIZER"]


def count(text: str) -> int | None:
    """Errors, hazards and warnings by the tool's summaries; None where it gave none."""
    found = [int(n) for n in re.findall(r"ERROR SUMMARY: (\d+) error", text)]
    found += [int(n) for n in re.findall(r"RACECHECK SUMMARY: (\d+) hazard", text)]
    return sum(found) if found else None


def judge(check: Check, code: int | None, text: str, limit: float) -> Row:
    """The row of one run: "value", "skipped" or "error".

    code: the exit code, None if the run was killed after ``limit`` seconds. text: its output.
    """
    from gpu.sanitizer_cases import DONE

    said, errors = lines_of(text), count(text)
    refusal = next((line for line in said if UNSUPPORTED.search(line)), None)
    if refusal is not None:
        return {"skipped": f"the tool refuses the device: {refusal}"}
    row: Row = {} if errors is None else {"errors": errors}
    end = text.strip().splitlines()[-1] if text.strip() else "no output"
    if code is None:
        if check.optional and not said:
            return {"skipped": f"no result after {limit:.0f} s; raise --budget"}
        return row | failure(said, f"no result after {limit:.0f} s (it hangs, or raise --budget); last line: {end}")
    if check.faulty:
        if errors and any(line.startswith("Invalid __global__ write") for line in said):
            return row | {"value": f"sees the write that overruns on purpose: {errors} errors"}
        return row | failure(said, f"the tool sees nothing: a write beyond a tensor is not reported (exit code {code})")
    if check.tool is not None:
        if errors is None:
            return row | failure(said, f"the tool gave no summary (exit code {code}); last line: {end}")
        if errors:
            return row | failure(said, f"{errors} errors (exit code {code})")
    done = re.search(rf"^(\d+) {DONE}", text, re.MULTILINE)
    if code or not done or not int(done[1]):
        wrong = re.findall(r"^WRONG: .*", text, re.MULTILINE)[:FIRST_LINES]
        return row | failure([*said, *wrong], f"the program did not end well (exit code {code}); last line: {end}")
    return row | {"value": f"{done[1]} cases right" + ("" if check.tool is None else ", 0 errors")}


def failure(lines: Sequence[str], end: str) -> Row:
    """An error of the first lines and, last, what they amount to."""
    return {"error": "\n".join([*lines[:FIRST_LINES], end])}


def sanitizer(run: Run) -> None:
    """One row per run of :data:`CHECKS`; the whole output of each is in sanitizer-<name>.log."""
    from inception_fused.runtime import native

    reason = native.why_no_extension(torch.device(run.device))
    if reason is not None:
        run.add({"name": "native", "skipped": reason})
        raise StageError(f"nothing was checked: {reason}")
    tool, known = find_tool(), ""
    if tool is not None:
        _, known = run_command([tool, "--help"], 60.0, run.out / "sanitizer-help.log")
        version = re.search(r"^Version (\S+)", known, re.MULTILINE)
        run.stage["figures"] = {"tool": tool, "version": version and version[1]}
    end, refused = time.time() + run.remaining() * SHARE, None if tool else NO_TOOL
    for index, check in enumerate(CHECKS):
        if check.tool is not None and refused is not None:
            run.add({"name": check.name, "skipped": refused})
            continue
        left = end - time.time()
        if left < LEAST_S:
            run.stage["cut"] = len(CHECKS) - index
            print(f"  budget spent: {run.stage['cut']} of {len(CHECKS)} runs left out", flush=True)
            break
        # Twice its share of what is left: one that hangs leaves the others more than half.
        limit, start = 2 * left / (len(CHECKS) - index + 1), time.time()
        command = command_of(check, tool, known)
        code, text = run_command(command, limit, run.out / f"sanitizer-{check.name}.log", ENVIRONMENT)
        row = judge(check, code, text, limit)
        run.add({"name": check.name, "seconds": round(time.time() - start, 1), **row})
        if "skipped" in row and not check.optional:
            refused = row["skipped"]
    failed = [row["name"] for row in run.stage.get("rows", []) if "error" in row]
    if failed:
        raise StageError(f"{', '.join(failed)} failed; their rows and sanitizer-*.log hold what was found")
