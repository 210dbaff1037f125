"""The tolerance model refuses errors that rounding does not explain, and accepts those that it does."""

import pytest
import torch
import torch.nn.functional as F

from checks.block_cases import SMALL
from inception_fused import FusedInception, backend
from inception_fused.block.reference import CONV_NAMES
from inception_fused.op import autograd
from inception_fused.testing import Error, assert_parity, sample_input, tolerance

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pytorch_itself_is_within(dtype):
    for length in (16, 512, 4096):
        a, b = torch.randn(64, length).to(dtype), torch.randn(length, 64).to(dtype)
        assert Error.of(a @ b, a.double() @ b.double()).within(tolerance(dtype, length))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_small_mistakes_are_beyond(dtype):
    x, w = torch.randn(1, 32, 14, 14).to(dtype), torch.randn(16, 32, 3, 3).to(dtype)
    truth = F.conv2d(x.double(), w.double(), padding=1)
    bound = tolerance(dtype, 32 * 9)
    assert Error.of(truth.to(dtype), truth).within(bound)
    one_tap_at_one_border_pixel = truth.clone()
    one_tap_at_one_border_pixel[0, :, 0, 0] -= torch.einsum("c,kc->k", x[0, :, 1, 1].double(), w[:, :, 2, 2].double())
    one_nan, one_zero = truth.clone(), truth.clone()
    one_nan[0, 3, 5, 5] = float("nan")
    one_zero[0, 3, :, 5] = 0
    for wrong in (one_tap_at_one_border_pixel, one_nan, one_zero, 1.02 * truth, truth + 0.02 * truth.std()):
        assert not Error.of(wrong.to(dtype), truth).within(bound)


def test_tf32_has_its_own_rounding():
    assert tolerance(torch.float32, 64, tf32=True) > 2**-10 > tolerance(torch.float32, 64) > 2**-24
    assert tolerance(torch.bfloat16, 64, tf32=True) == tolerance(torch.bfloat16, 64)


def test_error_of_nothing_and_of_zeros():
    assert Error.of(torch.empty(0), torch.empty(0)).within(0.0)
    assert Error.of(torch.zeros(3), torch.zeros(3)).within(0.0)
    assert not Error.of(torch.ones(3), torch.zeros(3)).within(1.0)


@pytest.mark.parametrize(
    "what", ["branch 1", "branch 2", "branch 3", "branch 4", "d x", "d p2_2.weight", "d p4_2.bias"]
)
def test_assert_parity_names_what_is_wrong(what, monkeypatch):
    """One slice or gradient off by 3% of its size."""
    block = FusedInception(*SMALL)
    x = torch.randn(2, 24, 5, 6)
    names = ["d x", *(f"d {n}.weight" for n in CONV_NAMES), *(f"d {n}.bias" for n in CONV_NAMES)]
    starts = {"branch 1": (0, 16), "branch 2": (16, 40), "branch 3": (40, 56), "branch 4": (56, 64)}
    forward, backward = torch.ops.inception_fused._forward, autograd._fused_backward

    class Spoilt(torch.autograd.Function):
        @staticmethod
        def forward(ctx, y):
            y = y.clone()
            if what in starts:
                y[:, slice(*starts[what])] *= 1.03
            return y

        @staticmethod
        def backward(ctx, dy):
            return dy

    def spoilt_backward(*args):
        grads = backward(*args)
        if what in names:
            grads[names.index(what)] = grads[names.index(what)] * 1.03
        return grads

    original = autograd.convolved
    monkeypatch.setattr(autograd, "convolved", lambda *a, **k: Spoilt.apply(original(*a, **k)))
    monkeypatch.setattr(autograd, "_fused_backward", spoilt_backward)
    assert forward is torch.ops.inception_fused._forward
    with backend("kernels"), pytest.raises(AssertionError) as caught:
        assert_parity(block, x)
    assert f"\n  {what}: error" in str(caught.value)
    assert str(caught.value).count("error") == 1
    assert (block.p1_1.weight.grad, x.grad) == (None, None)


def test_sample_inputs_are_reproducible():
    x = sample_input("4b", 2, dtype=torch.bfloat16, image_size=96, seed=5)
    assert x.shape == (2, 512, 6, 6)
    assert x.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, sample_input("4b", 2, dtype=torch.bfloat16, image_size=96, seed=5))
    assert not torch.equal(x, sample_input("4b", 2, dtype=torch.bfloat16, image_size=96, seed=6))
