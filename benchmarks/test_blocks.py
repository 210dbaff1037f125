"""Blocks against their baselines: ``pytest benchmarks/ --benchmark-only``.

On a GPU pytest-benchmark's own columns are wall time with a synchronisation per call; the result is
``device_us`` in extra_info, a median of device events, beside host_us, tflops and x_floor under ceilings
measured in this run. On a CPU a small part runs through the same code. A wrong output fails the test before
anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from baselines import Point, assert_agree, build, call_of, compiled, operands, tensor_core_settings
from roofline import Ceilings, block_work
from timing import Stopwatch, measure, measure_ceilings, stopwatch_for

from inception_fused import GOOGLENET_BLOCKS, FusedInception, Inception, backend
from inception_fused.googlenet import spatial_size

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
BLOCKS = ("3a", "4e", "5b") if GPU else ("3a", "5b")
BATCHES = (1, 128) if GPU else (1,)
DTYPES = ("bf16", "tf32") if GPU else ("fp32",)
IMPLEMENTATIONS = ("ours", "eager", "compile") if GPU else ("ours", "eager_nchw", "eager")


@pytest.fixture(scope="session")
def stopwatch() -> Stopwatch:
    return stopwatch_for(DEVICE)


@pytest.fixture(scope="session")
def ceilings(stopwatch: Stopwatch) -> Ceilings | None:
    """Measured on this card; None on a CPU, which has no floor here."""
    if not GPU:
        return None
    with tensor_core_settings():
        return Ceilings.measured(torch.cuda.get_device_name(), measure_ceilings(stopwatch, DEVICE))


@pytest.fixture(autouse=True)
def settings() -> Iterator[None]:
    with tensor_core_settings():
        yield
    if GPU:
        torch.cuda.empty_cache()


def implementation(name: str, point: Point) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The call that is timed."""
    memory_format = torch.contiguous_format if name == "eager_nchw" else torch.channels_last
    module = build(FusedInception if name == "ours" else Inception, point, DEVICE, memory_format)
    if name == "compile":
        module = compiled(module)
    return call_of(module, *operands(point, DEVICE, memory_format), point.mode)


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", ["forward", "training"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("block", BLOCKS)
def test_block(benchmark, stopwatch, ceilings, block, batch, dtype, mode, name):
    config = GOOGLENET_BLOCKS[block]
    point = Point(block, config, spatial_size(block), batch, dtype, mode)
    # On a GPU a fallback must fail, not be timed as ours.
    with backend("kernels" if GPU else "auto"):
        call = implementation(name, point)
        assert_agree(f"{name}, {point}", call(), implementation("eager", point)())

        timing = measure(call, stopwatch, seconds=0.1)
        work = block_work(config, batch, point.size, dtype, training=mode == "training")
        benchmark.group = f"{block} batch {batch} {dtype} {mode}"
        benchmark.extra_info.update(
            device=torch.cuda.get_device_name() if GPU else "cpu",
            device_us=timing.us,
            spread=timing.spread,
            host_us=timing.host_us,
            tflops=work.flop / timing.us / 1e6,
        )
        if ceilings is not None:
            benchmark.extra_info["x_floor"] = timing.us / (work.floor(ceilings, dtype) * 1e6)

        def run() -> None:
            call()
            stopwatch.synchronize()

        benchmark.pedantic(run, rounds=10, iterations=1, warmup_rounds=1)
