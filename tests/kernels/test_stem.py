"""The stem's two convolutions: every launch against float64, and alone what differs from a block's.

That is K4 of a 1x1, and pack, pack_dgrad and B1 where branches are absent (B5: test_reduce.py). Fresh memory is NaN.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from checks.block_cases import (
    DTYPES,
    ODD_STEM,
    SMALL_STEM,
    backward,
    check_gradients,
    check_kernels,
    conv_truth,
    in_layout,
    make_block,
)
from inception_fused.block.googlenet_blocks import StemConfig, spatial_size
from inception_fused.block.views import BatchNorm, ChannelSlice, Epilogue, Tile, is_ready
from inception_fused.kernels.conv_fprop import conv_fprop
from inception_fused.kernels.mask_grad import mask_grad
from inception_fused.kernels.pack import pack
from inception_fused.kernels.pack_dgrad import pack_dgrad
from inception_fused.plan import choice
from inception_fused.runtime import aten
from inception_fused.testing import Error, tolerance
from marks import full, more, quick

CONFIGS = {"aligned": SMALL_STEM, "odd": ODD_STEM}
SHAPES = {"7x5": (2, 7, 5), "1x1": (3, 1, 1), "1x9": (1, 1, 9), "9x1": (1, 9, 1), "2x2": (2, 2, 2), "9x8": (5, 9, 8)}
SEVERAL = StemConfig(40, 72, 136)
"""More filters and columns than most tiles have, channels beyond one BLOCK_K."""

WHOLE = Tile(64, 64, 32, 2, num_stages=1)
TILES = sorted({tile for kernel in ("K3", "K4", "B2", "B4") for tile in choice.RULES[kernel].tiles(torch.float16)})

configs = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@configs
@pytest.mark.parametrize("shape", quick(SHAPES, "7x5", "1x1", "9x8"))
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
def test_odd_shapes(dtype, shape, config):
    block = make_block(config, SHAPES[shape], dtype)
    out = block.forward()
    check_kernels(block, out)
    check_gradients(block, out)


@full
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_networks_at_full_size(dtype):
    side = spatial_size("stem", 96)
    block = make_block(StemConfig(64, 64, 192), (1, side, side), dtype)
    out = block.forward()
    check_kernels(block, out)
    check_gradients(block, out)


@configs
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_variants(bias, activation, config):
    block = make_block(config, (2, 5, 6), bias=bias, activation=activation)
    out = block.forward()
    check_kernels(block, out)
    check_gradients(block, out)


@pytest.mark.parametrize("layout", ["KCRS", "KRSC", "strided", "transposed"])
def test_layouts_of_weights(layout):
    block = make_block(SMALL_STEM, (2, 4, 3), torch.bfloat16)
    block = block._replace(weights=in_layout(block.weights, layout))
    check_kernels(block, block.forward())
    check_gradients(block)


@pytest.mark.parametrize("tile", quick(TILES, TILES[0]), ids=str)
def test_every_tile_and_order(tile, monkeypatch):
    """Of several tiles in both directions, and several ranges of pixels."""
    monkeypatch.setattr(choice, "MIN_STEPS", 1)
    monkeypatch.setattr(choice, "interpreter_tile", lambda *problem: tile)
    block = make_block(SEVERAL, (3, 8, 7), torch.float16)
    out = block.forward()
    check_kernels(block, out)
    check_gradients(block, out)


@configs
@pytest.mark.parametrize("group_m", [more(1), 3, more(8)])
def test_small_tiles_and_many_ranges(group_m, config, monkeypatch):
    monkeypatch.setattr(choice, "interpreter_tile", lambda *problem: Tile(16, 16, 16, group_m, num_stages=1))
    monkeypatch.setattr(choice, "MIN_STEPS", 1)
    monkeypatch.setattr(choice, "MAX_RANGES", 3)
    block = make_block(config, (2, 5, 7))
    out = block.forward()
    check_kernels(block, out)
    check_gradients(block, out)


@pytest.mark.parametrize("tile", [WHOLE, Tile(16, 16, 16, 3, num_stages=1)], ids=["one tile", "several"])
@pytest.mark.parametrize("saves", [False, True], ids=["no bits", "bits"])
@pytest.mark.parametrize(("c", "k", "unit"), [(24, 40, 8), (17, 20, 1)], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_1x1_reads_its_own_pixel(dtype, c, k, unit, saves, tile):
    """With scale and shift, from a slice between NaN and images between NaN into a slice between canaries."""
    image, n, edge = (4, 3), 3, 5
    m, first = n * image[0] * image[1], unit
    rows = torch.full((m + 2 * edge, c + 2 * unit), float("nan"), dtype=dtype)
    x = rows[edge:-edge, first : first + c].copy_(torch.randn(m, c).to(dtype))
    w = (torch.randn(k, c, 1, 1) / c**0.5).to(dtype)
    scale, shift = torch.rand(k) + 0.5, torch.randn(k)
    y = torch.full((m, k + 2 * unit), 7.0, dtype=dtype)
    width = -(-k // 8)
    bits = torch.full((m, width + 2), 0xA5, dtype=torch.uint8)
    conv_fprop(
        ChannelSlice(rows[edge:-edge].flatten(), c + 2 * unit, first, c), w, ChannelSlice(y, k + 2 * unit, unit, k),
        ChannelSlice(bits, width + 2, 1, width) if saves else None,
        gemm_m=m, image=image, epilogue=Epilogue(shift, scale, True), tile=tile, unit=unit,
    )  # fmt: skip
    own = y[:, unit:-unit]
    truth = F.relu(x.double() @ w.double().flatten(1).T * scale.double() + shift.double())
    assert Error.of(own, truth).within(tolerance(dtype, c))
    assert (y[:, :unit] == 7).all()
    assert (y[:, -unit:] == 7).all()
    expected = torch.full_like(bits, 0xA5)
    if saves:
        expected[:, 1:-1] = aten.pack_bits(own)
    assert torch.equal(bits, expected)


@configs
@pytest.mark.parametrize("given", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_pack_casts_and_permutes_exactly(wanted, given, config):
    weights = [w.to(given) for w in make_block(config, (1, 2, 2)).weights]
    for w, p in zip(weights, pack(weights, [None] * 2, wanted).weights, strict=True):
        assert is_ready(p, wanted)
        assert p.data_ptr() % 16 == 0
        assert torch.equal(p, w.float().to(wanted))


@configs
def test_pack_folds_the_batch_norms_of_two(config):
    block = make_block(config, (1, 2, 2))
    norms = [BatchNorm(*(torch.rand(len(w)) + 0.1 for _ in range(4)), 1e-3) for w in block.weights]
    packed = pack(block.weights, block.biases, torch.float32, norms)
    for norm, b, scale, shift in zip(norms, block.biases, packed.scales, packed.shifts, strict=True):
        gamma, beta, mean, var = (t.double() for t in (norm.gamma, norm.beta, norm.mean, norm.var))
        expected = gamma / (var + norm.eps).sqrt()
        assert Error.of(scale, expected).within(tolerance(torch.float32, 4))
        assert Error.of(shift, (b.double() - mean) * expected + beta).within(tolerance(torch.float32, 4))


@configs
@pytest.mark.parametrize("wanted", [(True, False), (False, True), (True, True)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pack_dgrad_transposes_and_pads_exactly(dtype, wanted, config):
    """wanted: of the 3x3 and of the 1x1; the columns between the 1x1's filters and the row's end are zero."""
    block = make_block(config, (1, 2, 2), dtype)
    shape = block.shape
    given = dict(r5=shape.r5, reduced_width=shape.reduced_width, wanted=(wanted[0], False, wanted[1]))
    unit = 8 if config is SMALL_STEM and dtype != torch.float32 else 1
    packed = pack_dgrad(block.weights, dtype, **given, unit=unit, tile=Tile(16, 16, 1, num_stages=1))
    first, second = block.weights
    flipped = second.flip((2, 3)).permute(1, 2, 3, 0)
    grouped = F.pad(first.flatten(1).T, (0, shape.reduced_width - first.shape[0]))
    for found, expected, need in zip((packed.windows[0], packed.grouped), (flipped, grouped), wanted, strict=True):
        assert (found is not None) == need
        assert not need or torch.equal(found, expected)
    assert packed.projection is None


@pytest.mark.parametrize("masked", [True, False], ids=["bits", "no bits"])
@pytest.mark.parametrize("rows", [True, False], ids=["rows", "NCHW"])
@pytest.mark.parametrize(("k", "unit"), [(40, 8), (20, 1)], ids=["aligned", "odd"])
def test_mask_grad_of_one_branch(k, unit, rows, masked):
    """g beside its columns stays as it is, and the sums are those of what was stored."""
    n, image, tile = 2, (5, 7), Tile(16, 16, 16, num_stages=1)
    m = n * image[0] * image[1]
    dy = torch.randn(n, k, *image, dtype=torch.bfloat16)
    dy = dy.contiguous(memory_format=torch.channels_last) if rows else dy
    passes = torch.rand(m, k) < 0.5
    bits = aten.pack_bits(passes.to(torch.bfloat16))
    g = torch.full((m, k + 2 * unit), 7.0, dtype=torch.bfloat16)
    ranges = choice.row_ranges(m, tile.BLOCK_M)
    sums, borders = torch.empty(ranges[0], k), torch.empty(choice.border_words(image), dtype=torch.int16)
    mask_grad(
        dy, ChannelSlice(bits, bits.shape[1], 0, bits.shape[1]) if masked else None,
        [ChannelSlice(g, k + 2 * unit, unit, k)], sums, borders, ranges=ranges, tile=tile, unit=unit,
    )  # fmt: skip
    expected = dy.permute(0, 2, 3, 1).flatten(0, 2)
    expected = torch.where(passes, expected, 0) if masked else expected
    assert torch.equal(g[:, unit:-unit], expected)
    assert (g[:, :unit] == 7).all()
    assert (g[:, -unit:] == 7).all()
    torch.testing.assert_close(sums.sum(0), expected.float().sum(0), rtol=1e-5, atol=1e-5)
    assert torch.equal(borders, aten.border_words(image, borders.numel(), borders.device))


@configs
def test_only_the_wanted_gradients(config):
    """Each alone is what it is beside the others, to the bit."""
    block = make_block(config, (2, 5, 6))
    out = block.forward()
    dy = torch.randn_like(out[0])
    every = backward(block, out, dy)
    for i in range(5):
        flags = [j == i for j in range(5)]
        (alone,) = (
            g
            for g, need in zip(
                torch.ops.inception_fused._backward(
                    dy, block.x, *out[1:], block.weights, block.bias_dtypes, True, flags, "kernels"
                ),
                flags,
                strict=True,
            )
            if need
        )
        assert torch.equal(alone, every[i]), i


def test_the_truth_of_the_stem_is_two_convolutions():
    """Of what the checks compare with: against autograd through both, in float64."""
    block = make_block(ODD_STEM, (2, 5, 6), torch.float64)
    x = block.x.clone().requires_grad_()
    weights, biases = ([t.clone().requires_grad_() for t in some] for some in (block.weights, block.biases))
    y = conv_truth(conv_truth(x, weights[0], biases[0], True), weights[1], biases[1], True)
    out = block.forward()
    torch.testing.assert_close(out[0], y.detach())
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, (x, *weights, *biases), dy)
    for g, truth in zip(backward(block, out, dy), expected, strict=True):
        torch.testing.assert_close(g, truth)
