"""An effect of a forward keeps it from being converted, and the trial does not leave it behind."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import logging
import random
import types
import warnings
import weakref
from typing import ClassVar

import numpy as np
import pytest
import torch

from clients import C1, C2, C3, C4, C, OldD2l, d2l, images
from inception_fused import FallbackWarning, convert_


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
GENERATOR, RANDOM = torch.Generator(), np.random.default_rng(0)
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


class Logged(OldD2l):
    """A forward whose base has the effect, behind super()."""

    def forward(self, x):
        SEEN.append(1)
        return super().forward(x)


class Beyond(Logged):
    def forward(self, x):
        return super().forward(x)


@contextlib.contextmanager
def timed(name):
    yield
    SEEN.append(name)


class Timer:
    def __enter__(self):
        pass

    def __exit__(self, *error):
        SEEN.append(1)


class Tracker:
    def log(self, y):
        SEEN.append(y)


TRACKER = Tracker()


class Counting(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        SEEN.append(1)
        return x.clone()

    @staticmethod
    def backward(ctx, g):
        return g


class Decorated(OldD2l):
    @torch.autograd.profiler.record_function("block")
    def forward(self, x):
        SEEN.append(1)
        return super().forward(x)


def within(manager):
    def forward(self, x, y):
        with manager():
            return y

    return d2l(forward)


def sets_on_a_class(self, y):
    Tracker.last = 1


EFFECTS = {
    "a base's forward": lambda: Beyond(C, C1, C2, C3, C4),
    "a decorated forward": lambda: Decorated(C, C1, C2, C3, C4),
    "a context manager": lambda: within(lambda: timed("block")),
    "a class of contexts": lambda: within(Timer),
    "a method of an object": lambda: d2l(once(lambda self, y: TRACKER.log(y))),
    "a new attribute of a class": lambda: d2l(once(sets_on_a_class)),
    "an autograd Function": lambda: d2l(lambda self, x, y: Counting.apply(y)),
    "a generator": lambda: d2l(once(lambda self, y: torch.rand(1, generator=GENERATOR))),
    "NumPy's own generator": lambda: d2l(once(lambda self, y: RANDOM.random())),
    "an attribute of its output": lambda: d2l(once(lambda self, y: setattr(y, "kept", 1))),
    "a hook on a parameter": lambda: d2l(once(lambda self, y: self.p1_1.weight.requires_grad and hook(self))),
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


def hook(self):
    self.p1_1.weight.register_hook(lambda g: g.clamp(-1e-3, 1e-3))


def with_attribute(name, value, effect):
    block = d2l(once(effect))
    setattr(block, name, value)
    return block


def described():
    """Everything that a trial could leave behind, as text."""
    return repr([
        [str(state) for state in STATE], CALLS, LIBRARY.calls, LIBRARY.log, "LAST_SHAPE" in globals(),
        with_default.__defaults__, Registry.shapes, Registry.calls, Counted.calls, helper.__dict__, random.getstate(),
        "last" in vars(Tracker), GENERATOR.get_state().tolist(), RANDOM.bit_generator.state,
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
    if hasattr(kind.forward, "__wrapped__"):
        return
    captured = [cell.cell_contents for cell in kind.forward.__closure__ or () if isinstance(cell.cell_contents, list)]
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
