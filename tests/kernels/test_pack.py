"""The pack launch: casts and permutation exactly, BatchNorm's scale and shift against float64, then in use."""

import pytest
import torch
import torch.nn.functional as F

from checks.block_cases import ODD, REDUCE_24, make_block
from inception_fused.block.views import ChannelSlice, Epilogue, is_ready
from inception_fused.kernels.conv_fprop import conv_fprop
from inception_fused.kernels.grouped_gemm import grouped_gemm
from inception_fused.kernels.pack import BatchNorm, pack
from inception_fused.kernels.pool_proj import pool_proj
from inception_fused.plan.choice import INTERPRETER_LIMITS
from inception_fused.runtime.submit import record
from inception_fused.testing import Error, tolerance


@pytest.mark.parametrize("config", [REDUCE_24, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("given", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("wanted", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_casts_and_permutes_exactly(wanted, given, config):
    weights = [w.to(given) for w in make_block(config, (1, 2, 2)).weights]
    weights[4] = weights[4].contiguous(memory_format=torch.channels_last)
    packed = pack(weights, [None] * 6, wanted).weights
    for w, p in zip(weights, packed, strict=True):
        assert p.dtype == wanted
        assert is_ready(p, wanted)
        assert p.data_ptr() % 16 == 0
        # Triton casts float64 through float32, PyTorch at once; the interpreter's weights are float32 values anyway.
        assert torch.equal(p, w.float().to(wanted))


def test_no_launch_where_nothing_needs_it():
    block = make_block(REDUCE_24, (1, 2, 2))
    weights = [w.contiguous(memory_format=torch.channels_last) for w in block.weights]
    with record() as launches:
        packed = pack(weights, block.biases, torch.float32)
    assert launches == []
    assert all(p is w for p, w in zip(packed.weights, weights, strict=True))
    with record() as launches:
        pack(block.weights, block.biases, torch.float32)
    assert len(launches) == 1


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_becomes_scale_and_shift(bias, affine):
    """Against float64, then through K1, K2 and K3's epilogues against convolution + BatchNorm + ReLU."""
    block = make_block(REDUCE_24, (1, 5, 4), bias=bias)
    shape = block.shape
    norms = [_random_norm(w.shape[0], affine) for w in block.weights]
    biases = block.biases or [None] * 6
    packed = pack(block.weights, biases, torch.float32, norms)
    for norm, b, scale, shift in zip(norms, biases, packed.scales, packed.shifts, strict=True):
        true_scale, true_shift = _affine64(norm, b)
        assert Error.of(scale, true_scale).within(tolerance(torch.float32, 4))
        assert Error.of(shift, true_shift).within(tolerance(torch.float32, 4))

    m, image, run = shape.gemm_m, (shape.h, shape.w), {"tile": INTERPRETER_LIMITS, "unit": 1}
    e = [Epilogue(shift, scale) for shift, scale in zip(packed.shifts, packed.scales, strict=True)]
    w1, w2_reduce, w2, w3_reduce, _, w4 = packed.weights
    y, r, _, _ = block.forward()
    y1, y2, _, y4 = shape.y_slices(y)
    r3, r5 = shape.r_slices(r)
    x = ChannelSlice(block.x, shape.c, 0, shape.c)
    grouped_gemm(x, (w1, w2_reduce, w3_reduce), y1, r3, r5, None, gemm_m=m, epilogues=(e[0], e[1], e[3]), **run)
    pool_proj(x, w4, y4, None, None, gemm_m=m, image=image, epilogue=e[5], **run)
    conv_fprop(r3, w2, y2, None, gemm_m=m, image=image, epilogue=e[2], **run)

    def truth(i: int, x: torch.Tensor) -> torch.Tensor:
        norm, w = norms[i], block.weights[i].double()
        out = F.conv2d(x.double(), w, None if biases[i] is None else biases[i].double(), padding=w.shape[-1] // 2)
        mean, var, gamma, beta = (
            None if t is None else t.double() for t in (norm.mean, norm.var, norm.gamma, norm.beta)
        )
        return F.relu(F.batch_norm(out, mean, var, gamma, beta, eps=norm.eps))

    r3_image = r3.rows(m).unflatten(0, (1, *image)).permute(0, 3, 1, 2)
    parts = y.split(shape.branch_channels, dim=1)
    pooled = F.max_pool2d(block.x, 3, stride=1, padding=1)
    for i, out, operand in (
        (0, parts[0], block.x),
        (1, r3_image, block.x),
        (2, parts[1], r3_image),
        (5, parts[3], pooled),
    ):
        length = block.weights[i][0].numel()
        assert Error.of(out, truth(i, operand)).within(tolerance(torch.float32, length))


def _random_norm(k: int, affine: bool) -> BatchNorm:
    gamma, beta = (torch.rand(k) + 0.5, torch.randn(k)) if affine else (None, None)
    return BatchNorm(gamma, beta, torch.randn(k), torch.rand(k) + 0.1, 1e-3)


def _affine64(norm: BatchNorm, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (norm.var.double() + norm.eps).rsqrt() * (1 if norm.gamma is None else norm.gamma.double())
    centred = (0 if bias is None else bias.double()) - norm.mean.double()
    return scale, centred * scale + (0 if norm.beta is None else norm.beta.double())
