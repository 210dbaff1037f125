"""What tests of several ranks run in processes of their own: as torchrun's script, or spawned for the numbers."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import train_fakes
import train_googlenet
from compare_training import small_network
from train_fakes import CPU, tiny_dataset
from training import loop
from training.checkpoints import read_checkpoint
from training.image_sets import DatasetError
from training.loop import Trainer, TrainingError
from training.networks import build_cifar
from training.presets import CIFAR_PRESETS, PRESETS
from training.ranks import Ranks, RefusedError
from training.recipes import Recipe

# 20 images: two batches of 7, a last one of 6, none of which two or three ranks can share equally but one. Plain SGD,
# since AdamW divides a gradient that is rounding error by itself.
RECIPE = dataclasses.replace(
    PRESETS["digits"], batch_size=7, image_size=8, optimizer="sgd", lr=0.05, cosine=False, epochs=7
)
CIFAR = dataclasses.replace(CIFAR_PRESETS["digits"], batch_size=7, image_size=8, epochs=2)
STEPS = 20


def trainer(ranks: Ranks, recipe: Recipe = RECIPE, **options: Any) -> Trainer:
    """A run on the tiny data set: of three small blocks, or of a narrow GoogLeNet for CIFAR."""
    dataset = tiny_dataset()
    if recipe.model == "cifar":
        torch.manual_seed(recipe.seed)
        model = build_cifar(10, 1, recipe.block, divisor=8)
    else:
        model = small_network(recipe, dataset)
    return Trainer(recipe, dataset, CPU, model=model, ranks=ranks, **options)


def losses(run: Trainer) -> list[float]:
    """The mean losses of the first steps."""
    found: list[float] = []
    step = run._step

    def stepped(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        loss, hits = step(index)
        found.append(run.ranks.sum(loss.item()) / run.ranks.world)
        return loss, hits

    run._step = stepped
    while len(found) < STEPS:
        run.run_epoch()
    return found[:STEPS]


def resumed(ranks: Ranks, path: Path, recipe: Recipe, epochs: int) -> Trainer:
    """A run from a checkpoint, so many epochs further."""
    run = trainer(ranks, recipe)
    run.restore(read_checkpoint(path))
    for _ in range(epochs):
        run.run_epoch()
    return run


def results(run: Trainer) -> tuple[dict[str, torch.Tensor], list[dict[str, float]]]:
    """Weights, and the history without its times."""
    return run.model.state_dict(), [row | {"images_per_second": 0, "seconds": 0} for row in run.history]


def check_resuming(ranks: Ranks, folder: Path, recipe: Recipe) -> dict[str, Any]:
    whole = trainer(ranks, recipe)
    whole.run_epoch()
    path = folder / f"{recipe.model}{ranks.world}.pt"
    whole.save(path)
    there = path.is_file()
    whole.run_epoch()
    return {"whole": results(whole), "resumed": results(resumed(ranks, path, recipe, 1)), "there": there, "path": path}


def check_buffers(ranks: Ranks) -> list[Any]:
    """A running mean on every rank after an epoch's steps, and after the test behind them."""
    run = trainer(ranks, CIFAR)
    mean = run.model.stem[1].running_mean
    run._train_epoch()
    before = ranks.gather(mean.tolist())
    accuracy = run.evaluate()
    return [before, ranks.gather(mean.tolist()), ranks.gather(accuracy)]


def check_overflow(ranks: Ranks) -> list[Any]:
    """fp16 with an image that overflows on the last rank: every rank's scale and whether its weights moved."""
    run = trainer(ranks, dataclasses.replace(RECIPE, dtype="fp16"))
    before = [parameter.clone() for parameter in run.model.parameters()]
    if ranks.rank == ranks.world - 1:
        run.peak = 1e-30
    run._step(torch.arange(7))
    moved = not all(torch.equal(*pair) for pair in zip(before, run.model.parameters(), strict=True))
    return ranks.gather((run.scaler.get_scale(), moved))


def check_infinite_loss(ranks: Ranks) -> list[Any]:
    """What every rank raises when the loss of the last one alone is not a number."""
    run = trainer(ranks)
    if ranks.rank == ranks.world - 1:
        nn.init.constant_(run.model[-1][-1].bias, float("nan"))
    return ranks.gather(raised_by(run.run_epoch, TrainingError))


def raised_by(work: Callable[[], object], kind: type[Exception]) -> str | None:
    try:
        work()
    except kind as error:
        return str(error)
    return None


def check_refusals(ranks: Ranks) -> list[Any]:
    """What every rank says if all refuse alike, if the last one does, and if none does."""

    def work(refuses: bool) -> None:
        if refuses:
            raise DatasetError("no data")

    cases = (True, ranks.rank == ranks.world - 1, False)
    return ranks.gather(
        [raised_by(partial(ranks.together, partial(work, case), DatasetError), RefusedError) for case in cases]
    )


def numbers(rank: int, world: int, folder: Path, alone: Path) -> None:
    """All that is asked of the numbers of one rank of several, into a file of its own.

    alone: a checkpoint of one process after its first epoch.
    """
    torch.set_num_threads(1)
    ranks = Ranks(rank, world, rank, world)
    ranks.join(dist.FileStore(str(folder / "store"), world))
    found = {
        "sums": (ranks.sum(0.1 + rank), ranks.sum(2**53 + rank)),
        "losses": losses(trainer(ranks)),
        "resuming": check_resuming(ranks, folder, RECIPE),
        "cifar": check_resuming(ranks, folder, CIFAR),
        "from one": results(resumed(ranks, alone, RECIPE, 2)),
        "buffers": check_buffers(ranks),
        "overflow": check_overflow(ranks),
        "infinite": check_infinite_loss(ranks),
        "refusals": check_refusals(ranks),
    }
    torch.save(found, folder / f"{rank}.pt")
    ranks.wait()
    os._exit(0)  # as training.endings does


def compiled(rank: int, world: int, folder: Path) -> None:
    """The first losses of a compiled network."""
    torch.set_num_threads(1)
    ranks = Ranks(rank, world, rank, world)
    ranks.join(dist.FileStore(str(folder / "store"), world))
    torch.compile = partial(torch.compile, backend="aot_eager")
    found = losses(trainer(ranks, compile=True))
    if ranks.first:
        torch.save(found, folder / "compiled.pt")
    ranks.wait()
    os._exit(0)


def script() -> None:
    """torchrun's script: the command line on the tiny data set and network, after SETUP, a test's fault.

    The exit status of each rank goes into a file.
    """
    loop.build_model = train_fakes.small_model
    train_googlenet.shape_table = lambda *_: "layer  output"
    end = os._exit

    def ended(status: int) -> None:
        Path(f"status.{os.environ['RANK']}").write_text(str(status))
        end(status)

    os._exit = ended
    exec(os.environ.get("SETUP", ""), {"rank": int(os.environ.get("RANK", 0))})
    train_fakes.main()


if __name__ == "__main__":
    script()
