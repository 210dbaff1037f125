"""Finds what compiles the native extension (nvcc, a host compiler, Python's headers) and what the driver allows.

Nothing is installed or compiled here. Each function returns what it found or raises :class:`CannotBuild`, so that the
build backend (which compiler to ask for) and the build command (what to compile with) judge by the same rules.
"""

from __future__ import annotations

import ctypes
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

VARIABLE = "INCEPTION_FUSED_CUDA"
HOMES = ("CUDA_HOME", "CUDA_PATH")
DEFAULT_TOOLKIT = Path("/usr/local/cuda")
WHEEL_TOOLKITS = "nvidia/cu[0-9]*"
OLDEST_NVCC = (12, 0)
MACHINES = ("x86_64", "aarch64")
LAUNCHERS = ("ccache", "sccache", "distcc")
WANTED_ARCHITECTURES = ("80", "86", "89", "90", "100", "120")
"""One binary for each compute capability that the plan knows; a card of another one runs the PTX of the first."""


class CannotBuild(Exception):  # noqa: N818 (says what holds, not that something broke)
    """The extension cannot be built here. reason: what was found and is wanted; remedy: what to do."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(f"{reason}; {remedy}")
        self.reason = reason
        self.remedy = remedy


class HostCompiler(NamedTuple):
    """path: what nvcc gets as -ccbin; name: "g++ 12.2.0"."""

    path: str
    name: str


class Nvcc(NamedTuple):
    """A usable CUDA compiler. origin: "system" or "wheels"; architectures: of the wanted ones, those it knows."""

    path: str
    origin: str
    root: Path
    version: tuple[int, int]
    architectures: tuple[str, ...]
    include: Path
    library: Path


def requested(environ: Mapping[str, str] = os.environ) -> bool | None:
    """What INCEPTION_FUSED_CUDA asks for: True (build or fail), False (no build), None (build where possible).

    Raises ValueError for a value other than 0, 1 and nothing.
    """
    value = environ.get(VARIABLE, "").strip()
    if value not in ("", "0", "1"):
        raise ValueError(
            f"{VARIABLE} is {value!r}; it takes 1 (fail where the native extension cannot be built), "
            "0 (install without it) or nothing (build it where that is possible)"
        )
    return None if value == "" else value == "1"


def check_platform() -> None:
    """Raises CannotBuild anywhere but on glibc Linux, x86_64 or aarch64."""
    machine = platform.machine()
    libc = platform.libc_ver()[0] or "another libc"
    if sys.platform != "linux" or machine not in MACHINES or libc != "glibc":
        found = f"{sys.platform} {machine} ({libc})"
        raise CannotBuild(
            f"the native extension is for glibc Linux on {' or '.join(MACHINES)}, and this is {found}",
            "nothing is to be done: Triton or PyTorch computes the block",
        )


def find_host_compiler(environ: Mapping[str, str] = os.environ) -> HostCompiler:
    """$CXX (its flags and a ccache before it are dropped), else g++, else c++.

    Raises CannotBuild where there is none or it does not run.
    """
    path = environ.get("PATH")
    remedy = "install g++ (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++) or name a C++ compiler by CXX"
    try:
        words = shlex.split(environ.get("CXX", ""))
    except ValueError as error:
        raise CannotBuild(f"CXX is {environ['CXX']!r}, which is no command line ({error})", remedy) from None
    named = [word for word in words if Path(word).name not in LAUNCHERS][:1]
    found = next((file for name in named or ["g++", "c++"] if (file := shutil.which(name, path=path))), None)
    if found is None:
        where = "CXX names a compiler that is not there" if named else "no C++ compiler on PATH (g++, c++)"
        raise CannotBuild(where, remedy)
    text = _output([found, "-dumpfullversion", "-dumpversion"])
    if text is None or not text.strip():
        raise CannotBuild(f"the C++ compiler {Path(found).name} does not run", remedy)
    return HostCompiler(os.path.abspath(found), f"{Path(found).name} {text.split()[0]}")


def find_nvcc(host: HostCompiler, environ: Mapping[str, str] = os.environ, search: Sequence[str] | None = None) -> Nvcc:
    """The first usable nvcc: $CUDA_HOME, $CUDA_PATH, PATH, /usr/local/cuda, NVIDIA's wheels on search (sys.path).

    Raises CannotBuild where there is none; of several unusable ones it tells about the first.
    """
    problem = None
    for path, place, origin in _candidates(environ, sys.path if search is None else search):
        try:
            return _inspect(path, place, origin, host)
        except CannotBuild as unusable:
            problem = problem or unusable
    raise problem or CannotBuild(
        "no nvcc in $CUDA_HOME, on PATH, in /usr/local/cuda or among the installed packages",
        "install a CUDA toolkit, or set CUDA_HOME to one",
    )


def python_headers() -> list[Path]:
    """The folders of this Python's C headers. Raises CannotBuild where Python.h is missing."""
    folders = [Path(sysconfig.get_path(name)) for name in ("include", "platinclude")]
    if not any((folder / "Python.h").is_file() for folder in folders):
        version = f"{sys.version_info.major}.{sys.version_info.minor}"
        raise CannotBuild(
            f"Python {version} has no C headers (Python.h)",
            f"install them (Debian, Ubuntu: apt install python{version}-dev; Fedora: dnf install python3-devel)",
        )
    return list(dict.fromkeys(folders))


def driver_version(library: str = "libcuda.so.1") -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA that the visible NVIDIA driver supports; None without a driver."""
    try:
        query = ctypes.CDLL(library).cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    number = ctypes.c_int()
    if query(ctypes.byref(number)) != 0 or number.value == 0:
        return None
    # The driver API encodes 13.0 as 13000.
    return number.value // 1000, number.value % 1000 // 10


def check_driver(driver: tuple[int, int] | None, version: tuple[int, int], compiler: str) -> None:
    """Raises CannotBuild where a driver is visible that is older than the major version of the CUDA compiler.

    Code of a later minor version runs on an older driver of the same major version, code of a later major does not.
    """
    if driver is not None and driver[0] < version[0]:
        raise CannotBuild(
            f"the code of {compiler} (CUDA {dotted(version)}) needs a driver for CUDA {version[0]}, but "
            f"this NVIDIA driver supports CUDA {dotted(driver)}",
            f"install a newer driver, or a CUDA {driver[0]} toolkit and set CUDA_HOME to it",
        )


def dotted(version: tuple[int, int]) -> str:
    """(13, 0) as "13.0"."""
    return f"{version[0]}.{version[1]}"


def _candidates(environ: Mapping[str, str], search: Iterable[str]) -> Iterator[tuple[str, str, str]]:
    """(path, where it is in words, origin) of each nvcc."""
    folders = [(Path(environ[name]) / "bin", f"${name}", "system") for name in HOMES if environ.get(name)]
    folders += [(environ.get("PATH", ""), "PATH", "system"), (DEFAULT_TOOLKIT / "bin", "/usr/local/cuda", "system")]
    for entry in filter(None, search):
        toolkits = sorted(Path(entry).glob(WHEEL_TOOLKITS), reverse=True)
        folders += [(toolkit / "bin", "an installed package", "wheels") for toolkit in toolkits]
    for folder, place, origin in folders:
        if found := shutil.which("nvcc", path=str(folder)):
            # Through a link of its own nvcc misses its settings, which it looks for beside itself.
            for path in dict.fromkeys((os.path.abspath(found), os.path.realpath(found))):
                yield path, place, origin


def _inspect(path: str, place: str, origin: str, host: HostCompiler) -> Nvcc:
    remedy = "install a complete CUDA toolkit, or set CUDA_HOME to one"
    release = re.search(r"release (\d+)\.(\d+)", _output([path, "--version"]) or "")
    # The path may be a wrapper script, so that its folder says nothing; the dry run names the real one. Without a host
    # compiler it would stop before it does.
    plan = _output([path, "--dryrun", "-ccbin", host.path, "x.cu"]) or ""
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    if release is None or top is None:
        raise CannotBuild(f"the nvcc of {place} does not run", remedy)
    version = int(release[1]), int(release[2])
    if version < OLDEST_NVCC:
        raise CannotBuild(
            f"the nvcc of {place} is CUDA {dotted(version)}; {dotted(OLDEST_NVCC)} or newer is wanted",
            "install a newer CUDA toolkit, or set CUDA_HOME to one",
        )
    listed = re.findall(r"^sm_(\w+)$", _output([path, "--list-gpu-code"]) or "", re.MULTILINE)
    architectures = tuple(name for name in WANTED_ARCHITECTURES if name in listed)
    if not architectures:
        raise CannotBuild(f"the nvcc of {place} compiles for none of sm_{', sm_'.join(WANTED_ARCHITECTURES)}", remedy)
    root = Path(os.path.normpath(top[1].strip()))
    target = f"targets/{'sbsa' if platform.machine() == 'aarch64' else platform.machine()}-linux"
    folders = [root, root / target]
    stated = [Path(os.path.normpath(word[2:])) for word in shlex.split(" ".join(_stated(plan)))]
    include = _folder("cuda_runtime.h", [*(folder / "include" for folder in folders), *stated, Path("/usr/include")])
    # Toolkits have lib64 or targets/*/lib, NVIDIA's wheels have lib, distributions have their own folder.
    multiarch = Path("/usr/lib") / (sysconfig.get_config_var("MULTIARCH") or "")
    places = [folder / name for folder in folders for name in ("lib64", "lib")]
    library = _folder("libcudart_static.a", [*places, *stated, multiarch])
    for name, folder in (("headers (cuda_runtime.h)", include), ("runtime library (libcudart_static.a)", library)):
        if folder is None:
            raise CannotBuild(f"the nvcc of {place} comes without CUDA's {name}", remedy)
    return Nvcc(path, origin, root, version, architectures, include, library)


def _stated(plan: str) -> list[str]:
    """The -I and -L folders that nvcc names in its dry run."""
    return re.findall(r"^#\$ (?:INCLUDES|LIBRARIES)=(.*)$", plan, re.MULTILINE)


def _folder(file: str, folders: Iterable[Path]) -> Path | None:
    return next((folder for folder in folders if (folder / file).is_file()), None)


def _output(command: Sequence[str]) -> str | None:
    """stdout and stderr of a command that ends well, else None."""
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
