"""Command line: train GoogLeNet with fused Inception blocks, on Fashion-MNIST or scikit-learn's digits.

``--model cifar`` trains the GoogLeNet of most projects for CIFAR-10, whose blocks have BatchNorm, on the same data.
"fused" converts the network: training steps and tests then run the kernels where this device has them.

``torchrun --nproc-per-node N python/train_googlenet.py`` trains one network on N GPUs (:mod:`training.ranks`).
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import statistics
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from inception_fused import GoogLeNet
from inception_fused.tools.environment import gpu_problem
from training import faults
from training.arguments import parse
from training.checkpoints import Checkpoint, CheckpointError, read_checkpoint
from training.curve import draw_curve
from training.endings import Endings
from training.image_sets import (
    Dataset,
    DatasetError,
    MissingPackageError,
    digits,
    download_fashion_mnist,
    fashion_mnist,
    has_fashion_mnist,
    require,
)
from training.loop import Trainer
from training.networks import CifarGoogLeNet
from training.presets import PRESETS_OF
from training.ranks import ALONE, Ranks, RefusedError
from training.recipes import FIRST_MODEL, Recipe, build_model
from training.sentences import Run, exit_status, sentence

OVERRIDES = ("model", "preset", "epochs", "batch_size", "lr", "image_size", "block", "dtype", "seed")
"""The arguments that a recipe holds, and which therefore have to agree with a checkpoint's where given."""


class UsageError(ValueError):
    """Arguments that contradict each other or this machine."""


REFUSALS = (UsageError, DatasetError, MissingPackageError, CheckpointError)
"""What a run may be refused for before its first epoch."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 (training failed, no memory, a file that cannot be written), 2 (wrong call) or 128 + the
        signal that ended it: 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP), and 141 for a stdout that is closed.
    """
    try:
        run = Run(Ranks.of_environment())
    except RefusedError as error:
        print(f"train_googlenet.py: error: {error}", file=sys.stderr)
        return 2
    endings = Endings(run.ranks, partial(sentence, run), exit_status)
    try:
        with faults.guarded():
            try:
                endings.join()
                run.args = read_arguments(argv, run.ranks)
                out = prepare(run)
                train(run.trainer, out)
                endings.leave()
                return 0
            except SystemExit:
                endings.leave()  # help was asked for, or one process is refused
                raise
            except BaseException as error:
                status = endings.conclude(error)
                if status is None:
                    raise
                return status
    except KeyboardInterrupt as error:
        # It came while another fault was being reported.
        return endings.conclude(error)


def read_arguments(argv: Sequence[str] | None, ranks: Ranks) -> argparse.Namespace:
    """The arguments of the call. One process prints its own refusal and usage; of several, rank 0 prints it for all.

    Raises:
        SystemExit: one process is refused, or help was asked for.
        RefusedError: an argument is wrong, on any of several ranks.
    """

    def refuse(message: str) -> NoReturn:
        raise UsageError(message)

    with contextlib.nullcontext() if ranks.first else contextlib.redirect_stdout(io.StringIO()):
        return ranks.together(lambda: parse(argv, None if ranks.world == 1 else refuse), UsageError)


def prepare(run: Run) -> Path:
    """All that precedes the first epoch, and what is printed of it: run.trainer, and the folder of its results.

    In steps, each of which all ranks begin if none has refused the one before: a rank that refuses alone would leave
    the others waiting for it.

    Raises:
        RefusedError: this run cannot be.
    """
    ranks, args = run.ranks, run.args

    def choose() -> tuple[torch.device, Checkpoint | None, Recipe]:
        device = choose_device(args.device, ranks)
        checkpoint = read_checkpoint(args.resume) if args.resume else None
        recipe = choose_recipe(args, device, checkpoint, ranks)
        for package in ("tqdm", "matplotlib"):
            require(package)
        if args.download:
            fetch(recipe, args, ranks)
        return device, checkpoint, recipe

    def load() -> tuple[Dataset, Path]:
        dataset = digits() if recipe.dataset == "digits" else fashion_mnist(args.data_dir)
        out = args.out or (checkpoint.path.parent if checkpoint else Path("runs", run_name(recipe, dataset)))
        if ranks.first:
            try_out(out)
        return dataset, out

    def build() -> Trainer:
        trainer = Trainer(recipe, dataset, device, compile=args.compile, ranks=ranks)
        if checkpoint is not None:
            trainer.restore(checkpoint)
        return trainer

    device, checkpoint, recipe = ranks.together(choose, *REFUSALS)
    recipe = ranks.gather(recipe)[0]  # a machine without the data would have chosen another by itself
    dataset, out = ranks.together(load, *REFUSALS)
    if ranks.first:
        # Either block gives the same shapes; this one needs no conversion.
        plain = build_model(dataclasses.replace(recipe, block="eager"), dataset)
        table = shape_table(plain, dataset.channels, recipe.image_size)
        images = f"{len(dataset.train_labels)} training and {len(dataset.test_labels)} test images"
        faults.say(
            f"{table}\n{dataset.name}: {images}; "
            f"{recipe.block} blocks, {recipe.dtype}, seed {recipe.seed}, {describe(device, ranks)}"
        )
    run.trainer = ranks.together(build, *REFUSALS)
    if checkpoint is not None:
        ranks.say(f"resumed after epoch {run.trainer.epoch} of {recipe.epochs}")
    return out


def train(trainer: Trainer, out: Path) -> None:
    """Train the epochs that are left; on rank 0, write the results and print where they are."""
    trainer.fit(out)
    if not trainer.ranks.first:
        return
    with faults.held():
        paths = write_results(trainer, out)
    faults.say("written: " + ", ".join(str(path) for path in (trainer.checkpoint, *paths)))
    faults.say(
        f"final test accuracy {trainer.history[-1]['test_accuracy']:.4f}; "
        f"{median_speed(trainer.history):.0f} images/s in training"
    )


def shape_table(model: GoogLeNet | CifarGoogLeNet, channels: int, image_size: int) -> str:
    """The output shape of each part for one image [channels, image_size, image_size], as lines of text.

    The model is left in eval mode, in which BatchNorm's statistics stay as they are.
    """
    model.eval()
    x = torch.zeros(1, channels, image_size, image_size)
    rows = [("layer", "output"), ("input", "x".join(map(str, x.shape)))]
    rows += [(name, "x".join(map(str, shape[1:]))) for name, shape in model.layer_shapes(x)]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:<{width}}  {shape}" for name, shape in rows)


def write_results(trainer: Trainer, out: Path) -> list[Path]:
    """Write ``weights.pt`` (a state_dict on the CPU), ``history.json`` and ``curve.png``: their paths.

    Raises:
        faults.StorageError: one of them cannot be written; it and those after it are as they were.
    """
    paths = [out / "weights.pt", out / "history.json", out / "curve.png"]
    weights = {name: value.cpu().contiguous() for name, value in trainer.model.state_dict().items()}
    faults.store(paths[0], faults.serialised(weights))
    record = {
        "recipe": dataclasses.asdict(trainer.recipe),
        "device": str(trainer.device),
        "ranks": trainer.ranks.world,
        "epochs": trainer.history,
    }
    faults.store(paths[1], (json.dumps(record, indent=2) + "\n").encode())
    draw_curve(trainer.history, trainer.recipe, paths[2])
    return paths


def median_speed(history: list[dict[str, float]]) -> float:
    """Images per second, the median over all epochs but the first, which also warms up."""
    return statistics.median(row["images_per_second"] for row in history[1:] or history)


def choose_device(name: str, ranks: Ranks = ALONE) -> torch.device:
    """The device for --device: "auto" is the GPU that torch sees, or the CPU of a machine without one.

    Each of several ranks takes the GPU of its own number on this machine, and makes it the current one.

    Raises:
        UsageError: a driver answers but torch sees no GPU, the GPU that is asked for is not there, or several ranks are
            to share one.
    """
    if ranks.world > 1 and ":" in name:
        number = name.partition(":")[2]
        raise UsageError(f"--device {name}: is one GPU for {ranks.world} ranks; leave :{number} out")
    if name == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        problem = gpu_problem()
        if name == "auto" and problem is None:
            return torch.device("cpu")
        problem = problem or "torch sees no NVIDIA GPU here"
        raise UsageError(f"--device {name}: {problem.rstrip('.')}; to train on the CPU, add --device cpu")
    device = torch.device("cuda" if name == "auto" else name)
    count = torch.cuda.device_count()
    if ranks.world > 1:
        if ranks.local_world > count:
            change = f"start --nproc-per-node {count}, or add --device cpu"
            raise UsageError(f"{ranks.local_world} ranks on {count} GPU(s): each wants one of its own; {change}")
        device = torch.device("cuda", ranks.local_rank)
        torch.cuda.set_device(device)
    if (device.index or 0) >= count:
        raise UsageError(f"--device {name}: wants one of the {count} GPU(s) here, cuda:0 to cuda:{count - 1}")
    return device


def choose_recipe(
    args: argparse.Namespace, device: torch.device, checkpoint: Checkpoint | None, ranks: Ranks = ALONE
) -> Recipe:
    """The checkpoint's recipe, or the preset's with the arguments that were given in place of its values.

    Raises:
        UsageError: an argument differs from the checkpoint that is to be resumed.
    """
    given = {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    if checkpoint is None:
        preset = given.pop("preset", None) or default_preset(args, device, ranks)
        return dataclasses.replace(PRESETS_OF[given.get("model", FIRST_MODEL)][preset], **given)
    recipe = checkpoint.recipe
    if not recipe.cosine and given.get("epochs", 0) > recipe.epochs:
        # The learning rate stays whatever the number of epochs, so more of them go on with the same run.
        recipe = dataclasses.replace(recipe, epochs=given["epochs"])
    for name, value in given.items():
        saved = getattr(recipe, name)
        if value != saved:
            option = "--" + name.replace("_", "-")
            raise UsageError(
                f"--resume {checkpoint.path}: was trained with {option} {saved}, got {option} {value}; "
                f"leave {option} out, or train anew without --resume"
            )
    return recipe


def default_preset(args: argparse.Namespace, device: torch.device, ranks: Ranks = ALONE) -> str:
    """ "seed" on a GPU where its data are there or may be fetched, else "digits"."""
    if device.type != "cuda":
        return "digits"
    if args.download or has_fashion_mnist(args.data_dir):
        return "seed"
    if ranks.first:
        # To stderr: the shape table comes first on stdout.
        message = f"no Fashion-MNIST under {args.data_dir}: training on digits; --download fetches it (31 MB)"
        print(message, file=sys.stderr)
    return "digits"


def fetch(recipe: Recipe, args: argparse.Namespace, ranks: Ranks) -> None:
    """Do what --download asks for, on one rank of each machine.

    Raises:
        UsageError: the recipe's data come with a package.
        DatasetError, MissingPackageError: as in :mod:`training.image_sets`.
    """
    if recipe.dataset == "digits":
        raise UsageError("--download: fetches Fashion-MNIST, for --preset seed; add that or leave this out")
    if ranks.local_rank == 0:
        download_fashion_mnist(args.data_dir)


def try_out(out: Path) -> None:
    """Make the folder of the results. Raises :class:`UsageError` where it takes no file."""
    try:
        faults.try_folder(out)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made or written ({error.strerror}); name another folder") from error


def run_name(recipe: Recipe, dataset: Dataset) -> str:
    """The folder of a run's results in ``runs``."""
    model = "" if recipe.model == FIRST_MODEL else f"{recipe.model}-"
    return f"{dataset.name}-{model}{recipe.block}"


def describe(device: torch.device, ranks: Ranks) -> str:
    """The device in words, for the line above the epochs."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"CPU with {torch.get_num_threads()} threads"
    return name if ranks.world == 1 else f"{ranks.world} ranks, each on {name}"


if __name__ == "__main__":
    sys.exit(main())
