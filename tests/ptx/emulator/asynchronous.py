"""cp.async and wgmma: what is issued now and takes effect when it is waited for, at once, or sometime in between.

Until the wait what cp.async writes, and what wgmma accumulates, is NaN if it comes late; early it is there at once, but
touching it is a race all the same. cp.async: PTX ISA 9.0, 9.7.9.25.3. wgmma: 9.7.15.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from .fragments import fragment_values, group_accumulator, matrix_values
from .program import Instruction, Register
from .shared import IN_FLIGHT, NOBODY, SEVERAL
from .warps import Mask, Wave


@dataclass
class Copy:
    """One cp.async of some lanes. places: [lanes, bytes] of shared memory; sources: bytes that each reads from global
    memory, zeros behind them; group: of each lane, the commits before it."""

    instruction: Instruction
    lanes: np.ndarray
    places: np.ndarray
    address: np.ndarray
    sources: np.ndarray
    group: np.ndarray
    done: bool

    def part(self, chosen: np.ndarray) -> Copy:
        names = ("lanes", "places", "address", "sources", "group")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})


@dataclass
class Product:
    """One wgmma of one warp group: D [64, n] += A [64, k] B [k, n]. a: four registers [4, 32] each, or places [64, k,
    bytes]; b: places [n, k, bytes]."""

    instruction: Instruction
    group: int
    accumulator: tuple[Register, ...]
    a: list[np.ndarray] | np.ndarray
    b: np.ndarray
    kind: str
    signs: tuple[int, int]
    scale: bool
    commit: int
    done: bool


class Asynchronous:
    """What a wave has in flight."""

    def __init__(self, wave: Wave) -> None:
        self.wave = wave
        self.copies: list[Copy] = []
        self.copy_commits = np.zeros(wave.size, np.int64)
        self.products: list[Product] = []
        self.product_commits = np.zeros(max(wave.size // 128, 1), np.int64)
        self.sums: dict[tuple[int, tuple[Register, ...]], np.ndarray] = {}
        """[registers, 128] fp32 of accumulators in flight, by warp group."""

    def early(self) -> bool:
        timing = self.wave.schedule.timing
        return timing == "early" or (timing == "random" and bool(self.wave.draws.integers(2)))

    def copy(
        self, instruction: Instruction, lanes: np.ndarray, places: np.ndarray, address: np.ndarray, sources: np.ndarray
    ) -> None:
        shared, warp = self.wave.shared, self.wave.warp[lanes][:, None]
        copy = Copy(instruction, lanes, places, address, sources, self.copy_commits[lanes], self.early())
        shared.write(places, self._fetched(copy) if copy.done else None, warp, instruction, mark=IN_FLIGHT)
        self.copies.append(copy)

    def _fetched(self, copy: Copy) -> np.ndarray:
        """[lanes, bytes] of global memory."""
        found = np.zeros(copy.places.shape, np.uint8)
        for count in np.unique(copy.sources[copy.sources > 0]).tolist():
            chosen = copy.sources == count
            aligned = count == copy.places.shape[1]
            places = self.wave.memory.offsets(copy.address[chosen], count, copy.instruction, aligned)
            found[chosen, :count], raced = self.wave.memory.read(places, self.wave.number[copy.lanes[chosen]])
            if raced:
                self.wave.race(f"line {copy.instruction.line} reads what another program writes")
        return found

    def commit_copies(self, mask: Mask) -> None:
        self.copy_commits[self.wave.lanes(mask)] += 1

    def wait_for_copies(self, mask: Mask, left: int) -> None:
        """Until at most so many of each lane's last groups are in flight; copies in no group are not waited for."""
        waiting = self.wave.full(True if mask is None else mask)
        self._land(lambda copy: waiting[copy.lanes] & (copy.group < self.copy_commits[copy.lanes] - left))

    def _land(self, is_due: Callable[[Copy], np.ndarray]) -> None:
        rest, shared = [], self.wave.shared
        for copy in self.copies:
            due = is_due(copy)
            if due.any():
                part = copy.part(due)
                if not part.done:
                    shared.bytes[part.places] = self._fetched(part)
                shared.landed(part.places, part.lanes, self.wave.warp[part.lanes], part.instruction)
            if not due.all():
                rest.append(copy.part(~due))
        self.copies = rest

    def multiply(self, product: Product) -> None:
        """Issues one: its operands are in flight from here on, its accumulator is NaN to all who look."""
        wave, shared, key = self.wave, self.wave.shared, (product.group, product.accumulator)
        own = slice(128 * product.group, 128 * product.group + 128)
        if key not in self.sums:
            values = np.stack([wave.full(wave.read(register))[own] for register in product.accumulator])
            self.sums[key] = values.view(np.float32).copy()
            for register in product.accumulator:
                # Nobody may read an accumulator before the wait, whatever the timing.
                spoilt = wave.full(wave.read(register)).copy()
                spoilt[own] = 0xFFFFFFFF
                wave.registers[register.name] = spoilt
        for places, of_rows in self._operands(product):
            reader, units = product.group % (wave.threads // 128 or 1), places[..., 0] // 16
            if (shared.unfenced[reader][units] != NOBODY).any():
                raise product.instruction.error("reads what st.shared wrote without a fence.proxy.async in between")
            if (shared.unfenced_copies[reader][units] != NOBODY).any():
                wave.unfenced.add(product.instruction.line)
            who = (4 * product.group + np.arange(64) // 16)[:, None, None] if of_rows else SEVERAL
            shared.note_read(places, who, product.instruction)
            shared.reader[places] = IN_FLIGHT
        self.products.append(product)
        if self.early():
            # A warp group's products are made in their order: those before it come first.
            for earlier in self.products:
                if earlier.group == product.group:
                    self._accumulate(earlier)

    @staticmethod
    def _operands(product: Product) -> list[tuple[np.ndarray, bool]]:
        """(places, whether each warp reads 16 rows of it only)."""
        return [(product.b, False)] + ([(product.a, True)] if isinstance(product.a, np.ndarray) else [])

    def _accumulate(self, product: Product) -> None:
        """Once."""
        if product.done:
            return
        product.done = True
        shared = self.wave.shared

        def matrix(places: np.ndarray) -> np.ndarray:
            raw = np.ascontiguousarray(shared.bytes[places]).view(np.uint32 if places.shape[-1] == 4 else np.uint16)
            return matrix_values(raw[..., 0], product.kind)

        if isinstance(product.a, np.ndarray):
            a = matrix(product.a)
        else:
            a = fragment_values(product.a, product.kind).reshape(64, -1)
        sign_a, sign_b = map(np.float32, product.signs)
        found = (sign_a * a) @ (sign_b * matrix(product.b)).T
        sums = self.sums[product.group, product.accumulator]
        sums[...] = (sums if product.scale else 0) + found[group_accumulator(len(product.accumulator))]

    def commit_products(self, groups: np.ndarray) -> None:
        self.product_commits[groups] += 1

    def wait_for_products(self, groups: np.ndarray, left: int) -> None:
        wave, shared = self.wave, self.wave.shared
        due = [p for p in self.products if p.group in groups and p.commit < self.product_commits[p.group] - left]
        if not due:
            return
        for product in due:
            self._accumulate(product)
            for places, _ in self._operands(product):
                # Another warp may write them only behind a barrier: it has not waited.
                shared.reader[places] = SEVERAL
        kept = set(map(id, due))
        self.products = [product for product in self.products if id(product) not in kept]
        for product in self.products:
            for places, _ in self._operands(product):
                shared.reader[places] = IN_FLIGHT
        busy = {(product.group, product.accumulator) for product in self.products}
        for key in [key for key in self.sums if key[0] in groups and key not in busy]:
            sums, (group, accumulator) = self.sums.pop(key), key
            for register, values in zip(accumulator, sums, strict=True):
                whole = wave.full(wave.read(register)).copy()
                whole[128 * group : 128 * group + 128] = values.view(np.uint32)
                wave.registers[register.name] = whole

    def end(self) -> None:
        """A program has ended: copies land whenever they do, products must have been waited for."""
        self._land(lambda copy: np.ones(len(copy.lanes), bool))
        if self.products:
            raise self.products[0].instruction.error("in flight at the end of the program")
