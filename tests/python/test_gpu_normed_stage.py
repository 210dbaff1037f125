"""gpu_check's stage of blocks with BatchNorm in training: its points, its rows, and that what is wrong is not timed."""

from __future__ import annotations

import pytest

from benchmarks.figures import gpu_report
from benchmarks.figures.result_files import load
from gpu import normed_stage
from gpu import run as gpu_run
from gpu.run import FULL
from gpu.stages import STAGES
from inception_fused import testing
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS
from inception_fused.op import normed_operators
from inception_fused.plan.launches import NORMED_TABLES
from result_fakes import gpu_check_file, launch, row

NAMES = NORMED_TABLES[6].names


@pytest.fixture
def stage(monkeypatch):
    """The stage, without torch.compile."""
    monkeypatch.setattr(normed_stage, "compiled", lambda module: module)
    return next(stage for stage in STAGES if stage.name == "batch-norm").run


def test_points_are_the_nine_blocks_of_torchvision():
    points = normed_stage.normed_points(FULL)
    assert [point.block for point in points] == list(GOOGLENET_BLOCKS)
    assert {(p.batch, p.dtype, p.mode, p.branch3) for p in points} == {(128, "bf16", "training", (3,))}


def test_rows_of_the_stage_on_the_cpu(run, stage, timed):
    """The real stage; our kernels interpreted, once per figure."""
    stage(run)
    rows = run.stage["rows"]
    launches = [(row["pass"], row["kernel"]) for row in rows if "kernel" in row]
    halves = [(name, half) for name, kernel in launches for half in kernel.split("+")]
    # Weights are channels_last: a forward packs nothing.
    assert halves == [(name, kernel) for name, found in NAMES.items() for kernel in found][1:]
    assert [row["implementation"] for row in rows if "kernel" not in row] == ["eager", "ours", "compile"]
    assert timed[1] == "kernels"
    assert {(row["block"], row["mode"]) for row in rows} == {("5a batch-norm", "training")}
    assert all(row["us"] == 8.0 and row["predicted_us"] > 0 and row["floor_us"] > 0 for row in rows if "kernel" in row)


@pytest.mark.parametrize("where", ["parity", "step"])
def test_what_is_wrong_is_not_timed(where, run, stage, monkeypatch):
    """By the parity test, and without it beside eager."""
    plan, calls = normed_operators._planned, []

    def spoilt(call):
        y, *saved = plan(call)
        calls.append(y)
        return y * 1.5, *saved

    if where == "step":
        monkeypatch.setattr(testing, "assert_parity", lambda *_: None)
    monkeypatch.setattr(normed_operators, "_planned", spoilt)
    with pytest.raises(gpu_run.StageError, match="1 of 1 points failed"):
        stage(run)
    assert calls
    assert [list(row) for row in run.stage["rows"]] == [["block", "batch", "dtype", "mode", "error"]]
    assert ("branch 4: error 5.00e-01" if where == "parity" else "the output is 0.5 off") in run.stage["rows"][0][
        "error"
    ]


def test_tables_and_records_of_the_stage(tmp_path):
    names = [(name, direction) for direction, found in NAMES.items() for name in found]
    launches = [launch(n, 2.0, block="3a batch-norm", predicted_us=1.5, **{"pass": d}) for n, d in names]
    steps = [row("3a batch-norm", name, us, mode="training") for name, us in (("eager", 90.0), ("ours", 30.0))]
    text = gpu_report.summary({"stages": {"batch-norm": {"status": "ok", "rows": [*steps, *launches]}}})
    _, own = text.split("Blocks with BatchNorm in training:")
    assert "| 3.00 " in own, "eager over ours"
    for name in {name for name, _ in names}:
        assert f"{name} us (x floor)" in own
    path = tmp_path / "results.json"
    gpu_check_file(path, **{"batch-norm": [*steps, *launches]})
    measured = load(path)
    assert [(case.suite, case.subject, case.us("ours")) for case in measured.cases] == [("batch-norm", "3a", 30.0)]
    assert {r.subject for r in measured.records if r.suite == "kernel"} == {f"3a batch-norm {n}" for n, _ in names}
