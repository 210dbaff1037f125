"""The smallest launch there is: finds out whether Triton can compile, build its launcher and run on this device."""

import torch
import triton
import triton.language as tl

from inception_fused.runtime.launch import OPTIONS


@triton.jit
def probe_kernel(out_ptr):
    tl.store(out_ptr, 1)


def run() -> None:
    """Launch on the current CUDA device and wait. Raises whatever the toolchain raises, each time anew."""
    out = torch.zeros(1, dtype=torch.int32, device="cuda")
    try:
        probe_kernel[(1,)](out, **OPTIONS)
    except Exception:
        # Triton keeps a kernel whose binary could not be loaded and would launch it, without a function, next time.
        probe_kernel.device_caches.clear()
        raise
    if out.item() != 1:
        raise RuntimeError("a probe kernel ran and did not write its result")
