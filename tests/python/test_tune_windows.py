"""The tuner on blocks whose third branch has other windows: problems of their own, one table for all."""

from __future__ import annotations

import torch

import tune
from inception_fused.block.googlenet_blocks import block_shape
from inception_fused.plan import tile_table
from inception_fused.plan.choice import tiled
from tune_fakes import GPU, TINY, FakeBench, run


def entries_of(path):
    return tile_table.read(path, GPU, "user").entries


def test_forms_of_a_block_share_a_table_and_no_time_of_a_window(tmp_path):
    """A 5x5 and the first of two 3x3 have the same channels; K3 and the 3x3 of B2 are the same problems in both."""
    path, kernels = tmp_path / "t.json", ("K3", "K4", "B2", "B4")
    first = FakeBench()
    run(first, path, kernels=kernels)
    five = set(entries_of(path))
    second = FakeBench()
    result = run(second, path, kernels=kernels, branch3=(3, 3))
    assert result["failed"] == []
    assert set(second.timed).isdisjoint(first.timed)
    assert {key.split()[0] for key, _ in second.timed} == {"K4", "B2", "B4"}
    assert {entry.key for entry in five} < {entry.key for entry in entries_of(path)}
    shapes = [block_shape(TINY["5a"], 1, 7, torch.bfloat16, branch3=branch3) for branch3 in ((5,), (3, 3))]
    for problem in (p for shape in shapes for p in tiled(shape, torch.bfloat16) if p.rules in kernels):
        found = [e for e in entries_of(path) if (e.kernel, *e[2:5], e.taps) == (problem.rules, *problem.gemm)]
        assert len(found) == 1, problem.name
    third = FakeBench()
    run(third, path, kernels=kernels, branch3=(3, 3))
    run(third, path, kernels=kernels)
    assert third.timed == [], "both are resumed"


def test_every_window_of_a_block_has_one_height(tmp_path):
    """Whichever form was timed first: dgrads whose sums over rows share a buffer."""

    def us(case, tile):
        return 10.0 + abs(tile.BLOCK_M - {1: 32, 9: 64, 25: 128}[case.problem.gemm.taps]) / 8

    path = tmp_path / "t.json"
    for branch3 in ((5,), (3, 3)):
        run(FakeBench(us), path, kernels=("B2", "B2 1x1"), batches=(1,), branch3=branch3, tiles_per_kernel=4)
    assert len({e.tile.BLOCK_M for e in entries_of(path) if e.taps > 1}) == 1
    assert len({e.tile.BLOCK_M for e in entries_of(path)}) == 2


def test_dry_run_and_list_of_two_windows(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    few = ["--blocks", "3a", "--dtypes", "bf16", "--batches", "1", "--branch3", "two-3x3"]
    assert tune.main(["--list", "--kernels", "K4,B2,B4", *few]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = ["K4 first", "K4 second", "B2 3x3", "B2 second", "B2 first", "B2 1x1"]
    names += ["B4 1x1", "B4 3x3", "B4 first", "B4 second", "B4 pool"]
    assert [line.split(" 3a two-3x3 batch 1 bf16 ")[0] for line in lines[1:]] == names
    assert tune.main(["--dry-run", *few]) == 0
    assert capsys.readouterr().out.splitlines()[5].split()[:3] == ["K4", "bf16", "2"]
