"""The operators under opcheck and torch.compile; fake strides are the real ones. More in compat/."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from checks.block_cases import ODD, SMALL, make_block
from inception_fused import FusedInception, GoogLeNet, backend
from inception_fused.block.tensor_lists import Needs
from inception_fused.op.gradients import saves
from inception_fused.testing import Error, tolerance
from marks import each_once, full, more, quick

FORMATS = {
    "NCHW": lambda x: x.contiguous(),
    "NHWC": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 1, 2, 0).contiguous().permute(3, 1, 2, 0),
}


@each_once
@pytest.mark.parametrize("wish", ["kernels", "eager"])
@pytest.mark.parametrize("layout", quick(FORMATS, "NCHW", "permuted"))
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
def test_opcheck_forward(config, layout, wish):
    block = make_block(config, (2, 4, 3))
    x = FORMATS[layout](block.x)
    for save in (True, False):
        args = (x, block.weights, block.biases, True, save, save, save, wish)
        torch.library.opcheck(torch.ops.inception_fused._forward.default, args)
    torch.library.opcheck(torch.ops.inception_fused._infer.default, (x, block.weights, block.biases, True, wish))


@each_once
@pytest.mark.parametrize("needs", [[True] * 13, [False] * 3 + [True] * 2 + [False] * 8], ids=["all", "some"])
@pytest.mark.parametrize(
    ("layout", "wish"), [("NCHW", "kernels"), more("NHWC", "kernels"), more("permuted", "kernels"), ("NHWC", "eager")]
)
def test_opcheck_backward(layout, wish, needs):
    block = make_block(SMALL, (2, 4, 3))
    x = FORMATS[layout](block.x)
    args = (x, block.weights, block.biases, True, *saves(Needs.of(needs), True), wish)
    y, r, bits, taps = torch.ops.inception_fused._forward(*args)
    args = (FORMATS[layout](torch.randn_like(y)), x, r, bits, taps, block.weights, block.bias_dtypes, True, needs, wish)
    torch.library.opcheck(torch.ops.inception_fused._backward.default, args)


@pytest.mark.parametrize("shape", [(2, 24, 4, 3), (1, 24, 1, 1), (0, 24, 4, 3), (3, 24, 1, 5)])
@pytest.mark.parametrize("wish", ["kernels", "eager"])
def test_fake_outputs_have_the_real_strides(wish, shape):
    block = make_block(SMALL, (1, 1, 1))
    x = torch.randn(shape)
    args = (block.weights, block.biases, True, True, True, True, wish)
    real = torch.ops.inception_fused._forward(x, *args)
    with FakeTensorMode() as mode:
        fake_args = ([mode.from_tensor(w) for w in args[0]], [mode.from_tensor(b) for b in args[1]], *args[2:])
        fake = torch.ops.inception_fused._forward(mode.from_tensor(x), *fake_args)
    for a, b in zip(real, fake, strict=True):
        assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype)


def _gradients(run, block, x):
    leaf = x.clone().requires_grad_()
    block.zero_grad()
    y = run(leaf)
    y.square().sum().backward()
    return [y.detach(), leaf.grad, *(p.grad.clone() for p in block.parameters())]


@pytest.mark.parametrize("wish", ["kernels", more("auto"), more("eager"), more("K1=triton,K3=eager")])
def test_fullgraph_forward_and_backward(wish):
    torch._dynamo.reset()
    block = FusedInception(*SMALL)
    x = torch.randn(2, 24, 4, 3)
    with backend(wish):
        expected = _gradients(block, block, x)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        for ours, eager in zip(_gradients(compiled, block, x), expected, strict=True):
            assert Error.of(ours, eager).within(tolerance(torch.float32, 10**3))
        with torch.no_grad():
            assert Error.of(compiled(x), expected[0]).within(tolerance(torch.float32, 10**3))


def test_the_backend_in_force_is_guarded():
    """A compiled block follows a later change of backend."""
    torch._dynamo.reset()
    block = FusedInception(*SMALL)
    x = torch.randn(1, 24, 3, 3)
    graphs = []

    def count(graph, inputs):
        graphs.append(str(graph.graph))
        return graph.forward

    compiled = torch.compile(block, fullgraph=True, backend=count)
    with torch.no_grad():
        compiled(x)
        with backend("kernels"):
            compiled(x)
        compiled(x)
    assert ["inception_fused" in graph for graph in graphs] == [False, True]


@full
def test_whole_network_compiles_as_one_graph():
    torch._dynamo.reset()
    net = GoogLeNet()
    x = torch.randn(1, 1, 32, 32)
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(x).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("grad", [True, False])
def test_symbolic_sizes_outside_a_compiler(grad):
    """They cannot be hashed, and torch.compiler.is_compiling() does not know of them."""
    mode = FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)
    with backend("kernels"), torch.set_grad_enabled(grad):
        y = FusedInception(*SMALL)(mode.from_tensor(torch.randn(3, 24, 5, 4)))
    assert isinstance(y.shape[0], torch.SymInt)
    assert y.shape[1] == SMALL.out_channels
