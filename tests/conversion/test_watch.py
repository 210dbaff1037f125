"""A converted block, and a FusedInception, honours what is changed later: attributes of every kind, of every layer and
class."""

from __future__ import annotations

import collections
import copy
import dataclasses
import enum
import pickle
from typing import ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clients import C1, C2, C3, C4, FLAT, BasicConv2d, C, OldD2l, Torchvision, drawn, images
from inception_fused import FallbackWarning, FusedInception, KernelError, backend, convert, convert_, explain
from inception_fused.conversion.converted import converted_class
from inception_fused.conversion.inspection import eager_reason
from inception_fused.runtime.submit import count


class Gain(enum.Enum):
    ONE = 1.0
    TWO = 2.0


@dataclasses.dataclass(frozen=True)
class Config:
    gain: float = 1.0


Sizes = collections.namedtuple("Sizes", "gains")


class Configured(OldD2l):
    """Attributes of many kinds, each of which doubles the output when it is changed."""

    class_gain = 1.0
    table: ClassVar[dict] = {"gain": 1.0}

    def __init__(self):
        super().__init__(C, C1, C2, C3, C4)
        self.pair, self.options, self._hidden = (1.0, "x"), {"gain": [1.0]}, 1.0
        self.kind, self.config, self.names = Gain.ONE, Config(), ["a"]
        self.after = self.same
        self.p4_1.gain = 1.0
        self.branches, self.sizes = [self.p1_1, self.p2_1], Sizes([1.0])

    def same(self, y):
        return y

    @property
    def gain(self):
        return 1.0

    def scale(self):
        return 1.0

    def forward(self, x):
        y = super().forward(x)
        gain = self.pair[0] * self.options["gain"][0] * self._hidden * self.kind.value * self.config.gain
        gain = gain * self.class_gain * self.table["gain"] * self.gain * self.scale() * len(self.names)
        gain = (
            gain
            * self.sizes.gains[0]
            * self.p4_1.gain
            * (1.0 if self.branches[0] is self.p1_1 else 2.0)
            * getattr(self, "more", 1.0)
        )
        return self.after(y) * gain


def rows_of(x):
    """In the memory that a block hands to its own forward: in another some CPUs' convolutions round differently."""
    return x.contiguous(memory_format=torch.channels_last)


def of_class(name, value):
    return lambda b: setattr(next(kind for kind in type(b).__mro__ if name in kind.__dict__), name, value)


LATER = {
    "a tuple": lambda b: setattr(b, "pair", (2.0, "x")),
    "a list in a dictionary": lambda b: b.options["gain"].__setitem__(0, 2.0),
    "a hidden attribute": lambda b: setattr(b, "_hidden", 2.0),
    "an enum": lambda b: setattr(b, "kind", Gain.TWO),
    "a config": lambda b: setattr(b, "config", Config(2.0)),
    "a longer list": lambda b: b.names.append("b"),
    "a method in an attribute": lambda b: setattr(b, "after", lambda y: 2 * y),
    "an attribute of a leaf": lambda b: setattr(b.p4_1, "gain", 2.0),
    "another order": lambda b: b.branches.reverse(),
    "a new attribute": lambda b: setattr(b, "more", 2.0),
    "a tensor": lambda b: setattr(b, "more", torch.tensor(2.0)),
    "an array": lambda b: setattr(b, "pair", np.array([2.0, 1.0])),
    "an equal tensor": lambda b: (setattr(b, "pair", (torch.tensor(1.0), "x")), b.names.append("b")),
    "a list in a named tuple": lambda b: b.sizes.gains.__setitem__(0, 2.0),
    "another layer of the kind": lambda b: setattr(b, "p1_1", copy.deepcopy(b.p1_1)),
    "an attribute of its own class": lambda b: setattr(type(b), "class_gain", 2.0),
    "a class attribute": of_class("class_gain", 2.0),
    "a dictionary of the class": lambda b: Configured.table.__setitem__("gain", 2.0),
    "a property": of_class("gain", property(lambda b: 2.0)),
    "a method": of_class("scale", lambda b: 2.0),
    "the base's forward": lambda b: setattr(OldD2l, "forward", lambda b, x: 2 * PLAIN(b, x)),
}
PLAIN = OldD2l.forward


@pytest.fixture(autouse=True)
def classes_as_they_were():
    """The classes that a test patches, put back."""
    kinds = (OldD2l, Configured, BasicConv2d, Torchvision, nn.Conv2d, nn.MaxPool2d, nn.Module)
    kinds += (nn.modules.batchnorm._BatchNorm, converted_class(Configured))
    before = [dict(kind.__dict__) for kind in kinds]
    table = dict(Configured.table)
    yield
    for kind, known in zip(kinds, before, strict=True):
        for name in set(kind.__dict__) - set(known):
            delattr(kind, name)
        for name, value in known.items():
            if kind.__dict__[name] is not value:
                setattr(kind, name, value)
    Configured.table.update(table)


@pytest.mark.parametrize("name", LATER)
def test_an_attribute_of_any_kind(name):
    block, x = convert_(Configured(), strict=True), images()
    with torch.no_grad(), backend("kernels"), count() as launches:
        y = block(x)
    assert launches
    twin = copy.deepcopy(block)
    LATER[name](block)
    torch.testing.assert_close(block(x), 2 * y)
    assert "eager: " in explain(block).rows[0].path
    with backend("kernels"), pytest.raises(KernelError, match="demands kernels that cannot run"):
        block(x)
    if "class" not in name and name not in ("a property", "a method", "the base's forward"):
        torch.testing.assert_close(twin(x), y)
        assert eager_reason(twin) is None


def circular(self, x, weight, bias):
    side = weight.shape[-1] // 2
    return F.conv2d(F.pad(x, (side,) * 4, mode="circular"), weight, bias)


def test_seamless_tiling_by_a_patch_of_every_convolution():
    block, x = convert_(OldD2l(C, C1, C2, C3, C4)), rows_of(images())
    ours, theirs = FusedInception(C, C1, C2, C3, C4), OldD2l(C, C1, C2, C3, C4)
    theirs.load_state_dict(ours.state_dict())
    before = block(x), ours(x)
    nn.Conv2d._conv_forward = circular
    for fused, plain, y in ((block, OldD2l.forward(block, x), before[0]), (ours, theirs(x), before[1])):
        assert torch.equal(fused(x), plain)
        assert not torch.allclose(plain, y)
        with backend("kernels"), pytest.raises(KernelError, match="Conv2d._conv_forward was replaced"):
            fused(x)
    with pytest.warns(FallbackWarning, match="something else"):
        convert_(OldD2l(C, C1, C2, C3, C4))


PATCHES = {
    "Conv2d.forward": (nn.Conv2d, "forward"),
    "_BatchNorm.forward": (nn.modules.batchnorm._BatchNorm, "forward"),
    "MaxPool2d.forward": (nn.MaxPool2d, "forward"),
    "BasicConv2d.forward": (BasicConv2d, "forward"),
    "Module.__call__": (nn.Module, "__call__"),
    "Module._call_impl": (nn.Module, "_call_impl"),
}


@pytest.mark.parametrize("name", PATCHES)
def test_a_method_of_a_layers_class(name):
    kind, method = PATCHES[name]
    block, x = convert_(drawn(Torchvision(*FLAT)).eval(), strict=True), rows_of(images())
    assert eager_reason(block) is None
    plain = getattr(kind, method)
    setattr(kind, method, lambda self, *args, **kwargs: plain(self, *args, **kwargs) * 2)
    assert "was replaced" in eager_reason(block)
    # A call of the block itself goes through nn.Module's methods, too.
    assert torch.equal(block(x), (2 if kind is nn.Module else 1) * Torchvision.forward(block, x))
    setattr(kind, method, plain)
    assert eager_reason(block) is None


class Listed(nn.Module):
    """Branches in a dictionary, concatenated in its order."""

    def __init__(self):
        super().__init__()

        def conv(c, k, r):
            return nn.Sequential(nn.Conv2d(c, k, r, padding=r // 2), nn.ReLU())

        self.branches = nn.ModuleDict(
            {
                "a": conv(C, 8, 1),
                "b": nn.Sequential(conv(C, 8, 1), conv(8, 8, 3)),
                "c": nn.Sequential(conv(C, 8, 1), conv(8, 8, 5)),
                "d": nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(C, 8, 1)),
            }
        )
        self.order = {"x": 0, "y": 1}

    def forward(self, x):
        y = torch.cat([branch(x) for branch in self.branches.values()], 1)
        return y if next(iter(self.order)) == "x" else 2 * y


@pytest.mark.parametrize("change", ["layers", "a dictionary"])
def test_another_order(change):
    block, x = convert_(Listed(), strict=True), rows_of(images())
    known = block.branches._modules if change == "layers" else block.order
    first = next(iter(known))
    known[first] = known.pop(first)
    assert eager_reason(block) is not None
    assert torch.equal(block(x), Listed.forward(block, x))


def test_a_patch_from_before_the_import(monkeypatch):
    monkeypatch.setattr("inception_fused.modules.fused_inception._PRISTINE", False)
    assert "is not PyTorch's" in FusedInception(C, C1, C2, C3, C4).eager_reason()


class Registered(OldD2l):
    known: ClassVar[dict] = {}

    def __init_subclass__(cls, **kwargs):
        Registered.known[cls.__name__] = cls


class Second(Registered):
    pass


def test_a_registry_of_subclasses_stays_as_it_was():
    model = convert_(nn.Sequential(Registered(C, C1, C2, C3, C4), Second(64, C1, C2, C3, C4)), strict=True)
    assert list(Registered.known) == ["Second"]
    assert [eager_reason(block) for block in model] == [None, None]


def test_what_is_of_no_consequence_is_looked_at_once():
    block = convert_(drawn(Torchvision(*FLAT)).eval())
    block.register_forward_hook(lambda *_: None)
    block.register_state_dict_post_hook(lambda *_: None)
    for norm in (m for m in block.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum, norm.eps = 0.2, 1e-2
    state = block.__dict__["_inception_fused"]
    assert not state.seen.holds()
    with torch.no_grad(), backend("kernels"), count() as launches:
        block(images())
    assert launches
    assert state.seen.holds()


class Kept:
    """A descriptor that keeps its values elsewhere."""

    def __get__(self, instance, owner):
        return 1.0

    def __set__(self, instance, value):
        pass


UNWATCHABLE = {
    "an array": lambda b: setattr(b, "gains", np.ones(3)),
    "a tensor": lambda b: setattr(b, "gain", torch.ones(())),
    "a long list": lambda b: setattr(b, "table", list(range(33))),
    "an object": lambda b: setattr(b, "meter", type("Meter", (), {})()),
    "a module beside the tree": lambda b: b.__dict__.update(other=[nn.ReLU()]),
    "an object deep inside": lambda b: setattr(b.p1_1, "options", {"a": ({"b": object()},)}),
    "a buffer that may come": lambda b: b.register_buffer("mask", None),
    "a parameter that may come": lambda b: b.p4_1.register_parameter("gain", None),
    "an array of the class": lambda b: setattr(type(b), "gains", np.ones(3)),
    "a descriptor": lambda b: setattr(type(b), "gain", Kept()),
    "a list in a frozen object": lambda b: setattr(b, "config", Config([1.0])),
    "a method of another object": lambda b: setattr(b, "sink", [].append),
}


@pytest.mark.parametrize("name", UNWATCHABLE)
def test_what_could_change_unseen_is_left_alone(name):
    class Client(OldD2l):
        pass

    block = Client(C, C1, C2, C3, C4)
    UNWATCHABLE[name](block)
    with pytest.warns(
        FallbackWarning, match="change unseen|more than 32 entries|a parameter or buffer beside|of its own"
    ):
        convert_(block)
    assert type(block) is Client


@pytest.mark.parametrize("change", ["attribute", "class", "leaf"])
def test_a_compiled_block_is_compiled_anew(change):
    block, x = convert_(Configured()), images()
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    with backend("kernels"):
        y = compiled(x)
    {
        "attribute": lambda: setattr(block, "_hidden", 2.0),
        "class": lambda: setattr(Configured, "class_gain", 2.0),
        "leaf": lambda: setattr(block.p4_1, "gain", 2.0),
    }[change]()
    torch.testing.assert_close(compiled(x), 2 * y, rtol=1e-4, atol=1e-5)


class Reloaded(OldD2l):
    factor = 1.0

    def forward(self, x):
        return super().forward(x) * self.factor


def test_a_pickle_meets_the_class_of_its_new_process():
    block, x = convert_(Reloaded(C, C1, C2, C3, C4), strict=True), images()
    data, y = pickle.dumps(block), block(x)
    same = pickle.loads(data)
    assert eager_reason(same) is None
    Reloaded.factor = 2.0
    try:
        other = pickle.loads(data)
        torch.testing.assert_close(other(x), 2 * y)
        assert "something else" in eager_reason(other)
    finally:
        Reloaded.factor = 1.0


class Refusing(OldD2l):
    def __init_subclass__(cls, **kwargs):
        if cls.__name__.startswith("Fused"):
            raise RuntimeError("final")


class Final(type(nn.Module)):
    def __new__(mcs, name, bases, namespace):
        if any(isinstance(base, Final) for base in bases):
            raise ValueError("final")
        return super().__new__(mcs, name, bases, namespace)


class Last(OldD2l, metaclass=Final):
    pass


@pytest.mark.parametrize("kind", [Refusing, Last])
def test_a_class_that_cannot_be_subclassed_leaves_the_model_whole(kind):
    model = nn.Sequential(OldD2l(C, C1, C2, C3, C4), kind(64, C1, C2, C3, C4))
    own = dict(model[1].__dict__)
    convert_(model)
    assert type(model[1]) is kind
    assert model[1].__dict__ == own
    alone = nn.Sequential(kind(C, C1, C2, C3, C4))
    with pytest.warns(FallbackWarning, match=r"no subclass of \w+ can be made: \w+: final"):
        convert(alone)
    x = images()
    torch.testing.assert_close(model(x), kind.forward(model[1], OldD2l.forward(model[0], x)), rtol=1e-5, atol=1e-5)
