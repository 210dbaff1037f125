"""The arguments of train_googlenet.py, and what each may be."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from training.checkpoints import CHECKPOINT_NAME
from training.networks import BLOCKS, NETWORKS
from training.presets import PRESETS_OF
from training.recipes import DTYPES, FIRST_MODEL

EPOCHS = (1, 10_000)
BATCH_SIZES = (1, 60_000)
IMAGE_SIZES = (min(network.smallest_image for network in NETWORKS.values()), 1024)
"""Pixels: below 32 GoogLeNet's last blocks see padding only (a network names its own least), above 1024 a batch of one
no longer fits most GPUs."""

SEEDS = (0, 2**32 - 1)


def parse(argv: Sequence[str] | None, refuse: Callable[[str], NoReturn] | None = None) -> argparse.Namespace:
    """The arguments of a call.

    refuse: called with the message where one is wrong by itself or too small for the network; without it the message
        and the usage go to stderr, and SystemExit has the status 2.
    """
    parser = build_parser()
    if refuse is not None:
        parser.error = refuse  # type: ignore[method-assign]
    args = parser.parse_args(argv)
    # A resumed run has the network of its checkpoint, and an image size that was asked for there.
    if args.image_size is not None and args.resume is None:
        smallest = NETWORKS[args.model or FIRST_MODEL].smallest_image
        try:
            _whole(smallest, IMAGE_SIZES[1])(str(args.image_size))
        except argparse.ArgumentTypeError as error:
            parser.error(f"argument --image-size: {error}")
    return args


def build_parser() -> argparse.ArgumentParser:
    """The command line; what a recipe holds defaults to None, which tells given from not given."""
    parser = argparse.ArgumentParser(
        description="Train GoogLeNet, or its form for CIFAR, with fused Inception blocks.",
        epilog="Default: scikit-learn's digits, or on a GPU Fashion-MNIST where --data-dir holds it.",
    )
    add = parser.add_argument
    add("--model", choices=list(NETWORKS), help="googlenet (default), or cifar: BatchNorm, two 3x3 in branch 3")
    presets = sorted(PRESETS_OF[FIRST_MODEL])
    add("--preset", choices=presets, help="seed: Fashion-MNIST, SGD; digits: AdamW, the quick one")
    add("--epochs", type=_whole(*EPOCHS), help=f"passes over the training images ({_defaults('epochs')})")
    add(
        "--batch-size",
        type=_whole(*BATCH_SIZES),
        help=f"images per step, of all GPUs ({_defaults('batch_size')})",
    )
    add("--lr", type=_positive_float, help=f"learning rate of the first epoch ({_defaults('lr')})")
    add("--image-size", type=_whole(*IMAGE_SIZES), help=f"height and width in pixels ({_defaults('image_size')})")
    add("--block", choices=sorted(BLOCKS), help="fused (default) or the eager reference; of cifar: converted or not")
    add("--dtype", choices=list(DTYPES), help="fp32 (default), or autocast to bf16 or fp16")
    add("--seed", type=_whole(*SEEDS), help="of the initial weights and the order of the images (0)")
    add("--device", type=_device, default="auto", help="auto (default), cpu, cuda or, of one process, cuda:N")
    add("--compile", action="store_true", help="run the network through torch.compile")
    add("--data-dir", type=Path, default=Path("data"), help="where Fashion-MNIST is or goes (data)")
    add("--download", action="store_true", help="fetch the files of Fashion-MNIST that are not there")
    add("--out", type=Path, help="folder for the results (a folder of its own in runs, or the resumed run's)")
    add("--resume", type=Path, metavar="CHECKPOINT", help=f"go on from the {CHECKPOINT_NAME} of a run")
    return parser


def _defaults(name: str) -> str:
    """The values of one argument in the presets: ``seed 10, digits 12; of cifar seed 10, digits 3``."""
    texts = []
    for model, presets in PRESETS_OF.items():
        values = ", ".join(f"{preset} {getattr(recipe, name):g}" for preset, recipe in presets.items())
        texts.append(values if model == FIRST_MODEL else f"of {model} {values}")
    return "; ".join(texts)


def _whole(low: int, high: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,10}", text) or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"got {text!r}, wants a whole number from {low} to {high}")
        return int(text)

    return parse


def _positive_float(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"got {text!r}, wants a number above 0")
    return value


def _device(text: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", text):
        raise argparse.ArgumentTypeError(f"got {text!r}, wants auto, cpu, cuda or cuda:N")
    return text
