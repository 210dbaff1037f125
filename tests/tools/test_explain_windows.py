"""explain(model, x) of blocks with two 3x3 in branch 3: floor and prediction are those of seven convolutions."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from checks.block_cases import SMALL
from inception_fused import FusedInception, Inception, explain, inception
from inception_fused.block.googlenet_blocks import block_shape, branch3_options
from inception_fused.op.backends import backend
from inception_fused.plan.cards import H200
from inception_fused.plan.floors import block_work
from inception_fused.plan.forecast import forecast

SIDE, BATCH = 6, 3
WINDOWS = (3, 3)


def times(training, *, packs, branch3=WINDOWS):
    shape = block_shape(SMALL, BATCH, SIDE, torch.float32, branch3=branch3)
    launches = forecast(shape, torch.float32, H200, precision="tf32", training=training, packs=packs)
    floor = block_work(shape, training=training).floor(H200, "tf32")
    return pytest.approx((1e6 * floor, 1e6 * sum(launch.predicted for launch in launches)))


@pytest.fixture
def x():
    return torch.randn(BATCH, SMALL.in_channels, SIDE, SIDE)


@pytest.mark.parametrize("kind", [FusedInception, Inception])
def test_floor_and_prediction_count_seven_convolutions(kind, x):
    block = kind(*SMALL, **branch3_options(WINDOWS))
    (row,) = explain(block, x).rows
    assert row.state == ("fused" if kind is FusedInception else "not converted")
    assert row.forward[:2] == times(False, packs=True)
    assert row.step[:2] == times(True, packs=True)
    assert row.forward[:2] != times(False, packs=True, branch3=(3,))
    assert row.forward.measured_us > 1
    assert "rewrites the 3x3 weights at each call" in row.remedy
    packed = block.to(memory_format=torch.channels_last)
    (row,) = explain(packed, x).rows
    assert row.remedy == ""
    assert row.forward[:2] == times(False, packs=False)


def test_a_block_inside_a_model_is_named_and_printed(x):
    model = nn.Sequential(
        FusedInception(*SMALL, **branch3_options(WINDOWS)), FusedInception(SMALL.out_channels, *SMALL[1:])
    )
    text = str(explain(model.eval(), x))
    first, second = (line.split() for line in text.splitlines() if line.startswith(("0  ", "1  ")) and "x6x6" in line)
    assert float(first[-2]) == pytest.approx(times(False, packs=True).expected[1], abs=0.05)
    assert float(second[-2]) != float(first[-2])


def test_a_module_that_calls_inception_is_explained_as_its_layers_say(x):
    """Somebody's own, whose forward hands its weights to the function."""

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = FusedInception(*SMALL, **branch3_options(WINDOWS))

        def forward(self, x):
            return inception(x, self.block.params(), activation="relu")

    model = Own().eval()
    (row,) = explain(model).rows
    assert (row.name, row.state) == ("block", "fused")
    found = explain(model, x)
    assert found.rows[0].forward is None, "the module itself is never called"
    assert "block: not timed" in str(found)
    with backend("eager"):
        assert explain(model.block, x).rows[0].forward.predicted_us is None
