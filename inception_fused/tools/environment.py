"""What this machine has and what the block does on it: versions, GPUs, driver, each kernel's backend and why."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from inception_fused.op import backends, dispatch, reasons
from inception_fused.plan import choice, kernel_table, tuned
from inception_fused.plan.choice import KERNELS
from inception_fused.runtime import caches, native, triton_versions
from inception_fused.tools import measured

PACKAGES = ("inception_fused", "torch", "triton", "numpy")
ROLES = {kernel.name: kernel.does for kernel in reversed(kernel_table.KERNELS)}
"""What each kernel does; of the two that pack, the forward's words."""


def info() -> dict[str, Any]:
    """The machine as data, ready for JSON.

    Keys: versions (package -> version or None), ptxas (version and path of the one that Triton would use for the first
    GPU, or why there is none; None without Triton), pair (whether the wheels of this torch ask for this Triton), caches
    (where Triton's binaries are: caches.facts()), python, platform, cuda (of torch, or None), driver (CUDA version that
    the NVIDIA driver supports, or None), gpus (list of name, capability, memory_gib, obstacle), backend (in
    force), native (the compiled extension: native.facts()), tiles (which table of tiles is in force, or why none is),
    measured (which kernels were last measured where: measured.facts()), kernels (kernel -> {does, auto: "native",
    "triton" or "eager", why}), problem (a sentence with its remedy, or None).
    Without a GPU, or where torch does not see it, gpus is empty and every kernel is "eager" on its CPU path.
    """
    driver = cuda_driver()
    gpus = [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    usable = [gpu for gpu in gpus if gpu["obstacle"] is None]
    if usable:
        auto, why = "triton", f"runs on {usable[0]['name']}"
    elif gpus:
        auto, why = "eager", gpus[0]["obstacle"]
    else:
        auto, why = "eager", gpu_problem() or "no NVIDIA GPU: the block runs as eager PyTorch on the CPU"
    kernels = {name: {"does": ROLES[name], "auto": auto, "why": why} for name in ("pack", *KERNELS)}
    if usable:
        for name in choice.COMPILED:
            kernels[name] |= _compiled(name, torch.device("cuda", usable[0]["index"]))
    found = versions()
    return {
        "versions": found,
        "ptxas": triton_versions.ptxas(int(gpus[0]["capability"])) if gpus else triton_versions.ptxas(),
        "pair": triton_versions.describe_pair(found["torch"] or torch.__version__, found["triton"]),
        "caches": caches.facts(),
        "python": platform.python_version(),
        "platform": f"{sys.platform} {platform.machine()}",
        "cuda": torch.version.cuda,
        "driver": _dotted(driver),
        "gpus": gpus,
        "backend": backends.current(),
        "interpreting": reasons.interpreting(),
        "fp32_convolutions": "tf32" if reasons.tf32_allowed() else "strict fp32",
        "native": native.facts(),
        "tiles": tiles_in_force(),
        "measured": measured.facts(),
        "kernels": kernels,
        "problem": gpu_problem(),
    }


def format_info(facts: dict[str, Any]) -> str:
    """:func:`info` as text for a person."""
    versions = ", ".join(f"{name} {number or 'not installed'}" for name, number in facts["versions"].items())
    lines = [
        f"{'versions':<10} {versions}",
        f"{'pair':<10} {facts['pair']}",
        f"{'ptxas':<10} {facts['ptxas'] or 'none: Triton is not installed'}",
        f"{'python':<10} {facts['python']} on {facts['platform']}",
        f"{'cuda':<10} torch built for {facts['cuda'] or 'no CUDA'}, driver supports {facts['driver'] or 'none found'}",
    ]
    for gpu in facts["gpus"]:
        state = "kernels run" if gpu["obstacle"] is None else f"eager: {gpu['obstacle']}"
        lines.append(f"{'gpu':<10} {gpu['name']} sm_{gpu['capability']}, {gpu['memory_gib']} GiB: {state}")
    if not facts["gpus"]:
        lines.append(f"{'gpu':<10} none that torch can use")
    lines.append(f"{'backend':<10} {facts['backend']}; fp32 convolutions: {facts['fp32_convolutions']}")
    if facts["interpreting"]:
        lines.append(f"{'triton':<10} interprets kernels on the CPU (TRITON_INTERPRET=1)")
    lines.append(f"{'native':<10} {_native_line(facts['native'])}")
    lines.append(f"{'tiles':<10} {facts['tiles']}")
    lines.append(f"{'caches':<10} {_caches_line(facts['caches'])}")
    lines.append(f"{'measured':<10} {measured.describe(facts['measured'])}")
    width = max(len(kernel["does"]) for kernel in facts["kernels"].values())
    for name, kernel in facts["kernels"].items():
        lines.append(f"{name:<10} {kernel['does']:<{width}}  {kernel['auto']:<6}  {kernel['why']}")
    if facts["problem"]:
        lines.append(f"{'problem':<10} {facts['problem']}")
    return "\n".join(lines)


def tiles_in_force() -> str:
    """Which tiles Triton's kernels take on the current GPU: a tuned table's, or the plan's rules and why."""
    if not torch.cuda.is_available():
        return "rules (no GPU)"
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return tuned.describe(tuned.Gpu(properties.name, (properties.major, properties.minor)))


def versions(packages: Sequence[str] = PACKAGES) -> dict[str, str | None]:
    """The installed version of each package, None where it is not installed."""
    return {name: _version(name) for name in packages}


def gpu_problem() -> str | None:
    """Why torch sees no GPU although an NVIDIA driver answers, with the remedy; None where nothing is wrong."""
    driver = cuda_driver()
    if driver is None or torch.cuda.is_available():
        return None
    found = f"an NVIDIA driver for CUDA {_dotted(driver)} answers, but torch {torch.__version__} sees no GPU: "
    if torch.version.cuda is None:
        return found + "it is a build without CUDA; install a CUDA build of torch"
    if driver[0] < int(torch.version.cuda.split(".")[0]):
        remedy = 'pip install "torch<2.11"' if driver[0] == 12 else "a newer driver"
        return found + f"it is built for CUDA {torch.version.cuda}; the remedy is {remedy}, or a driver for that CUDA"
    return found + "CUDA_VISIBLE_DEVICES may hide it, or this process may lack access to /dev/nvidia*"


def cuda_driver() -> tuple[int, int] | None:
    """(major, minor) of the newest CUDA that the NVIDIA driver supports; None without a driver or a device of its."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1" if sys.platform != "win32" else "nvcuda.dll")
    except OSError:
        return None
    number, devices = ctypes.c_int(), ctypes.c_int()
    if cuda.cuDriverGetVersion(ctypes.byref(number)) != 0 or cuda.cuInit(0) != 0:
        return None
    if cuda.cuDeviceGetCount(ctypes.byref(devices)) != 0 or devices.value == 0:
        return None
    # The driver API encodes 13.0 as 13000.
    return number.value // 1000, number.value % 1000 // 10


def _compiled(kernel: str, device: torch.device) -> dict[str, str]:
    """Which of its two forms a kernel takes on a device where Triton runs, and why."""
    auto = dispatch.usual(kernel, device)
    routed = choice.route(kernel, torch.cuda.get_device_capability(device))
    if auto == routed:
        return {"auto": auto, "why": f"the plan's choice for {torch.cuda.get_device_name(device)}"}
    return {"auto": auto, "why": f"instead of {routed}: {native.why_no_extension(device)}"}


def _native_line(facts: dict[str, Any]) -> str:
    """The state of the compiled extension in one line."""
    if not facts["built"]:
        return f"not built: {facts['reason']}; {facts['remedy']}"
    line = "built"
    if "cuda" in facts:  # not where another Python's installation has overwritten the record
        architectures = " ".join(f"sm_{number}" for number in facts["architectures"])
        line += f" with CUDA {facts['cuda']} ({facts['compiler']} nvcc), {facts['host_compiler']}, for {architectures}"
    return line if facts["loaded"] else f"{line}, but does not load: {facts['error']}; {native.REINSTALL}"


def _caches_line(facts: dict[str, Any]) -> str:
    """Where Triton's binaries are, or what is wrong with that."""
    return facts["problem"] or (f"Triton's binaries in {facts['triton']}" if facts["triton"] else "none without Triton")


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    reason = reasons.first(torch.device("cuda", index), torch.bfloat16)
    return {
        "index": index,
        "name": properties.name,
        "capability": f"{properties.major}{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "obstacle": reason.text if reason is not None else None,
    }


def _dotted(number: tuple[int, int] | None) -> str | None:
    return None if number is None else f"{number[0]}.{number[1]}"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
