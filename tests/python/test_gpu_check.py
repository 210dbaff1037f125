"""gpu_check without a GPU: its command line, its runner, and workers that crash or hang."""

from __future__ import annotations

import re
import sys
import time

import pytest
import torch

import gpu_check
from checks.device import DeviceLostError
from gpu.stages import STAGES, Stage
from gpu_fakes import TINY, Fixed


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("gpu.run.card_state", lambda: None)


def stage(name, function, **options):
    return Stage(name, "a stage of this test", function, 1, **options)


def test_dry_run_says_what_each_stage_would_do_and_walks_those_that_need_no_gpu(no_gpu, tmp_path, capsys):
    assert gpu_check.main(["--dry-run", "--out", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    for s in STAGES:
        assert re.search(rf"^  {s.name}: .*; about \d+ s$", text, re.MULTILINE)
    assert "162 points (forward, training, graph): 3a batch 128 bf16 forward" in text
    stages = gpu_check.load(tmp_path)["stages"]
    assert {name: entry["status"] for name, entry in stages.items()} == {
        "environment": "ok",
        "floors": "ok",
        "report": "ok",
    }
    assert "| 417.1 | 357.7 | 1385.7 |" in stages["floors"]["figures"]["tables"][0]
    assert re.fullmatch("[0-9a-f]{64}", stages["environment"]["figures"]["kernel_sources"])


def test_output_files_are_few_and_plainly_named(no_gpu, tmp_path):
    gpu_check.main(["--dry-run", "--out", str(tmp_path), "--stages", "floors"])
    (tmp_path / "tests.log").touch()
    names = [path.name for path in tmp_path.iterdir()]
    assert sorted(names) == ["results.json", "summary.md", "tests.log"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+", name) for name in names)


def test_without_a_gpu_it_says_why_and_what_to_do(no_gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", None)
    assert gpu_check.main(["--out", str(tmp_path), "--stages", "floors"]) == 2
    assert "is built without CUDA: install one with CUDA" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "no NVIDIA driver answers" in gpu_check.no_gpu_reason()
    monkeypatch.setattr("gpu.run.card_state", lambda: "driver_version\n550.1")
    assert "550.1" in gpu_check.no_gpu_reason()
    assert "update the driver" in gpu_check.no_gpu_reason()


def test_wrong_command_lines(capsys):
    for arguments, message in (
        (["--stages", "parity,speed"], "--stages: got 'speed', wants some of environment"),
        (["--budget", "0"], "--budget: got 0, wants a positive number"),
    ):
        with pytest.raises(SystemExit) as error:
            gpu_check.main(arguments)
        assert error.value.code == 2
        assert message in capsys.readouterr().err


def test_list_names_the_stages_in_order(capsys):
    assert gpu_check.main(["--list"]) == 0
    names = [line.split()[0] for line in capsys.readouterr().out.splitlines()]
    assert names == [s.name for s in STAGES]
    assert len(set(names)) == len(names)


def test_a_failing_stage_is_recorded_and_the_next_one_runs(run, tmp_path):
    seen_on_disk = []

    def fails(_):
        raise RuntimeError("no such kernel")

    def works(_):
        seen_on_disk.append(gpu_check.load(tmp_path)["stages"]["first"])

    gpu_check.run_stages(run, [stage("first", fails), stage("second", works)])
    assert run.results["stages"]["first"]["status"] == "failed"
    assert "RuntimeError: no such kernel" in run.results["stages"]["first"]["error"]
    assert run.results["stages"]["second"]["status"] == "ok"
    assert seen_on_disk == [run.results["stages"]["first"]]


def test_a_spent_budget_cuts_stages_that_need_the_gpu(run):
    run.deadline = time.time() - 1
    gpu_check.run_stages(run, [stage("measures", pytest.fail), stage("says", lambda _: None, needs_gpu=False)])
    assert run.results["stages"]["measures"]["status"] == "cut"
    assert run.results["stages"]["says"]["status"] == "ok"


def test_a_lost_device_ends_the_process_and_is_recorded(run):
    run.stopwatch.broken = RuntimeError("an illegal memory access was encountered")

    def faults(run):
        run.each(TINY.points(("forward", "training")), lambda point: 1 / 0, seconds=1)

    with pytest.raises(DeviceLostError, match="illegal memory access"):
        gpu_check.run_stages(run, [stage("faults", faults), stage("after", pytest.fail)])
    assert "DeviceLostError" in run.results["stages"]["faults"]["error"]
    assert len(run.results["stages"]["faults"]["rows"]) == 1
    assert "after" not in run.results["stages"]


WORKER = """
import json, os, pathlib, sys, time
out, names = pathlib.Path(sys.argv[1]), sys.argv[2].split(",")
results = json.loads((out / "results.json").read_text())
def save():
    (out / "part").write_text(json.dumps(results))
    os.replace(out / "part", out / "results.json")
for name in names:
    results["stages"][name] = {"status": "running"}
    save()
    if name == "crashes":
        os._exit(9)
    if name == "hangs":
        time.sleep(60)
    results["stages"][name] = {"status": "ok", "pid": os.getpid()}
    save()
"""


def supervise(tmp_path, names, deadline=1000.0, script=WORKER):
    gpu_check.save(tmp_path, {"stages": {}})

    def command(left):
        return [sys.executable, "-I", "-S", "-c", script, str(tmp_path), ",".join(left)]

    gpu_check.supervise(names, tmp_path, time.time() + deadline, command, lambda name: 2.0)
    return gpu_check.load(tmp_path)["stages"]


def test_stages_after_a_crash_or_a_hang_run_in_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "POLL_S", 0.02)
    stages = supervise(tmp_path, ["first", "crashes", "second", "hangs", "third"])
    assert [entry["status"] for entry in stages.values()] == ["ok", "failed", "ok", "failed", "ok"]
    assert "exit code 9" in stages["crashes"]["error"]
    assert "no sign of life for 2 s" in stages["hangs"]["error"]
    assert len({stages[name]["pid"] for name in ("first", "second", "third")}) == 3


def test_a_worker_that_never_starts_does_not_loop(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "POLL_S", 0.02)
    stages = supervise(tmp_path, ["first", "second"], script="raise SystemExit(7)")
    assert [entry["status"] for entry in stages.values()] == ["failed", "failed"]
    assert "exit code 7" in stages["first"]["error"]


def test_the_end_of_the_budget_ends_a_worker_and_cuts_the_rest(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "POLL_S", 0.02)
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.1)
    stages = supervise(tmp_path, ["hangs", "after"], deadline=0.2)
    assert "still running" in stages["hangs"]["error"]
    assert stages["after"]["status"] == "cut"


def test_the_worker_runs_the_stages_named_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "stopwatch_for", lambda device: Fixed())
    gpu_check.save(tmp_path, {"stages": {"environment": {"status": "ok"}}})
    assert gpu_check.worker(["floors"], tmp_path, time.time() + 100) == 0
    stages = gpu_check.load(tmp_path)["stages"]
    assert [(name, entry["status"]) for name, entry in stages.items()] == [
        ("environment", "ok"),
        ("floors", "ok"),
    ]


def test_with_a_gpu_the_command_supervises_workers_and_reports_failure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    commands = []

    def supervise(names, out, deadline, command, patience):
        commands.append(command(names))
        assert deadline == pytest.approx(time.time() + 100, abs=10)
        assert patience("tests") > patience("kernels")
        results = gpu_check.load(out)
        results["stages"] = {"parity": {"status": "failed", "error": "StageError: 1 point failed"}}
        gpu_check.save(out, results)

    monkeypatch.setattr(gpu_check, "supervise", supervise)
    assert gpu_check.main(["--out", str(tmp_path), "--budget", "100", "--stages", "kernels,parity"]) == 1
    options = gpu_check.parse(commands[0][2:])
    assert (options.names, options.out, options.worker_deadline > 0) == (
        ["parity", "kernels"],
        tmp_path,
        True,
    )
    assert "StageError: 1 point failed" in capsys.readouterr().out
    assert "StageError: 1 point failed" in (tmp_path / "summary.md").read_text()
