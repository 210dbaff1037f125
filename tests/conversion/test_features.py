"""Features from inside a block: by a hook, by a trace that shows its layers, or after revert_."""

from __future__ import annotations

import pytest
import torch
from torch import fx, nn

from clients import CLIENTS, FLAT, C, drawn, images
from inception_fused import FusedInception, KernelError, backend, convert, revert_
from marks import quick

SIZES = (C, FLAT[1], FLAT[2:4], FLAT[4:6], FLAT[6])
INSIDE = {"old d2l": "p2_1", "torchvision": "branch2", "FusedInception": "p2_1"}


def pair(kind):
    """(a model with the block as it was, one with ours) in eval."""
    if kind == "FusedInception":
        ours = nn.Sequential(nn.Conv2d(C, C, 1), FusedInception(*SIZES)).eval()
        with backend("eager"):
            return fx.symbolic_trace(ours), ours
    model = nn.Sequential(nn.Conv2d(C, C, 1), drawn(CLIENTS[kind]())).eval()
    return model, convert(model)


@pytest.mark.parametrize("kind", quick(INSIDE, "torchvision", "FusedInception"))
def test_a_hook_inside_a_block(kind):
    """The block runs its own forward while the hook is there, and the kernels again without it."""
    _, model = pair(kind)
    x, seen = images(), []
    layer = model[1].get_submodule(INSIDE[kind])
    with backend("kernels"):
        y = model(x)
    handle = layer.register_forward_hook(lambda module, args, out: seen.append(out))
    torch.testing.assert_close(model(x), y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(seen[0], layer(model[0](x)), rtol=1e-5, atol=1e-5)
    with backend("kernels"), pytest.raises(KernelError, match="hook"):
        model(x)
    handle.remove()
    with backend("kernels"):
        assert torch.equal(model(x), y)


def features(graph_module, wanted):
    """The module's output at the last node of a name."""
    node = [n for n in graph_module.graph.nodes if n.op == "call_module" and n.target.startswith(wanted)][-1]
    (output,) = (n for n in graph_module.graph.nodes if n.op == "output")
    output.args = (node,)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


@pytest.mark.parametrize("kind", quick(INSIDE, "torchvision", "FusedInception"))
def test_a_trace_under_the_eager_backend_shows_the_layers(kind):
    original, model = pair(kind)
    x, name = images(), INSIDE[kind]
    with backend("eager"):
        traced = fx.symbolic_trace(model)
    targets = [n.target for n in traced.graph.nodes if n.op == "call_module"]
    assert targets == [n.target for n in fx.symbolic_trace(original).graph.nodes if n.op == "call_module"]
    torch.testing.assert_close(traced(x), model(x), rtol=1e-5, atol=1e-5)
    expected = model[1].get_submodule(name)(model[0](x))
    if kind == "torchvision":
        # The last node inside branch2 is a function's, its BatchNorm's output before ReLU.
        expected = model[1].branch2[1].bn(model[1].branch2[1].conv(model[1].branch2[0](model[0](x))))
    torch.testing.assert_close(features(traced, f"1.{name}")(x), expected, rtol=1e-5, atol=1e-5)


def test_a_trace_after_revert_shows_the_layers():
    original, model = pair("torchvision")
    traced = fx.symbolic_trace(revert_(model))
    assert [n.target for n in traced.graph.nodes] == [n.target for n in fx.symbolic_trace(original).graph.nodes]
