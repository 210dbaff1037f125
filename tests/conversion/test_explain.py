"""explain(model, x): floor, predicted and measured time of every block, and a model that is left as it was."""

from __future__ import annotations

import contextlib
import copy
import json
import re
import types
from dataclasses import replace

import pytest
import torch
from torch import nn

from clients import C1, C2, C3, C4, CLIENTS, FLAT, C, NewD2l, OldD2l, Torchvision, drawn, images
from inception_fused import FusedInception, GoogLeNet, InceptionInputError, backend, convert, convert_, explain
from inception_fused.block.shapes import BlockShape
from inception_fused.conversion.fused_blocks import view_of
from inception_fused.op import dispatch, reasons
from inception_fused.plan import choice, tuned
from inception_fused.plan.cards import H200
from inception_fused.plan.choice import tiled
from inception_fused.plan.floors import block_work
from inception_fused.plan.forecast import forecast
from inception_fused.tools import block_times
from inception_fused.tools.capture import Item
from tune_fakes import GPU, entry, put

CONFIG = (C, C1, C2, C3, C4)


def floor_us(block, shape, *, training=False, precision="tf32", itemsize=4):
    n, _, h, w = shape
    convs = [conv for conv in block.modules() if isinstance(conv, nn.Conv2d)]
    k = [conv.out_channels for conv in convs]
    sides = tuple(conv.kernel_size[0] for conv in convs)
    sizes = BlockShape(n, h, w, convs[0].in_channels, tuple(k), sides, itemsize)
    work = block_work(sizes, training=training)
    return sizes, 1e6 * work.floor(H200, precision)


@pytest.mark.parametrize("converted", [True, False])
@pytest.mark.parametrize("name", CLIENTS)
def test_the_times_of_every_family(name, converted):
    block = drawn(CLIENTS[name]()).eval()
    x = images(3, 9, 5)
    shape, floor = floor_us(block, x.shape)
    (row,) = explain(convert(block) if converted else block, x).rows
    assert row.state == ("converted" if converted else "not converted")
    assert (row.x_shape, row.dtype, row.step) == (tuple(x.shape), torch.float32, None)
    assert row.forward.floor_us == pytest.approx(floor)
    launches = forecast(shape, torch.float32, H200, precision="tf32", packs=True)
    assert row.forward.predicted_us == pytest.approx(1e6 * sum(launch.predicted for launch in launches))
    assert row.forward.measured_us > 1


def test_a_block_in_training_mode_has_a_step_too():
    block, x = drawn(OldD2l(*CONFIG)).train(), images()
    shape, floor = floor_us(block, x.shape, training=True)
    (row,) = explain(convert(block), x).rows
    assert row.step.floor_us == pytest.approx(floor)
    launches = forecast(shape, torch.float32, H200, precision="tf32", training=True, packs=True)
    assert row.step.predicted_us == pytest.approx(1e6 * sum(launch.predicted for launch in launches))
    assert row.step.measured_us > row.forward.measured_us


def test_what_is_measured_is_the_block_as_it_is(monkeypatch):
    """In training mode BatchNorm's block computes with batch statistics; autocast's weights are cast in every call."""
    block = convert_(drawn(Torchvision(*FLAT)))
    x, seen = images().requires_grad_(), []

    def clock(calls, device):
        seen.append([call() for call in calls])
        return [7.0], None

    monkeypatch.setattr(block_times, "clock", clock)
    for training in (False, True):
        block.train(training)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (row,) = explain(block, x).rows
            expected = copy.deepcopy(block)(x)
        assert row.dtype == torch.bfloat16
        torch.testing.assert_close(seen[0][0], expected.detach(), rtol=0, atol=0)
        assert row.forward.measured_us == 7.0
        assert row.forward.predicted_us > 1
        _, floor = floor_us(block, x.shape, precision="bf16", itemsize=2)
        assert row.forward.floor_us == pytest.approx(floor)
        assert len(seen) == 1 + training
        seen.clear()
    assert row.path.startswith("eager: x is on the CPU")
    assert row.step.measured_us == 7.0


def test_a_block_that_waits_for_its_first_input():
    """LazyBatchNorm has buffers that wait too. What the weights drew may not be drawn again."""
    model = nn.Sequential(nn.LazyConv2d(C, 1), nn.LazyBatchNorm2d(), NewD2l(*CONFIG[1:]))
    assert explain(model).rows[0].path.startswith("convert_(model) converts it, once it has its first input")
    convert_(model)
    assert "wait for the first input" in explain(model).rows[0].path
    torch.manual_seed(3)
    (row,) = explain(model, images()[:, :4]).rows
    assert row.x_shape == tuple(images().shape)
    assert row.forward.measured_us > 1
    weight = model[0].weight.detach()
    again = torch.rand(weight.numel()) - 0.5  # U(-1/2, 1/2) of four channels
    assert not torch.allclose(again, weight.flatten(), atol=1e-6)


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
    assert "measured: the first call of the block as it is, on CPU" in text
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


def test_on_a_card_its_ceilings_its_tables_and_its_choices_count(monkeypatch, tiles_folder):
    """What a GPU's part of it asks, with the answers of one that is not there."""
    block, x = convert(drawn(OldD2l(*CONFIG)).half().eval(), channels_last=True), images().half()
    view = view_of(block)
    params = view.params()
    device, asked = torch.device("cuda", 0), []
    card = replace(H200, name="a card", bandwidth=1e12, flops={"fp16": 1e14}, multiprocessors=10, launch=2e-6)
    monkeypatch.setattr(reasons, "MACHINE", ())
    monkeypatch.setattr(dispatch, "choices", lambda *args: asked.append(args) or {"K1": "native"})
    monkeypatch.setattr(tuned, "key", lambda device: GPU)
    shape = BlockShape.of(x, params.weights)
    k2 = next(p for p in tiled(shape, torch.float16) if p.name == "K2")
    put(entry("K2", "fp16", k2.gemm.m, k2.gemm.n, k2.gemm.k, choice.tile_of(k2), us=55.0))

    def times(ceilings):
        subject = block_times.Subject(block, view.params, kernels=True)
        item = Item("block", view, types.SimpleNamespace(device=device, is_cuda=True, dtype=x.dtype))
        return block_times._arithmetic(subject, item, params, shape, ceilings, training=False)

    found = times(card)
    assert asked == [("auto", device, torch.float16)]
    launches = forecast(
        shape, torch.float16, card, precision="fp16", packs=False, chosen={"K1": "native"}, gpu=GPU
    )  # fmt: skip
    assert [launch.timed for launch in launches] == [False, True, False], "K1, K2, K3+K4"
    assert found == (pytest.approx(1e6 * block_work(shape).floor(card, "fp16")), launches)
    monkeypatch.setattr(reasons, "MACHINE", (lambda question: reasons.Reason("triton", "too old"),))
    assert times(card)[1] is None


def test_the_ceilings_of_a_card_are_measured_once(monkeypatch):
    asked = []

    def measure_ceilings(stopwatch, device, **sizes):
        asked.append((stopwatch, device, sizes))
        return {"bandwidth": 1e12, "bf16": 2e14, "launch_us": 2.5, "multiprocessors": 80}

    monkeypatch.setattr(block_times, "measure_ceilings", measure_ceilings)
    monkeypatch.setattr(block_times, "stopwatch_for", lambda device: f"of {device}")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    block_times._measured_ceilings.cache_clear()
    try:
        found = [block_times.card_ceilings(torch.device("cuda", 1)) for _ in range(2)]
    finally:
        block_times._measured_ceilings.cache_clear()
    ((stopwatch, device, sizes),) = asked
    assert (stopwatch, device) == ("of cuda:1", torch.device("cuda", 1))
    assert sizes["tf32"] is False, "it may not switch the process to TF32"
    assert found[0] is found[1]
    assert (found[0].name, found[0].multiprocessors, found[0].flops["tf32"]) == ("a card, measured", 80, 1e14)


@pytest.mark.parametrize("name", ["old d2l", "torchvision"])
def test_a_prediction_before_conversion_is_the_one_after_it(name):
    block = drawn(CLIENTS[name]()).eval()
    before, after = (explain(model, images()).rows[0] for model in (block, convert(block)))
    assert before.forward[:2] == after.forward[:2]
    assert (before.kind, after.kind) == (type(block).__name__,) * 2
    before, after = (explain(model.train(), images()).rows[0] for model in (block, convert(block)))
    assert before.step[:2] == after.step[:2]
    with backend("eager"):
        assert explain(convert(block), images()).rows[0].forward.predicted_us is None


def test_long_lines_go_on_below():
    wrong = drawn(OldD2l(*CONFIG))
    wrong.p4_1 = nn.MaxPool2d(5, 1, 2)
    text = str(explain(nn.ModuleDict({"a_block_with_a_rather_long_name_in_it": nn.Sequential(wrong)})))
    assert max(map(len, text.splitlines())) <= 120
    assert "wants a MaxPool2d of 3x3, stride 1, padding 1" in " ".join(text.split())
    assert len(text.splitlines()) > 4


REMEDY = re.compile(r"one launch more \(pack\) rewrites the (3x3 and 5x5) weights .*channels_last=True\) saves it")


@pytest.mark.parametrize("kind", ["not converted", "converted", "fused"])
def test_the_launch_that_rewrites_weights_has_a_remedy(kind):
    """In the row, its data and the text; once it is followed, the prediction is a launch less and no word remains."""
    block = FusedInception(*CONFIG) if kind == "fused" else drawn(OldD2l(*CONFIG))
    model = nn.ModuleDict({"a": block.eval(), "b": nn.Identity()})
    if kind == "converted":
        convert_(model)
    run = nn.Sequential(model["a"])
    for rows in (explain(model), explain(run, images())):
        assert rows.rows[0].state == kind
        assert REMEDY.fullmatch(rows.rows[0].remedy)
        assert json.loads(json.dumps(rows.to_json()))[0]["remedy"] == rows.rows[0].remedy
        assert REMEDY.search(str(rows).replace("\n", " "))
    before = explain(run, images()).rows[0].forward.predicted_us
    convert_(model, channels_last=True)
    row = explain(run, images()).rows[0]
    assert row.remedy == ""
    assert before - row.forward.predicted_us > 1e6 * H200.launch
    assert "pack" not in str(explain(model))


def test_no_remedy_where_other_strides_save_no_launch():
    """BatchNorm is folded, and autocast's weights are cast, in the same launch; a hooked block runs no kernel."""
    assert [row.remedy for row in explain(convert_(drawn(Torchvision(*FLAT)).eval())).rows] == [""]
    block = convert_(drawn(OldD2l(*CONFIG)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert explain(block, images()).rows[0].remedy == ""
    block.p2_2.register_forward_hook(lambda *_: None)
    assert explain(block).rows[0].remedy == ""
