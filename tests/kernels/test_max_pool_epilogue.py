"""P1 and P2 behind a convolution without its bias: bias and ReLU of what is pooled, and the gradient of the bias."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from inception_fused.block.pools import NO_TAP
from inception_fused.block.tolerance import Error, tolerance
from inception_fused.block.views import accumulator_of, taps_width
from inception_fused.kernels.max_pool import max_pool
from inception_fused.kernels.max_pool_grad import max_pool_grad
from inception_fused.runtime import aten, aten_pools
from norm_operands import EVERY, NAN, Guarded, empty, unit_for
from test_max_pool import FORMS, TILE, images_of, pool_of, pooled_truth, rows_of

IMAGES = {"2x2": (2, 2), "7x6": (7, 6), "20x3": (20, 3)}


def case(form, image, channels, dtype):
    """(pool, x, bias) of numbers that are all different, a third of the maxima below zero."""
    pool = pool_of(IMAGES[image], form)
    x = torch.randperm(pool.rows * channels).view(pool.rows, channels) / (pool.rows * channels)
    return pool, (2 * x - 1).to(dtype), (1.5 * torch.rand(channels) - 1.2).to(dtype)


def pooled(x, bias, relu, pool, *, save=True):
    """y and taps of P1, which its twin gives to the bit."""
    x, c = Guarded(x), x.shape[1]
    found = []
    for launch, more in ((max_pool, dict(tile=TILE, unit=unit_for(x))), (aten_pools.max_pool, {})):
        y = empty(pool.pooled_rows, c, x.rows.dtype)
        taps = torch.full((pool.pooled_rows, taps_width(c)), 0xA5, dtype=torch.uint8) if save else None
        launch(x.slice, y.slice, taps, bias, relu=relu, pool=pool, **more)
        y.check()
        found.append((y.rows, taps))
    (y, taps), (twin, twin_taps) = found
    torch.testing.assert_close(y, twin, rtol=0, atol=0, equal_nan=True)
    assert taps is None or torch.equal(taps, twin_taps)
    return y, taps


def gathered(dy, taps, pool):
    """dx and the sums of the bias's gradient, added up."""
    dy, c = Guarded(dy), dy.shape[1]
    found = []
    tiles = -(-pool.cells // TILE.BLOCK_M)
    for launch, parts, more in (
        (max_pool_grad, tiles, dict(tile=TILE, unit=unit_for(dy))), (aten_pools.max_pool_grad, 1, {}),
    ):  # fmt: skip
        dx = empty(pool.rows, c, dy.rows.dtype)
        sums = torch.full((parts, c), NAN, dtype=accumulator_of(dy.rows.dtype))
        launch(dy.slice, taps, dx.slice, sums, pool=pool, **more)
        dx.check()
        found.append((dx.rows, sums.double().sum(dim=0)))
    torch.testing.assert_close(found[0][0], found[1][0], rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5, equal_nan=True)
    return found[0]


@pytest.mark.parametrize("image", IMAGES)
@pytest.mark.parametrize("form", ["padded", "ceil"])
@pytest.mark.parametrize(("channels", "dtype"), [(64, torch.float32), (33, torch.float16), (40, torch.bfloat16)])
@pytest.mark.parametrize(("biased", "relu"), [(True, True), (True, False), (False, True)])
def test_against_the_layers(biased, relu, channels, dtype, form, image):
    pool, x, bias = case(form, image, channels, dtype)
    bias = bias if biased else None
    y, taps = pooled(x, bias, relu, pool)
    assert torch.equal(pooled(x, bias, relu, pool, save=False)[0], y)
    # In the dtype itself: bias added and rounded, ReLU, pool.
    leaf = images_of(x, pool)
    layers = leaf.detach().to(dtype) + (0 if bias is None else bias[:, None, None])
    own, _ = pooled_truth(F.relu(layers) if relu else layers, pool)
    assert torch.equal(y, rows_of(own))
    beta = bias.double().requires_grad_() if biased else torch.zeros(channels, dtype=torch.float64)
    truth = leaf + beta[:, None, None]
    truth, _ = pooled_truth(F.relu(truth) if relu else truth, pool)
    dy = torch.randint(-7, 8, y.shape).to(dtype)
    # A sum that rounds to 0 stops the gradient, in eager too.
    stops = (y <= 0) if relu else torch.zeros_like(y, dtype=torch.bool)
    assert torch.equal(aten.unpack_taps(taps, channels) == NO_TAP, stops)
    dy_truth = torch.where(stops, 0, dy).double()
    truth.backward(dy_truth.unflatten(0, (pool.n, *pool.pooled)).permute(0, 3, 1, 2))
    dx, db = gathered(dy, taps, pool)
    assert torch.equal(dx.double(), rows_of(leaf.grad))
    wanted = beta.grad if biased else dy_truth.sum(dim=0)
    error = Error.of(db, wanted, torch.ones_like(wanted))
    assert error.rms <= tolerance(torch.float32, max(pool.pooled_rows, 1))


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_nan_and_infinities_pass(dtype):
    """As through PyTorch's ReLU; -inf stops."""
    pool = pool_of((5, 6), "padded", n=1)
    x = torch.randn(pool.rows, 24).to(dtype)
    x[7, :8], x[9, 8:16], x[:, 16:] = NAN, float("inf"), float("-inf")
    bias = torch.full((24,), 0.25, dtype=dtype)
    y, taps = pooled(x, bias, True, pool)
    images = images_of(x, pool).detach().to(dtype) + bias[:, None, None]
    torch.testing.assert_close(y, rows_of(pooled_truth(F.relu(images), pool)[0]), rtol=0, atol=0, equal_nan=True)
    assert y[:, :8].isnan().any()
    assert (aten.unpack_taps(taps, 24)[:, 16:] == NO_TAP).all()
    dx, db = gathered(torch.full_like(y, NAN), taps, pool)
    assert (dx[:, 16:] == 0).all()
    assert (db[16:] == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_a_bias_of_another_dtype(form):
    """fp32 beside 16-bit elements: the sum is rounded once."""
    pool, x, _ = case(form, "7x6", 24, torch.bfloat16)
    bias = torch.randn(24)
    y = empty(pool.pooled_rows, 24, torch.bfloat16)
    x = Guarded(x)
    max_pool(x.slice, y.slice, None, bias, relu=True, pool=pool, tile=TILE, unit=unit_for(x))
    pooled, _ = pooled_truth(images_of(x.rows, pool).detach(), pool)
    assert torch.equal(y.rows, F.relu(rows_of(pooled).float() + bias).to(torch.bfloat16))
