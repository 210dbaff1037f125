"""Print the floors of the nine blocks on the reference card.

    python benchmarks/roofline.py [--batch 128] [--dtype bf16] [--image-size 224] [--branch3 two-3x3] [--batch-norm]

How they are counted stands in cases/roofline.py. What bounds each launch beyond the two ceilings of a floor, counted
and not measured, ``python benchmarks/counted.py`` prints.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# The checkout's own package and cases, whether or not another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases.baselines import DTYPES
from benchmarks.cases.roofline import batch_norm_table, table
from inception_fused.block.googlenet_blocks import BRANCH3


def main(arguments: list[str] | None = None) -> None:
    """Prints :func:`table`, or :func:`batch_norm_table`, for the command line's point."""
    parser = argparse.ArgumentParser(description="Floors of the nine blocks on the reference card.")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="bf16")
    parser.add_argument("--branch3", choices=BRANCH3, default="5x5", help="windows of branch 3 (5x5)")
    parser.add_argument("--image-size", type=int, default=224, help="224, or 96 for the small variant")
    parser.add_argument("--batch-norm", action="store_true", help="a training step with BatchNorm, ours and eager's")
    options = parser.parse_args(arguments)
    shown = batch_norm_table if options.batch_norm else table
    print(shown(options.batch, options.dtype, options.image_size, branch3=BRANCH3[options.branch3]))


if __name__ == "__main__":
    main()
