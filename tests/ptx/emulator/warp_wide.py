"""What a warp does together: lanes exchange registers, 8x8 matrices go to and from shared memory, mma.sync."""

from __future__ import annotations

import numpy as np

from .fragments import EIGHTS, b_places, c_places, fragment_values, matrix_values
from .integers import UINT
from .program import Instruction
from .translate import Body, Translator, spread
from .warps import Mask, Wave


def shuffle(to: Translator, instruction: Instruction, mode: str) -> Body:
    """9.7.9.6: lanes exchange a register; c holds the last lane of a segment and the segment's mask."""
    result, *sources = instruction.operands
    value, step, clamp, members = (to.value(source, "b32") for source in sources)
    put = to.target(result, "b32")

    def exchange(wave: Wave, mask: Mask) -> None:
        wave.whole_warps(mask, instruction)
        _all_members(wave, mask, members(wave), instruction)
        lane, b = wave.lane & 31, step(wave).astype(np.int64) & 31
        c = clamp(wave).astype(np.int64)
        last, segment = c & 31, c >> 8 & 31
        top = (lane & segment) | (last & ~segment)
        bottom = lane & segment
        source = {"up": lane - b, "down": lane + b, "bfly": lane ^ b, "idx": bottom | (b & ~segment)}[mode]
        inside = source >= top if mode == "up" else source <= top
        source = np.where(inside, source, lane)
        put(wave, mask, wave.full(value(wave))[(wave.lane & ~31) + source])

    return exchange


def reduce(to: Translator, instruction: Instruction, name: str, kind: str) -> Body:
    """9.7.13.9: one result of a warp's lanes."""
    result, source, members = instruction.operands
    value, everyone, put = to.value(source, kind), to.value(members, "b32"), to.target(result, kind)
    ufunc = {
        "add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[name].reduce  # fmt: skip

    def warp(wave: Wave, mask: Mask) -> None:
        wave.whole_warps(mask, instruction)
        _all_members(wave, mask, everyone(wave), instruction)
        whole = wave.full(value(wave)).reshape(-1, 32)
        put(wave, mask, ufunc(whole, axis=1).astype(whole.dtype).repeat(32))

    return warp


def move_matrices(to: Translator, instruction: Instruction, verb: str, count: str, trans: str | None) -> Body:
    """ldmatrix, stmatrix: 8x8 matrices of 16 bits; lanes 8 i to 8 i + 7 give the rows of matrix i."""
    values, where = instruction.operands if verb == "ldmatrix" else instruction.operands[::-1]
    address = to.place(where, 32)
    put = [to.target(item, "b32") for item in values.items]
    get = [to.value(item, "b32") for item in values.items]
    if len(values.items) != int(count):
        raise instruction.error(f"{len(values.items)} registers, wants {count}")
    row, column = EIGHTS[::-1] if trans else EIGHTS
    # Of each lane's two elements: (row, column) in the matrix as it lies in memory.
    next_row, next_column = (row + 1, column) if trans else (row, column + 1)

    def rows(wave: Wave, warps: np.ndarray, matrix: int) -> np.ndarray:
        """[warps, 8, 16] places."""
        given = wave.full(address(wave)).reshape(-1, 32)[warps, 8 * matrix : 8 * matrix + 8]
        program = wave.of_program.reshape(-1, 32)[warps, :8]
        return wave.shared.places(given, 16, program, instruction)

    def load(wave: Wave, mask: Mask) -> None:
        warps = wave.whole_warps(mask, instruction)
        lanes = (32 * warps[:, None] + np.arange(32)).reshape(-1)
        for matrix, write in enumerate(put):
            found = wave.shared.read(rows(wave, warps, matrix), warps[:, None, None], instruction)
            elements = np.ascontiguousarray(found).view(np.uint16).astype(np.uint32)
            both = elements[:, row, column] | (elements[:, next_row, next_column] << np.uint32(16))
            write(wave, mask, spread(wave, both.reshape(-1), lanes))

    def store(wave: Wave, mask: Mask) -> None:
        warps = wave.whole_warps(mask, instruction)
        for matrix, read in enumerate(get):
            word = wave.full(read(wave)).reshape(-1, 32)[warps]
            elements = np.zeros((len(warps), 8, 8), np.uint16)
            elements[:, row, column] = word.astype(np.uint16)
            elements[:, next_row, next_column] = (word >> np.uint32(16)).astype(np.uint16)
            places = rows(wave, warps, matrix)
            wave.shared.write(places, elements.view(np.uint8), warps[:, None, None], instruction)
            first = 32 * warps.repeat(8)
            wave.shared.needs_fence(places.reshape(-1, 16), first)

    return load if verb == "ldmatrix" else store


def multiply(to: Translator, instruction: Instruction, kind: str) -> Body:
    """9.7.14.5: D [16, 8] = A [16, 256 bits] B + C of each warp, in fp32."""
    d, *sources = instruction.operands
    read = [[to.value(item, "b32") for item in source.items] for source in sources]
    put = [to.target(item, "f32") for item in d.items]
    bits = 32 if kind == "tf32" else 16

    def warps_multiply(wave: Wave, mask: Mask) -> None:
        warps = wave.whole_warps(mask, instruction)
        lanes = (32 * warps[:, None] + np.arange(32)).reshape(-1)
        a, b, c = ([wave.full(get(wave)).reshape(-1, 32)[warps] for get in part] for part in read)
        right = np.zeros((len(warps), 256 // bits, 8), UINT[bits])
        for i, register in enumerate(b):
            row, column = b_places(i, bits)
            for part in range(32 // bits):
                right[:, row + part, column] = (register >> np.uint32(bits * part)).astype(right.dtype)
        product = fragment_values(a, kind) @ matrix_values(right, kind)
        for i, (write, register) in enumerate(zip(put, c, strict=True)):
            row, column = c_places(i)
            total = np.ascontiguousarray(register).view(np.float32) + product[:, row, column]
            write(wave, mask, spread(wave, total.reshape(-1), lanes))

    return warps_multiply


def _all_members(wave: Wave, mask: Mask, members: np.ndarray, instruction: Instruction) -> None:
    if (wave.full(members)[wave.lanes(mask)] != 0xFFFFFFFF).any():
        raise instruction.error("not all lanes of the warp are members")


INSTRUCTIONS = (
    (r"shfl\.sync\.(up|down|bfly|idx)\.b32", shuffle),
    (r"redux\.sync\.(add|min|max|and|or|xor)\.([busf]32)", reduce),
    (r"(ldmatrix|stmatrix)\.sync\.aligned\.m8n8\.x([124])(\.trans)?\.shared(?:::cta)?\.b16", move_matrices),
    (r"mma\.sync\.aligned\.m16n8k16\.row\.col\.f32\.(?:bf16|f16)\.(bf16|f16)\.f32", multiply),
    (r"mma\.sync\.aligned\.m16n8k8\.row\.col\.f32\.(tf32)\.tf32\.f32", multiply),
)
