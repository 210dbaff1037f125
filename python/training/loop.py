"""Training of a network on a data set: recipe, epoch loop and checkpoint."""

from __future__ import annotations

import math
import time
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from training import faults
from training.checkpoints import CHECKPOINT_FORMAT, CHECKPOINT_NAME, Checkpoint, CheckpointError
from training.image_sets import Dataset, require
from training.ranks import ALONE, Ranks
from training.recipes import DTYPES, Recipe, build_model

BAR_SECONDS = 0.5
"""Time between two updates of the progress bar: each reads the loss, and so waits for the device."""


class TrainingError(RuntimeError):
    """Training that cannot go on; the message says in which epoch and why."""


class Trainer:
    """One run of a recipe: model, optimizer and history, the epochs that are done and the last checkpoint.

    Args:
        recipe: what to train and how.
        dataset: goes to the device as a whole, as bytes; scaling and resizing happen there, batch by batch.
        device: where to train.
        compile: run the network through torch.compile.
        model: another network than :func:`build_model`'s, with its initial weights.
        ranks: this process among those that train the network together; all of them call the same methods.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        device: torch.device,
        *,
        compile: bool = False,
        model: nn.Module | None = None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.recipe, self.device = recipe, device
        self.ranks = ranks
        self.peak = dataset.peak
        self.train_set = (dataset.train_images.to(device), dataset.train_labels.to(device))
        self.test_set = (dataset.test_images.to(device), dataset.test_labels.to(device))
        model = build_model(recipe, dataset) if model is None else model
        self.model = model.to(device, memory_format=torch.channels_last)
        # Static shapes: two sizes of batch, full and last, each with and without gradients.
        self.network = torch.compile(self.model, dynamic=False) if compile else self.model
        self.replica = self.ranks.wrap(self.network)
        if recipe.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=recipe.lr, weight_decay=1e-2)
        else:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=recipe.lr)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, self._lr_factor)
        self.scaler = torch.amp.GradScaler(device.type, enabled=recipe.dtype == "fp16")
        self.epoch = 0
        self.history: list[dict[str, float]] = []
        self.checkpoint: Path | None = None
        self.saved_epoch = 0
        self.ranks.settle(self.model, lambda: self._backward(torch.arange(len(self.train_set[1]))[: recipe.batch_size]))

    def fit(self, out: Path) -> None:
        """Train the epochs that are left; after each, rank 0 writes ``out/checkpoint.pt`` and then prints its line.

        Raises:
            TrainingError: the loss of an epoch is not finite; the checkpoint of the epoch before it stays.
            faults.StorageError: a checkpoint cannot be written; the one before it stays.
            faults.StdoutError: a line cannot be printed; the checkpoint of its epoch is written.
        """
        if self.ranks.first:
            out.mkdir(parents=True, exist_ok=True)
        while self.epoch < self.recipe.epochs:
            row = self.run_epoch()
            self.save(out / CHECKPOINT_NAME)
            self.ranks.say(
                f"epoch {row['epoch']:2d}/{self.recipe.epochs}  loss {row['loss']:.4f}  "
                f"train accuracy {row['train_accuracy']:.4f}  test accuracy {row['test_accuracy']:.4f}  "
                f"{row['images_per_second']:.0f} images/s"
            )

    def run_epoch(self) -> dict[str, float]:
        """Train for one epoch, test, and append to the history what came of it.

        Returns:
            epoch (from 1), lr, loss and train_accuracy (means over the epoch, while the weights change),
            test_accuracy (after it), images_per_second and seconds (both of the training alone).
        """
        lr = self.scheduler.get_last_lr()[0]
        loss, train_accuracy, seconds = self._train_epoch()
        if not math.isfinite(loss):
            raise TrainingError(
                f"epoch {self.epoch + 1}: the loss is {loss}; train anew with --lr below {self.recipe.lr:g}"
            )
        self.scheduler.step()
        self.epoch += 1
        row = {
            "epoch": self.epoch,
            "lr": lr,
            "loss": loss,
            "train_accuracy": train_accuracy,
            "test_accuracy": self.evaluate(),
            "images_per_second": len(self.train_set[1]) / seconds,
            "seconds": seconds,
        }
        self.history.append(row)
        return row

    @torch.no_grad()
    def evaluate(self) -> float:
        """Accuracy on the test images, 0 to 1."""
        self.network.eval()
        self.ranks.same_buffers(self.model)
        order = torch.arange(len(self.test_set[1]), device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        for index in order.split(self.recipe.batch_size):
            part, count = self.ranks.part(index)
            x, labels = self._batch(self.test_set, part)
            with self._autocast():
                correct += _hits(self.network(x)[:count], labels[:count])
        return self.ranks.sum(correct.item()) / len(order)

    def save(self, path: Path) -> None:
        """Write a checkpoint, on rank 0, such that path always holds a whole one, the old or the new.

        Raises:
            faults.StorageError: it cannot be written.
        """
        state = {
            "format": CHECKPOINT_FORMAT,
            "recipe": asdict(self.recipe),
            "epoch": self.epoch,
            "history": self.history,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": {
                "cpu": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }
        with faults.held():
            if self.ranks.first:
                faults.store(path, faults.serialised(state))
                self.checkpoint, self.saved_epoch = path, self.epoch
            # The others speak of a checkpoint when there is one.
            self.ranks.wait()
            self.checkpoint, self.saved_epoch = path, self.epoch

    def restore(self, checkpoint: Checkpoint) -> None:
        """Take over the state of the run that wrote the checkpoint.

        Raises:
            CheckpointError: its parts do not fit this network or optimizer.
        """
        state = checkpoint.state
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.scheduler.load_state_dict(state["scheduler"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.history = int(state["epoch"]), list(state["history"])
            torch.set_rng_state(state["rng"]["cpu"])
            if self.device.type == "cuda" and state["rng"]["cuda"] is not None:
                torch.cuda.set_rng_state(state["rng"]["cuda"], self.device)
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            if faults.is_out_of_memory(error):
                raise
            raise CheckpointError(f"{checkpoint.path}: does not fit this network ({error})") from error
        self.checkpoint, self.saved_epoch = checkpoint.path, self.epoch

    def _train_epoch(self) -> tuple[float, float, float]:
        """Mean loss, accuracy and seconds of one pass over the training images."""
        self.network.train()
        count = len(self.train_set[1])
        # Seed and epoch alone decide the order: a resumed run sees the batches it would have seen.
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + self.epoch)
        order = torch.randperm(count, generator=generator).to(self.device)
        loss_sum = torch.zeros((), dtype=torch.float64, device=self.device)
        correct = torch.zeros((), dtype=torch.int64, device=self.device)
        seen = 0
        started = time.perf_counter()
        with require("tqdm").tqdm(
            total=count,
            desc=f"epoch {self.epoch + 1}/{self.recipe.epochs}",
            unit=" images",
            mininterval=BAR_SECONDS,
            leave=False,
            disable=None if self.ranks.first else True,
        ) as bar:
            for index in order.split(self.recipe.batch_size):
                faults.check()
                loss, hits = self._step(index)
                loss_sum += loss * (len(index) / self.ranks.world)
                correct += hits
                seen += self.ranks.part(index)[1]
                if bar.update(len(index)):
                    # Means over the images that this rank has seen.
                    bar.set_postfix(loss=f"{loss_sum / seen:.4f}", accuracy=f"{correct / seen:.4f}", refresh=False)
        # Reading the sums waits for the device, so the clock is read after it.
        loss, accuracy = self.ranks.sum(loss_sum.item()) / count, self.ranks.sum(correct.item()) / count
        return loss, accuracy, time.perf_counter() - started

    def _step(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step on the images of index, a global batch: loss and hits of :meth:`_backward`."""
        loss, hits = self._backward(index)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return loss, hits

    def _backward(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the mean loss over the images of index.

        Returns:
            On the device, a loss whose mean over the ranks is that mean loss, and the hits among this rank's images.
        """
        part, count = self.ranks.part(index)
        x, labels = self._batch(self.train_set, part)
        labels = labels[:count]
        with self._autocast():
            logits = self.replica(x)[:count]
            loss = F.cross_entropy(logits, labels, reduction="sum") / (len(index) / self.ranks.world)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        return loss.detach(), _hits(logits.detach(), labels)

    def _batch(self, data: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
        """Images [n, C, S, S] fp32 in 0 .. 1, channels_last, and labels [n]."""
        images, labels = data
        x = images[index].float().div_(self.peak)
        size = (self.recipe.image_size,) * 2
        if x.shape[2:] != size:
            x = F.interpolate(x, size=size, mode="bilinear", align_corners=False)
        return x.contiguous(memory_format=torch.channels_last), labels[index]

    def _autocast(self) -> torch.autocast:
        dtype = DTYPES[self.recipe.dtype]
        return torch.autocast(self.device.type, dtype=dtype, enabled=dtype != torch.float32)

    def _lr_factor(self, epoch: int) -> float:
        return 0.5 * (1 + math.cos(math.pi * epoch / self.recipe.epochs)) if self.recipe.cosine else 1.0


def _hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many of the largest logits are the labels', on the device."""
    return (logits.argmax(dim=1) == labels).sum()
