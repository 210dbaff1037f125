"""A converted block whose BatchNorm trains under what repeats, copies, compiles, traces, transforms and distributes it,
and by the interpreted kernels."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

from inception_fused import KernelError, backend
from inception_fused.op import reasons
from marks import full, quick
from training_blocks import assert_alike, assert_near, image, layers, pair, step


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
