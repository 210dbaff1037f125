"""What the training script says of the error that ends a run, and how the run can go on."""

from __future__ import annotations

import argparse
import shlex
import sys
from dataclasses import dataclass

from training import faults
from training.loop import Trainer, TrainingError
from training.ranks import Ranks, RefusedError


@dataclass
class Run:
    """One call of the command line, as far as it has come."""

    ranks: Ranks
    args: argparse.Namespace | None = None
    trainer: Trainer | None = None


def exit_status(error: BaseException) -> int:
    """2 for a call that is refused, else as :func:`training.faults.exit_status`."""
    return 2 if isinstance(error, RefusedError) else faults.exit_status(error)


def sentence(run: Run, error: BaseException) -> str | None:
    """What to say about the error that ends a run: what happened, what is saved, what to change, the command that goes
    on. Of a refusal a line for each reason; None of an error of the program, which keeps its traceback."""
    if isinstance(error, RefusedError):
        return str(error)
    if isinstance(error, TrainingError):
        return f"error: {error}"
    what, command, trainer = faults.describe(error), "", run.trainer
    if what is None:
        return None
    if trainer is None:
        saved = "nothing was trained"
    elif trainer.checkpoint is None:
        saved = "nothing was saved, in epoch 1, before the first checkpoint"
    elif not trainer.checkpoint.is_file():
        saved = f"nothing is saved, {trainer.checkpoint} is gone"
    else:
        saved = f"epoch {trainer.saved_epoch} of {trainer.recipe.epochs} is saved"
        command = f"go on with: {_resume_command(run)}"
    remedy = faults.remedy(error, trainer and trainer.recipe.batch_size)
    return "; ".join(filter(None, (what, saved, remedy, command)))


def _resume_command(run: Run) -> str:
    trainer, args = run.trainer, run.args
    command = [*run.ranks.launcher(), sys.argv[0], "--resume", str(trainer.checkpoint)]
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
