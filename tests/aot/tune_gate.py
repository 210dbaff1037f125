"""Compiles the tuner's candidates ahead of time, without a GPU, and judges the machine code as aot_gate.py does.

    python tests/aot/tune_gate.py [--all] [--kernels K1] [--dtypes tf32] [--capability 90] [--warps 4,8] [--json FILE]

Without --all the largest tile of each kernel alone, which needs most registers. A candidate that spills belongs into
the exceptions of python/tuner/candidates.py. Runs in a process where Triton does not interpret.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

from aot_binary import MMA
from counter.compiling import compile_launch, resources
from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.views import Tile
from inception_fused.plan import tile_table
from inception_fused.plan.launches import GEMMS
from tuner.bench import MAX_SPILL_BYTES
from tuner.candidates import candidates
from tuner.operands import Case, Workload
from tuner.run import KERNELS, make_groups


def jobs(
    kernels: Sequence[str], dtypes: Sequence[str], capability: int, warps: Sequence[int], every: bool
) -> list[tuple[Case, Tile]]:
    """A case for each tile: sizes make no binary anew, so that one case of each kernel and BLOCK_K serves."""
    shared = tile_table.SHARED_BYTES.get(divmod(capability, 10), 99) << 10
    blocks = {name: GOOGLENET_BLOCKS[name] for name in ("3a", "4b", "4e")}
    found = []
    for group in make_groups(blocks, [1], dtypes, kernels, 224):
        cases: dict[Tile, Case] = {}
        for case in group.cases:
            for tile in candidates(case.problem, shared, warps):
                cases.setdefault(tile, case)
        if not every:
            largest = max(cases, key=lambda tile: (tile.BLOCK_M * tile.BLOCK_N, tile.BLOCK_M, tile.num_stages))
            cases = {largest: cases[largest]}
        found += [(case, tile) for tile, case in cases.items()]
    return found


def judge(case: Case, tile: Tile, capability: int) -> list[dict]:
    """Figures of each of a tile's binaries, with what is wrong."""
    rows = []
    for form, launch in enumerate(Workload(case, "meta").launches(tile)):
        row = {"kernel": case.problem.rules, "dtype": case.dtype, "tile": list(tile), "form": form}
        try:
            binary = compile_launch(launch, capability)
            row |= resources(binary)
            limit = tile_table.SHARED_BYTES.get(divmod(capability, 10), 99) << 10
            faults = {
                "spills": row["stack"] > MAX_SPILL_BYTES,
                "too much shared memory": row["shared"] > limit,
                "no matrix instruction": case.problem.row.role in GEMMS and not MMA.search(binary.asm["ptx"]),
            }
            row["faults"] = [name for name, true in faults.items() if true]
        except Exception as error:
            row["faults"] = [f"does not compile: {type(error).__name__}: {str(error)[-200:]}"]
        rows.append(row)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true", help="every candidate: ten minutes on one core")
    parser.add_argument("--kernels", default=",".join(KERNELS))
    parser.add_argument("--capability", type=int, default=90)
    parser.add_argument("--dtypes", default="bf16,tf32", help="fp16's binaries are bf16's but for the type")
    parser.add_argument("--warps", default="4")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    chosen = args.kernels.split(","), args.dtypes.split(","), args.capability, list(map(int, args.warps.split(",")))
    for case, tile in jobs(*chosen, args.all):
        for row in judge(case, tile, args.capability):
            print(*(f"{name} {value}" for name, value in row.items()), flush=True)
            rows.append(row)
    if args.json:
        args.json.write_text(json.dumps(rows))
    bad = sum(bool(row["faults"]) for row in rows)
    print(f"{len(rows)} binaries, {bad} refused")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
