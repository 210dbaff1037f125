"""explain(model, x): floor, predicted and measured time of every block, and a model that is left as it was."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from clients import C1, C2, C3, C4, CLIENTS, FLAT, C, NewD2l, OldD2l, Torchvision, drawn, images
from torch import nn

from inception_fused import FusedInception, GoogLeNet, InceptionInputError, backend, convert, convert_, explain
from inception_fused import explanation as module_under_test
from inception_fused.floors import H200, block_work
from inception_fused.forecast import forecast
from inception_fused.shapes import BlockShape

CONFIG = (C, C1, C2, C3, C4)


def floor_us(block, shape, *, training=False, precision="tf32", itemsize=4):
    n, _, h, w = shape
    convs = [conv for conv in block.modules() if isinstance(conv, nn.Conv2d)]
    k = [conv.out_channels for conv in convs]
    sizes = BlockShape(n, h, w, convs[0].in_channels, k[0], k[1], k[2], k[3], k[4], k[5], itemsize)
    branch3 = convs[4].kernel_size[0]
    work = block_work(sizes, branch3=branch3, training=training)
    return sizes, 1e6 * work.floor(H200, precision)


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("name", CLIENTS)
def test_the_times_of_every_family(name, converted):
    block = drawn(CLIENTS[name]()).eval()
    x = images(3, 9, 5)
    branch3 = 3 if name == "torchvision" else 5
    shape, floor = floor_us(block, x.shape)
    (row,) = explain(convert(block) if converted else block, x).rows
    assert row.state == ("converted" if converted else "not converted")
    assert (row.x_shape, row.dtype, row.step) == (tuple(x.shape), torch.float32, None)
    assert row.forward.floor_us == pytest.approx(floor)
    packs = any(isinstance(m, nn.BatchNorm2d) for m in block.modules()) or not converted
    launches = forecast(shape, torch.float32, H200, precision="tf32", branch3=branch3, packs=packs)
    assert row.forward.predicted_us == pytest.approx(1e6 * sum(launch.predicted for launch in launches))
    assert row.forward.measured_us > 1


def test_a_block_in_training_mode_has_a_step_too():
    block, x = drawn(OldD2l(*CONFIG)).train(), images()
    shape, floor = floor_us(block, x.shape, training=True)
    (row,) = explain(convert(block), x).rows
    assert row.step.floor_us == pytest.approx(floor)
    launches = forecast(shape, torch.float32, H200, precision="tf32", training=True)
    assert row.step.predicted_us == pytest.approx(1e6 * sum(launch.predicted for launch in launches))
    assert row.step.measured_us > row.forward.measured_us


def test_what_is_measured_is_the_block_as_it_is(monkeypatch):
    """In training mode BatchNorm's block computes with batch statistics; autocast's weights are cast in every call."""
    block = convert_(drawn(Torchvision(*FLAT)))
    x, seen = images().requires_grad_(), []

    def clock(calls, device):
        seen.append([call() for call in calls])
        return [7.0], None

    monkeypatch.setattr(module_under_test, "clock", clock)
    for training in (False, True):
        block.train(training)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (row,) = explain(block, x).rows
            expected = copy.deepcopy(block)(x)
        assert row.dtype == torch.bfloat16
        torch.testing.assert_close(seen[0][0], expected.detach(), rtol=0, atol=0)
        assert row.forward.measured_us == 7.0
        _, floor = floor_us(block, x.shape, precision="bf16", itemsize=2)
        assert row.forward.floor_us == pytest.approx(floor)
        assert len(seen) == 1 + training
        seen.clear()
    assert "its BatchNorm is in training mode" in row.path
    assert row.step.measured_us == 7.0


@pytest.mark.parametrize("name", ["torchvision", "old d2l"])
def test_the_model_is_left_as_it_was(name):
    model = nn.Sequential(nn.Conv2d(5, C, 3, padding=1), convert_(drawn(CLIENTS[name]())), nn.Dropout(0.5)).train()
    model[0].weight.grad = torch.ones_like(model[0].weight)
    x = images()[:, :5]
    before, state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    explain(model, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.grad is None for p in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert model.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_what_has_no_time():
    hooked, wrong, idle = (drawn(OldD2l(*CONFIG)) for _ in range(3))
    calls = []
    hooked.p3_2.register_forward_hook(lambda *_: calls.append(1))
    wrong.p2_2.stride = (2, 2)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.hooked, self.wrong, self.idle, self.good = hooked, wrong, idle, drawn(OldD2l(*CONFIG))

        def forward(self, x):
            return self.hooked(x), self.good(x)

    model = convert_(Model().eval())
    hooked.p3_2.register_forward_hook(lambda *_: calls.append(1))
    model.good.p2_1.register_forward_hook(lambda *_: calls.append(1))
    rows = {row.name: row for row in explain(model, images()).rows}
    assert len(calls) == 3, "a hook runs with model(x) and not again"
    for name in ("hooked", "wrong", "idle"):
        assert (rows[name].forward, rows[name].step) == (None, None)
    # Its structure is known, and what it computes: only its hook keeps the clock away.
    assert rows["good"].forward.floor_us > 0
    assert rows["good"].forward.measured_us is None


def test_a_block_that_waits_for_its_first_input():
    block = convert_(NewD2l(*CONFIG[1:]))
    assert "wait for the first input" in explain(block).rows[0].path
    (row,) = explain(block, images()).rows
    assert row.x_shape == tuple(images().shape)
    assert row.forward.measured_us > 1


def test_float64_has_no_floor_and_strict_fp32_no_prediction():
    block = drawn(OldD2l(*CONFIG)).eval()
    (row,) = explain(convert(block).double(), images().double()).rows
    assert row.forward[:2] == (None, None)
    assert row.forward.measured_us > 1
    allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        (row,) = explain(convert(block), images()).rows
    finally:
        torch.backends.cudnn.allow_tf32 = allowed
    _, floor = floor_us(block, images().shape, precision="fp32")
    assert row.forward.floor_us == pytest.approx(floor)
    assert row.forward.predicted_us is None


def test_interpreted_kernels_have_no_time():
    block = convert_(drawn(OldD2l(*CONFIG)).eval())
    with backend("kernels"):
        (row,) = explain(block, images()).rows
    assert (row.path, row.forward.measured_us) == ("kernels", None)
    assert row.forward.predicted_us > 4


def test_it_prints_and_becomes_json():
    model = GoogLeNet().eval()
    found = explain(model, torch.randn(1, 1, 48, 48))
    text = str(found)
    assert "microseconds of a forward\n" in text
    assert "forward and backward" not in text
    assert "NVIDIA H200 (4.30 TB/s, 790 TFLOP/s bf16, 395 TF32), since x is on cpu" in text
    assert "1.3 us a launch (a guess)" in text
    assert "measured: a call of the block as it is on CPU" in text
    assert max(map(len, text.splitlines())) <= 120
    (total,) = (line.split() for line in text.splitlines() if line.startswith("sum"))
    assert float(total[1]) == pytest.approx(sum(row.forward.floor_us for row in found.rows), abs=0.05)
    plain = json.loads(json.dumps(found.to_json()))
    assert [row["name"] for row in plain] == [row.name for row in found.rows]
    assert plain[0]["forward"]["predicted_us"] == found.rows[0].forward.predicted_us
    assert (plain[0]["dtype"], plain[0]["step"]) == ("float32", None)


def test_errors():
    block = FusedInception(*CONFIG)
    with pytest.raises(InceptionInputError, match="x: got list, wants a tensor"):
        explain(block, [1])
    with pytest.raises(InceptionInputError, match="x: got 99 channels in shape"):
        explain(block, torch.randn(2, 99, 5, 5))
    with pytest.raises(InceptionInputError, match="with which model"):
        explain(nn.Sequential(nn.Conv2d(3, C, 1), block), images())
    with pytest.raises(InceptionInputError, match="model: got int"):
        explain(3, images())
    assert explain(nn.Linear(3, 3), torch.ones(2, 3)).rows == ()
