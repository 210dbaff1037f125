"""A gpu_check run on the CPU for the tests: one tiny block, and a stopwatch that always shows the same."""

from __future__ import annotations

import time
from pathlib import Path

import gpu_check
from gpu.run import Matrix, Run
from inception_fused import InceptionConfig

TINY = Matrix({"5a": InceptionConfig(16, 8, (8, 16), (8, 16), 8)}, batches=(2,), dtypes=("fp32",), image_size=64)
"""One block of 2x2 pixels."""


class Fixed:
    """A stopwatch that runs nothing: 8 us on the device, 4 us on the host."""

    broken: Exception | None = None

    def device(self, call, calls, lead_us=0.0):
        return [8.0] * calls

    def host(self, call, calls):
        return [4.0] * calls

    def synchronize(self):
        if self.broken:
            raise self.broken


def make_run(out: Path) -> Run:
    """A run with 1000 s of budget, inside a stage named "test", that saves to ``out``."""
    results = {"stages": {}}
    run = Run(
        results,
        lambda: gpu_check.save(out, results),
        device="cpu",
        stopwatch=Fixed(),
        deadline=time.time() + 1000,
        out=out,
        matrix=TINY,
    )
    run.stage = results["stages"]["test"] = {"status": "running"}
    return run
