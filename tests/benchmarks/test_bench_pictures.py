"""The pictures: what they show of result files, what they leave out and say so, and that no text is clipped."""

from __future__ import annotations

import pytest

from benchmarks.cases.timeline import one_point
from benchmarks.figures import pictures
from benchmarks.figures.result_files import load
from result_fakes import gpu_check_file, launch, nine, record, suite_file

matplotlib = pytest.importorskip("matplotlib")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that a test saves."""
    figures = []
    save = pictures.save
    monkeypatch.setattr(pictures, "save", lambda figure, path: (figures.append(figure), save(figure, path)))
    return figures


def texts(figure):
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text)]


def clipped(figure):
    """Texts that reach out of the picture."""
    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    boxes = {t.get_text(): t.get_window_extent() for t in figure.findobj(matplotlib.text.Text) if t.get_text()}
    return [text for text, b in boxes.items() if b.x0 < 0 or b.y0 < 0 or b.x1 > width or b.y1 > height]


def bars(axes):
    return [patch for patch in axes.patches if patch.get_height() and patch.get_width()]


def test_speedups_show_what_is_slower_in_another_colour(tmp_path, drawn):
    records = [record("3a", us=10), record("3a", "eager", 25), record("3b", us=10), record("3b", "eager", 5)]
    measured = load(suite_file(tmp_path / "a.json", records))
    assert pictures.speedups(measured, tmp_path / "a.png")
    axes = drawn[0].axes[0]
    fast, slow = bars(axes)
    assert (fast.get_y() + fast.get_height(), slow.get_y() + slow.get_height()) == pytest.approx((2.5, 0.5))
    assert fast.get_facecolor() != slow.get_facecolor()
    assert slow.get_hatch()
    assert not fast.get_hatch()
    assert axes.get_yscale() == "log"
    assert "slower than eager channels_last" in texts(drawn[0])
    assert not clipped(drawn[0])
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_speedups_have_a_panel_for_each_dtype_and_pass(tmp_path, drawn):
    records = [
        r
        for dtype in ("bf16", "tf32", "fp16")
        for batch in (1, 32, 128)
        for name, us in (("ours", 300), ("eager", 900))
        for r in nine(name, us, dtype=dtype, batch=batch)
    ]
    records += [record(image=96), record("3a", "eager", 900, image=96)]
    assert pictures.speedups(load(suite_file(tmp_path / "a.json", records)), tmp_path / "a.png")
    assert [axes.get_title("left") for axes in drawn[0].axes] == ["bf16, forward", "tf32, forward"]
    assert [len(bars(axes)) for axes in drawn[0].axes] == [27, 27]
    assert not clipped(drawn[0])


def test_no_speedup_is_drawn_of_a_cpu(tmp_path):
    records = [record(name, us, device="cpu") for name, us in (("ours", 10), ("eager", 9), ("eager_nchw", 25))]
    measured = load(suite_file(tmp_path / "a.json", records, gpu=None))
    assert not pictures.speedups(measured, tmp_path / "a.png")


@pytest.mark.parametrize("records", [[], [record()], [record(implementation="eager")]])
def test_no_speedup_is_drawn_without_both(tmp_path, records):
    measured = load(suite_file(tmp_path / "a.json", records))
    assert not pictures.speedups(measured, tmp_path / "a.png")
    assert not (tmp_path / "a.png").exists()


def test_share_of_the_floor_is_summed_over_the_blocks(tmp_path, drawn):
    rows = [launch(us=10, floor_us=5), launch(us=30, floor_us=5, block="3b"), launch("B3", us=4, floor_us=3)]
    rows += [launch("pack", us=2) | {"floor_us": None}, {"block": "3a", "error": "broken"}]
    assert pictures.floor_shares(rows, "title", tmp_path / "a.png")
    k1, b3 = bars(drawn[0].axes[0])
    assert (k1.get_height(), b3.get_height()) == pytest.approx((0.25, 0.75))
    assert [label.get_text() for label in drawn[0].axes[0].get_xticklabels()] == ["K1", "B3"]
    assert not clipped(drawn[0])


def test_no_share_is_drawn_from_floors_alone(tmp_path):
    rows = [{"kernel": "K1", "block": "3a", "dtype": "bf16", "batch": 1, "floor_us": 5.0}]
    assert not pictures.floor_shares(rows, "title", tmp_path / "a.png")
    assert not list(tmp_path.iterdir())


def test_the_timeline_of_floors_says_that_it_is_none_of_measurements(tmp_path, drawn):
    said = pictures.draw([], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["timeline.png"]
    assert "not measured" in drawn[0].get_suptitle()
    assert "not measured" in said[2]
    assert "no GPU timed anything both" in said[0]
    assert "a floor alone is no share" in said[1]
    assert {"forward: 20 launches, 136 us", "backward: 29 launches, 239 us", "forward: 4 launches, 43 us"} <= set(
        texts(drawn[0])
    )
    assert not clipped(drawn[0])


def test_a_measured_timeline_is_drawn_instead(tmp_path, drawn):
    """One point of a file that has two; eager's backward starts where its forward has ended."""
    label = {"block": "3a", "batch": 8, "dtype": "tf32"}
    rows = [
        {"implementation": name, "pass": direction, "name": "conv", "start_us": start, "us": 10.0, **label}
        for name in ("eager", "ours")
        for direction in ("forward", "backward")
        for start in ((0.0, 15.0) if name == "eager" else (0.0,))
    ]
    other = [row | {"batch": 9} for row in rows]
    measured = load(gpu_check_file(tmp_path / "results.json", timeline=[*rows, *other]))
    assert one_point(measured.timeline) == rows
    assert "measured" in pictures.draw([measured], tmp_path)[2]
    assert "not measured" not in drawn[0].get_suptitle()
    assert "block 3a, batch 8, tf32" in drawn[0].get_suptitle()
    assert [round(p.get_x()) for p in drawn[0].axes[0].patches] == [0, 15, 25, 40, 0, 10]
    assert "50 us" in texts(drawn[0])


def test_without_matplotlib_the_remedy_is_named(tmp_path, monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(pictures, "import_module", missing)
    with pytest.raises(pictures.MissingLibraryError, match=r'python -m pip install -e ".\[train\]"'):
        pictures.draw([], tmp_path)
