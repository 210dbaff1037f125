"""Judges GoogLeNet's binaries under every Triton that a supported PyTorch brings, on every architecture.

    python tests/aot/triton_table.py                               the whole table: 2400 binaries, forty minutes
    python tests/aot/triton_table.py --triton installed --triton 3.8.0
    python tests/aot/triton_table.py --write                       the table into DESIGN.md

Each Triton is installed by itself into a folder and put before the environment's. One that pip cannot get is skipped by
name. Ends with 1 where a binary is refused that EXCEPTIONS does not know, or where an exception is no longer needed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from inception_fused.runtime.triton_versions import PINS, is_known
from inception_fused.tools.progress import progress

ROOT = Path(__file__).resolve().parents[2]

TRITONS = ("3.5.1", "3.6.0", "3.7.1", "3.8.0", "newest")
"""Those that a supported PyTorch pins, and the newest, which goes with a CPU build."""

CAPABILITIES = (80, 89, 90, 100, 120)
DTYPES = ("bf16", "fp32")
BINARIES = 64
"""Most of GoogLeNet's for one dtype and architecture, without BatchNorm and trained with it."""

SECTION = re.compile(r"(<!-- table:triton -->\n).*?(<!-- /table:triton -->)", re.S)


class Known(NamedTuple):
    """Spills that stay. stack: the most bytes; reason: why they are borne; tritons: under which, () for any."""

    kernel: str
    dtype: str
    capabilities: tuple[int, ...]
    stack: int
    reason: str
    tritons: tuple[str, ...] = ()

    def covers(self, triton: str, binary: dict[str, Any]) -> bool:
        return (
            binary["kernel"] == self.kernel
            and binary["dtype"] == self.dtype
            and binary["capability"] in self.capabilities
            and triton in (self.tritons or (triton,))
            and all(fault.startswith("spills") for fault in binary["faults"])
            and binary["stack"] <= self.stack
        )


EXCEPTIONS = (
    Known(
        "grouped_gemm_kernel", "bf16", (89,), 24,
        "K1's raw values in 16-bit types on sm_89: six words of addresses, read four times a step beside 128 products",
    ),
)  # fmt: skip
"""Few since tiles that spilled under some Triton have eight warps on the architecture where they did."""


class Judged(NamedTuple):
    """What one Triton makes. skipped: why it was not asked, else None."""

    triton: str
    binaries: list[dict[str, Any]]
    skipped: str | None = None

    def refused(self) -> list[dict[str, Any]]:
        """Binaries with a fault that no exception covers."""
        return [
            binary for binary in self.binaries
            if binary["faults"] and not any(known.covers(self.triton, binary) for known in EXCEPTIONS)
        ]  # fmt: skip


class CannotGetError(RuntimeError):
    """pip did not deliver a Triton."""


def provide(version: str, folder: Path) -> Path | None:
    """The folder in which a Triton lies, installed where it is not yet; None for the environment's own.

    Raises:
        CannotGetError: pip did not deliver it.
    """
    if version == "installed":
        return None
    place = folder / version
    if not (place / "triton").is_dir():
        wanted = "triton" if version == "newest" else f"triton=={version}"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), wanted]
        done = subprocess.run(pip, capture_output=True, text=True)
        if done.returncode:
            raise CannotGetError((done.stderr.strip().splitlines() or ["pip said nothing"])[-1])
    return place


def judge(version: str, folder: Path, capabilities: Sequence[int], dtypes: Sequence[str]) -> Judged:
    """Compile and judge with one Triton, in a process of its own."""
    try:
        place = provide(version, folder)
    except CannotGetError as error:
        return Judged(version, [], f"pip cannot get it: {error}")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    paths = [str(place) if place else "", str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    with tempfile.TemporaryDirectory() as scratch:
        environment["TRITON_CACHE_DIR"] = scratch
        findings = Path(scratch, "found.json")
        command = [
            sys.executable, str(Path(__file__).with_name("aot_gate.py")), "--cases", "rules", "--json", str(findings),
            "--capabilities", ",".join(map(str, capabilities)), "--dtypes", ",".join(dtypes),
        ]  # fmt: skip
        with subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as gate:
            total = BINARIES * len(dtypes) * len(capabilities)
            lines = list(progress(gate.stdout, total, f"Triton {version}", "binaries"))
        if not findings.exists():
            raise RuntimeError(
                f"tests/aot/aot_gate.py under Triton {version} ended with {gate.returncode}:\n{''.join(lines)}"
            )
        found = json.loads(findings.read_text())
    return Judged(found["triton"], found["binaries"])


def table(rows: Iterable[Judged], capabilities: Sequence[int] = CAPABILITIES) -> str:
    """Markdown: a row for each Triton, a column for each architecture, refused and known faults, the largest stack."""
    lines = [
        "| Triton | PyTorch | " + " | ".join(f"sm_{capability}" for capability in capabilities) + " |",
        "|---|---|" + "---|" * len(capabilities),
    ]
    for row in rows:
        if row.skipped:
            continue
        cells = [
            _cell(row, [binary for binary in row.binaries if binary["capability"] == capability])
            for capability in capabilities
        ]
        lines.append(f"| {row.triton} | {_pinned_by(row.triton)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _pinned_by(triton: str) -> str:
    """The PyTorch releases whose wheels for CUDA ask for a Triton, without their last number."""
    found = [torch for torch, _ in PINS if is_known(torch, triton)]
    return ", ".join(dict.fromkeys(".".join(torch.split(".")[:2]) for torch in found)) or "CPU builds"


def _cell(row: Judged, binaries: list[dict[str, Any]]) -> str:
    if not binaries:
        return ""
    refused = [binary for binary in row.refused() if binary in binaries]
    known = sum(bool(binary["faults"]) for binary in binaries) - len(refused)
    clean = [binary for binary in binaries if not binary["faults"]]
    parts = [f"{len(clean)} clean, stack {max((binary['stack'] for binary in clean), default=0)}"]
    parts += [f"{known} known"] if known else []
    parts += [f"**{len(refused)} refused**"] if refused else []
    return ", ".join(parts)


def listing(rows: Iterable[Judged]) -> list[str]:
    """Known faults, one line for each exception, with the figures found."""
    lines = []
    for known in EXCEPTIONS:
        found = [
            f"{row.triton} sm_{binary['capability']} {binary['dtype']} {binary['stack']}"
            for row in rows
            for binary in row.binaries
            if binary["faults"] and known.covers(row.triton, binary)
        ]
        if found:
            lines.append(f"- {known.reason} ({'; '.join(found)}).")
    return lines


def stale(rows: Sequence[Judged], capabilities: Sequence[int], dtypes: Sequence[str]) -> list[Known]:
    """Exceptions that no Triton needs, where all were judged."""
    every = len([row for row in rows if not row.skipped]) >= len(TRITONS)
    return [
        known for known in EXCEPTIONS
        if every and set(capabilities) >= set(known.capabilities) and known.dtype in dtypes
        and not any(binary["faults"] and known.covers(row.triton, binary) for row in rows for binary in row.binaries)
    ]  # fmt: skip


def write(text: str, path: Path = ROOT / "DESIGN.md") -> None:
    """Put the table between its marks in DESIGN.md."""
    design, count = SECTION.subn(lambda found: f"{found[1]}{text}\n{found[2]}", path.read_text(encoding="utf-8"))
    if count != 1:
        raise ValueError(f"{path}: wants one section <!-- table:triton -->, has {count}")
    path.write_text(design, encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--triton", action="append", metavar="VERSION",
        help=f'a version, "newest" or "installed" (the environment\'s); default {", ".join(TRITONS)}',
    )  # fmt: skip
    parser.add_argument("--capabilities", default=",".join(map(str, CAPABILITIES)))
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="fp16's binaries are bf16's but for the type")
    parser.add_argument("--folder", type=Path, help="keep Tritons here (default: a temporary folder)")
    parser.add_argument("--write", action="store_true", help="put the table into DESIGN.md")
    args = parser.parse_args(argv)
    capabilities, dtypes = [int(c) for c in args.capabilities.split(",")], args.dtypes.split(",")
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for version in args.triton or TRITONS:
            row = judge(version, args.folder or Path(scratch), capabilities, dtypes)
            rows.append(row)
            if row.skipped:
                print(f"Triton {row.triton}: skipped, {row.skipped}", flush=True)
            for binary in row.refused():
                name = f"Triton {row.triton} {binary['name']} sm_{binary['capability']}"
                print(f"{name}: {'; '.join(binary['faults'])}", flush=True)
    text = "\n".join([table(rows, capabilities), "", *listing(rows)]).rstrip()
    print(text)
    unneeded = stale(rows, capabilities, dtypes)
    for known in unneeded:
        print(f"no longer needed in EXCEPTIONS: {known}")
    if args.write:
        write(text)
    return 1 if unneeded or any(row.refused() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
