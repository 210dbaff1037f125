"""Blocks whose BatchNorm trains, a step of theirs, and how two of them are compared."""

from __future__ import annotations

import torch
from torch import nn

from cifar_models import ALIGNED, CLIENTS
from clients import FLAT, Torchvision, drawn
from inception_fused import convert
from inception_fused.testing import Error, tolerance


class FiveByFive(nn.Module):
    """GoogLeNet's sizes of windows, with biases. bare: places of the convolutions without BatchNorm."""

    def __init__(self, c, c1, c2r, c2, c3r, c3, c4, bare=(), **options):
        super().__init__()
        sizes = ((c, c1, 1), (c, c2r, 1), (c2r, c2, 3), (c, c3r, 1), (c3r, c3, 5), (c, c4, 1))

        def conv(i):
            c, k, side = sizes[i]
            norm = [] if i in bare else [nn.BatchNorm2d(k, **options)]
            return [nn.Conv2d(c, k, side, padding=side // 2), *norm, nn.ReLU()]

        self.first = nn.Sequential(*conv(0))
        self.second = nn.Sequential(*conv(1), *conv(2))
        self.third = nn.Sequential(*conv(3), *conv(4))
        self.fourth = nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv(5))

    def forward(self, x):
        return torch.cat((self.first(x), self.second(x), self.third(x), self.fourth(x)), 1)


BLOCKS = {
    "torchvision": lambda: Torchvision(*FLAT),
    "cifar": lambda: CLIENTS["kuangliu"].block(*ALIGNED),
    "5x5": lambda: FiveByFive(*FLAT),
    "5x5, some bare": lambda: FiveByFive(*FLAT, bare=(1, 4)),
    "5x5, not affine": lambda: FiveByFive(*FLAT, affine=False),
    "5x5, momentum None": lambda: FiveByFive(*FLAT, momentum=None),
    "5x5, untracked": lambda: FiveByFive(*FLAT, track_running_stats=False),
}


def tracked(block):
    """With statistics and vectors that are no identity, where it has some."""
    for norm in layers(block):
        if norm.affine:
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, std=0.3)
    return drawn(block)


def layers(block):
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def pair(name="5x5", dtype=torch.float64):
    """(converted, original), in training."""
    torch.manual_seed(7)
    plain = tracked(BLOCKS[name]()).to(dtype)
    return convert(plain, strict=True), plain


def image(seed=0, n=3, dtype=torch.float64):
    return torch.randn((n, FLAT[0], 5, 4), generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(block, x, run=None, wants_x=True):
    """y, the gradients, and every buffer after it."""
    x = x.detach().clone().requires_grad_(wants_x)
    y = (block if run is None else run)(x)
    block.zero_grad(set_to_none=True)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    found = {"y": y.detach(), "d x": x.grad}
    found |= {f"d {name}": p.grad for name, p in block.named_parameters()}
    return found | {name: b.clone() for name, b in block.named_buffers()}


def assert_alike(ours, theirs, bound=1e-9):
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert (ours[name] is None) == (t is None), name
        if t is not None:
            assert (ours[name].dtype, ours[name].shape) == (t.dtype, t.shape), name
            # The gradient of a bias before a mean is 0, or what rounding leaves of it.
            torch.testing.assert_close(ours[name], t, rtol=bound, atol=bound, msg=lambda text, at=name: f"{at}: {text}")


def descend(block, rate=0.01):
    with torch.no_grad():
        for p in block.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=rate)


def assert_near(ours, theirs, truth, dtype):
    """As near to float64 as PyTorch's own layers are. In a gradient some masks that rounding flips may be more."""
    for key, t in truth.items():
        assert (ours[key].dtype, ours[key].stride()) == (theirs[key].dtype, theirs[key].stride()) or key in ("y", "d x")
        if t.double().abs().max() < 1e-9:
            # Of a bias before a mean.
            continue
        errors = [Error.of(found[key], t).rms for found in (ours, theirs)]
        flips = (0.25 if dtype.itemsize == 2 else 1e-3) if key.startswith("d ") else 0
        assert errors[0] <= 3 * errors[1] + 2 * tolerance(dtype, 60) + flips, (key, errors)
