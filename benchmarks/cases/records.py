"""One measured case as data: what the suite writes into pytest-benchmark's JSON, and what a report reads from it.

for record in load("results.json"):
    print(record.subject, record.implementation, record.device_us)
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

TWO = "two-3x3"
"""The suite of blocks with two 3x3 in their third branch: their name in googlenet_blocks.BRANCH3."""

NORMED = "batch-norm"
"""The suite of torchvision's blocks, a training step with BatchNorm behind every convolution."""

OWN_BLOCKS = (TWO, NORMED)
"""Suites of the nine blocks in another form than GoogLeNet's."""

SUITES = ("block", "network", TWO, NORMED, "cifar", "kernelbench6", "kernelbench7", "torchvision")
"""What a record's ``suite`` can be. Other benchmarks in the same file, such as of host cost, are no records."""

OURS_BLOCKS = "ours_blocks"
"""A network with our blocks and PyTorch's own stem: what fusing the stem adds."""

EAGER = "eager"
"""The baseline of ``x_eager``: PyTorch in channels_last."""

COMPILE = ("compile", "compile_reduce_overhead", "compile_max_autotune")
"""torch.compile's three modes; the fastest that was measured is the baseline of ``x_compile``."""


@dataclass(frozen=True)
class Record:
    """One implementation at one point. Times are medians in microseconds; None where a figure was not measured.

    suite: of :data:`SUITES`. subject: the block ("3a" to "5b") or the network's name. image: side of the network's
    input; for the block of kernelbench6, which is in no network, its feature map's. size: H = W of the timed
    module's input. dtype: "bf16", "fp16", "tf32" or "fp32". mode: "forward" (without gradients) or "training"
    (forward and backward). implementation: "ours", "ours_graph", :data:`OURS_BLOCKS`, "eager", "eager_nchw",
    "eager_graph" or one of :data:`COMPILE`. device: the GPU's name, or "cpu".
    device_us: device time (on a CPU wall-clock time), over ``calls`` calls; spread: difference of the medians of
    its two halves, relative. host_us: until a call returns, None on a CPU. tflops: FLOP of the convolutions and
    the linear layer over the time. gbs: GB/s of the bytes that an ideal kernel a block (and a layer of the stem)
    would move. floor_us, x_floor: the least time under the ceilings measured in the same run, and this time over
    it; None on a CPU. peak_bytes: GPU memory beyond what was there before a call; None on a CPU and for CUDA
    graphs. launches: GPU kernels of a call, None where no profiler could tell; on a CPU the operators that compute.
    weights: their memory format, "channels_last" or "KCRS", with which launches and times go; None in older files.
    x_eager, x_compile: the time of eager channels_last, and of the best torch.compile, over this one.
    """

    suite: str
    subject: str
    image: int
    size: int
    batch: int
    dtype: str
    mode: str
    implementation: str
    device: str
    device_us: float
    spread: float
    calls: int
    host_us: float | None = None
    tflops: float | None = None
    gbs: float | None = None
    floor_us: float | None = None
    x_floor: float | None = None
    peak_bytes: int | None = None
    launches: int | None = None
    weights: str | None = None
    x_eager: float | None = None
    x_compile: float | None = None

    @property
    def point(self) -> tuple[str, str, int, int, int, str, str]:
        """What records that can be compared with each other have in common."""
        return (self.suite, self.subject, self.image, self.size, self.batch, self.dtype, self.mode)

    @property
    def on_cpu(self) -> bool:
        """Whether no kernel ran, but PyTorch's own operators on either side."""
        return self.device == "cpu"

    def extra_info(self) -> dict[str, Any]:
        """The fields by name, for pytest-benchmark's ``extra_info``."""
        return asdict(self)


FIELDS = tuple(field.name for field in fields(Record))


def of_extra_info(extra_info: Mapping[str, Any]) -> Record | None:
    """The record in a benchmark's ``extra_info``, whose further keys are ignored; None if it holds none."""
    if extra_info.get("suite") not in SUITES:
        return None
    return Record(**{name: extra_info[name] for name in FIELDS if name in extra_info})


def with_ratios(records: Iterable[Record]) -> list[Record]:
    """The same records with x_eager and x_compile, each against the baseline at its own point, or None.

    None on a CPU too: there ours runs eager's own operators, so that a ratio is noise (0.89 to 1.09).
    """
    records = list(records)
    eager = {record.point: record.device_us for record in records if record.implementation == EAGER}
    compiled: dict[tuple, float] = {}
    for record in records:
        if record.implementation in COMPILE:
            compiled[record.point] = min(record.device_us, compiled.get(record.point, record.device_us))

    def ratio(baseline: Mapping[tuple, float], record: Record) -> float | None:
        if record.on_cpu or record.point not in baseline or not record.device_us:
            return None
        return baseline[record.point] / record.device_us

    return [replace(r, x_eager=ratio(eager, r), x_compile=ratio(compiled, r)) for r in records]


def load(path: str | Path) -> list[Record]:
    """The records of a JSON that ``pytest benchmarks --benchmark-only --benchmark-json=PATH`` wrote, in its order.

    Benchmarks of other kinds are left out. Raises ValueError where the file is not pytest-benchmark's, or a record
    lacks a field.
    """
    found = []
    for benchmark in _read(path)["benchmarks"]:
        try:
            record = of_extra_info(benchmark.get("extra_info", {}))
        except TypeError as error:
            raise ValueError(f"{path}: {benchmark.get('name')}: not a record of this suite: {error}") from error
        found += [record] if record is not None else []
    return found


def load_machine(path: str | Path) -> dict[str, Any]:
    """The machine that the same JSON was measured on, as ``machine.machine()`` gives it, with the key "ceilings"
    (what timing.measure_ceilings found, or None) and "date"."""
    return _read(path)["machine_info"]


def _read(path: str | Path) -> dict[str, Any]:
    try:
        data = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON ({error}); wants a file that --benchmark-json wrote") from error
    if not isinstance(data, dict) or "benchmarks" not in data:
        raise ValueError(f"{path}: has no benchmarks; wants a file that --benchmark-json wrote")
    return data
