"""A converted block whose BatchNorm trains, beside the original: outputs, gradients and every buffer, step by step.

On a CPU, where "auto" is PyTorch's own layers, ``twins`` lets it take the ATen twins of the kernels, in float64, so
that no rounding can flip a mask."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from cifar_models import ALIGNED, CLIENTS
from clients import FLAT, Torchvision, drawn
from inception_fused import KernelError, backend, convert, revert_
from inception_fused.conversion import batch_norm_training
from inception_fused.op import normed_autograd, reasons
from inception_fused.testing import Error, tolerance
from marks import full, more, quick


class FiveByFive(nn.Module):
    """GoogLeNet's sizes of windows, with biases. bare: places of the convolutions without BatchNorm."""

    def __init__(self, c, c1, c2r, c2, c3r, c3, c4, bare=(), **options):
        super().__init__()
        sizes = ((c, c1, 1), (c, c2r, 1), (c2r, c2, 3), (c, c3r, 1), (c3r, c3, 5), (c, c4, 1))

        def conv(i):
            c, k, side = sizes[i]
            norm = [] if i in bare else [nn.BatchNorm2d(k, **options)]
            return [nn.Conv2d(c, k, side, padding=side // 2), *norm, nn.ReLU()]

        self.first = nn.Sequential(*conv(0))
        self.second = nn.Sequential(*conv(1), *conv(2))
        self.third = nn.Sequential(*conv(3), *conv(4))
        self.fourth = nn.Sequential(nn.MaxPool2d(3, 1, 1), *conv(5))

    def forward(self, x):
        return torch.cat((self.first(x), self.second(x), self.third(x), self.fourth(x)), 1)


BLOCKS = {
    "torchvision": lambda: Torchvision(*FLAT),
    "cifar": lambda: CLIENTS["kuangliu"].block(*ALIGNED),
    "5x5": lambda: FiveByFive(*FLAT),
    "5x5, some bare": lambda: FiveByFive(*FLAT, bare=(1, 4)),
    "5x5, not affine": lambda: FiveByFive(*FLAT, affine=False),
    "5x5, momentum None": lambda: FiveByFive(*FLAT, momentum=None),
}


def tracked(block):
    """With statistics and vectors that are no identity, where it has some."""
    for norm in layers(block):
        if norm.affine:
            nn.init.normal_(norm.weight, 1.0, 0.3)
            nn.init.normal_(norm.bias, std=0.3)
    return drawn(block)


def layers(block):
    return [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]


def pair(name="5x5", dtype=torch.float64):
    """(converted, original), in training."""
    torch.manual_seed(7)
    plain = tracked(BLOCKS[name]()).to(dtype)
    return convert(plain, strict=True), plain


@pytest.fixture
def calls(monkeypatch):
    """The calls of the block that took the operators: (x, params)."""
    made, run = [], normed_autograd.normed_call

    def seen(x, params, **options):
        made.append((x.shape, x.dtype))
        return run(x, params, **options)

    monkeypatch.setattr(batch_norm_training, "normed_call", seen)
    return made


@pytest.fixture
def twins(monkeypatch, calls):
    """Within it "auto" takes the operators on a CPU too, which run the kernels' ATen twins; the calls that did."""
    left = tuple(reason for reason in reasons.CALL if reason is not reasons._device_of_auto)
    assert len(left) == len(reasons.CALL) - 1
    monkeypatch.setattr(reasons, "CALL", left)
    return calls


def image(seed=0, n=3, dtype=torch.float64):
    return torch.randn((n, FLAT[0], 5, 4), generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(block, x, run=None, wants_x=True):
    """y, the gradients, and every buffer after it."""
    x = x.detach().clone().requires_grad_(wants_x)
    y = (block if run is None else run)(x)
    block.zero_grad(set_to_none=True)
    if y.requires_grad:
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(3)).to(y.dtype))
    found = {"y": y.detach(), "d x": x.grad}
    found |= {f"d {name}": p.grad for name, p in block.named_parameters()}
    return found | {name: b.clone() for name, b in block.named_buffers()}


def assert_alike(ours, theirs, bound=1e-9):
    assert ours.keys() == theirs.keys()
    for name, t in theirs.items():
        assert (ours[name] is None) == (t is None), name
        if t is not None:
            assert (ours[name].dtype, ours[name].shape) == (t.dtype, t.shape), name
            # The gradient of a bias before a mean is 0, or what rounding leaves of it.
            torch.testing.assert_close(ours[name], t, rtol=bound, atol=bound, msg=lambda text, at=name: f"{at}: {text}")


def descend(block, rate=0.01):
    with torch.no_grad():
        for p in block.parameters():
            if p.grad is not None:
                p.sub_(p.grad, alpha=rate)


@pytest.mark.parametrize("name", BLOCKS)
def test_steps(name, twins):
    """Three steps of descent, a call in eval between them, and the state dict after them."""
    fused, plain = pair(name)
    for i in range(3):
        assert_alike(*(step(block, image(i)) for block in (fused, plain)))
        for block in (fused, plain):
            descend(block)
        assert len(twins) == 1 + i
        if i == 1:
            assert_alike(*(step(block.eval(), image(9)) for block in (fused, plain)))
            assert len(twins) == 2
            fused.train(), plain.train()
    assert list(fused.state_dict()) == list(plain.state_dict())
    revert_(fused)
    assert_alike(*(step(block.train(), image(5)) for block in (fused, plain)))


def _momenta(block):
    for norm, momentum in zip(layers(block), (0.3, None, 0.0, 1.0, 0.01, 1), strict=False):
        norm.momentum = momentum


def _eps(block):
    for i, norm in enumerate(layers(block)):
        norm.eps = (0.5, 1, 1e-12)[i % 3]


def _untracked(block):
    """Of two: one that has other attributes than at its conversion is left to PyTorch's layers."""
    for norm in layers(block)[:2]:
        norm.track_running_stats = False


def _dropped(block):
    """In eval too theirs are then those of the batch."""
    for norm in layers(block)[1:4]:
        norm.running_mean = norm.running_var = norm.num_batches_tracked = None
    layers(block)[2].eval()


def _uncounted(block):
    for norm, momentum in zip(layers(block)[:2], (None, 0.3), strict=True):
        norm.num_batches_tracked, norm.momentum = None, momentum


def _frozen(block):
    for norm in layers(block)[::2]:
        norm.eval()


def _frozen_parameters(block):
    _frozen(block)
    for norm in layers(block)[::2]:
        norm.requires_grad_(False)


def _no_affine(block):
    layers(block)[1].bias = None
    layers(block)[2].weight = None


CHANGES = {
    "momenta": _momenta, "eps": _eps, "not tracked": _untracked, "frozen layers": _frozen, "dropped": _dropped,
    "uncounted": _uncounted,
    "frozen with their parameters": _frozen_parameters, "a vector less": _no_affine,
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", quick(["cifar", "5x5"], "cifar"))
def test_what_changes_between_calls(change, name, twins):
    fused, plain = pair(name)
    for i in range(3):
        if i == 1:
            for block in (fused, plain):
                CHANGES[change](block)
        assert_alike(*(step(block, image(i)) for block in (fused, plain)))
    assert len(twins) == (1 if change == "not tracked" else 3)


SUBSETS = {
    "x alone": ("",), "gammas": (".bn.weight",), "betas of branch 2": ("branch2.0.bn.bias", "branch2.1.bn.bias"),
    "a weight": ("branch3.0.conv.weight",), "the last weights": ("branch3.1.conv", "branch4.1.conv", "branch1.conv"),
}  # fmt: skip


@pytest.mark.parametrize("wants_x", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("subset", SUBSETS)
def test_some_gradients(subset, wants_x, twins):
    fused, plain = pair("torchvision")
    for block in (fused, plain):
        for name, p in block.named_parameters():
            p.requires_grad_(any(part and part in name for part in SUBSETS[subset]))
    assert_alike(*(step(block, image(), wants_x=wants_x) for block in (fused, plain)))
    assert len(twins) == 1


@pytest.mark.parametrize("grad", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_statistics_move_without_gradients_too(grad, twins):
    fused, plain = pair("cifar")
    for i in range(2):
        with grad():
            ys = [block(image(i)) for block in (fused, plain)]
        torch.testing.assert_close(*(y.clone() for y in ys), rtol=1e-9, atol=1e-9)
    assert_alike(*(step(block, image()) for block in (fused, plain)))
    assert len(twins) == 3


def test_batches_of_one_value_and_of_none(twins):
    """PyTorch's own words, statistics and all."""
    fused, plain = pair("torchvision")
    for shape in ((1, FLAT[0], 1, 1), (0, FLAT[0], 3, 3)):
        found = []
        for block in (fused, plain):
            try:
                found.append(tuple(block(torch.ones(shape, dtype=torch.float64)).shape))
            except ValueError as error:
                found.append(str(error))
        assert found[0] == found[1]
    assert "more than 1 value per channel" in found[0] or found[0][0] == 0
    assert not twins
    for (name, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        assert torch.equal(a.nan_to_num(7), b.nan_to_num(7)), name
    one = torch.randn(1, FLAT[0], 1, 2, dtype=torch.float64)
    assert_alike(*(step(block, one) for block in pair("torchvision")), 1e-6)


def assert_near(ours, theirs, truth, dtype):
    """As near to float64 as PyTorch's own layers are. In a gradient some masks that rounding flips may be more."""
    for key, t in truth.items():
        assert (ours[key].dtype, ours[key].stride()) == (theirs[key].dtype, theirs[key].stride()) or key in ("y", "d x")
        if t.double().abs().max() < 1e-9:
            # Of a bias before a mean.
            continue
        errors = [Error.of(found[key], t).rms for found in (ours, theirs)]
        flips = (0.25 if dtype.itemsize == 2 else 1e-3) if key.startswith("d ") else 0
        assert errors[0] <= 3 * errors[1] + 2 * tolerance(dtype, 60) + flips, (key, errors)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, more(torch.float16)], ids=str)
@pytest.mark.parametrize("name", quick(BLOCKS, "torchvision"))
def test_fewer_bits(name, dtype, twins):
    """A model in them, buffers too."""
    fused, plain = pair(name)
    exact = copy.deepcopy(plain)
    fused, plain = fused.to(dtype), plain.to(dtype)
    exact.load_state_dict(plain.state_dict())
    for i in range(2):
        x = image(i).to(dtype)
        assert_near(step(fused, x), step(plain, x), step(exact, x.double()), dtype)
        assert len(twins) == 1 + i


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_and_a_scaler(dtype, twins):
    """Of fp32 parameters, whose gradients and statistics stay that; the step of an infinite loss is left out."""
    fused, plain = pair("cifar", torch.float32)
    exact = copy.deepcopy(plain).double()
    x, found = image(dtype=torch.float32), []
    for block in (fused, plain):
        with torch.autocast("cpu", dtype=dtype):
            found.append(step(block, x))
    assert twins == [(x.shape, dtype)]
    assert_near(*found, step(exact, x.double()), dtype)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**15)
    optimizer = torch.optim.SGD(fused.parameters(), lr=0.1)
    before = [p.detach().clone() for p in fused.parameters()]
    for factor, moves in ((1e8, False), (1e-3, True)):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=dtype):
            loss = (fused(x).float() * factor).square().sum()
        scaler.scale(loss if moves else loss * 1e30).backward()
        scaler.step(optimizer)
        scaler.update()
        assert moves != all(map(torch.equal, fused.parameters(), before))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints_move_statistics_as_often(use_reentrant, twins):
    fused, plain = pair("torchvision")
    for block in (fused, plain):
        block.found = step(block, image(), lambda x, b=block: checkpoint(b, x, use_reentrant=use_reentrant))
    assert_alike(fused.found, plain.found)
    assert len(twins) in (0, 2)


def test_copies_pickles_and_state_dicts(twins):
    fused, plain = pair("cifar")
    step(fused, image(1)), step(plain, image(1))
    saved = io.BytesIO()
    torch.save(fused.state_dict(), saved)
    saved.seek(0)
    fresh, _ = pair("cifar")
    fresh.load_state_dict(torch.load(saved))
    expected = step(plain, image(2))
    for block in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused)), fresh, fused):
        twins.clear()
        assert_alike(step(block, image(2)), expected)
        assert len(twins) == 1


@pytest.mark.parametrize("name", quick(["torchvision", "cifar", "5x5, some bare"], "torchvision"))
def test_compiled(name, twins, full_run):
    """In one graph, where PyTorch's own layers are one too; statistics move as they do there."""
    torch._dynamo.reset()
    fused, plain = pair(name)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    for i in range(2):
        assert_alike(step(fused, image(i), compiled), step(plain, image(i)))
    if full_run:
        for block in (fused, plain):
            layers(block)[0].momentum = 0.7
            layers(block)[1].eval()
        assert_alike(step(fused, image(4), compiled), step(plain, image(4)))
    assert twins


def test_graphs_that_outlive_the_call(twins):
    """torch.export, torch.jit.trace and symbolic tracing keep PyTorch's layers, whose statistics move."""
    fused, plain = pair("torchvision")
    x = image()
    exported = torch.export.export(fused, (x,)).module()
    traced = torch.jit.trace(copy.deepcopy(fused), (x,), check_trace=False)
    symbolic = torch.fx.symbolic_trace(copy.deepcopy(fused))
    for graph in (exported, traced, symbolic):
        block = copy.deepcopy(plain)
        graph.load_state_dict(block.state_dict())
        assert_alike(step(graph, x), step(block, x))
    model, others = (nn.Sequential(block) for block in pair("torchvision"))
    twins.clear()
    symbolic = torch.fx.symbolic_trace(model)
    assert "call_module" in [node.op for node in symbolic.graph.nodes]
    assert_alike(step(symbolic, x), step(others, x))
    assert len(twins) == 1, "a child that is kept as a call is the converted block"


def test_torch_func(twins):
    """The layers' own path, statistics in the dict that was given."""
    fused, plain = pair("torchvision")
    x, found = image(), []
    for block in (fused, plain):
        params = {name: p.detach().clone() for name, p in block.named_parameters()}
        buffers = {name: b.detach().clone() for name, b in block.named_buffers()}

        def loss(params, buffers, block=block):
            return torch.func.functional_call(block, (params, buffers), (x,)).square().sum(), buffers

        value, _ = loss(params, buffers)
        grads, moved = torch.func.grad(loss, has_aux=True)(params, buffers)
        found.append({"loss": value} | grads | {f"moved {name}": b for name, b in moved.items()} | buffers)
    assert_alike(*found)
    assert len(twins) == 1, "functional_call alone runs the block"
    with backend("kernels"), pytest.raises(KernelError, match=r"torch\.func"):
        torch.func.grad(lambda x: fused(x).sum())(x)


def test_replicas(twins):
    """As DataParallel makes them: modules whose parameters are plain tensors."""
    fused, plain = pair("torchvision")
    replicas = []
    for block in (fused, plain):
        replica = copy.copy(block)
        memo = {}

        def replicate(module, memo=memo):
            if module not in memo:
                memo[module] = module._replicate_for_data_parallel()
                memo[module]._modules = {k: replicate(m) for k, m in module._modules.items()}
                for kind in ("_parameters", "_buffers"):
                    own = getattr(module, kind)
                    setattr(memo[module], kind, {k: t if t is None else t.clone() for k, t in own.items()})
            return memo[module]

        replica = replicate(block)
        y = replica(image())
        grads = torch.autograd.grad(y.square().sum(), list(block.parameters()))
        replicas.append({"y": y.detach()} | dict(enumerate(grads)) | dict(replica.named_buffers()))
    assert_alike(*replicas)
    assert len(twins) == 1


def _rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    left = tuple(reason for reason in reasons.CALL if reason is not reasons._device_of_auto)
    reasons.CALL = left
    try:
        found = []
        for block in pair("torchvision"):
            model = nn.parallel.DistributedDataParallel(block, broadcast_buffers=True)
            found.append([step(model, image(10 * i + rank, 2 + rank)) for i in range(2)])
        torch.save(found, f"{folder}/{rank}.pt")
    finally:
        dist.destroy_process_group()


@full
def test_ranks_of_ddp(tmp_path):
    torch.multiprocessing.spawn(_rank, (str(tmp_path),), nprocs=2)
    for rank in range(2):
        for ours, theirs in zip(*torch.load(tmp_path / f"{rank}.pt"), strict=True):
            assert_alike(ours, theirs)


@pytest.mark.parametrize("name", quick(["5x5", "cifar", "5x5, some bare"], "cifar"))
def test_kernels(name, calls):
    """The interpreter's, from the third call on from memory: the same bits of the same input, statistics that move."""
    fused, plain = pair(name, torch.float32)
    exact = copy.deepcopy(plain).double()
    runs = []
    for _ in range(4 if name == "cifar" else 1):
        with backend("kernels"):
            ours = step(fused, image(dtype=torch.float32))
        assert_near(ours, step(plain, image(dtype=torch.float32)), step(exact, image()), torch.float32)
        runs.append(ours)
    assert len(calls) == len(runs)
    for again in runs[1:]:
        assert all(torch.equal(again[key], t) for key, t in runs[0].items() if key[:2] in ("y", "d "))
