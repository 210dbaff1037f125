"""Result files in one form: the suite's pytest-benchmark JSON and gpu_check's results.json become cases.

A case is one problem with the records of every implementation that was timed on it in one file: ratios are never taken
across files.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.cases import records
from benchmarks.cases.records import OWN_BLOCKS, Record
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, spatial_size
from inception_fused.runtime import files

INSTALLATION = "installation.json"
"""What tests/install_cases.py wrote: no result file, though it lies among them."""

COUNTED = "counted"
"""The folder of what benchmarks/counted.py wrote, which nobody measured."""

CPU_ONLY = (
    "Measured without a GPU: `FusedInception` ran PyTorch's own operators in channels_last, as eager does, so this "
    "says nothing about the kernels, and no ratio is taken."
)

GPU_CHECK_IMAGE = 224
"""Height and width of the image behind the blocks that gpu_check measures (gpu_run.Matrix)."""

KERNEL_SUITE = "kernel"
"""The suite of gpu_check's single launches, which only a comparison of two files looks at as records."""


class ResultFileError(ValueError):
    """A result file that cannot be used; the message names it and says what to do."""


@dataclass(frozen=True)
class Case:
    """One problem. by: its records by implementation."""

    suite: str
    subject: str
    image: int
    size: int
    batch: int
    dtype: str
    mode: str
    by: Mapping[str, Record]

    def us(self, implementation: str) -> float | None:
        """Microseconds on the device; None where it was not measured."""
        record = self.by.get(implementation)
        return record and record.device_us

    def best(self, implementations: Iterable[str]) -> tuple[str | None, float | None]:
        """The fastest of them that were measured, and its microseconds."""
        found = [(self.us(name), name) for name in implementations if self.us(name) is not None]
        us, name = min(found, default=(None, None))
        return name, us

    def ratio(self, implementation: str, against: str | Sequence[str]) -> float | None:
        """How many times faster an implementation is than another, or than the fastest of several. None on a CPU, as
        records.with_ratios() has it."""
        if any(record.on_cpu for record in self.by.values()):
            return None
        mine = self.us(implementation)
        other = self.best([against] if isinstance(against, str) else against)[1]
        return other / mine if mine and other else None

    @property
    def floor_us(self) -> float | None:
        """That of the problem, whichever implementation's record carries it."""
        return next((record.floor_us for record in self.by.values() if record.floor_us), None)

    @property
    def label(self) -> str:
        """The subject, told apart from the same block in GoogLeNet's form."""
        return f"{self.subject} {self.suite}" if self.suite in OWN_BLOCKS else self.subject

    @property
    def name(self) -> str:
        image = "" if self.image == 224 else f" at {self.image}x{self.image}"
        return f"{self.subject}{image} batch {self.batch} {self.dtype} {self.mode}"


@dataclass(frozen=True)
class Measured:
    """One result file. kind: "suite" or "gpu_check"; machine: what it says of GPU and versions; results: the whole
    JSON; records: of cases and, from gpu_check, of single launches."""

    path: Path
    kind: str
    when: str
    machine: Mapping[str, Any]
    results: Mapping[str, Any]
    records: tuple[Record, ...]

    @property
    def gpu(self) -> str | None:
        """The card's name; None where there was none."""
        return self.machine.get("gpu")

    @cached_property
    def cases(self) -> tuple[Case, ...]:
        """In the file's order."""
        found: dict[tuple[Any, ...], dict[str, Record]] = {}
        for r in self.records:
            if r.suite != KERNEL_SUITE and r.device_us:
                found.setdefault(r.point, {})[r.implementation] = r
        return tuple(Case(*key, by) for key, by in found.items())

    @property
    def launches(self) -> list[dict[str, Any]]:
        """gpu_check's rows of single launches; empty where the file has none."""
        return list(self.results.get("stages", {}).get("kernels", {}).get("rows") or [])

    @property
    def host(self) -> list[dict[str, Any]]:
        """What test_host.py measured: each benchmark's extra_info with "min_us" and "median_us"."""
        found = []
        for benchmark in self.results.get("benchmarks", []):
            if benchmark.get("extra_info", {}).get("suite") == "host" and "stats" in benchmark:
                least, median = (benchmark["stats"][name] * 1e6 for name in ("min", "median"))
                found.append({**benchmark["extra_info"], "min_us": least, "median_us": median})
        return found

    @property
    def timeline(self) -> list[dict[str, Any]]:
        """The launches that timeline.record_timeline found; empty where the file has none."""
        stage = self.results.get("stages", {}).get("timeline", {})
        rows = self.results.get("timeline") or (stage.get("figures") or {}).get("timeline") or stage.get("rows") or []
        return [row for row in rows if "start_us" in row]

    @property
    def environment(self) -> str:
        """One line: card, versions, commit, date, file."""
        m = self.machine
        commit = str(m.get("commit") or "")[:12]
        words = [
            self.gpu or f"no GPU, {m.get('cpu') or 'CPU'}" + (f", {m['cores']} cores" if m.get("cores") else ""),
            *(f"{name} {m[key]}" for name, key in VERSIONS.items() if m.get(key) is not None),
            f"commit {commit}{' with changes' if m.get('dirty') else ''}" if commit else "",
            self.when[:10],
            self.path.name,
        ]
        return ", ".join(filter(None, words))

    @property
    def short(self) -> str:
        """Card, commit and day, for a picture's title."""
        commit = str(self.machine.get("commit") or "")[:12]
        return ", ".join(filter(None, (self.gpu or "no GPU", commit and f"commit {commit}", self.when[:10])))


VERSIONS = {"torch": "torch", "CUDA": "cuda", "Triton": "triton", "cuDNN": "cudnn", "driver": "driver"}


def load(path: Path) -> Measured:
    """Reads a result file of either kind. Raises ResultFileError for one that is missing, damaged or another file."""
    try:
        data = json.loads(path.read_text())
    except OSError as error:
        raise ResultFileError(f"{path}: cannot be read ({error.strerror}); name a result file or its folder") from None
    except ValueError as error:
        raise ResultFileError(f"{path}: is no JSON ({error}); measure again or remove it") from None
    try:
        if isinstance(data, dict) and isinstance(data.get("benchmarks"), list):
            return _suite(path, data)
        if isinstance(data, dict) and isinstance(data.get("stages"), dict):
            return _gpu_check(path, data)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ResultFileError(
            f"{path}: lacks what a result file holds ({type(error).__name__}: {error}); measure again or remove it"
        ) from error
    raise ResultFileError(
        f"{path}: is neither pytest-benchmark's JSON nor gpu_check's results.json; name one that is, made by "
        "`python -m pytest benchmarks --benchmark-only --benchmark-json FILE` or `python python/gpu_check.py`"
    )


def _suite(path: Path, data: Mapping[str, Any]) -> Measured:
    commit = data.get("commit_info") or {}
    machine = {"commit": commit.get("id"), "dirty": commit.get("dirty")}
    machine |= {key: value for key, value in (data.get("machine_info") or {}).items() if value is not None}
    if isinstance(machine.get("cpu"), dict):
        machine["cpu"] = machine["cpu"].get("brand_raw")
    found = tuple(records.load(path))
    devices = {record.device for record in found} - {"cpu", None}
    machine.setdefault("gpu", min(devices, default=None))
    return Measured(path, "suite", str(data.get("datetime") or ""), machine, data, found)


def _gpu_check(path: Path, data: Mapping[str, Any]) -> Measured:
    stages = data["stages"]
    machine = dict(stages.get("environment", {}).get("figures") or {})
    if machine.get("nvidia_smi"):
        machine["driver"] = machine["nvidia_smi"].splitlines()[-1].split(",")[0].strip()
    if not machine.get("gpu"):
        device = (stages.get("ceilings", {}).get("figures") or {}).get("device")
        machine["gpu"] = None if device == "cpu" else device
    found = []
    for stage in ("baselines", "blocks", "compile", "kernels", *OWN_BLOCKS):
        for row in stages.get(stage, {}).get("rows", []):
            if "us" in row:
                found.append(_record(row, machine["gpu"] or "cpu"))
    return Measured(path, "gpu_check", str(data.get("started") or ""), machine, data, tuple(found))


def _record(row: Mapping[str, Any], device: str) -> Record:
    """A row of gpu_check: a block's, or a launch's where it names a kernel."""
    kernel, graph = row.get("kernel"), row.get("mode") == "graph"
    block, _, form = row["block"].partition(" ")
    known = {field.name: row.get(field.name) for field in fields(Record)}
    return Record(
        **known
        | {
            "suite": KERNEL_SUITE if kernel else form if form in OWN_BLOCKS else "block",
            "subject": f"{row['block']} {kernel}" if kernel else block if form in OWN_BLOCKS else row["block"],
            "image": GPU_CHECK_IMAGE,
            "size": spatial_size(block, GPU_CHECK_IMAGE) if block in GOOGLENET_BLOCKS else None,
            "mode": row["pass"] if kernel else "forward" if graph else row["mode"],
            "implementation": "ours" if kernel else row["implementation"] + "_graph" * graph,
            "device": device,
            "device_us": row["us"],
        }
    )


def result_files(folder: Path) -> list[Measured]:
    """Every result file of a folder and those in it, the newest first. Raises ResultFileError for a damaged one."""
    found = [load(path) for path in sorted(folder.rglob("*.json")) if _measured(path)]
    return sorted(found, key=lambda measured: measured.when, reverse=True)


def newest(folder: Path) -> list[Measured]:
    """The newest file of each kind in a folder, of a GPU's only if there is any, all of the newest one's card."""
    found = result_files(folder)
    found = [measured for measured in found if measured.gpu] or found
    found = [measured for measured in found if measured.gpu == found[0].gpu]
    kinds = {measured.kind: measured for measured in reversed(found)}
    return sorted(kinds.values(), key=lambda measured: measured.when, reverse=True)


def write(path: Path, text: str) -> None:
    """Replaces a file of text at once, as :func:`inception_fused.runtime.files.write`."""
    files.write(path, text.encode())


def _measured(path: Path) -> bool:
    return path.name != INSTALLATION and path.parent.name != COUNTED
