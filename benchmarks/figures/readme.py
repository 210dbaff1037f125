"""The generated sections of README.md, between `<!-- figures:NAME -->` and `<!-- /figures:NAME -->`.

Every figure in them comes from a file of benchmarks/results: status, performance, timeline and host from the newest
result files, performance and network from what `python benchmarks/counted.py` wrote, installation from what
`python tests/install_cases.py --json benchmarks/results/installation.json` wrote.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.cases.machine import sources_hash
from benchmarks.cases.timeline import PASSES, floor_timeline, one_point, point_words
from benchmarks.figures import network_summary
from benchmarks.figures.counted_summary import counted_summary
from benchmarks.figures.pictures import FLOOR_POINT, FLOORS_TITLE, SPEEDUP_WORDS, draw, floor_panels, speedup_panels
from benchmarks.figures.report_tables import goals_table, markdown_table, slower_points, sums_table
from benchmarks.figures.result_files import INSTALLATION, Case, Measured, ResultFileError, newest, write

MARKED = re.compile(r"(<!-- figures:([\w-]+) -->\n)(.*?)(<!-- /figures:\2 -->)", re.DOTALL)

MEASURE = "`python python/gpu_check.py` and `python -m pytest benchmarks --benchmark-only` measure it on your card."


def update_readme(root: Path, results: Path) -> list[str]:
    """Rewrites README.md's sections and the pictures in docs/ from the result files; what was done, line by line.

    Raises ResultFileError for a file that cannot be used; nothing is written then.
    """
    path = root / "README.md"
    files = newest(results) if results.is_dir() else []
    before = path.read_text()
    after = rewritten(before, sections(root, results))
    drawn = [*draw(files, root / "docs"), network_summary.draw(results, root / "docs")]
    write(path, after)
    said = ["README.md: " + ("rewritten" if after != before else "as it was")]
    missing = [name for name in SECTIONS if f"<!-- figures:{name} -->" not in before]
    said += [f"README.md has no section {name}: put <!-- figures:{name} --> and its end there" for name in missing]
    return said + [line.replace("](", "](docs/") for line in drawn]


def rewritten(text: str, found: Mapping[str, str]) -> str:
    """``text`` with what stands between each section's markers replaced.

    Raises ResultFileError for a marker without its other half, and for a section that nothing generates.
    """
    marks = re.findall(r"<!-- (/?figures:[\w-]+) -->", text)
    whole = [name for _, name, _, _ in MARKED.findall(text)]
    if marks != [mark for name in whole for mark in (f"figures:{name}", f"/figures:{name}")]:
        raise ResultFileError(
            f"README.md: the markers {', '.join(marks)} are not pairs of <!-- figures:NAME --> and "
            "<!-- /figures:NAME -->, each on a line of its own; mend them"
        )
    unknown = [name for name in whole if name not in found]
    if unknown:
        raise ResultFileError(f"README.md: no section {', '.join(unknown)}; there are {', '.join(found)}")
    return MARKED.sub(lambda match: f"{match[1]}{found[match[2]]}\n{match[4]}", text)


def sections(root: Path, results: Path) -> dict[str, str]:
    """Every section's text by name."""
    files = newest(results) if results.is_dir() else []
    return {name: make(files, root, results) for name, make in SECTIONS.items()}


def status(files: Sequence[Measured], root: Path, results: Path) -> str:
    """What has been proven where, for the beginning of the README."""
    check = next((measured for measured in files if measured.gpu and measured.kind == "gpu_check"), None)
    if check is None:
        return NEVER_RUN if not any(measured.gpu for measured in files) else NOT_CHECKED
    stages = check.results["stages"]
    failed = [name for name, stage in stages.items() if stage.get("status") == "failed"]
    passed = (stages.get("tests", {}).get("figures") or {}).get("passed", 0)
    verdict = f"failed: {', '.join(failed)}" if failed else "no stage failed"
    return (
        f"**Last checked on a GPU** by `python python/gpu_check.py` ({check.environment}): {verdict}, "
        f"{passed} GPU tests passed. {ELSEWHERE}"
    )


ELSEWHERE = (
    "On a CPU the kernels are checked element by element against float64 in Triton's interpreter, the compiled one in "
    "a simulator that runs its own CUDA sources. The PTX of every binary for sm_90, and of one a kernel for sm_80, is "
    "executed by an emulator and compared with float64; that of sm_89, sm_100 and sm_120 is not. Every binary is "
    "judged by its machine code (matrix instructions, 16-byte loads and stores, at most 16 bytes of stack in "
    "GoogLeNet's without BatchNorm)."
)

NEVER_RUN = (
    f"**Nothing here has run on a GPU yet.** {ELSEWHERE} There is no speed to report; `python python/gpu_check.py` "
    "measures it on your card."
)

NOT_CHECKED = f"Timed on a GPU, but `python python/gpu_check.py` has not checked it there. {ELSEWHERE}"


def performance(files: Sequence[Measured], root: Path, results: Path) -> str:
    """Sums over the blocks, on a GPU the goals too, and which kernels were last measured where. Without a GPU what is
    counted."""
    gpu = [measured for measured in files if measured.gpu]
    parts = [] if gpu else [counted_summary(results)]
    for measured in files:
        table = sums_table([case for case in measured.cases if not gpu or _shown(case)])
        if table:
            parts += [f"{measured.environment}.", table]
            break
    for measured in files:
        if speedup_panels(measured):
            parts.append(f"![{SPEEDUP_WORDS}](docs/speedup.png)")
            break
    if gpu:
        slower = [line for measured in gpu for line in slower_points(measured)]
        rule = "; ".join(slower[:5]) + (f"; {len(slower) - 5} more" if len(slower) > 5 else "") if slower else "none"
        parts += [goals_table(gpu), f"Points slower than eager channels_last: {rule}."]
        if any(floor_panels(measured.launches) for measured in gpu):
            parts.append("![floor over time of each launch](docs/floors.png)")
    return "\n\n".join(filter(None, [*parts, freshness(gpu, root)]))


def _shown(case: Case) -> bool:
    """Of a GPU's cases, those of README's table; the others are in the report."""
    return case.dtype in ("bf16", "tf32") and (case.suite != "block" or case.image == 224)


def freshness(gpu: Sequence[Measured], root: Path) -> str:
    """Which commit's kernels were last measured on which GPU, and whether they have changed since."""
    if not gpu:
        return f"The kernels have never been measured on a GPU. {MEASURE}"
    measured, commit = gpu[0], str(gpu[0].machine.get("commit") or "")[:12]
    known = measured.machine.get("kernel_sources")
    if known is None:
        since = "whether they have changed since is not recorded"
    else:
        since = "they have not changed since" if known == sources_hash(root) else "they have changed since"
    at = f"at commit {commit}" if commit else "at a commit that is not recorded"
    dirty = " with uncommitted changes" if measured.machine.get("dirty") else ""
    return f"The kernels were last measured on {measured.gpu} {at}{dirty}; {since}. {MEASURE}"


def network(files: Sequence[Measured], root: Path, results: Path) -> str:
    """What is counted of the whole network."""
    found = network_summary.network_summary(results)
    return found or f"What the whole network takes is not counted; `{network_summary.COMMAND}` counts it."


def timeline(files: Sequence[Measured], root: Path, results: Path) -> str:
    """The picture of a step's launches, measured or by arithmetic, and which of the two it is."""
    measured = next((measured for measured in files if measured.timeline), None)
    rows = one_point(measured.timeline) if measured else floor_timeline(*FLOOR_POINT)
    counts = [
        sum(row["implementation"] == name and row["pass"] == direction for row in rows)
        for name in ("eager", "ours")
        for direction in PASSES
    ]
    return (
        "![the launches of a training step on one time axis, eager above fused](docs/timeline.png)\n\n"
        f"{point_words(rows)}; eager's {counts[0]} launches forward and {counts[1]} backward above ours, "
        f"{counts[2]} and {counts[3]}. {f'Measured on {measured.short}' if measured else FLOORS_TITLE}."
    )


def host(files: Sequence[Measured], root: Path, results: Path) -> str:
    """What a block costs the host."""
    measured = next((measured for measured in files if measured.host), None)
    if measured is None:
        return "What a block costs the host: `python -m pytest benchmarks/test_host.py --benchmark-only` measures it."
    names = {"forward": "forward", "training": "forward + backward"}
    by: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
    for row in measured.host:
        what = names.get(row["mode"], row["mode"])
        # Files without these fields are from before other blocks and layouts were timed.
        if row.get("block", "FusedInception") != "FusedInception":
            what += f", {row['block']}"
        by.setdefault((what, row.get("weights", "channels_last")), {})[row["implementation"]] = row
    rows = []
    for (what, weights), found in by.items():
        timed = [found.get(f"ours, {way}") for way in ("remembered", "planned")]
        cells = [f"{row['min_us']:.0f} ({row['median_us']:.0f})" if row else "" for row in timed]
        rows.append((what, weights, str(next(filter(None, timed))["launches"]), *cells))
    header = ("a block on the host", "weights", "launches", "us, the usual case", "us, tensors of a new kind")
    return (
        f"Python's time with every launch stubbed out, the least of 300 calls and (the median), {measured.environment}:"
        f"\n\n{markdown_table(header, rows)}"
    )


def installation(files: Sequence[Measured], root: Path, results: Path) -> str:
    """How long every way of installing takes."""
    path = results / INSTALLATION
    command = f"`python tests/install_cases.py --json benchmarks/results/{INSTALLATION}`"
    if not path.exists():
        return f"How long each way takes is not recorded for this version; {command} measures it."
    try:
        found = json.loads(path.read_text())
        rows = [_installed(case) for case in found["cases"]]
        cores = found["cores"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ResultFileError(
            f"{path}: is no record of the installation ({error}); make it again with {command}"
        ) from None
    header = (f"case of {command.split(' --')[0]}`, on {cores} cores, PyTorch already there", "seconds", "extension")
    return markdown_table(header, rows)


def _installed(case: Mapping[str, Any]) -> tuple[str, str, str]:
    seconds = "; ".join(f"{case[key]:.0f}" for key in ("seconds", "seconds_again") if key in case)
    outcome = {True: "built", False: "left out, with reason and remedy", None: ""}[case.get("built")]
    return case["what"], seconds, outcome if case["status"] == "as expected" else case["status"]


SECTIONS: dict[str, Callable[[Sequence[Measured], Path, Path], str]] = {
    "status": status,
    "timeline": timeline,
    "performance": performance,
    "network": network,
    "host": host,
    "installation": installation,
}
