"""Every kernel and tile of the plan compiled for sm_80, sm_90 and sm_100 without a GPU; see aot_gate.py."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from inception_fused import plan

MAX_BINARIES = 25
"""For one dtype and the whole of GoogLeNet: a first step must not compile for minutes."""

KERNEL_NAMES = {
    "K1": "grouped_gemm_kernel",
    "K2": "pool_proj_kernel",
    "K3": "conv_fprop_kernel",
    "K4": "conv_fprop_kernel",
}


@pytest.fixture(scope="module")
def gate(tmp_path_factory) -> dict:
    """The gate's findings. In a process of its own: an interpreting one cannot compile."""
    folder = tmp_path_factory.mktemp("aot")
    environment = {k: v for k, v in os.environ.items() if not k.startswith("TRITON")}
    environment |= {"TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("aot_gate.py")
    done = subprocess.run(
        [sys.executable, script, "--json", folder / "found.json"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert (folder / "found.json").exists(), done.stderr
    return json.loads((folder / "found.json").read_text())


def test_no_binary_is_refused(gate):
    refused = [f"{b['name']} sm_{b['capability']}: {'; '.join(b['faults'])}" for b in gate["binaries"] if b["faults"]]
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("kernel", plan.KERNELS)
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("capability", [80, 90, 100])
def test_every_tile_was_compiled(gate, capability, dtype, kernel):
    given = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    compiled = {
        tuple(b["tile"].values())
        for b in gate["binaries"]
        if b["capability"] == capability and b["name"].endswith(dtype) and b["kernel"] == KERNEL_NAMES[kernel]
    }
    assert {tuple(tile) for tile in plan.tiles(kernel, given)} <= compiled


def test_aligned_binaries_move_16_bytes_at_a_time(gate):
    judged = [b for b in gate["binaries"] if "odd" not in b["name"] and "4b" not in b["name"]]
    assert len(judged) > 100
    assert all(b["narrow_loads"] == b["narrow_stores"] == 0 and b["loads"] > 0 for b in judged)


@pytest.mark.parametrize("fault", ["spills", "narrow loads", "shared memory", "no matrix instruction"])
def test_the_gate_refuses_a_planted_fault(gate, fault):
    assert any(found.startswith(fault) for found in gate["planted"][fault]), gate["planted"][fault]
    assert gate["planted"]["unspoilt"] == []


def test_a_launch_compiles_the_very_binaries_that_were_judged(gate):
    """Except pack's, whose tuples of constexprs Triton hashes in another form for a launch."""
    assert {item.split()[1] for item in gate["differing"]} <= {"pack_kernel"}


def test_few_binaries(gate):
    """Counted by the hashes of Triton's own launch path, so that a specialised size would show."""
    assert set(gate["googlenet"]) == {"fp32", "fp16", "bf16"}
    assert all(0 < count <= MAX_BINARIES for count in gate["googlenet"].values()), gate["googlenet"]
