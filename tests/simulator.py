"""The compiled extension on simulated hardware: csrc's own sources, built for the host with tests/csrc/sim.

``build()`` gives an extension module with the real one's functions. Everything but the machine layer (csrc/ptx.cuh and
CUDA's runtime) is the text that nvcc compiles.
"""

from __future__ import annotations

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
CSRC, SIM = ROOT / "csrc", ROOT / "tests" / "csrc" / "sim"
KERNELS = ("grouped_gemm", "grouped_dgrad")
ELEMENTS = ("bf16", "fp16", "tf32")
TIMINGS = ("lazy", "eager", "random")
WARNINGS = ("-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
FLAGS = ("-O0", "-Wno-error")
SANITIZE = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer")


class Unit(NamedTuple):
    """One object: its source below csrc and the flags that are its own."""

    name: str
    source: str
    flags: tuple[str, ...] = ()


def unit_name(kernel: str, element: str) -> str:
    return f"{kernel}_{element}"


def units() -> list[Unit]:
    machine = ("-include", "machine.h", "-x", "c++")
    kernels = [
        Unit(unit_name(kernel, e), f"{kernel}.cu", (*machine, f"-DINCEPTION_FUSED_ELEMENT={e}"))
        for kernel in KERNELS
        for e in ELEMENTS
    ]
    return [Unit("bind", "bind.cpp"), *kernels, Unit("device", "../tests/csrc/sim/device.cpp", ("-O2",))]


def compiler() -> str:
    """The host compiler: $CXX or g++. Raises RuntimeError where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        raise RuntimeError(
            "the simulator needs a C++20 compiler: set CXX, or install g++ (Debian: apt-get install g++)"
        )
    return found


def build(folder: Path, flags: Sequence[str] = ("-O1",), *, changed: Path | None = None, base: Path | None = None,
          names: Sequence[str] = ()) -> Path:  # fmt: skip
    """Compile the extension for the simulator and return the module's path.

    changed: a changed copy of csrc, from which the units ``names`` are compiled; the other objects are those that an
    earlier build with the same flags left in the folder ``base``. Raises RuntimeError with the compiler's words.
    """
    import pybind11  # here, since a process that only runs a module may lack it

    folder.mkdir(parents=True, exist_ok=True)
    common = [compiler(), "-std=c++20", "-fPIC", "-fvisibility=hidden", *WARNINGS, *flags]
    common += [f"-I{SIM}", f"-I{pybind11.get_include()}", f"-I{sysconfig.get_path('include')}"]

    def compile_one(unit: Unit) -> Path:
        if changed is not None and unit.name not in names:
            return base / f"{unit.name}.o"
        csrc, out = changed or CSRC, folder / f"{unit.name}.o"
        source = CSRC / unit.source if unit.source.startswith("..") else csrc / unit.source
        _run([*common, f"-I{csrc}", *unit.flags, "-c", str(source), "-o", str(out)])
        return out

    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        objects = list(pool.map(compile_one, units()))
    module = folder / f"_native{sysconfig.get_config_var('EXT_SUFFIX')}"
    _run([compiler(), *flags, "-shared", *map(str, objects), "-o", str(module)])
    return module


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr}")


class Simulator:
    """A built module and its controls. folder: where it and its objects are."""

    def __init__(self, path: Path) -> None:
        self.folder = path.parent
        spec = importlib.util.spec_from_file_location("_native", path)
        self.module: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.module.SIMULATED = True
        self._controls = ctypes.CDLL(str(path))
        self._controls.sim_configure.argtypes = [ctypes.c_int, ctypes.c_ulonglong, ctypes.c_int, ctypes.c_int]
        self._controls.sim_allow.argtypes = [ctypes.c_void_p, ctypes.c_ulonglong]
        self._controls.sim_record.restype = ctypes.c_char_p
        self.configure()

    def configure(self, timing: str = "lazy", *, seed: int = 0, devices: int = 1, refusal: int = 0) -> None:
        """Timing of asynchronous work, number of devices, and the error that every call answers with (0: none)."""
        self._controls.sim_configure(TIMINGS.index(timing), seed, devices, refusal)

    def allow(self, ranges: Sequence[tuple[int, int]]) -> None:
        """Copies may read (address, bytes) of ranges and nothing else; anything, if ranges is empty."""
        self._controls.sim_allow(None, 0)
        for address, size in ranges:
            self._controls.sim_allow(address, size)

    def calls(self) -> list[tuple[str, dict[str, int]]]:
        """What has been called since the last time: [("launch", {"device": 0, "stream": ...}), ...]."""
        lines = self._controls.sim_record().decode().splitlines()
        parts = [line.split() for line in lines]
        return [(name, {k: int(v) for k, v in (f.split("=") for f in fields)}) for name, *fields in parts]

    def last_error(self) -> int:
        """The error left behind in the calling thread, 0 for none; read and cleared."""
        return self._controls.sim_last_error()

    @property
    def device(self) -> int:
        """The calling thread's current device."""
        return self._controls.sim_get_device()

    @device.setter
    def device(self, index: int) -> None:
        self._controls.sim_set_device(index)
