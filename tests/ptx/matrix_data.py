"""Matrices as the registers of a warp, and the instructions that bring them there."""

from __future__ import annotations

from functools import cache

import numpy as np

from isa_rules import decoded, encoded
from isa_tables import Fragment


def numbers(shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Small integers: sums of their products are exact in every type."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float64)


@cache
def pattern(value: float, kind: str) -> int:
    return encoded(float(value), "f32" if kind == "tf32" else kind)


def registers(matrix: np.ndarray, fragment: Fragment, kind: str) -> list[list[int]]:
    """Each lane's registers with a matrix."""
    found, bits = [], 32 // fragment.packed
    for lane in range(32):
        elements = [pattern(matrix[fragment.place(lane, i)], kind) for i in range(len(fragment.elements))]
        packs = [elements[i : i + fragment.packed] for i in range(0, len(elements), fragment.packed)]
        found.append([sum(element << bits * j for j, element in enumerate(pack)) for pack in packs])
    return found


def gathered(values: list[list[int]], fragment: Fragment) -> np.ndarray:
    """The matrix of fp32 that 32 lanes hold."""
    matrix = np.full((fragment.rows, fragment.columns), np.nan)
    for lane, row in enumerate(values):
        for i, value in enumerate(row):
            matrix[fragment.place(lane, i)] = decoded(value, "f32")
    return matrix


def vector(first: int, count: int, name: str = "%r") -> str:
    return "{" + ", ".join(f"{name}{first + i}" for i in range(count)) + "}"


def from_global(parameter: int, first: int, count: int) -> list[str]:
    """Loads a lane's ``count`` words into %r[first] and on; its address stays in %rd[100 + parameter]."""
    address = f"%rd{100 + parameter}"
    return [f"ld.param.b64 \t{address}, [tiny_param_{parameter}];", f"mul.wide.u32 \t%rd300, %r300, {4 * count};",
            f"add.s64 \t{address}, {address}, %rd300;",
            *(f"ld.global.b32 \t%r{first + i}, [{address}+{4 * i}];" for i in range(count))]  # fmt: skip


def to_global(parameter: int, first: int, count: int) -> list[str]:
    return [f"st.global.b32 \t[%rd{100 + parameter}+{4 * i}], %r{first + i};" for i in range(count)]


LANE = ["mov.u32 \t%r300, %tid.x;"]
