"""Counted times of every launch of the nine blocks, from the machine code's instruction counts; nothing is measured.

    python benchmarks/counted.py [--card H200] [--dtype bf16] [--batch 128]      tables of the package's counts
    python benchmarks/counted.py --counts FILE --commit HASH --json OUT.json     every point of a file of counts
    python benchmarks/counted.py --compare BEFORE.json [AFTER.json]              before and after, in Markdown

Counts are made by python/count.py. Tiles, ranges and grids are those of the plan in this checkout.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# The checkout's own package and cases, whether or not another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import counted
from inception_fused.plan import counts
from inception_fused.runtime import files


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--counts", type=Path, default=counts.FILE, help="a file that python/count.py wrote")
    parser.add_argument("--commit", default="", help="of kernels and plan, to stand in the result")
    parser.add_argument("--card", choices=counted.CARD_NAMES, help="one card's tables only")
    parser.add_argument("--dtype", choices=counted.DTYPES)
    parser.add_argument("--batch", type=int, choices=counted.BATCHES)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write every point, print no table")
    parser.add_argument("--compare", type=Path, nargs="+", metavar="FILE", help="results of --json; the second: now")
    chosen = parser.parse_args(arguments)
    if chosen.compare:
        before, *after = (json.loads(path.read_text()) for path in chosen.compare[:2])
        now = after[0] if after else counted.collect(counts.parse(chosen.counts.read_text()), chosen.commit)
        print(counted.compared(before, now))
        return
    found = counted.collect(counts.parse(chosen.counts.read_text()), chosen.commit)
    if chosen.json:
        files.write(chosen.json, as_json(found).encode())
        return
    for point in found["points"]:
        if all(getattr(chosen, name) in (None, point[name]) for name in ("card", "dtype", "batch")):
            print(f"{counted.title(point)}\n\n{counted.table(point)}\n")


def as_json(found: dict) -> str:
    """A line a launch."""
    head = {name: value for name, value in found.items() if name != "points"}
    points = []
    for point in found["points"]:
        place = {name: value for name, value in point.items() if name != "launches"}
        rows = ",\n".join(json.dumps(row) for row in point["launches"])
        points.append(f'{json.dumps(place)[:-1]}, "launches": [\n{rows}]}}')
    return f'{json.dumps(head)[:-1]}, "points": [\n' + ",\n".join(points) + "\n]}\n"


if __name__ == "__main__":
    main()
