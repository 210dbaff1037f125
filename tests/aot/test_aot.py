"""Every kernel and tile of the plan compiled without a GPU; see aot_gate.py."""

from pathlib import Path

import pytest
import torch

from aot_loops import EXEMPTIONS, MOST_EXEMPTIONS, SERIALIZED, WAITS
from beside import Beside
from inception_fused.plan import choice, counts
from inception_fused.plan.kernel_table import KERNELS
from inception_fused.plan.rules import (
    MAX_BINARIES,
    MAX_NORMED_BINARIES,
    MAX_POOL_BINARIES,
    MIN_SHARED_BYTES,
    is_asynchronous,
)
from marks import more

KERNEL_NAMES = {rules.key: kernel.function for kernel in KERNELS for rules in kernel.sets}


def _gate(beside: Beside, folder: Path) -> dict:
    chosen = [] if beside.full else ["--cases", "quick", "--dtypes", "fp32,bf16"]
    return beside.findings("aot/aot_gate.py", folder, "--workers", beside.workers, "--launched", *chosen)


BESIDE = {"gate": _gate}


@pytest.fixture(scope="module")
def gate(beside) -> dict:
    """The gate's findings."""
    return beside.result("gate")


def test_no_binary_is_refused(gate):
    refused = [f"{b['name']} sm_{b['capability']}: {'; '.join(b['faults'])}" for b in gate["binaries"] if b["faults"]]
    assert not refused, "\n".join(refused)


@pytest.mark.parametrize("dtype", ["fp32", more("fp16"), "bf16"])
@pytest.mark.parametrize("capability", [80, more(90), more(100)])
def test_every_tile_was_compiled(gate, capability, dtype):
    given = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    compiled = {
        (b["kernel"], tuple(b["tile"].values()))
        for b in gate["binaries"]
        if b["capability"] == capability and b["dtype"] == dtype
    }
    wanted = {
        (KERNEL_NAMES[kernel], tuple(tile))
        for kernel in choice.RULES
        for tile in choice.RULES[kernel].tiles(given, divmod(capability, 10))
    }
    assert wanted <= compiled


def test_aligned_binaries_move_16_bytes_at_a_time(gate, full_run):
    judged = [b for b in gate["binaries"] if b["wide"]]
    assert len(judged) >= (200 if full_run else 50)
    assert all(b["narrow_loads"] == b["narrow_stores"] == 0 and b["loads"] > 0 for b in judged)


def test_the_rules_tiles_fit_every_architecture(gate):
    """sm_86, sm_89 and sm_120 give a block the least shared memory, and the rules of sm_80 serve them too."""
    judged = [b for b in gate["binaries"] if not is_asynchronous(divmod(b["capability"], 10))]
    assert len(judged) > 20
    assert [b["name"] for b in judged if b["shared"] > MIN_SHARED_BYTES] == []


def loops(gate: dict) -> list[dict]:
    """Counts of instructions are Triton 3.6.0's: under another version they are not judged."""
    known = counts.shipped().triton
    if gate["triton"] != known:
        pytest.skip(f"instructions are counted under Triton {known}, this is {gate['triton']}")
    return gate["loops"]


def test_no_loop_computes_longer_than_it_multiplies_or_reads(gate):
    refused = [f"{b['name']}: {'; '.join(b['faults'])}" for b in loops(gate) if b["faults"]]
    assert not refused, "\n".join(refused)
    of_90 = [b for b in gate["loops"] if b["capability"] == 90]
    # BatchNorm's in training are counted too.
    plain = [b for b in of_90 if not b["name"].startswith("norm_") and "centred" not in b["name"]]
    assert len(plain) == gate["apart"]["bf16"] + gate["apart"]["fp32"]
    assert 40 <= len(gate["loops"]) - len(of_90) <= len(of_90)


def test_few_loops_are_exempt_and_each_has_to_be(gate):
    assert len(EXEMPTIONS) <= MOST_EXEMPTIONS
    assert all(exempt.most > 1 and exempt.reason for exempt in EXEMPTIONS)
    used = {i for b in loops(gate) for i in b["exempt"]}
    assert [exempt for i, exempt in enumerate(EXEMPTIONS) if i not in used] == []


def test_no_register_is_written_that_a_wgmma_still_reads(gate):
    """Under every Triton, whose ptxas may do it."""
    faults = [fault for b in gate["loops"] for fault in b["faults"] if fault.startswith("register operand")]
    assert not faults
    assert len(gate["loops"]) > 0


def test_no_wgmma_waits_for_the_one_before(gate):
    """Under every Triton; what is borne, and what is planted, is 3.6.0's."""
    faults = [fault for b in gate["loops"] for fault in b["faults"] if fault == WAITS]
    assert not faults
    assert {b["name"] for b in loops(gate) if b["serialized"]} == {f"{key}, sm_90" for key in SERIALIZED}
    assert gate["planted"]["serialized"] == [WAITS]


PLANTED = (
    "spills", "narrow loads", "shared memory", "no matrix instruction", "integer instructions", "register operand",
)  # fmt: skip


@pytest.mark.parametrize("fault", PLANTED)
def test_the_gate_refuses_a_planted_fault(gate, fault):
    assert any(found.startswith(fault) for found in gate["planted"][fault]), gate["planted"][fault]
    assert gate["planted"]["unspoilt"] == []


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_what_a_launch_compiles(gate, dtype):
    """Triton's own launch path makes, to the byte, the binaries that were judged.

    Counted by its hashes too: a size that it specialised would show as a binary for every block.
    """
    (found,) = (found for found in gate["launched"] if found["dtype"] == dtype)
    launched = found["binaries"]
    assert len(launched) == found["keys"]
    assert found["keys"] > max(gate["counts"][dtype], gate["normed_counts"][f"{dtype} training"])
    assert [b["name"] for b in launched if not b["same"]] == []
    assert [b for b in launched if b["faults"]] == []


def test_few_binaries(gate):
    """For inference and training of the whole network at batch 1, 32 and 128, with either third branch."""
    assert len(gate["counts"]) == 2 * 3
    assert all(4 < count <= MAX_BINARIES for count in gate["counts"].values()), gate["counts"]
    assert max(gate["counts"].values()) == MAX_BINARIES


def test_few_binaries_with_batch_norm(gate):
    """The same of training by itself, and with inference, whose epilogues have scale and shift."""
    counts = gate["normed_counts"]
    most = {"all": MAX_NORMED_BINARIES, "training": MAX_BINARIES}
    assert len(counts) == 2 * 2 * 3
    assert all(4 < count <= most[name.split()[-1]] for name, count in counts.items()), counts
    assert max(counts.values()) >= MAX_NORMED_BINARIES - 1


def test_few_binaries_of_a_max_pool(gate):
    """One for inference, two for training, whatever the sizes, and as many with bias and ReLU."""
    assert len(gate["pools"]) == 3
    for found in gate["pools"].values():
        assert len(found) == 8
        assert found == {name: 2 if "taps" in name else 1 for name in found}
        assert sum(count for name, count in found.items() if "odd" not in name) == MAX_POOL_BINARIES
