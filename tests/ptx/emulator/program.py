"""PTX as text read into a program: parameters, registers, instructions with their lines, basic blocks.

Read is what Triton emits for one kernel: one ``.entry``, registers declared by count, inline assembly in scopes of its
own (``{ .reg .pred p; ... }``) whose names are made unique here, ``brx.idx`` with its table of targets. Grammar: PTX
ISA, sections 4 (Syntax) and 5 (State Spaces, Types, and Variables).
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from typing import NamedTuple


class PtxError(Exception):
    """What a program may not do, or what the emulator does not know; says the line of the PTX."""


class Register(NamedTuple):
    name: str
    bits: int
    negated: bool = False


class Constant(NamedTuple):
    """An integer, or the bit pattern of a floating-point number."""

    value: int


class Symbol(NamedTuple):
    """An address of a variable or parameter, or a label."""

    name: str
    offset: int = 0


class Address(NamedTuple):
    """[base + offset]"""

    base: Register | Symbol | Constant
    offset: int


class Vector(NamedTuple):
    """{a, b, ...}; None is ``_``, a place that nobody wants."""

    items: tuple[Operand | None, ...]


class Pair(NamedTuple):
    """p|q"""

    first: Register
    second: Register


Operand = Register | Constant | Symbol | Address | Vector | Pair


class Instruction(NamedTuple):
    """line: in the text, from 1. predicate: None where every lane executes it."""

    opcode: str
    operands: tuple[Operand, ...]
    predicate: Register | None
    line: int
    text: str

    def error(self, words: str) -> PtxError:
        return PtxError(f"line {self.line}: {words}: {self.text}")


class Block(NamedTuple):
    """Instructions that are executed one after the other: only the last may be a jump or a barrier."""

    start: int
    end: int


BITS = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64, "u16": 16, "u32": 32, "u64": 64, "s32": 32, "f32": 32}
BITS |= {"s16": 16, "s64": 64, "u8": 8, "s8": 8, "f64": 64}
SPECIAL = re.compile(r"%(tid|ntid|ctaid|nctaid)\.[xyz]$|%(laneid|warpid)$")
ENDS_BLOCK = ("bra", "brx", "ret", "exit", "bar", "barrier")


class Program:
    """params: (name, bits), in order. threads: of a program. registers: bits of each name that is declared by itself
    and of each prefix that is declared by count."""

    def __init__(self, ptx: str) -> None:
        # Comments become blanks, so that lines keep their numbers.
        ptx = re.sub(r"//[^\n]*|^[ \t]*\.loc\b[^\n]*", "", ptx, flags=re.M)
        entry = re.search(r"\.entry\s+(\w+)", ptx)
        if entry is None:
            raise PtxError("no .entry")
        self.name = entry[1]
        opening = ptx.index("{", entry.start())
        header, self._text, self._line = ptx[entry.start() : opening], ptx[opening + 1 :], ptx[:opening].count("\n") + 1
        self.params = [
            (name, BITS[kind]) for kind, name in re.findall(r"\.param\s+\.(\w+)[^,\n]*?\b(\w+_param_\d+)", header)
        ]
        threads = re.search(r"\.(?:req|max)ntid\s+(\d+)", header)
        if threads is None:
            raise PtxError(f"{self.name}: neither .reqntid nor .maxntid")
        self.threads = int(threads[1])
        self.local_bytes = 0
        self.registers: dict[str, int] = {}
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.tables: dict[str, tuple[str, ...]] = {}
        self._scopes: list[dict[str, str]] = []
        self._named = 0
        for line, statement in self._statements():
            self._statement(line, statement)
        self.blocks = self._split()
        for instruction in self.instructions:
            self._check_targets(instruction)
        self.block_of = {block.start: number for number, block in enumerate(self.blocks)}
        self.uses_warp_groups = any(i.opcode.startswith("wgmma") for i in self.instructions)

    def _check_targets(self, instruction: Instruction) -> None:
        kind = instruction.opcode.split(".")[0]
        if kind not in ("bra", "brx"):
            return
        label = instruction.operands[-1]
        name = label.name if isinstance(label, Symbol) else str(label)
        if kind == "brx" and name not in self.tables:
            raise instruction.error(f"no table {name}")
        for target in self.tables[name] if kind == "brx" else (name,):
            if target not in self.labels:
                raise instruction.error(f"no label {target}")

    def target(self, label: str) -> int:
        """The block that a label begins."""
        return self.block_of[self.labels[label]]

    def _statements(self) -> Iterator[tuple[int, str]]:
        """(line, text) up to the end of the body. A scope's braces stand where a statement would begin."""
        text, line, vector, begun, current = self._text, self._line, 0, 0, ""
        for char in text:
            fresh = not current.strip() or current.rstrip().endswith(":")
            if char == "{" and not vector and fresh:
                yield begun, current
                self._scopes.append({})
                current = ""
            elif char == "}" and not vector:
                if not self._scopes:
                    return
                self._scopes.pop()
                current = ""
            elif char == ";" and not vector:
                yield begun, current
                current = ""
            else:
                vector += (char == "{") - (char == "}")
                if fresh and not char.isspace():
                    begun = line
                current += char
            line += char == "\n"
        raise PtxError(f"{self.name}: its body does not end")

    def _statement(self, line: int, text: str) -> None:
        text = " ".join(text.split())
        while label := re.match(r"(\$?\w+):(?!:)\s*", text):
            text = text[label.end() :]
            if targets := re.match(r"\.branchtargets (.*)", text):
                self.tables[label[1]] = tuple(name.strip() for name in targets[1].split(","))
                return
            self.labels[self._scoped_label(label[1])] = len(self.instructions)
        if not text:
            return
        if text.startswith("."):
            self._directive(text)
            return
        guard = re.match(r"@(!?)([%\w]+)\s+", text)
        predicate = None
        if guard:
            predicate = self._register(guard[2])._replace(negated=guard[1] == "!")
        words = re.match(r"([a-z][\w.:]*)\s*(.*)$", text[guard.end() if guard else 0 :])
        if words is None:
            raise PtxError(f"line {line}: no instruction: {text}")
        operands = tuple(map(self._operand, _split(words[2])))
        self.instructions.append(Instruction(words[1], operands, predicate, line, text))

    def _directive(self, text: str) -> None:
        if local := re.match(r"\.local \.align \d+ \.b8 \w+\[(\d+)\]", text):
            self.local_bytes = int(local[1])
        elif declared := re.match(r"\.reg \.(\w+) (.*)$", text):
            for name in declared[2].split(","):
                name = name.strip()
                counted = re.match(r"(%\w+)<\d+>$", name)
                if self._scopes and not counted:
                    self._named += 1
                    self._scopes[-1][name] = f"{name}@{self._named}"
                    name = self._scopes[-1][name]
                self.registers[counted[1] if counted else name] = BITS[declared[1]]
        elif not text.startswith(".pragma"):
            raise PtxError(f"unknown directive: {text}")

    def _scoped_label(self, name: str) -> str:
        """Labels of inline assembly are its own; it is met once each time that it is written out."""
        return f"{name}@{len(self.instructions)}" if self._scopes and name in self.labels else name

    def _register(self, name: str) -> Register:
        for scope in reversed(self._scopes):
            if name in scope:
                return Register(scope[name], self.registers[scope[name]])
        if SPECIAL.match(name):
            return Register(name, 32)
        prefix = name if name in self.registers else name.rstrip("0123456789")
        if prefix not in self.registers:
            raise PtxError(f"unknown register {name}")
        return Register(name, self.registers[prefix])

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(None if item == "_" else self._operand(item) for item in _split(text[1:-1])))
        if text.startswith("["):
            base, _, offset = text[1:-1].partition("+")
            return Address(self._operand(base.strip()), int(offset.strip() or "0", 0))
        if "|" in text:
            return Pair(*(self._register(name.strip()) for name in text.split("|")))
        if text.startswith("!"):
            return self._register(text[1:])._replace(negated=True)
        if number := re.match(r"0[fFdD]([0-9a-fA-F]+)$", text):
            return Constant(int(number[1], 16))
        if re.match(r"-?\d", text):
            return Constant(int(text.rstrip("U"), 0))
        if text.startswith("%") or any(text in scope for scope in self._scopes):
            return self._register(text)
        name, _, offset = text.partition("+")
        return Symbol(name.strip(), int(offset or "0", 0))

    def _split(self) -> list[Block]:
        count = len(self.instructions)
        starts = {0, *self.labels.values()}
        starts |= {k + 1 for k, i in enumerate(self.instructions) if i.opcode.split(".")[0] in ENDS_BLOCK}
        edges = [*sorted(start for start in starts if start < count), count]
        return [Block(*edge) for edge in itertools.pairwise(edges)]


def _split(text: str) -> list[str]:
    """At commas outside braces and brackets."""
    found, depth, current = [], 0, ""
    for char in text:
        depth += (char in "{[(") - (char in "}])")
        if char == "," and not depth:
            found.append(current.strip())
            current = ""
        else:
            current += char
    return [*found, current.strip()] if current.strip() else found
