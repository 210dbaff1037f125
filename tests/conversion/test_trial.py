"""What a forward does to gradients and statistics keeps it from being converted; the trial stays out of the caller's
process."""

from __future__ import annotations

import concurrent.futures
import functools
import logging
import sys
import threading
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from clients import C1, C2, C3, C4, CLIENTS, FLAT, BasicConv2d, C, NewD2l, OldD2l, Torchvision, d2l, images
from inception_fused import FallbackWarning, GoogLeNet, Inception, convert_, explain
from inception_fused.conversion.converted import ConvertedBlock, converted_class
from inception_fused.conversion.trial import try_block
from inception_fused.modules.structure import candidates


class DetachedPool(OldD2l):
    def forward(self, x):
        p1 = F.relu(self.p1_1(x))
        p2 = F.relu(self.p2_2(F.relu(self.p2_1(x))))
        p3 = F.relu(self.p3_2(F.relu(self.p3_1(x))))
        p4 = F.relu(self.p4_2(self.p4_1(x.detach())))
        return torch.cat((p1, p2, p3, p4), dim=1)


class FrozenBranch(OldD2l):
    def forward(self, x):
        with torch.no_grad():
            p1 = F.relu(self.p1_1(x))
        p2 = F.relu(self.p2_2(F.relu(self.p2_1(x))))
        p3 = F.relu(self.p3_2(F.relu(self.p3_1(x))))
        p4 = F.relu(self.p4_2(self.p4_1(x)))
        return torch.cat((p1, p2, p3, p4), dim=1)


class DetachedWeight(OldD2l):
    def forward(self, x):
        p1 = F.relu(F.conv2d(x, self.p1_1.weight, self.p1_1.bias.detach()))
        p2 = F.relu(self.p2_2(F.relu(self.p2_1(x))))
        p3 = F.relu(self.p3_2(F.relu(self.p3_1(x))))
        p4 = F.relu(self.p4_2(self.p4_1(x)))
        return torch.cat((p1, p2, p3, p4), dim=1)


class Halved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g / 2


def hooked(self, x, y):
    if y.requires_grad:
        y.register_hook(lambda g: g.clamp(-1, 1))
    return y


def faster_statistics(self, x, y):
    if self.training and self.branch1.bn.training:
        self.branch1.bn.running_mean.data.mul_(1.5)
    return y


GAIN = nn.Parameter(torch.ones(()))

GRADIENTS = {
    "the pool's input is detached": (lambda: DetachedPool(C, C1, C2, C3, C4), "the gradient to its input"),
    "a branch without gradients": (lambda: FrozenBranch(C, C1, C2, C3, C4), "the gradient to"),
    "a bias detached": (lambda: DetachedWeight(C, C1, C2, C3, C4), "gradient to p1_1.bias is missing"),
    "halved": (lambda: d2l(lambda _, x, y: Halved.apply(y)), "the gradient to"),
    "clamped": (lambda: d2l(hooked), "the gradient to"),
    "detached": (lambda: d2l(lambda _, x, y: y.detach()), "no gradient"),
    "detached for inference": (
        lambda: d2l(lambda _, x, y: y if x.requires_grad else y.detach()), "no gradient of an input that wants none",
    ),
    "noise where gradients are on": (
        lambda: d2l(lambda _, x, y: F.dropout(y, 0.5, torch.is_grad_enabled())), "something else",
    ),
    "another path where gradients are off": (
        lambda: d2l(lambda _, x, y: y if torch.is_grad_enabled() else 2 * y), "something else",
    ),
    "another path where x wants a gradient": (lambda: d2l(lambda _, x, y: 2 * y if x.requires_grad else y), "someth"),
    "another path where parameters want none": (
        lambda: d2l(lambda self, x, y: y if self.p1_1.weight.requires_grad else 2 * y), "with frozen parameters",
    ),
    "inference mode": (
        lambda: d2l(lambda _, x, y: 2 * y if torch.is_inference_mode_enabled() else y), "in inference mode",
    ),
    "a tensor elsewhere": (lambda: d2l(lambda _, x, y: y * GAIN), "reach a tensor that is not its own"),
    "gradients left off": (lambda: d2l(lambda _, x, y: (torch.set_grad_enabled(False), y)[1]), "leaves gradients sw"),
    "in training mode alone": (
        lambda: d2l(lambda self, x, y: y.detach() if self.training else y), "no gradient in training mode",
    ),
    "NaN": (lambda: d2l(lambda _, x, y: y.nan_to_num()), "NaN and Inf"),
    "statistics": (lambda: d2l(faster_statistics, Torchvision), "changes its branch1.bn.running_mean otherwise"),
    "batch statistics": (
        lambda: d2l(lambda self, x, y: y * 2 if self.branch1.bn.training else y, Torchvision), "in training mode",
    ),
    "a gradient with batch statistics": (
        lambda: d2l(lambda self, x, y: Halved.apply(y) if self.branch1.bn.training else y, Torchvision),
        "the gradient to its input is something else in training mode",
    ),
    "the statistics of another batch": (
        lambda: d2l(lambda self, x, y: (Torchvision.forward(self, x), y)[1], Torchvision), "otherwise than",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", GRADIENTS)
def test_what_changes_gradients_or_statistics_is_left_alone(name):
    make, words = GRADIENTS[name]
    block = make()
    with pytest.warns(FallbackWarning, match="without an Inception block") as caught:
        convert_(block)
    assert words in str(caught[0].message)
    assert not isinstance(block, ConvertedBlock)
    assert words in explain(block).rows[0].path


def test_hooks_on_all_modules_do_not_see_the_trial():
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        convert_(OldD2l(C, C1, C2, C3, C4), strict=True)
    finally:
        handle.remove()
    assert not calls


def test_the_callers_modes_do_not_see_the_trial():
    calls = []
    with FlopCounterMode(display=False) as flops, torch.autograd.graph.saved_tensors_hooks(calls.append, lambda t: t):
        convert_(OldD2l(C, C1, C2, C3, C4), strict=True)
    assert flops.get_total_flops() == 0
    assert not calls


def test_blocks_converted_in_threads():
    blocks = [OldD2l(C, C1, C2, C3, C4) for _ in range(8)]
    streams = sys.stdout, sys.stderr, logging.Logger.callHandlers
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert all(isinstance(block, ConvertedBlock) for block in pool.map(convert_, blocks))
    assert (sys.stdout, sys.stderr, logging.Logger.callHandlers) == streams


class Shared(OldD2l):
    def __deepcopy__(self, memo):
        return self


def test_a_block_that_cannot_be_copied_is_not_tried():
    block = Shared(C, C1, C2, C3, C4)
    before = [p.detach().clone() for p in block.parameters()]
    with pytest.warns(FallbackWarning, match="shares modules or memory"):
        convert_(block)
    assert all(map(torch.equal, block.parameters(), before))


def test_honest_classes_are_converted():
    class Honest(OldD2l):
        Shape = tuple[int, int]
        lock = threading.Lock()

        def __init__(self):
            super().__init__(C, C1, C2, C3, C4)
            self.act, self.cat = functools.partial(F.relu, inplace=True), functools.partial(torch.cat, dim=1)
            self.width = np.int64(C1)

        def forward(self, x):
            p2, p3 = self.act(self.p2_1(x)), self.act(self.p3_1(x))
            parts = (self.p1_1(x), self.p2_2(p2), self.p3_2(p3), self.p4_2(self.p4_1(x)))
            return self.cat([self.act(part) for part in parts])

    assert isinstance(convert_(Honest(), strict=True), ConvertedBlock)


@pytest.mark.parametrize("name", CLIENTS)
def test_the_clients_are_converted_in_every_mode(name):
    for training in (False, True):
        assert isinstance(convert_(CLIENTS[name]().train(training), strict=True), ConvertedBlock)


class Biased(BasicConv2d):
    """A bias before BatchNorm, whose gradient is 0 with batch statistics."""

    def __init__(self, in_channels, out_channels, **kwargs):
        super().__init__(in_channels, out_channels, **kwargs)
        self.conv = nn.Conv2d(in_channels, out_channels, **kwargs)


def test_a_bias_before_batch_norm():
    assert isinstance(convert_(Torchvision(*FLAT, conv_block=Biased), strict=True), ConvertedBlock)


def test_functions_that_were_patched_before(monkeypatch):
    monkeypatch.setattr(F, "relu", F.leaky_relu)
    with pytest.warns(FallbackWarning, match="has LeakyReLU in place of ReLU"):
        convert_(OldD2l(C, C1, C2, C3, C4))


def test_momentum_and_counting_of_batch_norm_are_followed():
    block = Torchvision(*FLAT)
    for index, norm in enumerate(m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = None if index % 2 else 0.3
    assert isinstance(convert_(block, strict=True), ConvertedBlock)


def test_a_lazy_block_with_an_effect_is_refused_after_its_first_input():
    class Kept(NewD2l):
        def forward(self, x):
            self.last = super().forward(x)
            return self.last

    block = convert_(Kept(C1, C2, C3, C4))
    y = block(images())
    assert block.last is y
    assert "its last is or holds a Tensor, which may change unseen" in explain(block).rows[0].path
    assert block(images()) is block.last


def test_the_copy_is_tried_not_the_block():
    block = OldD2l(C, C1, C2, C3, C4)
    versions = [p._version for p in block.parameters()]
    block.p1_1.weight.grad = torch.ones_like(block.p1_1.weight)
    convert_(block)
    assert [p._version for p in block.parameters()] == versions
    assert torch.equal(block.p1_1.weight.grad, torch.ones_like(block.p1_1.weight))


def test_nine_blocks_are_tried_within_two_seconds():
    """In the processor's time of one thread, which other work on the machine does not change."""
    model = GoogLeNet(block=Inception)
    model(torch.zeros(1, 1, 32, 32))
    start = time.thread_time()
    for _, module, proposal in candidates(model):
        assert try_block(module, type(module), proposal.roles, converted_class) == ("relu", "")
    assert time.thread_time() - start < 4


def test_a_converted_model_is_tried_anew_where_it_has_changed():
    model = nn.Sequential(OldD2l(C, C1, C2, C3, C4))
    convert_(model)
    model[0].name = "3a"
    assert "its name is '3a', was not there; convert_ tries it anew" in explain(model).rows[0].path
    convert_(model)
    assert "its name" not in explain(model).rows[0].path
    model[0].p1_1 = nn.Conv2d(C, C1, 1, padding_mode="reflect")
    with pytest.warns(FallbackWarning, match="p1_1 pads with"):
        convert_(model)
    assert type(model[0]) is OldD2l
