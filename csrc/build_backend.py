"""PEP 517 and 660 build backend: setuptools, and NVIDIA's compiler wheels where a build needs them and can have them.

A fixed build requirement would cost every install 105 MB, those with an nvcc of their own and those without a compiler
included, and would fail where the index lacks the wheels. So each build is asked: is there an nvcc, could it be used,
could the code run, can pip get the wheels. Where the answer is no, the reason is kept for build_native to store.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from setuptools import build_meta
from setuptools.build_meta import (
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

import toolchain

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

WHEELS_CUDA = (13, 0)
"""The oldest release whose wheels contain nvcc itself, thus the one that runs on most drivers (R580 and newer)."""

COMPILER_WHEELS = [
    f"{name}=={toolchain.dotted(WHEELS_CUDA)}.*"
    for name in ("nvidia-cuda-nvcc", "nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl")
]
REFUSAL = Path(__file__).parents[1] / "build" / "native" / "refusal.json"
PIP_SECONDS = 120
PIP_FLAGS = ("--no-index",)
PIP_OPTIONS = ("-i", "--index-url", "--extra-index-url", "-f", "--find-links", "--cert", "--proxy", "--trusted-host")


def get_requires_for_build_wheel(config_settings: Any = None) -> list[str]:
    """setuptools' own requirements and the compiler wheels. Exits on a value of INCEPTION_FUSED_CUDA that is none."""
    return [*compiler_requirements(), *build_meta.get_requires_for_build_wheel(config_settings)]


def get_requires_for_build_editable(config_settings: Any = None) -> list[str]:
    """As :func:`get_requires_for_build_wheel`, for ``pip install -e``."""
    return [*compiler_requirements(), *build_meta.get_requires_for_build_editable(config_settings)]


def compiler_requirements() -> list[str]:
    """COMPILER_WHEELS where they are needed, would be of use and can be had; else nothing, and why is kept."""
    with contextlib.suppress(OSError):  # a folder of another user's: only the reason would be lost
        REFUSAL.unlink(missing_ok=True)
    try:
        if toolchain.requested() is False:
            return []
        toolchain.check_platform()
        toolchain.python_headers()
        host = toolchain.find_host_compiler()
    except ValueError as error:
        raise SystemExit(str(error)) from None
    except toolchain.CannotBuild:
        return []  # the build finds the same and stores it
    try:
        toolchain.find_nvcc(host)
    except toolchain.CannotBuild:
        refusal = _driver_refusal() or pip_refusal()
        if refusal is None:
            return COMPILER_WHEELS
        _keep(refusal)
    return []


def kept_refusal() -> toolchain.CannotBuild | None:
    """Why this very install asked for no compiler wheels; None where it did, or where nobody asked (no isolation)."""
    try:
        kept = json.loads(REFUSAL.read_text())
    except (OSError, ValueError):
        return None
    # Each hook runs in a process of its own; the installer that starts them all tells this install from an older one.
    return toolchain.CannotBuild(kept["reason"], kept["remedy"]) if kept["installer"] == os.getppid() else None


def pip_refusal() -> toolchain.CannotBuild | None:
    """Why pip cannot get the compiler wheels; None where it can, or where the environment has no pip to ask (uv).

    The hook runs with PYTHONPATH set to the isolated build environment, which has no pip: without it, the pip of the
    environment itself is found.
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONNOUSERSITE")}
    options, folder = _installer_options()
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--ignore-installed"]
    command += ["--only-binary=:all:", "--retries=1", "--timeout=15", "--no-input", "--disable-pip-version-check"]
    command += [*options, *COMPILER_WHEELS]
    remedy = "install a CUDA toolkit or set CUDA_HOME to one, or install where pip can get these wheels"
    try:
        done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=PIP_SECONDS)
    except subprocess.TimeoutExpired:
        return toolchain.CannotBuild(f"pip did not find NVIDIA's compiler wheels within {PIP_SECONDS} s", remedy)
    if done.returncode == 0 or "No module named pip" in done.stderr:
        return None
    if "no such option" in done.stderr:
        return toolchain.CannotBuild(
            "this pip cannot say whether it could get NVIDIA's compiler wheels (pip 22.2 and newer can)",
            "run python -m pip install --upgrade pip and install again",
        )
    errors = re.findall(r"^ERROR: (.+)$", done.stderr, re.MULTILINE) or ["pip says no more"]
    said = re.sub(r"\w+://\S+", "(address)", errors[0])
    return toolchain.CannotBuild(f"pip cannot get NVIDIA's compiler wheels ({said})", remedy)


def _driver_refusal() -> toolchain.CannotBuild | None:
    try:
        toolchain.check_driver(toolchain.driver_version(), WHEELS_CUDA, "NVIDIA's compiler wheels")
    except toolchain.CannotBuild as old:
        return old
    return None


def _keep(refusal: toolchain.CannotBuild) -> None:
    kept = {"installer": os.getppid(), "reason": refusal.reason, "remedy": refusal.remedy}
    with contextlib.suppress(OSError):
        REFUSAL.parent.mkdir(parents=True, exist_ok=True)
        REFUSAL.write_text(json.dumps(kept))


def _installer_options() -> tuple[list[str], str | None]:
    """The options about indexes that the installing pip was given, and its folder (paths in them are relative to it).

    pip hands its configuration and PIP_* variables on to hooks, its command line not; without these options the answer
    would be about another index, and an install from a folder (--no-index) would fail on a requirement it lacks.
    """
    process = Path(f"/proc/{os.getppid()}")
    try:
        words = (process / "cmdline").read_text().split("\0")
        folder = os.readlink(process / "cwd")
    except OSError:
        return [], None
    return (index_options(words), folder) if any("pip" in Path(word).name for word in words[:4]) else ([], None)


def index_options(words: Sequence[str]) -> list[str]:
    """Those words of a pip command line that say where packages are found."""
    kept: list[str] = []
    for position, word in enumerate(words):
        if word in PIP_FLAGS or (word.partition("=")[0] in PIP_OPTIONS and "=" in word):
            kept.append(word)
        elif word in PIP_OPTIONS:
            kept += words[position : position + 2]
    return kept
