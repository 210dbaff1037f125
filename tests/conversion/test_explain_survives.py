"""explain(model) of models that lack what others have: a word and never a traceback."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch
from torch import nn

from clients import C1, C2, C3, C4, FLAT, C, NewD2l, OldD2l, Torchvision, drawn, images
from inception_fused import FusedInception, InceptionInputError, KernelError, convert_, explain

CONFIG = (C, C1, C2, C3, C4)
CPU = "eager: x is on the CPU"


def converted(block=None):
    return convert_(drawn(block or OldD2l(*CONFIG)).eval())


def changed(change, make=converted):
    block = make()
    change(block)
    return block


def plain():
    return OldD2l(*CONFIG)


def fused():
    return FusedInception(*CONFIG)


class Delegating(nn.Module):
    """Asks what it wraps for every attribute, and raises another error for what is private."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def __getattr__(self, name):
        if name in ("_modules", "_parameters", "_buffers", "inner"):
            return super().__getattr__(name)
        if name.startswith("_"):
            raise ValueError(name)
        return getattr(self._modules["inner"], name)

    def forward(self, x):
        return self.inner(x)


class Secretive(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = converted()

    def named_children(self):
        raise RuntimeError("none of your business")


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no words")


class Half(FusedInception):
    """Has its class and nothing else."""

    def __init__(self):
        nn.Module.__init__(self)


def quantized(model):
    model.qconfig = torch.ao.quantization.get_default_qconfig()
    torch.ao.quantization.prepare(model.eval(), inplace=True)
    return torch.ao.quantization.convert(model, inplace=True)


def pruned(block):
    from torch.nn.utils import prune

    prune.l1_unstructured(block.p2_2, "weight", 0.5)


def unnormed(make):
    block = make(Torchvision(*FLAT))
    block.branch2[0].bn = nn.Identity()
    return block


def lists(block):
    block.p4_1 = nn.MaxPool2d([3, 3], [1, 1], [1, 1])


ODD = {
    "lazy": (lambda: convert_(NewD2l(*CONFIG[1:])), "eager: its parameters wait for the first input"),
    "half lazy": (
        lambda: changed(lambda b: b.b1_1(images()), lambda: convert_(NewD2l(*CONFIG[1:]))),
        "eager: its parameters wait for the first input",
    ),
    "meta": (lambda: converted().to("meta"), "eager: x is on meta; kernels run on CUDA devices"),
    "meta, not converted": (lambda: Torchvision(*FLAT).to("meta"), "convert_(model) converts it"),
    "two devices": (
        lambda: changed(lambda b: b.p2_2.to("meta")), "eager: its parameters lie on cpu and meta, wants one device",
    ),
    "quantized": (
        lambda: quantized(converted()), "eager: p1_1 is a torch.ao.nn.quantized.modules.conv.Conv2d, not a torch.nn",
    ),
    "quantized, not converted": (
        lambda: quantized(OldD2l(*CONFIG)), "p1_1 is a quantized Conv2d, which is not supported",
    ),
    "no BatchNorm in one place": (lambda: unnormed(drawn).eval(), "convert_(model) converts it"),
    "pruned": (lambda: changed(pruned), "eager: p2_2: its _buffers is {'weight_mask': tensor([[[["),
    "refers to what holds it": (
        lambda: changed(lambda b: b.__dict__.update(owner=nn.Sequential(b, nn.ReLU()))),
        "eager: its owner is Sequential( (0): FusedOldD2l( (p1_1): Conv2d(",
    ),
    "unprintable": (
        lambda: changed(lambda b: setattr(b, "more", Unprintable())),
        "eager: its more is an Unprintable without a repr, was not there",
    ),
    "None for a layer": (lambda: changed(lambda b: setattr(b, "p2_2", None)), "eager: p2_2 is missing, wants a Conv2d"),
    "None for a fused layer": (
        lambda: changed(lambda b: setattr(b, "p2_2", None), fused), "eager: p2_2 is missing, wants a Conv2d there",
    ),
    "a fused layer deleted": (
        lambda: changed(lambda b: delattr(b, "p4_1"), fused), "eager: p4_1 is missing, wants a MaxPool2d there",
    ),
    "nothing but a class": (Half, "eager: p1_1 is missing, wants a Conv2d there"),
    "None beside": (lambda: changed(lambda b: b.register_module("z", None), plain), "convert_(model) converts it"),
    "None for a weight": (
        lambda: changed(lambda b: setattr(b.p2_2, "weight", None)), "it cannot be looked at: AttributeError: 'N",
    ),
    "a weight deleted": (
        lambda: changed(lambda b: delattr(b.p2_2, "weight"), plain), "p2_2 has no weight",
    ),
    "a setting deleted": (
        lambda: changed(lambda b: b.p2_2.__dict__.pop("stride")),
        "it cannot be looked at: AttributeError: 'Conv2d' object has no attribute 'stride'",
    ),
    "lists": (lambda: changed(lists, plain), "p4_1 is MaxPool2d(kernel_size=[3, 3]"),
    "scripted layer": (
        lambda: changed(lambda b: setattr(b, "p1_1", torch.jit.script(b.p1_1))), "eager: p1_1 is a RecursiveS",
    ),
    "delegating": (lambda: Delegating(converted()), CPU),
    "secretive": (Secretive, CPU),
    "compiled": (lambda: torch.compile(converted(), backend="eager"), CPU),
    "a list": (lambda: nn.ModuleList([converted()]), CPU),
    "complex": (lambda: converted().to(torch.complex64), CPU),
    "integers": (lambda: changed(integers), CPU),
}  # fmt: skip


def integers(block):
    weight = block.p2_2.weight
    block.p2_2.weight = nn.Parameter(torch.ones_like(weight, dtype=torch.int8), requires_grad=False)


@pytest.mark.parametrize("name", ODD)
def test_every_odd_model_gets_a_row(name):
    make, words = ODD[name]
    model = make()
    found = explain(model)
    (row,) = found.rows
    assert row.path.startswith(words) or " ".join(row.path.split()).startswith(words)
    assert max(map(len, str(found).splitlines())) <= 120
    assert json.loads(json.dumps(found.to_json()))[0]["path"] == row.path
    with contextlib.suppress(InceptionInputError, KernelError):
        str(explain(model, images()))


def test_a_model_that_never_began():
    class NoInit(nn.Module):
        def __init__(self):
            pass

    with pytest.raises(InceptionInputError, match="model: got NoInit whose modules cannot be listed: AttributeError"):
        explain(NoInit())


def test_a_scripted_model_is_said_to_be_one():
    scripted = torch.jit.script(OldD2l(*CONFIG))
    said = "is scripted: nobody can look into it, and convert_ leaves it alone."
    for x in (None, images()):
        assert str(explain(scripted, x)).splitlines() == [
            "nothing in this model looks like an Inception block", f"The model {said}",
        ]  # fmt: skip
    found = explain(nn.Sequential(converted(), nn.Sequential(scripted), torch.jit.script(nn.Conv2d(3, 3, 1))))
    assert (len(found.rows), found.notes) == (1, (f"1.0 {said}",))


def test_a_block_that_appears_with_the_first_call():
    class Grows(nn.Module):
        def forward(self, x):
            if not self._modules:
                self.block = converted()
            return self.block(x)

    (row,) = explain(Grows(), images()).rows
    assert row.path.startswith(CPU)
    assert row.forward is None
