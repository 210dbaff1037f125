"""K1 to K4 in the interpreter: every slice, r, taps and bits against float64 on the very operands of each kernel."""

import pytest
import torch

from checks.block_cases import (
    DTYPES,
    ODD,
    ODD_SHAPES,
    REDUCE_24,
    SMALL,
    check_bits,
    check_kernels,
    in_layout,
    make_block,
)
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, spatial_size
from inception_fused.block.views import Tile, row_stride
from inception_fused.plan import choice
from inception_fused.runtime import interpreter
from marks import each_once, quick


@each_once
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", quick(GOOGLENET_BLOCKS, "3a", "4c", "5b"))
def test_googlenet_block(name, dtype):
    side = spatial_size(name)
    block = make_block(GOOGLENET_BLOCKS[name], (1, side, side), dtype)
    check_kernels(block, block.forward())


@each_once
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("double", [False, True], ids=["one window", "two windows"])
def test_odd_shapes(shape, dtype, double):
    block = make_block(*ODD_SHAPES[shape], dtype, double=double)
    check_kernels(block, block.forward())


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("third", [{"branch3": 3}, {"branch3": 5}, {"double": True}], ids=["3x3", "5x5", "two 3x3"])
def test_variants(third, activation, bias):
    for config in (SMALL, ODD):
        block = make_block(config, (1, 4, 6), bias=bias, activation=activation, **third)
        check_kernels(block, block.forward())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saves_do_not_change_y(dtype):
    block = make_block(REDUCE_24, (1, 5, 4), dtype)
    y, r, bits, taps = block.forward(save=False)
    assert torch.equal(y, block.forward(save=True)[0])
    assert r.numel() == bits.numel() == taps.numel() == 0


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
def test_what_rounds_to_zero_masks(config):
    """The bits are those of the stored y: a sum of 2**-27 is 0 in fp16, through which no gradient passes."""
    block = make_block(config, (1, 3, 4), torch.float16)
    weights = [torch.zeros_like(w) for w in block.weights]
    biases = [torch.tensor([2.0**-27, 2.0**-24, 0.0, 1.0]).repeat(len(b))[: len(b)] for b in block.biases]
    y, _, bits, _ = block._replace(weights=weights, biases=biases).forward()
    assert y.unique().tolist() == [0, 2.0**-24, 1]
    check_bits(bits, y, block.shape)


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
def test_batch_zero(config):
    block = make_block(config, (0, 5, 4))
    y, r, bits, taps = block.forward()
    assert y.shape == (0, config.out_channels, 5, 4)
    assert r.shape[0] == bits.shape[0] == taps.shape[0] == 0


def test_an_image_does_not_depend_on_its_batch(monkeypatch):
    # numpy, which interprets a product, rounds by the shape of its operands: a tile as on a GPU, not the batch's.
    monkeypatch.setattr(choice, "interpreter_tile", lambda *sizes: Tile(64, 64, 32, num_stages=1))
    block = make_block(SMALL, (6, 5, 7), torch.bfloat16)
    whole = block.forward(save=False)[0]
    for i in (0, 3, 5):
        alone = block._replace(x=block.x[i : i + 1]).forward(save=False)[0]
        assert torch.equal(alone, whole[i : i + 1])


def _layouts(x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The values of x [2, C, H, W] in every memory layout that a caller may bring."""
    n, c, h, w = x.shape
    wide = torch.full((n, 3 * c, h, w), float("nan"), dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    wide[:, c : 2 * c] = x
    tall = torch.full((n, c, 2 * h, w), float("nan"), dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    tall[:, :, ::2] = x
    return {
        "NCHW": x.contiguous(),
        "NHWC": x.contiguous(memory_format=torch.channels_last),
        "slice of channels": wide[:, c : 2 * c],
        "every other row": tall[:, :, ::2],
        "expanded over N": x[:1].expand(n, c, h, w),
        "expanded over W": x[..., :1].expand(n, c, h, w),
        "permuted": x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
    }


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("layout", _layouts(torch.zeros(2, 2, 2, 2)))
def test_layouts_of_x(layout, config):
    block = make_block(config, (2, 4, 3))
    x = _layouts(block.x)[layout]
    before = x.clone()
    out = block._replace(x=x).forward()
    check_kernels(block._replace(x=x), out)
    assert out[0].is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)


def test_a_slice_of_channels_is_read_in_place():
    wide = torch.empty((2, 48, 5, 3)).contiguous(memory_format=torch.channels_last)
    assert row_stride(wide[:, 8:24]) == 48
    assert row_stride(wide[:, :, ::2]) is None
    assert row_stride(wide.contiguous()) is None
    assert row_stride(torch.empty(4, 7, 1, 1)) == 7
    assert row_stride(torch.empty(1, 7, 1, 1)[:, :5]) == 5
    assert row_stride(torch.empty(4, 7, 1, 1)[:, :5]) == 7
    assert row_stride(torch.empty(1, 3, 5, 3).expand(4, 3, 5, 3)) is None
    assert row_stride(wide[:1, :, ::2]) is None, "rows left out of a single image"
    assert row_stride(wide[:, :, :, :2]) is None, "columns left out"
    assert row_stride(torch.empty(99).as_strided((1, 8, 3, 3), (0, 1, 6, 2))) is None, "pixels that overlap"


@pytest.mark.parametrize("layout", ["KCRS", "KRSC", "strided", "transposed"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layouts_and_dtypes_of_weights(layout, dtype):
    """fp32 parameters with a bf16 input is what autocast brings: the pack launch casts."""
    block = make_block(REDUCE_24, (1, 4, 5))
    weights = in_layout(block.weights, layout)
    given = block._replace(x=block.x.to(dtype), weights=weights)
    out = given.forward()
    rounded = given._replace(weights=[w.to(dtype) for w in weights], biases=block.biases)
    check_kernels(rounded, out)


def test_address_arithmetic_fits_32_bits():
    """The interpreter's check for int32 overflow, which every other test leaves off for its cost."""
    interpreter.sanitize_overflow(True)
    try:
        block = make_block(SMALL, (2, 5, 4))
        check_kernels(block, block.forward())
    finally:
        interpreter.sanitize_overflow(False)
