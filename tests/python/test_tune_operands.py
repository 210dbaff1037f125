"""The tuner's operands and checks: interpreted, and with results spoilt on purpose."""

from __future__ import annotations

import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from gpu_fakes import Fixed
from inception_fused.block.googlenet_blocks import block_shape
from inception_fused.block.views import Tile
from inception_fused.op.launcher import Call
from inception_fused.plan import choice
from tune_fakes import TINY, run
from tune_workloads import Few, assert_sees
from tuner.bench import DeviceBench
from tuner.operands import Case, Workload, problems_of
from tuner.run import KERNELS, make_groups


@pytest.mark.parametrize(
    ("dtype", "kernels", "branch3"),
    [
        ("bf16", KERNELS, (5,)),
        ("tf32", ("K1", "B4 pool", "N1", "N4", "N6"), (5,)),
        ("bf16", ("K4", "B2", "B4", "N1", "N3", "N6"), (3, 3)),
    ],
)
def test_the_bench_checks_what_the_kernels_compute(dtype, kernels, branch3, tmp_path):
    """Interpreted, on the real launchers and twins."""
    options = {"kernels": kernels, "dtypes": (dtype,), "batches": (2,), "image_size": 64, "branch3": branch3}
    result = run(Few(), tmp_path / "t.json", **options)
    assert (result["failed"], result["refused"]) == ([], [])
    assert {entry["kernel"] for entry in result["winners"]} == set(kernels)
    assert all(0 <= entry["parity"] <= 1 for entry in result["winners"])
    assert all((entry["parity"] > 0) == (entry["kernel"] != "B1" or dtype == "tf32") for entry in result["winners"])


SPOILT = ["y", "bits", "taps", "g2", "sums", "dr", "dx", "part", "moments", "g0", "borders"]


FORMS = [((5,), spoilt) for spoilt in SPOILT]
FORMS += [((3, 3), spoilt) for spoilt in ("y", "bits", "sums", "dr", "part", "moments", "g0")]


@pytest.mark.parametrize(("branch3", "spoilt"), FORMS, ids=str)
def test_a_check_sees_one_wrong_element(branch3, spoilt, monkeypatch):
    """Of every result of every kernel that has it; of two windows, of those launches that one has not."""
    problems = problems_of(block_shape(TINY["5a"], 2, 3, torch.bfloat16, branch3=branch3), torch.bfloat16)
    if len(branch3) > 1:
        problems = [problem for problem in problems if problem.name.endswith((" first", " second", " t"))]
    cases = [Case("5a", TINY["5a"], 2, 3, "bf16", p) for p in problems if spoilt in _result_names(p)]
    assert cases
    for case in cases:
        assert_sees(case, spoilt, monkeypatch)


def _result_names(problem):
    work = Workload(Case("5a", TINY["5a"], 2, 3, "bf16", problem), "meta")
    return work.results(work.call(choice.tile_of(problem), True))


def test_what_a_launch_leaves_unwritten_is_seen(monkeypatch):
    case = next(iter(make_groups(TINY, [1], ["bf16"], ["K3"], 96)[0].cases))
    work = Workload(case, "cpu")
    run = Call.run
    # The truth is still the twin's.
    monkeypatch.setattr(Call, "run", lambda call, form, tile: run(call, form, tile) if form == "eager" else None)
    with pytest.raises(AssertionError, match="y is wrong"):
        work.check(choice.tile_of(case.problem))


class Binary:
    """What compile() gives: loading it raises, or shows how much it spilled (in words, as Triton has it)."""

    def __init__(self, words: int = 0, error: Exception | None = None) -> None:
        self.n_spills, self.error = words, error

    @property
    def run(self):
        if self.error is not None:
            raise self.error


class CompiledBench(DeviceBench):
    """A bench whose tiles compile to what ``binaries`` says, in threads as on a GPU."""

    def __init__(self, binaries: dict) -> None:
        super().__init__("cpu", Fixed())
        self.device, self.binaries = torch.device("cuda", 0), binaries

    def _current(self):
        return nullcontext()

    def _workload(self, case):
        bench = self

        class Loaded:
            def launches(self, tile):
                return [SimpleNamespace(compile=lambda: bench.binaries[tile.BLOCK_M]())] * 2

        return Loaded()


def test_tiles_are_compiled_in_threads_and_judged():
    def fails():
        raise RuntimeError("PassManager::run failed")

    bench = CompiledBench(
        {
            16: Binary,
            32: lambda: Binary(words=4),
            64: lambda: Binary(words=5),
            128: lambda: Binary(error=MemoryError("out of resource: shared memory, Required: 300000")),
            256: fails,
        }
    )
    tiles = [Tile(block, 64, 64) for block in bench.binaries]
    found = {tile.BLOCK_M: reason for tile, reason in bench.compile([(None, tile) for tile in tiles], time.time() + 60)}
    assert found == {
        16: None,
        32: None,
        64: "spills 20 bytes",
        128: "MemoryError: out of resource: shared memory, Required: 300000",
        256: "RuntimeError: PassManager::run failed",
    }


def test_what_is_not_compiled_in_time_is_left_out():
    release = threading.Event()
    bench = CompiledBench({16: Binary, 32: lambda: release.wait(20) and Binary()})
    jobs = [(None, Tile(16, 64, 64)), (None, Tile(32, 64, 64))]
    try:
        assert [tile.BLOCK_M for tile, _ in bench.compile(jobs, time.time() + 0.5)] == [16]
    finally:
        release.set()
