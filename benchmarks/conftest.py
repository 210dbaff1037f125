"""Says at the top of a benchmark run what it measures: a GPU by name, or only the CPU path."""

from __future__ import annotations

import torch


def pytest_report_header() -> str:
    if torch.cuda.is_available():
        return f"inception_fused benchmarks on {torch.cuda.get_device_name()}: see extra_info, device_us"
    return (
        "inception_fused benchmarks: no CUDA device, so this measures the CPU path, where FusedInception "
        "runs PyTorch's own operators in channels_last; it says nothing about the kernels"
    )
