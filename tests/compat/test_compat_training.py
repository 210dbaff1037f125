"""The block with what trains it: autocast, scalers, DDP and FSDP, checkpoints, averages, pruning, optimizers."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune
from torch.utils.checkpoint import checkpoint

import gloo_ranks
from checks.block_cases import SMALL
from inception_fused import FusedInception, Inception, KernelError, backend
from inception_fused.testing import UNIT_ROUNDOFF, Error, tolerance
from marks import each_once, full, more, quick

BOUND = tolerance(torch.float32, 10**4)

EXACT = tolerance(torch.float32, 1)
"""One rounding: of gradients that are added in another order."""


def _pair(**kwargs) -> tuple[FusedInception, Inception]:
    blocks = []
    for kind in (FusedInception, Inception):
        torch.manual_seed(11)
        blocks.append(kind(*SMALL, **kwargs))
    return blocks[0], blocks[1]


def _x(n: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn((n, 24, 5, 4), generator=torch.Generator().manual_seed(seed))


def _step(module: nn.Module, run=None, x: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    """The output and every gradient that there is, of one step with kernels where the module has some."""
    module.zero_grad()
    leaf = (_x() if x is None else x).requires_grad_()
    y = (run or module)(leaf)
    y.double().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad} | grads


def _assert_alike(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], bound: float = BOUND) -> None:
    assert ours.keys() == theirs.keys()
    for name, t in ours.items():
        assert Error.of(t, theirs[name]).within(bound), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, more(torch.float16)], ids=str)
def test_autocast_with_disabled_regions(dtype):
    """Each block in its region's dtype, gradients in the parameters'; no further from float64 than eager is.

    Without ReLU, whose mask a rounding difference may flip.
    """
    results = []
    for block, wish in zip(_pair(activation=None), ("kernels", "auto"), strict=True):
        inner, seen = copy.deepcopy(block), []
        mix = nn.Conv2d(SMALL.out_channels, 24, 1)
        nn.init.dirac_(mix.weight)
        nn.init.zeros_(mix.bias)
        net = nn.ModuleList((block, mix, inner))

        def run(x, net=net, seen=seen, dtype=dtype):
            with torch.autocast("cpu", dtype=dtype):
                a = net[1](net[0](x))
                with torch.autocast("cpu", enabled=False):
                    b = net[2](a.float())
                    with torch.autocast("cpu", dtype=dtype):
                        c = net[2](a)
                seen += [t.dtype for t in (a, b, c)]
                return b + c

        with backend(wish):
            results.append(_step(net, run))
        assert seen == [dtype, torch.float32, dtype]
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
        exact = copy.deepcopy(net).double()
    results.append(_step(exact, lambda x: 2 * exact[2](exact[1](exact[0](x))), _x().double()))
    ours, theirs, truth = results
    for name, t in truth.items():
        assert Error.of(ours[name], t).rms <= 2 * Error.of(theirs[name], t).rms + tolerance(dtype, 24 * 25), name


def test_a_scaler_skips_a_step_with_an_infinite_gradient():
    block, _ = _pair()
    optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=100)
    before = [p.detach().clone() for p in block.parameters()]
    moved = []
    with backend("kernels"):
        while not moved or not moved[-1]:
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype=torch.float16):
                loss = block(_x()).float().mean(dim=(0, 2, 3)).sum()
            scale = scaler.get_scale()
            scaler.scale(loss).backward()
            finite = all(p.grad.isfinite().all() for p in block.parameters())
            scaler.step(optimizer)
            scaler.update()
            moved.append(any(not torch.equal(p, b) for p, b in zip(block.parameters(), before, strict=True)))
            assert moved[-1] == finite
            assert scaler.get_scale() == (scale if finite else scale / 2)
    assert len(moved) > 1, "no gradient was infinite"


def test_a_nan_reaches_the_output_and_the_scaler():
    """In the same places as in eager, and the step is skipped."""
    places = []
    for block, wish in zip(_pair(), ("kernels", "auto"), strict=True):
        x = _x()
        x[1, 3, 2, 1] = float("nan")
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        before = copy.deepcopy(block.state_dict())
        with backend(wish):
            y = block(x)
            scaler.scale(y.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == 4
        assert all(torch.equal(p, before[name]) for name, p in block.state_dict().items())
        grads = [p.grad for p in block.parameters()]
        places.append([t.isnan() for t in (y, *grads)])
    assert all(torch.equal(a, b) for a, b in zip(*places, strict=True))
    assert places[0][0].any()
    assert not places[0][0].all()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    """What two processes found, and the step of each rank's batch by one process."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(gloo_ranks.main, (str(folder),), nprocs=gloo_ranks.WORLD)
    single = []
    for rank in range(gloo_ranks.WORLD):
        with backend("kernels"):
            single.append(gloo_ranks.step(gloo_ranks.network(), gloo_ranks.batch(rank)))
    return [torch.load(folder / f"{rank}.pt") for rank in range(gloo_ranks.WORLD)], single


@full
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_ranks_average_the_gradients_of_one_process(kind, ranks):
    found, single = ranks
    mean = {name: sum(grads[name] for _, grads in single) / gloo_ranks.WORLD for name in single[0][1]}
    for rank, (loss, _) in enumerate(single):
        assert Error.of(found[rank][kind]["loss"], loss).within(EXACT)
        _assert_alike(found[rank][kind]["grads"], mean, EXACT)


@full
def test_ddp_finds_gradients_in_the_strides_of_its_buckets(ranks):
    """No warning, which a convolution beside it shows to be possible."""
    for rank in ranks[0]:
        assert not rank["ddp"]["warnings"]
        assert "Grad strides do not match bucket view strides" in rank["ddp"]["warnings elsewhere"][0]


@full
def test_shards_never_reach_a_kernel(ranks):
    """FSDP gathers the parameters for the forward of its unit; anywhere else they are DTensors, which are refused."""
    for rank, found in enumerate(ranks[0]):
        fsdp, dtensor = found["fsdp"], found["dtensor"]
        assert fsdp["sharded"]
        assert fsdp["reason"] is None
        assert "tensor subclass DTensor" in fsdp["past the hook"]
        assert fsdp["reason of a sharded child"] == "p2_2 is an FSDPConv2d, not a Conv2d"
        assert Error.of(fsdp["y of a sharded child"], gloo_ranks.network()(gloo_ranks.batch(rank))).within(BOUND)
        assert len(dtensor["refusals"]) == 3
        assert all("tensor subclass DTensor" in text for text in dtensor["refusals"])
        assert Error.of(dtensor["y"], dtensor["expected"]).within(BOUND)


@pytest.mark.parametrize("use_reentrant", [False, more(True)])
def test_checkpoints(use_reentrant):
    block, _ = _pair()
    with backend("kernels"):
        expected = _step(block)
        found = _step(block, lambda x: checkpoint(block, x, use_reentrant=use_reentrant))
    _assert_alike(found, expected, 0.0)


def test_averaged_model():
    block, _ = _pair()
    average = torch.optim.swa_utils.AveragedModel(block, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.75))
    states = []
    with backend("kernels"), torch.no_grad():
        for factor in (1.0, 3.0):
            for p in block.parameters():
                p.mul_(factor)
            average.update_parameters(block)
            states.append(copy.deepcopy(block.state_dict()))
        mean = {name: 0.75 * p + 0.25 * states[1][name] for name, p in states[0].items()}
        expected = torch.func.functional_call(block, mean, (_x(),))
        assert Error.of(average(_x()), expected).within(BOUND)


REWRITES = {
    "p2_2 is a ParametrizedConv2d": (
        lambda block: parametrizations.weight_norm(block.p2_2),
        lambda block: parametrize.remove_parametrizations(block.p2_2, "weight"),
    ),
    "p3_2 has a hook": (
        lambda block: prune.l1_unstructured(block.p3_2, "weight", 0.4),
        lambda block: prune.remove(block.p3_2, "weight"),
    ),
    "p1_1 has a hook": (
        lambda block: prune.ln_structured(block.p1_1, "weight", 0.5, n=2, dim=0),
        lambda block: prune.remove(block.p1_1, "weight"),
    ),
}


@pytest.mark.parametrize("reason", quick(REWRITES, "p3_2 has a hook"))
def test_rewritten_weights_run_in_eager_until_they_are_parameters_again(reason):
    rewrite, restore = REWRITES[reason]
    fused, eager = _pair()
    for block in (fused, eager):
        rewrite(block)
        with torch.no_grad():
            for p in block.parameters():
                p.mul_(1.5)
    assert fused.eager_reason().startswith(reason)
    _assert_alike(_step(fused), _step(eager))
    with backend("kernels"), pytest.raises(KernelError, match=reason):
        fused(_x())
    for block in (fused, eager):
        restore(block)
    with backend("kernels"):
        ours = _step(fused)
    _assert_alike(ours, _step(eager))


def test_clipping_and_accumulation():
    """Three micro-batches add up to the whole one, whose norm is eager's and is cut in place."""
    whole, norms = _x(7), []
    for block, wish in zip(_pair(), ("kernels", "auto"), strict=True):
        block = block.to(memory_format=torch.channels_last)
        with backend(wish):
            expected = _step(block, x=whole.clone())
            block.zero_grad()
            for part in whole.split((2, 4, 1)):
                block(part).square().sum().backward()
        grads = {name: p.grad for name, p in block.named_parameters()}
        _assert_alike(grads, {name: expected[name] for name in grads})
        norm = nn.utils.clip_grad_norm_(block.parameters(), 0.5)
        after = torch.stack([g.double().square().sum() for g in grads.values()]).sum().sqrt()
        assert after.item() == pytest.approx(0.5, rel=1e-5)
        norms.append(norm)
    assert norms[0] > 0.5
    assert Error.of(*norms).within(BOUND)


def test_two_losses():
    block, _ = _pair()
    with backend("kernels"):
        leaf = _x().requires_grad_()
        y = block(leaf)
        y[:, ::2].sum().backward(retain_graph=True)
        y[:, 1::2].square().sum().backward()
        apart = [leaf.grad, *(p.grad.clone() for p in block.parameters())]
        leaf, _ = _x().requires_grad_(), block.zero_grad()
        y = block(leaf)
        (y[:, ::2].sum() + y[:, 1::2].square().sum()).backward()
        with pytest.raises(RuntimeError, match="second time"):
            y.sum().backward()
    for a, b in zip(apart, [leaf.grad, *(p.grad for p in block.parameters())], strict=True):
        assert Error.of(a, b).within(BOUND)


@each_once
@pytest.mark.parametrize("frozen", [("p2_1", "p3_2"), ("p1_1", "p2_2", "p4_2"), ("p2_1.bias", "p3_1.weight")])
@pytest.mark.parametrize("of_x", [True, False], ids=["dx", "no dx"])
def test_frozen_parameters(frozen, of_x):
    """They get no gradient, and the others theirs."""
    block, eager = _pair()
    expected = _step(eager)
    for name, p in block.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    x = _x().requires_grad_(of_x)
    with backend("kernels"):
        block(x).square().sum().backward()
    assert (x.grad is not None) == of_x
    for name, p in block.named_parameters():
        assert (p.grad is None) == name.startswith(frozen), name
        if p.grad is not None:
            assert Error.of(p.grad, expected[name]).within(BOUND), name


OPTIMIZERS = {
    "SGD": lambda p, **how: torch.optim.SGD(p, lr=0.02, momentum=0.9, **how),
    "AdamW": lambda p, **how: torch.optim.AdamW(p, lr=0.01, eps=1e-3, **how),
}


@full
@pytest.mark.parametrize("optimizer", quick(OPTIMIZERS, "AdamW"))
def test_optimizers_foreach_and_fused(optimizer):
    """Two steps of each implementation end where eager's block with a plain loop does; weights in channels_last."""
    ends = []
    for how in ({"foreach": False}, {"foreach": True}, {"fused": True}):
        fused, eager = (block.to(memory_format=torch.channels_last) for block in _pair())
        block, wish = (eager, "auto") if not ends else (fused, "kernels")
        steps = OPTIMIZERS[optimizer](block.parameters(), **how)
        begin = [p.detach().clone() for p in block.parameters()]
        with backend(wish):
            for i in range(2):
                steps.zero_grad()
                block(_x(seed=i)).square().mean().backward()
                steps.step()
        ends.append([p.detach() - b for p, b in zip(block.parameters(), begin, strict=True)])
    for other in ends[1:]:
        for p, a, b in zip(begin, other, ends[0], strict=True):
            assert b.any()
            # Beside a movement, the rounding of the parameter itself is larger than beside the parameter.
            rounding = 2 * UNIT_ROUNDOFF[p.dtype] * (p.abs().max() / b.square().mean().sqrt()).item()
            assert Error.of(a, b).within(BOUND + rounding)


def test_a_step_inside_backward():
    """Hooks that step as soon as a gradient is complete see each parameter once, with all of it."""
    block, eager = _pair()
    expected, seen = _step(eager), {}

    def take(p: nn.Parameter) -> None:
        seen.setdefault(names[p], []).append(p.grad)
        p.grad = None

    names = {p: name for name, p in block.named_parameters()}
    for p in names:
        p.register_post_accumulate_grad_hook(take)
    with backend("kernels"):
        block(_x()).square().sum().backward()
    assert all(len(grads) == 1 for grads in seen.values())
    _assert_alike({name: grads[0] for name, grads in seen.items()}, {name: expected[name] for name in names.values()})
