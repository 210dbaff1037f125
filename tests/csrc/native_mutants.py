"""Seeded bugs in copies of the kernels' text, each of which the simulator's suite must catch.

    python tests/csrc/native_mutants.py [--only NAME]

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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulator import CSRC, ELEMENTS, FLAGS, KERNELS, build, unit_name

LIMIT_S = 60.0
"""A mutant that runs longer than this hangs; the whole suite of one element takes a second."""


class Mutant(NamedTuple):
    """``old``, which must occur exactly once in ``file`` of csrc, becomes ``new``; judged by one kernel's problems."""

    name: str
    file: str
    old: str
    new: str
    element: str = "bf16"
    kernel: str = "grouped_gemm"


TILE, GEMM, DGRAD = "gemm_tile.cuh", "grouped_gemm.cuh", "grouped_dgrad.cuh"
READ_A = "a_slot + operand_chunk(a_row + i * Config::MMA_M, chunk + lane / 16)"
COPY = "ptx::copy_async(to, valid ? static_cast<const void*>(row + k) : any, valid ? 16 : 0);"
ARRIVED = "    ptx::wait_copies<Config::STAGES - 2>();\n"
BARRIER = "    ptx::sync_threads();\n"
FILL = "    load_step<Config>(operands, rows, step + Config::STAGES - 1, steps);\n"
STAGE = "  ptx::sync_threads();\n  const int lane"
STAGED = "  }\n  ptx::sync_threads();\n}"

GEMM_MUTANTS = (
    Mutant("swizzle dropped where x is read", TILE, READ_A,
           "a_slot + (a_row + i * Config::MMA_M) * 64 + (chunk + lane / 16) * 16"),
    Mutant("copies awaited one too few", TILE, ARRIVED, ARRIVED.replace("- 2", "- 1")),
    Mutant("copies not awaited", TILE, ARRIVED, ""),
    Mutant("no barrier in the main loop", TILE, BARRIER + FILL, FILL),
    Mutant("barrier after the slot is overwritten", TILE, BARRIER + FILL, FILL + BARRIER),
    Mutant("no barrier before the result takes the ring's place", TILE, STAGE, "  const int lane"),
    Mutant("no barrier between the result and its readers", TILE, STAGED, "  }\n}"),
    Mutant("slot filled one ahead of its step", TILE, "step % Config::STAGES * Config::STAGE_BYTES + operand_chunk",
           "(step + 1) % Config::STAGES * Config::STAGE_BYTES + operand_chunk"),
    Mutant("last step of K left out", TILE, "(operands.k() - 1) / Config::BLOCK_K + 1",
           "operands.k() / Config::BLOCK_K"),
    *(
        Mutant(f"K tail of shared memory not initialised, {element}", TILE, COPY, f"if (valid) {COPY}", element)
        for element in ELEMENTS
    ),
    *(
        Mutant(f"K tail not initialised in unaligned rows, {element}", TILE, "ptx::store_shared(to, out.chunk);",
               "if (row != nullptr && k < size) ptx::store_shared(to, out.chunk);", element)
        for element in ELEMENTS
    ),
    Mutant("M guard of the copies dropped", GEMM,
           "m < p.m ? static_cast<const Element*>(p.x) + m * p.x_stride : nullptr",
           "static_cast<const Element*>(p.x) + m * p.x_stride"),
    Mutant("M guard of the stores dropped", GEMM, "if (origin.m + row >= p.m) break;", ""),
    Mutant("N guard dropped", GEMM, "return {n < p.k[2] ? 2 : kGroups, n};", "return {2, n};"),
    Mutant("K guard dropped", TILE, "row != nullptr && k < size;", "row != nullptr;"),
    Mutant("divergent ldmatrix", TILE, "      ptx::load_matrices(b[j]",
           "      if (lane < 16 || j > 0) ptx::load_matrices(b[j]"),
    Mutant("halves of w's fragments exchanged", TILE, "chunk + lane / 8 % 2", "chunk + 1 - lane / 8 % 2"),
    Mutant("accumulator not reset", GEMM, "Accumulators<Config> acc = {};", "static Accumulators<Config> acc;"),
    Mutant("row stride of x taken for its width", GEMM, "+ m * p.x_stride : nullptr", "+ m * p.c : nullptr"),
    Mutant("padding of r3 forgotten", GEMM, "row + p.r5 : nullptr", "row + p.k[1] : nullptr"),
    Mutant("last rows of tiles in a group of eight", TILE, "min(tiles_m - first, Config::GROUP_M)", "Config::GROUP_M"),
    Mutant("shift of the first group for all", GEMM, "choose(p.shift, column.group)", "choose(p.shift, 0)"),
    Mutant("scale and shift exchanged", GEMM, "acc * scale + shift;", "acc * shift + scale;"),
    Mutant("ReLU loses NaN", GEMM, "relu && value < 0.0f ? 0.0f : value", "relu && !(value > 0.0f) ? 0.0f : value"),
    Mutant("ReLU always", GEMM, "return relu && value < 0.0f", "return value < 0.0f"),
    Mutant("mask bits of other groups", GEMM, "if (n + e < p.k[0] && passes", "if (passes"),
    Mutant("mask bits in the reverse order", GEMM, "bits |= 1u << (part + e)", "bits |= 128u >> (part + e)"),
    Mutant("mask bits at the tile's first byte", GEMM, "+ n / 8] =", "+ octet / 8] ="),
    Mutant("TF32 operands of w not centred", TILE, "      centre_operand<typename Config::Element>(b[j]);\n", "",
           "tf32"),
    Mutant("subnormal results count as zero", GEMM, "e % 2 * 16 & 0x7fffu", "e % 2 * 16 & 0x7f80u"),
    Mutant("bits of fp32 values as if they were 16-bit", GEMM, "return (chunk.word[e] & 0x7fffffffu) != 0;",
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


DGRAD_MUTANTS = (
    Mutant("dgrad: taps in the reverse order", DGRAD, "taps ^ tap * 0x11111111u", "taps ^ (8 - tap) * 0x11111111u"),
    Mutant("dgrad: gathered from the other side", DGRAD, "m + (1 - tap / 3) * p.width + (1 - tap % 3)",
           "m + (tap / 3 - 1) * p.width + (tap % 3 - 1)"),
    Mutant("dgrad: rows and columns of the window exchanged", DGRAD, "(1 - tap / 3) * p.width + (1 - tap % 3)",
           "(1 - tap % 3) * p.width + (1 - tap / 3)"),
    Mutant("dgrad: no border below", DGRAD, "(h + 1 < p.height ? 0007u : 0u)", "0007u"),
    Mutant("dgrad: no border above", DGRAD, "(h > 0 ? 0700u : 0u)", "0700u"),
    Mutant("dgrad: no border at the right", DGRAD, "(w + 1 < p.width ? 0111u : 0u)", "0111u"),
    Mutant("dgrad: no border at the left", DGRAD, "(w > 0 ? 0444u : 0u)", "0444u"),
    Mutant("dgrad: images are as high as the batch", DGRAD, "m / p.width % p.height", "m / p.width"),
    Mutant("dgrad: nibbles of a byte exchanged", DGRAD, "matches >> (4 * e + 3)", "matches >> (4 * (e ^ 1) + 3)"),
    Mutant("dgrad: the fourth bit of a tap ignored", DGRAD, "+ 0x77777777u) | differs)", "+ 0x77777777u))"),
    Mutant("dgrad: one tap left out", DGRAD, "constexpr int kTaps = 9;", "constexpr int kTaps = 8;"),
    Mutant("dgrad: row stride of dpool taken for its width", DGRAD, "tap) * p.dpool_stride", "tap) * p.c"),
    Mutant("dgrad: row stride of the taps taken for their width", DGRAD, "tap) * p.taps_stride",
           "tap) * ((p.c + 1) / 2)"),
    Mutant("dgrad: row stride of dx taken for its width", DGRAD, "part.m * p.dx_stride", "part.m * p.c"),
    Mutant("dgrad: taps of the tile's first columns", DGRAD, "+ part.n / 2, p.c", "+ part.column / 2, p.c"),
    Mutant("dgrad: taps of the part before", DGRAD, "part_of<Config>(origin, i + Config::THREADS)",
           "part_of<Config>(origin, i)"),
    Mutant("dgrad: taps of an odd last channel not read", DGRAD, "if (2 * byte < channels)",
           "if (2 * byte + 1 < channels)"),
    Mutant("dgrad: stores beyond the last channel", DGRAD, "if (e < channels) to[e]", "to[e]"),
    Mutant("dgrad: channels that do not match are added too", DGRAD, "if (has_channel(matches[tap], e)) sum",
           "if (matches[tap] != 0) sum"),
    Mutant("dgrad: rounded before the gather", DGRAD, "return ptx::Pair{first, second};",
           "const unsigned pair = ptx::round_pair(first, second, bf16{}); "
           "return ptx::Pair{ptx::as_float(pair << 16), ptx::as_float(pair & 0xffff0000u)};"),
    Mutant("dgrad: even channels of fp32 stored twice", DGRAD, "pair(sum[e], sum[e + 1]", "pair(sum[e], sum[e]",
           "tf32"),
    Mutant("dgrad: M guard of the copies dropped", DGRAD,
           "m < p.m ? static_cast<const Element*>(p.g) + m * p.g_stride : nullptr",
           "static_cast<const Element*>(p.g) + m * p.g_stride"),
    Mutant("dgrad: M guard of the stores dropped", DGRAD, "if (part.m >= p.m) break;", ""),
    Mutant("dgrad: N guard of the stores dropped", DGRAD, "if (part.n < p.c) store_dx", "store_dx"),
    Mutant("dgrad: senders of the tile's first rows", DGRAD, "find_senders(p, m0 + row)", "find_senders(p, row)"),
    Mutant("dgrad: sums staged in the senders' place", DGRAD, "SENDERS = Base::TILE_BYTES;",
           "SENDERS = Base::TILE_BYTES - BLOCK_M * static_cast<int>(sizeof(unsigned));"),
    Mutant("dgrad: no barrier before the sums take the ring's place", TILE, STAGE, "  const int lane"),
    Mutant("dgrad: no barrier between the sums and their readers", TILE, STAGED, "  }\n}"),
    Mutant("dgrad: swizzle dropped where the sums are read", DGRAD,
           "result_element<Config>(part.row, part.column + e)",
           "part.row * Config::RESULT_PITCH + (part.column + e) * sizeof(float)"),
)  # fmt: skip

MUTANTS = (*GEMM_MUTANTS, *(mutant._replace(kernel="grouped_dgrad") for mutant in DGRAD_MUTANTS))

CONTROLS = tuple(Mutant("unchanged", "", "", "", kernel=kernel) for kernel in KERNELS)
"""What every problem must pass."""


def judge(mutant: Mutant, base: Path, folder: Path) -> Verdict:
    """Compile the mutant and run its element's problems. Raises RuntimeError where it cannot be made or compiled."""
    csrc = folder / "csrc"
    shutil.copytree(CSRC, csrc, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    if mutant.old:
        text = (csrc / mutant.file).read_text()
        if text.count(mutant.old) != 1:
            raise RuntimeError(
                f"{mutant.name}: its text occurs {text.count(mutant.old)} times in {mutant.file}, not once"
            )
        (csrc / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    module = build(folder, FLAGS, changed=csrc, base=base, names=(unit_name(mutant.kernel, mutant.element),))
    suite = Path(__file__).with_name("native_suite.py")
    command = [sys.executable, str(suite), str(module), "--kernel", mutant.kernel, "--element", mutant.element]
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
        controls = [judge(control, folder / "base", folder / control.kernel) for control in CONTROLS]
        verdicts = list(judge_all(folder / "base", folder, chosen))
    print(table(verdicts))
    for control in controls:
        if control.caught:
            print(f"the unchanged copy fails: {control.problem}: {control.how}", file=sys.stderr)
    return int(any(control.caught for control in controls) or not all(v.caught for v in verdicts))


if __name__ == "__main__":
    sys.exit(main())
