"""The max-pools of K2, B4, P1 and P2, executed from their PTX, are PyTorch's to the last case; see pool_gate.py."""

import pytest

from marks import full

SCRIPT = "ptx/pool_gate.py"

BESIDE = {
    "pooled": lambda beside, folder: beside.findings(SCRIPT, folder, "--dtypes", "bf16", "--capabilities", "90"),
    "pooled_everywhere": lambda beside, folder: beside.findings(SCRIPT, folder),
}


@pytest.fixture(scope="module")
def pooled(beside) -> dict:
    return beside.result("pooled")


@pytest.fixture(scope="module")
def pooled_everywhere(beside) -> dict:
    return beside.result("pooled_everywhere")


def test_assembled_pools_are_pytorchs(pooled):
    """bf16 on sm_90, on seven kinds of values: three tiles of K2, with taps and without, and B4's; P1 with P2 and
    without, aligned and odd, in two forms, with bias and ReLU and without; and largest_where."""
    assert pooled["faults"] == []
    assert len(pooled["launches"]) == 1 + 7 * (3 + 3 + 1 + 2 * 2 * 2 * 2)


@full
def test_pools_are_pytorchs_in_every_dtype(pooled_everywhere):
    assert pooled_everywhere["faults"] == []
    assert len(pooled_everywhere["launches"]) == 6 * (1 + 7 * (7 + 16))
