"""The max-pools of K2 and of B4, executed from their PTX, are PyTorch's to the last case; see pool_gate.py."""

import json
from pathlib import Path

import pytest

from beside import Beside
from marks import full


def _pooled(beside: Beside, folder: Path, *arguments: str) -> dict:
    findings = folder / "found.json"
    done = beside.attempt("ptx/pool_gate.py", "--json", findings, *arguments, TRITON_CACHE_DIR=str(folder / "cache"))
    assert findings.exists(), f"exit code {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
    return json.loads(findings.read_text())


BESIDE = {
    "pooled": lambda beside, folder: _pooled(beside, folder, "--dtypes", "bf16", "--capabilities", "90"),
    "pooled_everywhere": lambda beside, folder: _pooled(beside, folder),
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
