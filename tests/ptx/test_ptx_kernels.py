"""The kernels' PTX executed on the CPU against float64; see ptx_gate.py."""

from collections.abc import Callable
from pathlib import Path

import pytest

from beside import Beside
from inception_fused.plan.kernel_table import BLOCK_KERNELS
from inception_fused.plan.pairs import PAIRS
from marks import full


def _executed(cases: str) -> Callable[[Beside, Path], dict]:
    """The findings of ptx_gate.py."""
    script = "ptx/ptx_gate.py"
    return lambda beside, folder: beside.findings(script, folder, "--cases", cases, "--workers", beside.workers)


BESIDE = {
    "executed": _executed("quick"),
    "executed_in_all_orders": _executed("orders"),
    "executed_binaries": _executed("every"),
}


@pytest.fixture(scope="module")
def executed(beside) -> dict:
    return beside.result("executed")


@pytest.fixture(scope="module")
def executed_in_all_orders(beside) -> dict:
    return beside.result("executed_in_all_orders")


@pytest.fixture(scope="module")
def executed_binaries(beside) -> dict:
    return beside.result("executed_binaries")


ALONE, PAIRED = {kernel.function for kernel in BLOCK_KERNELS}, {pair.function for pair in PAIRS}


def kernels(found: dict, capability: int) -> set[str]:
    return {name for job in found["results"] if job["capability"] == capability for name, *_ in job["launches"]}


def test_each_kernel_computes_what_float64_says(executed):
    """Aligned channels on sm_90, odd ones on sm_80, without a race or an access out of bounds."""
    assert executed["faults"] == []
    assert kernels(executed, 80) == ALONE
    assert kernels(executed, 90) == ALONE | PAIRED


@full
def test_no_result_depends_on_the_order_of_warps(executed_in_all_orders):
    assert executed_in_all_orders["faults"] == []
    for capability in (80, 90):
        assert kernels(executed_in_all_orders, capability) == ALONE | PAIRED


@full
def test_every_binary_of_sm_90_computes_what_float64_says(executed_binaries):
    assert executed_binaries["faults"] == []
    executed = {key for job in executed_binaries["results"] for _, key, *_ in job["launches"]}
    assert len(executed) > 200
