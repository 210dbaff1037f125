"""K2's pool is PyTorch's to the last case: ties, infinities and NaN, in value and in arg-max."""

import pytest
import torch
import torch.nn.functional as F

from checks.block_cases import DTYPES, Block, make_block
from inception_fused import InceptionConfig
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
