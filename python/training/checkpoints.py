"""The checkpoint of a training run as a file."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch

from training import faults
from training.networks import NETWORKS
from training.recipes import FIRST_MODEL, Recipe

CHECKPOINT_NAME = "checkpoint.pt"
CHECKPOINT_FORMAT = "inception_fused training checkpoint 1"


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, not of this script, or of another recipe."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file as read: recipe, and the state from which :meth:`Trainer.restore` goes on."""

    path: Path
    recipe: Recipe
    state: dict[str, Any]


def read_checkpoint(path: Path) -> Checkpoint:
    """Read what :meth:`Trainer.save` wrote, its tensors on the CPU.

    Raises:
        CheckpointError: there is none, it is damaged, or something else wrote it.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; wants the {CHECKPOINT_NAME} in the folder of a run")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling foreign bytes can raise nearly anything
        if faults.is_out_of_memory(error):
            raise
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise CheckpointError(f"{path}: damaged, or no checkpoint ({reason}); train anew without it") from error
    if not isinstance(state, dict) or state.get("format") != CHECKPOINT_FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this script; wants the {CHECKPOINT_NAME} of a run")
    recipe = state.get("recipe")
    if not isinstance(recipe, dict) or set(recipe) | {"model"} != {field.name for field in fields(Recipe)}:
        raise CheckpointError(f"{path}: written by another version of this script; train anew without it")
    recipe.setdefault("model", FIRST_MODEL)
    if recipe["model"] not in NETWORKS:
        got = f"got a network {recipe['model']!r}, wants {' or '.join(NETWORKS)}"
        raise CheckpointError(f"{path}: {got}; train anew without it")
    return Checkpoint(path, Recipe(**recipe), state)
