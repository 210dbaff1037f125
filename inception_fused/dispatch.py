"""Which implementation runs: the caller's wish (``backend(...)``), what the machine can do, and the reason if not.

A wish is "auto" (kernels where they can run, eager PyTorch elsewhere), "kernels" (kernels or KernelError), "eager",
or a list such as "K1=triton,K3=eager" for single kernels, the others as in "auto".
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec

import torch

from inception_fused import caches, native, triton_versions
from inception_fused.errors import InceptionInputError, KernelError
from inception_fused.failures import Failure, failure
from inception_fused.plan import IMPLEMENTATIONS, KERNELS, route
from inception_fused.probing import remembered

ENVIRONMENT_VARIABLE = "INCEPTION_FUSED_BACKEND"
WHOLE = ("auto", "kernels", "eager")
MIN_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def parse(spec: object, source: str) -> str:
    """The normal form of a wish. source names where it came from. Raises InceptionInputError."""
    wants = f'wants "auto", "kernels", "eager" or a list such as "K1=native,B3=eager" of {", ".join(KERNELS)}'
    if not isinstance(spec, str):
        raise InceptionInputError(f"{source}: got {spec!r}, {wants}")
    text = spec.replace(" ", "")
    if text in WHOLE:
        return text
    choices = {}
    for item in text.split(","):
        kernel, _, choice = item.partition("=")
        if kernel not in KERNELS or kernel in choices:
            raise InceptionInputError(f"{source}: got {spec!r}, wrong at {item!r}; {wants}")
        if choice not in IMPLEMENTATIONS[kernel]:
            known = " or ".join(IMPLEMENTATIONS[kernel])
            raise InceptionInputError(f"{source}: got {spec!r}, wrong at {item!r}: {kernel} can be {known}; {wants}")
        choices[kernel] = choice
    return ",".join(f"{kernel}={choices[kernel]}" for kernel in KERNELS if kernel in choices)


class _Wish(threading.local):
    """Not a ContextVar: torch.compile guards on an attribute of a thread-local, but cannot trace ContextVar.get."""

    spec: str | None = None


_wish = _Wish()
_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def current() -> str:
    """The wish in force: the innermost :func:`backend` of this thread, else the environment, else "auto"."""
    return _wish.spec if _wish.spec is not None else parse(_from_environment, ENVIRONMENT_VARIABLE)


@contextmanager
def backend(spec: str) -> Iterator[None]:
    """Within it every block of this thread runs as ``spec`` says; backward passes follow their forward's.

    Activation checkpointing runs a forward again during backward, under the wish in force then: hold both passes
    inside one ``backend(...)``, or set the environment variable, which every thread sees.

    Raises:
        InceptionInputError: on a spec that is none of "auto", "kernels", "eager", "K1=native,K3=eager,...".
    """
    outer, _wish.spec = _wish.spec, parse(spec, "backend")
    try:
        yield
    finally:
        _wish.spec = outer


@cache
def interpreting() -> bool:
    """Whether Triton is there and interprets kernels on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    if find_spec("triton") is None:
        return False
    try:
        from triton import knobs
    except Exception:  # a broken one; on a GPU device_obstacle says what is wrong
        return False
    return bool(knobs.runtime.interpret)


def obstacle(device: torch.device, dtype: torch.dtype, implementation: str = "triton") -> str | None:
    """Why an implementation ("triton" or "native") cannot run on (device, dtype), with the remedy; None where it can.

    Every kernel has a Triton form, so its obstacle is that of the fused path as a whole.
    """
    if device.type not in ("cpu", "cuda"):
        return f"x is on {device}; kernels run on CUDA devices"
    if device.type == "cpu" and implementation == "triton" and not interpreting():
        return "x is on the CPU; kernels run on a CUDA device, or on a CPU under TRITON_INTERPRET=1"
    interpreted = device.type == "cpu" and implementation == "triton"
    if dtype not in KERNEL_DTYPES and not (interpreted and dtype == torch.float64):
        return f"x is {dtype}; the kernels compute in float32 (as TF32), float16 and bfloat16"
    if device.type == "cuda":
        if dtype == torch.float32 and not tf32_allowed():
            return (
                "strict fp32: the kernels compute fp32 as TF32, which is switched off for convolutions; "
                'torch.backends.cudnn.conv.fp32_precision = "tf32" allows it'
            )
        if implementation == "triton":
            return device_obstacle(device.index if device.index is not None else torch.cuda.current_device())
    return native.obstacle(device) if implementation == "native" else None


@remembered
def device_obstacle(index: int) -> Failure | str | None:
    """Why Triton cannot run on CUDA device ``index``: its age, Triton's absence or version, or what the probe met.

    Called, it returns None or the reason with its remedy as a string; asked again as probing.remembered() says.
    """
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"{name} is sm_{capability[0]}{capability[1]}; the kernels need sm_80 (Ampere) or newer"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    try:
        import triton

        wrong = triton_versions.limit("wrong", triton.__version__, capability)
        if wrong is not None:
            return wrong
        caches.prepare()
        with torch.cuda.device(index):
            from inception_fused.kernels import probe

            probe.run()
    except Exception as error:  # whatever a toolchain raises is a reason
        return failure(error, "Triton cannot build or launch a kernel here")
    slow = triton_versions.limit("slow", triton.__version__, capability)
    if slow is not None:
        caches.warn_once(slow)
    return None


def tf32_allowed() -> bool:
    """PyTorch's setting for fp32 convolutions on CUDA, in the words of PyTorch 2.9 and later or the older flag.

    Reading the old flag raises once the new per-operation settings differ from each other, so the new come first.
    """
    for level in (torch.backends.cudnn.conv, torch.backends.cudnn, torch.backends):
        precision = getattr(level, "fp32_precision", "none")
        if precision != "none":
            return precision == "tf32"
    return bool(torch.backends.cudnn.allow_tf32)


def demands_kernels(wish: str) -> bool:
    """Whether a wish insists on at least one kernel of this package."""
    return wish == "kernels" or "triton" in wish or "native" in wish


def _demanded(wish: str) -> dict[str, str]:
    """The kernels that a wish names."""
    return {} if wish in WHOLE else dict(item.split("=") for item in wish.split(","))


def refusal(wish: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels that a wish insists on cannot run on (device, dtype); None where nothing speaks against it."""
    implementations = {"triton"} if wish == "kernels" else set(_demanded(wish).values()) - {"eager"}
    reasons = (obstacle(device, dtype, implementation) for implementation in sorted(implementations))
    return next((reason for reason in reasons if reason is not None), None)


def choices(wish: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """ "native", "triton" or "eager" for each kernel. Raises KernelError where one is demanded and cannot run."""
    wish = parse(wish, "backend")
    if wish == "eager":
        return dict.fromkeys(KERNELS, "eager")
    reason = refusal(wish, device, dtype)
    if reason is not None:
        raise KernelError(f'backend "{wish}" demands kernels that cannot run: {reason}')
    demanded = _demanded(wish)
    if all(kernel in demanded for kernel in KERNELS):
        return demanded
    usable = (device.type == "cuda" or wish == "kernels") and obstacle(device, dtype) is None
    return {kernel: demanded.get(kernel) or (usual(kernel, device) if usable else "eager") for kernel in KERNELS}


def usual(kernel: str, device: torch.device) -> str:
    """ "native" or "triton": what a kernel takes where nothing else is asked for and Triton can run."""
    if device.type != "cuda" or route(kernel, torch.cuda.get_device_capability(device)) == "triton":
        return "triton"
    return "native" if native.obstacle(device) is None else "triton"
