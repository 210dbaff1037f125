"""K2's pool is PyTorch's to the last case: ties, infinities and NaN, in value and in arg-max."""

import pytest
import torch
import torch.nn.functional as F

from checks.block_cases import DTYPES, Block, make_block
from inception_fused import InceptionConfig
from inception_fused.block.views import ChannelSlice, Epilogue, Tile
from inception_fused.kernels.pool_proj import pool_proj
from inception_fused.runtime import aten
from marks import each_once

CONFIG = InceptionConfig(8, 8, (8, 8), (8, 8), 8)
NAN, INF = float("nan"), float("inf")
PALETTES = {
    "ties": [0.0, 1.0],
    "signed zeros": [0.0, -0.0],
    "all equal": [2.0],
    "all -inf": [-INF],
    "inf and ties": [-INF, 0.0, INF],
    "nan": [NAN, 0.0, 1.0],
    "nan and inf": [NAN, -INF, INF, 0.0],
    "all nan": [NAN],
}


def pooling_block(values: list[float], dtype: torch.dtype, shape: tuple[int, int, int] = (2, 5, 6)):
    """A block whose fourth branch is the pool itself (identity weights, no bias, no activation)."""
    block = make_block(CONFIG, shape, dtype, bias=False, activation=None)
    palette = torch.tensor(values, dtype=dtype)
    x = palette[torch.randint(len(values), block.x.shape)].contiguous(memory_format=torch.channels_last)
    block.weights[5] = torch.eye(8, dtype=dtype)[..., None, None].contiguous()
    return block._replace(x=x)


@each_once
@pytest.mark.parametrize("save", [True, False], ids=["taps", "no taps"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("palette", PALETTES)
def test_values_and_taps(palette, dtype, save):
    block = pooling_block(PALETTES[palette], dtype)
    y, _, _, taps = block.forward(save=save)
    pooled, indices = F.max_pool2d(block.x, 3, stride=1, padding=1, return_indices=True)
    # The identity GEMM adds 0 * v for every other channel, which is NaN where v is not finite.
    blurred = torch.where(pooled.isfinite().all(dim=1, keepdim=True), pooled, NAN)
    ours = y[:, 24:]
    assert torch.equal(ours.isnan(), blurred.isnan() | pooled.isnan())
    finite = ~ours.isnan()
    assert torch.equal(ours[finite], pooled[finite])
    if save:
        expected = aten.taps_of_indices(indices).permute(0, 2, 3, 1).reshape(-1, 8)
        assert torch.equal(aten.unpack_taps(taps, 8), expected.to(torch.uint8))


def pool(x, h, w, *, save=True, unit=None, identity=True):
    """(y, taps) of K2 on x [M, C] for C filters, in chunks of 16 channels: whole ones, and the rest of one."""
    m, c = x.shape
    weight = torch.eye(c, dtype=x.dtype) if identity else torch.randn(c, c).to(x.dtype)
    y = torch.full((m, c), 7.0, dtype=x.dtype)
    taps = torch.full((m, -(-c // 2)), 255, dtype=torch.uint8) if save else None
    unit = unit or (16 // x.element_size() if c * x.element_size() % 16 == 0 else 1)
    pool_proj(
        ChannelSlice(x, c, 0, c), weight, ChannelSlice(y, c, 0, c), None, taps, gemm_m=m, image=(h, w),
        epilogue=Epilogue(None, None, False), tile=Tile(64, 64, 16, 2, num_stages=1), unit=unit,
    )  # fmt: skip
    return y, taps


def check(x, h, w):
    """Values and taps of x [M, C] against PyTorch's, with and without taps."""
    m, c = x.shape
    pooled, indices = F.max_pool2d(
        x.view(-1, h, w, c).permute(0, 3, 1, 2).float(), 3, stride=1, padding=1, return_indices=True
    )
    pooled = pooled.permute(0, 2, 3, 1).reshape(m, c)
    expected = aten.taps_of_indices(indices).permute(0, 2, 3, 1).reshape(m, c).to(torch.uint8)
    # The identity's zeros times what is not finite are NaN, for the other channels of a pixel.
    pooled = (pooled[:, None] * torch.eye(c)).sum(2)
    for save in (True, False):
        y, taps = pool(x, h, w, save=save)
        torch.testing.assert_close(y.float(), pooled, rtol=0, atol=0, equal_nan=True)
        if save:
            assert torch.equal(aten.unpack_taps(taps, c), expected)
            assert torch.equal(taps, aten.pack_taps(expected))


IMAGES = [(1, 1), (1, 2), (2, 1), (2, 2), (1, 5), (5, 1), (3, 4), (20, 3)]


@each_once
@pytest.mark.parametrize("channels", [40, 16, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("palette", PALETTES)
def test_every_window(palette, dtype, channels):
    """Corners, edges and the inside, images of one row and of one column, several in a tile and several tiles."""
    values = torch.tensor(PALETTES[palette], dtype=dtype)
    for h, w in IMAGES:
        check(values[torch.randint(len(values), (3 * h * w, channels))], h, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_at_each_place_of_each_window(dtype):
    """One channel for each set of one or two pixels of a 3x3 image that are NaN: which of them wins where."""
    pairs = [(a, b) for a in range(9) for b in range(a, 9)]
    x = torch.randn(9, 48).to(dtype)
    for channel, pixels in enumerate(pairs):
        x[list(pixels), channel] = NAN
    check(x, 3, 3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("first", [0.0, -0.0])
def test_zeros_of_both_signs_tie(first, dtype):
    """In either order, among negative neighbours: the first zero of a window is its maximum."""
    x = torch.full((25, 32), -1.0, dtype=dtype)
    for channel in range(32):
        a, b = sorted(torch.randperm(25)[:2].tolist())
        x[a, channel], x[b, channel] = first, -first
    check(x, 5, 5)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("values", [(2.0**120, 2.0**121), (2.0**121, 2.0**122), (2.0**121, INF), (2.0**126, 1e-40)])
def test_bf16_of_every_size(values, sign):
    """What has no finite number as fp16, bit pattern by bit pattern, and what is no normal number in bf16."""
    palette = sign * torch.tensor([*values, 0.0, 1.0], dtype=torch.bfloat16)
    check(palette[torch.randint(4, (30, 32))], 5, 6)


def test_every_number_of_bf16():
    """In order, each among its neighbours: a window's largest, in either sign, and NaN of every kind."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    check(numbers[: 1008 * 64].view(64, 1008).T.contiguous(), 9, 7)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_image_does_not_depend_on_its_batch(dtype):
    """Nor on NaN of another in its tile, for which the tile is computed again."""
    torch.manual_seed(0)
    one = torch.randn(15, 40).to(dtype)
    other = torch.full((15, 40), NAN, dtype=dtype)
    torch.manual_seed(1)
    alone, taps = pool(one, 5, 3, identity=False)
    torch.manual_seed(1)
    both, both_taps = pool(torch.cat([one, other]), 5, 3, identity=False)
    assert torch.equal(both[:15], alone)
    assert torch.equal(both_taps[:15], taps)
    assert both[15:].isnan().all()


@each_once
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("special", [NAN, INF, -INF])
def test_one_special_value_reaches_exactly_its_windows(special, dtype):
    """A single special pixel of one channel, as the plain convolution of the pooled input gives it."""
    for h, w in ((0, 0), (2, 3), (4, 5), (0, 4)):
        block = pooling_block([0.5], dtype, (1, 5, 6))
        block.x[0, 3, h, w] = special
        y = block.forward()[0]
        pooled = F.max_pool2d(block.x, 3, stride=1, padding=1)
        expected = F.conv2d(pooled, block.weights[5])
        assert torch.equal(y[:, 24:].isnan(), expected.isnan())
        assert torch.equal(y[:, 24:].nan_to_num(0.25), expected.nan_to_num(0.25))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_through_the_whole_block(dtype):
    """Special values pass convolutions and ReLU as in PyTorch; a NaN passes the mask.

    PyTorch in float64: in bf16 its 5x5 convolution multiplies infinity by padding on a CPU with AMX (oneDNN in torch
    2.13.0), which gives more NaN.
    """
    block = make_block(CONFIG, (1, 5, 6), dtype)
    for special in (NAN, INF, -INF):
        x = block.x.clone()
        x[0, 2, 2, 3] = special
        y, _, bits, _ = block._replace(x=x).forward()
        exact = Block(x.double(), *([t.double() for t in some] for some in (block.weights, block.biases)), block.relu)
        eager = exact.forward("eager")[0]
        assert torch.equal(y.isnan(), eager.isnan())
        assert torch.equal(y.isinf(), eager.isinf())
        passes = aten.unpack_bits(bits, 32).unflatten(0, (1, 5, 6)).permute(0, 3, 1, 2)
        assert torch.equal(passes, ~(y <= 0))


def test_taps_pack_and_unpack():
    taps = torch.randint(9, (5, 7), dtype=torch.uint8)
    assert torch.equal(aten.unpack_taps(aten.pack_taps(taps), 7), taps)


def test_indices_of_taps_inverts():
    _, indices = F.max_pool2d(torch.randn(2, 3, 5, 4), 3, stride=1, padding=1, return_indices=True)
    assert torch.equal(aten.indices_of_taps(aten.taps_of_indices(indices)), indices)
