"""Tiles that were timed on a GPU: tables that ``python python/tune.py`` writes, and their lookup.

For a problem the first of these that knows it gives the tile:

    1. the user's table for exactly this GPU's name     $INCEPTION_FUSED_CACHE, or $XDG_CACHE_HOME/inception_fused,
                                                        or ~/.cache/inception_fused; NVIDIA_H200.json. None of it
                                                        where there is no home folder
    2. the package's table for the architecture         inception_fused/tiles/sm_90.json, where there is one
    3. kernel_table.RULES

INCEPTION_FUSED_TUNED=0 leaves only the rules. A table is read once per process. One that cannot be trusted (unreadable,
another schema, an illegal tile, timed with other kernels) is ignored as a whole; :func:`describe` says why.

A tile serves a problem with the same kernel, dtype, channels and window whose number of pixels is at most a factor
of two away. BLOCK_K is the rules' for every entry, so that the order of a sum over channels does not depend on the
batch.
Sums over pixels (of weights' and biases' gradients) follow from the tile, so their order depends on the table.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable
from functools import cache, lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from inception_fused.block.views import Tile
from inception_fused.plan import tile_table
from inception_fused.plan.tile_table import Entry, Gpu, Table, TableError, key_of
from inception_fused.runtime import caches

CLASS = 2.0
"""Largest ratio of a problem's pixels to those of the entry that serves it."""

REMEDY = "python python/tune.py again, or delete the file"
"""What to do about a user's table that is ignored."""

PACKAGE_TABLES = Path(__file__).parents[1] / "tiles"


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
    return _key(device.index) if device.type == "cuda" else None


def lookup(
    gpu: Gpu, kernel: str, dtype: torch.dtype, gemm_m: int, gemm_n: int, gemm_k: int, taps: int = 1
) -> Found | None:
    """The tuned tile of a problem whose channels, offsets and strides are multiples of 16 bytes; None for the rule's.

    Arguments as for choice.choose_tile. Cached.
    """
    return _lookup(gpu, kernel, dtype, gemm_m, gemm_n, gemm_k, taps)


@lru_cache(maxsize=4096)
def _lookup(
    gpu: Gpu, kernel: str, dtype: torch.dtype, gemm_m: int, gemm_n: int, gemm_k: int, taps: int
) -> Found | None:
    wanted, pixels = key_of(kernel, dtype, gemm_m, gemm_n, gemm_k, taps)
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


@cache
def _key(index: int | None) -> Gpu | None:
    """By index: hashing a torch.device takes twice as long as all the rest."""
    properties = torch.cuda.get_device_properties(index if index is not None else torch.cuda.current_device())
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
            warning = f"tuned tiles in {path} are ignored: {reason}; {REMEDY}"
    if warning is not None:
        caches.warn_once(warning)
    return found


def _read_all(gpu: Gpu) -> State:
    tables, ignored = [], []
    if enabled():
        for origin, path in (("user", user_path(gpu.name)), ("package", package_path(gpu.capability))):
            if path is None or _is_closed(path.parent):
                continue
            try:
                tables.append(tile_table.read(path, gpu, origin))
            except FileNotFoundError:
                continue
            except TableError as error:
                ignored.append((path, str(error)))
    return State(tuple(tables), tuple(ignored))


def _is_closed(folder: Path) -> bool:
    """Whether nobody can have meant a folder: another user's home, say, under which this process was started."""
    return not os.environ.get("INCEPTION_FUSED_CACHE") and not os.access(folder, os.X_OK)


def forget() -> None:
    """Reads the tables again at the next lookup, as after tuning."""
    for cached in (_lookup, _key, state, caches.warn_once):
        cached.cache_clear()


def describe(gpu: Gpu) -> str:
    """What is in force for a GPU, in one line."""
    if not enabled():
        return "rules (INCEPTION_FUSED_TUNED=0)"
    found = state(gpu)
    parts = [f"{table.source} ({table.origin}), {_entries(len(table.entries))}" for table in found.tables]
    never = "never tuned" if cache_folder() is not None else f"no user's table: {no_folder()}"
    parts = parts or ["rules" if found.ignored else f"rules ({never})"]
    return "; ".join([*parts, *(f"ignored {path}: {reason}; {REMEDY}" for path, reason in found.ignored)])


def _entries(count: int) -> str:
    return "1 entry" if count == 1 else f"{count} entries"


def cache_folder() -> Path | None:
    """Where the user's tables are; None where no variable says it and there is no home folder."""
    own = os.environ.get("INCEPTION_FUSED_CACHE")
    if own:
        return Path(own)
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "inception_fused"
    home = caches.home()
    return None if home is None else home / ".cache" / "inception_fused"


def no_folder() -> str:
    """Why there is no folder for the user's tables, with the remedy."""
    return f"{caches.no_home()}; INCEPTION_FUSED_CACHE=FOLDER names one for tuned tiles"


def user_path(name: str) -> Path | None:
    """The user's table of a GPU: its name with everything but letters and digits as "_". None without a folder."""
    folder = cache_folder()
    return None if folder is None else folder / (re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_") + ".json")


def package_path(capability: tuple[int, int]) -> Path:
    return PACKAGE_TABLES / f"sm_{capability[0]}{capability[1]}.json"
