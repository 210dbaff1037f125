"""Tiles that were timed on a GPU: tables that ``python python/tune.py`` writes, and their lookup.

For a problem the first of these that knows it gives the tile:

    1. the user's table for exactly this GPU's name     $INCEPTION_FUSED_CACHE, or $XDG_CACHE_HOME/inception_fused,
                                                        or ~/.cache/inception_fused; NVIDIA_H200.json
    2. the package's table for the architecture         inception_fused/tiles/sm_90.json, where there is one
    3. plan.RULES

INCEPTION_FUSED_TUNED=0 leaves only the rules. A table is read once per process. One that cannot be trusted (unreadable,
another schema, an illegal tile, timed with other kernels) is ignored as a whole; :func:`describe` says why.

A tile serves a problem with the same kernel, dtype and channels whose number of pixels is at most a factor of
two away. BLOCK_K is the rules' for every entry, so that the order of a sum over channels does not depend on the batch.
Sums over pixels (the ranges of B1 and B4, the rows of B2's sums) follow from the tile: their order depends on the table.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from inception_fused.kernels.views import Tile

SCHEMA = 1

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32}
"""A table's names; fp32 is computed as TF32."""

MAX_BLOCK = 256
"""Largest BLOCK_M and BLOCK_N of any tile; plan.exceeds_int32 leaves this much room."""

MAX_ACCUMULATORS = 128
"""Elements of BLOCK_M x BLOCK_N a thread: half of its 255 registers, the other half is for operands and addresses."""

SHARED_BYTES = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227, (11, 0): 227}
"""KiB that one thread block may use, 99 elsewhere (CUDA C++ Programming Guide, "Technical Specifications per Compute
Capability"; torch.cuda.get_device_properties says the same of a GPU that is there)."""

CLASS = 2.0
"""Largest ratio of a problem's pixels to those of the entry that serves it."""

CHECKED_WARPS = 4
"""More warps than these have miscompiled before (pytorch#173068), so that such a tile is taken only under the version
of Triton with which its result was checked."""

PACKAGE_TABLES = Path(__file__).with_name("tiles")


class TableError(ValueError):
    """A table cannot be used; the message says why."""


class Gpu(NamedTuple):
    """Whose tables to read. name: as PyTorch gives it; capability: (9, 0) for sm_90."""

    name: str
    capability: tuple[int, int]


class Entry(NamedTuple):
    """One tuned problem.

    kernel: a key of plan.RULES; dtype: a key of DTYPES; gemm_m, gemm_n, gemm_k: as for plan.choose_tile.
    us, rule_us: microseconds of the tile and of the rule's, for K1 to K4 the mean of their forms for inference and for
    training. runner_up: the best tile of another and its microseconds, None where no other ran. spread: as
    benchmarks/timing.py gives it. parity: largest error against float64 over its bound.
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

    @property
    def key(self) -> tuple[Any, ...]:
        """What has to be equal for the tile to serve a problem."""
        return key_of(self.kernel, DTYPES[self.dtype], self.gemm_m, self.gemm_n, self.gemm_k)[0]

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


class State(NamedTuple):
    """The tables in force for a GPU, first choice first, and why others are not: (path, reason)."""

    tables: tuple[Table, ...]
    ignored: tuple[tuple[Path, str], ...]


class Found(NamedTuple):
    """A lookup's answer: the tile, its entry and the table that it is from."""

    tile: Tile
    entry: Entry
    table: Table


def key(device: torch.device) -> Gpu | None:
    """The GPU whose tables hold for a device; None where none is in force (the CPU, no table, INCEPTION_FUSED_TUNED=0).

    A launch asks for it: after the first time it costs a dictionary's lookup.
    """
    return _key(device) if device.type == "cuda" else None


def lookup(gpu: Gpu, kernel: str, dtype: torch.dtype, gemm_m: int, gemm_n: int, gemm_k: int) -> Found | None:
    """The tuned tile of a problem whose channels, offsets and strides are multiples of 16 bytes; None for the rule's.

    Arguments as for plan.choose_tile. Cached.
    """
    return _lookup(gpu, kernel, dtype, gemm_m, gemm_n, gemm_k)


@lru_cache(maxsize=4096)
def _lookup(gpu: Gpu, kernel: str, dtype: torch.dtype, gemm_m: int, gemm_n: int, gemm_k: int) -> Found | None:
    wanted, pixels = key_of(kernel, dtype, gemm_m, gemm_n, gemm_k)
    for table in state(gpu).tables:
        entry = nearest([entry for entry in table.entries if entry.key == wanted], pixels)
        if entry is not None:
            return Found(entry.tile, entry, table)
    return None


def nearest(entries: Iterable[Entry], pixels: int) -> Entry | None:
    """The entry whose pixels are nearest by ratio, the smaller of two; None where none is within CLASS."""
    near = [(abs(math.log2(entry.pixels / pixels)), entry.pixels, entry) for entry in entries if pixels > 0]
    near = [item for item in near if item[0] <= math.log2(CLASS)]
    return min(near, key=lambda item: item[:2])[2] if near else None


def pixels_of(kernel: str, gemm_m: int, gemm_k: int) -> int:
    """N*H*W of a problem: GEMM_K of wgrad, GEMM_M of all others."""
    return gemm_k if kernel.startswith("B4") else gemm_m


def key_of(kernel: str, dtype: torch.dtype, gemm_m: int, gemm_n: int, gemm_k: int) -> tuple[tuple[Any, ...], int]:
    """(what must match exactly, pixels) of a problem."""
    other = gemm_m if kernel.startswith("B4") else gemm_k
    return (kernel, dtype, gemm_n, other), pixels_of(kernel, gemm_m, gemm_k)


@cache
def _key(device: torch.device) -> Gpu | None:
    properties = torch.cuda.get_device_properties(device)
    gpu = Gpu(properties.name, (properties.major, properties.minor))
    return gpu if state(gpu).tables else None


def enabled() -> bool:
    return os.environ.get("INCEPTION_FUSED_TUNED", "1") != "0"


@cache
def state(gpu: Gpu) -> State:
    """What is in force for a GPU. Reads the files; warns, once, where the user's own has to be ignored."""
    found, warning = _read_all(gpu), None
    for path, reason in found.ignored:
        if path == user_path(gpu.name):
            warning = f"tuned tiles in {path} are ignored: {reason}; python python/tune.py again, or delete the file"
    if warning is not None:
        _warn(warning)
    return found


@cache
def _warn(text: str) -> None:
    try:
        warnings.warn(text, stacklevel=2)
    except UserWarning:
        # Where warnings are errors a table may still not end a user's step; describe() goes on saying it.
        return


def _read_all(gpu: Gpu) -> State:
    tables, ignored = [], []
    if enabled():
        for origin, path in (("user", user_path(gpu.name)), ("package", package_path(gpu.capability))):
            try:
                tables.append(read(path, gpu, origin))
            except FileNotFoundError:
                continue
            except TableError as error:
                ignored.append((path, str(error)))
    return State(tuple(tables), tuple(ignored))


def forget() -> None:
    """Reads the tables again at the next lookup, as after tuning."""
    for cached in (_lookup, _key, state, _warn):
        cached.cache_clear()


def describe(gpu: Gpu) -> str:
    """What is in force for a GPU, in one line."""
    if not enabled():
        return "rules (INCEPTION_FUSED_TUNED=0)"
    found = state(gpu)
    parts = [f"{table.source} ({table.origin}), {len(table.entries)} entries" for table in found.tables]
    parts = parts or ["rules" if found.ignored else "rules (never tuned)"]
    return "; ".join([*parts, *(f"ignored {path}: {reason}" for path, reason in found.ignored)])


def cache_folder() -> Path:
    """Where the user's tables are."""
    own = os.environ.get("INCEPTION_FUSED_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "inception_fused"


def user_path(name: str) -> Path:
    """The user's table of a GPU: its name with everything but letters and digits as "_"."""
    return cache_folder() / (re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") + ".json")


def package_path(capability: tuple[int, int]) -> Path:
    return PACKAGE_TABLES / f"sm_{capability[0]}{capability[1]}.json"


@cache
def kernel_sources() -> str:
    """SHA-256 over the names and contents of inception_fused/kernels/*.py: tiles are timed for these kernels."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).with_name("kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def triton_version() -> str | None:
    try:
        from triton import __version__
    except ImportError:
        return None
    return __version__


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
    )
    fault = illegal(entry, SHARED_BYTES.get(capability, 99) << 10)
    if fault is not None:
        raise TableError(f"entry {entry.kernel} {entry.dtype} {dims(entry)}: {fault}")
    return entry


def illegal(entry: Entry, shared_bytes: int) -> str | None:
    """Why an entry's tile must not be launched; None where nothing speaks against it."""
    from inception_fused import plan  # which asks this module for tiles

    if entry.kernel not in plan.RULES or entry.dtype not in DTYPES:
        return f"kernel {entry.kernel!r} in {entry.dtype!r} is none of this version's"
    sizes = (entry.gemm_m, entry.gemm_n, entry.gemm_k)
    if not all(type(n) is int and n > 0 for n in (*sizes, *entry.tile)):
        return f"sizes {sizes} and tile {tuple(entry.tile)} have to be positive integers"
    tile, dtype = entry.tile, DTYPES[entry.dtype]
    rule = plan.choose_rule(entry.kernel, dtype, gemm_m=entry.gemm_m, gemm_n=entry.gemm_n, unit=16 // dtype.itemsize)
    if tile.BLOCK_K != rule.tile(dtype).BLOCK_K:
        return f"BLOCK_K is {tile.BLOCK_K}, the rule's {rule.tile(dtype).BLOCK_K}; sums keep one order whatever the batch"
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
    if tile.BLOCK_M * tile.BLOCK_N > MAX_ACCUMULATORS * 32 * tile.num_warps:
        return f"{tile.BLOCK_M}x{tile.BLOCK_N} are more than {MAX_ACCUMULATORS} accumulators a thread"
    used = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * dtype.itemsize * tile.num_stages
    if used > shared_bytes:
        return f"its stages take {used} bytes of shared memory, of {shared_bytes}"
    return None


def dims(entry: Any) -> str:
    """GEMM_M x N x K of an entry or problem."""
    return f"{entry.gemm_m} x {entry.gemm_n} x {entry.gemm_k}"


def to_json(entry: Entry) -> dict[str, Any]:
    """An entry as a table holds it."""
    facts = entry._asdict() | {"tile": entry.tile._asdict()}
    if entry.runner_up is not None:
        facts["runner_up"] = {"tile": entry.runner_up[0]._asdict(), "us": entry.runner_up[1]}
    return facts


def write(path: Path, facts: Mapping[str, Any]) -> None:
    """Replaces a file of JSON at once, so that a reader, a kill or a full disk never leaves half of it.

    Raises OSError, with the old file untouched.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        part.write_text(json.dumps(facts, indent=1) + "\n")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
