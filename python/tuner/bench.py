"""What the tuner does on a device: compile tiles in threads, time them, check them. Tests put another in its place."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from concurrent.futures import TimeoutError as OverdueError
from contextlib import nullcontext
from typing import Any, Protocol

import torch

from checks.device import DeviceLostError
from inception_fused.block.views import Tile
from inception_fused.op import dispatch
from inception_fused.plan import kernel_table, tile_table
from inception_fused.tools.timing import Stopwatch, measure
from tuner.operands import Case, Workload

MAX_SPILL_BYTES = 16
"""As tests/aot/aot_gate.py: Triton puts 8 bytes on the stack in some clean kernel; a real spill is 32 bytes and
more."""


class Bench(Protocol):
    """gpu: the device's tables' key; shared_bytes: what one thread block may use; kernels: keys of RULES that
    Triton computes there when nothing else is asked for."""

    gpu: tile_table.Gpu
    shared_bytes: int
    kernels: Sequence[str]

    def compile(self, jobs: Sequence[tuple[Case, Tile]], deadline: float) -> Iterator[tuple[Tile, str | None]]:
        """Each tile with why it cannot be used, or None, as they get ready; those not ready at the deadline (on
        time.time()'s clock) are left out."""
        ...

    def time(self, case: Case, tile: Tile) -> tuple[float, float]:
        """(microseconds, spread) as tile_table.Entry has them."""
        ...

    def check(self, case: Case, tile: Tile) -> float:
        """Largest error over its bound. Raises AssertionError where it is beyond it."""
        ...

    def alive(self) -> None:
        """Raises DeviceLostError if the device no longer answers."""
        ...


class DeviceBench:
    """A CUDA device; a CPU under TRITON_INTERPRET=1, where nothing is compiled."""

    def __init__(self, device: torch.device | str, stopwatch: Stopwatch, *, seconds: float = 0.008) -> None:
        self.device, self.stopwatch, self.seconds = torch.device(device), stopwatch, seconds
        if self.device.type == "cuda":
            index = self.device.index if self.device.index is not None else torch.cuda.current_device()
            self.device = torch.device("cuda", index)
            properties = torch.cuda.get_device_properties(index)
            self.gpu = tile_table.Gpu(properties.name, (properties.major, properties.minor))
            listed = tile_table.SHARED_BYTES.get(self.gpu.capability, 99) << 10
            # Tables are judged by the list when they are read, which knows no device.
            self.shared_bytes = min(listed, getattr(properties, "shared_memory_per_block_optin", listed))
        else:
            self.gpu, self.shared_bytes = tile_table.Gpu("interpreter", (8, 0)), 99 << 10
        self.kernels = [
            rules.key
            for kernel in kernel_table.KERNELS
            for rules in kernel.sets
            if dispatch.usual(kernel.name, self.device) == "triton"
        ]
        self._open: Workload | None = None

    def compile(self, jobs: Sequence[tuple[Case, Tile]], deadline: float) -> Iterator[tuple[Tile, str | None]]:
        if self.device.type != "cuda":
            yield from ((tile, None) for _, tile in jobs)
            return
        pool = ThreadPoolExecutor(max_workers=max(1, (os.cpu_count() or 2) - 1))
        try:
            waiting = {pool.submit(self._reason, self._workload(case).launches(tile)): tile for case, tile in jobs}
            for done in as_completed(waiting, timeout=max(0.0, deadline - time.time())):
                yield waiting[done], done.result()
        except OverdueError:
            return
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def time(self, case: Case, tile: Tile) -> tuple[float, float]:
        with self._current():
            # At least 20 calls: enough for an order of tiles in which a lead has to exceed the noise.
            found = [
                measure(item.run, self.stopwatch, seconds=self.seconds, warm_up=self.seconds / 4)
                for item in self._workload(case).launches(tile)
            ]
        return sum(timing.us for timing in found) / len(found), max(timing.spread for timing in found)

    def check(self, case: Case, tile: Tile) -> float:
        with self._current(), torch.no_grad():
            return self._workload(case).check(tile)

    def alive(self) -> None:
        try:
            self.stopwatch.synchronize()
        except Exception as error:
            raise DeviceLostError(f"the device reports: {error}") from error

    def _workload(self, case: Case) -> Workload:
        """The case's operands; one case's are held at a time."""
        if self._open is None or self._open.case != case:
            self._open = None
            self._open = Workload(case, self.device)
        return self._open

    def _reason(self, launches: Sequence[Any]) -> str | None:
        """Why a tile cannot be used: one of its launches does not compile, load or fit, or spills."""
        try:
            for item in launches:
                with self._current():
                    binary = item.compile()
                    # Loads the binary, which raises where it needs more shared memory or threads than there are.
                    _ = binary.run
                # Triton divides the bytes by 4.
                spilled = 4 * binary.n_spills
                if spilled > MAX_SPILL_BYTES:
                    return f"spills {spilled} bytes"
        except Exception as error:  # whatever a compiler raises is a reason
            return f"{type(error).__name__}: {str(error)[-300:]}"
        return None

    def _current(self) -> Any:
        return torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
