"""Time one call: device microseconds by events, host microseconds to enqueue; and a card's two ceilings.

Device time is what the kernels take when the host is never late: before each call the L2 cache is flushed,
then a spinning kernel holds the device back until the host has enqueued the whole call, so that gaps
between launches measure the device and not Python. What the host needs is measured on its own, as the time
until the call returns. On a CPU the same interface times with the wall clock.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Protocol

import torch

Call = Callable[[], object]

SPIN_CYCLES_PER_US = 2500
"""Cycles of the spinning kernel per microsecond of lead: cards boost to between 1.7 and 3 GHz, and a lead
that is too long only costs waiting."""

LEAD_MARGIN = 2.0
"""Lead over the host's median time: for calls slower than the median and for clocks above 2.5 GHz."""

LEAD_LIMIT_US = 20_000.0
"""Longest spin: a call that takes longer to enqueue (or that synchronises) is timed with its gaps."""


SERIES = 20
"""Launches in a row whose time, divided, is that of one."""


@dataclass(frozen=True)
class Timing:
    """One point: medians in microseconds.

    us: device time (wall time on a CPU). spread: difference of the medians of two halves, over their mean:
    less than this between two versions is noise. host_us: until the call returns, without waiting for the
    device; None on a CPU, where it is the same thing. calls: how many were timed.
    """

    us: float
    spread: float
    host_us: float | None
    calls: int


class Stopwatch(Protocol):
    """Times single calls; :class:`CudaStopwatch` or :class:`HostStopwatch`."""

    def device(self, call: Call, calls: int, lead_us: float = 0.0) -> list[float]:
        """Microseconds of each of ``calls`` calls on the device."""
        ...

    def host(self, call: Call, calls: int) -> list[float] | None:
        """Microseconds until each call returns; None where device() already says it."""
        ...

    def synchronize(self) -> None:
        """Waits until everything enqueued has run; raises what the device reports."""
        ...


class CudaStopwatch:
    """Device events on the current stream, with a buffer of four times the L2 cache to flush it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0) or 64 << 20
        # As many floats as the cache has bytes.
        self._flush_buffer = torch.rand(cache, device=device)
        self._spin = getattr(torch.cuda, "_sleep", None)

    def device(self, call: Call, calls: int, lead_us: float = 0.0) -> list[float]:
        starts = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
        ends = [torch.cuda.Event(enable_timing=True) for _ in range(calls)]
        cycles = int(min(lead_us, LEAD_LIMIT_US) * SPIN_CYCLES_PER_US)
        for start, end in zip(starts, ends, strict=True):
            self.flush()
            if cycles and self._spin is not None:
                self._spin(cycles)
            start.record()
            call()
            end.record()
        self.synchronize()
        return [start.elapsed_time(end) * 1e3 for start, end in zip(starts, ends, strict=True)]

    def host(self, call: Call, calls: int) -> list[float]:
        times = []
        for _ in range(calls):
            # An empty queue, so that no launch waits for room in it.
            self.synchronize()
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        self.synchronize()
        return times

    def synchronize(self) -> None:
        torch.cuda.synchronize(self._device)

    def flush(self) -> None:
        """Evicts the L2 cache by reading: written lines would be written back during the timed call."""
        self._flush_buffer.sum()


class HostStopwatch:
    """Wall clock around each call, for code that runs on the CPU."""

    def device(self, call: Call, calls: int, lead_us: float = 0.0) -> list[float]:
        times = []
        for _ in range(calls):
            start = time.perf_counter()
            call()
            times.append((time.perf_counter() - start) * 1e6)
        return times

    def host(self, call: Call, calls: int) -> None:
        return None

    def synchronize(self) -> None:
        return None


def stopwatch_for(device: torch.device | str) -> Stopwatch:
    """The stopwatch of a device: events on "cuda", the wall clock on "cpu"."""
    device = torch.device(device)
    if device.type == "cuda":
        return CudaStopwatch(device)
    if device.type == "cpu":
        return HostStopwatch()
    raise ValueError(f'device: got {str(device)!r}, wants "cuda" or "cpu"')


def measure(
    call: Call, stopwatch: Stopwatch, *, seconds: float = 0.1, warm_up: float = 0.025, least: int = 10
) -> Timing:
    """Times ``call``, which takes no arguments and does the same work every time.

    Warms up for ``warm_up`` seconds and at least three calls (compilation, algorithm search and clocks),
    then times two equal halves of together about ``seconds``, the lead included: each ``least`` to 100 calls.
    """
    start, done = time.perf_counter(), 0
    while done < 3 or time.perf_counter() - start < warm_up:
        call()
        stopwatch.synchronize()
        done += 1
    host = stopwatch.host(call, 10)
    host_us = None if host is None else median(host)
    lead_us = LEAD_MARGIN * (host_us or 0.0)
    one = median(stopwatch.device(call, 3, lead_us)) + lead_us
    half = max(least, min(100, int(seconds * 1e6 / 2 / max(one, 1.0))))
    first = stopwatch.device(call, half, lead_us)
    second = stopwatch.device(call, half, lead_us)
    a, b = median(first), median(second)
    spread = 2 * abs(a - b) / (a + b) if a + b else 0.0
    return Timing(us=median(first + second), spread=spread, host_us=host_us, calls=2 * half)


def measure_ceilings(
    stopwatch: Stopwatch,
    device: torch.device | str,
    *,
    copy_bytes: int = 1 << 30,
    gemm_size: int = 8192,
    seconds: float = 0.25,
    tf32: bool = True,
) -> dict[str, float]:
    """The two ceilings of a card, on random data, and what the stopwatch itself shows.

    Returns ``bandwidth`` (bytes/s of a device copy of ``copy_bytes``, read + written), ``bf16`` and, if asked for,
    ``tf32`` (FLOP/s of a square GEMM of ``gemm_size``; the caller has switched TF32 on), ``launch_us`` (of each of
    :data:`SERIES` small kernels in a row), ``empty_us`` (two events with nothing between them; subtracted from nothing,
    but no kernel can be seen faster) and, of a GPU, its ``multiprocessors`` and
    ``capability`` (90 for sm_90).
    """
    found = {
        "bandwidth": _copy_rate(stopwatch, device, copy_bytes, seconds),
        "bf16": _gemm_rate(stopwatch, device, gemm_size, torch.bfloat16, seconds),
    }
    if tf32:
        found["tf32"] = _gemm_rate(stopwatch, device, gemm_size, torch.float32, seconds)
    found["launch_us"] = _launch_us(stopwatch, device)
    found["empty_us"] = measure(lambda: None, stopwatch, seconds=0.01).us
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["multiprocessors"] = properties.multi_processor_count
        found["capability"] = 10 * properties.major + properties.minor
    return found


def _launch_us(stopwatch: Stopwatch, device: torch.device | str) -> float:
    one = torch.zeros(1, device=device)

    def series() -> None:
        for _ in range(SERIES):
            one.add_(1)

    return measure(series, stopwatch, seconds=0.01).us / SERIES


def _copy_rate(stopwatch: Stopwatch, device: torch.device | str, size: int, seconds: float) -> float:
    source = torch.rand(size // 4, device=device)
    target = torch.empty_like(source)
    timing = measure(lambda: target.copy_(source), stopwatch, seconds=seconds)
    return 2 * source.nbytes / (timing.us * 1e-6)


def _gemm_rate(
    stopwatch: Stopwatch, device: torch.device | str, size: int, dtype: torch.dtype, seconds: float
) -> float:
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    c = torch.empty_like(a)
    timing = measure(lambda: torch.mm(a, b, out=c), stopwatch, seconds=seconds)
    return 2 * size**3 / (timing.us * 1e-6)
