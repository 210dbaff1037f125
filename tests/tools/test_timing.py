"""How a call is timed: the order of operations, the medians, and what the ceilings are made of."""

from __future__ import annotations

import pytest
import torch

from inception_fused.tools import timing
from inception_fused.tools.timing import CudaStopwatch, HostStopwatch, measure, measure_ceilings, stopwatch_for


class Scripted:
    """A stopwatch that runs nothing and returns given times."""

    def __init__(self, device, host=None):
        self._device, self._host = iter(device), host
        self.asked = []

    def device(self, call, calls, lead_us=0.0):
        self.asked.append((calls, lead_us))
        return [next(self._device)] * calls

    def host(self, call, calls):
        return None if self._host is None else self._host[:calls]

    def synchronize(self):
        pass


class FakeEvent:
    def __init__(self, log, enable_timing):
        assert enable_timing
        self._log = log

    def record(self):
        self._log.append("event")
        self.at = len(self._log)

    def elapsed_time(self, other):
        return float(other.at - self.at)


@pytest.fixture
def cuda_log(monkeypatch):
    """A CudaStopwatch whose CUDA calls are written down instead of made."""
    log = []
    monkeypatch.setattr(torch.cuda, "Event", lambda enable_timing=False: FakeEvent(log, enable_timing))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: log.append("synchronize"))
    stopwatch = CudaStopwatch.__new__(CudaStopwatch)
    stopwatch._device = torch.device("cuda")
    stopwatch._spin = lambda cycles: log.append(("spin", cycles))
    monkeypatch.setattr(stopwatch, "flush", lambda: log.append("flush"), raising=False)
    return stopwatch, log


def test_device_time_excludes_the_flush_and_the_host(cuda_log):
    stopwatch, log = cuda_log
    times = stopwatch.device(lambda: log.append("call"), 2, lead_us=10)
    once = ["flush", ("spin", 10 * timing.SPIN_CYCLES_PER_US), "event", "call", "event"]
    assert log == [*once, *once, "synchronize"]
    assert times == [2e3, 2e3], "milliseconds of the events become microseconds"


def test_the_spin_is_bounded(cuda_log):
    stopwatch, log = cuda_log
    stopwatch.device(lambda: None, 1, lead_us=1e9)
    assert log[1] == ("spin", int(timing.LEAD_LIMIT_US * timing.SPIN_CYCLES_PER_US))


def test_host_time_starts_with_an_empty_queue_and_does_not_wait(cuda_log):
    stopwatch, log = cuda_log
    times = stopwatch.host(lambda: log.append("call"), 2)
    assert log == ["synchronize", "call", "synchronize", "call", "synchronize"]
    assert len(times) == 2
    assert min(times) >= 0


def test_medians_spread_and_number_of_calls():
    stopwatch = Scripted([1000.0, 90.0, 110.0], host=[40.0] * 9 + [9000.0])
    result = measure(lambda: None, stopwatch, seconds=0.1, warm_up=0.0)
    assert result.us == 100.0
    assert result.spread == pytest.approx(0.2)
    assert result.host_us == 40.0
    # 0.1 s of calls of 1 ms and their lead, which is twice the host's time, in two halves.
    assert result.calls == 92
    assert stopwatch.asked == [(3, 80.0), (46, 80.0), (46, 80.0)]


def test_few_calls_of_a_slow_call_and_no_host_time_on_a_cpu():
    stopwatch = Scripted([1e6, 1e6, 1e6])
    result = measure(lambda: None, stopwatch, warm_up=0.0)
    assert (result.calls, result.host_us) == (20, None)


def test_warms_up_before_it_times():
    calls = []
    measure(lambda: calls.append(1), Scripted([1.0, 1.0, 1.0]), warm_up=0.0)
    assert len(calls) == 3


def test_a_cpu_is_timed_by_the_wall_clock():
    stopwatch = stopwatch_for("cpu")
    assert isinstance(stopwatch, HostStopwatch)
    assert measure(lambda: torch.ones(10).sum(), stopwatch, seconds=0.001, warm_up=0.0).us > 0
    with pytest.raises(ValueError, match="device: got 'meta'"):
        stopwatch_for("meta")


def test_ceilings_count_read_and_written_bytes_and_two_flop_per_multiply_add(monkeypatch):
    def two_us(call, stopwatch, seconds):
        call()
        return timing.Timing(us=2.0, spread=0.0, host_us=None, calls=1)

    monkeypatch.setattr(timing, "measure", two_us)
    found = measure_ceilings(HostStopwatch(), "cpu", copy_bytes=1 << 20, gemm_size=64)
    assert found == {
        "bandwidth": pytest.approx(2 * 2**20 / 2e-6),
        "bf16": pytest.approx(2 * 64**3 / 2e-6),
        "tf32": pytest.approx(2 * 64**3 / 2e-6),
        "launch_us": pytest.approx(2.0 / timing.SERIES),
        "empty_us": 2.0,
    }
    found = measure_ceilings(HostStopwatch(), "cpu", copy_bytes=1 << 20, gemm_size=64, tf32=False)
    assert list(found) == ["bandwidth", "bf16", "launch_us", "empty_us"]


def test_ceilings_run_on_a_cpu():
    found = measure_ceilings(HostStopwatch(), "cpu", copy_bytes=1 << 16, gemm_size=32, seconds=1e-4)
    assert all(value > 0 for value in found.values())
