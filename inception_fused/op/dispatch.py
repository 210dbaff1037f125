"""Which implementation runs each kernel: what the caller asks for (backends.py), as far as the machine allows it
(reasons.py)."""

from __future__ import annotations

import torch

from inception_fused.op import reasons
from inception_fused.op.backends import parse
from inception_fused.plan.choice import KERNELS, route
from inception_fused.runtime import native


def choices(backend: str, device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """ "native", "triton" or "eager" for each kernel. Raises KernelError where one is demanded and cannot run."""
    asked = parse(backend)
    if asked.demands_kernels:
        reason = reasons.first(device, dtype, asked.text)
        if reason is not None:
            raise reasons.refused(asked.text, reason.text)
    if len(asked.kernels) == len(KERNELS):
        return dict(asked.kernels)
    usable = asked.text == "kernels" or (device.type == "cuda" and reasons.first(device, dtype) is None)
    return {kernel: asked.kernels.get(kernel) or (usual(kernel, device) if usable else "eager") for kernel in KERNELS}


def usual(kernel: str, device: torch.device) -> str:
    """ "native" or "triton": what a kernel takes where nothing else is asked for and Triton can run."""
    if device.type != "cuda" or route(kernel, torch.cuda.get_device_capability(device)) == "triton":
        return "triton"
    return "native" if native.why_no_extension(device) is None else "triton"
