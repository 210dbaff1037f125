"""Time the Triton kernels' tiles on this machine's GPU and keep the best: an explicit command, never in a user's step.

    python python/tune.py [--budget SECONDS] [--kernels K1,B4] [--blocks 3a,4e] [--dtypes bf16] [--batches 1,32,128]
                          [--branch3 5x5|3x3|two-3x3]
    python python/tune.py --dry-run | --list

For each kernel and dtype the legal tiles are compiled in threads, timed on every problem of the chosen blocks and
batches, those of the stem's two convolutions among them ("stem"), and the best few (as many as the rules have, or
--tiles-per-kernel) become entries of the user's table, each checked against float64 first. A run that was cut or
stopped goes on where it ended when it is started again. One with another --branch3 adds its entries to the same table.
``python -m inception_fused plan`` shows what is then taken and why.

Exit code: 0 if all is well (also if the budget cut some problems), 1 if a problem failed or the run was interrupted,
2 without a GPU or on a wrong command line. --dry-run and --list need no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# The checkout's own package and helpers, whether or not another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from inception_fused.block.googlenet_blocks import BRANCH3, GOOGLENET_LAUNCHED
from inception_fused.op import reasons
from inception_fused.plan import choice, launches, tile_table
from tuner.candidates import candidates
from tuner.run import CHECK_S, KERNELS, Group, make_groups
from tuner.session import BATCHES, DTYPES, report, tune

COMPILE_S, TIME_S = 1.0, 0.015
"""Rough seconds: of compiling one binary (0.64 in the mean on one core, measured; Triton's threads share one
interpreter lock), of timing one launch."""


def dry_run(groups: Sequence[Group], shared_bytes: int, warps: Sequence[int], budget: float) -> str:
    """What would be timed, per group, with rough seconds."""
    lines, total = [f"{'kernel':<8} {'dtype':<5} problems  candidates  timings  about"], 0.0
    for group in groups:
        tiles = [candidates(case.problem, shared_bytes, warps) for case in group.cases]
        binaries = len({tile for some in tiles for tile in some})
        forms = 2 if group.cases[0].problem.row.role == launches.FPROP else 1
        timings = sum(map(len, tiles))
        seconds = binaries * forms * COMPILE_S / _threads() + timings * forms * TIME_S + len(tiles) * CHECK_S
        total += seconds
        lines.append(
            f"{group.kernel:<8} {group.dtype:<5} {len(tiles):>8}  {binaries:>10}  {timings:>7}  {seconds:.0f} s"
        )
    lines.append(f"about {total:.0f} s in all on a data-centre card, cut at {budget:.0f} s; nothing was timed")
    return "\n".join(lines)


def _threads() -> int:
    return max(1, min(4, (os.cpu_count() or 2) - 1))


def listing(groups: Sequence[Group], shared_bytes: int, warps: Sequence[int]) -> str:
    """Every problem with its candidates, the rule's first."""
    lines = []
    for group in groups:
        for case in group.cases:
            tiles = candidates(case.problem, shared_bytes, warps)
            shown = " ".join("x".join(map(str, tile[:3])) + f"s{tile.num_stages}w{tile.num_warps}" for tile in tiles)
            lines.append(f"{case!s:<36} {tile_table.dims(*case.problem.gemm[:3]):<22} {len(tiles):>2} tiles: {shown}")
    return "\n".join(lines)


class _Bar:
    """Progress on stderr: tqdm where it is installed, else one line per problem."""

    def __init__(self) -> None:
        self._bar: Any = None
        try:
            from tqdm import tqdm
        except ImportError:
            tqdm = None
        self._tqdm, self._last = tqdm, 0

    def __call__(self, done: int, total: int, text: str) -> None:
        if self._tqdm is None:
            if done != self._last:
                print(f"{done} of {total}: {text}", file=sys.stderr, flush=True)
        else:
            self._bar = self._bar or self._tqdm(total=total, unit="problem", file=sys.stderr, leave=False)
            self._bar.update(done - self._last)
            self._bar.set_postfix_str(text)
        self._last = done

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = dict.fromkeys(KERNELS.values())
    parser.add_argument("--budget", type=float, default=300.0, metavar="SECONDS", help="for everything (default 300)")
    parser.add_argument("--kernels", help="default all that Triton computes on this GPU, BatchNorm's last")
    parser.add_argument("--blocks", default=",".join(GOOGLENET_LAUNCHED), help="default the stem and all nine")
    parser.add_argument("--branch3", choices=BRANCH3, default="5x5", help="windows of branch 3 (default 5x5)")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"in this order (default {','.join(DTYPES)})")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="default 1,32,128")
    parser.add_argument("--image-size", type=int, default=224, metavar="S", help="side of an image (default 224)")
    parser.add_argument(
        "--warps", default="4", help="4, or 4,8: beside the rule's tile; eight have miscompiled before (default 4)"
    )
    parser.add_argument("--tiles-per-kernel", type=int, metavar="N", help="each is a binary that a first step compiles")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--write-defaults", action="store_true", help="write the package's table for this architecture")
    target.add_argument("--out", type=Path, metavar="FILE", help="write this file instead of the user's table")
    parser.add_argument("--again", action="store_true", help="take the figures of earlier runs anew")
    parser.add_argument("--dry-run", action="store_true", help="say what would be timed; needs no GPU")
    parser.add_argument("--list", action="store_true", help="list problems and candidates; needs no GPU")
    options = parser.parse_args(arguments)

    def some(name: str, wanted: Sequence[str]) -> list[str]:
        given = getattr(options, name).replace(" ", "").split(",")
        for item in given:
            if item not in wanted:
                parser.error(f"--{name}: got {item!r}, wants some of {','.join(wanted)}")
        return list(dict.fromkeys(given))

    if options.kernels is not None:
        chosen = some("kernels", list(known))
        options.kernels = [rules for rules, kernel in KERNELS.items() if kernel in chosen]
    options.blocks = {name: GOOGLENET_LAUNCHED[name] for name in some("blocks", list(GOOGLENET_LAUNCHED))}
    options.dtypes = some("dtypes", list(tile_table.DTYPES))
    options.warps = [int(item) for item in some("warps", ["4", "8"])]
    items = options.batches.replace(" ", "").split(",")
    wrong = [item for item in items if not item.isdecimal() or int(item) < 1]
    if wrong:
        parser.error(f"--batches: got {wrong[0]!r}, wants positive integers such as 1,32,128")
    options.batches = sorted(set(map(int, items)))
    for name, value in (("--image-size", options.image_size), ("--tiles-per-kernel", options.tiles_per_kernel)):
        if value is not None and value < 1:
            parser.error(f"{name}: got {value}, wants a positive integer")
    if not options.budget > 0:
        parser.error(f"--budget: got {options.budget:g}, wants a positive number of seconds")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = parse(arguments)
    if options.list or options.dry_run:
        capability = torch.cuda.get_device_capability() if torch.cuda.is_available() else (9, 0)
        kernels = options.kernels or [
            rules for rules, kernel in KERNELS.items() if choice.route(kernel, capability) == "triton"
        ]
        windows = BRANCH3[options.branch3]
        chosen = (options.blocks, options.batches, options.dtypes, kernels, options.image_size, windows)
        groups = make_groups(*chosen, capability)
        shared = tile_table.SHARED_BYTES.get(capability, 99) << 10
        print(f"candidates for sm_{capability[0]}{capability[1]}:")
        print(
            listing(groups, shared, options.warps)
            if options.list
            else dry_run(groups, shared, options.warps, options.budget)
        )
        return 0
    from gpu.run import no_gpu_reason

    reason = no_gpu_reason()
    if reason is None and torch.cuda.is_available():
        found = reasons.first(torch.device("cuda", torch.cuda.current_device()), torch.bfloat16)
        reason = found.text if found is not None else None
    if reason:
        print(f"nothing was tuned: {reason}", file=sys.stderr)
        return 2
    bar = _Bar()
    try:
        result = tune(
            options.budget, kernels=options.kernels, blocks=options.blocks, dtypes=options.dtypes,
            batches=options.batches, image_size=options.image_size, branch3=BRANCH3[options.branch3],
            warps=options.warps, tiles_per_kernel=options.tiles_per_kernel, defaults=options.write_defaults,
            out=options.out, again=options.again, on_progress=bar,
        )  # fmt: skip
    except OSError as error:
        print(f"nothing was tuned: {error}; choose another file with --out", file=sys.stderr)
        return 2
    finally:
        bar.close()
    print(report(result))
    return int(bool(result["failed"]) or result["ended"] == "interrupted")


if __name__ == "__main__":
    sys.exit(main())
