"""B4 alone against float64, and the borders of the image that B1 writes for it."""

import pytest
import torch
import torch.nn.functional as F

from inception_fused.block.views import ChannelSlice, Tile
from inception_fused.kernels.conv_wgrad import conv_wgrad
from inception_fused.kernels.mask_grad import mask_grad
from inception_fused.plan import choice
from inception_fused.runtime import aten
from marks import more

IMAGES = [(1, 1), (1, 9), (9, 1), (2, 2), (3, 3), (5, 4), (11, 13)]
"""Of fewer pixels than a step, so that one holds several images, and of more."""

SMALL = Tile(16, 32, 16, 1, num_stages=1)


def masked(image, words, n=2, ranges=(2, 1)):
    """What B1 writes, and canaries behind it."""
    dy = torch.ones(n, 8, *image).contiguous(memory_format=torch.channels_last)
    g = torch.empty(dy.numel())
    columns = [ChannelSlice(g, 8, first, 2) for first in (0, 2, 4, 6)]
    storage = torch.full((words + 64,), 0x5A5A, dtype=torch.int16)
    mask_grad(dy, None, columns, None, storage[:words], ranges=ranges, tile=SMALL, unit=1)
    return storage[:words], storage[words:]


@pytest.mark.parametrize("image", [*IMAGES, (40, 30)], ids=str)
def test_borders(image):
    """Of every pixel, by the definition: B1's and its twin's."""
    h, w = image
    words = choice.border_words(image)
    expected = []
    for q in range(words):
        row, column = q // w % h, q % w
        inside = [i for i in range(5) if 0 <= row + i - 2 < h] + [8 + i for i in range(5) if 0 <= column + i - 2 < w]
        expected.append(sum(1 << i for i in inside))
    assert aten.border_words(image, words, torch.device("cpu")).tolist() == expected
    for ranges in ((2, 1), (3, 2)):
        written, behind = masked(image, words, ranges=ranges)
        assert written.tolist() == expected
        assert (behind == 0x5A5A).all()


def truth(g, x, side, pool):
    x = F.max_pool2d(x, 3, stride=1, padding=1) if pool else x
    size = (g.shape[1], x.shape[1], side, side)
    return torch.nn.grad.conv2d_weight(x, size, g, padding=side // 2).permute(0, 2, 3, 1)


def wgrad(g, x, side, pool, borders, *, splits=1, tile=SMALL, unit=1):
    n, k, h, w = g.shape
    part = torch.full((splits, k, side, side, x.shape[1]), float("nan"), dtype=torch.float64)
    rows = [ChannelSlice(t.permute(0, 2, 3, 1).contiguous(), t.shape[1], 0, t.shape[1]) for t in (g, x)]
    conv_wgrad(*rows, part, borders, gemm_m=n * h * w, image=(h, w), pool=pool, tile=tile, unit=unit)
    return part


@pytest.mark.parametrize("image", [more((1, 1)), (1, 9), more((9, 1)), (2, 2), more((3, 3)), (5, 4), (11, 13)], ids=str)
@pytest.mark.parametrize(("side", "pool"), [(1, False), (3, False), (5, False), (1, True)])
@pytest.mark.parametrize("unit", [1, 2])
def test_every_window_and_image(side, pool, image, unit):
    """In float64, so that one wrong tap shows; whatever lies behind the words that a step may read. Several steps, also
    where each holds several images."""
    generator = torch.Generator().manual_seed(0)
    n = max(3, 100 // (image[0] * image[1]))
    g, x = (torch.randn(n, c, *image, generator=generator, dtype=torch.float64) for c in (22, 18))
    for block_k, splits in ((16, 1), (64, 2), (32, 4)):
        read = image[0] * image[1] + block_k - 1
        parts = []
        for behind in (0, -1):
            borders = torch.full((read + 64,), behind, dtype=torch.int16)
            borders[:read] = aten.border_words(image, read, g.device)
            tile = SMALL._replace(BLOCK_K=block_k)
            parts.append(wgrad(g, x, side, pool, borders, splits=splits, tile=tile, unit=unit))
        assert torch.equal(*parts)
        torch.testing.assert_close(parts[0].sum(0), truth(g, x, side, pool), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("image", [(1, 1), (3, 3), (1, 5), (5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16], ids=str)
def test_the_pool_of_what_is_not_finite(image, dtype):
    """Infinity in the last pixel, which stands for those of a step beyond it: zero times infinity would be NaN."""
    generator = torch.Generator().manual_seed(0)
    g, x = (torch.rand(2, 16, *image, generator=generator).to(dtype) + 0.5 for _ in range(2))
    x -= 1
    x[-1, 3, -1, -1] = float("inf")
    x[0, 5, 0, 0] = float("nan")
    x[0, 7, 0, 0] = float("-inf")
    x[-1, 8] = float("-inf")
    borders = aten.border_words(image, image[0] * image[1] + 64, g.device)
    found = wgrad(g, x, 1, True, borders, tile=SMALL._replace(BLOCK_K=64)).sum(0)
    expected = truth(g.double(), x.double(), 1, True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3, equal_nan=True)
    assert expected.isinf().any()
    assert expected.isnan().any()
