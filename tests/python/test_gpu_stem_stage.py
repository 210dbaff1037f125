"""gpu_check on the stem's two convolutions: points, rows, a launch that is wrong."""

from __future__ import annotations

import pytest

from checks.block_cases import Block, backward
from gpu import stages as gpu_stages
from gpu.run import FULL
from gpu.stages import STAGES
from gpu.stem_stage import checked_stem, stem_parity_points, stem_points
from gpu_fakes import TINY
from inception_fused.plan.launches import table_of

NAMES = table_of(range(2)).names


def test_points_are_few():
    points = stem_points(FULL)
    assert [(point.batch, point.dtype, point.mode, point.size) for point in points] == [
        (batch, "bf16", mode, 56) for batch in (128, 1) for mode in ("forward", "training")
    ]
    parity = stem_parity_points(FULL)
    assert [(p.label, p.dtype, p.batch, p.size) for p in parity if p.dtype == "tf32"] == [
        ("stem", "tf32", 1, 56), ("odd stem", "tf32", 2, 7),
    ]  # fmt: skip
    assert set(parity) < set(gpu_stages.parity_points(FULL))
    (stage,) = (stage for stage in STAGES if stage.name == "stem")
    assert stage.cost(FULL) <= 20


def test_rows_of_the_stage_on_the_cpu(run, timed):
    """The real stage; our kernels interpreted, once per figure."""
    next(stage for stage in STAGES if stage.name == "stem").run(run)
    rows = run.stage["rows"]
    labels = [row.get("implementation") or row["kernel"] for row in rows]
    assert labels == ["eager", "ours", *NAMES["forward"], *NAMES["backward"], "eager", "ours"]
    assert {row["block"] for row in rows} == {"stem"}
    assert timed[1] == timed[-1] == "kernels"
    # K3: M = 2 * 16 * 16 rows, 64 channels in 9 taps to 192.
    third = next(row for row in rows if row.get("kernel") == "K3")
    assert third["tflops"] == pytest.approx(2 * 512 * 9 * 64 * 192 / 8e-6 / 1e12)


@pytest.mark.parametrize("spoilt", ["y", "dx"])
def test_a_wrong_result_fails_parity(spoilt, monkeypatch):
    point = next(point for point in stem_parity_points(TINY) if point.block == "odd stem")
    checked_stem(point, "cpu")
    name, original = ("Block.forward", Block.forward) if spoilt == "y" else ("backward", backward)

    def wrong(*args):
        first, *others = original(*args)
        return first * 1.1, *others

    monkeypatch.setattr(f"checks.block_cases.{name}", wrong)
    with pytest.raises(AssertionError, match=r"^2: Error" if spoilt == "y" else "gradient of x: Error"):
        checked_stem(point, "cpu")
