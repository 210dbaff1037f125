"""GoogLeNet's max-pools of stride 2 are MaxPool2d to their users, whatever computes them."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inception_fused import FusedInception, GoogLeNet, Inception, InceptionInputError, KernelError, backend
from inception_fused.block.googlenet_blocks import InceptionConfig
from inception_fused.modules import googlenet
from inception_fused.modules.pools import FusedPool, pooled
from inception_fused.op.pools_autograd import max_pool
from inception_fused.runtime import submit

NAMES = ("b1.2", "b2.4", "b3.2", "b4.5")


def images(*shape, seed=1):
    return torch.randn(shape or (2, 8, 7, 6), generator=torch.Generator().manual_seed(seed))


PARTS = {"b1": images(1, 1, 9, 8), "b2": images(1, 64, 5, 4), "b3": images(1, 192, 3, 4), "b4": images(1, 480, 3, 2)}
"""Inputs of the network's parts that end with a pool."""


def pool_and_layer(**settings):
    settings = dict(kernel_size=3, stride=2, padding=1) | settings
    return FusedPool(**settings), nn.MaxPool2d(**settings)


def launched(run):
    with backend("kernels"), submit.count() as names:
        found = run()
    return found, [name.partition(":")[0] for name in names]


def test_pools_stand_where_they_stood(nets):
    ours, eager = (dict(net.named_modules()) for net in nets)
    assert list(ours) == list(eager)
    assert tuple(name for name, layer in ours.items() if type(layer) is FusedPool) == NAMES
    assert not any(isinstance(layer, FusedPool) for layer in eager.values())
    for name in NAMES:
        assert isinstance(ours[name], nn.MaxPool2d)
        assert ours[name].extra_repr() == eager[name].extra_repr()
    assert list(nets[0].state_dict()) == list(nets[1].state_dict())
    for a, b in zip(*(net.parameters() for net in nets), strict=True):
        assert torch.equal(a, b)


def test_the_whole_network(monkeypatch):
    """Beside the layers in float64, forward and backward, in blocks of few channels."""
    small = {name: InceptionConfig(c, 8, (8, 16), (8, 8), 8) for name, c in (("3a", 192), ("4a", 40), ("5a", 40))}
    monkeypatch.setattr(googlenet, "GOOGLENET_BLOCKS", small)

    def made(block):
        torch.manual_seed(11)
        net = GoogLeNet(block=block)
        net.classifier = nn.Linear(40, 10)
        return net

    ours, eager = made(FusedInception), made(Inception)
    truth = copy.deepcopy(eager).double()
    truth.load_state_dict(ours.state_dict())
    eager.load_state_dict(ours.state_dict())
    x, found = images(2, 1, 36, 32), {}
    for name, net in (("ours", ours), ("eager", eager), ("truth", truth), ("again", ours)):
        net.zero_grad()
        with backend("kernels" if net is ours else "auto"):
            y = net(x.to(net.classifier.weight.dtype))
            y.square().sum().backward()
        found[name] = [y.detach(), *[p.grad.clone() for p in net.parameters()]]
    for one, other, exact, again in zip(*found.values(), strict=True):
        assert torch.equal(one, again)
        errors = [(t.double() - exact).norm() / exact.norm() for t in (one, other)]
        assert errors[0] <= 2 * errors[1] + 1e-6


def test_pools_of_a_network_run_the_kernels(nets):
    """One launch each, the last of its part."""
    with torch.no_grad():
        _, names = launched(lambda: nets[0](images(1, 1, 32, 32)))
        parts = [launched(lambda part=part: nets[0].get_submodule(part)(PARTS[part])) for part in PARTS]
    assert names.count("max_pool_kernel") == 4
    assert [some.index("max_pool_kernel") for _, some in parts] == [len(some) - 1 for _, some in parts]


SETTINGS = {
    "usual": {}, "no padding": dict(padding=0), "ceil": dict(padding=0, ceil_mode=True),
    "pairs": dict(kernel_size=(3, 3), stride=(2, 2), padding=(1, 1)),
}  # fmt: skip
OTHERS = {
    "2x2": dict(kernel_size=2), "stride 1": dict(stride=1), "dilated": dict(dilation=2),
    "one side": dict(padding=(0, 1)), "indices": dict(return_indices=True), "pair": dict(stride=(2, 1)),
}  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_of_the_kernels(name):
    ours, layer = pool_and_layer(**SETTINGS[name])
    x = images().requires_grad_()
    y, names = launched(lambda: ours(x))
    assert torch.equal(y, layer(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert names == ["max_pool_kernel"]
    dy = images(*y.shape, seed=3)
    (dx,), (truth,) = (torch.autograd.grad(out, x, dy) for out in (y, layer(x)))
    assert torch.allclose(dx, truth, atol=1e-6)


@pytest.mark.parametrize("name", OTHERS)
def test_other_settings_are_pytorchs(name):
    ours, layer = pool_and_layer(**OTHERS[name])
    for y, truth in zip(ours(images()), layer(images()), strict=True):
        assert torch.equal(y, truth)
    with backend("kernels"), pytest.raises(KernelError, match="its max-pool is configured as FusedPool"):
        ours(images())


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [("ceil_mode", None, "ceil_mode=None"), ("ceil_mode", 1, "ceil_mode=1"), ("return_indices", 1, "return_indices")],
)
def test_settings_that_are_no_flags(name, value, words):
    """PyTorch's layer judges them, and a KernelError names them."""
    ours, layer = pool_and_layer()
    for module in (ours, layer):
        setattr(module, name, value)
    found = []
    for module in (ours, layer):
        try:
            found.append(type(module(images())))
        except TypeError as error:
            found.append(str(error))
    assert found[0] == found[1]
    with backend("kernels"), pytest.raises(KernelError, match=words):
        ours(images())


INPUTS = {
    "3-D": lambda: images(8, 7, 6), "float64": lambda: images().double(), "whole numbers": lambda: images().long(),
    "quantized": lambda: torch.quantize_per_tensor(images(), 0.1, 0, torch.qint8),
    "too small": lambda: images(1, 2, 0, 3), "no tensor": lambda: [1.0],
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_only_pytorch_takes(name):
    ours, layer = pool_and_layer()
    x = INPUTS[name]()
    try:
        truth = layer(x)
    except (RuntimeError, TypeError) as error:
        with pytest.raises(type(error)):
            ours(x)
        return
    y = ours(x)
    assert y.dtype == truth.dtype
    assert torch.equal(y.dequantize() if y.is_quantized else y, truth.dequantize() if y.is_quantized else truth)


@pytest.mark.parametrize("freed", ["x", "bias"])
def test_memory_that_was_freed_is_no_operand(freed):
    """As sharded training frees a parameter's: a kernel would read address 0."""
    given = {"x": images().contiguous(memory_format=torch.channels_last), "bias": torch.ones(8)}
    given[freed].untyped_storage().resize_(0)
    with backend("kernels"), pytest.raises(InceptionInputError, match=f"^{freed}: its memory was freed"):
        max_pool(given["x"], padding=1, bias=given["bias"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda t: t.half(), "taps: got torch.float16"),
        (lambda t: t[1:], "taps: got .* wants dense torch.uint8"),
        (lambda t: t.t().contiguous().t(), "taps: got .* with strides"),
        (lambda t: (t.untyped_storage().resize_(0), t)[1], "taps: its memory was freed"),
    ],
    ids=["dtype", "rows", "strides", "freed"],
)
def test_taps_that_a_hook_has_changed_are_refused(change, words):
    with backend("kernels"), torch.autograd.graph.saved_tensors_hooks(lambda t: t, change):
        y = pool_and_layer()[0](images().requires_grad_())
        with pytest.raises(InceptionInputError, match=words):
            y.sum().backward()


def test_hooks_are_called():
    ours, layer = pool_and_layer()
    seen = []
    ours.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    ours.register_forward_hook(lambda module, args, y: seen.append(y))
    ours.register_full_backward_hook(lambda module, dx, dy: seen.append(dx))
    x = images().requires_grad_()
    y, names = launched(lambda: ours(x))
    y.sum().backward()
    assert names == ["max_pool_kernel"]
    assert torch.equal(y, layer(2 * x))
    assert len(seen) == 2


def test_a_patched_layer_is_honoured(monkeypatch):
    ours, _ = pool_and_layer()
    monkeypatch.setattr(nn.MaxPool2d, "forward", lambda self, x: x + 1)
    assert torch.equal(ours(images()), images() + 1)
    with backend("kernels"), pytest.raises(KernelError, match="MaxPool2d.forward was replaced"):
        ours(images())
    monkeypatch.undo()
    assert launched(lambda: ours(images()))[1] == ["max_pool_kernel"]


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    assert b"inception_fused.pickles" in file.getvalue()
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("way", COPIES)
def test_copies(way):
    ours = COPIES[way](pool_and_layer(padding=0)[0])
    assert type(ours) is FusedPool
    y, names = launched(lambda: ours(images()))
    assert torch.equal(y, F.max_pool2d(images(), 3, 2))
    assert names == ["max_pool_kernel"]


def test_symbolic_traces():
    """One call; the layer's own function under "eager" and where torch.ao.quantization looks."""
    net = nn.Sequential(nn.ReLU(), pool_and_layer()[0])
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [pooled]
    y, names = launched(lambda: traced(images()))
    assert torch.equal(y, net(images()))
    assert "max_pool_kernel" in names
    with backend("eager"):
        traced = torch.fx.symbolic_trace(net)
    assert pooled not in [node.target for node in traced.graph.nodes]
    assert torch.equal(traced(images()), y)


def test_scripts_compile_the_layer():
    ours, layer = pool_and_layer()
    scripted = torch.jit.script(ours)
    assert torch.equal(scripted(images()), layer(images()))
    with backend("kernels"), pytest.raises(KernelError, match="torch.jit.script"):
        torch.jit.script(pool_and_layer()[0])


def test_compiled():
    ours, layer = pool_and_layer()
    compiled = torch.compile(ours, backend="aot_eager", fullgraph=True)
    x = images().requires_grad_()
    with backend("kernels"):
        y = compiled(x)
        y.square().sum().backward()
    (truth,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert torch.equal(y, layer(x))
    assert torch.allclose(x.grad, truth, atol=1e-6)
