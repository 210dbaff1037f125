"""verify, parity, precompile and checked mode of blocks whose BatchNorm trains: the forward that training runs."""

import copy
import re

import pytest
import torch
from torch import nn

from inception_fused import KernelError, TorchvisionInception, backend, convert_, precompile, verify
from inception_fused.conversion.fused_blocks import view_of
from inception_fused.op import checking, launcher, normed, normed_operators, operators
from inception_fused.runtime.submit import count
from inception_fused.testing import assert_parity, parity
from inception_fused.tools.measuring import Launches
from marks import each_once
from training.networks import NormedInception

SIZES = (24, 16, 8, 24, 8, 16, 8)
CONVS = ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2")
X = torch.randn(2, 24, 5, 7, generator=torch.Generator().manual_seed(1)).contiguous(memory_format=torch.channels_last)


def make(kind="usual"):
    """A block in training mode with biases before BatchNorm where branch 3 has two windows."""
    torch.manual_seed(3)
    if kind == "two windows":
        return convert_(NormedInception(24, 16, (8, 24), (8, 16), 8)).train()
    block = TorchvisionInception(*SIZES).train()
    if kind == "frozen":
        # Running statistics that are not those of the start.
        block(X + 1)
        block.branch2.eval()
    return block


def state_of(model):
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_unchanged(model, before):
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.fixture(scope="module")
def verified():
    """A model in training with a block in either mode, and what it had before."""
    model = nn.Sequential(make(), TorchvisionInception(64, *SIZES[1:]).eval()).to(memory_format=torch.channels_last)
    before = state_of(model)
    with backend("kernels"):
        found = verify(model, X)
    assert_unchanged(model, before)
    return found


def test_the_block_that_trains_is_verified_so(verified):
    training, frozen = verified.rows
    names = [f"branch {i}" for i in range(1, 5)]
    names += [f"{kind} {conv}" for conv in CONVS for kind in ("mean", "var")]
    names += ["d x", *(f"d {conv}.weight" for conv in CONVS)]
    names += [f"d {conv} batch_norm.{field}" for field in ("gamma", "beta") for conv in CONVS]
    assert [row.what for row in training.parity] == names
    assert [row.what for row in frozen.parity] == [*names[:4], *names[16:23]], "in eval as ever"
    assert verified.ok
    assert "N1 triton" in training.why
    assert "B1" not in training.why
    assert "N1" not in frozen.why


def test_its_words(verified):
    text = str(verified)
    assert max(map(len, text.splitlines())) <= 120
    assert text.endswith("ok: every slice, statistic and gradient of 2 blocks is within its bound")
    assert (
        "a block's four slices, the batch's statistics and the gradients of x, weights, biases, gammas and betas"
    ) in " ".join(text.split())


def test_its_costs(verified):
    """Eager's BatchNorm is one operator forward and one backward. Ours holds what the convolutions gave, r, four bits
    an element of x and five numbers a channel."""
    costs, (_, c1, k2, c2, k3, c3, c4) = verified.rows[0].costs, SIZES
    assert costs.launches_forward == (Launches(8, 0), Launches(0, 20))
    assert costs.launches_backward == (Launches(15, 0), Launches(0, 22))
    pixels, k, r = 2 * 5 * 7, c1 + c2 + c3 + c4, k2 + k3
    assert costs.held_bytes.fused == pixels * (4 * (k + 2 * r) + SIZES[0] // 2) + 4 * 5 * (k + r)
    assert costs.held_bytes.fused < costs.held_bytes.eager / 2


@pytest.mark.parametrize(("kind", "forward", "backward"), [("usual", 11, 15), ("two windows", 15, 19)])
def test_launches_one_by_one(kind, forward, backward):
    """Without pairs, and with the launch that rewrites weights of PyTorch's layout."""
    block = make(kind)
    with backend("kernels"), launcher.apart(), count() as launches:
        y = block(X.clone().requires_grad_())
        made = len(launches)
        y.sum().backward()
    assert (made, len(launches) - made) == (forward, backward)


@each_once
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", ["usual", "two windows", "frozen"])
def test_parity(kind, dtype):
    block = make(kind).to(dtype)
    before = state_of(block)
    with backend("kernels"):
        rows = assert_parity(block, X.to(dtype))
    assert_unchanged(block, before)
    names = [row.what for row in rows]
    assert ("mean p2_1" in names) == (kind != "frozen"), "frozen statistics are not the batch's"
    assert "d p2_2 batch_norm.gamma" in names
    assert not [name for name in names if name.endswith(".bias")], "before the batch's mean it is 0"


def test_parity_of_biases_before_frozen_statistics():
    block = make("two windows")
    block.three.eval()
    with backend("kernels"):
        names = [row.what for row in assert_parity(block, X)]
    assert [name for name in names if name.endswith(".bias")] == ["d p2_1.bias", "d p2_2.bias"]


def test_parity_of_eager_has_no_statistics_of_ours():
    names = [row.what for row in assert_parity(make(), X)]
    assert not [name for name in names if name.startswith(("mean ", "var "))]
    assert "d p1_1 batch_norm.beta" in names


@pytest.mark.parametrize("row", [0, 2], ids=["mean", "variance"])
def test_wrong_statistics_are_found(row, monkeypatch):
    launch = normed.launch_normed

    def spoilt(launcher, call, y, saved):
        launch(launcher, call, y, saved)
        saved.stats[row, :16] += 1e-3

    monkeypatch.setattr(normed, "launch_normed", spoilt)
    with backend("kernels"):
        bad = [found.what for found in parity(make(), X, backward=False) if not found.ok]
    assert bad == [f"{'mean' if row == 0 else 'var'} p1_1"]


def test_a_view_has_the_statistics_of_its_mode():
    block = make("frozen")
    norms = view_of(block).params().batch_norms
    assert [norm.mean is None for norm in norms] == [True, False, False, True, True, True]
    assert [norm.var is None for norm in norms] == [norm.mean is None for norm in norms]
    assert all(norm.mean is not None for norm in view_of(block).params_in_eval().batch_norms)
    assert all(norm.mean is not None for norm in view_of(block.eval()).params().batch_norms)


@pytest.mark.parametrize("spoilt", [0, 3, 8, 16], ids=["x", "a weight", "a beta", "a gamma"])
def test_checked_mode_finds_a_wrong_gradient(spoilt, monkeypatch):
    """Fields of the operator's outputs: x, weights, then gamma, beta and bias of each convolution."""
    plan = normed_operators._planned_backward

    def wrong(call):
        grads = plan(call)
        grads[spoilt].mul_(1.03)
        return grads

    name = {0: "d x", 3: "d p2_2.weight", 8: "d p1_1 batch_norm.beta", 16: "d p3_1 batch_norm.gamma"}[spoilt]
    with backend("kernels"), checking.checked():
        make()(X.clone().requires_grad_()).sin().sum().backward()
        monkeypatch.setattr(normed_operators, "_planned_backward", wrong)
        with pytest.raises(KernelError, match=rf"\(24, 16, \(8, 24\), \(8, 16\), 8\).*: {re.escape(name)} differs"):
            make()(X.clone().requires_grad_()).sin().sum().backward()


@pytest.mark.parametrize("kind", ["two windows", "frozen"])
def test_checked_mode_passes_what_is_right(kind, monkeypatch):
    """With a gamma, a beta and a weight that want no gradient, and biases, of which no value is kept."""
    seen, judge = [], checking._judge
    monkeypatch.setattr(checking, "_judge", lambda what, *a: (seen.append(what), judge(what, *a))[1])
    block = make(kind)
    convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    for t in (convs[0].weight, norms[1].weight, norms[2].bias):
        t.requires_grad_(False)
    with backend("kernels"), checking.checked():
        block(X.clone().requires_grad_()).sin().sum().backward()
    wanted = {"branch 1", "d x", "d p2_1.weight", "d p1_1 batch_norm.gamma", "d p2_1 batch_norm.beta"}
    assert wanted <= set(seen)
    assert not {"d p1_1.weight", "d p2_1 batch_norm.gamma", "d p2_2 batch_norm.beta", "d p1_1.bias"} & set(seen)


@pytest.fixture
def planned(monkeypatch):
    """What was planned, in order."""
    calls = []
    for module, names in ((normed_operators, ("_planned", "_planned_backward")), (operators, ("_planned_forward",))):
        for name in names:
            plan, kind = getattr(module, name), f"normed{name}" if module is normed_operators else name
            monkeypatch.setattr(module, name, lambda *a, _k=kind, _p=plan: (calls.append(_k), _p(*a))[1])
    return calls


def test_precompile_remembers_training_and_the_test_after_it(planned):
    model = nn.Sequential(nn.Conv2d(24, 24, 1), make())
    before, fresh = state_of(model), copy.deepcopy(model)
    with backend("kernels"):
        found = precompile(model, X, progress=False)
        assert_unchanged(model, before)
        assert (found.blocks, found.skipped) == (("1",), {})
        # Recorded once, planned twice, of either layout of dy, without and with gradients, and in eval.
        assert [planned.count(kind) for kind in dict.fromkeys(planned)] == [1 + 1 + 2 * 2, 2 + 2 * 2, 1 + 2]
        planned.clear()
        for dense in (False, True):
            y = fresh(X)
            dy = torch.ones_like(y)
            y.backward(dy.contiguous() if dense else dy)
        with torch.no_grad():
            fresh(X)
            fresh.eval()(X)
    assert planned == []


def test_precompile_without_backward(planned):
    with backend("kernels"):
        precompile(make().requires_grad_(False), X, progress=False)
    assert set(planned) == {"normed_planned", "_planned_forward"}
