"""What a figure's reader must know of the machine: versions, card, CPU, and which sources were measured."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from inception_fused.plan.sources import hash_of_kernels, native_sources

ROOT = Path(__file__).resolve().parents[2]


def machine() -> dict[str, Any]:
    """Versions, card, driver, CPU, and which sources these are; None where something is not there.

    Nothing in it names the machine or its user.
    """
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    gpu = torch.cuda.get_device_properties(0) if torch.cuda.is_available() else None
    git = ["git", "--no-optional-locks", "-C", str(ROOT)]
    changes, state = output_of([*git, "status", "--porcelain"]), card_state()
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if gpu else None,
        "triton": triton,
        "gpu": gpu and gpu.name,
        "capability": gpu and f"{gpu.major}.{gpu.minor}",
        "multiprocessors": gpu and gpu.multi_processor_count,
        "memory_bytes": gpu and gpu.total_memory,
        "driver": state and state.splitlines()[-1].split(",")[0],
        "nvidia_smi": state,
        "cpu": cpu_name(),
        "cores": core_count(),
        "commit": output_of([*git, "rev-parse", "HEAD"]),
        "dirty": None if changes is None else bool(changes),
        "kernel_sources": sources_hash(ROOT),
    }


def card_state() -> str | None:
    """Driver, clocks in MHz, power limit in W and temperature in degrees C as nvidia-smi reads them now."""
    fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
    return output_of(["nvidia-smi", f"--query-gpu={fields}", "--format=csv"])


def cpu_name() -> str | None:
    """The processor's name as Linux knows it, elsewhere as Python does."""
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine() or None


def core_count() -> int | None:
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def output_of(command: list[str]) -> str | None:
    """Standard output of a short command, stripped; None where it is missing, fails or takes over 20 s."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def sources_hash(root: Path) -> str:
    """One hash of what decides a figure: plan/sources.py's of the Triton kernels and of the compiled ones."""
    parts = (hash_of_kernels(root / "inception_fused"), native_sources(root) or "")
    return hashlib.sha256("".join(parts).encode()).hexdigest()
