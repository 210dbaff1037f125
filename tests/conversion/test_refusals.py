"""Why a block is left alone, in words: the layer, what the block has, the known variant that is not supported."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clients import C1, C2, C3, C4, FLAT, C, OldD2l, Torchvision, drawn
from inception_fused import convert, explain
from inception_fused.modules.refusals import named
from inception_fused.modules.structure import candidates

CONFIG = (C, C1, C2, C3, C4)
WANTED = "1x1 | 1x1, 3x3 | 1x1, 5x5 or 3x3 or 3x3 twice | 3x3 max-pool, 1x1"
LATER = "as in Inception v3 and v4, is not supported"


class Branches(nn.Module):
    """Side by side over one input."""

    def __init__(self, *branches):
        super().__init__()
        self.b = nn.ModuleList(branches)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.b], 1)


class InceptionBlock(Branches):
    """With a name that says what it is meant to be."""


def conv(c, k, sides, **settings):
    sides = sides if isinstance(sides, tuple) else (sides, sides)
    return nn.Conv2d(c, k, sides, padding=tuple(s // 2 for s in sides), **settings)


def chain(*sides, first=None, **settings):
    """Convolutions one behind the other, behind a pool where one is given."""
    layers = [conv(C if i == 0 else 8, 8, s, **settings) for i, s in enumerate(sides)]
    return nn.Sequential(*([first] if first is not None else []), *layers)


def pooled():
    return chain(1, first=nn.MaxPool2d(3, 1, 1))


def replaced(**layers):
    block = OldD2l(*CONFIG)
    for name, layer in layers.items():
        setattr(block, name, layer)
    return block


def conv1d(*sides):
    return nn.Sequential(*(nn.Conv1d(C if i == 0 else 8, 8, s, padding=s // 2) for i, s in enumerate(sides)))


class V3(nn.Module):
    """Inception v3's first block, whose pool is a function, under a name that says nothing."""

    def __init__(self):
        super().__init__()
        self.one, self.five = chain(1), chain(1, 5)
        self.double, self.pool = chain(1, 3, 3), chain(1)

    def forward(self, x):
        return torch.cat([self.one(x), self.five(x), self.double(x), self.pool(F.avg_pool2d(x, 3, 1, 1))], 1)


STRUCTURES = {
    "v3, functions": (
        V3,
        "five.1 has a kernel (5, 5), wants 3x3 in its place; these are the convolutions of Inception v3's first "
        "blocks, which are not supported",
    ),
    "average pool": (
        lambda: replaced(p4_1=nn.AvgPool2d(3, 1, 1)), f"p4_1 is an AvgPool2d; a branch with an average pool, {LATER}",
    ),
    "another average": (
        lambda: replaced(p4_1=nn.AdaptiveAvgPool2d(5)),
        "p4_1 is an AdaptiveAvgPool2d, which an Inception block does not have",
    ),
    "chain of five": (
        lambda: InceptionBlock(chain(1), chain(1, 3), chain(1, 3, 3, 3, 3), pooled()),
        "it has 9 convolutions: b.0.0 1x1, b.1.0 1x1, b.1.1 3x3, b.2.0 1x1, b.2.1 3x3, b.2.2 3x3, b.2.3 3x3, b.2.4 "
        f"3x3, b.3.1 1x1; wants six or seven: {WANTED}",
    ),
    "factorised": (
        lambda: InceptionBlock(chain(1), chain(1, (1, 7), (7, 1)), pooled()),
        f"b.1.1 has a kernel (1, 7); a factorised convolution, {LATER}",
    ),
    "fork": (
        lambda: InceptionBlock(chain(1), chain(1), chain(3), chain(5), pooled()),
        "it has 5 convolutions: b.0.0 1x1, b.1.0 1x1, b.2.0 3x3, b.3.0 5x5, b.4.1 1x1; these are the convolutions of a "
        f"block whose 3x3 and 5x5 share a 1x1 (a fork), which are not supported; wants six or seven: {WANTED}",
    ),
    "smaller": (
        lambda: replaced(p2_2=nn.Conv2d(8, 24, 3, padding=1, stride=2)),
        f"p2_2 has stride (2, 2); a block that makes the image smaller, {LATER}",
    ),
    "smaller pool": (
        lambda: replaced(p4_1=nn.MaxPool2d(3, 2, 1)),
        f"p4_1 has stride 2; a block that makes the image smaller, {LATER}",
    ),
    "1-D": (
        lambda: InceptionBlock(conv1d(1), conv1d(1, 3), conv1d(1, 5), nn.MaxPool1d(3, 1, 1), conv1d(1)),
        "b.0.0 is a Conv1d; wants layers of images, Conv2d and MaxPool2d",
    ),
    "1-D pool": (
        lambda: InceptionBlock(nn.MaxPool1d(3, 1, 1), conv1d(1), conv1d(1, 3), conv1d(1, 5)),
        "b.0 is a MaxPool1d; wants layers of images, Conv2d and MaxPool2d",
    ),
    "3-D": (
        lambda: InceptionBlock(*(nn.Conv3d(C, 8, 1) for _ in range(6))),
        "b.0 is a Conv3d; wants layers of images, Conv2d and MaxPool2d",
    ),
    "GELU": (
        lambda: replaced(p2_2=nn.Sequential(conv(8, 24, 3), nn.GELU())),
        "p2_2.1 is a GELU; of activations ReLU or none is supported",
    ),
    "ELU": (
        lambda: replaced(p2_2=nn.Sequential(conv(8, 24, 3), nn.ELU())),
        "p2_2.1 is an ELU; of activations ReLU or none is supported",
    ),
    "groups": (
        lambda: replaced(p2_2=conv(8, 24, 3, groups=8)), "p2_2 has 8 groups; a grouped convolution is not supported",
    ),
    "dilation": (
        lambda: replaced(p2_2=nn.Conv2d(8, 24, 3, padding=2, dilation=2)),
        "p2_2 has dilation (2, 2); a dilated convolution is not supported",
    ),
    "padding": (
        lambda: replaced(p3_2=nn.Conv2d(8, 16, 5)),
        "p3_2 has padding (0, 0), wants (2, 2), which keeps the size of the image",
    ),
    "border": (
        lambda: replaced(p3_2=conv(8, 16, 5, padding_mode="reflect")),
        "p3_2 pads with padding_mode='reflect', wants zeros around the image",
    ),
    "two pools": (
        lambda: replaced(p1_1=nn.Sequential(nn.MaxPool2d([3, 3], [1, 1], 1), conv(C, C1, 1))),
        f"it has 2 max-pools: p1_1.0 3x3, p4_1 3x3; wants one: {WANTED}",
    ),
    "a pool elsewhere": (
        lambda: InceptionBlock(chain(1), chain(1), nn.MaxPool2d(3, 1, 1), chain(3), chain(1), chain(5), chain(1)),
        f"b.2 stands before 4 convolutions, wants before the last alone: {WANTED}",
    ),
    "no projection": (
        lambda: InceptionBlock(chain(1), chain(1, 3), chain(1, 5), nn.MaxPool2d(3, 1, 1)),
        "it has 5 convolutions: b.0.0 1x1, b.1.0 1x1, b.1.1 3x3, b.2.0 1x1, b.2.1 5x5; these are the convolutions of a "
        f"block whose pool has no 1x1 behind it, which are not supported; wants six or seven: {WANTED}",
    ),
    "assigned in another order": (
        lambda: InceptionBlock(pooled(), chain(1), chain(1, 3), chain(1, 5)),
        "its branches are assigned in another order (b.0.1 1x1, b.1.0 1x1, b.2.0 1x1, b.2.1 3x3, b.3.0 1x1, b.3.1 5x5),"
        f" which is not supported; assign them in __init__ as {WANTED}",
    ),
    "5x5 before 3x3": (
        lambda: Branches(chain(1), chain(1, 5), chain(1, 3), pooled()),
        "its branches are assigned in another order (b.0.0 1x1, b.1.0 1x1, b.1.1 5x5, b.2.0 1x1, b.2.1 3x3, b.3.1 1x1),"
        f" which is not supported; assign them in __init__ as {WANTED}",
    ),
    "scripted": (
        lambda: replaced(p1_1=torch.jit.script(conv(C, C1, 1))),
        "p1_1 is a scripted module, which nobody can look into",
    ),
    "no weight": (lambda: replaced(p2_2=weightless()), "p2_2 has no weight"),
    "no stride": (lambda: replaced(p2_2=strideless()), "its layers cannot be read: AttributeError: 'Conv2d' object"),
}  # fmt: skip


def weightless():
    layer = conv(8, 24, 3)
    layer.weight = None
    return layer


def strideless():
    layer = conv(8, 24, 3)
    del layer.__dict__["stride"]
    return layer


@pytest.mark.parametrize("name", STRUCTURES)
def test_layers_that_are_no_block(name):
    make, words = STRUCTURES[name]
    (row,) = explain(nn.Sequential(make())).rows
    assert (row.name, row.state) == ("0", "not converted")
    assert row.path.startswith(words) if name == "no stride" else row.path == words


def forward(inner=F.relu, outer=F.relu, order=(0, 1, 2, 3), pool=True, base=OldD2l, config=CONFIG, last=None):
    """A block of the usual layers with another forward; last: of the output and x."""

    class Client(base):
        def forward(self, x):
            p2, p3 = outer(self.p2_2(inner(self.p2_1(x)))), outer(self.p3_2(inner(self.p3_1(x))))
            p4 = outer(self.p4_2(pool(x) if callable(pool) else self.p4_1(x) if pool else x))
            branches = outer(self.p1_1(x)), p2, p3, p4
            y = torch.cat([branches[i] for i in order], 1)
            return y if last is None else last(y, x)

    return Client(*config)


def nothing(x):
    return x


SQUARE = (64, C1, C2, C3, C4)
"""As many channels out as in."""

FORWARDS = {
    "GELU": (lambda: forward(F.gelu, F.gelu), "has GELU in place of ReLU"),
    "SiLU": (lambda: forward(F.silu, F.silu), "has SiLU in place of ReLU"),
    "LeakyReLU": (
        lambda: forward(*[lambda x: F.leaky_relu(x, 0.2)] * 2), "has LeakyReLU with slope 0.2 in place of ReLU",
    ),
    "ReLU outside": (lambda: forward(nothing), "has ReLU at its outputs only, none between its convolutions"),
    "ReLU inside": (
        lambda: forward(outer=nothing), "has ReLU between its convolutions only, none at its outputs",
    ),
    "another order": (lambda: forward(order=(3, 0, 1, 2)), "returns its branches in the order 4, 1, 2, 3"),
    "no pool": (lambda: forward(pool=False), "has no pool before its last convolution"),
    "average": (
        lambda: forward(pool=lambda x: F.avg_pool2d(x, 3, 1, 1)), "has an average pool, as Inception v3 and v4 have",
    ),
    "residual": (
        lambda: forward(last=lambda y, x: y + x, config=SQUARE), "adds its input (a residual connection)",
    ),
    "residual before ReLU": (
        lambda: forward(outer=nothing, last=lambda y, x: F.relu(y + x), config=SQUARE),
        "adds its input before its last ReLU (a residual connection)",
    ),
    "two of them": (
        lambda: forward(nothing, order=(0, 1, 3, 2)),
        "has ReLU at its outputs only, none between its convolutions and returns its branches in the order 1, 2, 4, 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORWARDS)
def test_forwards_that_are_met(name):
    make, words = FORWARDS[name]
    (row,) = explain(drawn(make())).rows
    assert row.path == f"its forward {words}; this is not supported"


def test_a_forward_with_batch_norm_is_recognised():
    class Client(Torchvision):
        def forward(self, x):
            return torch.cat(self._forward(x)[::-1], 1)

    (row,) = explain(drawn(Client(*FLAT))).rows
    assert row.path == "its forward returns its branches in the order 4, 3, 2, 1; this is not supported"


def test_a_forward_that_nobody_knows_is_described_by_its_error():
    (row,) = explain(forward(last=lambda y, x: y + 1e-2)).rows
    assert row.path.startswith("its forward computes something else than its structure says: on a random input it is ")


def test_the_usual_forward_is_converted():
    """The helper's own, of which the others are changes."""
    assert explain(convert(forward())).converted == 1


def test_articles():
    kinds = (
        "AvgPool2d",
        "Conv2d",
        "LSTM",
        "LPPool2d",
        "LoRA",
        "ELU",
        "SELU",
        "SiLU",
        "ReLU",
        "Upsample",
        "MLP",
        "UNet",
    )
    assert " ".join(map(named, kinds)) == (
        "an AvgPool2d a Conv2d an LSTM an LPPool2d a LoRA an ELU a SELU a SiLU a ReLU an Upsample an MLP a UNet"
    )


def test_what_is_looked_at():
    """Windows in the order of a block's are worth a word though the pool is none; other small networks are not."""

    def found(module):
        return [name for name, *_ in candidates(nn.Sequential(module))]

    assert found(replaced(p4_1=nn.AdaptiveMaxPool2d(5))) == ["0"]
    assert found(nn.Sequential(chain(3, 3, 3, 3), nn.MaxPool2d(2), nn.Flatten())) == []
    assert found(nn.Sequential(chain(1, 3, 1), chain(1, 3, 1))) == []
