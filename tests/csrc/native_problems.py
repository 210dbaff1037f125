"""Problems for the compiled K1 in numpy, their float64 truth, and the check of everything that a launch may write.

Only numpy: it also runs in a process with sanitizers, where importing torch would cost a minute. Tensors lie between
guards of NaN, so that a read outside shows in the result and a write outside in the guard. Under AddressSanitizer
inputs have no guard at their end, so that it sees the first byte beyond.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np

GUARD = 64
"""Elements before and after every tensor; a multiple of 16 bytes, so that alignment is the tensor's own."""

SANITIZED = "ASAN_OPTIONS" in os.environ

UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-24}
SMALLEST_NORMAL = {"bf16": 2.0**-126, "fp16": 2.0**-14, "tf32": 2.0**-126}
VECTOR_TYPES = {None: 0, "fp32": 1, "fp16": 2, "bf16": 3, "fp64": 4}
STORAGE = {"bf16": np.uint16, "fp16": np.float16, "tf32": np.float32, "fp32": np.float32, "fp64": np.float64}


class Problem(NamedTuple):
    """One launch. k: columns of the three groups. pad: elements added to each row stride; offset: elements by which
    x, y and r begin after a boundary of 16 bytes; specials: x has NaN, infinities, rows of zeros and rows
    whose results are subnormal."""

    m: int
    c: int
    k: tuple[int, int, int]
    element: str = "bf16"
    tile: tuple[int, int] = (64, 64)
    aligned: bool = True
    pad: int = 0
    offset: int = 0
    relu: bool = True
    bits: bool = True
    shift: str | None = "fp32"
    scale: str | None = None
    specials: bool = False
    seed: int = 0

    def __str__(self) -> str:
        kind = "" if self.aligned else " unaligned"
        return (
            f"{self.element} M {self.m} K {self.c} N {'+'.join(map(str, self.k))} {self.tile[0]}x{self.tile[1]}{kind}"
        )


def encode(values: np.ndarray, kind: str) -> np.ndarray:
    """fp64 -> stored elements, rounded to nearest even; bf16 as its 16 bits."""
    if kind != "bf16":
        return values.astype(STORAGE[kind])
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, rounded).astype(np.uint16)


def decode(stored: np.ndarray, kind: str) -> np.ndarray:
    """Stored elements -> fp64."""
    if kind != "bf16":
        return stored.astype(np.float64)
    return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def as_read(stored: np.ndarray, kind: str) -> np.ndarray:
    """A product's operand -> fp64, as the kernels centre it and the matrix instruction cuts it in TF32, so that no
    tolerance is spent on either."""
    if kind == "tf32":
        centred = np.ascontiguousarray(stored) * np.float32(1 + 0.72135 / 2048)
        stored = (centred.view(np.uint32) & 0xFFFFE000).view(np.float32)
    return decode(stored, kind)


class Buffer:
    """rows x width stored elements between guards; ``guards`` are the bytes that no launch may change."""

    def __init__(
        self, rows: int, width: int, stride: int, dtype: type, offset: int = 0, *, output: bool = False
    ) -> None:
        size = GUARD + offset + (rows - 1) * stride + width + (GUARD if output or not SANITIZED else 0)
        raw = np.full(size * np.dtype(dtype).itemsize, 0xFF, dtype=np.uint8)
        assert raw.ctypes.data % 16 == 0, "malloc gives multiples of 16"
        self.all = raw.view(dtype)
        self.rows, self.width, self.stride, self.first = rows, width, stride, GUARD + offset

    @property
    def address(self) -> int:
        return self.all.ctypes.data + self.first * self.all.itemsize

    @property
    def matrix(self) -> np.ndarray:
        """[rows, width], writable."""
        strides = (self.stride * self.all.itemsize, self.all.itemsize)
        return np.lib.stride_tricks.as_strided(self.all[self.first :], (self.rows, self.width), strides)

    def untouched_outside(self, columns: np.ndarray) -> bool:
        """Whether every byte but those columns of the matrix still is 0xff."""
        seen = self.all.copy()
        inside = np.lib.stride_tricks.as_strided(
            seen[self.first :], (self.rows, self.width), (self.stride * seen.itemsize, seen.itemsize)
        )
        inside[:, columns] = np.full(1, 0xFFFFFFFFFFFFFFFF, dtype=np.uint64).view(seen.dtype)[0]
        return bool((seen.view(np.uint8) == 0xFF).all())


class Case:
    """A problem with its tensors: launch it with :meth:`run`, judge it with :meth:`check`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = p = problem
        # A generator for each operand, so that problems which differ in m only share rows and parameters.
        for_x, for_w, for_shift, for_scale = np.random.default_rng(p.seed).spawn(4)
        dtype = STORAGE[p.element]
        unit = 16 // np.dtype(dtype).itemsize
        self.r5 = -(-p.k[1] // unit) * unit
        width = self.r5 + p.k[2]
        y_width = sum(p.k) + 3 * unit
        self.x = Buffer(p.m, p.c, p.c + p.pad, dtype, p.offset)
        self.x.matrix[:] = encode(for_x.standard_normal((p.m, p.c)), p.element)
        if p.specials:
            for row, value in enumerate((np.nan, np.inf, -np.inf)):
                self.x.matrix[row::7, 0] = encode(np.array(value), p.element)
            self.x.matrix[3::7] = 0
            tiny = decode(self.x.matrix[4::7], p.element) * SMALLEST_NORMAL[p.element] / 8
            self.x.matrix[4::7] = encode(tiny, p.element)
        self.w = [Buffer(max(k, 1), p.c, p.c, dtype) for k in p.k]
        for w in self.w:
            w.matrix[:] = encode(for_w.standard_normal((w.rows, p.c)) / np.sqrt(p.c), p.element)
        self.y = Buffer(p.m, y_width, y_width + p.pad, dtype, p.offset, output=True)
        self.r = Buffer(p.m, width, -(-width // unit) * unit + p.pad, dtype, p.offset, output=True)
        self.bits = Buffer(p.m, -(-p.k[0] // 8), -(-p.k[0] // 8) + 3, np.uint8, output=True)
        self.shift = self._vectors(for_shift, p.shift)
        self.scale = self._vectors(for_scale, p.scale)

    def _vectors(self, rng: np.random.Generator, kind: str | None) -> list[Buffer] | None:
        if kind is None:
            return None
        vectors = [Buffer(1, max(k, 1), max(k, 1), STORAGE[kind]) for k in self.problem.k]
        for vector in vectors:
            vector.matrix[:] = encode(rng.standard_normal(vector.matrix.shape), kind)
        return vectors

    def arguments(self) -> dict[str, Any]:
        """Keywords of the extension's grouped_gemm."""
        p = self.problem

        def addresses(buffers: list[Buffer] | None) -> tuple[int, ...]:
            return tuple(b.address for b in buffers) if buffers else (0, 0, 0)

        return dict(
            element=p.element, tile=p.tile, aligned=p.aligned, device=0, stream=0,
            m=p.m, c=p.c, k=p.k, x=(self.x.address, self.x.stride), w=addresses(self.w),
            y=(self.y.address, self.y.stride), r=(self.r.address, self.r.stride, self.r5),
            bits=(self.bits.address, self.bits.stride) if p.bits else (0, 0),
            shift=addresses(self.shift), shift_type=VECTOR_TYPES[p.shift],
            scale=addresses(self.scale), scale_type=VECTOR_TYPES[p.scale], relu=p.relu,
        )  # fmt: skip

    def inputs(self) -> list[tuple[int, int]]:
        """(address, bytes) of what may be read by copies: x and the weights, up to the last row's end."""
        return [(b.address, ((b.rows - 1) * b.stride + b.width) * b.all.itemsize) for b in (self.x, *self.w)]

    def run(self, module: Any) -> None:
        module.grouped_gemm(**self.arguments())

    def truth(self, group: int) -> np.ndarray:
        """float64 [m, k[group]] from the stored operands."""
        x, w = self._operands(group)
        scale, shift = self._affine(group)
        with np.errstate(invalid="ignore"):
            out = x @ w.T * scale + shift
        return np.where(out < 0, 0.0, out) if self.problem.relu else out

    def outputs(self) -> list[np.ndarray]:
        """The three groups' results as stored."""
        k1, k2, k3 = self.problem.k
        return [self.y.matrix[:, :k1], self.r.matrix[:, :k2], self.r.matrix[:, self.r5 : self.r5 + k3]]

    def check(self) -> str | None:
        """What is wrong with the outputs, or None: values, mask bits, and every byte beside them."""
        p = self.problem
        # One rounding and an accumulation in fp32.
        bound = UNIT_ROUNDOFF[p.element] + 4 * 2.0**-24 * np.sqrt(p.c)
        for group, stored in enumerate(self.outputs()):
            out, truth = decode(stored, p.element), self.truth(group)
            special = ~np.isfinite(truth)
            if not np.array_equal(out[special], truth[special], equal_nan=True):
                return f"group {group}: NaN or infinity is lost or of the wrong sign"
            out, truth, size = out[~special], truth[~special], self._size(group)[~special]
            if not np.isfinite(out).all():
                return f"group {group}: {(~np.isfinite(out)).sum()} of {out.size} elements are NaN or infinite"
            if out.size == 0:
                continue
            # Subnormal results are spaced evenly, so that their rounding is not relative.
            error = np.abs(out - truth) / (size + SMALLEST_NORMAL[p.element])
            if np.sqrt((error**2).mean()) > bound or error.max() > 8 * bound:
                return f"group {group}: error {error.max():.1e}, bound {8 * bound:.1e}"
        if p.bits:
            wrong = self._wrong_bits()
            if wrong:
                return wrong
        k1, k2, k3 = p.k
        inside = np.r_[0:k2, self.r5 : self.r5 + k3]
        for name, buffer, columns in (("y", self.y, np.arange(k1)), ("r", self.r, inside)):
            if not buffer.untouched_outside(columns):
                return f"{name}: written outside its slice"
        if not self.bits.untouched_outside(np.arange(self.bits.width if p.bits else 0)):
            return "bits: written outside"
        return None

    def _operands(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """x and a group's weights in float64, as the matrix instruction reads them."""
        stored = self.x.matrix, self.w[group].matrix[: self.problem.k[group]]
        return tuple(as_read(m, self.problem.element) for m in stored)

    def _size(self, group: int) -> np.ndarray:
        """Root of the squares of all that an element adds up: the size to which its rounding errors are relative."""
        x, w = self._operands(group)
        with np.errstate(invalid="ignore", over="ignore"):
            size = (x**2) @ (w**2).T
        scale, shift = self._affine(group)
        return np.sqrt(size * scale**2 + shift**2)

    def _affine(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """scale and shift of a group's columns in float64."""
        p, columns = self.problem, self.problem.k[group]
        scale = decode(self.scale[group].matrix, p.scale)[0, :columns] if self.scale else np.ones(columns)
        shift = decode(self.shift[group].matrix, p.shift)[0, :columns] if self.shift else np.zeros(columns)
        return scale, shift

    def _wrong_bits(self) -> str | None:
        y = decode(self.outputs()[0], self.problem.element)
        expected = np.packbits(~(y <= 0), axis=1, bitorder="little")
        return None if np.array_equal(expected, self.bits.matrix) else "mask bits differ from those of the stored y"


def problems() -> list[Problem]:
    """Odd M, K and N, strides, offsets, dtypes, tiles, epilogues: the least that stands for all."""
    out = []
    for element in UNIT_ROUNDOFF:
        unit = 4 if element == "tf32" else 8
        for tile in ((64, 64), (128, 96), (128, 128)):
            # Tails of M, of K inside a step and of N inside a tile; groups that straddle tiles.
            out.append(Problem(70, 5 * unit, (6 * unit, 3 * unit, unit), element, tile))
        out += [
            Problem(1, unit, (unit, unit, unit), element),
            Problem(64, 64, (64, 64, 64), element, pad=unit, scale="fp32", shift="fp16"),
            Problem(130, 24 * unit, (16, 24, 32), element, (128, 96), shift=None, scale="bf16", relu=False, bits=False),
            Problem(257, 6 * unit, (2 * unit, 5 * unit, 3 * unit), element, (128, 128), shift="fp64", pad=2 * unit),
            Problem(65, 41, (13, 24, 7), element, aligned=False, pad=1),
            Problem(3, 1, (1, 1, 1), element, aligned=False, offset=1),
            Problem(70, 32, (24, 9, 40), element, aligned=False, offset=3, pad=5, scale="fp64", shift="bf16"),
            Problem(66, 64, (12 if unit == 4 else 16, 8, 8), element, relu=True, bits=False),
            Problem(20, 48, (8, 0, 16), element),
            Problem(28, 40, (24, 8, 16), element, specials=True),
            Problem(28, 8, (24, 8, 16), element, specials=True, shift=None),
            Problem(600, 16, (136, 8, 16), element),
        ]
    return out


def large_problems() -> list[Problem]:
    """A few sizes of GoogLeNet's blocks, so that many tiles and long rings are run through."""
    return [
        Problem(784, 192, (64, 96, 16), "bf16", (128, 96)),
        Problem(196, 480, (192, 96, 16), "fp16", (128, 128)),
        Problem(196, 528, (256, 160, 32), "tf32", (128, 128)),
    ]
