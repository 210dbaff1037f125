"""What a forward does beside its output's values keeps it from being converted: gradients, and effects, which the trial
does not leave behind."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import random
import time
import types
import warnings
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from clients import C1, C2, C3, C4, CLIENTS, FLAT, C, NewD2l, OldD2l, Torchvision, images
from torch import nn

from inception_fused import FallbackWarning, GoogLeNet, Inception, convert_, explain
from inception_fused.adapter import ConvertedBlock
from inception_fused.structure import candidates
from inception_fused.trial import try_block


def d2l(forward, base=OldD2l, *sizes):
    """A class whose forward is ``forward(self, x, y)``, y being the base's; an instance of it."""

    class Client(base):
        def forward(self, x):
            return forward(self, x, super().forward(x))

    return Client(*(sizes or (FLAT if base is Torchvision else (C, C1, C2, C3, C4))))


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
        lambda: d2l(lambda self, x, y: (super(type(self), self).forward(x), y)[1], Torchvision), "otherwise than",
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


@dataclasses.dataclass
class Meter:
    total: float = 0.0


SEEN, COUNTS, ORDER, LATEST, METER = [], {"y": 0}, collections.deque([1]), torch.zeros(3), Meter()
ARRAY, TICKS, NESTED, CALLS = np.zeros(3), itertools.count(5), {"a": {"b": [1]}}, 0
LIBRARY = types.ModuleType("library")
LIBRARY.calls, LIBRARY.log = 0, []
OWNER = types.SimpleNamespace(seen=[])
OWNER_REF = weakref.ref(Meter)
LOGGER = logging.getLogger("clients")
STATE = (SEEN, COUNTS, ORDER, LATEST, METER, ARRAY, TICKS, NESTED, CALLS, LIBRARY.calls, LIBRARY.log, OWNER)


def once(effect):
    """A forward that has an effect and gives y."""

    def forward(self, x, y):
        effect(self, y)
        return y

    return forward


def count_calls(self, y):
    global CALLS
    CALLS += 1


def new_global(self, y):
    global LAST_SHAPE
    LAST_SHAPE = tuple(y.shape)


def helper(y):
    NESTED["a"]["b"].append(y.mean().item())


def library(self, y):
    LIBRARY.calls += 1


def with_default(self, y, seen=[]):  # noqa: B006  the effect
    seen.append(y.shape)


class Registry:
    shapes: ClassVar[list] = []
    calls = 0

    @classmethod
    def add(cls, y):
        cls.calls += 1
        cls.shapes.append(y.shape)


def captured():
    calls = []
    return d2l(once(lambda self, y: calls.append(1)))


class Counted(OldD2l):
    calls = 0

    def forward(self, x):
        type(self).calls += 1
        return super().forward(x)


def property_of(self, y):
    self.last = y


EFFECTS = {
    "a list of the block": lambda: with_attribute("features", [], lambda self, y: self.features.append(y)),
    "a dictionary of the block": lambda: with_attribute("cache", {}, lambda self, y: self.cache.update(y=y)),
    "a hidden count": lambda: with_attribute("_calls", 0, lambda self, y: setattr(self, "_calls", self._calls + 1)),
    "a feature": lambda: d2l(once(lambda self, y: setattr(self, "feature", y.detach()))),
    "an attribute of a layer": lambda: d2l(once(lambda self, y: setattr(self.p1_1, "calls", 1))),
    "a list in a tuple": lambda: with_attribute("parts", ([], 1), lambda self, y: self.parts[0].append(y.mean())),
    "a global list": lambda: d2l(once(lambda self, y: SEEN.append(y))),
    "a global dictionary": lambda: d2l(once(lambda self, y: COUNTS.update(y=COUNTS["y"] + 1))),
    "a global deque": lambda: d2l(once(lambda self, y: ORDER.append(2))),
    "a global tensor": lambda: d2l(once(lambda self, y: LATEST.add_(1))),
    "an object": lambda: d2l(once(lambda self, y: setattr(METER, "total", METER.total + 1))),
    "an array": lambda: d2l(once(lambda self, y: ARRAY.__iadd__(1))),
    "an iterator": lambda: d2l(once(lambda self, y: next(TICKS))),
    "through a helper, deeply": lambda: d2l(once(lambda self, y: helper(y))),
    "a global number": lambda: d2l(once(count_calls)),
    "a new global": lambda: d2l(once(new_global)),
    "another module": lambda: d2l(once(library)),
    "a list of another module": lambda: d2l(once(lambda self, y: LIBRARY.log.append(1))),
    "a namespace": lambda: d2l(once(lambda self, y: OWNER.seen.append(1))),
    "a default argument": lambda: d2l(once(with_default)),
    "a class's method": lambda: d2l(once(lambda self, y: Registry.add(y))),
    "its own class": lambda: Counted(C, C1, C2, C3, C4),
    "a closure": captured,
    "a function's attribute": lambda: d2l(once(lambda self, y: helper.__dict__.update(calls=1))),
    "print": lambda: d2l(once(lambda self, y: print(y.shape))),
    "a log": lambda: d2l(once(lambda self, y: LOGGER.warning("%s", y.shape))),
    "a warning": lambda: d2l(once(lambda self, y: warnings.warn("slow", stacklevel=1))),
    "Python's random numbers": lambda: d2l(once(lambda self, y: random.random())),
    "NumPy's random numbers": lambda: d2l(once(lambda self, y: np.random.rand())),
    "a gradient's hook": lambda: d2l(
        once(lambda self, y: y.register_hook(lambda g: SEEN.append(g)) if y.requires_grad else None)
    ),
    "a parameter": lambda: d2l(once(lambda self, y: self.p1_1.weight.data.clamp_(-0.01, 0.01))),
    "training modes": lambda: d2l(once(lambda self, y: self.p1_1.train(not self.p1_1.training))),
    "frozen weights": lambda: d2l(once(lambda self, y: self.p1_1.requires_grad_(False))),
    "a switch": lambda: d2l(once(lambda self, y: torch.set_default_dtype(torch.float64))),
}


def with_attribute(name, value, effect):
    block = d2l(once(effect))
    setattr(block, name, value)
    return block


def described():
    """Everything that a trial could leave behind, as text."""
    return repr([
        [str(state) for state in STATE], CALLS, LIBRARY.calls, LIBRARY.log, "LAST_SHAPE" in globals(),
        with_default.__defaults__, Registry.shapes, Registry.calls, Counted.calls, helper.__dict__, random.getstate(),
        np.random.get_state()[1].tolist(), torch.get_rng_state().tolist(), torch.get_default_dtype(),
    ])  # fmt: skip


@pytest.mark.parametrize("name", EFFECTS)
def test_an_effect_keeps_a_block_from_being_converted_and_stays_out(name, capsys, caplog):
    block = EFFECTS[name]()
    kind, own, before = type(block), repr({m: m.__dict__ for m in block.modules()}), described()
    with pytest.warns(FallbackWarning) as caught:
        convert_(block)
    assert type(block) is kind
    assert [item.category for item in caught] == [FallbackWarning]
    assert described() == before
    assert repr({m: m.__dict__ for m in block.modules()}) == own
    assert capsys.readouterr() == ("", "")
    assert not caplog.records
    captured = [cell.cell_contents for cell in kind.forward.__closure__ if isinstance(cell.cell_contents, list)]
    assert captured in ([], [[]])
    # And the effect is there as ever.
    dtype = torch.get_default_dtype()
    block.train()(images().requires_grad_())
    torch.set_default_dtype(dtype)


def test_what_names_too_much_is_left_alone():
    large = list(range(20_000))
    block = d2l(lambda self, x, y: y if large else x)
    with pytest.warns(FallbackWarning, match="names more than 10000 objects"):
        convert_(block)


def test_hooks_on_all_modules_do_not_see_the_trial():
    calls = []
    handle = nn.modules.module.register_module_forward_hook(lambda *_: calls.append(1))
    try:
        convert_(OldD2l(C, C1, C2, C3, C4), strict=True)
    finally:
        handle.remove()
    assert not calls


@pytest.mark.parametrize("name", CLIENTS)
def test_the_clients_are_converted_in_every_mode(name):
    for training in (False, True):
        assert isinstance(convert_(CLIENTS[name]().train(training), strict=True), ConvertedBlock)


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
        assert try_block(module, type(module), proposal.roles) == ("relu", "")
    assert time.thread_time() - start < 4


def test_a_converted_model_is_tried_anew_where_it_has_changed():
    model = nn.Sequential(OldD2l(C, C1, C2, C3, C4))
    convert_(model)
    model[0].name = "3a"
    assert "its name is '3a', was not there; convert_ tries it anew" in explain(model).rows[0].path
    convert_(model)
    assert "its name" not in explain(model).rows[0].path
    model[0].p1_1 = nn.Conv2d(C, C1, 1, padding_mode="reflect")
    with pytest.warns(FallbackWarning, match="p1_1 is configured as"):
        convert_(model)
    assert type(model[0]) is OldD2l
