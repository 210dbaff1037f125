"""Counts the instructions of GoogLeNet's launches in their machine code, without a GPU, for the forecast.

    python python/count.py                                  count all, write inception_fused/plan/counts.json
    python python/count.py --print                          what the file says, as a table
    python python/count.py --loop K4 --capability 90        count one launch and print its loops' instructions
    python python/count.py --compare BEFORE.json [AFTER.json]

bf16 and fp32 (TF32) on sm_80, sm_89 and sm_90: 256 binaries, four minutes on two cores. Run it after changing a kernel
or a rule of tiles, with the Triton that the file names; a test says when the file is stale.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from counter import counting, printing
from inception_fused.plan import counts
from inception_fused.runtime.launch import INTERPRETED


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 2 for a wrong call."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=counts.FILE, help="the file to write (the package's)")
    parser.add_argument("--dtypes", default="bf16,fp32", help="bf16,fp32; fp16's kernels are bf16's but for the type")
    parser.add_argument("--capabilities", default=",".join(map(str, counting.CAPABILITIES)))
    parser.add_argument("--capability", type=int, default=90, help="of --loop (90)")
    parser.add_argument("--kernels", default="", metavar="TEXT", help="only binaries whose key has this text")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--print", action="store_true", help="print the file of --out instead")
    what.add_argument("--loop", metavar="LAUNCH", help="print the loops of a launch, called as in the plan")
    what.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="print what changed between two files")
    chosen = parser.parse_args(arguments)
    if chosen.print:
        print(printing.table(counts.parse(chosen.out.read_text())))
        return 0
    if chosen.compare:
        before, after = (*chosen.compare, chosen.out)[:2]
        print(printing.compared(*(counts.parse(path.read_text()) for path in (before, after))))
        return 0
    if INTERPRETED:
        parser.error("TRITON_INTERPRET is set: this process interprets kernels and cannot compile them")
    dtypes = chosen.dtypes.split(",")
    if chosen.loop:
        print(printing.loops(chosen.loop, dtypes[0], chosen.capability))
        return 0
    capabilities = [int(capability) for capability in chosen.capabilities.split(",")]
    wanted = (dtypes, capabilities, chosen.kernels)
    found = counting.count([*counting.jobs(*wanted), *counting.pool_jobs(*wanted)], chosen.workers)
    chosen.out.write_text(counts.as_text(found))
    print(printing.table(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
