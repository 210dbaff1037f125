"""The goals: which cases sum up to a scenario, and when a bar is reached."""

from __future__ import annotations

import pytest

from benchmarks.figures.goals import NINE, SCENARIOS, YARDSTICKS, Bar, Outcome, evaluate
from benchmarks.figures.report_tables import goal_outcome, goals_table, verdict, yardsticks_table
from benchmarks.figures.result_files import load
from result_fakes import gpu_check_file, nine, record, row, suite_file

INFERENCE = next(s for s in SCENARIOS if s.name == "inference, batch 128, bf16")
GRAPH = next(s for s in SCENARIOS if s.name == "inference, batch 1, bf16, CUDA graph")
SMALL = next(s for s in SCENARIOS if "96x96" in s.name)
KERNELBENCH = next(s for s in SCENARIOS if s.suite == "kernelbench6")


def measured(tmp_path, *groups, **options):
    return load(suite_file(tmp_path / "a.json", [r for group in groups for r in group], **options))


def table_row(text, name):
    return [cell.strip() for line in text.splitlines() if line.startswith(f"| {name} ") for cell in line.split("|")]


def test_a_scenario_sums_the_nine_blocks_of_its_own_point(tmp_path):
    others = (
        nine("ours", 1, batch=32), nine("ours", 1, image=96), nine("ours", 1, dtype="tf32"),
        nine("ours", 1, mode="training"), [record("GoogLeNet", us=1, suite="network")],
    )  # fmt: skip
    found = measured(tmp_path, nine("ours", 450, floor_us=40.0), nine("eager", 1800), nine("compile", 1000), *others)
    outcome = evaluate(INFERENCE, found.cases)
    assert (outcome.us, outcome.eager, outcome.compile, outcome.floor) == pytest.approx((450, 1800, 1000, 360))


def test_the_best_compile_is_that_of_each_block(tmp_path):
    modes = nine("compile", 900), nine("compile_max_autotune", 1800)
    fast = [record("5b", "compile_reduce_overhead", 40)]
    outcome = evaluate(INFERENCE, measured(tmp_path, nine("ours", 450), *modes, fast).cases)
    assert outcome.compile == pytest.approx(840)


def test_a_graph_is_compared_with_eager_by_launches(tmp_path):
    one = {"batch": 1}
    found = measured(tmp_path, nine("ours_graph", 60, **one), nine("ours", 90, **one), nine("eager", 1200, **one))
    outcome = evaluate(GRAPH, found.cases)
    assert (outcome.us, outcome.eager) == pytest.approx((60, 1200))


def test_gpu_check_fills_the_same_scenarios(tmp_path):
    def rows(name, us, **more):
        return [row(block, name, us, **more) for block in NINE]

    graph = rows("ours", 7, mode="graph", batch=1)
    found = load(
        gpu_check_file(
            tmp_path / "results.json", baselines=rows("eager", 200) + rows("eager", 130, batch=1),
            blocks=rows("ours", 50, floor_us=40.0) + graph, compile=rows("compile", 90),
        )
    )  # fmt: skip
    assert evaluate(INFERENCE, found.cases) == Outcome(450.0, 1800, 810, 360.0)
    assert evaluate(GRAPH, found.cases) == Outcome(63, 1170, None, None)


def test_blocks_that_are_missing_are_named(tmp_path):
    found = measured(tmp_path, nine("ours", 450)[2:], nine("eager", 1800))
    assert evaluate(INFERENCE, found.cases).missing == "3a, 3b not measured"
    assert table_row(goals_table([found]), INFERENCE.name)[2:5] == [
        "3a, 3b not measured", "2.8 / 1.9, 1.75 x floor, 625 us", "not measured",
    ]  # fmt: skip
    assert evaluate(SMALL, found.cases).missing == "not measured"


def test_kernelbench_is_one_case_of_any_image(tmp_path):
    point = {"suite": "kernelbench6", "batch": 10, "dtype": "tf32", "size": 224}
    found = measured(tmp_path, [record("4a", us=1400, floor_us=950.0, **point), record("4a", "eager", 8000, **point)])
    outcome = evaluate(KERNELBENCH, found.cases)
    assert (outcome.us, outcome.eager, outcome.compile) == (1400, 8000, None)
    cells = table_row(goals_table([found]), KERNELBENCH.name)
    assert cells[2] == "5.71 / -, 1.47 x floor, 1400 us"
    assert (cells[4], cells[6]) == ("open: x compile", "open: x compile")


BAR = Bar(2.0, 1.5, floor=1.75, us=600)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ((600, 1200, 900, 343), "reached"),
        ((601, 1300, 910, 400), "missed: us"),
        ((600, 1199, 900, 400), "missed: x eager"),
        ((600, 1200, 899, 400), "missed: x compile"),
        ((600, 1200, 900, 340), "missed: x floor"),
        ((600, 1200, None, 400), "open: x compile"),
        ((600, None, 900, None), "open: x eager, x floor"),
        ((600, 1199, 899, None), "missed: x eager, x compile"),
        ((None, None, None, None), "not measured"),
    ],
)
def test_a_bar_is_reached_by_every_figure_that_it_names(figures, said):
    assert verdict(Outcome(*figures), Bar(2.0, 1.5, floor=1.75, us=600)) == said
    assert verdict(Outcome(6000, 12000, 9000), Bar(2, 1.5)) == "reached"


def test_the_table_marks_gate_and_moonshot(tmp_path):
    found = measured(tmp_path, nine("ours", 500, floor_us=39.7), nine("eager", 1500), nine("compile", 1000))
    cells = table_row(goals_table([found]), INFERENCE.name)
    assert cells[2:7] == [
        "3.00 / 2.00, 1.40 x floor, 500 us", "2.8 / 1.9, 1.75 x floor, 625 us", "reached", "4 / 2.5, 485 us",
        "missed: x eager, x compile, us",
    ]  # fmt: skip
    assert len(goals_table([]).splitlines()) == 2 + len(SCENARIOS) == 11


def test_a_cpu_has_no_say(tmp_path):
    cpu = measured(tmp_path, nine("ours", 450, device="cpu"), nine("eager", 1800, device="cpu"), gpu=None)
    assert goal_outcome(INFERENCE, [cpu]) == (Outcome(None, missing="not measured"), None)
    assert table_row(goals_table([cpu]), INFERENCE.name)[2] == "not measured"


def test_each_scenario_is_of_the_first_file_that_has_all_of_it(tmp_path):
    part = measured(tmp_path, nine("ours", 90)[1:])
    whole = load(gpu_check_file(tmp_path / "results.json", blocks=[row(block, us=10) for block in NINE]))
    outcome, source = goal_outcome(INFERENCE, [part, whole])
    assert (outcome.us, source) == (90, whole)


def test_public_yardsticks_stand_beside_what_was_measured(tmp_path):
    point = {"suite": "kernelbench6", "batch": 10, "dtype": "tf32", "size": 224}
    records = [record("4a", name, us, **point) for name, us in (("ours", 1400), ("eager", 7000), ("compile", 3500))]
    lines = yardsticks_table([measured(tmp_path, records)]).splitlines()[2:]
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in lines]
    assert rows == [
        ["H100 SXM, public", "8.74", "7.17", "", "", ""],
        ["B200, public", "6.07", "3.58", "", "", ""],
        ["NVIDIA H200, tf32, batch 10", "7.00", "3.50", "1.40", "5.00", "2.50"],
        ["H100 SXM, public", "1.75", "0.99", "", "", ""],
        ["B200, public", "5.33", "0.97", "", "", ""],
        ["here", "not measured", "", "", "", ""],
    ]
    assert len(YARDSTICKS) == 2
