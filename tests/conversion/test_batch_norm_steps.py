"""Small networks with BatchNorm trained by interpreted kernels: as far from float64 as eager is, and no farther."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases.networks import BatchNormConv, BatchNormInception
from inception_fused import backend, convert_
from inception_fused.block.tolerance import UNIT_ROUNDOFF
from inception_fused.runtime.submit import count
from marks import more
from training.networks import NormedInception

STEPS = 10
SIZES = (12, 8, (8, 16), (8, 8), 8)
"""A block of 12 channels that gives 40."""

ROUNDING = 64 * UNIT_ROUNDOFF[torch.float32]
"""What ten steps may add where eager happens to be exact: some roundings a step, as many as eager's own largest."""


class FiveByFive(BatchNormInception):
    """The usual block with BatchNorm behind each convolution."""

    def third(self, in_channels: int, reduced: int, outputs: int) -> nn.Module:
        return nn.Sequential(BatchNormConv(in_channels, reduced, 1), BatchNormConv(reduced, outputs, 5))


BLOCKS = {"torchvision": BatchNormInception, "cifar": NormedInception, "5x5": FiveByFive}


def network(name: str, *, frozen: bool = False) -> nn.Module:
    """One block between a convolution and a classifier, in training; frozen: one of its BatchNorms stays in eval."""
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU()),
        *(BLOCKS[name](*SIZES), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 5)),
    ).to(memory_format=torch.channels_last)
    if frozen:
        norm = next(m for m in net[3].modules() if isinstance(m, nn.BatchNorm2d))
        norm.eval()
        norm.running_mean.normal_(std=0.1)
    return net


def train(net: nn.Module, wish: str) -> dict[str, Tensor]:
    """The loss of every step, and every parameter and buffer after the last."""
    dtype = net[0].weight.dtype
    optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
    generator, losses = torch.Generator().manual_seed(1), []
    for _ in range(STEPS):
        x = torch.randn((4, 3, 5, 6), generator=generator).to(dtype)
        labels = torch.randint(5, (4,), generator=generator)
        with backend(wish):
            loss = F.cross_entropy(net(x), labels)
            optimizer.zero_grad()
            loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)} | net.state_dict()


def distance(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm().clamp(min=1e-12)).item()


@pytest.mark.parametrize(("name", "frozen"), [*((name, False) for name in BLOCKS), more("torchvision", True)])
def test_ten_steps_stay_as_near_to_float64_as_eagers(name, frozen):
    plain = network(name, frozen=frozen)
    fused, exact = convert_(copy.deepcopy(plain), strict=True), copy.deepcopy(plain).double()
    with count() as launches:
        ours = train(fused, "kernels")
    assert len(launches) >= STEPS * (8 + 15), "forward and backward"
    eager, truth = train(plain, "eager"), train(exact, "eager")
    for key, value in truth.items():
        assert ours[key].dtype == eager[key].dtype
        if not value.is_floating_point():
            assert torch.equal(ours[key], value), key
            continue
        near = distance(eager[key], value.double())
        assert distance(ours[key], value.double()) <= 2 * near + ROUNDING, (key, near)
    assert ours["losses"][-1] != ours["losses"][0]


@pytest.mark.parametrize("twice", [False, True], ids=["first order", "second order"])
def test_gradients_of_a_block_of_which_one_branch_is_frozen(twice):
    """Its biases want no gradient: that of a frozen BatchNorm's gamma reads the bias before it."""
    torch.manual_seed(0)
    plain = NormedInception(*SIZES)
    plain(torch.randn(4, 12, 5, 6) + 1)
    plain.three.eval()
    for conv in (m for m in plain.modules() if isinstance(m, nn.Conv2d)):
        conv.bias.requires_grad_(False)
    fused, x = convert_(copy.deepcopy(plain), strict=True), torch.randn(2, 12, 5, 6)

    def gradients(block: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        wanted = [x.requires_grad_(), *(p for p in block.parameters() if p.requires_grad)]
        y = block(x)
        first = torch.autograd.grad(y.square().mean(), wanted, create_graph=twice)
        if not twice:
            return first
        return torch.autograd.grad(sum(g.square().mean() for g in first), wanted)

    with backend("kernels"):
        ours = gradients(fused, x.clone())
    for found, truth in zip(ours, gradients(copy.deepcopy(plain).double(), x.double()), strict=True):
        assert distance(found, truth) < 1e-4
