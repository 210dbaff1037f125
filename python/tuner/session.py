"""One tuning session: the table that it writes, its figures, and these for a person."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from inception_fused.block.googlenet_blocks import GOOGLENET_LAUNCHED, Config
from inception_fused.plan import tile_table, tuned
from inception_fused.tools.timing import stopwatch_for
from tuner.bench import Bench, DeviceBench
from tuner.record import Record
from tuner.run import Progress, Tuner, make_groups

BATCHES, DTYPES = (1, 32, 128), ("bf16", "tf32", "fp16")


def tune(
    budget_s: float = 300.0,
    *,
    kernels: Sequence[str] | None = None,
    blocks: Mapping[str, Config] = GOOGLENET_LAUNCHED,
    dtypes: Sequence[str] = DTYPES,
    batches: Sequence[int] = BATCHES,
    image_size: int = 224,
    branch3: Sequence[int] = (5,),
    warps: Sequence[int] = (4,),
    tiles_per_kernel: int | None = None,
    defaults: bool = False,
    out: Path | None = None,
    again: bool = False,
    bench: Bench | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Tunes within about ``budget_s`` seconds; what is finished is kept. Returns figures ready for JSON.

    kernels: keys of RULES, None for all that Triton computes on this GPU (choice.ROUTES); dtypes: keys of
    tile_table.DTYPES; branch3: sides of the windows of the blocks' third branch, as in BRANCH3; defaults:
    write the package's table for the architecture instead of the user's; out: write this file instead; again: take old
    figures anew; bench: what compiles, times and checks, by default this machine's GPU; on_progress: called with
    (problems done, problems, what is going on).

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
    return tuner.run(make_groups(blocks, batches, dtypes, kernels, image_size, branch3, bench.gpu.capability))


def _writable(path: Path) -> None:
    """Raises OSError where a file could not be replaced; touches nothing that is there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise PermissionError(f"{path} cannot be written")


def _commit() -> str | None:
    """Of the checkout that was tuned; None outside of one."""
    from benchmarks.cases.machine import output_of

    return output_of(["git", "-C", str(Path(__file__).resolve().parents[2]), "rev-parse", "HEAD"])


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
