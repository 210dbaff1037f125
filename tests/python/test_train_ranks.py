"""Several ranks train as one process does: which images each takes, losses, resuming, statistics, errors that agree."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

import train_googlenet
import train_ranks
from marks import full, more
from train_ranks import RECIPE, STEPS, results, resumed, trainer
from training.ranks import ADDRESS, ALONE, NUMBERS, Ranks


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """More of them only wait for one another, and add in another order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The checkpoint of one process after an epoch."""
    path = tmp_path_factory.mktemp("alone") / "checkpoint.pt"
    run = trainer(ALONE)
    run.run_epoch()
    run.save(path)
    return path


@pytest.fixture(scope="module", params=[2, more(3)])
def found(request, tmp_path_factory, alone) -> list[dict]:
    """What every rank has found."""
    folder, world = tmp_path_factory.mktemp("ranks"), request.param
    torch.multiprocessing.spawn(train_ranks.numbers, (world, folder, alone), nprocs=world)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_every_image_counts_once(world):
    for count in range(1, 23):
        index = torch.randperm(count, generator=torch.Generator().manual_seed(count)) + 100
        parts = [Ranks(rank, world).part(index) for rank in range(world)]
        assert torch.equal(torch.cat([part[:counted] for part, counted in parts]), index)
        assert sum(counted for _, counted in parts) == count
        assert {len(part) for part, _ in parts} == {math.ceil(count / world)}
        assert all(set(part.tolist()) <= set(index.tolist()) for part, _ in parts)


def test_one_process_takes_a_batch_as_it_is():
    index = torch.arange(5)
    part, counted = ALONE.part(index)
    assert (part.data_ptr(), len(part), counted) == (index.data_ptr(), 5, 5)


def test_a_process_without_torchruns_numbers_is_alone(monkeypatch):
    for name in NUMBERS:
        monkeypatch.delenv(name, raising=False)
    assert Ranks.of_environment() == ALONE
    for name, value in zip(NUMBERS, "51812", strict=True):
        assert Ranks.of_environment() == ALONE
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("WORLD_SIZE", "16")
    for name, value in zip(ADDRESS, ("host", "29500"), strict=True):
        monkeypatch.setenv(name, value)
    ranks = Ranks.of_environment()
    assert ranks == Ranks(5, 16, 8, 1, 2)
    assert (ranks.first, str(ranks)) == (False, "rank 5")
    assert ranks.launcher() == ["torchrun", "--nnodes", "2", "--nproc-per-node", "1"]
    assert Ranks(0, 2, 0, 2).launcher() == ["torchrun", "--nproc-per-node", "2"]
    assert ALONE.launcher() == ["python"]


WRONG = {
    "WORLD_SIZE": "", "RANK": "2", "LOCAL_RANK": "-1", "GROUP_WORLD_SIZE": "x", "MASTER_ADDR": "", "MASTER_PORT": "a",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_environment_that_numbers_no_rank_is_refused(name, monkeypatch, capsys):
    usual = dict(zip((*NUMBERS, *ADDRESS), ("0", "2", "0", "2", "1", "localhost", "29500"), strict=True))
    for variable, value in (usual | {name: WRONG[name]}).items():
        monkeypatch.setenv(variable, value)
    assert train_googlenet.main(["--epochs", "1"]) == 2
    found = capsys.readouterr()
    assert found.out == ""
    assert re.fullmatch(rf"train_googlenet.py: error: environment: got .*{name}={WRONG[name]}.* RANK\n", found.err)


def test_each_rank_takes_the_gpu_of_its_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    choose = train_googlenet.choose_device
    devices = [choose(name, Ranks(6 + i, 8, i, 2, 4)) for i in range(2) for name in ("auto", "cuda")]
    assert devices == chosen == [torch.device("cuda", i) for i in (0, 0, 1, 1)]
    assert choose("cpu", Ranks(1, 3, 1, 3)) == torch.device("cpu")
    for name, message in (("auto", "^3 ranks on 2 GPU.*--nproc-per-node 2, or add"), ("cuda:1", "leave :1 out")):
        for rank in range(3):
            with pytest.raises(train_googlenet.UsageError, match=message):
                choose(name, Ranks(rank, 3, rank, 3))


def test_the_first_losses_are_those_of_one_process(found):
    expected = train_ranks.losses(trainer(ALONE))
    assert len(expected) == STEPS
    assert max(expected) - min(expected) > 0.5
    for rank in found:
        assert rank["losses"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("model", ["resuming", "cifar"])
def test_a_resumed_run_equals_an_uninterrupted_one(found, model):
    for rank in found:
        (weights, history), (resumed_weights, resumed_history) = rank[model]["whole"], rank[model]["resumed"]
        assert history == resumed_history == found[0][model]["whole"][1]
        assert all(torch.equal(value, resumed_weights[name]) for name, value in weights.items())
        assert all(torch.equal(value, weights[name]) for name, value in found[0][model]["whole"][0].items())


def test_a_checkpoint_is_there_when_a_rank_knows_of_it(found):
    assert all(rank[model]["there"] for rank in found for model in ("resuming", "cifar"))


def test_a_run_of_one_process_goes_on_with_several(found, alone):
    weights, history = results(resumed(ALONE, alone, RECIPE, 2))
    for rank in found:
        theirs, rows = rank["from one"]
        assert [row["epoch"] for row in rows] == [1, 2, 3]
        for row, expected in zip(rows, history, strict=True):
            assert row == pytest.approx(expected, rel=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(theirs[name], value, rtol=1e-4, atol=1e-6)


def test_a_run_of_several_goes_on_with_one_process(found):
    run = resumed(ALONE, found[0]["resuming"]["path"], RECIPE, 1)
    for row, expected in zip(results(run)[1], found[0]["resuming"]["whole"][1], strict=True):
        assert row == pytest.approx(expected, rel=1e-5)


def test_sums_keep_their_type(found):
    world = len(found)
    for rank in found:
        assert rank["sums"] == (
            pytest.approx(0.1 * world + sum(range(world)), rel=1e-15),
            2**53 * world + sum(range(world)),
        )


def test_statistics_are_rank_0s_in_the_test_of_every_rank(found):
    for rank in found:
        before, after, accuracies = rank["buffers"]
        assert before[0] != before[1]
        assert after == [before[0]] * len(found)
        assert len(set(accuracies)) == 1


def test_an_overflow_on_one_rank_skips_the_step_of_all(found):
    for rank in found:
        assert rank["overflow"] == [(2.0**15, False)] * len(found)


def test_a_loss_that_is_not_finite_on_one_rank_ends_all_alike(found):
    for rank in found:
        assert len(set(rank["infinite"])) == 1
        assert "epoch 1: the loss is nan; train anew with --lr below 0.05" in rank["infinite"][0]


def test_what_one_rank_refuses_all_refuse(found):
    last = len(found) - 1
    for rank in found:
        assert rank["refusals"] == [["error: no data", f"rank {last}: error: no data", None]] * len(found)


@full
def test_a_compiled_network(tmp_path):
    torch.multiprocessing.spawn(train_ranks.compiled, (2, tmp_path), nprocs=2)
    expected = train_ranks.losses(trainer(ALONE))
    assert torch.load(tmp_path / "compiled.pt") == pytest.approx(expected, rel=1e-5)
