"""Time the Triton kernels' tiles on this machine's GPU and keep the best: an explicit command, never in a user's step.

    python python/tune.py [--budget SECONDS] [--kernels K1,B4] [--blocks 3a,4e] [--dtypes bf16] [--batches 1,32,128]
    python python/tune.py --dry-run | --list

For each kernel and dtype the legal tiles are compiled in threads, timed on every problem of the chosen blocks and
batches, and the best few (as many as the rules have, or --tiles-per-kernel) become entries of the user's table, each
checked against float64 first. A run that was cut or stopped goes on where it ended when it is started again.
``python -m inception_fused plan`` shows what is then taken and why.

Exit code: 0 if all is well (also if the budget cut some problems), 1 if a problem failed or the run was interrupted,
2 without a GPU or on a wrong command line. --dry-run and --list need no GPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

# The checkout's own package and helpers, whether or not another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))

import torch
from tune_bench import Bench, DeviceBench
from tune_candidates import candidates
from tune_record import Record
from tune_run import CHECK_S, KERNELS, Group, Progress, Tuner, make_groups

from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, InceptionConfig
from inception_fused.op import reasons
from inception_fused.plan import choice, tile_table, tuned
from inception_fused.tools.timing import stopwatch_for

BATCHES, DTYPES = (1, 32, 128), ("bf16", "tf32", "fp16")

COMPILE_S, TIME_S = 1.0, 0.015
"""Rough seconds: of compiling one binary (0.64 in the mean on one core, measured; Triton's threads share one
interpreter lock), of timing one launch."""


def tune(
    budget_s: float = 300.0,
    *,
    kernels: Sequence[str] | None = None,
    blocks: Mapping[str, InceptionConfig] = GOOGLENET_BLOCKS,
    dtypes: Sequence[str] = DTYPES,
    batches: Sequence[int] = BATCHES,
    image_size: int = 224,
    warps: Sequence[int] = (4,),
    tiles_per_kernel: int | None = None,
    defaults: bool = False,
    out: Path | None = None,
    again: bool = False,
    bench: Bench | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Tunes within about ``budget_s`` seconds; what is finished is kept. Returns figures ready for JSON.

    kernels: keys of launches.RULES, None for all that Triton computes on this GPU (choice.ROUTES); dtypes: keys of
    tile_table.DTYPES; defaults: write the package's table for the architecture instead of the user's; out: write this
    file instead; again: take old figures anew; bench: what compiles, times and checks, by default this machine's GPU;
    on_progress: called with (problems done, problems, what is going on).

    Keys: gpu, path; problems, timed, cut (not timed); ended ("budget spent", "interrupted", what the device reported,
    or None); device_lost (whether nothing more can run in this process); timings; seconds; gain (time of the rules'
    tiles over that of the winners, minus 1, over the finished groups; None without one); groups (kernel, dtype,
    problems, tiles, limit, rule_us, us, unlimited_us); winners (as a table's entries); rejected (kernel, dtype, tile,
    reason); refused (winners that were wrong); failed (sentences).

    Raises OSError, before anything is timed, if the file cannot be written.
    """
    deadline = time.time() + budget_s
    if bench is None:
        bench = DeviceBench("cuda", stopwatch_for("cuda"))
    user = tuned.user_path(bench.gpu.name)
    if out is None and user is None:
        raise FileNotFoundError(tuned.no_folder())
    path = out or (tuned.package_path(bench.gpu.capability) if defaults else user)
    facts = {
        "gpu": bench.gpu.name,
        "capability": list(bench.gpu.capability),
        "kernel_sources": tile_table.kernel_sources(),
        "torch": torch.__version__,
        "triton": tile_table.triton_version(),
    }
    record = Record.load((out or user).with_suffix(".timings.json"), facts, blocks, again=again)
    record.save()
    _writable(path)
    tuner = Tuner(
        bench, record, path, facts | {"commit": _commit()}, origin="package" if defaults and out is None else "user",
        deadline=deadline, warps=warps, tiles_per_kernel=tiles_per_kernel, on_progress=on_progress,
    )  # fmt: skip
    kernels = bench.kernels if kernels is None else kernels
    return tuner.run(make_groups(blocks, batches, dtypes, kernels, image_size))


def _writable(path: Path) -> None:
    """Raises OSError where a file could not be replaced; touches nothing that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written")


def _commit() -> str | None:
    """Of the checkout that was tuned; None outside of one."""
    from machine import output_of

    return output_of(["git", "-C", str(Path(__file__).resolve().parents[1]), "rev-parse", "HEAD"])


def report(result: Mapping[str, Any]) -> str:
    """:func:`tune`'s figures for a person."""
    lines = [f"{'kernel':<8} {'dtype':<5} problems  rules us  tuned us   gain  cost of few tiles  tiles"]
    for group in result["groups"]:
        gain, cost = group["rule_us"] / (group["us"] or 1) - 1, group["us"] / (group["unlimited_us"] or 1) - 1
        tiles = ", ".join("x".join(tile.split("x")[:3]) + _rest(tile) for tile in group["tiles"])
        lines.append(
            f"{group['kernel']:<8} {group['dtype']:<5} {group['problems']:>8} {group['rule_us']:>9.1f} "
            f"{group['us']:>9.1f} {gain:>6.1%} {cost:>18.1%}  {tiles}"
        )
    if result["gain"] is not None:
        lines.append(f"in all the winners take {1 / (1 + result['gain']):.1%} of the rules' time")
    kinds: dict[str, int] = {}
    for item in result["rejected"]:
        kind = item["reason"].split(":")[0].split(" ")[0]
        kinds[kind] = kinds.get(kind, 0) + 1
    if kinds:
        lines.append("tiles left out: " + ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    lines += [f"REFUSED: {text}" for text in result["refused"]] + [f"FAILED: {text}" for text in result["failed"]]
    if result["ended"] is not None:
        lines.append(f"{result['ended']}: {result['cut']} of {result['problems']} problems left; run it again to go on")
    entries = f"{len(result['winners'])} entries in {result['path']}"
    lines.append(f"{result['timings']} timings in {result['seconds']:.0f} s; {entries}")
    return "\n".join(lines)


def _rest(tile: str) -> str:
    _, _, _, _, warps, stages = tile.split("x")
    return f" ({stages} stages{', 8 warps' if warps == '8' else ''})"


def dry_run(groups: Sequence[Group], shared_bytes: int, warps: Sequence[int], budget: float) -> str:
    """What would be timed, per group, with rough seconds."""
    lines, total = [f"{'kernel':<8} {'dtype':<5} problems  candidates  timings  about"], 0.0
    for group in groups:
        tiles = [candidates(case.problem, shared_bytes, warps) for case in group.cases]
        binaries = len({tile for some in tiles for tile in some})
        forms = 2 if KERNELS[group.kernel] in choice.FORWARD else 1
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
            lines.append(f"{case!s:<32} {tile_table.dims(*case.problem.gemm[:3]):<22} {len(tiles):>2} tiles: {shown}")
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
    parser.add_argument("--kernels", help="default all that Triton computes on this GPU, forward before backward")
    parser.add_argument("--blocks", default=",".join(GOOGLENET_BLOCKS), help="default all nine")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help=f"in this order (default {','.join(DTYPES)})")
    parser.add_argument("--batches", default=",".join(map(str, BATCHES)), help="default 1,32,128")
    parser.add_argument("--image-size", type=int, default=224, metavar="S", help="side of an image (default 224)")
    parser.add_argument("--warps", default="4", help="4, or 4,8: eight have miscompiled before (default 4)")
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
    options.blocks = {name: GOOGLENET_BLOCKS[name] for name in some("blocks", list(GOOGLENET_BLOCKS))}
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
        groups = make_groups(options.blocks, options.batches, options.dtypes, kernels, options.image_size)
        shared = tile_table.SHARED_BYTES.get(capability, 99) << 10
        print(f"candidates for sm_{capability[0]}{capability[1]}:")
        print(
            listing(groups, shared, options.warps)
            if options.list
            else dry_run(groups, shared, options.warps, options.budget)
        )
        return 0
    from gpu_check import no_gpu_reason

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
            batches=options.batches, image_size=options.image_size, warps=options.warps,
            tiles_per_kernel=options.tiles_per_kernel, defaults=options.write_defaults, out=options.out,
            again=options.again, on_progress=bar,
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
