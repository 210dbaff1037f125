"""PTX instructions as steps, each a function of a wave and of the lanes that execute it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

import numpy as np

from .arithmetic import Operation, operation, pack, unpack, width
from .integers import UINT
from .program import ENDS_BLOCK, Address, Constant, Instruction, Operand, Pair, Program, Register, Symbol, Vector
from .shared import BASE
from .warps import LOCAL_BASE, PARAMETER_BASE, Mask, Step, Wave

Reader = Callable[[Wave], np.ndarray]
Writer = Callable[[Wave, Mask, np.ndarray], None]
Body = Callable[[Wave, Mask], None]
Method = Callable[..., Body]
"""(translator, instruction, the pattern's groups) -> what it does."""


class Translator:
    """Of one program. methods: the opcodes that are neither arithmetic nor moves, each pattern with its method."""

    def __init__(self, program: Program, methods: Iterable[tuple[str, Method]]) -> None:
        self.program = program
        self.methods = [(re.compile(pattern), method) for pattern, method in (*_MOVES, *methods)]
        self.parameter_at: dict[str, int] = {}
        at = 0
        for name, bits in program.params:
            at = -(-at // (bits // 8)) * (bits // 8)
            self.parameter_at[name] = at
            at += bits // 8
        self.parameter_bytes = at
        self.steps: dict[int, Step] = {}

    def translated(self) -> dict[int, Step]:
        """The steps of all blocks. An unknown instruction is an error that names it, whether it is reached or not."""
        if not self.steps:
            for number, block in enumerate(self.program.blocks):
                body = [self._step(i) for i in self.program.instructions[block.start : block.end]]
                self.steps[number] = _sequence([step for step in body if step is not None])
        return self.steps

    def _step(self, instruction: Instruction) -> Step | None:
        opcode = instruction.opcode
        if opcode.split(".")[0] in ENDS_BLOCK:
            return None
        try:
            body = self._body(instruction)
        except (TypeError, AttributeError, KeyError, IndexError, ValueError) as error:
            raise instruction.error(f"cannot be translated ({type(error).__name__}: {error})") from error
        if instruction.predicate is None:
            return body
        predicate = instruction.predicate

        def guarded(wave: Wave, mask: Mask) -> None:
            lanes = wave.read(predicate)
            lanes = lanes if mask is None else lanes & mask
            if lanes.any():
                body(wave, None if lanes.all() else wave.full(lanes))

        return guarded

    def _body(self, instruction: Instruction) -> Body:
        if found := operation(instruction.opcode):
            return self._arithmetic(instruction, found)
        for pattern, method in self.methods:
            if match := pattern.fullmatch(instruction.opcode):
                return method(self, instruction, *match.groups())
        raise instruction.error("unknown instruction")

    def value(self, operand: Operand, kind: str) -> Reader:
        """Reads an operand as a type."""
        if isinstance(operand, Register):
            return lambda wave: unpack(wave.read(operand), kind)
        bits = width(kind)
        number = operand.value if isinstance(operand, Constant) else self.address_of(operand)
        if bits == 1:
            constant: np.ndarray = np.array([number != 0])
        else:
            constant = unpack(np.array([number & (1 << bits) - 1], UINT[bits]), kind)
        return lambda wave: constant

    def address_of(self, symbol: Operand) -> int:
        """Of shared memory, the stack, or a parameter."""
        if not isinstance(symbol, Symbol):
            raise TypeError(f"an operand is {symbol}")
        if symbol.name in self.parameter_at:
            return PARAMETER_BASE + self.parameter_at[symbol.name] + symbol.offset
        if symbol.name.startswith("__local_depot"):
            return LOCAL_BASE + symbol.offset
        if symbol.name == "global_smem":
            return BASE + symbol.offset
        raise KeyError(symbol.name)

    def target(self, operand: Operand | None, kind: str) -> Writer:
        """Writes a value of a type into a register: sign-extended where it is wider, as 9.4.1 says."""
        if operand is None:
            return lambda wave, mask, value: None
        if not isinstance(operand, Register):
            raise TypeError(f"a result goes to {operand}")
        bits, signed = operand.bits, kind[0] == "s"

        def write(wave: Wave, mask: Mask, value: np.ndarray) -> None:
            packed = pack(value, kind)
            if bits > 1 and packed.dtype.itemsize * 8 != bits:
                if signed:
                    packed = unpack(packed, kind).astype(f"i{bits // 8}")
                packed = packed.astype(UINT[bits])
            wave.write(operand, packed, mask)

        return write

    def _arithmetic(self, instruction: Instruction, found: Operation) -> Body:
        result, *sources = instruction.operands
        if len(sources) != len(found.sources):
            raise instruction.error(f"{len(sources)} sources, wants {len(found.sources)}")
        read = [self.value(source, kind) for source, kind in zip(sources, found.sources, strict=True)]
        compute = found.compute
        if isinstance(result, Pair):
            write = [self.target(part, "pred") for part in result]

            def both(wave: Wave, mask: Mask) -> None:
                for put, value in zip(write, compute(*(get(wave) for get in read)), strict=True):
                    put(wave, mask, value)

            return both
        put = self.target(result, found.result)
        return lambda wave, mask: put(wave, mask, compute(*(get(wave) for get in read)))

    def _mov(self, instruction: Instruction, kind: str) -> Body:
        result, source = instruction.operands
        if isinstance(result, Vector):
            return self._unpacked(result, source, width(kind))
        if isinstance(source, Vector):
            return self._packed(result, source, width(kind))
        read, put = self.value(source, kind), self.target(result, kind)
        return lambda wave, mask: put(wave, mask, read(wave))

    def _packed(self, result: Operand, source: Vector, bits: int) -> Body:
        each = bits // len(source.items)
        read = [self.value(item, f"b{each}") for item in source.items]
        put, kind = self.target(result, f"b{bits}"), UINT[bits]

        def join(wave: Wave, mask: Mask) -> None:
            parts = (get(wave).astype(kind) << kind(each * place) for place, get in enumerate(read))
            total = next(parts)
            for part in parts:
                total = total | part
            put(wave, mask, total)

        return join

    def _unpacked(self, result: Vector, source: Operand, bits: int) -> Body:
        each = bits // len(result.items)
        read, kind = self.value(source, f"b{bits}"), UINT[bits]
        put = [self.target(item, f"b{each}") for item in result.items]

        def split(wave: Wave, mask: Mask) -> None:
            whole = read(wave)
            for place, write in enumerate(put):
                write(wave, mask, (whole >> kind(each * place)).astype(UINT[each]))

        return split

    def _cvta(self, instruction: Instruction) -> Body:
        result, source = instruction.operands
        read, put = self.value(source, "b64"), self.target(result, "b64")
        return lambda wave, mask: put(wave, mask, read(wave))

    def place(self, operand: Operand, bits: int) -> Reader:
        """The address of ``[base + offset]``, as int64."""
        if not isinstance(operand, Address):
            raise TypeError(f"no address: {operand}")
        base, offset = self.value(operand.base, f"b{bits}"), operand.offset
        return lambda wave: base(wave).astype(np.int64) + offset


def _sequence(steps: list[Step]) -> Step:
    def run(wave: Wave, mask: Mask) -> None:
        for step in steps:
            step(wave, mask)

    return run


def spread(wave: Wave, values: np.ndarray, lanes: np.ndarray) -> np.ndarray:
    """Values of some lanes as values of all, zero in the others."""
    if len(lanes) == wave.size:
        return values
    found = np.zeros(wave.size, values.dtype)
    found[lanes] = values
    return found


_MOVES: tuple[tuple[str, Method], ...] = (
    (r"mov\.(pred|[busf](?:16|32|64))", Translator._mov),
    (r"cvta(?:\.to)?(?:\.(?:local|global|shared|param))?\.u64", Translator._cvta),
)
