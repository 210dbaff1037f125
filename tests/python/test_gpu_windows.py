"""gpu_check's stage of blocks with two 3x3 in branch 3: its points, its rows, and the tables made of them."""

from __future__ import annotations

import pytest

from benchmarks.figures import gpu_report
from benchmarks.figures.report_tables import gpu_check_tables, sums_table
from benchmarks.figures.result_files import load
from gpu import run as gpu_run
from gpu import stages as gpu_stages
from gpu.run import FULL, Run
from gpu.stages import STAGES
from gpu_fakes import TINY
from inception_fused import FusedInception
from inception_fused.plan.launches import NAMES, TABLES
from result_fakes import gpu_check_file, launch, row

WINDOWS = TABLES[7].names


def test_points_are_few_and_named():
    points = gpu_stages.window_points(FULL)
    assert {(point.block, point.batch, point.mode) for point in points} == {
        (block, batch, mode) for block in ("3a", "4e", "5b") for batch in (128, 1) for mode in ("forward", "training")
    }
    assert {(point.dtype, point.branch3, point.label) for point in points} == {
        ("bf16", (3, 3), f"{block} two-3x3") for block in ("3a", "4e", "5b")
    }
    assert [point.block for point in gpu_stages.window_points(TINY)] == ["5a", "5a"]
    odd = [point for point in gpu_stages.parity_points(FULL) if point.block == "odd"]
    assert {point.dtype for point in odd} == {"bf16", "tf32", "fp16"}
    assert all(point.config.in_channels % 2 and point.branch3 == (3, 3) for point in odd)


def test_rows_of_the_stage_on_the_cpu(run, timed, monkeypatch):
    """The real stage; our kernels interpreted, once per figure."""
    gates = []
    monkeypatch.setattr(Run, "gate", lambda _, point, layout, *, backward: gates.append((point.branch3, backward)))
    next(stage for stage in STAGES if stage.name == "two-3x3").run(run)
    rows = run.stage["rows"]
    labels = [row.get("implementation") or row["kernel"] for row in rows]
    forward = ["pack", "K1+K2", "K3+K4 first", "K4 second"]
    assert labels == ["eager", "ours", *forward, *WINDOWS["backward"], "eager", "ours"]
    assert {row["block"] for row in rows} == {"5a two-3x3"}
    assert [row["mode"] for row in rows[-2:]] == ["training"] * 2
    assert set(gates) == {((3, 3), True)}
    assert timed[1] == timed[-1] == "kernels"
    # K4's second: M = 2 * 2 * 2 rows, 16 channels in 9 taps to 16.
    second = next(row for row in rows if row.get("kernel") == "K4 second")
    assert second["tflops"] == pytest.approx(2 * 8 * 9 * 16 * 16 / 8e-6 / 1e12)
    assert all(row["predicted_us"] > 0 for row in rows if "kernel" in row)


def test_a_wrong_second_window_is_not_timed(run, monkeypatch):
    original = FusedInception.forward

    def spoilt(self, x):
        y = original(self, x)
        y[:, 24:40] *= 1.5
        return y

    monkeypatch.setattr(Run, "gate", lambda *_, **__: None)
    monkeypatch.setattr(FusedInception, "forward", spoilt)
    with pytest.raises(gpu_run.StageError, match="2 of 2 points failed"):
        gpu_stages.two_windows(run)
    assert all("us" not in row for row in run.stage["rows"])


def two_rows(us=10.0):
    names = [(name, direction) for direction, names in WINDOWS.items() for name in names]
    launches = [launch(name, us, block="3a two-3x3", predicted_us=9.0, **{"pass": d}) for name, d in names]
    return [row("3a two-3x3", "eager", 3 * us), row("3a two-3x3", "ours", us), *launches]


def test_tables_of_a_run_with_and_without_the_stage():
    usual = [row("3a", "eager", 30.0), row("3a", "ours", 20.0)]
    names = [(name, direction) for direction, names in NAMES.items() for name in names]
    kernels = [launch(name, 5.0, predicted_us=4.0, **{"pass": direction}) for name, direction in names]
    old = {"stages": {"blocks": {"status": "ok", "rows": usual}, "kernels": {"status": "ok", "rows": kernels}}}
    before = gpu_report.summary(old)
    assert "two 3x3" not in before
    assert "K4 first" not in before
    new = {"stages": old["stages"] | {"two-3x3": {"status": "ok", "rows": two_rows()}}}
    text = gpu_report.summary(new)
    first, second = text.split("Blocks of two 3x3 in branch 3:")
    for line in before.splitlines():
        assert line in text, "what was there has the same sums"
    assert "two-3x3" not in first.split("| dtype", 1)[1]
    for name in {name for names in WINDOWS.values() for name in names}:
        assert f"{name} us (x floor)" in second
    assert "| 3.00 " in second, "eager over ours"
    assert "K4 second forward" in second


def test_a_result_file_of_the_stage(tmp_path):
    path = tmp_path / "results.json"
    usual = [row("3a", "eager", 30.0), row("3a", "ours", 20.0)]
    gpu_check_file(path, blocks=usual, **{"two-3x3": two_rows()})
    measured = load(path)
    assert {(case.suite, case.subject, case.size, case.us("ours")) for case in measured.cases} == {
        ("block", "3a", 28, 20.0),
        ("two-3x3", "3a", 28, 10.0),
    }
    assert {r.subject for r in measured.records if r.suite == "kernel"} >= {"3a two-3x3 K4 first", "3a two-3x3 B5"}
    assert "3a two-3x3" in sums_table(measured.cases)
    assert any("K4 first us (x floor)" in text for text in gpu_check_tables(measured))
