"""The repaired interpreter computes bf16 exactly as PyTorch does."""

import pytest
import torch
import triton
import triton.language as tl

from inception_fused.runtime import interpreter

interpreter.repair()


@triton.jit
def cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(y_ptr + i, tl.load(x_ptr + i).to(y_ptr.dtype.element_ty))


@triton.jit
def arithmetic_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, a + b)
    tl.store(out_ptr + N + i, a * b)
    tl.store(out_ptr + 2 * N + i, tl.where(a > b, a, b))
    tl.store(out_ptr + 3 * N + i, tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL).to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + 4 * N + i, tl.where(a < 0, 0.0, a).to(out_ptr.dtype.element_ty))


@triton.jit
def fma_kernel(a_ptr, b_ptr, c_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.fma(tl.load(a_ptr + i), tl.load(b_ptr + i), tl.load(c_ptr + i)))


@triton.jit
def extrema_kernel(a_ptr, b_ptr, out_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    a, b = tl.load(a_ptr + i), tl.load(b_ptr + i)
    tl.store(out_ptr + i, tl.maximum(a, b).to(out_ptr.dtype.element_ty))
    tl.store(out_ptr + N + i, tl.minimum(a, b).to(out_ptr.dtype.element_ty))


@triton.jit
def dot_kernel(a_ptr, b_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    square = i[:, None] * N + i[None, :]
    acc = tl.zeros([N, N], tl.float32)
    for _ in range(n):
        acc = tl.dot(tl.load(a_ptr + square), tl.load(b_ptr + square), acc)
    tl.store(out_ptr + square, acc)


def _awkward(n: int) -> torch.Tensor:
    special = [
        0.0,
        -0.0,
        float("inf"),
        float("-inf"),
        float("nan"),
        1e-40,
        -1e-40,
        3.3895314e38,
        1.00390625,
        1.01171875,
    ]
    return torch.cat((torch.tensor(special), torch.randn(n - len(special)) * torch.logspace(-30, 30, n - len(special))))


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_casts(wanted, given):
    x = _awkward(1024).to(given)
    y = torch.empty(1024, dtype=wanted)
    cast_kernel[(1,)](x, y, 1024)
    assert _same(y, x.to(wanted))


def test_a_fused_multiply_add_rounds_once():
    a = 1 + torch.rand(256) * torch.logspace(-6, 0, 256)
    b, exact = 1 / a, torch.empty(256)
    fma_kernel[(1,)](a, b, torch.full((256,), -1.0), exact, 256)
    assert torch.equal(exact, (a.double() * b.double() - 1).float())
    assert not torch.equal(exact, a * b - 1)


def test_arithmetic():
    a, b = _awkward(256).bfloat16(), _awkward(256).flip(0).bfloat16()
    out = torch.empty((5, 256), dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](a, b, out, 256)
    expected = (a + b, a * b, torch.where(a > b, a, b), torch.maximum(a, b), torch.relu(a))
    for name, ours, theirs in zip(("+", "*", "where", "maximum", "relu"), out, expected, strict=True):
        assert _same(ours, theirs), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_extrema_drop_nan(dtype):
    """As hardware's do: a kernel that must keep NaN has to say so."""
    a, b = _awkward(256).to(dtype), _awkward(256).flip(0).to(dtype)
    out = torch.empty((2, 256), dtype=dtype)
    extrema_kernel[(1,)](a, b, out, 256)
    assert a.isnan().any()
    for ours, theirs in zip(out, (torch.fmax(a, b), torch.fmin(a, b)), strict=True):
        assert _same(ours, theirs)


def test_dot_and_run_time_loop_bound():
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = torch.empty(16, 16)
    dot_kernel[(1,)](a, b, out, 3, 16)
    torch.testing.assert_close(out, 3 * (a.float() @ b.float()), rtol=1e-6, atol=1e-5)
