"""Unusual but legal uses: each gives what the eager block gives, or an error that says what to do."""

import subprocess
import sys
import threading

import pytest
import torch
from torch import nn

from checks.block_cases import SMALL, make_block
from inception_fused import FusedInception, FusedInceptionFunction, Inception, InceptionInputError, KernelError, backend
from inception_fused.plan import choice
from inception_fused.testing import Error, assert_parity, tolerance

BOUND = tolerance(torch.float32, 10**4)


def _pair() -> tuple[FusedInception, Inception]:
    blocks = []
    for kind in (FusedInception, Inception):
        torch.manual_seed(7)
        blocks.append(kind(*SMALL))
    return blocks[0], blocks[1]


BIASES = {
    "strided": lambda b: torch.stack((b, torch.full_like(b, float("nan"))), dim=1)[:, 0],
    "expanded": lambda b: b[:1].expand_as(b),
    "offset": lambda b: torch.cat((torch.full((1,), float("nan")), b))[1:],
}


@pytest.mark.parametrize("change", BIASES)
def test_biases_of_any_strides(change):
    block = make_block(SMALL, (2, 4, 3))
    given = block._replace(biases=[BIASES[change](b) for b in block.biases])
    dense = block._replace(biases=[b.clone(memory_format=torch.contiguous_format).contiguous() for b in given.biases])
    assert torch.equal(given.forward()[0], dense.forward()[0])
    assert Error.of(given.forward()[0], dense.forward("eager")[0]).within(BOUND)


@pytest.mark.parametrize("odd_one", range(6))
def test_biases_of_mixed_dtypes_under_autocast(odd_one):
    block = make_block(SMALL, (1, 4, 3))
    biases = [b.bfloat16().float() for b in block.biases]
    mixed = [b.bfloat16() if i == odd_one else b for i, b in enumerate(biases)]
    given = block._replace(x=block.x.bfloat16())
    assert torch.equal(given._replace(biases=mixed).forward()[0], given._replace(biases=biases).forward()[0])


@pytest.mark.parametrize("trainable", ["nothing", "all", "one bias"])
def test_gradients_through_vmap_reach_what_it_wraps(trainable):
    """A batched x does not say that its owner wants gradients."""
    grads = []
    for block, wish in zip(_pair(), ("kernels", "auto"), strict=True):
        block.requires_grad_(trainable == "all")
        block.p2_1.bias.requires_grad_(trainable != "nothing")
        torch.manual_seed(1)
        x = torch.randn(3, 2, 24, 4, 3, requires_grad=True)
        with backend(wish):
            torch.vmap(block)(x).square().sum().backward()
        grads.append([x.grad, *(p.grad for p in block.parameters() if p.requires_grad)])
    for ours, theirs in zip(*grads, strict=True):
        assert Error.of(ours, theirs).within(BOUND)


def test_gradients_of_a_stacked_ensemble():
    grads = []
    for block, wish in zip(_pair(), ("kernels", "auto"), strict=True):
        stacked = {
            n: torch.stack([p.detach(), 2 * p.detach()], dim=-1).requires_grad_() for n, p in block.named_parameters()
        }
        torch.manual_seed(1)
        x = torch.randn(2, 24, 4, 3)
        dims = ({name: p.dim() - 1 for name, p in stacked.items()},)
        with backend(wish):
            torch.vmap(lambda p, b=block, x=x: torch.func.functional_call(b, p, (x,)), dims)(stacked).sum().backward()
        grads.append([p.grad for p in stacked.values()])
    for ours, theirs in zip(*grads, strict=True):
        assert Error.of(ours, theirs).within(BOUND)


def test_several_gradients_at_once():
    block, _ = _pair()
    x = torch.randn(1, 24, 3, 3, requires_grad=True)
    results = []
    for wish in ("kernels", "eager"):
        with backend(wish):
            y = block(x)
            dy = torch.stack([torch.ones_like(y), torch.zeros_like(y), y.detach()])
            results.append(torch.autograd.grad(y, x, dy, is_grads_batched=True)[0])
    assert Error.of(*results).within(BOUND)


def test_the_function_refuses_to_forget_what_gradients_need():
    block = make_block(SMALL, (1, 3, 3))
    tensors = [t.clone().requires_grad_() for t in (*block.weights, *block.biases)]
    with pytest.raises(InceptionInputError, match="save: got .False, False, False., wants"):
        FusedInceptionFunction.apply(block.x, True, "kernels", (False, False, False), *tensors)
    with pytest.raises(InceptionInputError, match="backend: got 'fast'"):
        FusedInceptionFunction.apply(block.x, True, "fast", (True, True, True), *tensors)


def test_a_childs_own_forward_and_global_hooks_are_honoured():
    block, _ = _pair()
    x = torch.randn(1, 24, 3, 3)
    block.p1_1.forward = lambda x: torch.zeros(1, 16, 3, 3)
    assert not block(x)[:, :16].any()
    with backend("kernels"), pytest.raises(KernelError, match="p1_1 has a forward of its own"):
        block(x)
    del block.p1_1.forward
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.append(type(module)))
    try:
        block(x)
    finally:
        handle.remove()
    assert seen.count(nn.Conv2d) == 6


@pytest.mark.parametrize(("name", "side"), [("p1_1", 3), ("p2_1", 3), ("p2_2", 5), ("p3_2", 7), ("p4_2", 3)])
def test_other_kernel_sizes_run_in_eager(name, side):
    torch.manual_seed(2)
    fused, eager = _pair()
    old = getattr(fused, name)
    new = nn.Conv2d(old.in_channels, old.out_channels, side, padding=side // 2)
    for block in (fused, eager):
        setattr(block, name, new)
    x = torch.randn(1, 24, 5, 5)
    assert Error.of(fused(x), eager(x)).within(BOUND)


def test_in_place_operations_that_a_view_would_forbid():
    block, _ = _pair()
    x = torch.randn(1, 24, 3, 3)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        block(given).detach_()
        with torch.no_grad():
            y = block(given)
        y.mul_(torch.ones(1, requires_grad=True))


def test_symbolic_tracing_of_a_hooked_block():
    block, _ = _pair()
    block.p2_1.register_forward_hook(lambda module, args, out: None)
    x = torch.randn(1, 24, 3, 3)
    assert Error.of(torch.fx.symbolic_trace(block)(x), block(x)).within(BOUND)


@pytest.mark.parametrize("batched", ["x", "parameters", "both"])
def test_vmap_without_gradients(batched):
    block = FusedInception(*SMALL)
    x = torch.randn(3, 2, 24, 4, 3)
    stacked = {name: torch.stack([p.detach() * (1 + i) for i in range(3)]) for name, p in block.named_parameters()}
    params = stacked if batched != "x" else dict(block.named_parameters())
    dims = (0 if batched != "x" else None, None if batched == "parameters" else 0)

    def run(params, x):
        return torch.func.functional_call(block, params, (x,))

    with backend("kernels"), torch.no_grad():
        found = torch.vmap(run, in_dims=dims)(params, x if batched != "parameters" else x[0])
        for i in range(3):
            own = {name: p[i] if batched != "x" else p for name, p in params.items()}
            alone = run(own, x[0 if batched == "parameters" else i])
            # numpy, which interprets a product, rounds a row by its place among the others (OpenBLAS with AVX-512).
            assert Error.of(found[i], alone).within(tolerance(x.dtype, 9 * SMALL.c3[0] + 24))


def test_vmap_over_empty_batches():
    block, _ = _pair()
    assert torch.vmap(block)(torch.randn(3, 0, 24, 3, 3)).shape == (3, 0, SMALL.out_channels, 3, 3)


def test_threads():
    block, _ = _pair()
    x = torch.randn(1, 24, 3, 3)
    expected, found = block(x), []

    def run():
        with backend("kernels"), torch.no_grad():
            found.append(block(x))

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(Error.of(y, expected).within(BOUND) for y in found)


@pytest.mark.parametrize(
    "x", [[1.0], torch.zeros(24, 3, 3), torch.zeros(1, 24, 3, 3).long()], ids=["list", "3-D", "int"]
)
def test_a_block_with_hooks_checks_x_too(x):
    block, _ = _pair()
    block.p2_1.register_forward_hook(lambda module, args, out: None)
    with pytest.raises(InceptionInputError, match="x: got"):
        block(x)


def test_parity_is_refused_where_it_would_not_test_the_module():
    block, eager = _pair()
    with pytest.raises(InceptionInputError, match="module: got Inception, wants a FusedInception"):
        assert_parity(eager, torch.zeros(1, 24, 3, 3))
    block.p1_1.stride = (2, 2)
    with pytest.raises(InceptionInputError, match="module: got a block whose p1_1 is configured"):
        assert_parity(block, torch.zeros(1, 24, 3, 3))


@pytest.mark.parametrize(
    ("value", "code", "words"), [("quick", 2, "INCEPTION_FUSED_BACKEND: got 'quick'"), ("", 0, "auto")]
)
def test_the_diagnosis_survives_a_wrong_environment(value, code, words, monkeypatch):
    monkeypatch.setenv("INCEPTION_FUSED_BACKEND", value)
    done = subprocess.run([sys.executable, "-m", "inception_fused"], capture_output=True, text=True, timeout=120)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def test_sizes_that_kernels_cannot_address(monkeypatch):
    """Demanded kernels raise; otherwise eager computes the same."""
    monkeypatch.setattr(choice, "exceeds_int32", lambda shape, stride: True)
    block, eager = _pair()
    x = torch.randn(1, 24, 3, 3)
    with backend("kernels"), torch.no_grad(), pytest.raises(KernelError, match="cannot run: sizes beyond the 32-bit"):
        block(x)
    with torch.no_grad():
        y = torch.ops.inception_fused._forward(x, *map(list, block.params()[:2]), True, False, False, False, "auto")[0]
    assert Error.of(y, eager(x)).within(BOUND)
