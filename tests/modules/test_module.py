"""FusedInception is Inception to its users: weights, state, layout, hooks, in-place operations; more in compat/."""

import copy

import pytest
import torch
from torch import nn

from checks.block_cases import ODD, SMALL
from inception_fused import FusedInception, Inception, KernelError, backend
from inception_fused.testing import Error, assert_parity, tolerance
from marks import each_once

DOUBLE = {"branch3_kernel_size": 3, "branch3_convs": 2}


def _pair(config=SMALL, **kwargs) -> tuple[FusedInception, Inception]:
    """Both blocks built from the same seed."""
    blocks = []
    for kind in (FusedInception, Inception):
        torch.manual_seed(3)
        blocks.append(kind(*config, **kwargs))
    return blocks[0], blocks[1]


@pytest.mark.parametrize(
    "kwargs", [{}, {"bias": False}, {"branch3_kernel_size": 3, "activation": None}, DOUBLE], ids=str
)
def test_same_weights_keys_and_outputs(kwargs):
    fused, eager = _pair(**kwargs)
    assert list(fused.state_dict()) == list(eager.state_dict())
    for (name, a), b in zip(fused.state_dict().items(), eager.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
        assert a.stride() == b.stride(), name
    eager.load_state_dict(fused.state_dict(), strict=True)
    x = torch.randn(2, 24, 5, 4)
    for wish in ("auto", "kernels", "eager"):
        with backend(wish):
            assert Error.of(fused(x), eager(x)).within(tolerance(torch.float32, 24 * 25))


def test_children_are_genuine():
    fused, _ = _pair()
    assert [type(m) for m in fused.children()] == [nn.Conv2d] * 5 + [nn.MaxPool2d, nn.Conv2d]
    assert [name for name, _ in _pair(**DOUBLE)[0].named_children()] == [
        "p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p3_3", "p4_1", "p4_2",
    ]  # fmt: skip
    assert isinstance(fused, Inception)
    assert "activation='relu'" in repr(fused)


@pytest.mark.parametrize("wish", ["auto", "kernels", "eager"])
@pytest.mark.parametrize("shape", [(2, 24, 5, 4), (1, 24, 1, 1), (0, 24, 3, 3)])
def test_output_is_channels_last_whatever_came_in(shape, wish):
    fused, _ = _pair()
    x = torch.randn(shape)
    with backend(wish):
        for given in (x, x.contiguous(memory_format=torch.channels_last)):
            y = fused(given)
            assert y.is_contiguous(memory_format=torch.channels_last)
            assert y.shape == (shape[0], SMALL.out_channels, *shape[2:])


@pytest.mark.parametrize("wish", ["auto", "kernels"])
@pytest.mark.parametrize(
    "change", [lambda y: y.mul_(2), lambda y: nn.functional.relu(y, inplace=True), lambda y: y.add_(1)]
)
def test_in_place_operations_on_the_output(change, wish):
    fused, eager = _pair()
    x = torch.randn(2, 24, 5, 4)
    grads = []
    for block, spec in ((fused, wish), (eager, "auto")):
        leaf = x.clone().requires_grad_()
        with backend(spec):
            change(block(leaf)).square().sum().backward()
        grads.append(leaf.grad)
    assert Error.of(grads[0], grads[1]).within(tolerance(torch.float32, 24 * 25))


@each_once
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kwargs", [{}, DOUBLE], ids=["one window", "two windows"])
def test_parity_of_outputs_and_gradients(dtype, config, kwargs):
    fused = FusedInception(*config, dtype=dtype, **kwargs)
    with backend("kernels"):
        rows = assert_parity(fused, torch.randn(2, config.in_channels, 5, 6).to(dtype))
    assert [row.what for row in rows][:5] == ["branch 1", "branch 2", "branch 3", "branch 4", "d x"]
    assert len(rows) == 4 + 1 + len(list(fused.parameters()))


def test_hooks_on_children_are_honoured():
    fused, eager = _pair()
    x = torch.randn(1, 24, 3, 3)
    calls = []
    handle = fused.p2_1.register_forward_hook(lambda m, args, out: calls.append(out.shape))
    assert torch.allclose(fused(x), eager(x), atol=1e-6)
    assert calls == [(1, 8, 3, 3)]
    with backend("kernels"), pytest.raises(KernelError, match="p2_1 has a hook"):
        fused(x)
    handle.remove()
    with backend("kernels"):
        fused(x)


def _replace(name: str, module: nn.Module):
    return lambda block: setattr(block, name, module)


CHANGES = {
    "p2_2 is a Sequential": _replace("p2_2", nn.Sequential(nn.Conv2d(8, 24, 3, padding=1))),
    "p4_1 is an AvgPool2d": _replace("p4_1", nn.AvgPool2d(3, stride=1, padding=1)),
    "p3_2 is configured": _replace("p3_2", nn.Conv2d(8, 16, 3, padding=2, dilation=2)),
    "p1_1 is configured": _replace("p1_1", nn.Conv2d(24, 16, 1, groups=2)),
    "p2_2 is configured": _replace("p2_2", nn.Conv2d(8, 24, 3, padding=1, padding_mode="reflect")),
    "p2_1 has a forward of its own": lambda block: setattr(block.p2_1, "_conv_forward", lambda x, w, b: x[:, :8]),
    "some convolutions have a bias": lambda block: setattr(block.p1_1, "bias", None),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_changed_children_are_honoured(reason):
    torch.manual_seed(5)
    fused, eager = _pair()
    CHANGES[reason](fused)
    CHANGES[reason](eager)
    eager.load_state_dict(fused.state_dict())
    x = torch.randn(1, 24, 5, 5)
    assert torch.allclose(fused(x), eager(x), atol=1e-6)
    with backend("kernels"), pytest.raises(KernelError, match=reason):
        fused(x)


def test_writes_through_data_are_seen():
    fused, _ = _pair()
    x = torch.randn(1, 24, 3, 3)
    with backend("kernels"), torch.no_grad():
        before = fused(x)
        fused.p2_2.weight.data.mul_(2)
        fused.p2_2.bias.data.mul_(2)
        after = fused(x)
    branch = slice(16, 40)
    assert torch.allclose(after[:, branch], 2 * before[:, branch], atol=1e-5)
    assert torch.equal(after[:, :16], before[:, :16])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """fp32 parameters under autocast: output in autocast's dtype, gradients in the parameters' dtype and strides.

    Without ReLU, whose mask a rounding difference may flip; parity of gradients with ReLU is tested elsewhere.
    """
    fused, eager = _pair(activation=None)
    x = torch.randn(2, 24, 5, 4)
    results = []
    for block, wish in ((fused, "kernels"), (eager, "auto"), (copy.deepcopy(eager).double(), None)):
        with backend(wish or "auto"), torch.autocast("cpu", dtype=dtype, enabled=wish is not None):
            y = block(x if wish else x.double())
        y.double().square().sum().backward()
        results.append({"y": y.detach()} | {name: p.grad for name, p in block.named_parameters()})
    assert results[0]["y"].dtype == dtype
    for p in fused.parameters():
        assert (p.grad.dtype, p.grad.stride()) == (p.dtype, p.stride())
    for name, truth in results[2].items():
        ours, theirs = (Error.of(result[name], truth) for result in results[:2])
        assert ours.rms <= 2 * theirs.rms + tolerance(dtype, 24 * 25), name
    with backend("kernels"), torch.autocast("cpu", dtype=dtype), torch.autocast("cpu", enabled=False):
        assert fused(x).dtype == torch.float32
