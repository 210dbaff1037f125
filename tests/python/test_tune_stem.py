"""The tuner on the stem's two convolutions: launches of their own, one table with the blocks'."""

from __future__ import annotations

import pytest
import torch

import tune
from inception_fused.block.googlenet_blocks import GOOGLENET_LAUNCHED, StemConfig, block_shape
from inception_fused.plan import choice, tile_table
from inception_fused.plan.choice import tiled
from tune_fakes import GPU, TINY, FakeBench, run
from tune_workloads import Few, assert_sees
from tuner.operands import Case, Workload, problems_of
from tuner.run import KERNELS, make_groups

STEM = StemConfig(16, 8, 24)
WITH_STEM = {"stem": STEM, **TINY}
NAMES = ["K4 1x1", "K3", "B1", "B2 3x3", "B2 1x1", "B4 1x1", "B4 3x3"]
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32}


def case_of(name, dtype="bf16"):
    problems = problems_of(block_shape(STEM, 2, 3, DTYPES[dtype]), DTYPES[dtype])
    return Case("stem", STEM, 2, 3, dtype, next(problem for problem in problems if problem.name == name))


def test_its_launches_are_problems_beside_the_blocks():
    assert [p.name for p in problems_of(block_shape(STEM, 2, 3, torch.bfloat16), torch.bfloat16)] == NAMES
    groups = {group.kernel: group for group in make_groups(GOOGLENET_LAUNCHED, [1, 32], ["bf16"], KERNELS, 224)}
    found = {str(case) for group in groups.values() for case in group.cases if case.block == "stem"}
    assert found == {f"{name} stem batch {batch} bf16" for name in NAMES for batch in (1, 32)}


@pytest.mark.parametrize("branch3", [(5,), (3, 3)], ids=str)
def test_one_table_serves_both(branch3, tmp_path):
    """Timed once, whatever the windows of the blocks, and resumed."""
    path, kernels = tmp_path / "t.json", ("K3", "K4", "B2", "B4")
    first = FakeBench()
    assert run(first, path, kernels=kernels, blocks=WITH_STEM, branch3=branch3)["failed"] == []
    entries = tile_table.read(path, GPU, "user").entries
    for batch in (1, 32):
        for problem in tiled(block_shape(STEM, batch, 56, torch.bfloat16), torch.bfloat16):
            if problem.rules in kernels:
                found = [e for e in entries if (e.kernel, *e[2:5], e.taps) == (problem.rules, *problem.gemm)]
                assert len(found) == 1, problem.name
    again = FakeBench()
    run(again, path, kernels=kernels, blocks=WITH_STEM, branch3=branch3)
    assert (len(first.timed) > 0, again.timed) == (True, [])


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_timed_computes_what_float64_says(dtype, tmp_path):
    """Interpreted."""
    kernels = ("K3", "K4", "B1", "B2", "B2 1x1", "B4")
    options = dict(kernels=kernels, dtypes=(dtype,), batches=(2,), image_size=12, blocks={"stem": STEM})
    result = run(Few(), tmp_path / "t.json", **options)
    assert (result["failed"], result["refused"]) == ([], [])
    assert sorted(entry["kernel"] for entry in result["winners"]) == sorted((*kernels, "B4"))


@pytest.mark.parametrize(
    ("name", "spoilt"),
    [("K4 1x1", "y"), ("K3", "bits"), ("B1", "g0"), ("B2 3x3", "sums"), ("B2 1x1", "dr"), ("B4 1x1", "part")],
)
def test_a_check_sees_one_wrong_element(name, spoilt, monkeypatch):
    assert_sees(case_of(name), spoilt, monkeypatch)


def test_a_launch_without_bits_is_timed_once():
    """An output that another convolution reads is written alike in inference and training."""
    for name, forms in (("K4 1x1", 1), ("K3", 2)):
        case = case_of(name)
        assert len(Workload(case, "meta").launches(choice.tile_of(case.problem))) == forms


def test_dry_run_and_list(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = ["--blocks", "stem", "--dtypes", "bf16", "--batches", "1"]
    assert tune.main(["--list", *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sorted(line.split(" stem batch 1 bf16 ")[0] for line in lines[1:]) == sorted(NAMES)
    assert tune.main(["--dry-run", *few]) == 0
    assert "nothing was timed" in capsys.readouterr().out
