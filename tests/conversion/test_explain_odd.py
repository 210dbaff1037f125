"""explain(model, x) on odd models and calls: what has no time and why, and a model that is left as it was."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from clients import C1, C2, C3, C4, CLIENTS, FLAT, C, OldD2l, Torchvision, drawn, images
from inception_fused import FusedInception, InceptionInputError, backend, convert_, explain, precompile, verify

CONFIG = (C, C1, C2, C3, C4)


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
    assert "p2_2 has dilation (2, 2)" in rows["wrong"].path
    assert "3 of 4 are fused blocks; 0 of 4 run kernels" in text


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


def test_whatever_a_forward_raises_is_said():
    block = FusedInception(*CONFIG)
    for error in (KeyError("image"), IndexError("image"), StopIteration("image")):

        def fails(*_, error=error):
            raise error

        with pytest.raises(InceptionInputError, match=f"fails: {type(error).__name__}: '?image"):
            explain(Calls(block, fails), images())
