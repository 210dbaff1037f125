"""Shared memory of the programs that run beside each other, and who touched which of its bytes since a barrier.

Between two barriers a byte may be read by many warps or written by one. What cp.async writes and wgmma reads is in
flight from its issue to the wait for it, across barriers: nobody may read the one or write the other meanwhile, not
even the warp that asked for it. A write of the value that is there already is harmless.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from .memory import NOBODY
from .program import Instruction, PtxError

BASE = 1024
"""First address of a program's own shared memory: the driver keeps 1 KiB on sm_80 and up (CUDA C++ Programming Guide,
"Technical Specifications per Compute Capability")."""

MOST = 227 << 10
"""Of a program on sm_90, the most of all; the addresses of wgmma's descriptors end at 256 KiB."""

SEVERAL, IN_FLIGHT = NOBODY - 1, NOBODY - 2
"""Instead of a warp."""


class SharedMemory:
    """nbytes: of a program. tell: takes a race in words.

    Places are bytes of all programs' memories, one after the other.
    """

    def __init__(self, nbytes: int, programs: int, groups: int, tell: Callable[[str], None]) -> None:
        if nbytes > MOST:
            raise PtxError(f"{nbytes} bytes of shared memory: a program can have {MOST}")
        self.nbytes, self.pitch = nbytes, -(-max(nbytes, 1) // 16) * 16
        size = programs * self.pitch
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.writer, self.reader = np.full(size, NOBODY, np.int32), np.full(size, NOBODY, np.int32)
        self.written_at, self.read_at = np.zeros(size, np.int32), np.zeros(size, np.int32)
        self.unfenced = np.full((groups, size // 16), NOBODY, np.int32)
        """By each warp group of a program: the lane that last wrote 16 bytes through the generic proxy, which wgmma
        does not see before a fence.proxy.async on the way from the one to the other (9.7.13.4)."""
        self.unfenced_copies = np.full((groups, size // 16), NOBODY, np.int32)
        """The same of what cp.async wrote. It writes through the generic proxy too, but Triton before 3.7 emits no
        fence behind it on sm_90, and nobody has seen that fail there."""
        self.tell = tell

    def places(self, address: np.ndarray, count: int, program: np.ndarray, instruction: Instruction) -> np.ndarray:
        """[..., count] places of the bytes at addresses of programs, which must be aligned to count."""
        if (address % count).any():
            raise instruction.error(f"shared address {int(address[address % count != 0][0])} not aligned to {count}")
        return self.loose_places(address[..., None] + np.arange(count), program[..., None], instruction)

    def loose_places(self, address: np.ndarray, program: np.ndarray, instruction: Instruction) -> np.ndarray:
        outside = (address < BASE) | (address >= BASE + self.nbytes)
        if outside.any():
            bad = int(address[outside][0]) - BASE
            raise instruction.error(f"byte {bad} is out of bounds: the program has {self.nbytes} of shared memory")
        return address - BASE + program * self.pitch

    def read(self, places: np.ndarray, who: np.ndarray | int, instruction: Instruction) -> np.ndarray:
        """who: the warp, of the shape of places or less."""
        self.note_read(places, who, instruction)
        return self.bytes[places]

    def note_read(self, places: np.ndarray, who: np.ndarray | int, instruction: Instruction) -> None:
        writer = self.writer[places]
        clash = (writer != NOBODY) & (writer != who)
        if clash.any():
            self._race("reads", "written", self.written_at, places[clash], instruction)
        reader = self.reader[places]
        mixed = (reader != NOBODY) & (reader != who)
        self.reader[places] = np.where(reader == IN_FLIGHT, IN_FLIGHT, np.where(mixed, SEVERAL, who))
        self.read_at[places] = instruction.line

    def write(
        self, places: np.ndarray, values: np.ndarray | None, who: np.ndarray | int, instruction: Instruction,
        mark: int | None = None,
    ) -> None:  # fmt: skip
        """values: None for what nobody knows before the wait. mark: what the bytes are marked as instead of who."""
        writer, reader = self.writer[places], self.reader[places]
        clash = (writer != NOBODY) & (writer != who)
        read = (reader != NOBODY) & (reader != who)
        if values is not None:
            other = self.bytes[places] != values
            clash, read = clash & (other | (writer == IN_FLIGHT)), read & other
        if clash.any():
            self._race("writes", "written", self.written_at, places[clash], instruction)
        if read.any():
            self._race("writes", "read", self.read_at, places[read], instruction)
        self.bytes[places] = 0xFF if values is None else values
        self.writer[places] = who if mark is None else mark
        self.written_at[places] = instruction.line
        if values is not None and (lost := self.bytes[places] != values).any():
            self._race("writes", "written", self.written_at, places[lost], instruction)

    def _race(self, does: str, did: str, at: np.ndarray, places: np.ndarray, instruction: Instruction) -> None:
        lines = ", ".join(map(str, sorted(set(at[places].tolist()))[:4]))
        first = int(places.reshape(-1)[0]) % self.pitch
        self.tell(
            f"line {instruction.line} {does} shared byte {first}, which line {lines} of another warp or lane, or in "
            f"flight, has {did} since the last barrier: {instruction.text}"
        )

    def barrier(self, programs: Iterable[int]) -> None:
        """All warps of programs have met: only what is in flight stays marked."""
        for program in programs:
            own = slice(program * self.pitch, (program + 1) * self.pitch)
            for marks in (self.writer[own], self.reader[own]):
                marks[marks != IN_FLIGHT] = NOBODY

    def landed(self, places: np.ndarray, lanes: np.ndarray, warps: np.ndarray, instruction: Instruction) -> None:
        """What was in flight, [lanes, bytes], has been written, by who asked for it."""
        self.writer[places] = warps[:, None]
        self.written_at[places] = instruction.line
        self.unfenced[:, places[:, 0] // 16] = NOBODY
        self.unfenced_copies[:, places[:, 0] // 16] = lanes

    def needs_fence(self, places: np.ndarray, lanes: np.ndarray) -> None:
        """The generic proxy wrote [lanes, bytes] places."""
        self.unfenced[:, places[:, ::16] // 16] = lanes[:, None]
        self.unfenced[:, places[:, -1:] // 16] = lanes[:, None]

    def fence(self, lanes: np.ndarray, groups: np.ndarray, programs: np.ndarray) -> None:
        """By the writers before a barrier, or by the readers behind it: both are on the way. groups, programs: of the
        readers among the lanes."""
        for marks in (self.unfenced, self.unfenced_copies):
            marks[np.isin(marks, lanes)] = NOBODY
            for group, program in set(zip(groups.tolist(), programs.tolist(), strict=True)):
                marks[group, program * self.pitch // 16 : (program + 1) * self.pitch // 16] = NOBODY
