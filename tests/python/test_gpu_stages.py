"""What gpu_check's stages do, on a CPU with our kernels interpreted, and the tables made of their rows."""

from __future__ import annotations

import re
import sys
import time

import pytest
import torch

from benchmarks.cases import baselines, machine
from benchmarks.figures import gpu_report
from gpu import run as gpu_run
from gpu import stages as gpu_stages
from gpu.run import Run, StageError
from gpu_fakes import TINY
from inception_fused import Inception
from inception_fused.op import backends
from inception_fused.plan.cards import Ceilings
from inception_fused.plan.launches import NAMES
from inception_fused.tools.timing import Timing
from marks import full


@pytest.fixture
def no_gate(monkeypatch):
    """Parity has tests of its own; here it would take most of the time."""
    monkeypatch.setattr(Run, "gate", lambda *_, **__: None)


@pytest.fixture
def graph_on_cpu(monkeypatch):
    """A graph whose replay computes the call again and writes into the same outputs."""

    def graphed(call):
        outputs = call()
        return lambda: [out.copy_(new) for out, new in zip(outputs, call(), strict=True)], outputs

    monkeypatch.setattr(gpu_run, "graphed", graphed)


def test_a_failing_point_is_recorded_and_the_next_one_runs(run):
    points = TINY.points(("forward", "training", "graph"))

    def work(point):
        if point.mode == "training":
            raise ValueError("wrong output")
        if point.mode == "graph":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")
        return [{"us": 1.0, "host_us": None, "spread": 0.0, "calls": 10}]

    with pytest.raises(StageError, match="1 of 3 points failed"):
        run.each(points, work, seconds=1)
    forward, training, graph = run.stage["rows"]
    assert (forward["block"], forward["batch"], forward["us"]) == ("5a", 2, 1.0)
    assert "ValueError: wrong output" in training["error"]
    assert graph["skipped"] == "out of memory: CUDA out of memory. Tried to allocate 9 GiB"


def test_a_budget_cuts_points_and_says_how_many(run):
    def slow(_):
        run.deadline = time.time() + 1
        return [{}]

    run.each(TINY.points(("forward", "training", "graph")), slow, seconds=5)
    assert len(run.stage["rows"]) == 1
    assert run.stage["cut"] == 2


def test_a_point_that_cannot_fit_is_skipped_with_the_figure(run, monkeypatch):
    monkeypatch.setattr(run, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 10, 1 << 30))
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    run.each(TINY.points(("forward",)), pytest.fail, seconds=1)
    assert re.fullmatch(r"needs about \d+\.\d GiB, 0\.0 GiB are free", run.stage["rows"][0]["skipped"])


def test_measured_ceilings_replace_the_reference(run):
    assert run.ceilings() is gpu_run.H200
    figures = {"bandwidth": 1e12, "bf16": 2e14, "tf32": 1e14, "empty_us": 2.0, "device": "a card"}
    run.results["stages"]["ceilings"] = {"figures": figures}
    found = run.ceilings()
    assert (found.name, found.bandwidth, found.flops["fp16"]) == ("a card, measured", 1e12, 2e14)
    assert (found.flops["tf32"], found.multiprocessors, found.launch) == (1e14, 132, 1.3e-6)
    # A card that explain() has looked at, without switching to TF32.
    found = Ceilings.measured("a card", {"bandwidth": 1e12, "bf16": 2e14, "launch_us": 2.5, "multiprocessors": 80})
    assert (found.flops["tf32"], found.multiprocessors, found.launch) == (1e14, 80, pytest.approx(2.5e-6))
    gpu_stages.floors(run)
    assert run.stage["figures"]["tables"][0].startswith("a card, measured: 1.00 TB/s, 67 TFLOP/s fp32")


def test_the_gate_is_parity_with_our_kernels_once_per_point(run, monkeypatch):
    from inception_fused import testing

    asked = []

    def assert_parity(module, x, *, backward):
        asked.append((backends.current(), tuple(x.shape), module.p2_2.weight.stride(1), backward))

    monkeypatch.setattr(testing, "assert_parity", assert_parity)
    forward, training = TINY.points(("forward", "training"))
    run.gate(forward, torch.contiguous_format, backward=False)
    run.gate(training, torch.contiguous_format, backward=False)
    run.gate(training, torch.channels_last, backward=True)
    assert asked == [("kernels", (2, 16, 2, 2), 9, False), ("kernels", (2, 16, 2, 2), 1, True)]


def test_parity_on_the_cpu(run, monkeypatch):
    """The usual block in each dtype, what else there is in one."""
    points = gpu_stages.parity_points(TINY)
    few = [point for point in points if point.branch3 == (5,) or point.dtype == "bf16"]
    monkeypatch.setattr(gpu_stages, "parity_points", lambda matrix: few)
    gpu_stages.parity(run)
    assert [(row["block"], row["dtype"], row["batch"]) for row in run.stage["rows"]] == [
        *(("5a", dtype, 1) for dtype in ("bf16", "tf32", "fp16")),
        *(("5a two-3x3", "bf16", 1), ("5a two-3x3 without ReLU", "bf16", 1), ("odd two-3x3", "bf16", 2)),
        *((name, dtype, batch) for dtype in ("bf16", "tf32", "fp16") for name, batch in (("stem", 1), ("odd stem", 2))),
    ]
    assert {(point.label, point.dtype) for point in points} == {
        (label, dtype)
        for label in ("5a", "5a two-3x3", "5a two-3x3 without ReLU", "odd two-3x3", "stem", "odd stem")
        for dtype in ("bf16", "tf32", "fp16")
    }
    assert all(row["value"].startswith("ok") for row in run.stage["rows"])


@full
def test_blocks_baselines_and_kernels_on_the_cpu(run, no_gate, graph_on_cpu, monkeypatch):
    """The real stage functions; our kernels run in Triton's interpreter, once per figure."""

    def measure(call, stopwatch, seconds):
        call()
        return Timing(us=8.0, spread=0.0, host_us=4.0, calls=1)

    monkeypatch.setattr(gpu_run, "measure", measure)
    for function in (gpu_stages.baselines, gpu_stages.blocks, gpu_stages.kernels):
        function(run)
    rows = run.stage["rows"]
    labels = [row.get("implementation") or row["kernel"] for row in rows]
    launched = ["pack", "K1+K2", "K3+K4", *NAMES["backward"]]
    assert labels == ["eager"] * 3 + ["ours"] * 3 + launched
    assert [row["mode"] for row in rows[:6]] == ["forward", "training", "graph"] * 2
    assert [row["weights"] for row in rows] == ["channels_last"] * 6 + ["KCRS"] * len(launched), (
        "pack is only in the latter"
    )
    assert all((row["us"], row["host_us"], row["spread"]) == (8.0, 4.0, 0.0) for row in rows)
    # M = 2 * 2 * 2 rows, 16 channels: K1 to 8 + 8 + 8, K2 to 8.
    both = rows[7]
    assert both["tflops"] == pytest.approx(2 * 8 * 16 * (24 + 8) / 8e-6 / 1e12)
    assert both["gbs"] == pytest.approx(4 * (8 * (16 + 24) + 16 * 24 + 8 * (16 + 8) + 16 * 8) / 8e-6 / 1e9)
    assert both["x_floor"] == pytest.approx(8.0 / both["floor_us"])
    # pack multiplies nothing, but moves the parameters.
    assert "tflops" not in rows[6]
    assert all("floor_us" in row for row in rows[6:])
    # B3: 8 + 8 + 8 channels to 16.
    b3 = next(row for row in rows if row.get("kernel") == "B3")
    assert b3["tflops"] == pytest.approx(2 * 8 * 16 * 24 / 8e-6 / 1e12)
    launched = [{"dtype": "tf32", "batch": 2, "block": "3a"} | row for row in rows[6:]]
    results = {"stages": {"kernels": {"rows": launched}}}
    made = {name: [row["kernel"] for row in launched if row["pass"] == name] for name in gpu_report.NAMES}
    for direction, kernels in made.items():
        table = gpu_report.kernel_table(results, direction)
        assert [f"{kernel} us (x floor)" in table for kernel in kernels] == [True] * len(kernels)
        assert table.count("8.0 (") >= len(kernels) - 1
    lines = [line.split(" | ") for line in gpu_report.forecast_table(results).splitlines()[2:]]
    names = [f"{name} {direction}" for direction, kernels in made.items() for name in kernels]
    assert [line[2].strip() for line in lines] == names
    for line, row in zip(lines, launched, strict=True):
        assert row["predicted_us"] > row.get("floor_us", 0.0)
        assert (line[5].strip(), line[6].strip()) == (f"{row['predicted_us']:.1f}", "8.0")
        assert line[7].strip(" |") == f"{8.0 / row['predicted_us']:.2f}"
        assert line[8].strip(" |") == row["bound"]


def test_a_wrong_output_reports_no_time(run, no_gate, monkeypatch):
    class Wrong(Inception):
        def forward(self, x):
            return super().forward(x) * 1.5

    monkeypatch.setattr("inception_fused.FusedInception", Wrong)
    monkeypatch.setattr(gpu_run, "measure", lambda *_, **__: pytest.fail("timed a wrong kernel"))
    monkeypatch.setattr(gpu_stages, "MODES", ("forward", "training"))
    with pytest.raises(StageError, match="2 of 2 points failed"):
        gpu_stages.blocks(run)
    assert "the output is 0.5 off in relative norm" in run.stage["rows"][0]["error"]
    assert all("us" not in row for row in run.stage["rows"])


def test_a_failed_gate_reports_no_kernel_times(run, monkeypatch):
    def gate(*_, **__):
        raise AssertionError("K2 is wrong")

    monkeypatch.setattr(Run, "gate", gate)
    for function in (gpu_stages.parity, gpu_stages.kernels, gpu_stages.blocks):
        run.stage.clear()
        with pytest.raises(StageError, match="points failed"):
            function(run)
        blocks = [row for row in run.stage["rows"] if "stem" not in row["block"]]
        assert blocks
        assert all("K2 is wrong" in row["error"] for row in blocks)


def test_nan_agrees_with_nothing():
    one = torch.ones(3)
    baselines.assert_agree("same", [one], [one])
    with pytest.raises(AssertionError, match="the output is nan off"):
        baselines.assert_agree("nan", [one * float("nan")], [one])
    with pytest.raises(AssertionError, match=r"gradient 1 is 0\.2 off"):
        baselines.assert_agree("off", [one, one * 1.2], [one, one])


def test_every_implementation_of_a_point_gets_the_same_weights_and_inputs():
    point = TINY.points(("training",))[0]
    a, b = (baselines.build(Inception, point, "cpu", f) for f in (torch.channels_last, torch.contiguous_format))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert a.p2_2.weight.is_contiguous(memory_format=torch.channels_last)
    (x, dy), (x2, dy2) = (
        baselines.operands(point, "cpu"),
        baselines.operands(point, "cpu", torch.contiguous_format),
    )
    assert torch.equal(x, x2)
    assert torch.equal(dy, dy2)
    baselines.assert_agree(
        "layouts", baselines.call_of(a, x, dy, "training")(), baselines.call_of(b, x2, dy2, "training")()
    )


def test_tensor_core_settings_are_put_back():
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    with baselines.tensor_core_settings():
        assert torch.backends.cudnn.benchmark
        assert torch.get_float32_matmul_precision() == "high"
    assert (torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()) == before


@pytest.mark.parametrize(
    ("code", "output", "message"),
    [
        (0, "12 passed, 300 deselected in 4.2s", None),
        (1, "1 failed, 11 passed in 4.2s", "exit code 1"),
        (5, "312 deselected in 1.0s", "no test marked gpu"),
        (0, "12 skipped, 300 deselected in 1.0s", "passed no test"),
        (None, "....", "no result after"),
    ],
)
def test_the_tests_stage_reads_pytests_result(run, monkeypatch, code, output, message):
    monkeypatch.setattr(gpu_stages, "run_command", lambda command, limit, log: (code, output))
    if message is None:
        gpu_stages.tests(run)
        assert run.stage["figures"] | {"passed": 12, "deselected": 300} == run.stage["figures"]
    else:
        with pytest.raises(StageError, match=message):
            gpu_stages.tests(run)
    assert run.stage["figures"]["exit_code"] == code


def test_commands_run_without_the_interpreter_and_are_killed_in_time(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    show = "import os; print(os.environ.get('TRITON_INTERPRET'), os.environ.get('GIVEN'))"
    given = {"GIVEN": "2"}
    assert gpu_run.run_command([sys.executable, "-c", show], 30, tmp_path / "log", given) == (0, "None 2\n")
    hang = "import time; print('begun', flush=True); time.sleep(60)"
    assert gpu_run.run_command([sys.executable, "-c", hang], 2, tmp_path / "log") == (None, "begun\n")


def test_the_hash_is_of_the_kernel_sources(tmp_path):
    kernels = tmp_path / "inception_fused" / "kernels"
    (kernels / "__pycache__").mkdir(parents=True)
    (kernels / "a.py").write_text("x")
    before = machine.sources_hash(tmp_path)
    (kernels / "__pycache__" / "a.pyc").write_text("compiled")
    (tmp_path / "inception_fused" / "module.py").write_text("y")
    assert machine.sources_hash(tmp_path) == before
    (kernels / "a.py").write_text("z")
    assert machine.sources_hash(tmp_path) != before


def row(stage_name, block, us, **more):
    common = {
        "block": block,
        "batch": 1,
        "dtype": "bf16",
        "mode": "forward",
        "host_us": 3.0,
        "spread": 0.01,
    }
    return {**common, "us": us, "floor_us": 1.0, "x_floor": us, "implementation": stage_name, **more}


def test_summary_gives_ratios_of_sums_and_the_worst_block():
    kernels = [row(None, "3a", 4.0, kernel="K1"), row(None, "3b", 2.0, kernel="K1")]
    failed = {
        "block": "3a",
        "batch": 1,
        "dtype": "bf16",
        "mode": "graph",
        "error": "Traceback\nKernelError: x",
    }
    results = {
        "stages": {
            "baselines": {"status": "ok", "rows": [row("eager", "3a", 9.0), row("eager", "3b", 3.0)]},
            "kernels": {"status": "ok", "rows": kernels},
            "blocks": {
                "status": "failed",
                "rows": [row("ours", "3a", 2.0), row("ours", "3b", 4.0), failed],
            },
            "compile": {"status": "cut", "cut": 8, "rows": [row("compile", "3a", 3.0)]},
        }
    }
    text = gpu_report.summary(results)
    squeezed = re.sub(" +", " ", text)
    assert "| bf16 | 1 | forward | 2 | 12.0 | | 6.0 | 2.00 | | 3.00 | 0.75 | 6.0 | 6.0 |" in squeezed
    assert "| bf16 | 1 | sum of 2 | | 6.0 (3.00) |" in squeezed
    assert "| blocks | failed | 0.0 | 3 rows; 1 failed |" in squeezed
    assert "| compile | cut | 0.0 | 1 rows; 8 cut by the budget |" in squeezed
    assert "| bf16 | 1 | forward | 3b | ours | 4.0 | 1.0% | 3.0 | | 4.00 |" in squeezed
    assert "ceilings not measured in this run" in text
    assert len(gpu_report.summary(results, compact=True)) < len(text)


def test_summary_of_nothing():
    assert gpu_report.summary({"stages": {}}) == "no figures\n"
    timed = {"us": 1.0, "weights": "KCRS", "dtype": "bf16", "batch": 1, "block": "3a", "kernel": "K1"}
    assert gpu_report.WEIGHTS in gpu_report.summary({"stages": {"kernels": {"status": "ok", "rows": [timed]}}})
