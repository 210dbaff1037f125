"""The learning curve of a run as a picture."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from training import faults
from training.image_sets import require
from training.networks import NETWORKS
from training.recipes import Recipe


def draw_curve(history: list[dict[str, float]], recipe: Recipe, path: Path) -> None:
    """Draw loss and accuracy over the epochs into a PNG file of 1500x600 pixels.

    Raises:
        MissingPackageError: matplotlib is not installed.
        faults.StorageError: the file cannot be written.
    """
    # The two imports are enough to draw into a file and leave the caller's choice of window system alone.
    figure = require("matplotlib.figure", "matplotlib").Figure(figsize=(10, 4), dpi=150, layout="constrained")
    ticker = require("matplotlib.ticker", "matplotlib")
    epochs = [row["epoch"] for row in history]
    left, right = figure.subplots(1, 2)
    left.plot(epochs, [row["loss"] for row in history], marker="o", markersize=4, color="tab:blue")
    left.set(xlabel="epoch", ylabel="training loss (cross-entropy)", ylim=(0, None))
    for key, label, colour in (
        ("train_accuracy", "train", "tab:blue"),
        ("test_accuracy", "test", "tab:orange"),
    ):
        values = [row[key] for row in history]
        right.plot(epochs, values, marker="o", markersize=4, color=colour, label=f"{label}: {values[-1]:.3f}")
    right.set(xlabel="epoch", ylabel="accuracy", ylim=(0, 1.02))
    right.legend(title="after the last epoch", loc="lower right")
    for axes in (left, right):
        axes.xaxis.set_major_locator(ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"{NETWORKS[recipe.model].title} with {recipe.block} Inception blocks on {recipe.dataset}, "
        f"{recipe.image_size}x{recipe.image_size}, {recipe.optimizer}, lr {recipe.lr:g}, {recipe.dtype}"
    )
    store_figure(figure, path)


def store_figure(figure: Any, path: Path) -> None:
    """Write a figure as a PNG file, whole or not at all. Raises :class:`training.faults.StorageError`."""
    content = io.BytesIO()
    figure.savefig(content, format="png")
    faults.store(path, content.getbuffer())
