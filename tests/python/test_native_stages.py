"""gpu_check's stage that compares both forms of K1 and B3, without a GPU: what is timed, refused and concluded."""

from __future__ import annotations

import re

import pytest

import gpu_check
from benchmarks.figures import gpu_report
from gpu import native_stage, sanitizer_stage
from gpu.run import StageError
from gpu.stages import STAGES
from inception_fused.op import reasons
from inception_fused.plan import choice
from inception_fused.runtime import native
from inception_fused.tools.timing import Timing


def test_without_the_extension_both_stages_fail(run, monkeypatch):
    monkeypatch.setattr(native, "why_no_extension", lambda device: "it was not built: no nvcc; install one")
    for function, words in (
        (sanitizer_stage.sanitizer, "nothing was checked"),
        (native_stage.native, "nothing was comp"),
    ):
        run.stage["rows"] = []
        with pytest.raises(StageError, match=words):
            function(run)
        assert [row["skipped"] for row in run.stage["rows"]] == ["it was not built: no nvcc; install one"]


def test_the_native_stage_times_both_forms_at_every_point(run, loads, monkeypatch):
    """In the real stage; both forms are the interpreted Triton kernel here."""
    checked = native_stage.checked_launch
    monkeypatch.setattr(
        native_stage, "checked_launch", lambda point, kernel, form, device: checked(point, kernel, "triton", device)
    )
    times = iter([10.0, 8.0, 6.0, 9.0] * 3)
    monkeypatch.setattr(
        native_stage,
        "measure",
        lambda call, *_, **__: Timing(us=next(times), spread=0.0, host_us=1.0, calls=call() or 1),
    )
    native_stage.native(run)
    rows = run.stage["rows"]
    assert [(row["dtype"], row["kernel"], row["implementation"]) for row in rows] == [
        (dtype, kernel, form)
        for dtype in ("bf16", "tf32", "fp16") for kernel in ("K1", "B3") for form in ("native", "triton")
    ]  # fmt: skip
    assert all(row["x_floor"] == pytest.approx(row["us"] / row["floor_us"]) for row in rows)
    assert run.stage["figures"]["routes"]["B3"]["ratio"] == pytest.approx(1.5)
    found = run.stage["figures"]["routes"]["K1"]
    assert [(s["dtype"], s["batch"], s["ratio"]) for s in found["sets"]] == [
        ("bf16", 2, 0.8), ("tf32", 2, 0.8), ("fp16", 2, 0.8)
    ]  # fmt: skip
    assert (found["faster"], found["verdict"]) == ("triton", None)


def test_a_wrong_gradient_is_not_timed(run, loads, monkeypatch):
    """K1 is right, B3 writes nothing."""
    from inception_fused.runtime.launch import Launch

    monkeypatch.setattr(reasons, "MACHINE", ())
    monkeypatch.setattr(native_stage, "FORMS", ("triton",))
    monkeypatch.setattr(choice, "COMPILED", ("B3",))
    monkeypatch.setattr(native_stage, "measure", lambda *_, **__: pytest.fail("timed a wrong kernel"))
    launch = Launch.run
    monkeypatch.setattr(Launch, "run", lambda self: None if "grouped_dgrad" in self.describe() else launch(self))
    with pytest.raises(StageError, match="3 of 3 points failed"):
        native_stage.native(run)
    assert "B3 triton, 5a batch 2 bf16 forward: gradient of x" in run.stage["rows"][0]["error"]


def test_a_wrong_form_is_not_timed(run, loads, monkeypatch):
    from inception_fused.runtime.launch import Launch

    monkeypatch.setattr(reasons, "MACHINE", ())
    monkeypatch.setattr(native, "grouped_gemm", lambda *_, **__: pytest.fail("nothing native can run here"))
    monkeypatch.setattr(native_stage, "FORMS", ("triton",))
    monkeypatch.setattr(native_stage, "measure", lambda *_, **__: pytest.fail("timed a wrong kernel"))
    monkeypatch.setattr(Launch, "run", lambda self: None)
    with pytest.raises(StageError, match="3 of 3 points failed"):
        native_stage.native(run)
    assert "K1 triton, 5a batch 2 bf16 forward: y1" in run.stage["rows"][0]["error"]
    assert run.stage["figures"]["routes"]["K1"]["ratio"] is None


def row(form, block, us, dtype="bf16", batch=128):
    return {
        "implementation": form, "kernel": "K1", "block": block, "dtype": dtype, "batch": batch, "mode": "forward",
        "us": us, "host_us": 1.0, "spread": 0.0, "floor_us": 2.0, "x_floor": us / 2,
    }  # fmt: skip


ROWS = [
    row("native", "3a", 4.0), row("triton", "3a", 6.0), row("native", "3b", 8.0), row("triton", "3b", 12.0),
    row("native", "3a", 9.0, batch=1), row("triton", "3a", 6.0, batch=1), row("native", "3b", 9.0, batch=1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "scale", "faster", "verdict"),
    [
        ((9, 0), 1.0, "native", '"triton from sm_90" is contradicted'),
        ((8, 6), 1.0, "native", '"native from sm_80" is confirmed'),
        ((9, 0), 0.5, "triton", '"triton from sm_90" is confirmed'),
        ((12, 0), 2 / 3, "equal", '"native from sm_120" is neither confirmed nor contradicted: less than 2% apart'),
        ((7, 5), 1.0, "native", None),
        (None, 1.0, "native", None),
    ],
)
def test_what_the_times_say_of_the_routes(monkeypatch, capability, scale, faster, verdict):
    routes = (((8, 0), "native"), ((9, 0), "triton"), ((12, 0), "native"))
    monkeypatch.setattr(choice, "ROUTES", routes)
    rows = [r | {"us": r["us"] * scale} if r["implementation"] == "triton" else r for r in ROWS]
    found = native_stage.routes(rows, ["3a", "3b"], capability, "K1")
    assert [(s["dtype"], s["batch"], s["native_us"]) for s in found["sets"]] == [("bf16", 128, 12.0)], "whole sets only"
    assert found["ratio"] == pytest.approx(1.5 * scale)
    assert (found["faster"], found["verdict"]) == (faster, verdict)
    assert f"faster: {faster}" in native_stage.routes_table("K1", found)


def test_no_whole_set_gives_no_verdict():
    found = native_stage.routes(ROWS[:3], ["3a", "3b"], (9, 0), "K1")
    assert (found["sets"], found["ratio"], found["faster"], found["verdict"]) == ([], None, None, None)
    assert "no dtype and batch" in native_stage.routes_table("K1", found)


def test_small_and_large_batches_count_alike():
    rows = [row("native", "3a", 1.0, batch=1), row("triton", "3a", 2.0, batch=1)]
    rows += [row("native", "3a", 200.0), row("triton", "3a", 100.0)]
    assert native_stage.routes(rows, ["3a"], None, "K1")["faster"] == "equal"


def test_the_summary_shows_the_forms_side_by_side(monkeypatch):
    monkeypatch.setattr(choice, "ROUTES", (((8, 0), "native"),))
    found = native_stage.routes(ROWS, ["3a", "3b"], (9, 0), "K1")
    results = {"stages": {"native": {"status": "ok", "rows": ROWS, "figures": {"routes": {"K1": found}}}}}
    text = re.sub(" +", " ", gpu_report.summary(results))
    assert "| K1 | bf16 | 128 | 3a | 4.0 | 6.0 | 2.0 | 1.50 | 2.00 |" in text
    assert "| K1 | bf16 | 1 | 3a |" not in text
    assert "| K1 | bf16 | 128 | 12.0 | 18.0 | 1.500 |" in text
    assert 'K1, faster: native; choice.ROUTES: "native from sm_80" is confirmed' in text
    assert gpu_report.forms_table({"stages": {}}) == gpu_report.routes_table({"stages": {}}) == ""


def test_the_points_are_whole_sets_in_order():
    points = native_stage.native_points(gpu_check.FULL)
    assert len(points) == 81
    assert [(p.dtype, p.batch) for p in points[::9]] == [
        (dtype, batch) for dtype in ("bf16", "tf32", "fp16") for batch in (128, 1, 32)
    ]
    assert all(len({p.block for p in points[i : i + 9]}) == 9 for i in range(0, 81, 9))


def test_the_stages_have_their_places():
    names = [s.name for s in STAGES]
    assert names.index("parity") + 1 == names.index("sanitizer")
    assert names.index("kernels") + 1 == names.index("native")
    assert next(s for s in STAGES if s.name == "sanitizer").patience > 600
