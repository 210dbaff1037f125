"""Command line: train GoogLeNet with fused Inception blocks, on Fashion-MNIST or scikit-learn's digits.

``--model cifar`` trains the GoogLeNet of most projects for CIFAR-10, whose blocks have BatchNorm, on the same data.
"fused" converts the network: training steps and tests then run the kernels where this device has them.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from inception_fused import GoogLeNet
from inception_fused.tools.environment import gpu_problem
from training import faults
from training.arguments import parse
from training.checkpoints import Checkpoint, CheckpointError, read_checkpoint
from training.curve import draw_curve
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
from training.loop import Trainer, TrainingError
from training.networks import CifarGoogLeNet
from training.presets import PRESETS_OF
from training.recipes import FIRST_MODEL, Recipe, build_model

OVERRIDES = ("model", "preset", "epochs", "batch_size", "lr", "image_size", "block", "dtype", "seed")
"""The arguments that a recipe holds, and which therefore have to agree with a checkpoint's where given."""


class UsageError(ValueError):
    """Arguments that contradict each other or this machine."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Returns:
        The exit status: 0, 1 (training failed, no memory, a file that cannot be written), 2 (wrong call) or 128 + the
        signal that ended it: 130 (Ctrl-C), 143 (SIGTERM), 129 (SIGHUP), and 141 for a stdout that is closed.
    """
    args = parse(argv)
    trainer = None
    try:
        with faults.guarded():
            try:
                trainer, out = prepare(args)
                train(trainer, out)
                return 0
            except (UsageError, DatasetError, MissingPackageError, CheckpointError) as error:
                return _stop(f"error: {error}", 2)
            except TrainingError as error:
                return _stop(f"error: {error}", 1)
            except BaseException as error:
                if faults.describe(error) is None:
                    raise
                return _stop(_how_to_go_on(error, trainer, args), faults.exit_status(error))
    except KeyboardInterrupt as error:
        # It came while another fault was being reported.
        return _stop(_how_to_go_on(error, trainer, args), faults.exit_status(error))


def prepare(args: argparse.Namespace) -> tuple[Trainer, Path]:
    """All that precedes the first epoch, and what is printed of it: the run, and the folder of its results."""
    device = choose_device(args.device)
    checkpoint = read_checkpoint(args.resume) if args.resume else None
    recipe = choose_recipe(args, device, checkpoint)
    for package in ("tqdm", "matplotlib"):
        require(package)
    dataset = load_dataset(recipe, args)
    default_out = checkpoint.path.parent if checkpoint else Path("runs", run_name(recipe, dataset))
    out = args.out or default_out
    try:
        faults.try_folder(out)
    except OSError as error:
        raise UsageError(f"--out {out}: cannot be made or written ({error.strerror}); name another folder") from error

    # Either block gives the same shapes; this one needs no conversion.
    plain = build_model(dataclasses.replace(recipe, block="eager"), dataset)
    table = shape_table(plain, dataset.channels, recipe.image_size)
    faults.say(
        f"{table}\n{dataset.name}: {len(dataset.train_labels)} training and {len(dataset.test_labels)} test images; "
        f"{recipe.block} blocks, {recipe.dtype}, seed {recipe.seed}, {describe(device)}"
    )
    trainer = Trainer(recipe, dataset, device, compile=args.compile)
    if checkpoint is not None:
        trainer.restore(checkpoint)
        faults.say(f"resumed after epoch {trainer.epoch} of {recipe.epochs}")
    return trainer, out


def train(trainer: Trainer, out: Path) -> None:
    """Train the epochs that are left, write the results and print where they are."""
    trainer.fit(out)
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
        "epochs": trainer.history,
    }
    faults.store(paths[1], (json.dumps(record, indent=2) + "\n").encode())
    draw_curve(trainer.history, trainer.recipe, paths[2])
    return paths


def median_speed(history: list[dict[str, float]]) -> float:
    """Images per second, the median over all epochs but the first, which also warms up."""
    return statistics.median(row["images_per_second"] for row in history[1:] or history)


def choose_device(name: str) -> torch.device:
    """The device for --device: "auto" is the GPU that torch sees, or the CPU of a machine without one.

    Raises:
        UsageError: a driver answers but torch sees no GPU, or the GPU that is asked for is not there.
    """
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
    if (device.index or 0) >= count:
        raise UsageError(f"--device {name}: wants one of the {count} GPU(s) here, cuda:0 to cuda:{count - 1}")
    return device


def choose_recipe(args: argparse.Namespace, device: torch.device, checkpoint: Checkpoint | None) -> Recipe:
    """The checkpoint's recipe, or the preset's with the arguments that were given in place of its values.

    Raises:
        UsageError: an argument differs from the checkpoint that is to be resumed.
    """
    given = {name: value for name in OVERRIDES if (value := getattr(args, name)) is not None}
    if checkpoint is None:
        preset = given.pop("preset", None) or default_preset(args, device)
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


def default_preset(args: argparse.Namespace, device: torch.device) -> str:
    """ "seed" on a GPU where its data are there or may be fetched, else "digits"."""
    if device.type != "cuda":
        return "digits"
    if args.download or has_fashion_mnist(args.data_dir):
        return "seed"
    # To stderr: the shape table comes first on stdout.
    message = f"no Fashion-MNIST under {args.data_dir}: training on digits; --download fetches it (31 MB)"
    print(message, file=sys.stderr)
    return "digits"


def load_dataset(recipe: Recipe, args: argparse.Namespace) -> Dataset:
    """The recipe's data; Fashion-MNIST is fetched first where --download allows it.

    Raises:
        UsageError: --download for data that come with a package.
        DatasetError, MissingPackageError: as in :mod:`datasets`.
    """
    if recipe.dataset == "fashion-mnist":
        if args.download:
            download_fashion_mnist(args.data_dir)
        return fashion_mnist(args.data_dir)
    if args.download:
        raise UsageError("--download: fetches Fashion-MNIST, for --preset seed; add that or leave this out")
    return digits()


def run_name(recipe: Recipe, dataset: Dataset) -> str:
    """The folder of a run's results in ``runs``."""
    model = "" if recipe.model == FIRST_MODEL else f"{recipe.model}-"
    return f"{dataset.name}-{model}{recipe.block}"


def describe(device: torch.device) -> str:
    """The device in words, for the line above the epochs."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU with {torch.get_num_threads()} threads"


def _how_to_go_on(error: BaseException, trainer: Trainer | None, args: argparse.Namespace) -> str:
    """The sentence about a fault: what happened, what is saved, what to change, the command that goes on."""
    what, command = faults.describe(error), ""
    if trainer is None:
        saved = "nothing was trained"
    elif trainer.checkpoint is None:
        saved = "nothing was saved, in epoch 1, before the first checkpoint"
    elif not trainer.checkpoint.is_file():
        saved = f"nothing is saved, {trainer.checkpoint} is gone"
    else:
        saved = f"epoch {trainer.saved_epoch} of {trainer.recipe.epochs} is saved"
        command = f"go on with: {_resume_command(trainer, args)}"
    remedy = faults.remedy(error, trainer and trainer.recipe.batch_size)
    return "; ".join(filter(None, (what, saved, remedy, command)))


def _resume_command(trainer: Trainer, args: argparse.Namespace) -> str:
    command = ["python", sys.argv[0], "--resume", str(trainer.checkpoint)]
    if trainer.checkpoint == args.resume:
        # Nothing is saved yet of what these two change.
        command += [] if args.epochs is None else ["--epochs", str(args.epochs)]
        command += [] if args.out is None else ["--out", str(args.out)]
    if trainer.recipe.dataset == "fashion-mnist":
        command += ["--data-dir", str(args.data_dir)]
    if args.device != "auto":
        command += ["--device", args.device]
    if args.compile:
        command.append("--compile")
    return shlex.join(command)


def _stop(message: str, status: int) -> int:
    print(f"train_googlenet.py: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
