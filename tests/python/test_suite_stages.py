"""gpu_check's stages around the measurements, with what they call replaced by fakes."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import report
from benchmarks.figures import readme
from benchmarks.figures.pictures import MissingLibraryError
from checks.device import DeviceLostError
from gpu import stages as gpu_stages
from gpu import suite_stages
from gpu.run import StageError
from inception_fused.op import reasons
from inception_fused.plan.rules import MAX_BINARIES
from inception_fused.runtime import native
from inception_fused.tools import measured


@pytest.fixture
def commands(monkeypatch):
    """Commands that were run, as (command, limit); ``answer`` is what they return."""

    class Commands(list):
        answer = (0, "12 passed, 3 skipped in 60.00s")

        def run(self, command, limit, log, environment=None):
            self.append((command, limit))
            return self.answer

    found = Commands()
    monkeypatch.setattr(suite_stages, "run_command", found.run)
    return found


def test_the_suite_gets_its_share_of_the_budget(run, commands):
    suite_stages.suite(run)
    ((command, limit),) = commands
    inner = float(command[command.index("--time-limit") + 1])
    assert inner + suite_stages.SUITE_END_S == pytest.approx(limit, abs=1)
    assert limit <= run.remaining() * suite_stages.SUITE_SHARE + 1
    assert f"--benchmark-json={run.out / 'benchmark.json'}" in command
    assert run.stage["figures"] == {"exit_code": 0, "passed": 12, "skipped": 3, "json": None}


@pytest.mark.parametrize(
    ("answer", "words"),
    [((1, "1 failed, 2 passed"), "exit code 1: a wrong output"), ((None, ""), "did not end within")],
)
def test_a_suite_that_fails_fails_the_stage(run, commands, answer, words):
    commands.answer = answer
    with pytest.raises(StageError, match=words):
        suite_stages.suite(run)


def test_a_suite_without_time_is_cut(run, commands):
    run.deadline -= 980
    suite_stages.suite(run)
    assert not commands
    assert run.stage["cut"] == 1


def figures(**changes):
    found = dict.fromkeys(("groups", "winners", "rejected", "refused", "failed"), ())
    found |= {"gpu": "Fake", "path": "table.json", "problems": 2, "timed": 2, "cut": 0, "ended": None, "timings": 4}
    return found | {"seconds": 1.0, "gain": 0.1, "device_lost": False} | changes


@pytest.mark.parametrize(
    "found",
    [
        figures(),
        figures(cut=1, ended="budget spent"),
        figures(failed=["K1: wrong"]),
        figures(device_lost=True, ended="illegal address"),
    ],
)
def test_tuning_gets_its_share_and_its_tables_hold_at_once(run, monkeypatch, found):
    forgotten, budgets = [], []
    monkeypatch.setattr(suite_stages.replay, "forget", lambda: forgotten.append("launches"))
    monkeypatch.setattr(suite_stages.tuned, "forget", lambda: forgotten.append("tables"))

    def fake(budget_s, on_progress):
        budgets.append(budget_s)
        on_progress(1, 2, "K1")
        return found

    monkeypatch.setattr("tuner.session.tune", fake)
    if found["failed"] or found["device_lost"]:
        kind, words = (StageError, "1 problems failed: K1: wrong") if found["failed"] else (DeviceLostError, "illegal")
        with pytest.raises(kind, match=words):
            suite_stages.tune(run)
    else:
        suite_stages.tune(run)
    assert budgets[0] == pytest.approx(run.remaining() * suite_stages.TUNE_SHARE, rel=0.05)
    assert sorted(forgotten) == ["launches", "tables"]
    assert run.stage["figures"] == found
    assert run.stage.get("cut", 0) == found["cut"]


class FakeLaunch:
    def __init__(self, error=None):
        self.error = error

    def compile(self):
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ("error", "built", "obstacle", "words"),
    [
        (None, True, None, None),
        (None, False, "was not built: no nvcc", None),
        (None, True, "no kernel image for sm_75", "built, but cannot run: no kernel image"),
        (RuntimeError("PTX"), True, None, "3 binaries do not compile: RuntimeError: PTX"),
    ],
)
def test_what_is_built(run, monkeypatch, error, built, obstacle, words):
    """A missing extension is no failure: every kernel has a Triton form."""
    from checks import launches as network

    launches = [("3a", FakeLaunch()), ("3a", FakeLaunch(error)), ("3b", FakeLaunch())]
    monkeypatch.setattr(network, "googlenet_launches", lambda dtype, capability: launches)
    monkeypatch.setattr("inception_fused.runtime.launch.binary_key", id)
    monkeypatch.setattr(native, "facts", lambda: {"built": built})
    monkeypatch.setattr(native, "why_no_extension", lambda device: obstacle)
    if words:
        with pytest.raises(StageError, match=words):
            suite_stages.build(run)
    else:
        suite_stages.build(run)
    assert {name: found["count"] for name, found in run.stage["figures"]["binaries"].items()} == {
        "bf16": 3, "tf32": 3, "fp16": 3,
    }  # fmt: skip


def test_every_binary_of_the_network_is_compiled_once(monkeypatch):
    """And they are few; see test_aot.py."""
    from inception_fused.runtime import launch

    compiled = []
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    monkeypatch.setattr(launch.Launch, "compile", lambda self: compiled.append(self))
    found = suite_stages.compile_network(torch.bfloat16)
    assert found["count"] == len(compiled) <= MAX_BINARIES
    assert found["failed"] == []


@pytest.mark.parametrize("gpu", ["NVIDIA H200 NVL", None])
def test_the_report_of_a_gpu_is_kept(run, monkeypatch, tmp_path, gpu):
    results, record = tmp_path / "results", tmp_path / "measured.json"
    monkeypatch.setattr(suite_stages, "RESULTS", results)
    monkeypatch.setattr(suite_stages, "ROOT", tmp_path)
    monkeypatch.setattr(measured, "RECORD", record)
    seen = []

    def update(root, results):
        assert (results / "nvidia_h200_nvl" / "results.json").is_file()
        seen.append("README.md")
        return ["README.md: rewritten"]

    def fake(arguments):
        seen.append(arguments)
        (run.out / "report.md").write_text("# Measured")
        return 0

    monkeypatch.setattr(report, "main", fake)
    monkeypatch.setattr(readme, "update_readme", update)
    (run.out / "tests.log").write_text("long")
    run.results["stages"]["environment"] = {"figures": {"gpu": gpu, "commit": "c" * 40, "dirty": False}}
    run.save()
    suite_stages.report(run)
    assert seen[0] == [str(run.out / "results.json"), "--out", str(run.out)]
    assert seen[1:] == (["README.md"] if gpu else [])
    if gpu is None:
        assert not results.exists()
        assert not record.exists()
        return
    folder = results / "nvidia_h200_nvl"
    assert sorted(path.name for path in folder.iterdir()) == ["report.md", "results.json"]
    assert json.loads((folder / "results.json").read_text())["stages"]["test"]["status"] == "ok"
    found = measured.facts()
    assert (found["gpu"], found["commit"], found["changed"]) == (gpu, "c" * 40, False)
    assert "have not changed since" in measured.describe(found)
    record.write_text(record.read_text().replace('"kernel_sources": "', '"kernel_sources": "0'))
    assert "have changed since" in measured.describe(measured.facts())
    record.write_text("{")
    assert measured.describe(measured.facts()).startswith("never on a GPU")


def test_a_report_that_fails_fails_the_stage(run, monkeypatch):
    monkeypatch.setattr(report, "main", lambda arguments: 2)
    with pytest.raises(StageError, match="exit code 2"):
        suite_stages.report(run)


def test_without_matplotlib_the_readme_waits(run, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(suite_stages, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(suite_stages, "ROOT", tmp_path)
    monkeypatch.setattr(measured, "RECORD", tmp_path / "measured.json")
    monkeypatch.setattr(report, "main", lambda arguments: 0)

    def update(root, results):
        raise MissingLibraryError("matplotlib is not installed")

    monkeypatch.setattr(readme, "update_readme", update)
    run.results["stages"]["environment"] = {"figures": {"gpu": "NVIDIA H200"}}
    suite_stages.report(run)
    assert "README.md is as it was: matplotlib is not installed" in capsys.readouterr().out


def test_the_report_is_the_last_stage_and_needs_no_gpu():
    assert gpu_stages.STAGES[-1].name == "report"
    assert not gpu_stages.STAGES[-1].needs_gpu
    names = [stage.name for stage in gpu_stages.STAGES]
    assert names.index("tests") < names.index("tune") < names.index("suite")
