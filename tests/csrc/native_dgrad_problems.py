"""Problems for the compiled B3 in numpy, their float64 truth, and the check of everything that a launch may write.

As native_problems.py, whose buffers these are. A result must be the exact one rounded once, up to the errors of sums in
fp32: sums that cancel would show a rounding before the gather.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from native_problems import SMALLEST_NORMAL, STORAGE, UNIT_ROUNDOFF, Buffer, as_read, decode, encode

TAPS = 9


class Problem(NamedTuple):
    """One launch. n, h, w: images; k: columns of g; c: channels of dx. pad: elements added to each row stride;
    offset: elements by which g, dpool and dx begin after a boundary of 16 bytes, and bytes for taps. pool: taps are
    the arg-max of random images, else drawn at random, also 9 to 15, which are none. specials: g has NaN, dpool NaN
    and infinities."""

    n: int
    h: int
    w: int
    k: int
    c: int
    element: str = "bf16"
    tile: tuple[int, int] = (64, 64)
    aligned: bool = True
    pad: int = 0
    offset: int = 0
    pool: bool = False
    specials: bool = False
    seed: int = 0

    @property
    def m(self) -> int:
        return self.n * self.h * self.w

    def __str__(self) -> str:
        kind = "" if self.aligned else " unaligned"
        return (
            f"dgrad {self.element} {self.n}x{self.h}x{self.w} K {self.k} C {self.c} {self.tile[0]}x{self.tile[1]}{kind}"
        )


class Case:
    """A problem with its tensors: launch it with :meth:`run`, judge it with :meth:`check`."""

    def __init__(self, problem: Problem) -> None:
        self.problem = p = problem
        # A generator for each operand, so that problems which differ in n only share images and weights.
        for_g, for_w, for_dpool, for_taps = np.random.default_rng(p.seed).spawn(4)
        dtype = STORAGE[p.element]
        self.g = Buffer(p.m, p.k, p.k + p.pad, dtype, p.offset)
        self.g.matrix[:] = encode(for_g.standard_normal((p.m, p.k)), p.element)
        self.weights = Buffer(p.c, p.k, p.k, dtype)
        self.weights.matrix[:] = encode(for_w.standard_normal((p.c, p.k)) / np.sqrt(p.k), p.element)
        self.dpool = Buffer(p.m, p.c, p.c + 2 * p.pad, dtype, p.offset)
        self.dpool.matrix[:] = encode(for_dpool.standard_normal((p.m, p.c)), p.element)
        if p.specials:
            self.g.matrix[::7, 0] = encode(np.array(np.nan), p.element)
            for row, value in enumerate((np.nan, np.inf, -np.inf)):
                self.dpool.matrix[row::5, row::3] = encode(np.array(value), p.element)
        width = -(-p.c // 2)
        self.packed = Buffer(p.m, width, width + p.pad, np.uint8, p.offset)
        drawn = pooled_taps(p, for_taps) if p.pool else for_taps.integers(0, 16, (p.m, p.c)) % 11
        drawn = np.pad(drawn, ((0, 0), (0, p.c % 2)), constant_values=4)  # a tap that an odd channel must not be given
        self.packed.matrix[:] = drawn[:, ::2] | drawn[:, 1::2] << 4
        self.taps = drawn[:, : p.c]
        self.dx = Buffer(p.m, p.c, p.c + 3 * p.pad, dtype, p.offset, output=True)

    def arguments(self) -> dict[str, Any]:
        """Keywords of the extension's grouped_dgrad."""
        p = self.problem
        rows = dict(g=self.g, dpool=self.dpool, taps=self.packed, dx=self.dx)
        return dict(
            element=p.element, tile=p.tile, aligned=p.aligned, device=0, stream=0,
            m=p.m, k=p.k, c=p.c, image=(p.h, p.w), w=self.weights.address,
            **{name: (buffer.address, buffer.stride) for name, buffer in rows.items()},
        )  # fmt: skip

    def inputs(self) -> list[tuple[int, int]]:
        """(address, bytes) of what may be read by copies: g and the weights, up to the last row's end."""
        return [(b.address, ((b.rows - 1) * b.stride + b.width) * b.all.itemsize) for b in (self.g, self.weights)]

    def run(self, module: Any) -> None:
        module.grouped_dgrad(**self.arguments())

    def truth(self) -> tuple[np.ndarray, np.ndarray]:
        """float64 [m, c] from the stored operands, and the root of the squares of all that an element adds up."""
        p = self.problem
        g, w = (as_read(b.matrix, p.element) for b in (self.g, self.weights))
        dpool = decode(self.dpool.matrix, p.element)
        with np.errstate(invalid="ignore", over="ignore"):
            return g @ w.T + self._gather(dpool), np.sqrt((g**2) @ (w**2).T + self._gather(dpool**2))

    def _gather(self, values: np.ndarray) -> np.ndarray:
        """[m, c]: each pixel's sum of what the windows around it hold for it."""
        p = self.problem
        shape = (p.n, p.h, p.w, p.c)
        out = np.zeros((p.n, p.h + 2, p.w + 2, p.c))
        for tap in range(TAPS):
            r, s = divmod(tap, 3)
            out[:, r : r + p.h, s : s + p.w] += np.where(self.taps == tap, values, 0.0).reshape(shape)
        return out[:, 1:-1, 1:-1].reshape(p.m, p.c)

    def outputs(self) -> list[np.ndarray]:
        """dx as stored."""
        return [self.dx.matrix]

    def check(self) -> str | None:
        """What is wrong with dx, or None: its values, and every byte beside it."""
        p = self.problem
        out, (truth, size) = decode(self.dx.matrix, p.element), self.truth()
        special = ~np.isfinite(truth)
        if not np.array_equal(out[special], truth[special], equal_nan=True):
            return "NaN or infinity is lost or of the wrong sign"
        out, truth, size = out[~special], truth[~special], size[~special]
        sums = 4 * 2.0**-24 * np.sqrt(p.k + TAPS) * size
        allowed = UNIT_ROUNDOFF[p.element] * (np.abs(truth) + SMALLEST_NORMAL[p.element]) + sums
        if not np.isfinite(out).all():
            return f"{(~np.isfinite(out)).sum()} of {out.size} elements are NaN or infinite"
        ratio = np.abs(out - truth) / allowed
        if (ratio > 1).any():
            return f"{(ratio > 1).sum()} of {ratio.size} elements err by up to {ratio.max():.0e} times what is allowed"
        if not self.dx.untouched_outside(np.arange(p.c)):
            return "dx: written outside its slice"
        return None


def pooled_taps(p: Problem, rng: np.random.Generator) -> np.ndarray:
    """[m, c]: the first arg-max of every window of random images."""
    images = np.pad(
        rng.standard_normal((p.n, p.h, p.w, p.c)), ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=-np.inf
    )
    windows = [images[:, r : r + p.h, s : s + p.w] for r in range(3) for s in range(3)]
    return np.argmax(windows, axis=0).reshape(p.m, p.c)


def problems() -> list[Problem]:
    """Odd images, K and C, strides, offsets, dtypes, tiles, taps: the least that stands for all."""
    return [problem for element in UNIT_ROUNDOFF for problem in _problems(element)]


def _problems(element: str) -> Iterator[Problem]:
    unit = 4 if element == "tf32" else 8
    for tile in ((64, 64), (128, 128)):
        # Several images, tails of M, of K inside a step and of C inside a tile.
        yield Problem(2, 5, 7, 5 * unit, 6 * unit, element, tile)
    yield Problem(1, 1, 1, unit, unit, element)
    yield Problem(70, 1, 1, 2 * unit, 2 * unit, element)
    yield Problem(1, 1, 67, unit, 2 * unit, element, pool=True)
    yield Problem(2, 35, 1, unit, 2 * unit, element, pool=True)
    yield Problem(4, 4, 4, 64, 64, element, pad=unit)
    yield Problem(3, 9, 5, 6 * unit, 17 * unit, element, (128, 128), pad=2 * unit, pool=True)
    yield Problem(2, 3, 5, 3 * unit, 3 * unit, element, specials=True)
    yield Problem(8, 9, 9, unit, 9 * unit, element)
    yield Problem(2, 5, 7, 41, 13, element, aligned=False, pad=1)
    yield Problem(1, 2, 2, 1, 1, element, aligned=False, offset=1)
    yield Problem(1, 8, 9, 32, 67, element, aligned=False, offset=3, pad=5, pool=True)
    yield Problem(2, 3, 5, 24, 16, element, aligned=False, specials=True)


def large_problems() -> list[Problem]:
    """A few sizes of GoogLeNet's blocks, so that many tiles and long rings are run through."""
    return [
        Problem(1, 28, 28, 176, 192, "bf16", (128, 128), pool=True),
        Problem(1, 14, 14, 304, 480, "fp16", (64, 64), pool=True),
        Problem(1, 14, 14, 448, 528, "tf32", (128, 128), pool=True),
    ]
