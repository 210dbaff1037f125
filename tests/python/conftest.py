"""A training run, and a run of gpu_check, small enough for a test."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


@pytest.fixture
def tiny():
    """The data set of train_fakes.py."""
    from train_fakes import tiny_dataset

    return tiny_dataset()


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tiny):
    """The training script's command line on the tiny data set, in an empty folder."""
    import train_googlenet

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_googlenet, "digits", lambda: tiny)
    monkeypatch.setattr(sys, "argv", ["python/train_googlenet.py"])
    return lambda *args: train_googlenet.main([*args])


@pytest.fixture
def train(cli, monkeypatch: pytest.MonkeyPatch):
    """The command line, with a network of two layers, whose run is a matter of milliseconds."""
    import torch
    from matplotlib.figure import Figure

    import train_googlenet
    from train_fakes import ARGUMENTS, small_model
    from training import loop
    from training.curve import store_figure

    monkeypatch.setattr(loop, "build_model", small_model)
    monkeypatch.setattr(train_googlenet, "shape_table", lambda *_: "layer  output")
    monkeypatch.setattr(train_googlenet, "draw_curve", lambda *args: store_figure(Figure(), args[-1]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only wait for one another in so small a network
    yield lambda *args: cli(*(args or ARGUMENTS))
    torch.set_num_threads(threads)


@pytest.fixture
def second_epoch(monkeypatch: pytest.MonkeyPatch):
    """Call a function in the middle of the second epoch, once."""
    from training.loop import Trainer

    step = Trainer._step

    def arrange(fault) -> None:
        left = [fault]

        def stepped(self, index):
            if self.epoch == 1 and len(index) == 8 and left:
                left.pop()()
            return step(self, index)

        monkeypatch.setattr(Trainer, "_step", stepped)

    return arrange


@pytest.fixture
def run(tmp_path: Path):
    """A run of gpu_check on the CPU, inside a stage."""
    from gpu_fakes import make_run

    return make_run(tmp_path)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What gpu_check times runs once and takes 8 us; the backend of each call."""
    from gpu import run as gpu_run
    from inception_fused.op import backends
    from inception_fused.tools.timing import Timing

    found = []

    def measure(call, stopwatch, seconds):
        call()
        found.append(backends.current())
        return Timing(us=8.0, spread=0.0, host_us=4.0, calls=1)

    monkeypatch.setattr(gpu_run, "measure", measure)
    return found
