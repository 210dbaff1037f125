"""The max-pool of stride 2 as an operator and as a function: truths, derivatives, transforms, and who computes it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from inception_fused import InceptionInputError, KernelError, backend
from inception_fused.block.pools import PoolShape
from inception_fused.op import checking, pools
from inception_fused.op.pools_autograd import layers, max_pool
from inception_fused.runtime.submit import record

FORMS = {"padded": (1, False), "padded, ceil": (1, True), "ceil": (0, True), "neither": (0, False)}
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
KERNELS = ["kernels", "P1=eager,P2=triton", "P1=triton,P2=eager"]


def operands(*shape, dtype=torch.float64, seed=0):
    """x and bias whose sums differ from each other and from 0, in every dtype: no maximum is tied."""
    n, c, h, w = shape or (2, 5, 7, 6)
    made = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(h * w, generator=made) for _ in range(n * c)])
    x = (order.view(n, c, h, w) - h * w / 2 + 0.5).to(dtype)
    return x.requires_grad_(), torch.randint(-9, 9, (c,), generator=made).to(dtype).requires_grad_()


def weights_of(y):
    """The same dy for every y of a shape."""
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(y.dtype)


def gradients(run, x, bias):
    y = run(x, bias)
    return y, *torch.autograd.grad(y, [t for t in (x, bias) if t is not None], weights_of(y))


@pytest.mark.parametrize("wish", KERNELS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("channels", "dtype"), [(16, torch.float32), (33, torch.float16), (8, torch.bfloat16)])
@pytest.mark.parametrize(("biased", "relu"), [(True, True), (True, False), (False, True), (False, False)])
def test_against_float64(biased, relu, channels, dtype, form, wish):
    padding, ceil_mode = FORMS[form]
    x, bias = operands(2, channels, 7, 6, dtype=dtype)
    bias = bias if biased else None

    def run(x, bias):
        return max_pool(x, padding=padding, ceil_mode=ceil_mode, bias=bias, relu=relu)

    with backend(wish):
        y, *grads = gradients(run, x, bias)
    exact = [t.detach().double().requires_grad_() for t in (x, bias) if t is not None]
    truth = layers(exact[0], exact[1] if biased else None, relu, padding, ceil_mode)
    assert torch.equal(y.double(), truth)
    dy = weights_of(y).double()
    others, magnitudes = (torch.autograd.grad(truth, exact, t, retain_graph=True) for t in (dy, dy.abs()))
    # Each term may lose a rounding of fp32, the sum one of its dtype.
    share = torch.finfo(dtype).eps + y[:, 0].numel() * torch.finfo(torch.float32).eps
    for ours, other, magnitude in zip(grads, others, magnitudes, strict=True):
        assert ours.dtype == dtype
        assert ((ours.double() - other).abs() <= share * magnitude).all()


MEMORY = {
    "NCHW": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "a part of the channels": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[:, 4:20],
    "reversed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "one element behind": lambda x: torch.empty(x.numel() + 1)[1:].view_as(x).copy_(x),
}


@pytest.mark.parametrize("memory", MEMORY)
def test_any_memory(memory):
    """Of x and of dy; the result is in channels_last."""
    x = MEMORY[memory](operands(2, 16, 7, 6, dtype=torch.float32)[0].detach()).requires_grad_()
    with backend("kernels"):
        y = max_pool(x, padding=1)
    truth = F.max_pool2d(x, 3, 2, 1)
    dy = MEMORY[memory](torch.randn(2, 16, *y.shape[2:]))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(y, truth)
    (dx,), (exact,) = (torch.autograd.grad(out, x, dy) for out in (y, truth))
    assert torch.allclose(dx, exact, atol=1e-6)


def test_autograd_gets_the_gradients_that_are_wanted():
    x, bias = operands(dtype=torch.float32)
    every = gradients(lambda x, bias: layers(x, bias, True, 1, False), x, bias)[1:]
    for wanted in ((True, False), (False, True)):
        given = [t.detach().requires_grad_(need) for t, need in zip((x, bias), wanted, strict=True)]
        with backend("kernels"):
            y = max_pool(given[0], padding=1, bias=given[1], relu=True)
        y.backward(weights_of(y))
        for t, need, truth in zip(given, wanted, every, strict=True):
            assert torch.allclose(t.grad, truth, atol=1e-5) if need else t.grad is None
    with backend("kernels"), torch.no_grad():
        assert not max_pool(x, padding=1, bias=bias).requires_grad


@pytest.mark.parametrize("form", ["padded", "ceil"])
def test_derivatives_of_both_orders(form):
    padding, ceil_mode = FORMS[form]
    x, bias = operands(1, 2, 4, 3)
    with backend("kernels"):

        def run(x, bias):
            return max_pool(x, padding=padding, ceil_mode=ceil_mode, bias=bias, relu=True)

        assert torch.autograd.gradcheck(run, (x, bias))
        assert torch.autograd.gradgradcheck(run, (x, bias))


def test_torch_func():
    x, bias = operands(3, 2, 6, 7)
    x, bias = x.detach().unsqueeze(1).float(), bias.detach().float()
    ours = {"vmap": (0, None), "vmap of both": (0, 0)}
    with backend("kernels"):
        for name, dims in ours.items():
            given = bias if dims[1] is None else bias + torch.arange(3.0)[:, None]
            found = torch.func.vmap(lambda x, b: max_pool(x, padding=1, bias=b, relu=True), dims)(x, given)
            expected = torch.func.vmap(lambda x, b: layers(x, b, True, 1, False), dims)(x, given)
            assert torch.equal(found, expected), name

        def both(run):
            """Gradients of items, and of gradients."""
            first = torch.func.vmap(torch.func.grad(lambda x, b: run(x, b).square().sum(), (0, 1)), (0, None))(x, bias)
            second = torch.func.grad(lambda b: torch.func.grad(lambda x: run(x, b).pow(3).sum())(x[0]).sum())(bias)
            return *first, second, torch.func.jacrev(run)(x[0], bias)

        for ours, theirs in zip(
            both(lambda x, b: max_pool(x, padding=1, bias=b, relu=True)),
            both(lambda x, b: layers(x, b, True, 1, False)),
            strict=True,
        ):  # fmt: skip
            assert torch.allclose(ours, theirs, rtol=1e-5)
        with pytest.raises(KernelError, match="forward-mode"):
            torch.func.jvp(lambda x: max_pool(x, padding=1), (x[0],), (x[0],))
    _, tangent = torch.func.jvp(lambda x: max_pool(x, padding=1), (x[0],), (x[0],))
    assert torch.equal(tangent, F.max_pool2d(x[0], 3, 2, 1))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled(dynamic):
    def run(x, bias):
        return max_pool(x, padding=1, bias=bias, relu=True).square()

    with backend("kernels"):
        compiled = torch.compile(run, backend="aot_eager", fullgraph=True, dynamic=dynamic)
        for shape in ((2, 5, 7, 6), (2, 5, 9, 4)):
            x, bias = operands(*shape, dtype=torch.float32)
            for ours, theirs in zip(gradients(compiled, x, bias), gradients(run, x, bias), strict=True):
                assert torch.equal(ours, theirs)


def test_a_graph_that_is_kept_has_pytorchs_pool():
    class Pool(torch.nn.Module):
        def forward(self, x):
            return max_pool(x, padding=1)

    x = operands(dtype=torch.float32)[0].detach()
    with backend("kernels"):
        traced, program = torch.jit.trace(Pool(), x), torch.export.export(Pool(), (x,), strict=False)
    assert "aten::max_pool2d" in str(traced.graph)
    assert any("max_pool2d" in str(node.target) for node in program.graph.nodes)
    assert torch.equal(traced(x), program.module()(x))


def test_operators_are_as_they_say():
    x, bias = (t.detach() for t in operands(dtype=torch.float32))
    forward = torch.ops.inception_fused._max_pool.default
    y, taps = forward(x, bias, True, 1, False, True, "kernels")
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    for save in (True, False):
        torch.library.opcheck(forward, (x, bias, True, 1, False, save, "kernels"), test_utils=tests)
    for dtype in ("float32", "float16", ""):
        given = (y, taps, 7, 6, 1, False, dtype, "kernels")
        torch.library.opcheck(torch.ops.inception_fused._max_pool_backward.default, given, test_utils=tests)


def test_only_taps_are_saved():
    """35 channels of 12 windows: 18 bytes a window, where PyTorch keeps x and an index of eight bytes an element."""
    x, bias = operands(2, 35, 7, 6, dtype=torch.float32)
    kept = []
    with backend("kernels"), torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        max_pool(x, padding=1, bias=bias, relu=True)
    assert [(t.dtype, tuple(t.shape)) for t in kept] == [(torch.uint8, (2 * 4 * 3, 18))]


def test_what_was_saved_survives_changes_in_place_and_repeats():
    x, bias = operands(dtype=torch.float32)
    with backend("kernels"):
        expected = gradients(lambda x, b: max_pool(x, padding=1, bias=b, relu=True), x, bias)
        for run in (
            lambda x, b: max_pool(x * 1, padding=1, bias=b, relu=True).mul_(1),
            lambda x, b: checkpoint(lambda *given: max_pool(given[0], padding=1, bias=given[1], relu=True), x, b,
                                    use_reentrant=False),
        ):  # fmt: skip
            for ours, first in zip(gradients(run, x, bias), expected, strict=True):
                assert torch.equal(ours, first)
        with torch.no_grad():
            y = max_pool(x, padding=1)
        with torch.inference_mode():
            assert torch.equal(max_pool(x, padding=1), y)


def test_launches():
    """One each way; the third call is launched from memory."""
    x, bias = operands(2, 16, 7, 6, dtype=torch.float32)

    def found():
        return gradients(lambda x, bias: max_pool(x, padding=1, bias=bias), x, bias)

    with backend("kernels"):
        with record() as launches:
            found()
        expected = found()
        for _ in range(3):
            assert all(torch.equal(ours, first) for ours, first in zip(found(), expected, strict=True))
    assert [launch.kernel.fn.__name__ for launch in launches] == ["max_pool_kernel", "max_pool_grad_kernel"]


def test_empty_batches():
    x, bias = torch.zeros(0, 5, 7, 6, requires_grad=True), torch.zeros(5, requires_grad=True)
    with backend("kernels"):
        y, dx, dbias = gradients(lambda x, b: max_pool(x, padding=1, bias=b, relu=True), x, bias)
    assert (tuple(y.shape), tuple(dx.shape)) == ((0, 5, 4, 3), (0, 5, 7, 6))
    assert torch.equal(dbias, torch.zeros(5))


def test_bias_takes_the_dtype_of_what_is_pooled():
    """As a convolution's under autocast, its gradient in its own."""
    x, bias = operands(dtype=torch.float32)
    x = x.detach().bfloat16().requires_grad_()
    with backend("kernels"):
        y, dx, dbias = gradients(lambda x, b: max_pool(x, padding=1, bias=b), x, bias)
    assert (y.dtype, dx.dtype, dbias.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)


OTHERS = {
    "3-D": lambda: torch.randn(5, 7, 6),
    "float64": lambda: operands()[0],
    "whole numbers": lambda: torch.randint(9, (2, 5, 7, 6)),
    "of a subclass": lambda: torch.randn(2, 5, 7, 6).as_subclass(type("Tagged", (torch.Tensor,), {})),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_the_kernels_do_not_take_is_pytorchs(name):
    x = OTHERS[name]()
    for wish in ("auto", "eager"):
        with backend(wish):
            y = max_pool(x, padding=1)
        assert type(y) is type(x)
        assert torch.equal(y, F.max_pool2d(x, 3, 2, 1))
        assert y.stride() == F.max_pool2d(x, 3, 2, 1).stride()
    if name in ("whole numbers", "of a subclass"):
        with backend("kernels"), pytest.raises(KernelError, match="demands kernels that cannot run"):
            max_pool(x, padding=1)
    with pytest.raises(RuntimeError, match="too small|Expected 3D or 4D"):
        max_pool(torch.randn(1, 2, 1, 1), padding=0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (dict(padding=2), "padding: got 2, wants 0 or 1"),
        (dict(bias=torch.zeros(4)), r"bias: got \(4,\)"),
        (dict(x=torch.zeros(5, 7, 6)), r"x: got \(5, 7, 6\)"),
        (dict(x=torch.zeros(2, 5, 1, 1), padding=0), "wants an image that has a window"),
        (dict(x=torch.zeros(2, 5, 7, 6, requires_grad=True)), "an input that requires grad"),
    ],
    ids=str,
)
def test_wrong_calls_of_the_operator(given, match):
    usual = dict(x=torch.zeros(2, 5, 7, 6), bias=None, relu=False, padding=1, ceil_mode=False, save_taps=True)
    with pytest.raises(InceptionInputError, match=match):
        torch.ops.inception_fused._max_pool(**(usual | given), backend="kernels")


def test_sizes_beyond_32_bits():
    assert not pools.exceeds_int32(PoolShape(128, 112, 112, 1), 64, 64)
    assert pools.exceeds_int32(PoolShape(2**18, 112, 112, 1), 64, 64), "row numbers"
    assert pools.exceeds_int32(PoolShape(1, 3, 2**20, 1), 2048, 2048), "offsets inside a window"
    assert not pools.exceeds_int32(PoolShape(2**12, 112, 112, 1), 2048, 2048), "bases advance in int64"


def test_too_large_is_refused_or_eager(monkeypatch):
    monkeypatch.setattr(pools, "exceeds_int32", lambda *_: True)
    x = operands(dtype=torch.float32)[0].detach()
    with backend("kernels"), pytest.raises(KernelError, match="split the batch"):
        max_pool(x, padding=1)
    with record() as launches:
        torch.ops.inception_fused._max_pool(x, None, False, 1, False, True, "auto")
    assert not launches


def test_checked_calls_find_a_wrong_number(monkeypatch):
    x, bias = operands(dtype=torch.float32)

    def run(x, bias):
        return max_pool(x, padding=1, bias=bias, relu=True)

    usual = pools.function_of

    def spoilt(file, operand):
        """function_of() whose launcher of a kernel adds 1 to the first number that it writes."""

        def function_of(kernel, form):
            def launch(*args, **kwargs):
                usual(kernel, form)(*args, **kwargs)
                if kernel.file == file:
                    args[operand].base[0, 0, 0, 0] += 1

            return launch

        return function_of

    with backend("kernels"), checking.checked():
        gradients(run, x, bias)
        monkeypatch.setattr(pools, "function_of", spoilt("max_pool", 1))
        with pytest.raises(KernelError, match="1 numbers of y differ"):
            gradients(run, x, bias)
        monkeypatch.setattr(pools, "function_of", spoilt("max_pool_grad", 2))
        with pytest.raises(KernelError, match="d x .* 1 numbers are beyond"):
            gradients(run, x, bias)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_differentiable_backward_is_the_same(dtype):
    x, bias = operands(dtype=dtype)
    with backend("kernels"):
        y = max_pool(x, padding=1, bias=bias, relu=True)
        first, again = (
            torch.autograd.grad(y, (x, bias), weights_of(y), retain_graph=True, create_graph=again)
            for again in (False, True)
        )
    for ours, theirs in zip(first, again, strict=True):
        assert ours.dtype == theirs.dtype == dtype
        assert torch.allclose(ours, theirs, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
