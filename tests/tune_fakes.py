"""A bench of the tuner without a device, and tables of tiles, for the tests."""

from __future__ import annotations

from collections.abc import Callable

from checks.device import DeviceLostError
from inception_fused import InceptionConfig
from inception_fused.block.views import Tile
from inception_fused.plan import tile_table, tuned
from tuner import session
from tuner.operands import Case

GPU = tuned.Gpu("Test GPU 90", (9, 0))
TINY = {"5a": InceptionConfig(16, 8, (8, 16), (8, 16), 8)}


class FakeBench:
    """Times by a formula. What it is told goes wrong: spills, raises, wrong, lost (tiles, or predicates of a case and
    a tile)."""

    gpu, shared_bytes, kernels = GPU, 227 << 10, ("K1", "B3")

    def __init__(self, us: Callable[[Case, Tile], float] | None = None) -> None:
        self.us = us or (lambda case, tile: 10 + abs(tile.BLOCK_M - 32) / 8 + abs(tile.BLOCK_N - 64) / 16)
        self.compiled: list[Tile] = []
        self.timed: list[tuple[str, Tile]] = []
        self.checked: list[tuple[str, Tile]] = []
        self.spills = self.raises = self.wrong = self.lost = lambda case, tile: False
        self.before_time: Callable[[], None] = lambda: None
        self.dead = False

    def compile(self, jobs, deadline):
        for case, tile in jobs:
            self.compiled.append(tile)
            yield tile, "spills 64 bytes" if self.spills(case, tile) else None

    def time(self, case, tile):
        self.before_time()
        if self.lost(case, tile):
            self.dead = True
        if self.raises(case, tile) or self.dead:
            raise RuntimeError("no such tile")
        self.timed.append((case.key, tile))
        return self.us(case, tile), 0.004

    def check(self, case, tile):
        self.checked.append((case.key, tile))
        assert not self.wrong(case, tile), "y is wrong"
        return 0.25

    def alive(self):
        if self.dead:
            raise DeviceLostError("the device reports: gone")


def entry(kernel: str, dtype: str, gemm_m: int, gemm_n: int, gemm_k: int, tile: Tile, **others) -> tile_table.Entry:
    figures = {
        "us": 17.2,
        "rule_us": 18.9,
        "runner_up": (tile._replace(num_stages=2), 17.9),
        "spread": 0.004,
        "parity": 0.3,
    }
    return tile_table.Entry(kernel, dtype, gemm_m, gemm_n, gemm_k, tile, **(figures | others))


def table(*entries: tile_table.Entry, **others) -> dict:
    """A file's content that can be used."""
    facts = {
        "schema": tile_table.SCHEMA,
        "gpu": GPU.name,
        "capability": list(GPU.capability),
        "commit": "1a2b3c4d5e6f",
        "kernel_sources": tile_table.kernel_sources(),
        "torch": "2.11",
        "triton": tile_table.triton_version(),
        "date": "2026-01-01T00:00:00Z",
        "entries": [tile_table.to_json(item) for item in entries],
    }
    return facts | others


def put(*entries: tile_table.Entry, **others) -> None:
    """The user's table, in force from now on."""
    tile_table.write(tuned.user_path(GPU.name), table(*entries, **others))
    tuned.forget()


def run(bench, out, budget=1000.0, **options) -> dict:
    """The tuner on one small block; out: the table's file, None for the user's."""
    options = {"blocks": TINY, "dtypes": ("bf16",), "batches": (1, 32), "kernels": ("K1", "B2")} | options
    return session.tune(budget, bench=bench, out=out, **options)
