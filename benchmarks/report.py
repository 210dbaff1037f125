"""Report of measured result files: tables and pictures, two files compared, and the generated sections of README.md.

    python benchmarks/report.py [FILE_OR_FOLDER ...] [--out DIR]    report.md and pictures
    python benchmarks/report.py --compare BEFORE AFTER [--threshold 0.05]
    python benchmarks/report.py --readme                            from benchmarks/results

Result files are those of `pytest benchmarks --benchmark-only --benchmark-json FILE` and gpu_check's results.json. Of a
folder its newest are read, a GPU's before a CPU's; without an argument of benchmarks/results.

Exit code: 0; 1 if --compare found a point slower by more than the threshold and the measurements' spread; 2 for a wrong
command line, a result file that cannot be used, or no point in common. Nothing is written then.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

# The checkout's own package and helpers, whether or not another version is installed.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.figures.comparing import changes, comparison
from benchmarks.figures.pictures import MissingLibraryError, draw
from benchmarks.figures.readme import update_readme
from benchmarks.figures.report_tables import (
    case_table,
    goals_table,
    gpu_check_tables,
    slower_points,
    sums_table,
    yardsticks_table,
)
from benchmarks.figures.result_files import CPU_ONLY, Measured, ResultFileError, load, newest, write

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def files_of(paths: Sequence[Path]) -> list[Measured]:
    """The result files of a command line. Raises ResultFileError for one that cannot be used, or if there is none."""
    found: list[Measured] = []
    for path in paths or [RESULTS]:
        if path.is_dir():
            inside = newest(path)
            if not inside:
                raise ResultFileError(
                    f"{path}: holds no result file; measure with `python -m pytest benchmarks --benchmark-only "
                    f"--benchmark-json {path / 'NAME.json'}` or `python python/gpu_check.py`"
                )
            found += inside
        else:
            found.append(load(path))
    return found


def report(files: Sequence[Measured], drawn: Sequence[str]) -> str:
    """The report as Markdown. drawn: what :func:`draw` returns."""
    parts = ["# Measured", "\n".join(f"- {measured.environment}" for measured in files)]
    if not any(measured.gpu for measured in files):
        parts.append(CPU_ONLY)
    parts += ["## Goals", GOALS_NOTE, goals_table(files), "## Public yardsticks", yardsticks_table(files)]
    parts.append("## Slower than eager channels_last")
    slower = [f"- {line}" for measured in files for line in slower_points(measured)]
    compared = any(case.ratio("ours", "eager") for measured in files for case in measured.cases)
    parts.append("\n".join(slower) or ("No point." if compared else "Not measured: no point has both on a GPU."))
    parts += ["## Pictures", "\n\n".join(drawn)]
    for measured in files:
        tables = [sums_table(measured.cases), case_table(measured), *gpu_check_tables(measured)]
        found = [table for table in tables if table]
        parts += [f"## {measured.path.name}", measured.environment, *(found or ["No case was measured."])]
    return "\n\n".join(parts) + "\n"


GOALS_NOTE = (
    "Sums over a scenario's cases, of device time: x eager channels_last / x torch.compile in the fastest mode that "
    'was measured, x floor, microseconds. Times and floors are goals for an NVIDIA H200. "open": a figure that '
    "decides is missing."
)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("paths", nargs="*", type=Path, metavar="FILE_OR_FOLDER")
    parser.add_argument("--out", type=Path, default=Path("runs/report"), help="folder of the report (runs/report)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("--threshold", type=float, default=0.05, help="slower by this share is slower (0.05)")
    parser.add_argument("--readme", action="store_true", help="rewrite the generated sections of README.md")
    options = parser.parse_args(arguments)
    if options.compare and (options.paths or options.readme):
        parser.error("--compare takes its two files and nothing else")
    if options.readme and options.paths:
        parser.error(f"--readme is written from {RESULTS.relative_to(ROOT)} alone; put result files there")
    if options.threshold < 0:
        parser.error(f"--threshold: got {options.threshold:g}, wants a share of 0 or more, such as 0.05")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    options = parse(arguments)
    try:
        if options.compare:
            before, after = (files_of([path])[0] for path in options.compare)
            found = changes(before, after)
            print(comparison(before, after, found, options.threshold), end="")
            return int(any(change.slower(options.threshold) for change in found))
        if options.readme:
            print("\n".join(update_readme(ROOT, RESULTS)))
            return 0
        files = files_of(options.paths)
        options.out.mkdir(parents=True, exist_ok=True)
        try:
            drawn = draw(files, options.out)
        except MissingLibraryError as error:
            drawn = [f"No pictures: {error}"]
        text = report(files, drawn)
        write(options.out / "report.md", text)
    except (ResultFileError, MissingLibraryError, OSError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 2
    print(text + f"\nin {options.out / 'report.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
