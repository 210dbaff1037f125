"""Made-up result files for the tests of the report: the suite's JSON and gpu_check's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.cases.records import Record
from benchmarks.figures.goals import NINE

GPU = "NVIDIA H200"


def record(subject="3a", implementation="ours", us=10.0, **given: Any) -> Record:
    """Block 3a, batch 128, bf16, forward, on a GPU, with a spread of 1%, unless told otherwise."""
    values = {
        "suite": "block", "image": 224, "size": 28, "batch": 128, "dtype": "bf16", "mode": "forward", "device": GPU,
        "spread": 0.01, "calls": 100,
    }  # fmt: skip
    return Record(**values | {"subject": subject, "implementation": implementation, "device_us": us} | given)


def nine(implementation: str, us: float, **given: Any) -> list[Record]:
    """A record of each of the nine blocks whose times sum up to ``us``."""
    return [record(subject, implementation, us / len(NINE), **given) for subject in NINE]


def suite_file(path: Path, records: list[Record], *, gpu: str | None = GPU, day: int = 1, **machine: Any) -> Path:
    """What the benchmark suite writes; ``day`` of a month, for which file is newer."""
    facts = {
        "gpu": gpu, "torch": "2.11.0", "cuda": "13.0", "triton": "3.6.0", "driver": "580.1", "cpu": "a CPU", "cores": 2,
        "commit": "0123456789abcdef", "dirty": False, "kernel_sources": "old", "date": f"2026-01-{day:02}",
    }  # fmt: skip
    data = {
        "machine_info": facts | machine,
        "commit_info": {},
        "datetime": f"2026-01-{day:02}T10:00:00.000000+00:00",
        "benchmarks": [{"name": "test_host", "extra_info": {"suite": "host"}}]
        + [{"name": "test_block", "extra_info": r.extra_info()} for r in records],
    }
    path.write_text(json.dumps(data))
    return path


def row(block="3a", implementation="ours", us=10.0, **given: Any) -> dict[str, Any]:
    """A row of gpu_check's stages baselines, blocks and compile."""
    values = {"batch": 128, "dtype": "bf16", "mode": "forward", "host_us": 4.0, "spread": 0.01, "calls": 100}
    return values | {"block": block, "implementation": implementation, "us": us} | given


def launch(kernel="K1", us=10.0, floor_us=5.0, **given: Any) -> dict[str, Any]:
    """A row of gpu_check's stage kernels."""
    values = {"block": "3a", "batch": 128, "dtype": "bf16", "mode": "forward", "pass": "forward", "host_us": 4.0}
    figures = {"us": us, "floor_us": floor_us, "x_floor": us / floor_us, "spread": 0.01, "calls": 100}
    return values | {"kernel": kernel} | figures | given


def gpu_check_file(path: Path, *, day: int = 1, gpu: str | None = GPU, **stages: list[dict[str, Any]]) -> Path:
    """What gpu_check writes; stages: rows by name."""
    figures = {"gpu": gpu, "torch": "2.11.0", "nvidia_smi": "driver_version, x\n580.2, 1", "commit": "fedcba9876543210"}
    data = {
        "schema": 1,
        "started": f"2026-01-{day:02}T11:00:00Z",
        "stages": {
            "environment": {"status": "ok", "figures": figures},
            **{name: {"status": "ok", "rows": rows} for name, rows in stages.items()},
        },
    }
    path.write_text(json.dumps(data))
    return path
