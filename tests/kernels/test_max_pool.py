"""P1 and P2 alone: PyTorch's max-pool of stride 2 and its gradient, in wider rows with NaN around them."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from inception_fused.block.pools import STRIDE, WINDOW, PoolShape
from inception_fused.block.tolerance import Error, tolerance
from inception_fused.block.views import Tile, taps_width
from inception_fused.kernels.max_pool import cells, max_pool, reciprocal
from inception_fused.kernels.max_pool_grad import max_pool_grad
from inception_fused.runtime import aten, aten_pools
from marks import each_once
from norm_operands import EVERY, NAN, Guarded, empty, unit_for
from test_pool import PALETTES

FORMS = {"padded": (1, False), "ceil": (0, True), "plain": (0, False), "padded, ceil": (1, True)}
"""(padding, ceil_mode), the networks' two first."""

IMAGES = [(1, 1), (1, 4), (2, 2), (3, 5), (4, 1), (7, 6), (20, 3)]
POOLS = {f"{form} {h}x{w}": PoolShape(2, h, w, *FORMS[form]) for form in FORMS for h, w in IMAGES}
POOLS = {name: pool for name, pool in POOLS.items() if min(pool.pooled) > 0}
CHANNELS = dict(zip(POOLS, itertools.cycle([1, 24, 3, 64, 40]), strict=False))
"""Of each pool: 24 and 40 are parts of a tile in 16-byte units, the odd ones of single channels."""

TILE = Tile(16, 32, 16, 1, num_stages=1)


def pool_of(image: tuple[int, int], form: str, n: int = 2) -> PoolShape:
    return PoolShape(n, *image, *FORMS[form])


def images_of(rows: torch.Tensor, pool: PoolShape) -> torch.Tensor:
    """[N*H*W, C] -> [N, C, H, W] in float64, a leaf."""
    images = rows.double().unflatten(0, (pool.n, pool.h, pool.w)).permute(0, 3, 1, 2)
    return images.clone().requires_grad_()


def rows_of(images: torch.Tensor) -> torch.Tensor:
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def pooled_truth(x: torch.Tensor, pool: PoolShape) -> tuple[torch.Tensor, torch.Tensor]:
    """(PyTorch's maxima, its indices)."""
    return F.max_pool2d(x, WINDOW, STRIDE, pool.padding, ceil_mode=pool.ceil_mode, return_indices=True)


def pooled(x: Guarded, pool: PoolShape, *, save: bool = True) -> tuple[torch.Tensor, torch.Tensor | None]:
    """y and taps of P1."""
    c = x.rows.shape[1]
    y = empty(pool.pooled_rows, c, x.rows.dtype)
    storage = torch.full((pool.pooled_rows + 2, taps_width(c)), 0xA5, dtype=torch.uint8)
    taps = storage[1:-1] if save else None
    max_pool(x.slice, y.slice, taps, pool=pool, tile=TILE, unit=unit_for(x))
    y.check()
    assert (storage[[0, -1]] == 0xA5).all()
    return y.rows, taps


def gathered(dy: torch.Tensor, taps: torch.Tensor, pool: PoolShape) -> torch.Tensor:
    """dx of P2, which its twin gives to the bit."""
    dy = Guarded(dy)
    dx, twin = (empty(pool.rows, dy.rows.shape[1], dy.rows.dtype) for _ in range(2))
    max_pool_grad(dy.slice, taps, dx.slice, pool=pool, tile=TILE, unit=unit_for(dy))
    aten_pools.max_pool_grad(dy.slice, taps, twin.slice, pool=pool)
    dx.check()
    torch.testing.assert_close(dx.rows, twin.rows, rtol=0, atol=0, equal_nan=True)
    return dx.rows


def check(values: torch.Tensor, pool: PoolShape) -> None:
    """Maxima, taps and the gradient of whole numbers against PyTorch's in float64; the twin of P1 beside."""
    x = Guarded(values)
    leaf = images_of(values, pool)
    truth, indices = pooled_truth(leaf, pool)
    wanted_taps = aten.pack_taps(rows_of(aten_pools.taps_of_indices(indices, pool)))
    for save in (False, True):
        y, taps = pooled(x, pool, save=save)
        torch.testing.assert_close(y.double(), rows_of(truth.detach()), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(taps, wanted_taps)
    twin, twin_taps = empty(*y.shape, y.dtype), torch.full_like(taps, 0xA5)
    aten_pools.max_pool(x.slice, twin.slice, twin_taps, pool=pool)
    torch.testing.assert_close(twin.rows, y, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(twin_taps, taps)
    dy = torch.randint(-7, 8, y.shape).to(y.dtype)
    truth.backward(dy.double().unflatten(0, (pool.n, *pool.pooled)).permute(0, 3, 1, 2))
    assert torch.equal(gathered(dy, taps, pool).double(), rows_of(leaf.grad))


@each_once
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("palette", PALETTES)
def test_every_window(palette, dtype, name):
    """Ties, infinities, NaN; corners, edges and the inside, images of one row and of one column, several in a tile."""
    pool, values = POOLS[name], torch.tensor(PALETTES[palette], dtype=dtype)
    check(values[torch.randint(len(values), (pool.rows, CHANNELS[name]))], pool)


@pytest.mark.parametrize(("channels", "dtype"), [(192, torch.bfloat16), (64, torch.float32), (33, torch.float16)])
@pytest.mark.parametrize("form", ["padded", "ceil"])
def test_several_tiles_of_numbers_of_every_size(form, channels, dtype):
    """Those beyond 2**121 too, which bf16 as fp16 does not order."""
    pool = pool_of((15, 14), form)
    x = torch.randn(pool.rows, channels)
    large = torch.rand(x.shape) < 0.1
    check(torch.where(large & (dtype != torch.float16), x * 2.0**124, x).to(dtype), pool)


@pytest.mark.parametrize("form", ["padded", "ceil"])
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_nan_at_each_place_of_each_window(dtype, form):
    """One channel for each set of one or two pixels of a 4x3 image that are NaN: which of them wins where."""
    pool = pool_of((4, 3), form, n=1)
    pairs = list(itertools.combinations_with_replacement(range(12), 2))
    x = torch.randn(12, 80).to(dtype)
    for channel, pixels in enumerate(pairs):
        x[list(pixels), channel] = NAN
    check(x, pool)


@pytest.mark.parametrize("form", ["padded", "ceil"])
@pytest.mark.parametrize("dtype", EVERY, ids=str)
@pytest.mark.parametrize("first", [0.0, -0.0])
def test_zeros_of_both_signs_tie(first, dtype, form):
    """In either order, among negative neighbours: the first zero of a window is its maximum."""
    pool = pool_of((5, 4), form, n=1)
    x = torch.full((20, 32), -1.0, dtype=dtype)
    for channel in range(32):
        a, b = sorted(torch.randperm(20)[:2].tolist())
        x[a, channel], x[b, channel] = first, -first
    check(x, pool)


@each_once
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_gradient_of_any_numbers(dtype, name):
    """Sums of four at most: rounded once in 16 bits, and in PyTorch's own order in fp32."""
    pool = POOLS[name]
    x = torch.randint(3, (pool.rows, 40)).to(dtype)
    _, taps = pooled(Guarded(x), pool)
    dy = torch.randn(pool.pooled_rows, 40).to(dtype)
    dx = gathered(dy, taps, pool)
    for wide in {torch.float64, torch.promote_types(dtype, torch.float32)}:
        leaf = images_of(x, pool).detach().to(wide).requires_grad_()
        truth, _ = pooled_truth(leaf, pool)
        truth.backward(dy.to(wide).unflatten(0, (pool.n, *pool.pooled)).permute(0, 3, 1, 2))
        wanted = rows_of(leaf.grad)
        if wide == torch.float64:
            assert Error.of(dx, wanted).rms <= tolerance(dtype, 4)
        else:
            assert torch.equal(dx, wanted.to(dtype))


def test_nan_in_a_gradient_reaches_its_pixel_alone():
    pool = pool_of((7, 6), "padded", n=1)
    _, taps = pooled(Guarded(torch.randn(pool.rows, 24)), pool)
    for window in range(pool.pooled_rows):
        dy = torch.ones(pool.pooled_rows, 24)
        dy[window] = NAN
        tap = aten.unpack_taps(taps, 24)[window].long()
        i, j = divmod(window, pool.pooled[1])
        pixel = (2 * i - 1 + tap // 3) * pool.w + 2 * j - 1 + tap % 3
        wanted = torch.zeros(pool.rows, 24, dtype=torch.bool)
        wanted[pixel, torch.arange(24)] = True
        assert torch.equal(gathered(dy, taps, pool).isnan(), wanted)


@pytest.mark.parametrize("dtype", EVERY, ids=str)
def test_an_image_does_not_depend_on_its_batch(dtype):
    """Nor on NaN of another in its tile, for which the tile is scanned again."""
    alone, both = pool_of((5, 3), "padded", n=1), pool_of((5, 3), "padded")
    x, dy = torch.randn(15, 40).to(dtype), torch.randn(12, 40).to(dtype)[: 2 * alone.pooled_rows]
    one, taps = pooled(Guarded(x), alone)
    two, both_taps = pooled(Guarded(torch.cat([x, torch.full_like(x, NAN)])), both)
    assert torch.equal(two[: len(one)], one)
    assert torch.equal(both_taps[: len(one)], taps)
    assert two[len(one) :].isnan().all()
    dx = gathered(dy[: len(one)], taps, alone)
    assert torch.equal(gathered(dy, both_taps, both)[:15], dx)
    assert torch.equal(gathered(dy[: len(one)], taps, alone), dx)


@pytest.mark.parametrize("form", FORMS)
def test_indices_of_taps_inverts(form):
    pool = pool_of((7, 6), form)
    _, indices = pooled_truth(torch.randn(2, 3, 7, 6), pool)
    taps = aten_pools.taps_of_indices(indices, pool)
    assert taps.min() >= 0
    assert taps.max() <= 8
    assert torch.equal(aten_pools.indices_of_taps(taps.to(torch.uint8), pool), indices)


@triton.jit
def cells_kernel(out_ptr, first, H, W, h_multiplier, h_shift, w_multiplier, w_shift, BLOCK: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    image, row, column = cells(first + offs, H, W, h_multiplier, h_shift, w_multiplier, w_shift)
    tl.store(out_ptr + offs, image)
    tl.store(out_ptr + BLOCK + offs, row)
    tl.store(out_ptr + 2 * BLOCK + offs, column)


@pytest.mark.parametrize("w", [1, 2, 3, 7, 56, 127, 128, 129, 46341, 2**30, 2**31 - 1])
@pytest.mark.parametrize("h", [1, 2, 7, 28, 1000, 46341])
def test_cells_up_to_the_largest(h, w):
    for first in {0, max(w - 40, 0), max(h * w - 40, 0), 7 * h * w - 1, 2**31 - 128}:
        if first > 2**31 - 128:
            continue
        out = torch.empty(3, 128, dtype=torch.int32)
        cells_kernel[(1,)](out, first, h, w, *reciprocal(h), *reciprocal(w), BLOCK=128)
        at = first + torch.arange(128)
        assert torch.equal(out.long(), torch.stack([at // (h * w), at // w % h, at % w]))
