"""The one place where a Triton kernel is launched. The caller has made the tensors' device current."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton.language as tl
from triton import knobs

from inception_fused.errors import KernelError
from inception_fused.kernels.submit import submit
from inception_fused.kernels.views import Tile

INTERPRETED = knobs.runtime.interpret
"""Whether this process interprets kernels on the CPU; Triton decides it when a kernel is decorated."""

OPTIONS = {"enable_fp_fusion": True}
"""Said explicitly: the default changes between Triton 3.9 and 3.10, and 3.9 warns where it is not said."""

_lock = threading.Lock() if INTERPRETED else nullcontext()
"""The interpreter replaces functions of triton.language while a kernel runs, so one thread at a time."""

if INTERPRETED:
    from inception_fused.kernels import interpreter

    interpreter.repair()


class Launch(NamedTuple):
    """One launch. args: positional arguments of the kernel up to its constexprs, which are given by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    tile: Tile

    def run(self) -> None:
        """Enqueue on the current stream. Raises KernelError if Triton cannot compile or launch."""
        try:
            with _lock:
                self.kernel[self.grid](*self.args, **self.constexprs, **self.tile._asdict(), **OPTIONS)
        except Exception as error:
            raise KernelError(f"{self.describe()} failed: {type(error).__name__}: {error}") from error

    def describe(self) -> str:
        return f"{self.kernel.fn.__name__}: launch of {self.grid[0]} programs with {self.tile}"


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constexprs: dict[str, Any], tile: Tile) -> None:
    """Run a kernel, or have it recorded."""
    submit(Launch(kernel, grid, args, constexprs, tile))


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp32 for every dtype that a GPU runs; fp64 for fp64, which only the interpreter does (gradient checks)."""
    return tl.float64 if dtype == torch.float64 else tl.float32
