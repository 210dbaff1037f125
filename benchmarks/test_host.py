"""What a block costs the host: Python's microseconds per call with every launch stubbed out, on any machine.

Here pytest-benchmark's own column is the result. A network is bound by the host where this is more than its kernels
take: 4 to 116 us a block at batch 128, less at smaller ones. See stub_device.py for what is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks.cases.baselines import LAYOUTS
from benchmarks.cases.networks import BatchNormInception, CifarInception
from benchmarks.cases.stub_device import stub_device
from inception_fused import GOOGLENET_BLOCKS, FusedInception, Inception, convert_
from inception_fused.runtime import replay

BLOCK, SIDE = "3a", 7
"""A small image, since only the host is timed and memory for the outputs comes from the CPU's allocator."""


@pytest.fixture
def launcher() -> Iterator[type]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with stub_device() as stub:
        yield stub
    torch.set_num_threads(threads)


@pytest.mark.parametrize("way", ["remembered", "planned"])
@pytest.mark.parametrize("mode", ["forward", "training"])
def test_host(benchmark, launcher, mode, way):
    """remembered: from the third call of a kind on, which is the usual case; planned: a kind of tensors never seen."""
    module = FusedInception(*GOOGLENET_BLOCKS[BLOCK])
    launches = {"forward": 4, "training": 15}[mode]
    timed(benchmark, launcher, module, "FusedInception", "channels_last", mode, way, launches)


CONVERTED = {
    "d2l's, converted": (Inception, {"channels_last": 4, "KCRS": 5}),
    "torchvision's, converted": (BatchNormInception, {"channels_last": 5, "KCRS": 5}),
    "pytorch-cifar's, converted": (CifarInception, {"channels_last": 6, "KCRS": 6}),
}
"""Somebody's block, and its launches by the layout of its weights: pack rewrites KCRS ones, and folds BatchNorm."""


@pytest.mark.parametrize("weights", ["channels_last", "KCRS"])
@pytest.mark.parametrize("kind", CONVERTED)
def test_host_converted(benchmark, launcher, kind, weights):
    """In eval mode without gradients, remembered."""
    block, launches = CONVERTED[kind]
    module = convert_(block(*GOOGLENET_BLOCKS[BLOCK]).eval(), strict=True)
    timed(benchmark, launcher, module, kind, weights, "forward", "remembered", launches[weights])


def timed(
    benchmark: Any, launcher: type, module: nn.Module, block: str, weights: str, mode: str, way: str, launches: int
) -> None:
    """Times a block of bf16 weights in one of baselines.LAYOUTS and asserts how many launches its call is."""
    module = module.to(torch.bfloat16, memory_format=LAYOUTS[weights])
    x = torch.randn(1, GOOGLENET_BLOCKS[BLOCK].in_channels, SIDE, SIDE, dtype=torch.bfloat16)
    x = x.to(memory_format=torch.channels_last).requires_grad_(mode == "training")
    leaves, dy = (x, *module.parameters()), torch.ones_like(module(x))

    def call() -> None:
        launcher.calls.clear()
        if way == "planned":
            replay.forget()
        if mode == "forward":
            with torch.no_grad():
                module(x)
        else:
            torch.autograd.grad(module(x), leaves, dy)

    for _ in range(3):
        call()
    benchmark.group = f"host: microseconds of Python for one block, {mode}"
    benchmark.extra_info.update(
        suite="host", subject=BLOCK, block=block, weights=weights, mode=mode, implementation=f"ours, {way}",
        launches=len(launcher.calls),
    )  # fmt: skip
    benchmark.pedantic(call, rounds=300, warmup_rounds=20)
    assert len(launcher.calls) == launches
    benchmark.extra_info["host_us"] = benchmark.stats.stats.median * 1e6
