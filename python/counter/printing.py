"""Counts as tables, and the instructions of one launch's loops."""

from __future__ import annotations

from collections.abc import Sequence

from counter import counting, sass
from counter.compiling import compile_launch, disassembled
from counter.pipes import pipe
from inception_fused.plan.counts import Binary, Counts
from inception_fused.tools.report import table as aligned

SHOWN = ("issue", "alu", "imad", "fma", "xu", "lsu", "tensor", "uniform", "control", "data")


def table(counts: Counts) -> str:
    """A line for each loop of each binary, and one for what is outside of loops."""
    lines = []
    for (key, capability), binary in sorted(counts.binaries.items(), key=lambda item: (str(item[0][0]), item[0][1])):
        used = (str(binary.registers), str(binary.stack), str(binary.shared), str(binary.overwritten))
        for kind, figures, cycles in _rows(binary):
            lines.append((str(key), f"sm_{capability}", *used, kind, *map(_figure, figures), _figure(cycles)))
    head = ("binary", "chip", "regs", "stack", "shared", "overwritten", "part", *SHOWN, "cycles")
    return f"{aligned(head, lines)}\n{len(set(counts.binaries.values()))} binaries, Triton {counts.triton}"


def _rows(binary: Binary) -> list[tuple[str, list[float], float]]:
    straight = [part for part in binary.parts if part.kind in ("before", "between", "after")]
    loops = [
        (part.kind, [part.of(name) for name in SHOWN], part.cycles) for part in binary.parts if part not in straight
    ]
    outside = [sum(part.of(name) for part in straight) for name in SHOWN]
    return [*loops, ("outside", outside, sum(part.cycles for part in straight))]


def _figure(value: float) -> str:
    return f"{value:.0f}"


def compared(before: Counts, after: Counts) -> str:
    """What changed: instructions and ALU instructions of a step, those outside of loops, registers."""

    def figures(binary: Binary) -> tuple[float, ...]:
        rows = _rows(binary)
        main = binary.main
        step = (main.of("issue"), main.of("alu"), main.cycles) if main else (0, 0, 0)
        return (*step, rows[-1][1][0], binary.registers, binary.shared)

    lines = []
    for key, capability in sorted(
        before.binaries.keys() | after.binaries.keys(), key=lambda item: (str(item[0]), item[1])
    ):
        old, new = (counts.binaries.get((key, capability)) for counts in (before, after))
        if old == new:
            continue
        sides = [figures(binary) if binary else None for binary in (old, new)]
        cells = [
            " -> ".join(_figure(side[i]) if side else "-" for side in sides) for i in range(6)
        ]  # fmt: skip
        lines.append((str(key), f"sm_{capability}", *cells))
    if not lines:
        return "nothing changed"
    head = ("binary", "chip", "issue a step", "ALU", "cycles", "outside of loops", "registers", "shared")
    return aligned(head, lines)


def loops(name: str, dtype: str, capability: int) -> str:
    """The loops of the binaries of a launch, every instruction with its unit and stall count."""
    parts, seen = [], set()
    for item in counting.googlenet(dtype, capability):
        if item.problem.name != name or item.key in seen:
            continue
        seen.add(item.key)
        code = sass.parse(disassembled(compile_launch(item.launch, capability)))
        parts.append(f"{item.key}, sm_{capability}")
        for loop in code.every_loop():
            parts += [f"loop of {len(loop.own())} instructions", *listing(code, loop.own())]
    return "\n".join(parts) or f"no launch of GoogLeNet is called {name!r}"


def listing(code: sass.Code, places: Sequence[int]) -> list[str]:
    lines = []
    for i in places:
        instruction = code.instructions[i]
        waits = "".join(map(str, instruction.control.waits))
        lines.append(
            f"  {instruction.address:05x} {pipe(instruction):8s} {instruction.control.stall:2d} {waits:6s} "
            f"{instruction.predicate:6s} {instruction.text}"
        )
    return lines
