"""Compiles the launches of a block ahead of time, without a GPU, and judges the machine code.

What the interpreter cannot see: registers that spill, shared memory beyond the block's limit, a dot that became no
matrix instruction, loads that lost their width. Runs in a process where Triton does not interpret:

    python tests/aot/aot_gate.py                 every case, three dtypes, sm_80, sm_90 and sm_100
    python tests/aot/aot_gate.py --cases rules   the binaries of the network alone, as on every architecture
    python tests/aot/aot_gate.py --cases stem    those of the stem's two convolutions in every form
    python tests/aot/triton_table.py             those, under every Triton that a supported torch brings
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

import torch
import triton
from triton.backends.compiler import GPUTarget

from aot_binary import PAIRED, judge, verdict
from aot_cases import CASES, EVERY_CAPABILITY, LOOPED, Case, launches_of
from aot_loops import WAITS, run_loop, wgmma_faults, with_integers
from aot_loops import faults as loop_faults
from checks.launches import block_launches, googlenet_cases, googlenet_launches
from checks.pool_launches import pool_cases
from counter import counting, sass
from counter.compiling import DTYPES, compile_launch, serialized, some_of
from counter.hazards import register_operands
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS
from inception_fused.block.pools import PoolShape
from inception_fused.block.views import Tile
from inception_fused.runtime.launch import Launch, binary_key

FIGURES = ("registers", "stack", "shared", "loads", "narrow_loads", "stores", "narrow_stores")
SPOILT = """
        /*0000*/  HGMMA.64x64x16.F32.BF16 R24, R56, gdesc[UR12], R24, gsb0 ; /* 0x00e0000c38187df0 */
                                                                             /* 0x000fe20008000818 */
        /*0010*/  IMAD.MOV.U32 R57, RZ, RZ, R3 ;                             /* 0x000000ffff397224 */
                                                                             /* 0x000fe200078e0003 */
        /*0020*/  WARPGROUP.DEPBAR.LE gsb0, 0x0 ;                            /* 0x00008000000079c5 */
                                                                             /* 0x000fe20000010000 */
"""
"""A wgmma whose register operand is written before the wait: no launch does it, and none can be made to."""


class Job(NamedTuple):
    """One binary to compile. key: its identity; source: how to get the launch again in another process."""

    name: str
    key: tuple[Any, ...]
    source: tuple[Any, ...]
    capability: int


def run_job(job: Job) -> dict[str, Any]:
    dtype, kwargs, index = job.source
    launch = launches_of(kwargs, DTYPES[dtype], job.capability)[index]
    figures, faults = judge(launch, job.capability)
    return {
        "name": job.name,
        "kernel": launch.kernel.fn.__name__,
        "dtype": dtype,
        "wide": launch.constexprs["UNIT"] > 1,
        "capability": job.capability,
        "tile": launch.tile._asdict(),
        **figures,
        "faults": faults,
    }


WAITING = Tile(128, 256, 64, num_warps=8, num_stages=3)
"""Of K3 in bf16: ptxas 12.8 lets each wgmma wait for the one before."""


def planted() -> dict[str, list[str]]:
    """Faults that the gate finds in launches spoilt on purpose: one for each thing that it asserts."""
    at = {
        "config": GOOGLENET_BLOCKS["4b"],
        "batch": 128,
        "image": (14, 14),
        "save": False,
        "bias": False,
        "packed": True,
    }
    names = counting.named(at, "bf16", packed=True)
    k1, k2, k3, k4 = (item.launch for item in names)
    in_elements = k4._replace(constexprs=k4.constexprs | {"UNIT": 1})
    k4_counted = counting.counted(compile_launch(k4, 90), 90)
    pack = block_launches(**(at | {"packed": False}), dtype=torch.bfloat16)[0]
    return {
        "spills": judge(k3._replace(tile=k3.tile._replace(BLOCK_M=256, BLOCK_N=256)), 80)[1],
        "narrow loads": verdict(compile_launch(in_elements, 90), k4, 90)[1],
        "shared memory": judge(k1._replace(tile=k1.tile._replace(num_stages=6)), 89)[1],
        "no matrix instruction": verdict(compile_launch(pack, 90), k1, 90)[1],
        "integer instructions": loop_faults(names[3], with_integers(k4_counted, 20)),
        "serialized": [WAITS] * serialized(compile_launch(k3._replace(tile=WAITING), 90), 90),
        "register operand": [
            f"register operand: {hazard}" for hazard in register_operands(sass.parse(SPOILT)) if hazard.written
        ],
        "unspoilt": [
            *judge(k2, 90)[1], *judge(k4, 90)[1],
            *loop_faults(names[3], k4_counted),
        ],
    }  # fmt: skip


class _NoDevice:
    """A driver that answers what Triton's launch path asks before it compiles, for a machine without a GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def launched_binary(launch: Launch) -> Any:
    """What ``kernel[grid](...)`` itself would compile on sm_90 for these arguments, with its own hints."""
    triton.runtime.driver.set_active(_NoDevice(90))
    return launch.compile()


def launch_path(dtype: str) -> dict[str, Any]:
    """GoogLeNet's binaries as launches make them on sm_90, without BatchNorm and with one that trains: how many, the
    gate's verdicts on them, and which of them are not, to the byte, what compile_launch() makes of the same launch."""
    found: dict[str, dict[str, Any]] = {}
    keys = set()
    for block, launch in itertools.chain(googlenet_launches(DTYPES[dtype]), normed_launches(DTYPES[dtype])):
        keys.add(binary_key(launch))
        binary = launched_binary(launch)
        if binary.hash not in found:
            figures, faults = verdict(binary, launch, 90)
            same = binary.asm["cubin"] == compile_launch(launch, 90).asm["cubin"]
            if launch.kernel.fn.__name__ in PAIRED:
                # Those of other launches are judged with their loops.
                faults += wgmma_faults(binary, 90)
            name = f"{block} {launch.kernel.fn.__name__} {dtype}"
            found[binary.hash] = {"name": name, "same": same, **figures, "faults": faults}
    return {"dtype": dtype, "keys": len(keys), "binaries": list(found.values())}


def normed_launches(
    dtype: torch.dtype, double: bool = False, *, inference: bool = False
) -> Iterator[tuple[str, Launch]]:
    """Every launch of GoogLeNet's training with BatchNorm, with its block. inference: as well."""
    for block, case in googlenet_cases(double, normed=True):
        if case["save"] or inference:
            for launch in block_launches(**case, dtype=dtype):
                yield block, launch


def pool_path(dtype: str) -> dict[str, int]:
    """How many binaries launches of pools of unlike sizes make of each case of pool_cases() on sm_90."""
    found = {}
    for name, case in pool_cases():
        others = case | {"pool": PoolShape(1, 1, 1, 1)}, case | {"pool": PoolShape(3, 16, 33, 0, True)}
        launches = [launch for at in (case, *others) for launch in launches_of(at, DTYPES[dtype], 90)]
        found[name] = len({launched_binary(launch).hash for launch in launches})
    return found


def jobs(cases: Iterable[Case], dtypes: Sequence[str], capabilities: Sequence[int]) -> list[Job]:
    """One job a binary."""
    found: dict[tuple[Any, ...], Job] = {}
    for (label, kwargs, supported, which), dtype, capability in itertools.product(cases, dtypes, capabilities):
        if capability in supported:
            launches = launches_of(kwargs, DTYPES[dtype], capability)
            for index in range(len(launches))[which]:
                launch = launches[index]
                key = (*binary_key(launch), capability)
                name = f"{launch.kernel.fn.__name__} {label} {dtype}"
                found.setdefault(key, Job(name, key, (dtype, kwargs, index), capability))
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", choices=CASES, default="every", help="every (default), rules, quick, pools or stem")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=",".join(DTYPES))
    every = ",".join(map(str, EVERY_CAPABILITY))
    parser.add_argument("--capabilities", type=some_of(EVERY_CAPABILITY), default=every)
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--launched", action="store_true", help="also what launches compile, and planted faults")
    args = parser.parse_args()
    todo = jobs(CASES[args.cases](), args.dtypes, args.capabilities)
    found: dict[str, Any] = {"triton": triton.__version__, "binaries": []}
    with ProcessPoolExecutor(args.workers) as pool:
        # fp16 is left out: its launches are bf16's but for the type.
        dtypes = ("fp32", "bf16") if args.launched else ()
        launched = pool.map(launch_path, dtypes)
        # Behind the others, which have compiled most of them.
        loops = pool.map(run_loop, counting.jobs(dtypes, sorted({*args.capabilities} & {*LOOPED})))
        for result in pool.map(run_job, todo):
            found["binaries"].append(result)
            figures = " ".join(f"{name} {result.get(name, '-')}" for name in FIGURES)
            tile = "x".join(str(result["tile"][name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
            line = f"{result['name']} sm_{result['capability']} {tile}: {figures}"
            print(line, *result["faults"], sep="  ", flush=True)
        found["launched"] = list(launched)
        found["loops"] = list(loops)
    if args.launched:
        found["planted"] = planted()
        found["pools"] = {name: pool_path(name) for name in DTYPES}
        found["counts"] = {
            f"{name}{' two 3x3' * double}": len(
                set(map(binary_key, map(itemgetter(1), googlenet_launches(DTYPES[name], double))))
            )
            for name in DTYPES
            for double in (False, True)
        }
        found["normed_counts"] = {
            f"{name}{' two 3x3' * double} {kind}": len(
                {binary_key(launch) for _, launch in normed_launches(DTYPES[name], double, inference=kind == "all")}
            )
            for name in DTYPES
            for double in (False, True)
            for kind in ("all", "training")
        }
        found["apart"] = {
            name: len({binary_key(launch) for _, launch in googlenet_launches(DTYPES[name], pairs=False)})
            for name in DTYPES
        }
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))
    bad = [result for result in (*found["binaries"], *found.get("loops", ())) if result["faults"]]
    print(f"{len(found['binaries'])} binaries under Triton {triton.__version__}, {len(bad)} refused")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
