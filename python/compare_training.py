"""Train one network twice from one seed, with eager blocks and with fused kernels, and draw both curves.

    python python/compare_training.py --out docs

On a GPU the network is GoogLeNet. Without one the kernels are interpreted, which takes Python time for every operation
of every program, and the network is one of three small blocks on the 8x8 digits. Eager runs with further seeds show
how far two runs lie apart that differ in nothing that matters.

``--model cifar`` compares the GoogLeNet for CIFAR, plain and converted: the kernels take the statistics of each batch,
and the test after an epoch runs them with the running ones.

Exit code: 0 if the first steps' losses are as near to those in float64 as eager's, within a factor of two and rounding,
and the final accuracies agree within the spread of seeds or the chance of so few test images; 1 if not, 2 for a wrong
call.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

if not torch.cuda.is_available():
    # Before anything imports Triton, which reads it when a kernel is decorated.
    os.environ["TRITON_INTERPRET"] = "1"

from torch import Tensor, nn

import inception_fused
from inception_fused import InceptionConfig, backend
from inception_fused.runtime import files
from inception_fused.testing import tolerance
from training.curve import store_figure
from training.image_sets import Dataset, digits, require
from training.loop import Trainer
from training.networks import NETWORKS
from training.presets import PRESETS_OF
from training.recipes import FIRST_MODEL, INITIALISERS, Recipe, build_model

FIRST_STEPS = 5
"""Losses compared one by one; later ones drift apart, since a rounding difference grows from step to step."""

LONGEST_SUM = 10_000
"""Products behind one element of a gradient, for the tolerance of a loss: pixels of a batch, with room."""

SMALL_BLOCKS = (
    InceptionConfig(32, 16, (16, 32), (8, 16), 16),
    InceptionConfig(80, 32, (24, 48), (8, 24), 24),
    InceptionConfig(128, 48, (32, 64), (8, 24), 24),
)


def small_network(recipe: Recipe, dataset: Dataset) -> nn.Module:
    """Three blocks for 8x8 images, with the recipe's initial weights: the same for either kind of block."""
    torch.manual_seed(recipe.seed)
    build_block = NETWORKS[recipe.model].build_block
    first, second, third = (build_block(recipe.block, config) for config in SMALL_BLOCKS)
    stem = nn.Sequential(nn.Conv2d(dataset.channels, SMALL_BLOCKS[0].in_channels, 3, padding=1), nn.ReLU())
    head = nn.Sequential(nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(160, dataset.num_classes))
    net = nn.Sequential(stem, first, nn.MaxPool2d(3, stride=2, padding=1), second, third, head)
    return net.apply(INITIALISERS[recipe.weights])


class Recorder(Trainer):
    """A Trainer that keeps the loss of every step, and demands of fused blocks what the kernels can do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.losses: list[Tensor] = []
        self.wish = "kernels" if self.recipe.block == "fused" else "eager"

    def _step(self, index: Tensor) -> tuple[Tensor, Tensor]:
        with backend(self.wish):
            loss, hits = super()._step(index)
        self.losses.append(loss)
        return loss, hits

    def evaluate(self) -> float:
        with backend(self.wish):
            return super().evaluate()


def exact_losses(recipe: Recipe, dataset: Dataset, device: torch.device, *, small: bool) -> list[float]:
    """The first losses of the recipe's network in float64."""

    class First(Recorder):
        def _step(self, index: Tensor) -> tuple[Tensor, Tensor]:
            if len(self.losses) == FIRST_STEPS:
                raise StopIteration
            return super()._step(index)

    model = (small_network(recipe, dataset) if small else build_model(recipe, dataset)).double()
    model.register_forward_pre_hook(lambda _, args: (args[0].double(),))
    trainer = First(recipe, dataset, device, model=model)
    with suppress(StopIteration):
        trainer._train_epoch()
    return [loss.item() for loss in trainer.losses]


def train(recipe: Recipe, dataset: Dataset, device: torch.device, *, small: bool) -> dict[str, Any]:
    """One run: {block, seed, losses (of every step), history (of every epoch)}."""
    model = small_network(recipe, dataset) if small else build_model(recipe, dataset)
    trainer = Recorder(recipe, dataset, device, model=model)
    while trainer.epoch < recipe.epochs:
        row = trainer.run_epoch()
        print(
            f"{recipe.block:>5} seed {recipe.seed}  epoch {row['epoch']:2d}/{recipe.epochs}  "
            f"loss {row['loss']:.4f}  test accuracy {row['test_accuracy']:.4f}  {row['seconds']:.1f} s",
            flush=True,
        )
    losses = [loss.item() for loss in trainer.losses]
    return {"block": recipe.block, "seed": recipe.seed, "losses": losses, "history": trainer.history}


def judge(
    runs: Sequence[dict[str, Any]], device: torch.device, exact: Sequence[float], test_images: int
) -> dict[str, Any]:
    """The first run is eager's, the second the fused one from the same seed, the others eager's from further seeds.

    exact: the first losses in float64. first_steps, eagers_first_steps: relative distances of the losses from them;
    bound: of each beyond twice eager's; spread: of the final test accuracies of eager's seeds; chance: the deviation of
    an accuracy on so many images; accuracy_difference: of fused against eager; ok.
    """
    eager, fused, *others = runs
    eagers, first = (
        [abs(loss - true) / abs(true) for loss, true in zip(run["losses"], exact, strict=False)][:FIRST_STEPS]
        for run in (eager, fused)
    )
    tf32 = device.type == "cuda"
    # The error of one gradient, times the steps whose updates have carried it.
    bound = FIRST_STEPS * tolerance(torch.float32, LONGEST_SUM, tf32=tf32)
    accuracies = [run["history"][-1]["test_accuracy"] for run in (eager, *others)]
    difference = abs(fused["history"][-1]["test_accuracy"] - accuracies[0])
    spread = max(accuracies) - min(accuracies)
    chance = math.sqrt(accuracies[0] * (1 - accuracies[0]) / test_images)
    near = all(ours <= 2 * theirs + bound for ours, theirs in zip(first, eagers, strict=True))
    return {
        "first_steps": first,
        "eagers_first_steps": eagers,
        "bound": bound,
        "spread": spread,
        "chance": chance,
        "accuracy_difference": difference,
        "ok": near and (not others or difference <= max(spread, chance)),
    }


def draw(runs: Sequence[dict[str, Any]], title: str, path: Path) -> None:
    """Loss of every step, and accuracy after every epoch, into a PNG file of 1500x600 pixels."""
    figure = require("matplotlib.figure", "matplotlib").Figure(figsize=(10, 4), dpi=150, layout="constrained")
    eager, fused, *others = runs
    left, right = figure.subplots(1, 2)
    for i, run in enumerate(others):
        label = "eager, other seeds" if i == 0 else None
        left.plot(range(1, len(run["losses"]) + 1), run["losses"], color="0.8", linewidth=1, label=label)
        right.plot([row["epoch"] for row in run["history"]], [row["test_accuracy"] for row in run["history"]],
                   color="0.75", linewidth=1, label=label)  # fmt: skip
    for run, colour, width, style in ((eager, "tab:blue", 4, "-"), (fused, "tab:orange", 1.2, "-")):
        label = "eager" if run is eager else "fused kernels"
        left.plot(range(1, len(run["losses"]) + 1), run["losses"], style, color=colour, linewidth=width, label=label)
        values = [row["test_accuracy"] for row in run["history"]]
        right.plot([row["epoch"] for row in run["history"]], values, style, color=colour, linewidth=width,
                   label=f"{label}: {values[-1]:.4f}")  # fmt: skip
    left.set(xlabel="step", ylabel="training loss (cross-entropy)", ylim=(0, None))
    right.set(xlabel="epoch", ylabel="test accuracy", ylim=(None, 1.005))
    left.legend(loc="upper right")
    right.legend(title="after the last epoch", loc="lower right")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.suptitle(title)
    store_figure(figure, path)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs"), help="folder of training_parity.json and .png")
    parser.add_argument("--model", choices=list(NETWORKS), default=FIRST_MODEL, help="cifar: training_parity_cifar.*")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--seeds", type=int, default=3, help="eager runs, from seed 0 on; fused is seed 0")
    parser.add_argument("--images", type=int, help="train on so many images only")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code."""
    parser = build_parser()
    options = parser.parse_args(argv)
    for name in ("epochs", "seeds", "images"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            parser.error(f"--{name}: got {getattr(options, name)}, wants at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    small = device.type == "cpu"
    recipe = replace(PRESETS_OF[options.model]["digits"], epochs=options.epochs)
    if small:
        recipe = replace(recipe, image_size=8, lr=2e-3)
    dataset = digits()
    if options.images is not None:
        train_images, train_labels = (t[: options.images] for t in (dataset.train_images, dataset.train_labels))
        dataset = replace(dataset, train_images=train_images, train_labels=train_labels)
    jobs = [("eager", 0), ("fused", 0), *(("eager", seed) for seed in range(1, options.seeds))]
    runs = [train(replace(recipe, block=block, seed=seed), dataset, device, small=small) for block, seed in jobs]
    exact = exact_losses(replace(recipe, block="eager"), dataset, device, small=small)
    verdict = judge(runs, device, exact, len(dataset.test_labels))
    where = torch.cuda.get_device_name() if device.type == "cuda" else "CPU, kernels interpreted"
    network = "three small blocks" if small else NETWORKS[options.model].title
    if small and NETWORKS[options.model].batch_norm:
        network += " with BatchNorm"
    facts = {
        "device": where,
        "network": network,
        "weights": "channels_last",
        "versions": {"inception_fused": inception_fused.__version__, "torch": torch.__version__},
        "epochs": options.epochs,
        "images": len(dataset.train_images),
        "verdict": verdict,
        "runs": runs,
    }
    name = "training_parity" if options.model == FIRST_MODEL else f"training_parity_{options.model}"
    files.write(options.out / f"{name}.json", (json.dumps(facts, indent=1) + "\n").encode())
    draw(runs, f"{network} on digits, fp32, from one seed ({where})", options.out / f"{name}.png")
    print(
        f"first {len(verdict['first_steps'])} losses are within {max(verdict['first_steps']):.1e} of float64's, "
        f"eager's within {max(verdict['eagers_first_steps']):.1e}; final accuracy differs by "
        f"{verdict['accuracy_difference']:.4f}, eager's seeds by {verdict['spread']:.4f}: "
        f"{'ok' if verdict['ok'] else 'NOT ok'}"
    )
    return 0 if verdict["ok"] else 1


if __name__ == "__main__":
    sys.exit(main())
