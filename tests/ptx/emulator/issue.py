"""Instructions that start asynchronous work, or wait for it; what becomes of it stands in asynchronous.py."""

from __future__ import annotations

import numpy as np

from .asynchronous import Product
from .fragments import Descriptor
from .program import Constant, Instruction, Vector
from .translate import Body, Translator
from .warps import Mask, Wave


def copy(to: Translator, instruction: Instruction, level: str) -> Body:
    """cp.async: cg copies 16 bytes, ca 4, 8 or 16; the last operand is how many of them are read."""
    where, source, size, *given = instruction.operands
    nbytes = size.value
    if nbytes not in ((16,) if level == "cg" else (4, 8, 16)):
        raise instruction.error(f"cp.async.{level} of {nbytes} bytes")
    target, come = to.place(where, 32), to.place(source, 64)
    read = to.value(given[0] if given else Constant(nbytes), "u32")

    def issue(wave: Wave, mask: Mask) -> None:
        lanes = wave.lanes(mask)
        places = wave.shared.places(wave.full(target(wave))[lanes], nbytes, wave.of_program[lanes], instruction)
        sources = wave.full(read(wave))[lanes].astype(np.int64)
        if (sources > nbytes).any():
            raise instruction.error(f"reads {int(sources.max())} bytes for {nbytes}")
        wave.asynchronous.copy(instruction, lanes, places, wave.full(come(wave))[lanes], sources)

    return issue


def copy_groups(to: Translator, instruction: Instruction, verb: str) -> Body:
    if verb == "commit_group":
        return lambda wave, mask: wave.asynchronous.commit_copies(mask)
    left = instruction.operands[0].value
    return lambda wave, mask: wave.asynchronous.wait_for_copies(mask, left)


def product_groups(to: Translator, instruction: Instruction, verb: str) -> Body:
    """wgmma.fence orders registers, which are in order here: a missing one is not seen."""
    left = instruction.operands[0].value if verb == "wait_group" else 0

    def groups(wave: Wave, mask: Mask) -> None:
        chosen = wave.whole_warps(mask, instruction, 128)
        if verb == "commit_group":
            wave.asynchronous.commit_products(chosen)
        elif verb == "wait_group":
            wave.asynchronous.wait_for_products(chosen, left)

    return groups


def wgmma(to: Translator, instruction: Instruction, n: str, k: str, kind: str) -> Body:
    """9.7.15.5.2. Behind the operands: scale-d, the signs of A and B, and where a type allows it whether they are
    MN-major."""
    d, a, b, scale, *flags = instruction.operands
    size = 4 if kind == "tf32" else 2
    numbers = [flag.value for flag in flags]
    signs, transposed = (numbers[0], numbers[1]), numbers[2:]
    registers = isinstance(a, Vector)
    transposed_a, transposed_b = (0, *transposed, 0)[:2] if registers else (*transposed, 0, 0)[:2]
    if len(d.items) != int(n) // 2 or int(k) * size != 32:
        raise instruction.error("unknown shape")
    read_a = [to.value(item, "b32") for item in a.items] if registers else [to.value(a, "u64")]
    read_b, adds = to.value(b, "u64"), to.value(scale, "pred")

    def places(wave: Wave, word: np.ndarray, group: int, outer: int, mn_major: int) -> np.ndarray:
        words = np.unique(word)
        if len(words) > 1:
            raise instruction.error("a descriptor is not the same in all lanes of a warp group")
        descriptor = Descriptor.of(int(words[0]))
        if descriptor.base_offset or (descriptor.row > 16 and not mn_major and int(k) * size > descriptor.row):
            raise instruction.error(f"unknown layout: {descriptor}")
        first = descriptor.addresses(outer, int(k), size, bool(mn_major))
        program = np.full(first.shape, wave.of_program[128 * group])
        return wave.shared.loose_places(first[..., None] + np.arange(size), program[..., None], instruction)

    def issue(wave: Wave, mask: Mask) -> None:
        for group in wave.whole_warps(mask, instruction, 128).tolist():
            own = slice(128 * group, 128 * group + 128)
            left = [wave.full(get(wave))[own] for get in read_a]
            wave.asynchronous.multiply(
                Product(
                    instruction, group, d.items,
                    [part.reshape(4, 32).copy() for part in left]
                    if registers else places(wave, left[0], group, 64, transposed_a),
                    places(wave, wave.full(read_b(wave))[own], group, int(n), transposed_b),
                    kind, signs, bool(wave.full(adds(wave))[own][0]),
                    int(wave.asynchronous.product_commits[group]), False,
                )
            )  # fmt: skip

    return issue


def fence(to: Translator, instruction: Instruction) -> Body:
    def publish(wave: Wave, mask: Mask) -> None:
        lanes = wave.lanes(mask)
        groups = lanes % wave.threads // 128
        wave.shared.fence(lanes, groups, wave.of_program[lanes])

    return publish


INSTRUCTIONS = (
    (r"cp\.async\.(ca|cg)\.shared\.global(?:\.L2::\w+)*", copy),
    (r"cp\.async\.(commit_group|wait_group)", copy_groups),
    (r"wgmma\.(fence|commit_group|wait_group)\.sync\.aligned", product_groups),
    (r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k(\d+)\.f32\.(bf16|f16|tf32)\.(?:bf16|f16|tf32)", wgmma),
    (r"fence\.proxy\.async(?:\.shared::cta)?", fence),
)
