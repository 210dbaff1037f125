"""What convert leaves alone and how explain says it; what a converted block makes of later changes."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clients import C1, C2, C3, C4, FLAT, BasicConv2d, C, OldD2l, Torchvision, drawn, images
from inception_fused import (
    FallbackWarning,
    InceptionInputError,
    KernelError,
    backend,
    convert,
    convert_,
    explain,
    revert_,
)


class Variant(OldD2l):
    """old d2l's with something else in its forward."""

    def __init__(self, forward=None):
        super().__init__(C, C1, C2, C3, C4)
        self.other = forward

    def forward(self, x):
        return self.other(super().forward(x), self) if self.other else super().forward(x)


FORWARDS = {
    "another order": lambda y, _: y.flip(1),
    "a residual": lambda y, _: y + 1e-2,
    "a clamp": lambda y, _: y.clamp(max=1.0),
    "a list": lambda y, _: [y],
    "fewer channels": lambda y, _: y[:, 1:],
    "dropout in training": lambda y, block: F.dropout(y, 0.5, block.training),
    "leaky": lambda y, _: F.leaky_relu(y - 0.1),
}


@pytest.mark.parametrize("name", FORWARDS)
def test_a_block_that_computes_something_else_is_left_alone_and_explained(name):
    model = nn.Sequential(OldD2l(C, C1, C2, C3, C4), Variant(FORWARDS[name]))
    kinds = [type(m) for m in model]
    convert_(model)
    assert isinstance(model[0], kinds[0])
    assert type(model[0]) is not kinds[0]
    assert type(model[1]) is kinds[1]
    converted, left = explain(model).rows
    assert (converted.state, left.state) == ("converted", "not converted")
    assert any(words in left.path for words in ("something else", "returns a list", "its forward gives"))


def test_equal_weights_do_not_blind_the_probe():
    """Zeros everywhere, as some initialise the last convolution: every forward then computes the same."""
    block = Variant(lambda y, _: y.flip(1))
    for p in block.parameters():
        nn.init.zeros_(p)
    with pytest.warns(FallbackWarning, match="something else"):
        convert_(block)
    assert type(block) is Variant
    assert all(not p.any() for p in block.parameters())


def replaced(key, layer):
    block = OldD2l(C, C1, C2, C3, C4)
    setattr(block, key, layer)
    return block


class LoRA(nn.Conv2d):
    pass


NEAR = {
    "stride": (lambda: replaced("p2_2", nn.Conv2d(8, 24, 3, padding=1, stride=2)), "p2_2 has stride (2, 2); a"),
    "no padding": (lambda: replaced("p3_2", nn.Conv2d(8, 16, 5)), "p3_2 has padding (0, 0), wants (2, 2)"),
    "groups": (lambda: replaced("p2_2", nn.Conv2d(8, 24, 3, padding=1, groups=8)), "p2_2 has 8 groups; a"),
    "border": (lambda: replaced("p2_2", nn.Conv2d(8, 24, 3, padding=1, padding_mode="reflect")), "p2_2 pads with"),
    "7x7": (lambda: replaced("p3_2", nn.Conv2d(8, 16, 7, padding=3)), "p3_2 has a kernel (7, 7), wants 3x3 or 5x5"),
    "subclass": (lambda: replaced("p1_1", LoRA(C, C1, 1)), "p1_1 is a LoRA, not a Conv2d"),
    "average": (lambda: replaced("p4_1", nn.AvgPool2d(3, 1, 1)), "p4_1 is an AvgPool2d; a branch with an average"),
    "wide pool": (lambda: replaced("p4_1", nn.MaxPool2d(5, 1, 2)), "wants a MaxPool2d of 3x3"),
    "activation": (lambda: replaced("p4_1", nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.SiLU())), "p4_1.1 is a SiLU; of"),
    "1x7": (
        lambda: replaced("p2_2", nn.Conv2d(8, 24, (1, 7), padding=(0, 3))),
        "p2_2 has a kernel (1, 7); a factorised convolution, as in Inception v3 and v4, is not supported",
    ),
    "1-D": (lambda: replaced("p2_2", nn.Conv1d(8, 24, 3)), "p2_2 is a Conv1d; wants layers of images, Conv2d and"),
    "five": (
        lambda: replaced("p3_1", nn.Identity()),
        "it has 5 convolutions: p1_1 1x1, p2_1 1x1, p2_2 3x3, p3_2 5x5, p4_2 1x1; these are the",
    ),
    "two pools": (
        lambda: replaced("p1_1", nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(C, C1, 1))),
        "it has 2 max-pools: p1_1.0 3x3, p4_1 3x3; wants one",
    ),
    "channels": (lambda: replaced("p2_2", nn.Conv2d(9, 24, 3, padding=1)), "p2_2 takes 9 channels, wants 8"),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR)
def test_what_nearly_is_a_block_is_named_with_the_reason(name):
    make, words = NEAR[name]
    model = nn.Sequential(make())
    with pytest.warns(FallbackWarning, match="without an Inception block"):
        convert_(model)
    (row,) = explain(model).rows
    assert (row.name, row.state) == ("0", "not converted")
    assert words in row.path
    with pytest.raises(InceptionInputError, match="model: got Sequential without an Inception block"):
        convert(model, strict=True)


def test_hooks_and_own_parameters_keep_a_block_from_being_converted():
    hooked, own, patched = (OldD2l(C, C1, C2, C3, C4) for _ in range(3))
    hooked.p2_1.register_forward_hook(lambda *_: None)
    own.scale = nn.Parameter(torch.ones(1))
    patched.forward = lambda x: x
    reasons = [explain(block).rows[0].path for block in (hooked, own, patched)]
    assert [words in reason for words, reason in zip(("p2_1 has a hook", "scale", "own"), reasons, strict=True)] == [
        True
    ] * 3


def test_nothing_to_convert():
    with pytest.warns(FallbackWarning, match="nothing in it looks like one"):
        convert_(nn.Linear(3, 3))
    with pytest.raises(InceptionInputError, match="model: got int, wants an nn.Module"):
        convert_(3)
    assert str(explain(nn.Linear(3, 3))) == "nothing in this model looks like an Inception block"


CHANGES = {
    "a layer replaced": lambda b: setattr(b.branch2, "1", BasicConv2d(8, 24, kernel_size=3, padding=1)),
    "a layer wrapped": lambda b: setattr(b.branch1, "conv", nn.Sequential(b.branch1.conv)),
    "a hook": lambda b: b.branch2.register_forward_hook(lambda m, a, y: 2 * y),
    "dilation": lambda b: b.branch2[1].conv.__dict__.update(dilation=(2, 2), padding=(2, 2)),
    "a layer more": lambda b: b.branch3.append(nn.Identity()),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_changes_later_is_honoured(name):
    block = convert_(drawn(Torchvision(*FLAT)).eval())
    CHANGES[name](block)
    twin, x = copy.deepcopy(block), images()
    assert "eager" in explain(block).rows[0].path
    y = block(x)
    torch.testing.assert_close(y, revert_(twin)(x), rtol=1e-5, atol=1e-5)
    buffers = zip(block.buffers(), twin.buffers(), strict=True)
    assert all(torch.allclose(a, b) for a, b in buffers)
    with backend("kernels"), pytest.raises(KernelError, match="demands kernels that cannot run"):
        block(x)


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on a GPU, where a user could have expected kernels."""

    is_cuda = True


class Lora(nn.Conv2d):
    """Somebody's layer: the frozen convolution and a small one beside it."""

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, bias=False)
        self.weight = conv.weight
        self.down = nn.Conv2d(conv.in_channels, 2, 1, bias=False)
        self.up = nn.Conv2d(2, conv.out_channels, 1, bias=False)

    def forward(self, x):
        return super().forward(x) + self.up(self.down(x))


class Quantised(nn.Conv2d):
    """Somebody's layer: weights on 255 levels."""

    def __init__(self, conv):
        super().__init__(conv.in_channels, conv.out_channels, conv.kernel_size, padding=conv.padding, bias=False)
        self.weight = conv.weight

    def forward(self, x):
        step = self.weight.abs().amax() / 127
        return self._conv_forward(x, (self.weight / step).round() * step, None)


EAGER_LATER = {
    "SyncBatchNorm": (nn.SyncBatchNorm.convert_sync_batchnorm, "branch1.bn is a SyncBatchNorm"),
    "a hook": (lambda b: b.branch1.conv.register_forward_hook(lambda *_: None), "branch1.conv has a hook"),
    "LoRA": (lambda b: setattr(b.branch1, "conv", Lora(b.branch1.conv)), "branch1.conv is a Lora, not a Conv2d"),
    "quantised": (
        lambda b: setattr(b.branch3[0], "conv", Quantised(b.branch3[0].conv)),
        "branch3.0.conv is a Q",
    ),
    "other padding": (
        lambda b: setattr(b.branch2[1].conv, "padding_mode", "reflect"),
        "branch2.1.conv is config",
    ),
}


@pytest.mark.parametrize("name", EAGER_LATER)
def test_one_warning_says_why_a_block_runs_in_eager(name):
    change, words = EAGER_LATER[name]
    block = convert_(drawn(Torchvision(*FLAT)).eval())
    change(block)
    twin, x = revert_(copy.deepcopy(block)), images()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        ys = [block(x.as_subclass(OnCuda)) for _ in range(3)]
    assert [item.category for item in caught] == [FallbackWarning] * (words is not None)
    if words is not None:
        assert f"the Inception block runs in eager PyTorch: {words}" in str(caught[0].message)
    for y in ys:
        torch.testing.assert_close(y.as_subclass(torch.Tensor), twin(x), rtol=1e-5, atol=1e-5)
