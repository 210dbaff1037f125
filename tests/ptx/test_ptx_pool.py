"""The max-pools of K2 and of B4, executed from their PTX, are PyTorch's to the last case; see pool_gate.py."""

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
    """bf16 on sm_90: three tiles of K2, with taps and without, B4's, on seven kinds of values; and largest_where."""
    assert pooled["faults"] == []
    assert len(pooled["launches"]) == 1 + 7 * (3 + 3 + 1)


@full
def test_pools_are_pytorchs_in_every_dtype(pooled_everywhere):
    assert pooled_everywhere["faults"] == []
    assert len(pooled_everywhere["launches"]) == 6 * (1 + 7 * 7)
