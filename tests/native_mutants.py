"""Seeded bugs in copies of the kernels' text, each of which the simulator's suite must catch.

    python tests/native_mutants.py [--only NAME]

Prints a table: bug, the problem and the timing that caught it first, and how it showed. Exit code 1 if one survives,
or if the unchanged copy fails. Only the changed kernels are compiled; the rest comes from one build of the real ones.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from simulator import CSRC, ELEMENTS, build

FLAGS = ("-O0", "-Wno-error")
LIMIT_S = 60.0
"""A mutant that runs longer than this hangs; the whole suite of one element takes a second."""


class Mutant(NamedTuple):
    """``old``, which must occur exactly once in csrc's .cuh files, becomes ``new``."""

    name: str
    old: str
    new: str
    element: str = "bf16"


READ_A = "a_slot + operand_chunk(a_row + i * Config::MMA_M, chunk + lane / 16)"
COPY = "ptx::copy_async(to, valid ? static_cast<const void*>(row + k) : any, valid ? 16 : 0);"
ARRIVED = "    ptx::wait_copies<Config::STAGES - 2>();\n"
BARRIER = "    ptx::sync_threads();\n"
FILL = "    load_step<Config>(operands, rows, step + Config::STAGES - 1, steps);\n"
STAGE = "  ptx::sync_threads();\n  const int lane"
STAGED = "  }\n  ptx::sync_threads();\n}"

MUTANTS = (
    Mutant("swizzle dropped where x is read", READ_A,
           "a_slot + (a_row + i * Config::MMA_M) * 64 + (chunk + lane / 16) * 16"),
    Mutant("copies awaited one too few", ARRIVED, ARRIVED.replace("- 2", "- 1")),
    Mutant("copies not awaited", ARRIVED, ""),
    Mutant("no barrier in the main loop", BARRIER + FILL, FILL),
    Mutant("barrier after the slot is overwritten", BARRIER + FILL, FILL + BARRIER),
    Mutant("no barrier before the result takes the ring's place", STAGE, "  const int lane"),
    Mutant("no barrier between the result and its readers", STAGED, "  }\n}"),
    Mutant("slot filled one ahead of its step", "step % Config::STAGES * Config::STAGE_BYTES + operand_chunk",
           "(step + 1) % Config::STAGES * Config::STAGE_BYTES + operand_chunk"),
    Mutant("last step of K left out", "(operands.k() - 1) / Config::BLOCK_K + 1", "operands.k() / Config::BLOCK_K"),
    *(
        Mutant(f"K tail of shared memory not initialised, {element}", COPY, f"if (valid) {COPY}", element)
        for element in ELEMENTS
    ),
    *(
        Mutant(f"K tail not initialised in unaligned rows, {element}", "ptx::store_shared(to, out.chunk);",
               "if (row != nullptr && k < size) ptx::store_shared(to, out.chunk);", element)
        for element in ELEMENTS
    ),
    Mutant("M guard of the copies dropped", "m < p.m ? static_cast<const Element*>(p.x) + m * p.x_stride : nullptr",
           "static_cast<const Element*>(p.x) + m * p.x_stride"),
    Mutant("M guard of the stores dropped", "if (origin.m + row >= p.m) break;", ""),
    Mutant("N guard dropped", "return {n < p.k[2] ? 2 : kGroups, n};", "return {2, n};"),
    Mutant("K guard dropped", "row != nullptr && k < size;", "row != nullptr;"),
    Mutant("divergent ldmatrix", "      ptx::load_matrices(b[j]",
           "      if (lane < 16 || j > 0) ptx::load_matrices(b[j]"),
    Mutant("halves of w's fragments exchanged", "chunk + lane / 8 % 2", "chunk + 1 - lane / 8 % 2"),
    Mutant("accumulator not reset", "Accumulators<Config> acc = {};", "static Accumulators<Config> acc;"),
    Mutant("row stride of x taken for its width", "+ m * p.x_stride : nullptr", "+ m * p.c : nullptr"),
    Mutant("padding of r3 forgotten", "row + p.r5 : nullptr", "row + p.k[1] : nullptr"),
    Mutant("last rows of tiles in a group of eight", "min(tiles_m - first, Config::GROUP_M)", "Config::GROUP_M"),
    Mutant("shift of the first group for all", "choose(p.shift, column.group)", "choose(p.shift, 0)"),
    Mutant("scale and shift exchanged", "acc * scale + shift;", "acc * shift + scale;"),
    Mutant("ReLU loses NaN", "relu && value < 0.0f ? 0.0f : value", "relu && !(value > 0.0f) ? 0.0f : value"),
    Mutant("ReLU always", "return relu && value < 0.0f", "return value < 0.0f"),
    Mutant("mask bits of other groups", "if (n + e < p.k[0] && passes", "if (passes"),
    Mutant("mask bits in the reverse order", "bits |= 1u << (part + e)", "bits |= 128u >> (part + e)"),
    Mutant("mask bits at the tile's first byte", "+ n / 8] =", "+ octet / 8] ="),
    Mutant("TF32 operands of w not centred", "      centre_operand<typename Config::Element>(b[j]);\n", "", "tf32"),
    Mutant("subnormal results count as zero", "e % 2 * 16 & 0x7fffu", "e % 2 * 16 & 0x7f80u"),
    Mutant("bits of fp32 values as if they were 16-bit", "return (chunk.word[e] & 0x7fffffffu) != 0;",
           "return (chunk.word[e] & 0x7fffu) != 0;", "tf32"),
)  # fmt: skip


class Verdict(NamedTuple):
    """problem, timing: the first that failed, empty where the mutant was not caught; how: the failure in words."""

    mutant: Mutant
    problem: str
    timing: str
    how: str

    @property
    def caught(self) -> bool:
        return bool(self.how)


def judge(mutant: Mutant, base: Path, folder: Path) -> Verdict:
    """Compile the mutant and run its element's problems. Raises RuntimeError where it cannot be made or compiled."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    if mutant.old:
        sources = {path: path.read_text() for path in sorted(csrc.glob("*.cuh"))}
        found = [path for path, text in sources.items() for _ in range(text.count(mutant.old))]
        if len(found) != 1:
            raise RuntimeError(f"{mutant.name}: its text occurs {len(found)} times in csrc's .cuh files, not once")
        found[0].write_text(sources[found[0]].replace(mutant.old, mutant.new))
    module = build(folder, FLAGS, changed=csrc, base=base, elements=(mutant.element,))
    suite = Path(__file__).with_name("native_suite.py")
    command = [sys.executable, str(suite), str(module), "--element", mutant.element]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return Verdict(mutant, "", "", f"hangs for {LIMIT_S:.0f} s")
    if done.returncode == 0:
        return Verdict(mutant, "", "", "")
    if not done.stdout:
        # What the suite began last; after it may come the last words of the C library about its heap.
        begun = [line for line in done.stderr.splitlines() if " | " in line] or [" | "]
        problem, timing = begun[-1].split(" | ")
        return Verdict(mutant, problem, timing, "the process dies")
    problem, timing, how = done.stdout.splitlines()[0].split(" | ", 2)
    # Without the line, which moves with every edit.
    return Verdict(mutant, problem, timing, re.sub(r" at \S+:\d+ \(cudaError 719\)$", "", how.split("simulator: ")[-1]))


def judge_all(base: Path, folder: Path, mutants: Sequence[Mutant] = MUTANTS) -> Iterator[Verdict]:
    """In order, as they are ready. base: folder of a build of the real sources with FLAGS."""
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        yield from pool.map(lambda item: judge(item[1], base, folder / str(item[0])), enumerate(mutants))


def table(verdicts: Sequence[Verdict]) -> str:
    """The verdicts in Markdown."""
    lines = ["| bug | caught by | timing | how it showed |", "|---|---|---|---|"]
    for v in verdicts:
        lines.append(f"| {v.mutant.name} | {v.problem or '-'} | {v.timing or '-'} | {v.how or 'NOT CAUGHT'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="mutants whose name contains this")
    options = parser.parse_args()
    chosen = [m for m in MUTANTS if (options.only or "") in m.name]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        build(folder / "base", FLAGS)
        control = judge(Mutant("unchanged", "", ""), folder / "base", folder / "control")
        verdicts = list(judge_all(folder / "base", folder, chosen))
    print(table(verdicts))
    if control.caught:
        print(f"the unchanged copy fails: {control.problem}: {control.how}", file=sys.stderr)
    return int(control.caught or not all(v.caught for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
