"""report.py --compare: which points count as slower, and its exit codes."""

from __future__ import annotations

import pytest

from benchmarks import report
from benchmarks.figures.comparing import changes, comparison, geometric_mean
from benchmarks.figures.result_files import load
from result_fakes import gpu_check_file, launch, record, row, suite_file


def compare(tmp_path, before, after, *words, **options):
    files = [
        suite_file(tmp_path / "before.json", before),
        suite_file(tmp_path / "after.json", after, day=2, **options),
    ]
    return report.main(["--compare", *map(str, files), *words])


def test_exit_code_0_where_nothing_got_slower(tmp_path, capsys):
    both = [record("3a", us=10), record("3b", us=20)], [record("3a", us=10.5), record("3b", us=10)]
    assert compare(tmp_path, *both) == 0
    text = capsys.readouterr().out
    assert "0 of 2 points slower" in text
    assert "geometric mean of after / before: 0.725 (2 points)" in text
    assert "0.500 " in text
    assert "different devices" not in text


@pytest.mark.parametrize(("us", "code"), [(10.59, 0), (10.61, 1)])
def test_slower_is_beyond_threshold_and_the_larger_spread(tmp_path, us, code):
    assert compare(tmp_path, [record(us=10, spread=0.001)], [record(us=us, spread=0.01)]) == code
    assert compare(tmp_path, [record(us=10, spread=0.01)], [record(us=us, spread=0.001)]) == code


def test_the_threshold_is_the_users(tmp_path, capsys):
    both = [record(us=10, spread=0.0)], [record(us=10.6, spread=0.0)]
    assert compare(tmp_path, *both) == 1
    assert compare(tmp_path, *both, "--threshold", "0.1") == 0
    assert "slower by more than 10%" in capsys.readouterr().out


def test_only_equal_points_are_compared(tmp_path, capsys):
    """One differs in batch, one in the implementation, one in the feature map."""
    after = [record(us=10), record(us=99, batch=1), record(us=99, implementation="eager"), record(us=99, size=12)]
    assert compare(tmp_path, [record(us=10)], after) == 0
    assert "(1 points)" in capsys.readouterr().out


def test_exit_code_2_without_a_common_point(tmp_path, capsys):
    assert compare(tmp_path, [record("3a")], [record("3b")]) == 2
    assert "after.json (1 points) have no point in common" in capsys.readouterr().err
    assert compare(tmp_path, [], []) == 2


@pytest.mark.parametrize(
    "words", [["--compare", "one.json"], ["--threshold", "-1"], ["--compare", "a", "b", "c"], ["--nothing"]]
)
def test_exit_code_2_on_a_wrong_command_line(words):
    with pytest.raises(SystemExit) as end:
        report.main(words)
    assert end.value.code == 2


def test_exit_code_2_for_a_file_that_is_not_there(tmp_path, capsys):
    there = suite_file(tmp_path / "a.json", [record()])
    assert report.main(["--compare", str(there), str(tmp_path / "missing.json")]) == 2
    assert "missing.json: cannot be read" in capsys.readouterr().err


def test_other_devices_are_said(tmp_path, capsys):
    assert compare(tmp_path, [record()], [record()], gpu="NVIDIA H100") == 0
    assert "compare the devices, not the code" in capsys.readouterr().out


def test_a_block_of_gpu_check_and_of_the_suite_is_one_point(tmp_path):
    """Single launches are points as well, of their own."""
    first = load(suite_file(tmp_path / "a.json", [record("4e", us=10, size=14)]))
    second = load(gpu_check_file(tmp_path / "b.json", blocks=[row("4e", us=8)], kernels=[launch(us=3)]))
    (change,) = changes(first, second)
    assert change.ratio == pytest.approx(0.8)
    third = load(gpu_check_file(tmp_path / "c.json", kernels=[launch(us=6), launch("K2")]))
    (change,) = changes(second, third)
    assert change.before.subject == "3a K1"
    assert change.slower(0.9)
    assert not change.slower(1.0)


def test_means_by_implementation(tmp_path):
    a = load(suite_file(tmp_path / "a.json", [record(us=10), record("3b", us=10), record(implementation="eager")]))
    b = load(suite_file(tmp_path / "b.json", [record(us=20), record("3b", us=5), record(implementation="eager", us=9)]))
    found = changes(a, b)
    assert geometric_mean(found[:2]) == pytest.approx(1)
    text = comparison(a, b, found, 0.05)
    assert "ours 1.000 (2), eager 0.900 (1)" in text
    assert [line.split("|")[-2].strip() for line in text.splitlines() if "block 3" in line] == [
        "slower",
        "faster",
        "faster",
    ]
