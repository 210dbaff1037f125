"""The whole network as it is counted: sums that are those of its parts, its tables, its command and its picture."""

from __future__ import annotations

import json
import re

import pytest
import torch

from benchmarks import counted as command
from benchmarks.cases import counted, counted_network
from benchmarks.cases.counted_network import COLUMNS, EAGER, FIGURES
from benchmarks.figures import network_picture, pictures
from benchmarks.figures.network_summary import draw, network_summary
from benchmarks.figures.result_files import ResultFileError
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, block_shape, spatial_size
from inception_fused.plan import counts
from inception_fused.plan.cards import CARDS
from inception_fused.plan.eager_kernels import eager_backward_kernels, eager_kernels
from inception_fused.plan.floors import total
from inception_fused.plan.network import BLOCK, FORMS, STEM_STAGES


@pytest.fixture(scope="module")
def found():
    return counted_network.collect(commit="abc1234", cards=("H200", "A100"))


def point_of(found, card="H200", dtype="bf16", batch=128, image=224, training=False):
    wanted = dict(card=card, dtype=dtype, batch=batch, image=image, training=training)
    (point,) = (p for p in found["points"] if {name: p[name] for name in wanted} == wanted)
    return point


def parts_of(point):
    return [dict(zip(COLUMNS, values, strict=True)) for values in point["parts"]]


def test_every_point_has_every_part(found):
    assert len(found["points"]) == 2 * 2 * 3 * 2 * 2
    assert len({tuple(list(point.values())[:5]) for point in found["points"]}) == len(found["points"])
    for point in found["points"]:
        assert [part["part"] for part in parts_of(point) if part["kind"] == BLOCK] == list(GOOGLENET_BLOCKS)
        assert list(point["sums"]) == [EAGER, *FORMS]
    assert found["counts"]["kernel_sources"] == counts.shipped().kernel_sources
    assert found["forms"] == {form: list(kinds) for form, kinds in FORMS.items()}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
def test_the_blocks_are_those_of_the_blocks_own_table(found, dtype, training):
    blocks = [part for part in parts_of(point_of(found, dtype=dtype, training=training)) if part["kind"] == BLOCK]
    (alone,) = (
        p for p in counted.collect(cards=("H200",), passes=[(training, False)])["points"]
        if (p["dtype"], p["batch"]) == (dtype, 128)
    )  # fmt: skip
    sums = counted.summed(alone)["all"]
    for figure in ("floor", "busiest", "predicted", "low", "high"):
        assert sum(part[figure] for part in blocks) == pytest.approx(sums[figure], rel=1e-3), figure
    assert sum(part["launches"] for part in blocks) == len(alone["launches"])
    card, eager = CARDS["H200"], 0.0
    for block, config in GOOGLENET_BLOCKS.items():
        shape = block_shape(config, 128, spatial_size(block), {"bf16": torch.bfloat16, "tf32": torch.float32}[dtype])
        kernels = (*eager_kernels(shape), *(eager_backward_kernels(shape) if training else ()))
        eager += total(kernels, card, dtype)
    assert sum(part["eager"] for part in blocks) == pytest.approx(1e6 * eager, rel=1e-3)


@pytest.mark.parametrize("form", [EAGER, *FORMS])
def test_sums_are_those_of_the_parts(found, form):
    fused = FORMS.get(form, ())
    for point in (point_of(found, batch=1), point_of(found, "A100", "tf32", 32, 96, True)):
        parts, sums = parts_of(point), point["sums"][form]
        stem = [part for part in parts if part["stage"] in STEM_STAGES]
        for figure in FIGURES:

            def taken(part, figure=figure):
                return part[figure] if part["kind"] in fused else part["eager"]

            assert sums["all"][figure] == pytest.approx(sum(map(taken, parts)), abs=0.2)
            assert sums["stem"][figure] == pytest.approx(sum(map(taken, stem)), abs=0.1)
            rest = [part for part in stem if part["kind"] not in fused]
            assert sums["PyTorch's of the stem"][figure] == pytest.approx(sum(map(taken, rest)), abs=0.1)


def test_a_row_of_the_sums(found):
    head, row = counted_network.header(found), counted_network.row(point_of(found))
    assert len(head) == len(row)
    cells = dict(zip(head, row, strict=True))
    assert (cells["image"], cells["pass"], cells["eager's floor"]) == ("224x224", "inference", "2219 (34%)")
    assert head[-len(FORMS) :] == tuple(FORMS)
    sums = point_of(found)["sums"]
    stem = sum(part["eager"] for part in parts_of(point_of(found)) if part["stage"] in STEM_STAGES)
    before = sums["blocks fused"]["all"]["busiest"]
    assert cells["blocks fused"] == f"{before:.0f} ({stem / before:.0%})"
    at_1 = dict(zip(head, counted_network.row(point_of(found, batch=1)), strict=True))
    assert " to " in at_1["blocks fused"]
    assert " to " not in at_1["eager's floor"], "a floor has no range"
    assert not any("%" in cell for cell in at_1.values())


def test_the_table_of_a_point(found):
    point = point_of(found, training=True)
    head, _, *lines = counted_network.table(point).splitlines()
    assert len({line.count("|") for line in (head, *lines)}) == 1
    cells = {line.split(" | ")[0].strip("| "): [c.strip() for c in line.split("|")[2:-1]] for line in lines}
    assert cells["b1 7x7"] == ["2", "101.6", "by PyTorch", "-", "-", "-", "-"]
    assert cells["b1 bias, ReLU, pool"][:3] == ["7", "645.2", "3"]
    assert cells["3a"][:3] == ["49", "589.2", "15"]
    assert cells["eager: all"][3:] == ["5617"] * 3 + ["-"]
    assert "not measured; PyTorch's parts at their floors" in counted_network.title(point)


def test_the_command(tmp_path, capsys):
    out = tmp_path / counted_network.FILE
    command.main(["--network", "--json", str(out), "--commit", "abc1234"])
    written = json.loads(out.read_text())
    assert written == json.loads(json.dumps(counted_network.collect(commit="abc1234")))
    command.main(["--network", "--card", "A100", "--dtype", "tf32", "--batch", "32"])
    assert capsys.readouterr().out.count("GoogLeNet at ") == 2 * 2
    both = [tmp_path / "before.json", tmp_path / "after.json"]
    for path in both:
        path.write_text(command.as_json(counted.collect(commit="0ld", cards=("H200",))))
    command.main(["--compare", *map(str, both)])
    text = capsys.readouterr().out
    assert text.index("0ld -> 0ld, nine blocks") < text.index("GoogLeNet, counted, not measured, commit abc1234")
    assert text.count("| b1 7x7 |") == 2 * 2 * 2, "sizes, passes and dtypes on the first card at the largest batch"
    out.unlink()
    command.main(["--compare", *map(str, both)])
    assert "GoogLeNet, counted" not in capsys.readouterr().out


@pytest.mark.parametrize("other", [["--compare", "a.json"], ["--again", "a.json"]])
def test_the_command_refuses_what_it_would_not_look_at(other, capsys):
    with pytest.raises(SystemExit) as error:
        command.main(["--network", *other])
    assert error.value.code == 2
    assert "--network: counts anew" in capsys.readouterr().err


def test_readme_has_the_network(found, tmp_path):
    assert network_summary(tmp_path) == ""
    assert "has not counted it" in draw(tmp_path, tmp_path)
    (tmp_path / "counted").mkdir()
    (tmp_path / "counted" / counted_network.FILE).write_text(json.dumps(found))
    text = network_summary(tmp_path)
    assert "counted and not measured" in text
    assert "commit abc1234" in text
    assert "on the H200 in bf16, microseconds" in text
    head, _, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert [cell.strip() for cell in head.strip("|").split("|")][:3] == ["batch", "image", "pass"]
    assert len(lines) == 3 * 2 * 2
    assert max(map(len, lines)) <= 120
    assert re.search(r"^\| 128 +\| 224x224 \| inference +\| 2219 \(34%\) ", text, re.MULTILINE)
    (tmp_path / "counted" / counted_network.FILE).write_text("{")
    with pytest.raises(ResultFileError, match=r"network\.json: is no record of counts .*counted\.py --network"):
        network_summary(tmp_path)


def test_the_picture(found, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(
        network_picture, "save", lambda figure, path: (figures.append(figure), pictures.save(figure, path))
    )
    network_picture.draw_network(found, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    (figure,) = figures
    assert "not measured" in figure.get_suptitle()
    titles = [axes.get_title("left") for axes in figure.axes]
    assert titles == [f"{side}x{side}, {name}" for side in (224, 96) for name in ("inference", "training step")]
    points = [point_of(found, image=image, training=training) for image in (224, 96) for training in (False, True)]
    kinds = len(network_picture.KINDS)
    for axes, point in zip(figure.axes, points, strict=True):
        bars = [patch for patch in axes.patches if patch.get_width()]
        assert len(bars) == kinds * (1 + len(FORMS))
        ends = [bar.get_x() + bar.get_width() for bar in bars[kinds - 1 :: kinds]]
        assert ends == pytest.approx([sums["all"]["busiest"] for sums in point["sums"].values()], abs=0.2)
        hatched = [bool(bar.get_hatch()) for bar in bars]
        assert all(hatched[:kinds]), "eager's floors"
        assert not all(hatched[kinds:])
    figure.canvas.draw()
    # Of what is drawn, in inches; ticks beyond an axis are not.
    drawn, (width, height) = figure.get_tightbbox(), figure.get_size_inches()
    assert (drawn.x0 >= 0, drawn.y0 >= 0, drawn.x1 <= width, drawn.y1 <= height) == (True,) * 4


def test_a_bar_takes_only_what_is_fused(found):
    point = point_of(found)
    bars = network_picture.bars_of(point, {"blocks": [BLOCK]})
    assert [fused for _, fused in bars["blocks"].values()] == [False, False, False, True, False]
    forms = network_picture.bars_of(point, FORMS)
    assert [fused for _, fused in forms["stem too"].values()] == [False, False, True, True, False]
    assert [fused for _, fused in forms["pools too"].values()] == [False, True, True, True, False]
    blocks = [part for part in parts_of(point) if part["kind"] == BLOCK]
    assert bars["blocks"]["nine blocks"][0] == pytest.approx(sum(part["busiest"] for part in blocks))
    assert bars[EAGER]["nine blocks"][0] == pytest.approx(sum(part["eager"] for part in blocks))
