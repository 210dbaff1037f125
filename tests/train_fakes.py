"""A training run of a second: a tiny data set, its recipe, and the command line on it as a process of its own."""

from __future__ import annotations

import dataclasses
import sys

import torch
import train_googlenet
from datasets import Dataset
from train_googlenet import PRESETS
from training import Trainer

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


def main() -> None:
    """The process's command line, with the tiny data set for the digits."""
    train_googlenet.digits = tiny_dataset
    sys.exit(train_googlenet.main())
