"""The tuner's whole flow on a bench that is none: entries, refusals, cuts, files, the command."""

from __future__ import annotations

import json
import os
import sys
import time
from zlib import crc32

import pytest
import torch

import tune
from inception_fused.block.googlenet_blocks import GOOGLENET_LAUNCHED, block_shape, spatial_size
from inception_fused.block.views import Tile
from inception_fused.op import reasons
from inception_fused.plan import choice, tile_table, tuned
from inception_fused.plan.choice import tiled
from inception_fused.plan.rules import MAX_BINARIES
from tune_fakes import GPU, TINY, FakeBench, run
from tuner import session
from tuner.bench import DeviceBench
from tuner.candidates import candidates
from tuner.record import tile_of, tile_text
from tuner.run import KERNELS, make_groups

SHARED = FakeBench.shared_bytes


def entries_of(path):
    return tile_table.read(path, GPU, "user").entries


def test_the_flow(tmp_path):
    seen = []
    result = run(FakeBench(), tmp_path / "t.json", on_progress=lambda *step: seen.append(step))
    json.dumps(result)
    assert (result["problems"], result["timed"], result["cut"], result["ended"]) == (6, 6, 0, None)
    assert (result["failed"], result["refused"], result["rejected"]) == ([], [], [])
    best = {"K1": (32, 64), "B2": (32, 64)}
    entries = entries_of(tmp_path / "t.json")
    assert len(entries) == len(result["winners"]) == 6
    for entry in entries:
        assert entry.tile[:2] == best[entry.kernel]
        assert (entry.us, entry.spread, entry.parity) == (10.0, 0.004, 0.25)
        assert entry.rule_us == {"K1": 14.0, "B2": 22.0}[entry.kernel]
        other, us = entry.runner_up
        assert other != entry.tile
        assert us == 10.0, "the same shape with other stages"
    assert result["gain"] == pytest.approx((2 * 14 + 4 * 22) / 60 - 1)
    assert seen[-1][:2] == (6, 6)
    assert {step[:2] for step in seen} == {(i, 6) for i in range(7)}
    text = session.report(result)
    assert "K1" in text
    assert "6 entries in" in text


def test_few_tiles_for_all_problems_and_what_that_costs(tmp_path):
    def us(case, tile):
        return 10.0 + abs(tile.BLOCK_M - (32 if case.batch == 1 else 128)) * (1 if case.batch == 1 else 100)

    one = run(FakeBench(us), tmp_path / "one.json", kernels=("B3",))
    assert len(one["groups"][0]["tiles"]) == one["groups"][0]["limit"] == 1
    assert one["groups"][0]["us"] > one["groups"][0]["unlimited_us"] == 20.0
    two = run(FakeBench(us), tmp_path / "two.json", kernels=("B3",), tiles_per_kernel=2)
    assert {tile_of(text).BLOCK_M for text in two["groups"][0]["tiles"]} == {32, 128}
    assert two["groups"][0]["us"] == two["groups"][0]["unlimited_us"] == 20.0


def test_a_lead_within_the_noise_leaves_the_rule_in_place(tmp_path):
    rule = choice.RULES["B3"].rules[0].tile(torch.bfloat16)
    run(FakeBench(lambda case, tile: 100.0 if tile == rule else 99.5), tmp_path / "t.json", kernels=("B3",))
    assert {entry.tile for entry in entries_of(tmp_path / "t.json")} == {rule}


def test_a_wrong_winner_is_refused_and_the_next_best_is_checked(tmp_path):
    bench = FakeBench()
    bench.wrong = lambda case, tile: tile[:2] == (32, 64) and tile.num_stages == 3
    result = run(bench, tmp_path / "t.json", kernels=("B3",))
    (tile,) = {entry.tile for entry in entries_of(tmp_path / "t.json")}
    assert (tile[:2], tile.num_stages) == ((32, 64), 4)
    assert len(result["refused"]) == 1
    assert "y is wrong" in result["refused"][0]
    assert "REFUSED" in session.report(result)
    assert result["failed"] == []
    assert {t for _, t in bench.checked if t == tile}, "the winner was checked as well"
    assert {entry.runner_up[0] for entry in entries_of(tmp_path / "t.json")}.isdisjoint(
        {tile._replace(num_stages=3)}
    ), "a wrong tile is no runner-up"


def test_nothing_is_written_for_a_kernel_that_is_always_wrong(tmp_path):
    bench = FakeBench()
    bench.wrong = lambda case, tile: case.problem.rules == "B3"
    result = run(bench, tmp_path / "t.json", kernels=("B3", "K1"))
    assert {entry.kernel for entry in entries_of(tmp_path / "t.json")} == {"K1"}
    assert any("no tile is left" in text for text in result["failed"])
    assert any("the rule's 128x64x64" in text for text in result["failed"])


def test_tiles_that_spill_or_raise_are_recorded_with_the_reason(tmp_path):
    bench = FakeBench()
    bench.spills = lambda case, tile: tile.BLOCK_M == 32
    bench.raises = lambda case, tile: tile.BLOCK_M == 64
    result = run(bench, tmp_path / "t.json", kernels=("B3",))
    reasons = {tile_of(item["tile"]).BLOCK_M: item["reason"] for item in result["rejected"]}
    assert reasons == {32: "spills 64 bytes", 64: "RuntimeError: no such tile"}
    assert all(tile.BLOCK_M != 32 for _, tile in bench.timed), "what spills is not timed"
    assert {entry.tile.BLOCK_M for entry in entries_of(tmp_path / "t.json")} == {128}
    assert result["failed"] == [], "the rule's tile ran"
    assert "tiles left out" in session.report(result)


def test_a_lost_device_ends_the_run_and_keeps_what_was_finished(tmp_path):
    bench = FakeBench()
    bench.lost = lambda case, tile: case.problem.rules == "B3" and tile.BLOCK_M == 64
    result = run(bench, tmp_path / "t.json", kernels=("K1", "B3", "B4"))
    assert (result["ended"], result["device_lost"]) == ("the device reports: gone", True)
    assert result["failed"]
    assert {entry.kernel for entry in entries_of(tmp_path / "t.json")} == {"K1"}
    again = FakeBench()
    run(again, tmp_path / "t.json", kernels=("B3",))
    problem = next(case.problem for case in make_groups(TINY, [32], ["bf16"], ["B3"], 224)[0].cases)
    lost = next(tile for tile in candidates(problem, SHARED) if tile.BLOCK_M == 64)
    assert lost not in {tile for _, tile in again.timed}, "the tile that took the device with it is not tried again"


def stop_after(bench, timings, how):
    def before_time():
        if len(bench.timed) == timings:
            how()

    bench.before_time = before_time


def interrupt():
    raise KeyboardInterrupt


def test_an_interrupted_run_keeps_what_was_finished_and_goes_on_there(tmp_path):
    path, bench = tmp_path / "t.json", FakeBench()
    whole = FakeBench()
    run(whole, tmp_path / "whole.json")
    stop_after(bench, len(whole.timed) - 20, interrupt)
    result = run(bench, path)
    assert result["ended"] == "interrupted"
    assert 0 < result["cut"] < 8
    assert {entry.kernel for entry in entries_of(path)} == {"K1"}, "B2 is not finished"
    second = FakeBench()
    result = run(second, path)
    assert len(second.timed) == 20
    assert set(second.timed).isdisjoint(bench.timed)
    assert entries_of(path) == entries_of(tmp_path / "whole.json")
    third = FakeBench()
    run(third, path, again=True)
    assert len(third.timed) == len(whole.timed)


def test_figures_of_other_kernels_are_taken_anew(tmp_path, monkeypatch):
    run(FakeBench(), tmp_path / "t.json", kernels=("B3",))
    bench = FakeBench()
    monkeypatch.setattr(tile_table, "kernel_sources", lambda: "f" * 64)
    run(bench, tmp_path / "t.json", kernels=("B3",))
    assert bench.timed


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 1, "ids": 5, "cases": 3}'])
def test_an_unreadable_record_only_costs_time(content, tmp_path):
    (tmp_path / "t.timings.json").write_text(content)
    assert run(FakeBench(), tmp_path / "t.json", kernels=("B3",))["failed"] == []


def test_a_budget_cuts_and_a_later_run_goes_on(tmp_path, monkeypatch):
    now, bench = [1000.0], FakeBench()
    monkeypatch.setattr(time, "time", lambda: now[0])
    stop_after(bench, 30, lambda: now.__setitem__(0, now[0] + 500))
    result = run(bench, tmp_path / "t.json", budget=100.0)
    assert result["ended"] == "budget spent"
    assert 0 < result["cut"] < 8
    assert "problems left; run it again to go on" in session.report(result)
    kept = {entry.kernel for entry in entries_of(tmp_path / "t.json")}
    later = run(FakeBench(), tmp_path / "t.json", budget=100.0)
    assert later["cut"] == 0
    assert kept < {entry.kernel for entry in entries_of(tmp_path / "t.json")} == {"K1", "B2"}


def test_groups_that_are_not_tuned_now_keep_their_entries(tmp_path):
    run(FakeBench(), tmp_path / "t.json", kernels=("K1",))
    before = set(entries_of(tmp_path / "t.json"))
    run(FakeBench(), tmp_path / "t.json", kernels=("B3",))
    assert before < set(entries_of(tmp_path / "t.json"))


def test_problems_of_earlier_runs_have_their_say_in_the_choice(tmp_path):
    """One tile for all: what batch 1 alone would take is given up for both, without timing it again."""

    def us(case, tile):
        return 10.0 + (4 if tile.BLOCK_M == 64 else 0 if (tile.BLOCK_M == 32) == (case.batch == 1) else 30)

    path = tmp_path / "t.json"
    run(FakeBench(us), path, kernels=("B3",), batches=(1,))
    assert {entry.tile.BLOCK_M for entry in entries_of(path)} == {32}
    bench = FakeBench(us)
    run(bench, path, kernels=("B3",), batches=(32,))
    assert len({key for key, _ in bench.timed}) == 1
    assert [entry.tile.BLOCK_M for entry in entries_of(path)] == [64, 64]


def test_eight_warps_only_where_they_are_asked_for(tmp_path):
    def us(case, tile):
        return 1.0 if tile.num_warps == 8 else 10.0

    for warps, found in (((4,), {4}), ((4, 8), {8}), ((8,), {8})):
        result = run(FakeBench(us), tmp_path / f"{len(warps)}{warps[-1]}.json", kernels=("K1",), warps=warps)
        assert {entry["tile"]["num_warps"] for entry in result["winners"]} == found


@pytest.mark.parametrize("installed", [True, False])
def test_progress(installed, capsys, monkeypatch):
    if installed:
        pytest.importorskip("tqdm")
    else:
        monkeypatch.setitem(sys.modules, "tqdm", None)
    bar = tune._Bar()
    for step in ((0, 2, "compiling"), (1, 2, "K1"), (1, 2, "checking"), (2, 2, "B3")):
        bar(*step)
    bar.close()
    shown = capsys.readouterr().err
    assert "2/2" in shown if installed else shown == "1 of 2: K1\n2 of 2: B3\n"


def test_a_disk_that_is_full_fails_the_run_and_keeps_the_old_table(tmp_path, monkeypatch):
    path = tmp_path / "t.json"
    run(FakeBench(), path, kernels=("K1",))
    before = path.read_text()

    def full(source, target):
        if str(target).endswith("t.json"):
            raise OSError("No space left on device")
        return original(source, target)

    original = os.replace
    monkeypatch.setattr(os, "replace", full)
    result = run(FakeBench(), path, kernels=("B3",))
    assert result["failed"] == ["cannot be written: No space left on device"]
    assert path.read_text() == before


def test_a_place_that_cannot_be_written_is_said_before_anything_is_timed(tmp_path):
    bench = FakeBench()
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "t.json", tmp_path):
        with pytest.raises(OSError, match="."):
            run(bench, out)
    assert bench.timed == []


def test_without_a_choice_the_kernels_that_triton_computes_are_tuned(tmp_path, monkeypatch):
    result = run(FakeBench(), tmp_path / "t.json", kernels=None)
    assert [group["kernel"] for group in result["groups"]] == ["K1", "B3"] == list(FakeBench.kernels)
    assert set(KERNELS) <= set(DeviceBench("cpu", None).kernels)
    monkeypatch.setattr("inception_fused.op.dispatch.usual", lambda kernel, _: "native" if kernel == "K1" else "triton")
    assert "K1" not in DeviceBench("cpu", None).kernels


def test_defaults_are_the_packages_table(tiles_folder):
    run(FakeBench(), None, defaults=True, kernels=("B3",))
    assert not tuned.user_path(GPU.name).exists()
    assert "tuned on Test GPU 90" in tuned.describe(GPU)
    assert "(package)" in tuned.describe(GPU)


def test_a_whole_table_of_the_tuner_keeps_the_promises(tiles_folder, monkeypatch):
    """Few binaries, and BLOCK_K whatever the batch, where every problem would like a tile of its own."""
    from checks.launches import googlenet_launches
    from inception_fused.runtime.launch import binary_key

    def us(case, tile):
        return 10.0 + crc32(f"{case.key} {tile}".encode()) % 1000 / 10

    result = run(FakeBench(us), None, blocks=GOOGLENET_LAUNCHED, batches=(1, 32, 128), kernels=KERNELS)
    assert result["failed"] == []
    assert all(len(group["tiles"]) <= group["limit"] for group in result["groups"])
    assert any(group["us"] > group["unlimited_us"] for group in result["groups"])
    monkeypatch.setattr(tuned, "key", lambda device: GPU)
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    launches = [launch for _, launch in googlenet_launches(torch.bfloat16)]
    assert len(set(map(binary_key, launches))) <= MAX_BINARIES
    for name, config in GOOGLENET_LAUNCHED.items():
        by_batch = [
            tiled(block_shape(config, batch, spatial_size(name), torch.bfloat16), torch.bfloat16)
            for batch in (1, 8, 32, 128, 999)
        ]
        for problems in zip(*by_batch, strict=True):
            assert len({choice.tile_of(problem, GPU).BLOCK_K for problem in problems}) == 1
        heights = {p.name: choice.tile_of(p, GPU).BLOCK_M for p in by_batch[0]}
        assert heights["B2 3x3"] == heights.get("B2 5x5", heights["B2 3x3"])


def test_tiles_survive_a_file():
    tile = Tile(128, 64, 32, 4, 8, 2)
    assert tile_of(tile_text(tile)) == tile


def test_dry_run_and_list_need_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--dry-run", "--dtypes", "bf16", "--budget", "60"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0].strip() for line in lines[2:-1]] == list(KERNELS)
    assert lines[-1].endswith("cut at 60 s; nothing was timed")
    assert tune.main(["--list", "--kernels", "B4", "--blocks", "3a", "--dtypes", "bf16,tf32", "--batches", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 4
    assert "B4 3x3 3a batch 1 bf16" in lines[1] + lines[2]
    assert "tiles: 128x256x32s4w8" in lines[1]


def test_wrong_command_lines(capsys):
    for arguments, message in (
        (["--kernels", "K1,K9"], "--kernels: got 'K9', wants some of K1,K2"),
        (["--blocks", "6a"], "--blocks: got '6a'"),
        (["--dtypes", "fp64"], "--dtypes: got 'fp64', wants some of bf16,fp16,tf32"),
        (["--batches", "1,0"], "--batches: got '0', wants positive integers"),
        (["--warps", "2"], "--warps: got '2', wants some of 4,8"),
        (["--branch3", "7x7"], "argument --branch3: invalid choice: '7x7'"),
        (["--budget", "nan"], "--budget: got nan"),
        (["--image-size", "0"], "--image-size: got 0"),
        (["--tiles-per-kernel", "0"], "--tiles-per-kernel: got 0"),
    ):
        with pytest.raises(SystemExit) as error:
            tune.main(arguments)
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_without_a_gpu_it_says_so(capsys, monkeypatch):
    monkeypatch.setattr("gpu.run.no_gpu_reason", lambda: "no GPU here")
    assert tune.main([]) == 2
    assert "nothing was tuned: no GPU here" in capsys.readouterr().err


@pytest.mark.parametrize(("wrong", "code"), [(False, 0), (True, 1)])
def test_the_command(wrong, code, tiles_folder, capsys, monkeypatch):
    bench = FakeBench()
    bench.wrong = lambda case, tile: wrong
    monkeypatch.setattr("gpu.run.no_gpu_reason", lambda: None)
    monkeypatch.setattr("tuner.session.stopwatch_for", lambda device: None)
    monkeypatch.setattr("tuner.session.DeviceBench", lambda device, stopwatch: bench)
    few = ["--kernels", "B3", "--blocks", "3a", "--dtypes", "bf16", "--batches", "1", "--warps", "4,8"]
    assert tune.main(few) == code
    out = capsys.readouterr().out
    assert f"{0 if wrong else 1} entries in {tuned.user_path(GPU.name)}" in out
    assert ("FAILED" in out) == wrong
    bench.timed.clear()
    assert tune.main([*few, "--kernels", "K4", "--branch3", "two-3x3"]) == code
    assert {key.split()[-1] for key, _ in bench.timed} == {"9"}
    assert f"{0 if wrong else 2} entries in {tuned.user_path(GPU.name)}" in capsys.readouterr().out
    assert tune.main(["--out", str(tiles_folder)]) == 2
    assert "nothing was tuned" in capsys.readouterr().err
