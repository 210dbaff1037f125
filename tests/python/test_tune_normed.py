"""The tuner on what BatchNorm in training adds to a block: problems, operands, checks, and tables with them."""

from __future__ import annotations

from zlib import crc32

import pytest
import torch

from checks.launches import block_launches, googlenet_cases
from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block import batch_stats
from inception_fused.block.googlenet_blocks import block_shape, spatial_size
from inception_fused.block.views import Tile
from inception_fused.op import reasons
from inception_fused.op.launcher import Call
from inception_fused.plan import choice, tile_table, tuned
from inception_fused.plan.rules import MAX_BINARIES, MAX_NORMED_BINARIES
from inception_fused.runtime.launch import binary_key
from tune_fakes import GPU, TINY, FakeBench, entry, put, run
from tuner.operands import Case, Workload, problems_of
from tuner.run import KERNELS, make_groups

NORMS = tuple(kernel for kernel in KERNELS if kernel.startswith("N"))


def work_of(name: str) -> Workload:
    problems = problems_of(block_shape(TINY["5a"], 2, 7, torch.bfloat16), torch.bfloat16)
    problem = next(problem for problem in problems if problem.name == name)
    return Workload(Case("5a", TINY["5a"], 2, 7, "bf16", problem), "cpu")


def tile_of(work: Workload, height: int | None = None) -> Tile:
    rule = choice.tile_of(work.problem)
    return rule if height is None else rule._replace(BLOCK_M=height)


def test_batch_norm_adds_its_own_launches_alone():
    """The other kernels' tiles are those of a block without it."""
    groups = {g.kernel: g for g in make_groups(GOOGLENET_BLOCKS, [32], ["bf16"], KERNELS, 224)}
    names = {kernel: {case.problem.name for case in group.cases} for kernel, group in groups.items()}
    assert NORMS == ("N1", "N3", "N4", "N6") == tuple(groups)[-4:]
    assert [names[kernel] for kernel in NORMS] == [{"N1 r", "N1 y"}, {"N3 r", "N3 y"}, {"N4 y"}, {"N6 y", "N6 r"}]
    assert not any(case.problem.row.centred for group in groups.values() for case in group.cases)
    two = make_groups(GOOGLENET_BLOCKS, [32], ["bf16"], ["N1", "N3", "N6"], 224, (3, 3))
    assert all({case.problem.name[-1] for case in group.cases} == {"r", "t", "y"} for group in two)


@pytest.mark.parametrize("branch3", [(5,), (3, 3)], ids=str)
def test_no_two_launches_of_googlenet_share_an_entry(branch3):
    """N6 of y, known by its widest branch, and N6 of r and t, by all of their columns, are timed apart."""
    kinds: dict[tuple, set[bool]] = {}
    for block, config in GOOGLENET_BLOCKS.items():
        shape = block_shape(config, 32, spatial_size(block), torch.bfloat16, branch3=branch3)
        for problem in problems_of(shape, torch.bfloat16):
            if problem.rules in NORMS:
                kinds.setdefault((problem.rules, *problem.gemm), set()).add(problem.apart)
    assert all(len(found) == 1 for found in kinds.values())


@pytest.mark.parametrize("height", [16, 32, 128])
@pytest.mark.parametrize(("name", "result"), [("N1 y", "moments"), ("N1 r", "moments"), ("N4 y", "sums")])
def test_sums_are_judged_whatever_the_ranges_of_a_tile(name, result, height):
    """Parts have a row a range: what N2 makes of N1's is compared, of N4's their sum."""
    work = work_of(name)
    tile = tile_of(work, height)
    ranges, _ = choice.statistics_ranges(work.problem, tile)
    assert work.results(work.call(tile, True))[result].shape[0] == ranges == -(-98 // height)
    assert 0 < work.check(tile) < 0.5


def test_a_wrong_count_of_rows_is_seen(monkeypatch):
    """Means of ranges weigh as much as they have rows, of which the last has fewer."""
    work = work_of("N1 y")
    tile, call = tile_of(work, 64), work.call
    assert work.check(tile) < 1

    def shorter(tile, save):
        found = call(tile, save)
        return found._replace(kwargs=found.kwargs | {"gemm_m": 90})

    assert work.truth
    monkeypatch.setattr(work, "call", shorter)
    with pytest.raises(AssertionError, match="moments is wrong"):
        work.check(tile)


@pytest.mark.parametrize("name", ["N4 y", "N6 y"])
def test_a_mask_is_that_of_the_stored_values(name, monkeypatch):
    """In float64 a value may lie on the mask's other side, which is no error of the kernel."""
    work = work_of(name)
    original = work.call

    def call(tile, save):
        found = original(tile, save)
        raw, stats = found.args[1:3]
        table = stats.rows(batch_stats.STATISTICS)
        # In fp32 raw - mean is 3, and ReLU's argument 0; in float64 it is 2**-23.
        raw.base.fill_(3.0)
        table[batch_stats.MEAN], table[batch_stats.SCALE], table[batch_stats.SHIFT] = -(2.0**-23), 1.0, -3.0
        return found

    monkeypatch.setattr(work, "call", call)
    assert work.check(tile_of(work)) < 1
    monkeypatch.setattr("tuner.normed.behind_mask", lambda call: call)
    del work.truth
    with pytest.raises(AssertionError, match="is wrong"):
        work.check(tile_of(work))


def test_no_peak_of_many_values_passes_for_an_error(monkeypatch):
    """The twin in bf16 in the kernel's place, on 6.4 million values."""
    config = GOOGLENET_BLOCKS["3a"]
    problems = problems_of(block_shape(config, 32, 28, torch.bfloat16), torch.bfloat16)
    problem = next(problem for problem in problems if problem.name == "N3 y")
    original = Call.run
    monkeypatch.setattr(Call, "run", lambda call, form, tile: original(call, "eager", None))
    work = Workload(Case("3a", config, 32, 28, "bf16", problem), "cpu")
    assert 0.3 < work.check(tile_of(work)) < 0.9


def test_in_place_every_run_has_its_own_gradient():
    """N6 of r reads and writes the same columns: a run leaves its result where the next would read."""
    work = work_of("N6 r")
    calls = [work.call(tile_of(work), True) for _ in range(2)]
    for call in calls:
        dy, *_, (g,) = call.args
        assert torch.equal(dy.permute(0, 2, 3, 1).flatten(0, 2), g.rows(98))
        assert dy.untyped_storage().data_ptr() == g.base.untyped_storage().data_ptr()
    first, second = (call.args[0] for call in calls)
    assert torch.equal(first, second)
    first.zero_()
    assert second.any()
    assert 0 < work.check(tile_of(work)) == work.check(tile_of(work)) < 1


def test_a_table_of_statistics_is_read_back_and_reaches_a_launch(tiles_folder, monkeypatch):
    """And with it the ranges that follow from its tile."""
    config, kinds = GOOGLENET_BLOCKS["3a"], ("N1", "N3", "N4", "N4 strided", "N6", "N6 strided")
    shape = block_shape(config, 32, 28, torch.bfloat16)
    problems = [p for p in choice.tiled(shape, torch.bfloat16, normed=True) if p.rules in kinds]
    tiles = {"N1": 16, "N3": 128, "N4": 16, "N4 strided": 64, "N6": 16, "N6 strided": 16}
    found = [*problems, *(p.strided() for p in problems if p.name in ("N4 y", "N6 y"))]
    entries = [
        entry(p.rules, "bf16", *p.gemm[:3], Tile(tiles[p.rules], 64, 16, num_stages=1), taps=p.gemm.taps) for p in found
    ]
    put(*entries)
    assert {item.kernel for item in tile_table.read(tuned.user_path(GPU.name), GPU, "user").entries} == set(kinds)
    assert all(tiles[p.rules] == choice.tile_of(p, GPU).BLOCK_M for p in found)
    monkeypatch.setattr(tuned, "key", lambda device: GPU)
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    for dy_rows in (True, False):
        at = dict(save=True, normed=True, dy_rows=dy_rows)
        launched = {}
        for launch in block_launches(config, 32, (28, 28), torch.bfloat16, **at):
            launched.setdefault(launch.kernel.fn.__name__, []).append(launch)
        strided = "" if dy_rows else " strided"
        statistics = [problem for problem in problems if problem.rules == "N1"]
        for launch, problem in zip(launched["norm_stats_kernel"], statistics, strict=True):
            assert launch.tile.BLOCK_M == 16
            ranges = launch.grid[0], launch.args[4]
            assert ranges == choice.statistics_ranges(problem, launch.tile)
            assert ranges != choice.statistics_ranges(problem, choice.tile_of(problem))
        assert {launch.tile.BLOCK_M for launch in launched["norm_apply_kernel"]} == {128}
        assert [launch.tile.BLOCK_M for launch in launched["norm_grad_stats_kernel"]] == [tiles[f"N4{strided}"]]
        assert {launch.tile.BLOCK_M for launch in launched["norm_grad_apply_kernel"]} == {16}


def test_a_run_with_batch_norm_goes_on_where_it_ended(tmp_path):
    first, second = FakeBench(), FakeBench()
    result = run(first, tmp_path / "t.json", kernels=NORMS)
    assert (result["failed"], result["cut"]) == ([], 0)
    assert {entry["kernel"] for entry in result["winners"]} == set(NORMS) == {key.split()[0] for key, _ in first.timed}
    run(second, tmp_path / "t.json", kernels=NORMS)
    assert second.timed == []


def test_a_whole_table_of_the_tuner_keeps_to_few_binaries(tiles_folder, monkeypatch):
    """Where every problem would like a tile of its own."""

    def us(case, tile):
        return 10.0 + crc32(f"{case.key} {tile}".encode()) % 1000 / 10

    result = run(FakeBench(us), None, blocks=GOOGLENET_BLOCKS, batches=(1, 32, 128), kernels=KERNELS)
    assert result["failed"] == []
    assert {group["kernel"]: len(group["tiles"]) for group in result["groups"][-4:]} == dict.fromkeys(NORMS, 1)
    monkeypatch.setattr(tuned, "key", lambda device: GPU)
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    found = {True: set(), False: set()}
    for _, case in googlenet_cases(normed=True):
        found[case["save"]] |= set(map(binary_key, block_launches(**case, dtype=torch.bfloat16)))
    assert len(found[True]) <= MAX_BINARIES
    assert len(found[True] | found[False]) <= MAX_NORMED_BINARIES
