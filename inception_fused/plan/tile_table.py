"""Tables of tiles as files: what an entry is, which tile is legal, reading with suspicion and writing at once.

JSON: schema, gpu, capability, commit, kernel_sources, torch, triton, date, and entries as :class:`Entry`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inception_fused.block.views import Tile
from inception_fused.plan.kernel_table import RULES
from inception_fused.plan.launches import WGRAD_RULES
from inception_fused.plan.sources import kernel_sources
from inception_fused.runtime import files

SCHEMA = 2

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
PRECISIONS = {dtype: name for name, dtype in DTYPES.items()}
"""A table's names; fp32 is computed as TF32."""

MAX_BLOCK = 256
"""Largest BLOCK_M, BLOCK_N and BLOCK_K of any tile; choice.exceeds_int32 and border_words leave this much room."""

MAX_ACCUMULATORS = 128
"""Elements of BLOCK_M x BLOCK_N a thread: half of its 255 registers, the other half is for operands and addresses."""

SHARED_BYTES = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
"""KiB that one thread block may use, 99 elsewhere (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; torch.cuda.get_device_properties says the same of a GPU that is there)."""

CHECKED_WARPS = 4
"""More warps than these have miscompiled before (pytorch#173068), so that such a tile is taken only under the version
of Triton with which its result was checked."""


class TableError(ValueError):
    """A table cannot be used; the message says why."""


class Gpu(NamedTuple):
    """Whose tables to read. name: as PyTorch gives it; capability: (9, 0) for sm_90."""

    name: str
    capability: tuple[int, int]


class Entry(NamedTuple):
    """One tuned problem.

    kernel: a key of RULES; dtype: a key of DTYPES; gemm_m, gemm_n, gemm_k, taps: as problems.Gemm has them.
    us, rule_us: microseconds of the tile and of the rule's, of a forward the mean of their forms for inference and for
    training. runner_up: the best tile of another and its microseconds, None where no other ran. spread: as
    tools/timing.py gives it. parity: largest error against float64 over its bound.
    """

    kernel: str
    dtype: str
    gemm_m: int
    gemm_n: int
    gemm_k: int
    tile: Tile
    us: float
    rule_us: float | None
    runner_up: tuple[Tile, float] | None
    spread: float
    parity: float
    taps: int = 1

    @property
    def key(self) -> tuple[Any, ...]:
        """What has to be equal for the tile to serve a problem."""
        return key_of(self.kernel, DTYPES[self.dtype], self.gemm_m, self.gemm_n, self.gemm_k, self.taps)[0]

    @property
    def pixels(self) -> int:
        return pixels_of(self.kernel, self.gemm_m, self.gemm_k)


class Table(NamedTuple):
    """One file. origin: "user" or "package"; gpu: the name of the one that was timed."""

    origin: str
    path: Path
    gpu: str
    commit: str | None
    triton: str | None
    date: str
    entries: tuple[Entry, ...]

    @property
    def source(self) -> str:
        return f"tuned on {self.gpu}" + (f" at {self.commit[:7]}" if self.commit else "")


def read(path: Path, gpu: Gpu, origin: str) -> Table:
    """A table for a GPU. Raises FileNotFoundError, and TableError where it cannot be used."""
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise TableError(f"cannot be read ({type(error).__name__}: {str(error)[:200]})") from None
    try:
        return parse(facts, path, gpu, origin)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        if isinstance(error, TableError):
            raise
        raise TableError(f"is no table of tiles ({type(error).__name__}: {error})") from None


def parse(facts: Mapping[str, Any], path: Path, gpu: Gpu, origin: str) -> Table:
    """:func:`read` from the file's content."""
    if facts["schema"] != SCHEMA:
        raise TableError(f"its schema is {facts['schema']!r}, this version reads {SCHEMA}")
    if tuple(facts["capability"]) != gpu.capability or (origin == "user" and facts["gpu"] != gpu.name):
        architecture = "sm_{}{}".format(*facts["capability"])
        raise TableError(f"it is for {facts['gpu']} ({architecture}), not for {gpu.name}")
    if facts["kernel_sources"] != kernel_sources():
        raise TableError("its tiles were timed with other kernels than these")
    entries = tuple(_entry(item, gpu.capability) for item in facts["entries"])
    if facts["triton"] != triton_version():
        entries = tuple(entry for entry in entries if entry.tile.num_warps <= CHECKED_WARPS)
    return Table(origin, path, str(facts["gpu"]), facts["commit"], facts["triton"], str(facts["date"]), entries)


def _entry(item: Mapping[str, Any], capability: tuple[int, int]) -> Entry:
    runner_up = item["runner_up"]
    entry = Entry(
        kernel=item["kernel"],
        dtype=item["dtype"],
        gemm_m=item["gemm_m"],
        gemm_n=item["gemm_n"],
        gemm_k=item["gemm_k"],
        tile=Tile(**item["tile"]),
        us=float(item["us"]),
        rule_us=None if item["rule_us"] is None else float(item["rule_us"]),
        runner_up=None if runner_up is None else (Tile(**runner_up["tile"]), float(runner_up["us"])),
        spread=float(item["spread"]),
        parity=float(item["parity"]),
        taps=item["taps"],
    )
    fault = illegal(entry, SHARED_BYTES.get(capability, 99) << 10)
    if fault is not None:
        raise TableError(
            f"entry {entry.kernel} {entry.dtype} {dims(entry.gemm_m, entry.gemm_n, entry.gemm_k)}: {fault}"
        )
    return entry


def illegal(entry: Entry, shared_bytes: int) -> str | None:
    """Why an entry's tile must not be launched; None where nothing speaks against it."""
    if entry.kernel not in RULES or entry.dtype not in DTYPES:
        return f"kernel {entry.kernel!r} in {entry.dtype!r} is none of this version's"
    sizes = (entry.gemm_m, entry.gemm_n, entry.gemm_k, entry.taps)
    if not all(type(n) is int and n > 0 for n in (*sizes, *entry.tile)):
        return f"sizes {sizes} and tile {tuple(entry.tile)} have to be positive integers"
    tile, dtype = entry.tile, DTYPES[entry.dtype]
    rule = RULES[entry.kernel].choose(dtype, entry.gemm_m, entry.gemm_n, unit=16 // dtype.itemsize)
    if tile.BLOCK_K != rule.tile(dtype).BLOCK_K:
        return (
            f"BLOCK_K is {tile.BLOCK_K}, the rule's {rule.tile(dtype).BLOCK_K}; sums keep one order whatever the batch"
        )
    return illegal_tile(tile, dtype, shared_bytes)


def illegal_tile(tile: Tile, dtype: torch.dtype, shared_bytes: int) -> str | None:
    """Why a tile can be launched for no problem; None where nothing speaks against it.

    A dot takes powers of two from 16 on; mask bits are written by the byte, which 16 columns are whole ones of.
    """
    for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"):
        block = getattr(tile, name)
        if not 16 <= block <= MAX_BLOCK or block & (block - 1):
            return f"{name} is {block}, wants a power of two from 16 to {MAX_BLOCK}"
    if tile.num_warps not in (4, 8):
        return f"num_warps is {tile.num_warps}, wants 4 or 8"
    if tile.num_stages > 8 or tile.GROUP_M > 64:
        return f"num_stages is {tile.num_stages} (at most 8), GROUP_M {tile.GROUP_M} (at most 64)"
    if MAX_ACCUMULATORS * 32 * tile.num_warps < tile.BLOCK_M * tile.BLOCK_N:
        return f"{tile.BLOCK_M}x{tile.BLOCK_N} are more than {MAX_ACCUMULATORS} accumulators a thread"
    used = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * dtype.itemsize * tile.num_stages
    if used > shared_bytes:
        return f"its stages take {used} bytes of shared memory, of {shared_bytes}"
    return None


def pixels_of(kernel: str, gemm_m: int, gemm_k: int) -> int:
    """N*H*W of a problem: GEMM_K of wgrad, GEMM_M of all others."""
    return gemm_k if kernel in WGRAD_RULES else gemm_m


def key_of(
    kernel: str, dtype: torch.dtype, gemm_m: int, gemm_n: int, gemm_k: int, taps: int
) -> tuple[tuple[Any, ...], int]:
    """(what must match exactly, pixels) of a problem."""
    other = gemm_m if kernel in WGRAD_RULES else gemm_k
    return (kernel, dtype, gemm_n, other, taps), pixels_of(kernel, gemm_m, gemm_k)


def dims(*sizes: int) -> str:
    """GEMM_M, GEMM_N and GEMM_K in words."""
    return " x ".join(map(str, sizes))


def to_json(entry: Entry) -> dict[str, Any]:
    """An entry as a table holds it."""
    facts = entry._asdict() | {"tile": entry.tile._asdict()}
    if entry.runner_up is not None:
        facts["runner_up"] = {"tile": entry.runner_up[0]._asdict(), "us": entry.runner_up[1]}
    return facts


def write(path: Path, facts: Mapping[str, Any]) -> None:
    """Replaces a file of JSON at once, as :func:`files.write`."""
    files.write(path, (json.dumps(facts, indent=1) + "\n").encode())


def triton_version() -> str | None:
    try:
        from triton import __version__
    except ImportError:
        return None
    return __version__
