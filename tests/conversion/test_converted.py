"""Converted blocks under PyTorch's compilers and tracers; the tests of FusedInception there are in the files beside."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

from clients import CLIENTS, Torchvision, drawn, images
from inception_fused import backend, convert, convert_, precompile, revert_, verify
from inception_fused.op import forward
from inception_fused.op.checking import checked
from marks import full, quick

NAMES = ("torchvision", "bare", "somebody's copy")


def pair(name):
    """(original, converted) in eval mode."""
    block = drawn(CLIENTS[name]()).eval()
    return block, convert(block)


def gradients(call, x, module):
    x = x.clone().requires_grad_()
    return torch.autograd.grad(call(x).square().mean(), [x, *module.parameters()])


@pytest.mark.parametrize("name", quick(NAMES, "torchvision"))
def test_compiled_as_one_graph_with_gradients(name):
    block, fused = pair(name)
    x = images()
    torch._dynamo.reset()
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    with backend("kernels"):
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)
        found = gradients(compiled, x, fused)
    for a, b in zip(found, gradients(block, x, block), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(compiled(x), block(x), rtol=1e-5, atol=1e-5)


@full
def test_compiled_in_training_mode():
    fused = convert_(Torchvision(24, 16, 8, 24, 8, 16, 8)).train()
    twin, x = copy.deepcopy(fused), images()
    torch._dynamo.reset()
    y = torch.compile(fused, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, revert_(twin)(x), rtol=1e-5, atol=1e-5)
    assert all(torch.allclose(a, b) for a, b in zip(fused.buffers(), twin.buffers(), strict=True))


@pytest.mark.parametrize("name", NAMES)
def test_traced_as_one_node(name):
    block, fused = pair(name)
    traced = torch.fx.symbolic_trace(nn.Sequential(fused))
    called = [node.target.__name__ for node in traced.graph.nodes if node.op == "call_function"]
    # BatchNorm's mode and statistics belong to the module.
    kept = name == "torchvision"
    assert called.count("inception") == (not kept)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == (["0"] if kept else [])
    x = images()
    with backend("kernels"):
        torch.testing.assert_close(traced(x), block(x), rtol=1e-5, atol=1e-5)
    alone = torch.fx.symbolic_trace(fused)
    assert [n.op for n in alone.graph.nodes].count("placeholder") == 1


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.block, self.tail = nn.Conv2d(24, 24, 1), drawn(CLIENTS["torchvision"]()), nn.Conv2d(64, 3, 1)

    def forward(self, x):
        return self.tail(self.block(self.stem(x)))


@pytest.mark.parametrize("training", [False, True], ids=["traced in eval", "traced in training"])
@pytest.mark.parametrize("make", [Net, lambda: drawn(CLIENTS["torchvision"]())], ids=["model", "block"])
def test_traced_batch_norm_trains_on(make, training, monkeypatch):
    """A symbolic trace follows train() and eval(), keeps running statistics, and in eval runs the kernels; of a block
    alone it has the layers."""
    original, x = make(), images()
    traced = torch.fx.symbolic_trace(convert(copy.deepcopy(original)).train(training))
    for mode in (True, False, True):
        original.train(mode)
        traced.train(mode)
        launched = []
        monkeypatch.setattr(
            forward, "launch_forward", lambda *args, run=forward.launch_forward, n=launched: n.append(1) or run(*args)
        )
        with backend("kernels" if make is Net and not mode else "auto"):
            y, found = traced(x), gradients(traced, x, traced)
        assert len(launched) == (2 if make is Net and not mode else 0)
        monkeypatch.undo()
        torch.testing.assert_close(y, original(x), rtol=1e-5, atol=1e-5)
        for a, b in zip(found, gradients(original, x, original), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        theirs = dict(original.named_buffers())
        assert all(torch.allclose(b, theirs[name], atol=1e-6) for name, b in traced.named_buffers())
        assert len(theirs) == 18


@pytest.mark.parametrize("name", NAMES)
def test_exported_with_a_dynamic_batch(name):
    block, fused = pair(name)
    assert inspect.signature(fused.forward) == inspect.signature(block.forward)
    with backend("kernels"):
        shapes = ({0: torch.export.Dim("n")},)
        program = torch.export.export(fused, (images(),), dynamic_shapes=shapes)
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert [target.split(".")[:2] for target in called] == [["inception_fused", "_exported"]]
        x = images(3)
        torch.testing.assert_close(program.module()(x), block(x), rtol=1e-5, atol=1e-5)


@full
def test_onnx_through_revert():
    pytest.importorskip("onnxscript")
    fused = convert_(drawn(CLIENTS["torchvision"]()).eval())
    program = torch.onnx.export(revert_(fused), (images(),), dynamo=True, verbose=False)
    operators = {node.op_type for node in program.model.graph}
    assert {"Conv", "MaxPool", "Concat"} <= operators
    assert not any("inception" in operator.lower() for operator in operators)


@full
def test_the_tools_for_whole_models_take_converted_blocks():
    model, x = nn.Sequential(pair("torchvision")[1]), images()
    with backend("kernels"):
        assert verify(model, x).ok
        assert precompile(model, x, progress=False).blocks == ("0",)
        with checked():
            model(x.clone().requires_grad_()).sum().backward()
