"""A converted block whose BatchNorm trains, beside the original: outputs, gradients and every buffer, step by step.

On a CPU, where "auto" is PyTorch's own layers, ``twins`` lets it take the ATen twins of the kernels, in float64, so
that no rounding can flip a mask."""

from __future__ import annotations

import copy

import pytest
import torch

from clients import FLAT
from inception_fused import revert_
from marks import more, quick
from training_blocks import BLOCKS, assert_alike, assert_near, descend, image, layers, pair, step


@pytest.mark.parametrize("name", BLOCKS)
def test_steps(name, twins):
    """Three steps of descent, a call in eval between them, and the state dict after them."""
    fused, plain = pair(name)
    # Without running statistics a call in eval takes the batch's.
    in_eval = "untracked" in name
    for i in range(3):
        assert_alike(*(step(block, image(i)) for block in (fused, plain)))
        for block in (fused, plain):
            descend(block)
        assert len(twins) == 1 + i + (in_eval and i > 1)
        if i == 1:
            assert_alike(*(step(block.eval(), image(9)) for block in (fused, plain)))
            assert len(twins) == 2 + in_eval
            fused.train(), plain.train()
    assert list(fused.state_dict()) == list(plain.state_dict())
    revert_(fused)
    assert_alike(*(step(block.train(), image(5)) for block in (fused, plain)))


def _momenta(block):
    for norm, momentum in zip(layers(block), (0.3, None, 0.0, 1.0, torch.tensor(0.01), 1), strict=False):
        norm.momentum = momentum


def _eps(block):
    for i, norm in enumerate(layers(block)):
        norm.eps = (0.5, 1, 1e-12)[i % 3]


def _untracked(block):
    """Of two: one that has other attributes than at its conversion is left to PyTorch's layers."""
    for norm in layers(block)[:2]:
        norm.track_running_stats = False


def _dropped(block):
    """In eval too theirs are then those of the batch."""
    for norm in layers(block)[1:4]:
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    layers(block)[2].eval()


def _uncounted(block):
    for norm, momentum in zip(layers(block)[:2], (None, 0.3), strict=True):
        norm.num_batches_tracked, norm.momentum = None, momentum


def _frozen(block):
    for norm in layers(block)[::2]:
        norm.eval()


def _frozen_parameters(block):
    _frozen(block)
    for norm in layers(block)[::2]:
        norm.requires_grad_(False)


def _no_affine(block):
    layers(block)[1].bias = None
    layers(block)[2].weight = None


CHANGES = {
    "momenta": _momenta, "eps": _eps, "not tracked": _untracked, "frozen layers": _frozen, "dropped": _dropped,
    "uncounted": _uncounted,
    "frozen with their parameters": _frozen_parameters, "a vector less": _no_affine,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", quick(["cifar", "5x5"], "cifar"))
def test_what_changes_between_calls(change, name, twins):
    fused, plain = pair(name)
    for i in range(3):
        if i == 1:
            for block in (fused, plain):
                CHANGES[change](block)
        assert_alike(*(step(block, image(i)) for block in (fused, plain)))
    assert len(twins) == (1 if change == "not tracked" else 3)


SUBSETS = {
    "x alone": ("",), "gammas": (".bn.weight",), "betas of branch 2": ("branch2.0.bn.bias", "branch2.1.bn.bias"),
    "a weight": ("branch3.0.conv.weight",), "the last weights": ("branch3.1.conv", "branch4.1.conv", "branch1.conv"),
}  # fmt: skip


@pytest.mark.parametrize("wants_x", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_some_gradients(subset, wants_x, twins):
    fused, plain = pair("torchvision")
    for block in (fused, plain):
        for name, p in block.named_parameters():
            p.requires_grad_(any(part and part in name for part in SUBSETS[subset]))
    assert_alike(*(step(block, image(), wants_x=wants_x) for block in (fused, plain)))
    assert len(twins) == 1


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_statistics_move_without_gradients_too(grad, twins):
    fused, plain = pair("cifar")
    for i in range(2):
        with grad():
            ys = [block(image(i)) for block in (fused, plain)]
        torch.testing.assert_close(*(y.clone() for y in ys), rtol=1e-9, atol=1e-9)
    assert_alike(*(step(block, image()) for block in (fused, plain)))
    assert len(twins) == 3


def test_batches_of_one_value_and_of_none(twins):
    """PyTorch's own words, statistics and all."""
    fused, plain = pair("torchvision")
    for shape in ((1, FLAT[0], 1, 1), (0, FLAT[0], 3, 3)):
        found = []
        for block in (fused, plain):
            try:
                found.append(tuple(block(torch.ones(shape, dtype=torch.float64)).shape))
            except ValueError as error:
                found.append(str(error))
        assert found[0] == found[1]
    assert "more than 1 value per channel" in found[0] or found[0][0] == 0
    assert not twins
    for (name, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name
    one = torch.randn(1, FLAT[0], 1, 2, dtype=torch.float64)
    assert_alike(*(step(block, one) for block in pair("torchvision")), 1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, more(torch.float16)], ids=str)
@pytest.mark.parametrize("name", quick(BLOCKS, "torchvision"))
def test_fewer_bits(name, dtype, twins):
    """A model in them, buffers too."""
    fused, plain = pair(name)
    exact = copy.deepcopy(plain)
    fused, plain = fused.to(dtype), plain.to(dtype)
    exact.load_state_dict(plain.state_dict())
    for i in range(2):
        x = image(i).to(dtype)
        assert_near(step(fused, x), step(plain, x), step(exact, x.double()), dtype)
        assert len(twins) == 1 + i


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_scaler(dtype, twins):
    """Of fp32 parameters, whose gradients and statistics stay that; the step of an infinite loss is left out."""
    fused, plain = pair("cifar", torch.float32)
    exact = copy.deepcopy(plain).double()
    x, found = image(dtype=torch.float32), []
    for block in (fused, plain):
        with torch.autocast("cpu", dtype=dtype):
            found.append(step(block, x))
    assert twins == [(x.shape, dtype)]
    assert_near(*found, step(exact, x.double()), dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    before = [p.detach().clone() for p in fused.parameters()]
    for factor, moves in ((1e8, False), (1e-3, True)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = (fused(x).float() * factor).square().sum()
        scaler.scale(loss if moves else loss * 1e30).backward()
        scaler.step(optimizer)
        scaler.update()
        assert moves != all(map(torch.equal, fused.parameters(), before))
