"""Blocks, inputs and the float64 formulas of single kernels, for the tests and for gpu_check's stages."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from checks.convolutions import convolutions
from inception_fused import InceptionConfig
from inception_fused.block import chains
from inception_fused.block.call_types import BackwardCall, Saved
from inception_fused.block.googlenet_blocks import Config, StemConfig
from inception_fused.block.tensor_lists import Needs
from inception_fused.block.tolerance import gradient_names
from inception_fused.op.checking import masked_gradients
from inception_fused.op.saved import dtype_names
from inception_fused.plan.choice import BlockShape
from inception_fused.runtime import aten
from inception_fused.testing import Error, tolerance

DTYPES = [torch.float32, torch.float16, torch.bfloat16]

SMALL = InceptionConfig(24, 16, (8, 24), (8, 16), 8)
ODD = InceptionConfig(17, 13, (9, 20), (7, 11), 5)
"""No count is a multiple of 8, so nothing is aligned and every slice begins inside a byte of bits."""

REDUCE_24 = InceptionConfig(32, 32, (24, 40), (24, 16), 24)
"""24 channels are 16-byte units but no multiple of 16, as in 4b and 4c."""

SMALL_STEM, ODD_STEM = StemConfig(24, 16, 40), StemConfig(17, 9, 20)

ODD_SHAPES = {
    "7x5": (SMALL, (2, 7, 5)),
    "1x1": (SMALL, (3, 1, 1)),
    "1x9": (SMALL, (1, 1, 9)),
    "9x1": (SMALL, (1, 9, 1)),
    "2x2": (SMALL, (2, 2, 2)),
    "17 channels": (ODD, (2, 7, 5)),
    "17 channels, 1x1": (ODD, (1, 1, 1)),
    "24-channel reductions": (REDUCE_24, (1, 6, 7)),
    "more rows than a tile": (SMALL, (5, 9, 8)),
}

QUICK_SHAPES = ("7x5", "1x1", "17 channels", "24-channel reductions", "more rows than a tile")


class Block(NamedTuple):
    """Arguments of the operator: x, a weight and a bias (or none) for each convolution, relu. Of a block, or of
    GoogLeNet's stem."""

    x: Tensor
    weights: list[Tensor]
    biases: list[Tensor]
    relu: bool

    def forward(self, backend: str = "kernels", *, save: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        taps = save and chains.has_pool(self.weights)
        return torch.ops.inception_fused._forward(*self, save, save and self.relu, taps, backend)

    @property
    def shape(self) -> BlockShape:
        return BlockShape.of(self.x, self.weights)

    @property
    def needs(self) -> Needs:
        """All gradients."""
        return Needs(True, chains.each(True, self.weights), chains.each(bool(self.biases), self.weights))

    @property
    def bias_dtypes(self) -> list[str]:
        """As the operator of the backward wants them."""
        return dtype_names(b.dtype for b in self.biases)


def make_block(
    config: Config, shape: tuple[int, int, int], dtype: torch.dtype = torch.float32, *,
    device: str = "cpu", bias: bool = True, activation: str | None = "relu", branch3: int = 5, double: bool = False,
    seed: int = 0,
) -> Block:  # fmt: skip
    """config: of a block or of the stem. shape: (N, H, W). Weights as PyTorch draws them, input normal, all rounded to
    dtype.

    branch3: the side of a block's branch 3's window. double: it has two windows of 3x3 instead.
    """
    generator = torch.Generator().manual_seed(seed)
    n, h, w = shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = nn.ModuleList(convolutions(config, bias=bias, branch3=branch3, double=double))
    convs = module.to(device=device, dtype=dtype).requires_grad_(False)
    x = torch.randn((n, config.in_channels, h, w), generator=generator).to(device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    return Block(x, [c.weight for c in convs], [c.bias for c in convs] if bias else [], activation == "relu")


def in_layout(weights: list[Tensor], layout: str) -> list[Tensor]:
    """The weights in KCRS or KRSC memory, "strided" (every other element) or "transposed" (C outside K)."""
    arrange = {
        "KCRS": lambda w: w,
        "KRSC": lambda w: w.contiguous(memory_format=torch.channels_last),
        "strided": lambda w: torch.stack((w, torch.full_like(w, float("nan"))), dim=-1)[..., 0],
        "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    }[layout]
    return [arrange(w) for w in weights]


def check_kernels(block: Block, out: tuple[Tensor, Tensor, Tensor, Tensor], *, tf32: bool = False) -> None:
    """Every kernel alone: its result as :func:`check_values` has it, then taps and bits exactly."""
    y, r, bits, taps = out
    check_values(block, y, r, tf32=tf32)
    if chains.has_pool(block.weights):
        check_taps(block, taps)
    if block.relu:
        check_bits(bits, y, block.shape)


def check_taps(block: Block, taps: Tensor) -> None:
    c, rows = block.shape.c, taps.shape[0]
    _, indices = F.max_pool2d(block.x.double(), 3, stride=1, padding=1, return_indices=True)
    expected_taps = aten.taps_of_indices(indices).permute(0, 2, 3, 1).reshape(rows, c)
    unpacked = torch.stack((taps & 15, taps >> 4), dim=-1).flatten(1)
    assert torch.equal(unpacked[:, :c], expected_taps.to(torch.uint8)), "taps"
    assert not unpacked[:, c:].any(), "the unused half of the last byte of taps"


def check_values(
    block: Block, y: Tensor, r: Tensor, *, sources: Tensor | None = None, tf32: bool = False
) -> None:  # fmt: skip
    """What every kernel wrote into y and r against float64 on the very operands that it read.

    K3 and K4 are given the r that was stored, so that an error of another launch cannot hide one of theirs. sources:
    what they read where it is not r, as where BatchNorm stands between.
    """
    x, shape = block.x, block.shape
    biases = block.biases or chains.each(None, block.weights)
    images = (shape.n, shape.h, shape.w)
    inner, read = (
        [part.rows(shape.gemm_m).unflatten(0, images).permute(0, 3, 1, 2) for part in shape.r_slices(rows)]
        for rows in (r, r if sources is None else sources)
    )
    pooled = F.max_pool2d(x.double(), 3, stride=1, padding=1)
    operands = chains.from_roles([x, x, x], read, pooled)
    results = chains.from_outputs(y.split(shape.branch_channels, dim=1), inner)
    each = zip(shape.variant.names, operands, block.weights, biases, results, strict=True)
    for name, operand, w, b, result in each:
        truth = conv_truth(operand, w, b, block.relu)
        # Cut operands err to one side, which a few outputs that happen to cancel do not average out.
        size = conv_size(operand, w, b, truth, block.relu) if tf32 else None
        bound = tolerance(x.dtype, w[0].numel(), tf32=tf32)
        some = ~truth.isnan()
        assert torch.equal(~result.isnan(), some), f"{name}: NaN elsewhere than in float64"
        error = Error.of(result[some], truth[some], None if size is None else size[some])
        assert error.within(bound), f"{name}: {error}, bound {bound:.2e}"

    belongs = torch.zeros(shape.r_width, dtype=torch.bool)
    for part in shape.r_slices(r):
        belongs[part.c_offset : part.c_offset + part.channels] = True
    assert not r[:, ~belongs.to(r.device)].any(), "padding of r"


def products(block: Block) -> list[int]:
    """How many products lie one behind the other on the way to each gradient, as gradient_names() has them: between two
    of them dt, dr or dpool is stored in the dtype."""
    behind = [len(chain) - i for chain in block.shape.variant.places for i in range(len(chain))]
    return [max(behind), *behind, *behind]


def backward(block: Block, out: tuple[Tensor, ...], dy: Tensor, backend: str = "kernels") -> list[Tensor]:
    """All gradients of the operator, from what a forward gave."""
    return torch.ops.inception_fused._backward(
        dy, block.x, *out[1:], block.weights, block.bias_dtypes, block.relu, block.needs.flat, backend
    )  # fmt: skip


def check_backward(
    block: Block, out: tuple[Tensor, ...], dy: Tensor, grads: list[Tensor], *, tf32: bool = False
) -> None:
    """Every gradient alone, against float64 with the masks, r and taps of the forward, so that no mask can flip."""
    shape = block.shape
    widest = max(w[0].numel() * shape.k // w.shape[0] for w in block.weights)
    bound = tolerance(block.x.dtype, max(shape.gemm_m, widest, 1), tf32=tf32)
    each = zip(gradient_names(block.weights), products(block), grads, backward_truth(block, out, dy), strict=False)
    for name, rounded, g, truth in each:
        # Taps that lead out of every image, dead filters: exactly zero, and no part of the scale of the others.
        some = truth != 0
        assert not g[~some].any(), f"gradient of {name}: not zero where it must be"
        error, limit = Error.of(g[some], truth[some]), bound * rounded
        assert error.within(limit), f"gradient of {name}: {error}, bound {limit:.2e}"


def check_gradients(block: Block, out: tuple[Tensor, ...] | None = None, dy: Tensor | None = None) -> list[Tensor]:
    """:func:`check_backward` on what the kernels make of out and dy (drawn here by default), which is returned.

    On a GPU fp32 is TF32, and a repeat must give the same bits.
    """
    out = block.forward() if out is None else out
    dy = torch.randn_like(out[0]) if dy is None else dy
    grads = backward(block, out, dy)
    check_backward(block, out, dy, grads, tf32=dy.is_cuda and dy.dtype == torch.float32)
    if dy.is_cuda:
        again = backward(block, out, dy)
        assert all(torch.equal(a, b) for a, b in zip(grads, again, strict=True)), "a repeat differs"
    return grads


def backward_truth(block: Block, out: tuple[Tensor, ...], dy: Tensor) -> tuple[Tensor, ...]:
    """Float64 gradients by autograd of a block whose masks, r and arg-max are those of the forward's outputs."""
    call = BackwardCall(dy, block.x, Saved(*out[1:]), block.weights, (), block.relu, block.needs, "kernels")
    return tuple(g for g in masked_gradients(call, torch.float64) if g is not None)


def check_bits(bits: Tensor, y: Tensor, shape: BlockShape) -> None:
    """Each branch's bits are those of its stored y, and the unused bits of its last byte are zero."""
    at = 0
    for branch, part in zip(shape.variant.branches, y.split(shape.branch_channels, dim=1), strict=True):
        name = f"y{1 + branch}"
        passes = ~(part <= 0).permute(0, 2, 3, 1).reshape(shape.gemm_m, -1)
        width = -(-passes.shape[1] // 8)
        mine = bits[:, at : at + width]
        unpacked = torch.stack([mine >> i & 1 for i in range(8)], dim=-1).flatten(1).bool()
        assert torch.equal(unpacked[:, : passes.shape[1]], passes), f"bits of {name}"
        assert not unpacked[:, passes.shape[1] :].any(), f"padding bits of {name}"
        at += width
    assert at == bits.shape[1]


def conv_truth(x: Tensor, w: Tensor, b: Tensor | None, relu: bool) -> Tensor:
    """One convolution with "same" padding in float64."""
    y = F.conv2d(x.double(), w.double(), None if b is None else b.double(), padding=w.shape[-1] // 2)
    return F.relu(y) if relu else y


def conv_size(x: Tensor, w: Tensor, b: Tensor | None, truth: Tensor, relu: bool) -> Tensor:
    """Root of the summed squares of what each element adds up, 0 where ReLU has made it 0: its expected size."""
    bias = None if b is None else b.double().square()
    size = F.conv2d(x.double().square(), w.double().square(), bias, padding=w.shape[-1] // 2).sqrt()
    return size * (truth != 0) if relu else size
