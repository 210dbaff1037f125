"""convert, revert_ and explain on blocks from other people's code."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from clients import C1, C2, C3, C4, CLIENTS, FLAT, BasicConv2d, C, NewD2l, OldD2l, SomebodysCopy, Torchvision
from networks import torchvision_googlenet
from torch import nn

from inception_fused import (
    FallbackWarning,
    FusedInception,
    GoogLeNet,
    Inception,
    InceptionInputError,
    TorchvisionInception,
    backend,
    convert,
    convert_,
    explain,
    revert_,
)
from inception_fused.kernels.submit import count


def images(n=2, h=7, w=5):
    return torch.randn(n, C, h, w)


def drawn(module):
    """With statistics and affine parameters that are no identity."""
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.running_mean.normal_(std=0.3)
        norm.running_var.uniform_(0.5, 2)
        nn.init.normal_(norm.weight, 1.0, 0.3)
        nn.init.normal_(norm.bias, std=0.3)
    return module


@pytest.mark.parametrize("name", CLIENTS)
def test_a_converted_block_runs_the_kernels_and_computes_the_same(name):
    block = drawn(CLIENTS[name]()).eval()
    fused, x = convert(block), images()
    with torch.no_grad(), backend("kernels"), count() as launches:
        y = fused(x)
    assert len(launches) == 4 + any("pack" in launch for launch in launches)
    torch.testing.assert_close(y, block(x), rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(fused(x), block(x), rtol=1e-5, atol=1e-5)
    assert not hasattr(block, "_inception_fused")


@pytest.mark.parametrize("name", CLIENTS)
def test_it_stays_what_it_was(name):
    block = CLIENTS[name]()
    kind, parameters, state = type(block), list(block.parameters()), block.state_dict()
    names, strides = list(state), [p.stride() for p in parameters]
    assert convert_(block) is block
    assert isinstance(block, kind)
    assert type(block) is not kind
    assert all(a is b for a, b in zip(block.parameters(), parameters, strict=True))
    assert list(block.state_dict()) == names
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in parameters if p.dim() == 4)
    with torch.no_grad():
        parameters[0].add_(1)
    revert_(block)
    assert type(block) is kind
    assert all(a is b for a, b in zip(block.parameters(), parameters, strict=True))
    assert [p.stride() for p in parameters] == strides
    assert torch.equal(parameters[0], state[names[0]])
    assert not [key for module in block.modules() for key in module.__dict__ if "inception_fused" in key]


@pytest.mark.parametrize("name", ["old d2l", "bare", "somebody's copy"])
def test_gradients_are_the_originals(name):
    block = CLIENTS[name]()
    fused, x = convert(block), images().requires_grad_()
    with backend("kernels"):
        found = torch.autograd.grad(fused(x).square().mean(), (x, *fused.parameters()))
    truth = torch.autograd.grad(block(x).square().mean(), (x, *block.parameters()))
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_layouts_can_be_left_alone():
    block = OldD2l(C, C1, C2, C3, C4)
    strides = [p.stride() for p in block.parameters()]
    convert_(block, channels_last=False)
    assert [p.stride() for p in block.parameters()] == strides
    revert_(block)
    assert [p.stride() for p in block.parameters()] == strides


def test_a_lazy_block_before_and_after_its_first_input():
    before, after, x = NewD2l(C1, C2, C3, C4), NewD2l(C1, C2, C3, C4), images()
    after(x)
    convert_(after)
    convert_(before)
    assert "wait for the first input" in explain(before).rows[0].path
    first = before(x)
    assert type(before.b1_1) is nn.Conv2d
    assert before.b2_2.weight.is_contiguous(memory_format=torch.channels_last)
    for block in (before, after):
        truth = NewD2l.forward(block, x)
        with torch.no_grad(), backend("kernels"), count() as launches:
            y = block(x)
        assert len(launches) == 4
        torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, NewD2l.forward(before, x))


def test_a_lazy_block_that_computes_something_else_is_refused_after_its_first_input():
    class Doubled(NewD2l):
        def forward(self, x):
            return 2 * super().forward(x)

    block, x = convert_(Doubled(C1, C2, C3, C4)), images()
    block(x)
    assert "something else" in explain(block).rows[0].path
    torch.testing.assert_close(block(x), Doubled.forward(block, x))


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
    "stride": (lambda: replaced("p2_2", nn.Conv2d(8, 24, 3, padding=1, stride=2)), "p2_2 is configured as"),
    "no padding": (lambda: replaced("p3_2", nn.Conv2d(8, 16, 5)), "p3_2 is configured as"),
    "groups": (lambda: replaced("p2_2", nn.Conv2d(8, 24, 3, padding=1, groups=8)), "p2_2 is configured as"),
    "border": (lambda: replaced("p2_2", nn.Conv2d(8, 24, 3, padding=1, padding_mode="reflect")), "is configured as"),
    "7x7": (lambda: replaced("p3_2", nn.Conv2d(8, 16, 7, padding=3)), "p3_2 has a kernel (7, 7), wants 3x3 or 5x5"),
    "subclass": (lambda: replaced("p1_1", LoRA(C, C1, 1)), "p1_1 is a LoRA, not a Conv2d"),
    "no bias": (lambda: replaced("p1_1", nn.Conv2d(C, C1, 1, bias=False)), "some convolutions have a bias"),
    "average": (lambda: replaced("p4_1", nn.AvgPool2d(3, 1, 1)), "p4_1 is a AvgPool2d, which"),
    "wide pool": (lambda: replaced("p4_1", nn.MaxPool2d(5, 1, 2)), "wants a MaxPool2d of 3x3"),
    "activation": (lambda: replaced("p4_1", nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.SiLU())), "p4_1.1 is a SiLU"),
    "channels": (lambda: replaced("p2_2", nn.Conv2d(9, 24, 3, padding=1)), "p2_2 takes 9 channels, wants 8"),
    "sync": (
        lambda: nn.SyncBatchNorm.convert_sync_batchnorm(Torchvision(*FLAT)), "branch1.bn is a SyncBatchNorm, not",
    ),
    "no statistics": (
        lambda: replaced_norms(lambda k: nn.BatchNorm2d(k, track_running_stats=False)), "keeps no running statistics",
    ),
    "half affine": (
        lambda: replaced_norms(lambda k: nn.BatchNorm2d(k, affine=k != C1)), "some BatchNorms are affine",
    ),
}  # fmt: skip


def replaced_norms(make):
    block = Torchvision(*FLAT)
    for conv in (m for m in block.modules() if isinstance(m, BasicConv2d)):
        conv.bn = make(conv.bn.num_features)
    return block


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


def test_a_shared_block_is_converted_once():
    block = OldD2l(64, 24, (8, 16), (8, 16), 8)
    model = nn.Sequential(block, block)
    convert_(model)
    assert model[0] is model[1]
    assert len(explain(model).rows) == 1
    assert type(model[0]).__mro__.count(OldD2l) == 1
    convert_(model)
    assert type(model[0]).__mro__.count(OldD2l) == 1


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name", CLIENTS)
def test_copies_and_pickles_are_converted_too(name, twin):
    block, x = convert_(CLIENTS[name]().eval()), images()
    other = twin(block)
    assert type(other) is type(block)
    assert torch.equal(other(x), block(x))
    with torch.no_grad():
        next(other.parameters()).add_(1)
    assert not torch.equal(other(x), block(x))
    revert_(other)
    assert type(other) is type(CLIENTS[name]())


def test_a_saved_module_loads():
    file, block = io.BytesIO(), convert_(OldD2l(C, C1, C2, C3, C4))
    torch.save(block, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert isinstance(loaded, OldD2l)
    assert torch.equal(loaded(images()), block(images())) or torch.equal(loaded.p1_1.weight, block.p1_1.weight)


CHANGES = {
    "a layer replaced": lambda b: setattr(b.branch2, "1", BasicConv2d(8, 24, kernel_size=3, padding=1)),
    "a layer wrapped": lambda b: setattr(b.branch1, "conv", nn.Sequential(b.branch1.conv)),
    "a hook": lambda b: b.branch2.register_forward_hook(lambda m, a, y: 2 * y),
    "training": lambda b: b.train(),
    "statistics gone": lambda b: (
        b.branch1.bn.__setattr__("running_mean", None) or b.branch1.bn.__setattr__("running_var", None)
    ),
    "padding": lambda b: b.branch1.conv.__dict__.update(padding=(1, 1), kernel_size=(3, 3)),
    "a layer more": lambda b: b.branch3.append(nn.Identity()),
}


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "padding"])
def test_what_changes_later_is_honoured(name):
    block = convert_(drawn(Torchvision(*FLAT)).eval())
    CHANGES[name](block)
    twin, x = copy.deepcopy(block), images()
    assert "eager" in explain(block).rows[0].path
    y = block(x)
    torch.testing.assert_close(y, revert_(twin)(x), rtol=1e-5, atol=1e-5)
    buffers = zip(block.buffers(), twin.buffers(), strict=True)
    assert all(torch.allclose(a, b) for a, b in buffers)
    with backend("kernels"), pytest.raises(Exception, match="demands kernels that cannot run"):
        block(x)


def test_training_with_batch_statistics_is_pytorchs():
    """Ten steps of a small network with BatchNorm: the same losses, buffers and checkpoints."""

    def network():
        torch.manual_seed(0)
        return nn.Sequential(
            BasicConv2d(3, C, kernel_size=3, padding=1), Torchvision(*FLAT), nn.MaxPool2d(2),
            Torchvision(64, *FLAT[1:]), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 5),
        ).to(memory_format=torch.channels_last)  # fmt: skip

    def train(model):
        optimizer, losses = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9), []
        torch.manual_seed(1)
        for _ in range(10):
            loss = F.cross_entropy(model(torch.randn(6, 3, 9, 9)), torch.randint(5, (6,)))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    plain, fused = network(), convert_(network())
    assert train(fused) == pytest.approx(train(plain), rel=1e-5)
    for (name, a), (_, b) in zip(plain.state_dict().items(), fused.state_dict().items(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
    x = torch.randn(2, 3, 9, 9)
    network_again = network()
    network_again.load_state_dict(fused.state_dict())
    torch.testing.assert_close(network_again.eval()(x), fused.eval()(x), rtol=1e-5, atol=1e-6)
    fused.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fused(x), plain.eval()(x), rtol=1e-5, atol=1e-6)


def test_a_googlenet_of_torchvisions_shape():
    """Nine blocks with BatchNorm: interpreted kernels in eval; ten training steps; checkpoints both ways."""
    torch.manual_seed(0)
    plain = drawn(torchvision_googlenet()).eval()
    fused, x = convert(plain, strict=True), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        truth = plain(x)
        with backend("kernels"), count() as launches:
            y = fused(x)
        assert len(launches) == 9 * 5
        assert (y - truth).norm() < 1e-5 * truth.norm()
        assert (fused(x) - truth).norm() < 1e-5 * truth.norm()
    losses = []
    # In float64, since statistics over six values amplify every rounding.
    for model in (plain.double(), fused.double()):
        optimizer = torch.optim.SGD(model.train().parameters(), 1e-3, momentum=0.9)
        generator = torch.Generator().manual_seed(1)
        losses.append([])
        for _ in range(10):
            images = torch.randn((6, 3, 32, 32), generator=generator, dtype=torch.float64)
            loss = F.cross_entropy(model(images), torch.randint(1000, (6,), generator=generator))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    plain.load_state_dict(fused.state_dict())
    x = x.double()
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


def test_a_network_of_ours():
    eager = GoogLeNet(block=Inception)
    fused = convert(eager)
    assert [row.state for row in explain(fused).rows] == ["converted"] * 9
    assert {row.state for row in explain(GoogLeNet()).rows} == {"fused"}
    x = torch.randn(2, 1, 40, 40)
    torch.testing.assert_close(fused(x), eager(x), rtol=1e-4, atol=1e-5)
    text = str(explain(fused))
    assert "9 of 9 run as fused blocks" in text
    assert explain(fused).to_json()[0]["name"] == "b3.0"


def test_the_block_for_torchvisions_plug_in_point():
    torch.manual_seed(3)
    ours = TorchvisionInception(*FLAT)
    torch.manual_seed(3)
    theirs = Torchvision(*FLAT)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert (explain(ours).rows[0].state, explain(ours).rows[0].what) == ("converted", "3x3 in branch 3, BatchNorm")
    x = images()
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())
    with torch.no_grad(), backend("kernels"):
        torch.testing.assert_close(ours.eval()(x), theirs.eval()(x), rtol=1e-5, atol=1e-5)

    def leaky(c, k, **kwargs):
        return nn.Sequential(nn.Conv2d(c, k, bias=False, **kwargs), nn.BatchNorm2d(k), nn.LeakyReLU(0.1))

    with pytest.warns(FallbackWarning, match="is a LeakyReLU"):
        assert type(TorchvisionInception(*FLAT, leaky)) is TorchvisionInception


def test_the_innermost_is_the_block():
    class Wrapper(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = FusedInception(C, C1, C2, C3, C4)
            self.other = SomebodysCopy()

        def forward(self, x):
            return self.inner(x) + self.other(x)

    model = convert_(Wrapper())
    assert type(model) is Wrapper
    assert [(row.name, row.state) for row in explain(model).rows] == [("inner", "fused"), ("other", "converted")]
