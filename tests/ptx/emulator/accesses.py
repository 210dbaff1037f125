"""ld and st: registers from and to the state spaces of PTX (ISA 9.0, 9.7.9.8 and 9.7.9.12)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arithmetic import width
from .memory import to_bytes, to_words
from .program import Instruction, Vector
from .translate import Body, Translator, spread
from .warps import LOCAL_BASE, PARAMETER_BASE, Mask, Wave


def access(
    to: Translator, instruction: Instruction, verb: str, space: str | None, count: str | None, kind: str
) -> Body:
    """ld and st of every state space."""
    size = width(kind) // 8
    space = "generic" if space is None else space.split("::")[0]
    values, where = instruction.operands if verb == "ld" else instruction.operands[::-1]
    items = values.items if isinstance(values, Vector) else (values,)
    if len(items) != int(count or 1):
        raise instruction.error(f"{len(items)} values, wants {count or 1}")
    address = to.place(where, 32 if space == "shared" else 64)
    nbytes = size * len(items)
    if verb == "ld":
        put = [to.target(item, kind) for item in items]
        load = _LOADS[space]

        def read(wave: Wave, mask: Mask) -> None:
            lanes = wave.lanes(mask)
            found = to_words(load(wave, instruction, wave.full(address(wave))[lanes], nbytes, lanes), size)
            for write, word in zip(put, found, strict=True):
                write(wave, mask, spread(wave, word, lanes))

        return read
    get = [to.value(item, f"b{8 * size}") for item in items]
    store = _STORES[space]

    def write_all(wave: Wave, mask: Mask) -> None:
        lanes = wave.lanes(mask)
        words = [wave.full(word(wave))[lanes] for word in get]
        store(wave, instruction, wave.full(address(wave))[lanes], to_bytes(words, size), lanes)

    return write_all


def _load_shared(
    wave: Wave, instruction: Instruction, address: np.ndarray, nbytes: int, lanes: np.ndarray
) -> np.ndarray:
    places = wave.shared.places(address, nbytes, wave.of_program[lanes], instruction)
    return wave.shared.read(places, wave.warp[lanes][:, None], instruction)


def _store_shared(
    wave: Wave, instruction: Instruction, address: np.ndarray, values: np.ndarray, lanes: np.ndarray
) -> None:
    places = wave.shared.places(address, values.shape[1], wave.of_program[lanes], instruction)
    wave.shared.write(places, values, wave.warp[lanes][:, None], instruction)
    wave.shared.needs_fence(places, lanes)


def _load_global(
    wave: Wave, instruction: Instruction, address: np.ndarray, nbytes: int, lanes: np.ndarray
) -> np.ndarray:
    places = wave.memory.offsets(address, nbytes, instruction)
    found, raced = wave.memory.read(places, wave.number[lanes])
    if raced:
        wave.race(f"line {instruction.line} reads what another program writes: {instruction.text}")
    return found


def _store_global(
    wave: Wave, instruction: Instruction, address: np.ndarray, values: np.ndarray, lanes: np.ndarray
) -> None:
    places = wave.memory.offsets(address, values.shape[1], instruction)
    if wave.memory.write(places, values, wave.number[lanes]):
        wave.race(f"line {instruction.line} writes another value where another program wrote: {instruction.text}")


def _load_parameter(
    wave: Wave, instruction: Instruction, address: np.ndarray, nbytes: int, lanes: np.ndarray
) -> np.ndarray:
    places = _window(address - PARAMETER_BASE, nbytes, len(wave.parameters), instruction)
    return wave.parameters[places]


def _load_local(
    wave: Wave, instruction: Instruction, address: np.ndarray, nbytes: int, lanes: np.ndarray
) -> np.ndarray:
    return wave.local[lanes[:, None], _window(address - LOCAL_BASE, nbytes, wave.local.shape[1], instruction)]


def _store_local(
    wave: Wave, instruction: Instruction, address: np.ndarray, values: np.ndarray, lanes: np.ndarray
) -> None:
    places = _window(address - LOCAL_BASE, values.shape[1], wave.local.shape[1], instruction)
    wave.local[lanes[:, None], places] = values


def _window(first: np.ndarray, nbytes: int, size: int, instruction: Instruction) -> np.ndarray:
    if ((first < 0) | (first + nbytes > size)).any():
        raise instruction.error(f"{nbytes} bytes at {int(first.min())} are out of bounds: there are {size}")
    return first[:, None] + np.arange(nbytes)


def _is_local(wave: Wave, address: np.ndarray) -> bool:
    return bool(len(address)) and bool((np.abs(address - LOCAL_BASE) < 1 << 20).all())


def _load_generic(wave: Wave, *given: Any) -> np.ndarray:
    return (_load_local if _is_local(wave, given[1]) else _load_global)(wave, *given)


def _store_generic(wave: Wave, *given: Any) -> None:
    (_store_local if _is_local(wave, given[1]) else _store_global)(wave, *given)


_LOADS = {
    "shared": _load_shared, "global": _load_global, "param": _load_parameter, "local": _load_local,
    "generic": _load_generic,
}  # fmt: skip
_STORES = {"shared": _store_shared, "global": _store_global, "local": _store_local, "generic": _store_generic}

INSTRUCTIONS = (
    (
        r"(ld|st)(?:\.(global|shared(?:::cta)?|param|local))?(?:\.(?:L1|L2)::\w+)*(?:\.v([248]))?"
        r"\.([busf](?:8|16|32|64))",
        access,
    ),
)
