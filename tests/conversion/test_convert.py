"""convert, revert_ and explain on blocks from other people's code."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases.networks import torchvision_googlenet
from clients import (
    C1,
    C2,
    C3,
    C4,
    CLIENTS,
    FLAT,
    BasicConv2d,
    C,
    NewD2l,
    OldD2l,
    SomebodysCopy,
    Torchvision,
    drawn,
    images,
)
from inception_fused import (
    FallbackWarning,
    FusedInception,
    GoogLeNet,
    Inception,
    TorchvisionInception,
    backend,
    convert,
    convert_,
    explain,
    revert_,
)
from inception_fused.runtime.submit import count
from marks import full


@pytest.mark.parametrize("name", CLIENTS)
def test_a_converted_block_runs_the_kernels_and_computes_the_same(name):
    block = drawn(CLIENTS[name]()).eval()
    fused, x = convert(block), images()
    with torch.no_grad(), backend("kernels"), count() as launches:
        y = fused(x)
    assert len(launches) == 3, "its 3x3 and 5x5 weights are rewritten by pack"
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
    assert [p.stride() for p in parameters] == strides
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


def test_called_by_name():
    block, x = convert_(SomebodysCopy()), images()
    with torch.no_grad(), backend("kernels"), count() as launches:
        y = block(inputs=x)
    assert len(launches) == 3
    torch.testing.assert_close(y, block(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(TypeError, match="unexpected keyword argument 'x'"):
        block(x=x)


@pytest.mark.parametrize("name", CLIENTS)
def test_channels_last_weights_on_demand_save_a_launch(name):
    block = drawn(CLIENTS[name]()).eval()
    parameters, x = list(block.parameters()), images()
    strides, truth = [p.stride() for p in parameters], block(x)
    convert_(block, channels_last=True)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in parameters if p.dim() == 4)
    with torch.no_grad(), backend("kernels"), count() as launches:
        y = block(x)
    assert len(launches) == 2 + (name == "torchvision"), "pack folds BatchNorm whatever the weights are"
    torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    revert_(block)
    assert all(a is b for a, b in zip(block.parameters(), parameters, strict=True))
    assert [p.stride() for p in parameters] == strides
    assert torch.equal(block(x), truth)
    assert not [key for module in block.modules() for key in module.__dict__ if "inception_fused" in key]


@pytest.mark.parametrize("channels_last", [False, True], ids=["KCRS", "KRSC"])
def test_a_lazy_block_before_and_after_its_first_input(channels_last):
    before, after, x = NewD2l(C1, C2, C3, C4), NewD2l(C1, C2, C3, C4), images()
    after(x)
    convert_(after, channels_last=channels_last)
    convert_(before, channels_last=channels_last)
    assert "wait for the first input" in explain(before).rows[0].path
    first = before(x)
    assert type(before.b1_1) is nn.Conv2d
    assert before.b2_2.weight.is_contiguous(memory_format=torch.channels_last) == channels_last
    for block in (before, after):
        truth = NewD2l.forward(block, x)
        with torch.no_grad(), backend("kernels"), count() as launches:
            y = block(x)
        assert len(launches) == (2 if channels_last else 3)
        torch.testing.assert_close(y, truth, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(first, NewD2l.forward(before, x))


def test_channels_last_asked_for_while_a_lazy_block_waits():
    block = convert_(NewD2l(C1, C2, C3, C4))
    convert_(block, channels_last=True)
    block(images())
    assert block.b2_2.weight.is_contiguous(memory_format=torch.channels_last)


def test_a_lazy_block_that_computes_something_else_is_refused_after_its_first_input():
    class Doubled(NewD2l):
        def forward(self, x):
            return 2 * super().forward(x)

    block, x = convert_(Doubled(C1, C2, C3, C4)), images()
    block(x)
    assert "something else" in explain(block).rows[0].path
    torch.testing.assert_close(block(x), Doubled.forward(block, x))


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
    x = images()
    assert torch.equal(loaded(x), block(x))


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


@full
def test_a_googlenet_of_torchvisions_shape():
    """Nine blocks with BatchNorm: interpreted kernels in eval; ten training steps; checkpoints both ways."""
    torch.manual_seed(0)
    plain = drawn(torchvision_googlenet()).eval()
    fused, x = convert(plain, strict=True), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        truth = plain(x)
        with backend("kernels"), count() as launches:
            y = fused(x)
        assert len(launches) == 9 * 3
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
    assert "9 of 9 are fused blocks; 0 of 9 run kernels now, because x is on the CPU" in text
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


class Partly(nn.Module):
    """Torchvision's block, BatchNorm where ``norms`` says so and a bias where it does not, or behind none of either."""

    def __init__(self, norms: str):
        super().__init__()
        behind = iter(norms)

        def conv(c, k, r=1):
            kind = next(behind)
            layers = [nn.Conv2d(c, k, r, padding=r // 2, bias=kind == "b")]
            return nn.Sequential(*layers, *[nn.BatchNorm2d(k, k, affine=kind == "n")] * (kind in "nN"), nn.ReLU())

        self.branches = nn.ModuleList(
            [
                conv(C, C1), nn.Sequential(conv(C, C2[0]), conv(*C2, 3)), nn.Sequential(conv(C, C3[0]), conv(*C3, 3)),
                nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(C, C4)),
            ]
        )  # fmt: skip

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


@pytest.mark.parametrize("norms", ["nbnbnb", "bnnnnn", "nNnNnN", "n-n-b-", "bbb-bb", "NNNNNN"])
def test_batch_norm_and_bias_behind_some_convolutions(norms):
    """n: BatchNorm with an integer eps, N: without gamma and beta, b: a bias alone, -: neither."""
    block = drawn(Partly(norms)).eval()
    fused, x = convert(block, strict=True), images().requires_grad_()
    truth = torch.autograd.grad(block(x).square().mean(), (x, *block.parameters()))
    with backend("kernels"), count() as launches:
        y = fused(x)
        found = torch.autograd.grad(y.square().mean(), (x, *fused.parameters()))
    assert len(launches) == 3 + 11
    torch.testing.assert_close(y, block(x), rtol=1e-5, atol=1e-5)
    for ours, eager in zip(found, truth, strict=True):
        torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
    behind = sum(kind in "nN" for kind in norms)
    said = {0: "", 6: ", BatchNorm"}.get(behind, f", BatchNorm behind {behind} of 6")
    assert explain(fused).rows[0].what == f"3x3 in branch 3{said}"
