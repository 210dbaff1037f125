"""A training run of a second: a tiny data set, the command line on it, faults to raise there and what must be left."""

from __future__ import annotations

import dataclasses
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

import train_googlenet
from training.checkpoints import CHECKPOINT_NAME, read_checkpoint
from training.image_sets import Dataset
from training.loop import Trainer
from training.presets import PRESETS
from training.recipes import Recipe

CPU = torch.device("cpu")
TINY = dataclasses.replace(PRESETS["digits"], batch_size=8, epochs=2)


def tiny_dataset() -> Dataset:
    """20 images of 8x8 to train on, two full batches and a last one of 4, and 6 to test on."""
    rng = torch.Generator().manual_seed(0)

    def images(count: int) -> torch.Tensor:
        return torch.randint(0, 17, (count, 1, 8, 8), generator=rng).to(torch.uint8)

    return Dataset("digits", images(20), torch.arange(20) % 10, images(6), torch.arange(6), peak=16)


def assert_same_run(a: Trainer, b: Trainer) -> None:
    def results(run: Trainer) -> list[dict[str, float]]:
        return [row | {"images_per_second": 0, "seconds": 0} for row in run.history]

    assert results(a) == results(b)
    for name, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[name]), name


ARGUMENTS = ("--device", "cpu", "--epochs", "2", "--batch-size", "8", "--out", "o")
FILES = (CHECKPOINT_NAME, "weights.pt", "history.json", "curve.png")
CHECKPOINT = Path("o", CHECKPOINT_NAME)


def small_model(recipe: Recipe, dataset: Dataset) -> nn.Module:
    torch.manual_seed(recipe.seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(recipe.image_size**2, 8), nn.Dropout(), nn.Linear(8, 10))


def raised(error: BaseException) -> Callable[..., None]:
    def fault(*_: object, **__: object) -> None:
        raise error

    return fault


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def sentence(capsys) -> str:
    """What stood on stderr: one line."""
    text = capsys.readouterr().err
    assert text.startswith("train_googlenet.py: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text[:-1]


def assert_whole(*names: str) -> None:
    assert {path.name for path in Path("o").iterdir()} == set(names)


def assert_resumable(said: str, epoch: int, train: Callable[..., int], tiny: Dataset) -> None:
    """The sentence's epoch is on the disk, and its command ends where a run without the fault does."""
    assert f"; epoch {epoch} of 2 is saved; " in said
    assert read_checkpoint(CHECKPOINT).state["epoch"] == epoch
    program, script, *command = shlex.split(said.partition("go on with: ")[2])
    assert (program, script) == ("python", "python/train_googlenet.py")
    assert train(*command) == 0
    assert_whole(*FILES)
    resumed = restored(CHECKPOINT, tiny)
    assert train(*ARGUMENTS[:-1], "whole") == 0
    assert_same_run(resumed, restored(Path("whole", CHECKPOINT_NAME), tiny))
    for name, value in torch.load("o/weights.pt").items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def restored(path: Path, tiny: Dataset) -> Trainer:
    checkpoint = read_checkpoint(path)
    trainer = Trainer(checkpoint.recipe, tiny, CPU)
    trainer.restore(checkpoint)
    return trainer


def main() -> None:
    """The process's command line, with the tiny data set for the digits."""
    train_googlenet.digits = tiny_dataset
    sys.exit(train_googlenet.main())
