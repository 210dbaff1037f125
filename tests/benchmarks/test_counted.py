"""benchmarks/counted.py: one table of every launch, as data and as Markdown, and two of them side by side."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import counted as command
from benchmarks.cases import counted
from benchmarks.figures.counted_summary import counted_summary
from benchmarks.figures.result_files import ResultFileError
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, block_shape
from inception_fused.plan import choice, counts
from inception_fused.plan.cards import CARDS
from inception_fused.plan.forecast import forecast

ROOT = Path(__file__).resolve().parents[2]
BEFORE = ROOT / "benchmarks" / "results" / "counted" / "before.json"


@pytest.fixture(scope="module")
def found():
    return counted.collect(commit="abc1234", cards=("H200",))


def test_every_point_has_every_launch(found):
    assert len(found["points"]) == 2 * 3 * 3
    for point in found["points"]:
        # K1 with K2 and K3 with K4 at batch 1, at batch 32 in 5a and 5b, but for K1 of 5b in TF32.
        joined = {1: 18, 32: 4 if point["dtype"] == "bf16" else 3, 128: 0}[point["batch"]]
        assert len(point["launches"]) == 9 * (25 if point["normed"] else 15 if point["training"] else 4) - joined
        assert all(len(row) == len(found["columns"]) for row in point["launches"])
    assert found["counts"]["kernel_sources"] == counts.shipped().kernel_sources
    assert found["cards"]["H200"]["bandwidth"] == CARDS["H200"].bandwidth


def test_every_unit_of_the_forecast_has_a_column():
    shape = block_shape(GOOGLENET_BLOCKS["4d"], 128, 14, torch.bfloat16)
    launches = forecast(shape, torch.bfloat16, CARDS["H200"], precision="bf16", training=True)
    assert {unit for launch in launches for unit in launch.units} == set(counted.UNITS)


def test_sums_are_those_of_the_rows(found):
    point = found["points"][-1]
    sums = counted.summed(point)
    assert point["normed"]
    rows = [dict(zip(found["columns"], row, strict=True)) for row in point["launches"]]
    assert sums["all"]["predicted"] == pytest.approx(sum(row["predicted"] for row in rows))
    k2 = [row for row in rows if row["launch"] == "K2"]
    assert sums["K2"]["DRAM"] == pytest.approx(sum(row["DRAM"] for row in k2))
    assert sums["K2"]["busiest"] == pytest.approx(
        sum(max(row[unit] for unit in counted.UNITS if row[unit] is not None) for row in k2)
    )
    assert sums["K2"]["few"] <= sums["K2"]["busiest"]
    assert sum(sums["K2"]["bounds"].values()) == 9
    assert list(sums)[-1] == "all"


def test_the_table(found):
    text = counted.table(found["points"][0])
    head, _, *lines = text.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines] == ["K1+K2", "K3+K4", "all"]
    assert len({line.count("|") for line in (head, *lines)}) == 1
    assert "counted, not measured" in counted.title(found["points"][0])


def test_before_and_after(found):
    slower = copy.deepcopy(found)
    slower["commit"] = "before"
    place = found["columns"].index("predicted")
    for point in slower["points"]:
        for row in point["launches"]:
            row[place] *= 2
    text = counted.compared(slower, found)
    assert "before -> abc1234" in text
    lines = [line for line in text.splitlines() if line.startswith("| H200")]
    assert len(lines) == 18
    assert all(line.endswith("| 2.00 |") for line in lines)
    assert (text.count("| K2 |"), text.count("| K1+K2 |")) == (3 * 4, 3 * 4), "of batch 32 both"


def test_before_a_pass_was_counted(found):
    """Files of old know nothing of BatchNorm in training: the others are compared, and it is shown alone."""
    old = copy.deepcopy(found) | {"commit": "0ld"}
    old["points"] = [point for point in old["points"] if not point.pop("normed")]
    assert [point.pop("normed") for point in counted.again(old, counts.shipped())["points"]] == [False] * 12
    lines = [line for line in counted.compared(old, found).splitlines() if line.startswith("| H200")]
    assert [line.endswith("| 1.00 |") for line in lines] == [not point["normed"] for point in found["points"]]
    assert all(line.endswith("| - |") for line in lines if "training, BatchNorm" in line)
    text = counted.compared(old, found)
    assert text.count("BatchNorm, microseconds counted") == 2, "bf16 and TF32 at batch 128"
    assert text.count("| N6 y |") == 2


def test_the_command(tmp_path, capsys):
    out = tmp_path / "now.json"
    command.main(["--json", str(out), "--commit", "abc1234"])
    written = json.loads(out.read_text())
    assert written == json.loads(json.dumps(counted.collect(commit="abc1234")))
    command.main(["--compare", str(out)])
    assert "| 1.00 |" in capsys.readouterr().out
    command.main(["--card", "A100", "--dtype", "tf32", "--batch", "32"])
    text = capsys.readouterr().out
    assert text.count("A100, tf32, batch 32") == 3


def test_a_result_is_computed_again_with_its_own_tiles(found, tmp_path, capsys, monkeypatch):
    """Also where the plan's rules have changed since, and the card's constants."""
    assert counted.again(found, counts.shipped()) == found
    out = tmp_path / "old.json"
    out.write_text(command.as_json(found))
    (tmp_path / "old_counts.json").write_text(counts.FILE.read_text())
    monkeypatch.setattr(choice, "split_k", lambda *args: 1)
    changed = counted.collect(cards=("H200",))
    assert counted.again(found, counts.shipped()) == found != changed
    slow = replace(CARDS["H200"], launch=1.0)
    monkeypatch.setitem(CARDS, "H200", slow)
    command.main(["--compare", str(out), str(out)])
    assert "| 3600" in capsys.readouterr().out
    command.main(["--again", str(out), "--json", str(tmp_path / "new.json")])
    new = json.loads((tmp_path / "new.json").read_text())
    assert new["cards"]["H200"]["launch"] == 1.0
    assert new["points"][0]["launches"][0][:6] == found["points"][0]["launches"][0][:6]


def test_a_launch_whose_kernel_is_another_now_keeps_its_row(found):
    known = counts.shipped()
    renamed = {
        (key._replace(kernel="old_kernel") if key.kernel == "pool_proj_kernel" else key, chip): binary
        for (key, chip), binary in known.binaries.items()
    }
    assert counted.again(found, known._replace(binaries=renamed)) == found


def test_what_was_before_is_kept():
    before = json.loads(BEFORE.read_text())
    assert before["commit"] == "01749a9"
    assert before["schema"] == counted.SCHEMA
    assert tuple(before["columns"]) == (*counted.COLUMNS, *counted.UNITS)
    kept = counts.parse(BEFORE.with_name("before_counts.json").read_text())
    assert kept.kernel_sources == before["counts"]["kernel_sources"]
    (point,) = (
        p for p in before["points"]
        if (p["card"], p["dtype"], p["batch"], p["training"]) == ("H200", "bf16", 128, False)
    )  # fmt: skip
    # As a model of the same day had them, which knew no latency: 1060.
    assert counted.summed(point)["all"]["few"] == pytest.approx(1060, rel=0.01)


def test_readme_sums_up_what_was_counted(found, tmp_path):
    folder = tmp_path / "counted"
    folder.mkdir()
    assert counted_summary(tmp_path) == ""
    for name, commit in (("before.json", "0ld"), ("after.json", "abc1234")):
        (folder / name).write_text(json.dumps(found | {"commit": commit}))
    text = counted_summary(tmp_path)
    assert text.startswith("**Counted from machine code, not measured**")
    assert "now: commit abc1234; before: commit 0ld." in text
    lines = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| H200")
    ]
    assert len(lines) == len(found["points"]) - 4, "BatchNorm at batch 128 alone"
    assert [line[3] for line in lines].count("training step, BatchNorm") == 2
    at_128 = next(line for line in lines if line[1:4] == ["bf16", "128", "inference"])
    sums = counted.summed(next(p for p in found["points"] if p["batch"] == 128 and not p["training"]))["all"]
    assert at_128[4:8] == ["417", "1386", *[f"{sums['busiest']:.0f}"] * 2]
    assert all(" to " in line[7] for line in lines if line[2] == "1")


def test_a_damaged_record_of_counts_is_refused(tmp_path):
    (tmp_path / "counted").mkdir()
    (tmp_path / "counted" / "before.json").write_text("{")
    with pytest.raises(ResultFileError, match=r"before\.json: is no record of counts"):
        counted_summary(tmp_path)
