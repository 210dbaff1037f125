"""convert on models that are written, changed or called in unusual ways; each was wrong once."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from clients import C1, C2, C3, C4, FLAT, C, NewD2l, OldD2l, Torchvision, images
from inception_fused import FallbackWarning, TorchvisionInception, backend, convert, convert_, explain, revert_
from inception_fused.runtime.submit import count


def old():
    return OldD2l(C, C1, C2, C3, C4)


class Other(OldD2l):
    """old d2l's block whose forward ends in ``after(block, y)``."""

    def __init__(self, after, *sizes):
        super().__init__(*(sizes or (C, C1, C2, C3, C4)))
        self.after = after

    def forward(self, x):
        return self.after(self, super().forward(x))


class Frozen(Torchvision):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class InPlace(OldD2l):
    def forward(self, x):
        y = super().forward(x)
        x.zero_()
        return y


def dropped(block, y):
    return torch.zeros_like(y) if block.training and torch.rand(1) < 1e-6 else y


def counted(block, y):
    block.calls = getattr(block, "calls", 0) + 1
    return y


LEFT = {
    "dropout beside frozen BatchNorms": (lambda: Frozen(*FLAT), "something else in training mode"),
    "a clamp far out": (lambda: Other(lambda _, y: y.clamp(max=20.0)), "something else on values of 100"),
    "relu6 at the size of 3a": (
        lambda: Other(lambda _, y: y.clamp(max=6.0), 192, 64, (96, 128), (16, 32), 32), "something else",
    ),
    "another dtype": (lambda: Other(lambda _, y: y.float()), "torch.float32"),
    "a branch dropped now and then": (lambda: Other(dropped), "draws random numbers in training mode"),
    "attributes that are counted": (lambda: Other(counted), "changes its attributes"),
    "input overwritten": (lambda: InPlace(C, C1, C2, C3, C4), "writes into its input"),
}  # fmt: skip


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    make, words = LEFT[name]
    block = make()
    with pytest.warns(FallbackWarning, match=words):
        convert_(block)
    assert words in explain(block).rows[0].path


def test_a_bias_removed_later():
    for key in ("p1_1", "p2_2"):
        plain = old()
        fused, x = convert(plain), images()
        getattr(plain, key).bias = getattr(fused, key).bias = None
        with backend("kernels"):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-5, atol=1e-5)


def test_an_attribute_changed_later():
    plain = Other(lambda _, y: y)
    fused, x = convert(plain), images()
    plain.after = fused.after = lambda _, y: 2 * y
    torch.testing.assert_close(fused(x), plain(x))
    assert "its after is" in explain(fused).rows[0].path
    fused = convert(old())
    fused.extra = nn.Identity()
    assert "it has 8 children, had 7" in explain(fused).rows[0].path


def test_weights_that_grew_or_shared_memory_keep_their_strides():
    model = convert_(nn.Sequential(nn.Conv2d(3, C, 3, padding=1), old()), channels_last=True)
    model[0].weight = nn.Parameter(torch.randn(C, 6, 3, 3))
    truth = model[0].weight.detach().clone()
    revert_(model)
    assert torch.equal(model[0].weight, truth)
    spread = old()
    spread.p2_2.weight.data = torch.randn(24, 8, 1, 1).expand(24, 8, 3, 3)
    truth = spread.p2_2.weight.clone()
    assert torch.equal(revert_(convert_(spread, channels_last=True)).p2_2.weight, truth)


def test_only_convolutions_change_their_layout():
    class Placed(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.pos = old(), nn.Parameter(torch.randn(1, C, 7, 5))

        def forward(self, x):
            return self.block(x + self.pos.view(1, C, 7, 5))

    model = convert_(Placed(), channels_last=True)
    assert model.pos.is_contiguous()
    assert model.pos.view(1, -1).shape == (1, C * 35)


def test_a_subclass_of_torchvisions_block_is_taken_when_it_is_whole():
    class Halved(TorchvisionInception):
        scale = 1.0

        def __init__(self, *sizes):
            super().__init__(*sizes)
            self.scale = 0.5

        def forward(self, x):
            return self.scale * super().forward(x)

    block, x = Halved(*FLAT).eval(), images()
    assert type(block) is Halved
    assert torch.equal(block(x), 0.5 * TorchvisionInception.forward(block, x))


def test_other_instances_of_a_converted_class():
    block, x = TorchvisionInception(*FLAT).eval(), images()
    other = type(block)(*FLAT).eval()
    other.load_state_dict(block.state_dict())
    torch.testing.assert_close(other(x), block(x), rtol=1e-5, atol=1e-5)
    assert torch.equal(copy.deepcopy(other)(x), other(x))


@pytest.mark.parametrize(
    "setting", [lambda: torch.device("meta"), lambda: torch.inference_mode(), lambda: torch.autocast("cpu")]
)
def test_the_probe_is_free_of_the_callers_settings(setting):
    block = old()
    with setting():
        convert_(block, strict=True)
    block(images()).sum().backward()
    torch.set_default_dtype(torch.float64)
    try:
        convert_(old().float(), strict=True)
    finally:
        torch.set_default_dtype(torch.float32)


INPUTS = {
    "a list": (lambda b, x: torch.cat(x, 1) if isinstance(x, list) else x, lambda x: list(x.split(12, 1))),
    "another dtype": (lambda b, x: x.to(b.p1_1.weight.dtype), lambda x: x.double()),
    "integers": (lambda b, x: x.to(b.p1_1.weight.dtype), lambda x: (8 * x).int()),
    "one image": (lambda b, x: x if x.dim() == 4 else x[None], lambda x: x[0]),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_the_originals_forward_takes(name):
    before, change = INPUTS[name]

    class Taking(OldD2l):
        def forward(self, x):
            return super().forward(before(self, x))

    plain = Taking(C, C1, C2, C3, C4)
    fused, x = convert(plain, strict=True), images()
    torch.testing.assert_close(fused(change(x)), plain(change(x)), rtol=1e-5, atol=1e-5)
    with torch.no_grad(), backend("kernels"), count() as launches:
        fused(x)
    assert len(launches) == 3


def test_more_than_a_tensor_in_training_mode():
    class Auxiliary(Torchvision):
        def forward(self, x):
            y = super().forward(x)
            return (y, y.mean()) if self.branch1.bn.training else y

    with pytest.warns(FallbackWarning, match="returns a tuple in training mode"):
        block = convert_(Auxiliary(*FLAT)).train()
    y, mean = block(images())
    assert torch.equal(mean, y.mean())


@pytest.mark.parametrize(
    ("change", "words"), [("wrapped", "is a Sequential, not a Conv2d"), ("renamed", "is missing, wants")]
)
def test_explain_of_what_is_no_longer_a_block(change, words):
    block = convert_(old())
    if change == "wrapped":
        block.p3_2 = nn.Sequential(block.p3_2)
    else:
        block.third = block._modules.pop("p3_2")
    (row,) = explain(block).rows
    assert (row.state, row.what) == ("converted", "5x5 in branch 3")
    assert row.path.startswith(f"eager: p3_2 {words}")


def test_a_class_that_cannot_be_subclassed_is_left_alone():
    class Registered(OldD2l):
        def __init_subclass__(cls, *, registry):
            super().__init_subclass__()

    block = Registered(C, C1, C2, C3, C4)
    with pytest.warns(FallbackWarning, match="no subclass of Registered can be made"):
        convert_(block)
    assert type(block) is Registered
    assert not block.__dict__.keys() & {"_inception_fused"}


def test_layers_in_one_container():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            block = old()
            layers = [block.p1_1, block.p2_1, block.p2_2, block.p3_1, block.p3_2, block.p4_1, block.p4_2]
            self.layers = nn.ModuleList(layers)

        def forward(self, x):
            a, b, c, d, e, pool, f = self.layers
            y = (a(x), c(F.relu(b(x))), e(F.relu(d(x))), f(pool(x)))
            return torch.cat([F.relu(part) for part in y], 1)

    plain, x = Held(), images()
    torch.testing.assert_close(convert(plain, strict=True)(x), plain(x), rtol=1e-5, atol=1e-5)


def test_a_lazy_block_with_a_checkpoint_before_its_first_input():
    source, x = NewD2l(C1, C2, C3, C4), images()
    truth = source(x)
    for early in (True, False):
        block = NewD2l(C1, C2, C3, C4)
        if early:
            convert_(block)
        block.load_state_dict(source.state_dict())
        if not early:
            convert_(block)
        torch.testing.assert_close(block(x), truth, rtol=1e-5, atol=1e-5)
        with torch.no_grad(), backend("kernels"), count() as launches:
            torch.testing.assert_close(block(x), truth, rtol=1e-5, atol=1e-5)
        assert len(launches) == 3


def test_copies_of_changed_blocks_stay_changed():
    block = convert_(Other(lambda _, y: y))
    block.after = lambda _, y: -y
    x = images()
    assert torch.equal(copy.deepcopy(block)(x), block(x))
    assert (block(x) <= 0).all()
