"""Which .view of a forward explain warns of: that of a block's own pixels, and no other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from inception_fused import FusedInception, InceptionInputError, explain
from inception_fused.op.viewing import CURE
from inception_fused.tools.flattening import flattened

CONFIG = (24, 16, (8, 24), (8, 16), 8)


def block():
    return FusedInception(*CONFIG)


class Net(nn.Module):
    """forward is each case's own."""

    def __init__(self, pool=None, fc=None):
        super().__init__()
        self.stem, self.block, self.drop = nn.Conv2d(24, 24, 3, padding=1), block(), nn.Dropout(0.2)
        self.features, self.stages = nn.Sequential(nn.Conv2d(24, 24, 1), block(), nn.ReLU()), nn.ModuleList([block()])
        self.pool, self.conv = pool or nn.AdaptiveAvgPool2d(1), nn.Conv2d(64, 8, 1)
        self.fc = fc or nn.Identity()


class Direct(Net):
    def forward(self, x):
        x = self.block(x)
        return x.view(x.size(0), -1)


class Inline(Net):
    def forward(self, x):
        return self.fc(F.relu(self.drop(self.features(self.stem(x)))).view(-1, 64 * 182))


class Looped(Net):
    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return x.view((x.shape[0], -1))


class Reduced(Net):
    def forward(self, x):
        y = self.conv(self.stages[0](x))
        return y.view(y.shape[0], -1)


class GlobalPool(Net):
    def forward(self, x):
        x = self.pool(self.block(x))
        return x.view(x.size(0), -1)


class Pooled(Net):
    def forward(self, x):
        x = F.adaptive_avg_pool2d(self.block(x), (2, 2))
        return x.view(x.size(0), -1)


class Aux(nn.Module):
    """torchvision's auxiliary head, before it took flatten."""

    def __init__(self, size):
        super().__init__()
        self.size, self.pool = size, nn.AvgPool2d(kernel_size=5, stride=3)
        self.conv = nn.Sequential(nn.Conv2d(64, 8, 1), nn.BatchNorm2d(8), nn.ReLU())


class AuxByFunction(Aux):
    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, (4, 4))
        x = self.conv(x)
        x = x.view(x.size(0), -1)
        return x


class AuxByLayer(Aux):
    def forward(self, x):
        x = self.conv(self.pool(x))
        return x.view(x.size(0), -1)


class AuxGlobal(Aux):
    def forward(self, x):
        x = self.conv(F.adaptive_avg_pool2d(x, 1))
        return x.view(x.size(0), -1)


class AuxUnknown(Aux):
    """Of a size that no source tells."""

    def forward(self, x):
        x = F.adaptive_avg_pool2d(x, self.size)
        return x.view(x.size(0), -1)


class WithAux(nn.Module):
    def __init__(self, aux):
        super().__init__()
        self.block, self.aux = block(), aux

    def forward(self, x):
        x = self.block(x)
        return x, self.aux(x)


class Squeeze(nn.Module):
    """Behind a block: its .view is of one pixel."""

    def __init__(self):
        super().__init__()
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(64, 64)

    def forward(self, x):
        b, c, _, _ = x.size()
        return x * self.fc(self.pool(x).view(b, c)).view(b, c, 1, 1)


class Shuffle(nn.Module):
    """Splits channels, which any memory allows."""

    def forward(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)


class Before(Net):
    """Flattens a branch that no block has seen."""

    def forward(self, x):
        z = self.stem(x)
        return z.view(z.size(0), -1), self.block(x)


class PooledBefore(Net):
    def forward(self, x):
        z = F.adaptive_avg_pool2d(self.stem(x), (2, 2))
        return z.view(z.size(0), -1), self.block(x)


class Contiguous(Net):
    def forward(self, x):
        x = self.block(x).contiguous()
        return x.view(x.size(0), -1)


class AsType(Net):
    def forward(self, x):
        x = self.block(x)
        return x.view(torch.int32)


FAIL = {
    "direct": (Direct, "Direct.forward, line {}: x.view(x.size(0), -1)", 2),
    "inline": (Inline, "Inline.forward, line {}: F.relu(self.drop(self.features(self.stem(x)))).view(-1, 64 * 182)", 1),
    "in a loop": (Looped, "Looped.forward, line {}: x.view((x.shape[0], -1))", 3),
    "behind 1x1": (Reduced, "Reduced.forward, line {}: y.view(y.shape[0], -1)", 2),
    "behind a pool to 2x2": (Pooled, "Pooled.forward, line {}: x.view(x.size(0), -1)", 2),
    "auxiliary": (lambda: WithAux(AuxByFunction(4)), "AuxByFunction.forward, line {}: x.view(x.size(0), -1)", 3),
    "auxiliary, layers": (lambda: WithAux(AuxByLayer(4)), "AuxByLayer.forward, line {}: x.view(x.size(0), -1)", 2),
}
WORK = {
    "a global pool": GlobalPool,
    "an average pool of a size": lambda: GlobalPool(nn.AvgPool2d((14, 13), stride=1)),
    "an auxiliary head's global pool": lambda: WithAux(AuxGlobal(1)),
    "squeeze and excitation": lambda: nn.Sequential(block(), Squeeze()),
    "channels shuffled": lambda: nn.Sequential(block(), Shuffle()),
    "before the block": Before,
    "pooled before the block": PooledBefore,
    "contiguous": Contiguous,
    "another dtype": AsType,
}


def notes(model):
    return flattened(model, [m for m in model.modules() if isinstance(m, FusedInception)])


@pytest.mark.parametrize("name", FAIL)
def test_what_fails_is_named_before_it_does(name):
    make, words, below = FAIL[name]
    model = make().eval()
    owner = next(type(m) for m in model.modules() if type(m).__name__ == words.partition(".")[0])
    line = owner.forward.__code__.co_firstlineno + below
    assert notes(model) == explain(model).notes == (f"{words.format(line)}: {CURE}.",)
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        model(torch.randn(2, 24, 14, 13))


@pytest.mark.parametrize("name", WORK)
def test_what_works_is_not_spoken_of(name):
    model = WORK[name]().eval()
    assert notes(model) == ()
    model(torch.randn(2, 24, 14, 13))


def test_what_no_source_tells_is_not_spoken_of():
    class Unreadable(Direct):
        exec("def forward(self, x): return self.block(x).view(1, -1)")

    assert notes(WithAux(AuxUnknown(2))) == notes(Unreadable()) == ()


def test_a_model_that_has_run_is_not_spoken_of_again():
    class Either(Direct):
        def forward(self, x):
            if x.shape[-1] > 1:
                return self.block(x)
            x = self.block(x)
            return x.view(x.size(0), -1)

    assert len(explain(Either()).notes) == 1
    assert not any(CURE in note for note in explain(Either(), torch.randn(1, 24, 3, 3)).notes)


def test_a_view_of_other_memory_is_not_blamed_on_a_block():
    class Transposed(Net):
        def forward(self, x):
            return self.block(x.permute(0, 1, 3, 2)), x.permute(0, 2, 3, 1).view(2, -1)

    with pytest.raises(InceptionInputError, match=r"^x: got shape \(2, 24, 5, 6\).*with which model"):
        explain(Transposed(), torch.randn(2, 24, 5, 6))
