"""Blocks under torch.jit: a converted block is scripted as its own forward, FusedInception is refused in words, and a
trace keeps the kernels."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from clients import CLIENTS, FLAT, C, OldD2l, Torchvision, drawn, images
from inception_fused import (
    FallbackWarning,
    FusedInception,
    InceptionInputError,
    KernelError,
    backend,
    convert,
    convert_,
)
from inception_fused.conversion.converted import ConvertedBlock
from inception_fused.modules import tracers
from marks import quick

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
SIZES = (C, FLAT[1], FLAT[2:4], FLAT[4:6], FLAT[6])


@pytest.fixture(autouse=True)
def builtins_are_callable(monkeypatch):
    """PyTorch knows its builtins by id() alone, also those that are gone: a list at their address does not compile."""
    find = torch.jit._recursive._find_builtin
    monkeypatch.setattr(torch.jit._recursive, "_find_builtin", lambda item: find(item) if callable(item) else None)


def through_a_file(scripted):
    file = io.BytesIO()
    torch.jit.save(scripted, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.ReLU(), m)], ids=["block", "model"])
@pytest.mark.parametrize("name", quick(("old d2l", "torchvision", "bare"), "old d2l", "torchvision"))
def test_a_scripted_block_is_its_own_forward(name, wrap):
    """Though that reads names of another module, such as F."""
    model = wrap(drawn(CLIENTS[name]()).eval())
    fused, x = convert(model), images()
    scripted = torch.jit.script(fused)
    assert any(isinstance(m, ConvertedBlock) for m in fused.modules())
    for run in (scripted, through_a_file(scripted)):
        torch.testing.assert_close(run(x), model(x), rtol=1e-5, atol=1e-5)
        if name == "torchvision":
            copied = copy.deepcopy(model).train()
            torch.testing.assert_close(run.train()(x), copied(x), rtol=1e-5, atol=1e-5)


def made_with(act):
    class Client(nn.Module):
        """A forward that closes over a name."""

        def __init__(self):
            super().__init__()
            self.p1_1, self.p2_1 = nn.Conv2d(C, 16, 1), nn.Conv2d(C, 8, 1)
            self.p2_2, self.p3_1 = nn.Conv2d(8, 24, 3, padding=1), nn.Conv2d(C, 8, 1)
            self.p3_2, self.p4_1 = nn.Conv2d(8, 16, 5, padding=2), nn.MaxPool2d(3, 1, 1)
            self.p4_2 = nn.Conv2d(C, 8, 1)

        def forward(self, x):
            p2, p3 = self.p2_2(act(self.p2_1(x))), self.p3_2(act(self.p3_1(x)))
            return torch.cat((act(self.p1_1(x)), act(p2), act(p3), act(self.p4_2(self.p4_1(x)))), 1)

    return Client()


def test_a_forward_that_closes_over_names():
    block, x = made_with(torch.relu), images()
    fused = convert(block)
    assert isinstance(fused, ConvertedBlock)
    torch.testing.assert_close(torch.jit.script(fused)(x), block(x), rtol=1e-5, atol=1e-5)


def test_a_scripted_model_is_left_as_it_was():
    """Scripting does not take the kernels from the model."""
    model = nn.Sequential(convert_(OldD2l(*SIZES)))
    block = model[0]
    torch.jit.script(model)
    assert model[0] is block
    assert isinstance(block, ConvertedBlock)


def test_kernels_are_demanded_or_expected(monkeypatch):
    block = convert_(OldD2l(*SIZES))
    with backend("kernels"), pytest.raises(KernelError, match="torch.jit.script compiles a block's own forward; torch"):
        torch.jit.script(block)
    # A parameter on a GPU, which is not here.
    monkeypatch.setattr(type(block), "parameters", lambda self: iter([type("OnAGpu", (), {"is_cuda": True})]))
    with pytest.warns(
        FallbackWarning, match="in eager PyTorch: torch.jit.script compiles its own forward; torch.export"
    ):
        tracers.announce_script(block)
    with backend("eager"):
        tracers.announce_script(block)


@pytest.mark.parametrize(
    "wrap", [lambda m: m, nn.Sequential, lambda m: nn.ModuleList([m])], ids=["block", "model", "list"]
)
def test_fused_inception_is_refused_in_words(wrap):
    words = "torch.jit.script: got a FusedInception.*torch.export, torch.compile and torch.jit.trace keep the kernels"
    with pytest.raises(InceptionInputError, match=words):
        torch.jit.script(wrap(FusedInception(*SIZES)))


@pytest.mark.parametrize("make", [lambda: FusedInception(*SIZES, bias=False), lambda: Torchvision(*FLAT)], ids=str)
def test_a_trace_keeps_the_kernels(make):
    """Values and gradients, loaded and frozen, at another batch."""
    block = convert_(drawn(make())).eval() if make()._get_name() == "Torchvision" else make()
    with backend("kernels"):
        loaded = through_a_file(torch.jit.trace(block, (images(),)))
        assert "inception_fused::_exported" in str(loaded.inlined_graph)
        x = images(3).requires_grad_()
        ours, theirs = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (loaded, block))
        assert torch.equal(ours, theirs)
        assert torch.equal(loaded(x), block(x))
        torch.testing.assert_close(torch.jit.freeze(loaded.eval())(x), block(x), rtol=1e-5, atol=1e-5)


def test_a_trace_in_training_mode():
    block = drawn(Torchvision(*FLAT)).train()
    traced = torch.jit.trace(convert(block), (images(),), check_trace=False)
    x = images(3)
    torch.testing.assert_close(traced(x), block(x), rtol=1e-5, atol=1e-5)
