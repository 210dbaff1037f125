"""What goes by the strides and the storage of parameters, with models that are converted: before, during and after."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import memory_ranks
from clients import C1, C2, C3, C4, CLIENTS, C, NewD2l, OldD2l, drawn, images
from inception_fused import FusedInception, backend, convert, convert_, revert_
from memory_ranks import WRAPPERS, places, values

CONFIG = (C, C1, C2, C3, C4)


def old(seed: int = 3) -> OldD2l:
    torch.manual_seed(seed)
    return OldD2l(*CONFIG)


def assert_close(ours, theirs) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory):
    """What two processes found."""
    folder = tmp_path_factory.mktemp("memory")
    torch.multiprocessing.spawn(memory_ranks.main, (str(folder),), nprocs=memory_ranks.WORLD)
    return [torch.load(folder / f"{rank}.pt") for rank in range(memory_ranks.WORLD)]


@pytest.mark.parametrize("order", ["converted first", *WRAPPERS])
def test_ddp_trains_with_the_gradients_of_the_unconverted_model(order, ranks):
    for found in ranks:
        assert_close(found[order], found["truth"])
        assert all(g.any() for g in found["truth"][0])


def test_ddp_leaves_every_parameter_in_its_place(ranks):
    assert all(found["places"] and found["places after revert_"] for found in ranks)


def test_broadcasts_between_a_converted_and_an_unconverted_rank(ranks):
    for there, back in (found["broadcast"] for found in ranks):
        assert_close(there, values(memory_ranks.network(seed=0)))
        assert_close(back, {name: 3 * t for name, t in there.items()})


@pytest.mark.parametrize("way", ["out", "back"])
def test_distributed_checkpoints(way, ranks):
    plain = [t.stride() for t in memory_ranks.network().state_dict().values()]
    for source, target, kept, strides in (found["checkpoint"][way] for found in ranks):
        assert_close(target, source)
        assert kept
        assert strides == 2 * plain


@pytest.mark.parametrize("name", CLIENTS)
def test_safetensors(name, tmp_path):
    torch_files = pytest.importorskip("safetensors.torch")
    model = drawn(CLIENTS[name]()).eval()
    truth = values(model)
    torch_files.save_file(convert_(model, strict=True).state_dict(), tmp_path / "model.safetensors")
    loaded = CLIENTS[name]()
    loaded.load_state_dict(torch_files.load_file(tmp_path / "model.safetensors"))
    assert_close(values(loaded), truth)
    with torch.no_grad(), backend("kernels"):
        convert_(loaded.eval(), strict=True)(images())
    torch_files.save_file(revert_(loaded).state_dict(), tmp_path / "again.safetensors")


@pytest.mark.parametrize("end", ["converted", "reverted"])
def test_a_fused_optimizer_with_moments_and_gradients_from_before(end):
    """Gradients are added into the tensors from before. eps, since AdamW divides rounding by itself elsewhere."""
    ends = []
    for converted in (False, True):
        model = old()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, fused=True)

        def step(seed: int, model=model, optimizer=optimizer) -> None:
            optimizer.zero_grad(set_to_none=False)
            model(torch.randn((2, C, 5, 4), generator=torch.Generator().manual_seed(seed))).square().mean().backward()
            optimizer.step()

        step(0)
        if converted:
            convert_(model, strict=True)
            with backend("kernels"):
                step(1)
            if end == "reverted":
                revert_(model)
        else:
            step(1)
        for seed in (2, 3):
            with backend("kernels" if converted and end == "converted" else "auto"):
                step(seed)
        ends.append([p.detach() for p in model.parameters()])
    assert_close(*ends)


Tie = tuple[nn.Module, nn.Parameter, Tensor, "nn.Parameter | None"]
"""The model, a weight, what has to change with it, and a weight that is free to move, where there is one."""


def tied_by_data() -> Tie:
    model = nn.ModuleList([old(), old(seed=4)])
    model[1].p2_2.weight.data = model[0].p2_2.weight.data
    return model, model[0].p2_2.weight, model[1].p2_2.weight, model[0].p3_2.weight


def tied_to_a_buffer() -> Tie:
    model = nn.ModuleList([old()])
    model.register_buffer("seen", model[0].p3_2.weight.detach())
    return model, model[0].p3_2.weight, model.seen, model[0].p2_2.weight


def in_shared_memory() -> Tie:
    """As another worker has it: by a tensor of its own on the same pages."""
    model = nn.ModuleList([old().share_memory()])
    return model, model[0].p2_2.weight, model[0].p2_2.weight.data, None


def views_of_a_flat_buffer() -> Tie:
    model = nn.ModuleList([old()])
    parameters = list(model.parameters())
    parts = torch.cat([p.detach().flatten() for p in parameters]).split([p.numel() for p in parameters])
    for p, part in zip(parameters, parts, strict=True):
        p.data = part.view_as(p)
    weight = model[0].p2_2.weight
    return model, weight, next(part for part in parts if part.data_ptr() == weight.data_ptr()), None


TIES = (tied_by_data, tied_to_a_buffer, in_shared_memory, views_of_a_flat_buffer)


@pytest.mark.parametrize("channels_last", [False, True], ids=["default", "channels_last"])
@pytest.mark.parametrize("tie", TIES, ids=lambda tie: tie.__name__)
def test_what_is_tied_stays_tied(tie, channels_last):
    """A write to one is seen in the other, and values are what they were; what is free becomes channels_last."""
    model, weight, other, free = tie()
    before, truth, x = places(model), values(model), images()
    asked = {"channels_last": True} if channels_last else {}

    def assert_tied() -> None:
        assert weight.data_ptr() == other.data_ptr()
        assert weight.is_shared() == (tie is in_shared_memory)
        with torch.no_grad():
            other.add_(1)
            assert torch.equal(weight.flatten(), other.flatten())
            other.sub_(1)

    convert_(model, strict=True, **asked)
    assert_tied()
    assert weight.is_contiguous()
    moved = channels_last and free is not None
    assert free is None or free.is_contiguous(memory_format=torch.channels_last) == channels_last
    assert (places(model) != before) == moved
    with torch.no_grad(), backend("kernels"):
        assert_close(model[0](x), OldD2l.forward(model[0], x))
    revert_(model)
    assert_tied()
    assert_close(values(model), truth)
    assert [stride for *_, stride in places(model)] == [stride for *_, stride in before]
    assert moved or places(model) == before


def test_a_weight_that_was_tied_after_its_conversion_is_not_torn_off():
    model = nn.ModuleList([old(), old(seed=4)])
    convert_(model, channels_last=True)
    model[1].p2_2.weight.data = model[0].p2_2.weight.data
    revert_(model)
    assert model[0].p2_2.weight.data_ptr() == model[1].p2_2.weight.data_ptr()
    assert model[0].p3_2.weight.is_contiguous()


def test_a_shared_parameter_is_moved_once():
    """One Parameter in two places is one storage: it may move, and both places see it."""
    model = nn.ModuleList([old(), old(seed=4)])
    model[1].p2_2.weight = model[0].p2_2.weight
    before = places(model)
    convert_(model, channels_last=True)
    assert model[1].p2_2.weight is model[0].p2_2.weight
    assert model[1].p2_2.weight.is_contiguous(memory_format=torch.channels_last)
    revert_(model)
    assert [stride for *_, stride in places(model)] == [stride for *_, stride in before]


def test_averages_and_copies():
    """An average begun before conversion goes on with the converted model, and one of the converted one is alike."""
    model, x = old(), images()
    strides, begin = [p.stride() for p in model.parameters()], values(model)
    average = torch.optim.swa_utils.get_ema_multi_avg_fn(0.75)
    before = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    before.update_parameters(model)
    convert_(model, strict=True)
    after = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=average)
    after.update_parameters(model)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3)
    expected = {name: 0.75 * t + 0.25 * 3 * t for name, t in begin.items()}
    for ema in (before, after):
        ema.update_parameters(model)
        assert_close(values(ema.module), expected)
    for other in (after.module, copy.deepcopy(model), convert(revert_(copy.deepcopy(model)))):
        assert [p.stride() for p in other.parameters()] == strides
        with torch.no_grad(), backend("kernels"):
            assert_close(other(x), OldD2l.forward(other, x))


def test_lazy_blocks():
    """As other lazy layers: torch's own strides, whatever was asked of weights that turn out to be shared."""
    torch.manual_seed(3)
    model, x = nn.Sequential(NewD2l(*CONFIG[1:])), images()
    convert_(model)(x)
    assert all(p.is_contiguous() for p in model.parameters())
    before = places(model)
    with backend("kernels"):
        y = model(x)
        y.square().mean().backward()
    assert all(p.grad.stride() == p.stride() for p in model.parameters())
    revert_(model)
    assert places(model) == before
    assert_close(y, model(x))
    late = NewD2l(*CONFIG[1:])
    convert_(late, channels_last=True)
    late.load_state_dict(model[0].state_dict())  # which gives its parameters their sizes
    late.share_memory()
    before = places(late)
    assert_close(late(x), y)
    assert places(late) == before


def test_blocks_built_fused_are_asked_like_converted_ones():
    block = FusedInception(*CONFIG)
    before = places(block)
    assert places(convert_(block)) == before
    convert_(block, channels_last=True)
    assert block.p2_2.weight.is_contiguous(memory_format=torch.channels_last)
    assert block.p1_1.weight.data_ptr() == before[0][1]
    revert_(block)
    assert [stride for *_, stride in places(block)] == [stride for *_, stride in before]
