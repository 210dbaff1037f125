"""explain(model, x): floor, predicted and measured time of every block, and a model that is left as it was."""

from __future__ import annotations

import contextlib
import copy
import json
import types

import pytest
import torch
from clients import C1, C2, C3, C4, CLIENTS, FLAT, C, NewD2l, OldD2l, Torchvision, drawn, images
from torch import nn
from tune_fakes import GPU, entry, put

from inception_fused import (
    FusedInception,
    GoogLeNet,
    InceptionInputError,
    backend,
    block_times,
    convert,
    convert_,
    dispatch,
    explain,
    precompile,
    tuned,
    verify,
)
from inception_fused.adapter import view_of
from inception_fused.capture import Item
from inception_fused.floors import H200, Ceilings, block_work
from inception_fused.forecast import forecast
from inception_fused.problems import block_problems
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
    packs = any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
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

    monkeypatch.setattr(block_times, "clock", clock)
    for training in (False, True):
        block.train(training)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            (row,) = explain(block, x).rows
            expected = copy.deepcopy(block)(x)
        assert row.dtype == torch.bfloat16
        torch.testing.assert_close(seen[0][0], expected.detach(), rtol=0, atol=0)
        assert row.forward.measured_us == 7.0
        assert (row.forward.predicted_us is None) == training
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


class Several(nn.Module):
    """Blocks of which each has something about it; good has nothing."""

    def __init__(self, **blocks):
        super().__init__()
        for name, block in (blocks | {"good": convert_(drawn(OldD2l(*CONFIG)))}).items():
            self.add_module(name, block)

    def forward(self, x):
        return [block(x) for name, block in self.named_children() if name != "idle"]


def test_what_has_no_time_and_why():
    calls = []
    hooked, idle = (convert_(drawn(OldD2l(*CONFIG))) for _ in range(2))
    hooked.p3_2.register_forward_hook(lambda *_: calls.append(1))
    wrong = drawn(OldD2l(*CONFIG))
    wrong.p2_2.dilation, wrong.p2_2.padding = (2, 2), (2, 2)
    found = explain(Several(hooked=hooked, idle=idle, wrong=wrong).eval(), images())
    assert len(calls) == 1, "a hook runs with model(x) and not again"
    rows, text = {row.name: row for row in found.rows}, str(found)
    for name in ("idle", "wrong"):
        assert (rows[name].forward, rows[name].step) == (None, None)
    assert rows["hooked"].forward.floor_us == rows["good"].forward.floor_us
    assert rows["hooked"].forward[1:] == (None, None)
    assert all(value > 0 for value in rows["good"].forward)
    assert "\nidle: not timed: model(x) did not call it." in text
    assert "\nhooked: not timed: it has hooks, which would run with it." in text
    assert "p2_2 is configured as" in rows["wrong"].path
    assert "3 of 4 run as fused blocks where the kernels can run; as it is, here, 0 do" in text


class TwoOutputs(FusedInception):
    def forward(self, x):
        return super().forward(x), x


class Skip(FusedInception):
    def forward(self, x, skip):
        return super().forward(x) + skip


class Unused(FusedInception):
    def __init__(self, *args):
        super().__init__(*args)
        self.aux = nn.Linear(3, 3)


class Named(OldD2l):
    def forward(self, inputs):
        return super().forward(inputs)


class Calls(nn.Module):
    """Calls its block as somebody does."""

    def __init__(self, block, call):
        super().__init__()
        self.block, self.call = block, call

    def forward(self, x):
        return self.call(self.block, x)


ODD_CALLS = {
    "more than a tensor": (TwoOutputs, lambda block, x: block(x), "a call of it alone fails: TypeError"),
    "more arguments": (Skip, lambda block, x: block(x, 1.0), "a call of it alone fails: TypeError"),
    "no batch": (None, lambda block, x: block(x[0]), "its input has shape (24, 7, 5)"),
    "an empty batch": (FusedInception, lambda block, x: block(x[:0]), "its input has shape (0, 24, 7, 5)"),
    "under vmap": (FusedInception, lambda block, x: torch.func.vmap(block)(x[None]), "its input cannot be copied"),
    "an unused parameter": (Unused, lambda block, x: block(x), ""),
    "by name": (Named, lambda block, x: block(inputs=x), ""),
    "twice": (FusedInception, lambda block, x: (block(x), block(x[:1])), ""),
}


@pytest.mark.parametrize("name", ODD_CALLS)
def test_odd_calls(name):
    kind, call, why = ODD_CALLS[name]
    # The bare block without a batch concatenates its images' channels, which is torch's business.
    block = convert_(drawn(kind(*CONFIG))) if kind is not None else convert_(Unbatched(*CONFIG))
    found = explain(Calls(block, call).train(), images())
    (row,) = found.rows
    if why:
        assert f"block: not timed: {why}" in " ".join(str(found).split())
        assert row.forward is None or row.forward.measured_us is None
    else:
        assert row.x_shape == (2, C, 7, 5)
        assert row.forward.measured_us > 1
        assert row.step.measured_us > 1


class Unbatched(OldD2l):
    def forward(self, x):
        p2, p3 = torch.relu(self.p2_1(x)), torch.relu(self.p3_1(x))
        branches = (self.p1_1(x), self.p2_2(p2), self.p3_2(p3), self.p4_2(self.p4_1(x)))
        return torch.relu(torch.cat(branches, dim=-3))


def test_a_forward_before_it_can_still_run_backward():
    """BatchNorm in training mode saves its statistics, and whoever writes into them spoils its backward."""
    model = nn.Sequential(convert_(drawn(Torchvision(*FLAT))), FusedInception(64, C1, C2, C3, C4)).train()
    for tool in (explain, verify):
        y, before = model(images()), copy.deepcopy(model.state_dict())
        tool(model, images())
        y.sum().backward()
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("block", [lambda: convert_(OldD2l(*CONFIG)), lambda: FusedInception(*CONFIG)])
def test_reading_a_weight_may_not_change_it(block):
    block = block().train()
    nn.utils.parametrizations.spectral_norm(block.p3_2)
    before = copy.deepcopy(block.state_dict())
    for x in (None, images()):
        assert "p3_2 is a ParametrizedConv2d" in explain(block, x).rows[0].path
        assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())


def test_global_hooks_do_not_run_with_the_clock():
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        (row,) = explain(drawn(OldD2l(*CONFIG)), images()).rows
    finally:
        handle.remove()
    assert row.forward.measured_us is None
    assert len(calls) < 60, "those of the probe and of one model(x)"


def test_parts_that_are_no_ordinary_modules():
    scripted = torch.jit.script(nn.Sequential(nn.Conv2d(C, C, 1), nn.BatchNorm2d(C)))
    model = nn.Sequential(scripted, drawn(OldD2l(*CONFIG))).train()
    mean = scripted[1].running_mean.clone()
    (row,) = explain(convert_(model), images()).rows
    assert row.forward.measured_us > 1
    assert torch.equal(scripted[1].running_mean, mean)


def test_models_made_in_inference_mode():
    with torch.inference_mode():
        model = convert_(drawn(Torchvision(*FLAT)))
        assert explain(model.train(), images()).rows[0].step.measured_us > 1
        with backend("kernels"):
            assert precompile(model.eval(), images(), progress=False).blocks == ("model",)
    assert explain(model, images()).rows[0].forward.measured_us > 1
    assert verify(model, images(), backward=False).ok


def test_models_without_memory():
    model = convert_(drawn(Torchvision(*FLAT)).eval()).to("meta")
    found = explain(model, images().to("meta"))
    assert found.rows[0].forward.floor_us > 0
    assert "not timed: it is on meta" in str(found)
    with pytest.raises(InceptionInputError, match="with which model"):
        explain(nn.Sequential(nn.BatchNorm2d(C, device="meta"), model), images())


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
    for error in (KeyError("image"), IndexError("image"), StopIteration("image")):

        def fails(*_, error=error):
            raise error

        with pytest.raises(InceptionInputError, match=f"fails: {type(error).__name__}: '?image"):
            explain(Calls(block, fails), images())
    with pytest.raises(InceptionInputError, match="model: got int"):
        explain(3, images())
    assert explain(nn.Linear(3, 3), torch.ones(2, 3)).rows == ()


def test_on_a_card_its_ceilings_its_tables_and_its_choices_count(monkeypatch, tiles_folder):
    """What a GPU's part of it asks, with the answers of one that is not there."""
    block, x = convert(drawn(OldD2l(*CONFIG)).half().eval()), images().half()
    view = view_of(block)
    params = view.params()
    device, asked = torch.device("cuda", 0), []
    card = Ceilings("a card", 1e12, {"fp16": 1e14}, 10, 2e-6)
    monkeypatch.setattr(dispatch, "obstacle", lambda *_: None)
    monkeypatch.setattr(dispatch, "choices", lambda *args: asked.append(args) or {"K1": "native"})
    monkeypatch.setattr(tuned, "key", lambda device: GPU)
    shape = BlockShape.of(x, params.weights)
    k2 = next(p for p in block_problems(shape, torch.float16) if p.launch == "K2")
    put(entry("K2", "fp16", k2.gemm_m, k2.gemm_n, k2.gemm_k, k2.tile(), us=55.0))

    def times(ceilings):
        subject = block_times.Subject(block, view.params, kernels=True)
        item = Item("block", view, types.SimpleNamespace(device=device, is_cuda=True, dtype=x.dtype))
        return block_times._arithmetic(subject, item, params, shape, ceilings, training=False)

    found = times(card)
    assert asked == [("auto", device, torch.float16)]
    launches = forecast(
        shape, torch.float16, card, precision="fp16", packs=False, chosen={"K1": "native"}, gpu=GPU
    )  # fmt: skip
    assert [launch.timed for launch in launches] == [False, True, False, False]
    assert found == (
        pytest.approx(1e6 * block_work(shape).floor(card, "fp16")),
        pytest.approx(1e6 * sum(launch.predicted for launch in launches)),
    )
    monkeypatch.setattr(dispatch, "obstacle", lambda *_: "too old")
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
    (row,) = explain(block.train(), images()).rows
    assert (row.step.predicted_us is None) == (name == "torchvision"), "with batch statistics no kernel runs"
    with backend("eager"):
        assert explain(convert(block), images()).rows[0].forward.predicted_us is None


def test_long_lines_go_on_below():
    wrong = drawn(OldD2l(*CONFIG))
    wrong.p2_2.dilation, wrong.p2_2.padding, wrong.p2_2.padding_mode = (2, 2), (2, 2), "reflect"
    text = str(explain(nn.ModuleDict({"a_block_with_a_rather_long_name_in_it": nn.Sequential(wrong)})))
    assert max(map(len, text.splitlines())) <= 120
    assert "padding_mode=reflect)" in text
