"""What decides a training run: its recipe, and the network with the initial weights that the recipe asks for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from training.image_sets import Dataset
from training.networks import NETWORKS

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

FIRST_MODEL = "googlenet"
"""The network of a checkpoint that names none: there was no other."""


@dataclass(frozen=True)
class Recipe:
    """All that decides the result of a run on given devices: two runs of one recipe are the same run.

    preset: the name under which its defaults are known.
    dataset: "digits" or "fashion-mnist".
    image_size: height and width in pixels to which images are resized (bilinear).
    batch_size: images per step, of all ranks together.
    optimizer: "adamw" (weight decay 1e-2) or "sgd" (plain).
    lr: learning rate of the first epoch.
    cosine: whether the learning rate falls along half a cosine, epoch by epoch, or stays.
    weights: initial convolution and linear weights, a key of :data:`INITIALISERS`.
    block: a key of :data:`training.networks.BLOCKS`.
    dtype: a key of :data:`DTYPES`; the parameters are fp32, bf16 and fp16 are autocast.
    model: a key of :data:`training.networks.NETWORKS`.
    """

    preset: str
    dataset: str
    image_size: int
    batch_size: int
    epochs: int
    optimizer: str
    lr: float
    cosine: bool
    weights: str
    block: str = "fused"
    dtype: str = "fp32"
    seed: int = 0
    model: str = FIRST_MODEL


def as_constructed(module: nn.Module) -> None:
    """All weights and biases as PyTorch's layers make them."""


def xavier_uniform(module: nn.Module) -> None:
    """Convolution and linear weights within +-sqrt(6 / (fan_in + fan_out)); biases as constructed."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.xavier_uniform_(module.weight)


def kaiming_normal(module: nn.Module) -> None:
    """Convolution and linear weights of standard deviation sqrt(2 / fan_in); biases zero."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)


INITIALISERS = {"pytorch": as_constructed, "xavier_uniform": xavier_uniform, "kaiming_normal": kaiming_normal}


def build_model(recipe: Recipe, dataset: Dataset) -> nn.Module:
    """The network with its initial weights, on the CPU: the same for either block and any device."""
    torch.manual_seed(recipe.seed)
    model = NETWORKS[recipe.model].build(dataset.num_classes, dataset.channels, recipe.block)
    return model.apply(INITIALISERS[recipe.weights])
