"""Problems for the compiled K1 in numpy, their float64 truth, and the check of everything that a launch may write.

Only numpy: it also runs in a process with sanitizers, where importing torch would cost a minute. Tensors lie between
guards of NaN, so that a read outside shows in the result and a write outside in the guard.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

GUARD = 64
"""Elements before and after every tensor; a multiple of 16 bytes, so that alignment is the tensor's own."""

UNIT_ROUNDOFF = {"bf16": 2.0**-8, "fp16": 2.0**-11, "tf32": 2.0**-24}
TF32_OPERAND = 2.0**-10
VECTOR_TYPES = {None: 0, "fp32": 1, "fp16": 2, "bf16": 3, "fp64": 4}
STORAGE = {"bf16": np.uint16, "fp16": np.float16, "tf32": np.float32, "fp32": np.float32, "fp64": np.float64}


class Problem(NamedTuple):
    """One launch. k: columns of the three groups. pad: elements added to each row stride; offset: elements by which
    x, y and r begin after a boundary of 16 bytes; specials: x has NaN, infinities and rows of zeros."""

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


class Buffer:
    """rows x width stored elements between guards; ``guards`` are the bytes that no launch may change."""

    def __init__(self, rows: int, width: int, stride: int, dtype: type, offset: int = 0) -> None:
        size = (rows - 1) * stride + width
        raw = np.full((size + offset + 2 * GUARD) * np.dtype(dtype).itemsize + 16, 0xFF, dtype=np.uint8)
        start = -raw.ctypes.data % 16
        self.all = raw[start : start + (size + offset + 2 * GUARD) * np.dtype(dtype).itemsize].view(dtype)
        self.raw, self.rows, self.width, self.stride, self.first = raw, rows, width, stride, GUARD + offset

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
            for row, value in enumerate((np.nan, np.inf, -np.inf, 0.0)):
                self.x.matrix[row::7, : 1 if value else p.c] = encode(np.array(value), p.element)
        self.w = [Buffer(max(k, 1), p.c, p.c, dtype) for k in p.k]
        for w in self.w:
            w.matrix[:] = encode(for_w.standard_normal((w.rows, p.c)) / np.sqrt(p.c), p.element)
        self.y = Buffer(p.m, y_width, y_width + p.pad, dtype, p.offset)
        self.r = Buffer(p.m, width, -(-width // unit) * unit + p.pad, dtype, p.offset)
        self.bits = Buffer(p.m, -(-p.k[0] // 8), -(-p.k[0] // 8) + 3, np.uint8)
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
        out = sum(self._terms(group))
        return np.where(out < 0, 0.0, out) if self.problem.relu else out

    def outputs(self) -> list[np.ndarray]:
        """The three groups' results as stored."""
        k1, k2, k3 = self.problem.k
        return [self.y.matrix[:, :k1], self.r.matrix[:, :k2], self.r.matrix[:, self.r5 : self.r5 + k3]]

    def check(self) -> str | None:
        """What is wrong with the outputs, or None: values, mask bits, and every byte beside them."""
        p = self.problem
        # The model of inception_fused.testing.tolerance: one rounding, fp32 accumulation, TF32's operands.
        bound = UNIT_ROUNDOFF[p.element] + 4 * 2.0**-24 * np.sqrt(p.c) + (TF32_OPERAND if p.element == "tf32" else 0.0)
        for group, stored in enumerate(self.outputs()):
            if stored.size == 0:
                continue
            out, truth = decode(stored, p.element), self.truth(group)
            special = ~np.isfinite(truth)
            if not np.array_equal(out[special], truth[special], equal_nan=True):
                return f"group {group}: NaN or infinity is lost or of the wrong sign"
            out, truth = out[~special], truth[~special]
            if not np.isfinite(out).all():
                return f"group {group}: {(~np.isfinite(out)).sum()} of {out.size} elements are NaN or infinite"
            # Relative to what was added up, so that a sum which cancels is not held to its small result.
            scale = np.sqrt((self._magnitude(group)[~special] ** 2).mean())
            error = np.abs(out - truth)
            if np.sqrt((error**2).mean()) > bound * scale or error.max() > 8 * bound * scale:
                return f"group {group}: error {error.max() / scale:.1e}, bound {8 * bound:.1e}"
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

    def _magnitude(self, group: int) -> np.ndarray:
        """Root of the squares of what the epilogue adds: the size to which a rounding error is relative."""
        scaled, shift = self._terms(group)
        return np.hypot(scaled, shift)

    def _terms(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """acc * scale and shift in float64, [m, k[group]] each."""
        p = self.problem
        x, w = (decode(b.matrix, p.element) for b in (self.x, self.w[group]))
        with np.errstate(invalid="ignore"):
            out, shift = x @ w[: p.k[group]].T, np.zeros(p.k[group])
        if self.scale is not None:
            out = out * decode(self.scale[group].matrix, p.scale)[0, : p.k[group]]
        if self.shift is not None:
            shift = decode(self.shift[group].matrix, p.shift)[0, : p.k[group]]
        return out, np.broadcast_to(shift, out.shape)

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
