"""Gradients through autograd: every subset of wanted ones, strides, what is held, repeats, higher order."""

import copy

import pytest
import torch

from checks.block_cases import SMALL, make_block
from inception_fused import (
    GOOGLENET_BLOCKS,
    FusedInception,
    FusedInceptionFunction,
    Inception,
    InceptionConfig,
    InceptionParams,
    backend,
    inception,
)
from inception_fused.block.call_types import BackwardCall, Saved
from inception_fused.block.tensor_lists import Needs
from inception_fused.op import masked
from inception_fused.op.gradients import block_backward, saves
from inception_fused.plan import choice
from inception_fused.testing import GRADIENT_NAMES, Error, tolerance
from marks import more, quick

NAMES = GRADIENT_NAMES


def _leaves(block, needs):
    tensors = [block.x, *block.weights, *block.biases]
    return [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=False)]


def _call(leaves):
    return inception(leaves[0], InceptionParams(tuple(leaves[1:7]), tuple(leaves[7:]) or None))


SUBSETS = {name: [n == name for n in NAMES] for name in NAMES} | {
    "all": [True] * 13,
    "frozen weights": [True] + [False] * 12,
    "no dx": [False] + [True] * 12,
    "biases only": [False] * 7 + [True] * 6,
    "weights only": [False] + [True] * 6 + [False] * 6,
}


@pytest.mark.parametrize("subset", quick(SUBSETS, "p2_1.weight", "p3_1.weight", "no dx"))
def test_only_the_wanted_gradients(subset):
    """Equal to the full set's, nothing else computed or held."""
    needs = SUBSETS[subset]
    block = make_block(SMALL, (2, 4, 5))
    with backend("kernels"):
        full, some = _leaves(block, [True] * 13), _leaves(block, needs)
        dy = torch.randn(2, SMALL.out_channels, 4, 5)
        _call(full).backward(dy)
        y = _call(some)
        held = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8 and t.numel()]
        y.backward(dy)
    assert len(held) == sum(saves(Needs.of(needs), True)[1:])
    for name, a, b, need in zip(NAMES, some, full, needs, strict=True):
        assert (a.grad is not None) == need, name
        if need:
            assert Error.of(a.grad, b.grad).within(tolerance(torch.float32, 10**3)), name


def test_without_biases():
    block = make_block(SMALL, (2, 4, 5), bias=False)
    with backend("kernels"):
        leaves = _leaves(block, [True] * 7)
        _call(leaves).sum().backward()
    reference = _leaves(block, [True] * 7)
    _call(reference).sum().backward()
    for a, b in zip(leaves, reference, strict=True):
        assert Error.of(a.grad, b.grad).within(tolerance(torch.float32, 10**4))


@pytest.mark.parametrize(
    "make_dy",
    [
        lambda s: torch.ones(()).expand(s),
        more(lambda s: torch.randn(s).contiguous()),
        more(lambda s: torch.randn(s).contiguous(memory_format=torch.channels_last)),
        lambda s: torch.randn(s[0], 2 * s[1], *s[2:])[:, ::2],
        more(lambda s: torch.randn(s[3], s[2], s[1], s[0]).permute(3, 2, 1, 0)),
    ],
    ids=["stride 0", "NCHW", "NHWC", "sliced", "permuted"],
)
def test_any_strides_of_dy(make_dy):
    block = make_block(SMALL, (2, 4, 5))
    dy = make_dy((2, SMALL.out_channels, 4, 5))
    before = dy.clone()
    grads = []
    for given in (dy, dy.contiguous(memory_format=torch.channels_last)):
        with backend("kernels"):
            leaves = _leaves(block, [True] * 13)
            _call(leaves).backward(given)
        grads.append([t.grad for t in leaves])
    for name, a, b in zip(NAMES, *grads, strict=True):
        assert Error.of(a, b).within(tolerance(torch.float32, 10**3)), name
    assert torch.equal(dy, before)


@pytest.mark.parametrize(("dtype", "most"), [(torch.bfloat16, 0.30), (torch.float32, 0.35)], ids=str)
@pytest.mark.parametrize("name", quick(GOOGLENET_BLOCKS, "3a", "4e"))
def test_memory_held_for_backward(name, dtype, most):
    """Activations, x among them, each storage once; parameters are held by either."""
    held = []
    x = torch.randn(2, GOOGLENET_BLOCKS[name].in_channels, 3, 3).to(dtype).contiguous(memory_format=torch.channels_last)
    for block_type, wish in ((FusedInception, "kernels"), (Inception, "auto")):
        block = block_type(*GOOGLENET_BLOCKS[name], dtype=dtype)
        storages = {}

        def keep(t, storages=storages):
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with backend(wish), torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = block(x.clone().requires_grad_())
        parameters = {p.untyped_storage().data_ptr() for p in block.parameters()}
        held.append(sum(size for place, size in storages.items() if place not in parameters))
        assert y.requires_grad
    assert 0 < held[0] <= most * held[1], f"{held[0]} of {held[1]} bytes: {held[0] / held[1]:.3f}"


def test_strides_of_gradients():
    """As the parameters', which DDP's buckets expect; dx is channels_last."""
    block = make_block(SMALL, (2, 4, 5))
    with backend("kernels"):
        leaves = _leaves(block, [True] * 13)
        _call(leaves).sum().backward()
    for name, t in zip(NAMES[1:], leaves[1:], strict=True):
        assert t.grad.stride() == t.stride(), name
    assert leaves[0].grad.is_contiguous(memory_format=torch.channels_last)


def test_repeats_are_identical_and_retain_graph_works():
    block = make_block(SMALL, (3, 6, 5), torch.bfloat16)
    runs = []
    with backend("kernels"):
        for _ in range(2):
            leaves = _leaves(block, [True] * 13)
            y = _call(leaves)
            y.sum().backward(retain_graph=True)
            first = [t.grad.clone() for t in leaves]
            for t in leaves:
                t.grad = None
            y.sum().backward()
            runs += [first, [t.grad for t in leaves]]
    for other in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], other, strict=True))


def test_batch_zero_gives_zero_weight_gradients():
    block = make_block(SMALL, (0, 4, 5))
    with backend("kernels"):
        leaves = _leaves(block, [True] * 13)
        _call(leaves).sum().backward()
    assert all((t.grad == 0).all() and t.grad.shape == t.shape for t in leaves)


def test_a_nan_in_the_output_passes_its_gradient():
    block = make_block(SMALL, (1, 3, 3))
    block.biases[0][2] = float("nan")
    grads = []
    for wish in ("kernels", "eager"):
        with backend(wish):
            leaves = _leaves(block, [True] * 13)
            _call(leaves).sum().backward()
        grads.append(leaves[7].grad)
    assert torch.allclose(*grads)
    assert grads[0][2] == 9


TINY = InceptionConfig(3, 2, (2, 3), (2, 2), 2)


@pytest.mark.parametrize(("branch3", "activation"), [more(5, "relu"), more(3, "relu"), more(5, None), (3, None)])
def test_gradcheck_in_float64(branch3, activation):
    """Gradients of the kernels, and gradients of those gradients through the reference, by finite differences."""
    block = make_block(TINY, (1, 3, 2), torch.float64, branch3=branch3, activation=activation)
    leaves = _leaves(block, [True] * 13)

    def run(*leaves):
        return inception(leaves[0], InceptionParams(leaves[1:7], leaves[7:]), activation=activation)

    with backend("kernels"):
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    with backend("eager"):
        expected = _second_order(run, leaves)
    with backend("kernels"):
        for ours, truth in zip(_second_order(run, leaves), expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)
        first = (leaves[0], leaves[3])
        assert torch.autograd.gradgradcheck(lambda x, w: run(x, *leaves[1:3], w, *leaves[4:]), first, fast_mode=True)


def _second_order(run, leaves) -> tuple[torch.Tensor, ...]:
    """Gradients of a penalty on all first gradients."""
    y = run(*leaves)
    firsts = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
    return torch.autograd.grad(sum(g.square().sum() for g in firsts), leaves)


def test_second_order_recomputes_and_first_order_does_not(monkeypatch):
    calls = []
    original = masked.differentiable_backward
    monkeypatch.setattr(masked, "differentiable_backward", lambda *a: calls.append(1) or original(*a))
    block = make_block(SMALL, (1, 3, 2))
    with backend("kernels"):
        leaves = _leaves(block, [True] * 13)
        _call(leaves).square().sum().backward()
        assert not calls
        (dx,) = torch.autograd.grad(_call(leaves).square().sum(), leaves[0], create_graph=True)
        dx.square().sum().backward()
        assert calls


def test_torch_func():
    block = FusedInception(*SMALL)
    params = dict(block.named_parameters())
    x = torch.randn(3, 2, 24, 4, 3)

    def loss(params, x):
        return torch.func.functional_call(block, params, (x,)).square().sum()

    results = []
    for wish in ("kernels", "eager"):
        with backend(wish):
            per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(params, x)
            ensemble = {name: torch.stack([p.detach(), 2 * p.detach()]) for name, p in params.items()}
            outs = torch.func.vmap(loss, in_dims=(0, None))(ensemble, x[0])
            batched = torch.func.vmap(block)(x)
        results.append([*per_sample.values(), outs, batched])
    for ours, theirs in zip(*results, strict=True):
        assert Error.of(ours, theirs).within(tolerance(torch.float32, 10**4))


def test_forward_mode_falls_back_to_eager():
    block = FusedInception(*SMALL)
    x, tangent = torch.randn(1, 24, 3, 3), torch.randn(1, 24, 3, 3)
    y, dy = torch.func.jvp(block, (x,), (tangent,))
    step = 1e-3
    with torch.no_grad():
        numeric = (block((x + step * tangent).double().float()) - block(x - step * tangent)) / (2 * step)
    assert Error.of(dy, numeric).rms < 0.05
    assert y.shape == dy.shape


def test_block_backward_is_what_the_operator_runs():
    """The formulas compute nothing that is not wanted."""
    block = make_block(SMALL, (1, 3, 3))
    out = block.forward()
    needs = Needs(True, [False] * 6, [False] * 6)
    dy, dtypes = torch.randn_like(out[0]), [torch.float32] * 6
    call = BackwardCall(dy, block.x, Saved(*out[1:]), block.weights, dtypes, True, needs, "eager")
    grads = block_backward(call, dict.fromkeys(choice.KERNELS, "eager"))
    assert grads[0] is not None
    assert all(g is None for g in grads[1:])


def test_the_function_is_public():
    block = make_block(SMALL, (1, 3, 3))
    y, *_ = FusedInceptionFunction.apply(block.x, True, "kernels", (False, False, False), *block.weights, *block.biases)
    assert torch.equal(y, block.forward()[0])


def test_deterministic_mode_stays_quiet(recwarn):
    torch.use_deterministic_algorithms(True)
    block = copy.deepcopy(FusedInception(*SMALL))
    with backend("kernels"):
        block(torch.randn(1, 24, 3, 3)).sum().backward()
    assert not [w for w in recwarn if "determin" in str(w.message)]


def test_weights_beyond_half_of_tritons_largest_tensor():
    block = FusedInception(1024, 512, (8, 8), (8, 8), 8).to(memory_format=torch.channels_last)
    x = torch.randn(1, 1024, 1, 1)
    with backend("kernels"):
        block(x).sum().backward()
    passes = (block(x)[0, :512, 0, 0] > 0).float()
    torch.testing.assert_close(block.p1_1.weight.grad[:, :, 0, 0], torch.outer(passes, x.flatten()))
