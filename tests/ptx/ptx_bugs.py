"""Seeded bugs in the PTX of the project's launches, each of which the emulator must notice.

    python tests/ptx/ptx_bugs.py                 all of bug_list.py, a row of the table as soon as a bug is judged
    python tests/ptx/ptx_bugs.py --quick         those that every run of the tests takes
    python tests/ptx/ptx_bugs.py WORD ...        those whose name has one of the words

A block's launches are compiled and executed, all of them without a bug; then each bug is put into the text of one
launch, which is executed again on the operands that it had. Caught is what the emulator refuses, a race that it finds,
or bytes of any tensor that differ from those without the bug, under one of a few schedules. An instruction that the
emulator does not know is no catch but a mistake of the list. Exit code 1 if a bug is missed, or an equivalent change
is not equivalent. In a process that does not interpret Triton's kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple

sys.path.extend(str(Path(__file__).resolve().parents[1] / folder) for folder in ("", "../python"))

import torch
import triton
from torch import Tensor

from batch_norm_cases import make_norms
from bug_list import BUGS, NANS, NORMED, TIES, Bug
from bug_rules import bare
from checks.block_cases import make_block
from counter.compiling import DTYPES, compile_launch
from emulated import (
    Emulation,
    arguments,
    emulating,
    run_backward,
    run_forward,
)
from emulator import Kernel, PtxError, Schedule
from emulator.memory import bytes_of
from inception_fused.block.googlenet_blocks import InceptionConfig
from inception_fused.op.launcher import apart
from inception_fused.runtime.launch import Launch
from normed_checks import run_normed, run_normed_backward

CONFIG = InceptionConfig(72, 40, (24, 72), (8, 40), 40)
PIXELS = (2, 5, 7)
"""No count of channels or pixels is a multiple of a tile, so that a mask that is one too wide leaves its tensor."""

SCHEDULES = (Schedule(), Schedule("descending", "late"), Schedule("ascending", "early"))


class Step(NamedTuple):
    """One launch that was executed. storages: of its tensors, as bytes; before, after: what they held."""

    name: str
    launch: Launch
    ptx: str
    shared: int
    storages: list[Tensor]
    before: list[Tensor]
    after: list[Tensor]


class _EnoughError(Exception):
    """All launches that are wanted have been executed."""


class Tape(Emulation):
    """Keeps what each launch read and wrote, as far as the last that is wanted."""

    def __init__(self, capability: int, wanted: frozenset[str]) -> None:
        super().__init__(capability)
        self.steps: list[Step] = []
        self.wanted = wanted

    def run(self, launch: Launch) -> None:
        binary = compile_launch(launch, self.capability)
        ptx, tensors = bare(binary.asm["ptx"]), [a for a in arguments(launch.args) if isinstance(a, Tensor)]
        unique = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors}
        storages = [torch.from_numpy(bytes_of(tensor)) for tensor in unique.values()]
        before = [storage.clone() for storage in storages]
        report = Kernel(ptx).run(launch.grid, [*arguments(launch.args)], shared=binary.metadata.shared)
        function = launch.kernel.fn.__name__.removesuffix("_kernel")
        number = 1 + sum(step.name.split()[0] == function for step in self.steps)
        if report.races:
            raise PtxError(f"{function} {number} without a bug: {report.races[0]}")
        after = [storage.clone() for storage in storages]
        step = Step(f"{function} {number}", launch, ptx, binary.metadata.shared, storages, before, after)
        self.steps.append(step)
        if self.wanted <= {step.name for step in self.steps}:
            raise _EnoughError


@cache
def tape(capability: int, dtype: str, data: str, wanted: frozenset[str]) -> dict[str, Step]:
    """The launches of a block's forward and backward by name, such as "conv_fprop 2", each by itself and no pairs."""
    block = make_block(CONFIG, PIXELS, DTYPES[dtype])
    draw = torch.Generator().manual_seed(2)
    if data == NANS:
        block.x[torch.rand(block.x.shape, generator=draw) < 0.02] = float("nan")
    elif data == TIES:
        block.x.copy_(torch.randint(-2, 3, block.x.shape, generator=draw).to(block.x.dtype))
    recording = Tape(capability, wanted)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with torch.no_grad(), suppress(_EnoughError), emulating(recording), apart():
        n, _, h, w = block.x.shape
        dy = torch.randn((n, block.shape.k, h, w), generator=draw).to(block.x.dtype)
        dy = dy.contiguous(memory_format=torch.channels_last)
        if data == NORMED:
            norms = [norm._replace(mean=None, var=None) for norm in make_norms(block.weights)]
            run_normed_backward(block, norms, run_normed(block, norms)[1], dy)
        else:
            run_backward(block, run_forward(block), dy)
    found = {step.name: step for step in recording.steps if step.name in wanted}
    for step in found.values():
        if how := outcome(step, step.ptx):
            raise PtxError(f"{step.name} without a bug: {how}")
    return found


def outcome(step: Step, ptx: str, schedules: Sequence[Schedule] = SCHEDULES) -> str:
    """How a launch with another text shows that it is wrong, "" if it does not."""
    kernel = None
    for schedule in schedules:
        for storage, held in zip(step.storages, step.before, strict=True):
            storage.copy_(held)
        how = f"{schedule.order}, {schedule.timing}"
        try:
            kernel = kernel or Kernel(ptx)
            report = kernel.run(step.launch.grid, [*arguments(step.launch.args)], shared=step.shared, schedule=schedule)
        except PtxError as error:
            if "unknown" in str(error):
                raise
            return f"error ({how}): {error}"
        if report.races:
            return f"race ({how}): {report.races[0]}"
        differ = sum(int((s != held).sum()) for s, held in zip(step.storages, step.after, strict=True))
        if differ:
            return f"result ({how}): {differ} bytes differ"
    return ""


class Verdict(NamedTuple):
    bug: Bug
    how: str
    seconds: float
    lost: str = ""

    @property
    def right(self) -> bool:
        return not self.lost and bool(self.how) != bool(self.bug.equivalent)

    @property
    def found(self) -> str:
        if self.lost:
            return self.lost
        if self.bug.equivalent:
            return f"NOT EQUIVALENT: {self.how}" if self.how else f"equivalent: {self.bug.equivalent}"
        return self.how or "MISSED"

    @property
    def row(self) -> str:
        bug = self.bug
        binary = " ".join(filter(None, (f"sm_{bug.capability}", bug.dtype, bug.data)))
        return f"| {bug.name} | {bug.kernel} | {binary} | {self.found[:110]} | {self.seconds:.1f} |"


def judged(bugs: Sequence[Bug]) -> Iterator[Verdict]:
    wanted: dict[tuple[int, str, str], set[str]] = defaultdict(set)
    for bug in bugs:
        wanted[bug.block].add(bug.kernel)
    for bug in bugs:
        step = tape(*bug.block, frozenset(wanted[bug.block]))[bug.kernel]
        begun = time.perf_counter()
        try:
            ptx = bug.apply(step.ptx)
        except LookupError as error:
            yield Verdict(bug, "", 0.0, f"NO PLACE: {error}")
        else:
            yield Verdict(bug, outcome(step, ptx), time.perf_counter() - begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="bugs whose names have one of these")
    parser.add_argument("--quick", action="store_true", help="the bugs of every run of the tests")
    parser.add_argument("--json", type=Path, help="write the verdicts here as well")
    args = parser.parse_args()
    bugs = [bug for bug in BUGS if bug.quick or not args.quick]
    if args.words:
        bugs = [bug for bug in bugs if any(word in bug.name for word in args.words)]
        if not bugs:
            parser.error(f"words: got {' '.join(args.words)}, which no bug's name has; bug_list.py has the names")
    torch.set_num_threads(1)
    print(f"Triton {triton.__version__}, {len(bugs)} bugs\n")
    print("| bug | launch | binary | how it was caught | seconds |\n|---|---|---|---|---|")
    verdicts = []
    for verdict in judged(bugs):
        print(verdict.row, flush=True)
        verdicts.append(verdict)
    ways = Counter(v.how.partition(" ")[0] or ("equivalent" if v.right else "MISSED") for v in verdicts)
    print("\n" + ", ".join(f"{count} {way}" for way, count in ways.items()))
    if args.json:
        args.json.write_text(json.dumps({v.bug.id: {"right": v.right, "found": v.found} for v in verdicts}))
    return not all(verdict.right for verdict in verdicts)


if __name__ == "__main__":
    sys.exit(main())
