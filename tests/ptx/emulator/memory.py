"""Global memory: copies of tensors with red zones between them, byte by byte either there or not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch

from .integers import UINT
from .program import Instruction

GLOBAL_BASE = 0x7F40_0000_0000
RED_ZONE = 4096
"""Bytes on both sides of a tensor that nobody may touch."""

NOBODY = -1
"""Instead of a program, or of a warp."""


class _Part(NamedTuple):
    """Bytes [low, high) of a storage, which lie at `at` in the arena."""

    storage: np.ndarray
    low: int
    high: int
    at: int


def bytes_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's whole storage, shared."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, (storage.nbytes(),)).numpy()


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    """[low, high) bytes of its storage that a tensor's elements lie in."""
    low = tensor.storage_offset() * tensor.element_size()
    reach = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return low, low + (reach + 1) * tensor.element_size()


def _elements(tensor: torch.Tensor) -> np.ndarray:
    """Which bytes of its span are a tensor's own: between the rows of a slice there are others'."""
    low, high = _span(tensor)
    own = torch.zeros((high - low) // tensor.element_size(), dtype=torch.bool)
    own.as_strided(tensor.shape, tensor.stride(), 0).fill_(True)
    return own.numpy().repeat(tensor.element_size())


class GlobalMemory:
    """Tensors that overlap lie in one part. Each part begins at an odd multiple of 16 bytes, so that nothing more than
    what kernels are promised is aligned. What two programs write is compared: neither may write another value."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        tensors = [tensor for tensor in tensors if tensor.numel()]
        self.parts = list(self._placed(tensors))
        size = RED_ZONE + max((part.at + part.high - part.low for part in self.parts), default=0)
        self.bytes = np.full(size, 0xFF, np.uint8)
        self.there = np.zeros(size, bool)
        self.writer = np.full(size, NOBODY, np.int32)
        for part in self.parts:
            self.bytes[part.at : part.at + part.high - part.low] = part.storage[part.low : part.high]
        for tensor in tensors:
            at, own = self._at(tensor), _elements(tensor)
            self.there[at : at + len(own)] |= own

    def _placed(self, tensors: Sequence[torch.Tensor]) -> Iterator[_Part]:
        spans = sorted((tensor.untyped_storage().data_ptr(), *_span(tensor), i) for i, tensor in enumerate(tensors))
        end = 0
        while spans:
            pointer, low, high, first = spans.pop(0)
            while spans and spans[0][0] == pointer and spans[0][1] < high:
                high = max(high, spans.pop(0)[2])
            at = -(-(end + RED_ZONE) // 32) * 32 + 16 + (pointer + low) % 16
            end = at + high - low
            yield _Part(bytes_of(tensors[first]), low, high, at)

    def _at(self, tensor: torch.Tensor) -> int:
        low, high = _span(tensor)
        pointer = tensor.untyped_storage().data_ptr()
        for part in self.parts:
            if part.storage.ctypes.data == pointer and part.low <= low and high <= part.high:
                return part.at + low - part.low
        raise KeyError("no such tensor")

    def address(self, tensor: torch.Tensor) -> int:
        """0 for a tensor without elements, as PyTorch has it."""
        return GLOBAL_BASE + self._at(tensor) if tensor.numel() else 0

    def give_back(self) -> None:
        """What was written, into the tensors."""
        for part in self.parts:
            part.storage[part.low : part.high] = self.bytes[part.at : part.at + part.high - part.low]

    def offsets(self, address: np.ndarray, count: int, instruction: Instruction, aligned: bool = True) -> np.ndarray:
        """[lanes, count] places of the bytes at addresses, all of them there."""
        address = address.astype(np.int64) - GLOBAL_BASE
        if aligned and (address % count).any():
            bad = int(address[address % count != 0][0]) + GLOBAL_BASE
            raise instruction.error(f"address {bad:#x} is not aligned to {count} bytes")
        places = address[:, None] + np.arange(count)
        inside = (places >= 0) & (places < len(self.bytes))
        there = inside & self.there[np.where(inside, places, 0)]
        if not there.all():
            lost = ~there.all(1)
            raise instruction.error(
                f"{count} bytes at {int(address[lost][0]) + GLOBAL_BASE:#x}{self._nearest(int(address[lost][0]))} are "
                f"out of bounds, of {lost.sum()} lanes"
            )
        return places

    def _nearest(self, place: int) -> str:
        """The part that is nearest, in words."""
        if not self.parts:
            return ""
        part = min(self.parts, key=lambda part: max(part.at - place, place - part.at - (part.high - part.low), 0))
        return f" ({place - part.at} from the start of {part.high - part.low} bytes)"

    def read(self, places: np.ndarray, program: np.ndarray) -> tuple[np.ndarray, bool]:
        """(bytes, whether another program wrote one of them). program: of each lane."""
        writer = self.writer[places]
        return self.bytes[places], bool(((writer != NOBODY) & (writer != program[:, None])).any())

    def write(self, places: np.ndarray, values: np.ndarray, program: np.ndarray) -> bool:
        """Whether another program, or lane, has written another value there."""
        writer = self.writer[places]
        clash = (writer != NOBODY) & (writer != program[:, None]) & (self.bytes[places] != values)
        self.bytes[places] = values
        self.writer[places] = np.broadcast_to(program[:, None], places.shape)
        return bool((clash | (self.bytes[places] != values)).any())


def to_words(values: np.ndarray, size: int) -> list[np.ndarray]:
    """[lanes, bytes] -> a vector's elements of size bytes, [lanes] each."""
    words = np.ascontiguousarray(values).view(UINT[8 * size])
    return list(words.T)


def to_bytes(words: Sequence[np.ndarray], size: int) -> np.ndarray:
    """A vector's elements, [lanes] each -> [lanes, bytes]."""
    stacked = np.stack([word.astype(UINT[8 * size], copy=False) for word in words], axis=1)
    return np.ascontiguousarray(stacked).view(np.uint8)
