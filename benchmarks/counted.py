"""Counted times of every launch of the nine blocks, from the machine code's instruction counts; nothing is measured.

    python benchmarks/counted.py [--card H200] [--dtype bf16] [--batch 128]      tables of the package's counts
    python benchmarks/counted.py --counts FILE --commit HASH --json OUT.json     every point of a file of counts
    python benchmarks/counted.py --compare BEFORE.json [AFTER.json]              before and after, in Markdown
    python benchmarks/counted.py --again BEFORE.json --counts FILE --json OUT    a result by today's model and cards
    python benchmarks/counted.py --network [--commit HASH --json network.json]   the whole network, part by part

Counts are made by python/count.py. Tiles and ranges are those of the plan in this checkout, with --again those of the
result. All kernels are Triton's, also where the plan prefers a compiled one. A result whose counts lie beside it, as
BEFORE_counts.json, is computed again before it is compared, so that both sides are of one model. Where network.json
lies beside AFTER.json, its tables follow.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# The checkout's own package and cases, whether or not another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.cases import counted, counted_network
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
    parser.add_argument("--again", type=Path, metavar="FILE", help="a result to compute again from its --counts")
    parser.add_argument("--network", action="store_true", help="GoogLeNet whole instead, at 224x224 and 96x96")
    chosen = parser.parse_args(arguments)
    if chosen.network and (chosen.compare or chosen.again):
        parser.error("--network: counts anew; --compare shows the network.json beside its second file")
    known = counts.parse(chosen.counts.read_text())
    if chosen.compare:
        before, *after = map(_result, chosen.compare[:2])
        print(counted.compared(before, after[0] if after else counted.collect(known, chosen.commit)))
        network = chosen.compare[-1].with_name(counted_network.FILE)
        if after and network.exists():
            print(f"\n{counted_network.report(json.loads(network.read_text()))}")
        return
    if chosen.again:
        found = counted.again(json.loads(chosen.again.read_text()), known)
    else:
        found = (counted_network if chosen.network else counted).collect(known, chosen.commit)
    if chosen.json:
        files.write(chosen.json, as_json(found).encode())
        return
    shown = counted_network if chosen.network else counted
    for point in found["points"]:
        if all(getattr(chosen, name) in (None, point[name]) for name in ("card", "dtype", "batch")):
            print(f"{shown.title(point)}\n\n{shown.table(point)}\n")


def _result(path: Path) -> dict:
    """A file of --json, computed again where its counts lie beside it."""
    data, beside = json.loads(path.read_text()), path.with_name(f"{path.stem}_counts.json")
    return counted.again(data, counts.parse(beside.read_text())) if beside.exists() else data


def as_json(found: dict) -> str:
    """A line a launch, or a part."""
    head = {name: value for name, value in found.items() if name != "points"}
    points = []
    for point in found["points"]:
        rows = next(name for name in ("launches", "parts") if name in point)
        place = {name: value for name, value in point.items() if name != rows}
        lines = ",\n".join(json.dumps(row) for row in point[rows])
        points.append(f'{json.dumps(place)[:-1]}, "{rows}": [\n{lines}]}}')
    return f'{json.dumps(head)[:-1]}, "points": [\n' + ",\n".join(points) + "\n]}\n"


if __name__ == "__main__":
    main()
