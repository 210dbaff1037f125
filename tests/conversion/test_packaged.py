"""Blocks in a package of AOTInductor: exported, compiled, loaded and called, with gradients on as users do it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx

from clients import CLIENTS, FLAT, C, drawn, images
from inception_fused import FusedInception, InceptionInputError, InceptionParams, backend, convert_, inception
from inception_fused.block.tensor_lists import Needs
from inception_fused.op import forward, operators
from marks import full, quick

SIZES = (C, FLAT[1], FLAT[2:4], FLAT[4:6], FLAT[6])


def without_affine(module):
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.affine, norm.weight, norm.bias = False, None, None
    return module


def batch_norm(change=lambda module: module):
    return convert_(change(drawn(CLIENTS["torchvision"]())).eval())


def lists(kind):
    """The block, by which of its operator's lists are empty."""
    return {
        "no biases": lambda: FusedInception(*SIZES, bias=False),
        "no biases, frozen": lambda: FusedInception(*SIZES, bias=False).requires_grad_(False),
        "no biases, two 3x3": lambda: FusedInception(*SIZES, branch3_kernel_size=3, branch3_convs=2, bias=False),
        "biases": lambda: FusedInception(*SIZES),
        "BatchNorm": batch_norm,
        "BatchNorm, not affine": lambda: batch_norm(without_affine),
        "both": lambda: nn.Sequential(batch_norm(), nn.Conv2d(64, C, 1), FusedInception(*SIZES, bias=False)),
    }[kind]()


KINDS = ("both", "no biases", "no biases, frozen", "no biases, two 3x3", "biases", "BatchNorm", "BatchNorm, not affine")


def loaded(program, folder):
    path = torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(folder / "model.pt2"),
        inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
    )
    return torch._inductor.aoti_load_package(path)


@pytest.fixture
def launched(monkeypatch):
    calls, run = [], forward.launch_forward
    monkeypatch.setattr(forward, "launch_forward", lambda *args: calls.append(1) or run(*args))
    return calls


@pytest.mark.parametrize("kind", quick(KINDS, "both"))
def test_a_package_of_inference(kind, tmp_path, launched):
    model = lists(kind).eval()
    with backend("kernels"):
        program = torch.export.export(model, (images(),), dynamic_shapes=({0: torch.export.Dim("n", max=64)},))
    run = loaded(program, tmp_path)
    for n in (2, 5):
        x = images(n)
        launched.clear()
        y = run(x)
        assert len(launched) == (2 if kind == "both" else 1)
        with backend("kernels"):
            assert torch.equal(y, model(x))


@full
def test_a_package_of_a_step(tmp_path):
    """Forward and backward, of which the backward gets no biases' dtypes."""
    weights, x = [p.detach() for p in FusedInception(*SIZES, bias=False).parameters()], images()

    def step(x, *weights):
        leaves = [t.detach().requires_grad_() for t in (x, *weights)]
        y = inception(leaves[0], InceptionParams(tuple(leaves[1:])))
        return y.detach(), *torch.autograd.grad(y.square().sum(), leaves)

    with backend("kernels"):
        expected = step(x, *weights)
        graph = make_fx(step, tracing_mode="fake")(x, *weights)
    called = [str(node.target) for node in graph.graph.nodes if "inception_fused" in str(node.target)]
    assert called == ["inception_fused._forward.default", "inception_fused._backward.default"]
    found = loaded(torch.export.export(graph, (x, *weights)), tmp_path)(x, *weights)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@torch.no_grad()
def test_none_in_the_place_of_every_empty_list():
    """What AOTInductor hands to the operators."""
    weights, x = [p.detach() for p in FusedInception(*SIZES, bias=False).parameters()], images()
    expected = operators._infer(x, weights, [], True, "kernels")
    assert torch.equal(operators._infer(x, weights, None, True, "kernels", None, None), expected)
    y, *saved = operators._forward(x, weights, None, True, True, True, True, "kernels", None, None)
    assert torch.equal(y, expected)
    needs = Needs(True, [True] * 6, [False] * 6).flat
    found, theirs = (
        operators._backward(y, x, *saved, weights, dtypes, True, needs, "kernels") for dtypes in (None, [])
    )
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))
    from inception_fused.op.autograd import _exported

    with backend("kernels"):
        assert torch.equal(_exported(x, weights, None, True, "kernels", None, None), expected)


@pytest.mark.parametrize(("wish", "count"), [("kernels", 2), ("eager", 0)])
def test_what_a_program_needs_to_be_loaded(wish, count):
    """Exported under the eager backend nothing of this package, whatever the machine; layers to quantize, then."""
    with backend(wish):
        program = torch.export.export(lists("both").eval(), (images(),))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert sum("inception_fused" in target for target in called) == count
    assert sum("conv2d" in target for target in called) == (1 if wish == "kernels" else 13)


def test_a_decomposed_program_names_the_way_out():
    """It has the operator without derivatives."""
    block, x = FusedInception(*SIZES, bias=False), images()
    with backend("kernels"):
        module = torch.export.export(block, (x,)).run_decompositions().module()
        with pytest.raises(InceptionInputError, match="decomposed program of torch.export has, under torch.no_grad"):
            module(x)
        with torch.no_grad():
            assert torch.equal(module(x), block(x))


def test_fakes_go_on_refusing_derivatives_elsewhere():
    """Only while Inductor lowers a graph they do not."""
    x, weights = images(), [*FusedInception(*SIZES, bias=False).parameters()]

    def run(x, *weights):
        return torch.ops.inception_fused._infer(x, list(weights), [], True, "kernels")

    with pytest.raises(InceptionInputError, match="_infer: got an input that requires grad"):
        make_fx(run, tracing_mode="fake")(x, *weights)
