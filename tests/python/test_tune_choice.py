"""The tuner's candidates, and the choice of few tiles for many problems."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from pathlib import Path

from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.googlenet_blocks import block_shape, spatial_size
from inception_fused.block.views import Tile
from inception_fused.plan import choice, tile_table
from marks import full
from tuner import run as tune_run
from tuner.candidates import candidates
from tuner.choice import Unit, choose, units
from tuner.operands import problems_of
from tuner.run import KERNELS, make_groups

SHARED = 227 << 10
A, B, C = (Tile(m, 64, 64) for m in (32, 64, 128))


def all_problems():
    for (name, config), batch, dtype in itertools.product(GOOGLENET_BLOCKS.items(), (1, 128), tile_table.DTYPES):
        shape = block_shape(config, batch, spatial_size(name), tile_table.DTYPES[dtype])
        for problem in problems_of(shape, tile_table.DTYPES[dtype]):
            yield name, dtype, problem


def test_candidates_are_legal_begin_with_the_rule_and_are_many():
    for _, dtype, problem in all_problems():
        found = candidates(problem, SHARED, (4, 8))
        assert found[0] == choice.tile_of(problem)
        assert len(found) == len(set(found)) >= 4
        for tile in found:
            sizes = problem.gemm.m, problem.gemm.n, problem.gemm.k
            entry = tile_table.Entry(problem.rules, dtype, *sizes, tile, 1.0, None, None, 0.0, 0.0)
            assert tile_table.illegal(entry, SHARED) is None
        assert all(tile.num_warps == 4 for tile in candidates(problem, SHARED)[1:])


def test_candidates_fit_a_smaller_gpu_and_compute_the_pool_once():
    for _, _, problem in all_problems():
        for tile in candidates(problem, 99 << 10)[1:]:
            operands = (tile.BLOCK_M + tile.BLOCK_N) * tile.BLOCK_K * problem.dtype.itemsize
            assert operands * tile.num_stages <= 99 << 10
            if problem.rules == "K2":
                assert problem.gemm.n <= tile.BLOCK_N
            if problem.rules == "B4 pool":
                assert problem.gemm.m <= tile.BLOCK_M


def test_the_choice_is_the_cheapest_set():
    costs = {"p": {A: 1.0, B: 2.0, C: 9.0}, "q": {A: 9.0, B: 2.0, C: 1.0}, "r": {A: 9.0, B: 8.0, C: 1.0}}
    assert choose(units(costs, {}), 1) == {"p": C, "q": C, "r": C}
    assert choose(units(costs, {}), 2) == {"p": A, "q": C, "r": C}
    assert choose(units(costs, {}), 3) == {"p": A, "q": C, "r": C}
    assert choose(units({"p": {A: 1.0, B: 3.0}, "q": {B: 3.0, C: 1.0}}, {}), 1) == {"p": B, "q": B}


def test_as_many_tiles_as_it_takes_to_serve_every_problem():
    assert choose(units({"p": {A: 1.0}, "q": {B: 1.0}, "r": {}}, {}), 1) == {"p": A, "q": B}
    assert choose([], 2) == {}


def test_bonded_problems_have_one_height():
    wide = A._replace(BLOCK_N=128)
    costs = {"p": {A: 1.0, B: 2.0}, "q": {wide: 9.0, B: 3.0, A: 10.0}}
    assert choose(units(costs, {}), 3) == {"p": A, "q": B}
    assert choose(units(costs, {"p": 7, "q": 7}), 3) == {"p": B, "q": B}
    costs["q"][wide] = 1.0
    assert choose(units(costs, {"p": 7, "q": 7}), 3) == {"p": A, "q": wide}


def test_too_many_sets_to_try_are_built_tile_by_tile(monkeypatch):
    costs = {i: {Tile(2**k, 16, 16): 1.0 + abs(i - k) for k in range(4, 9)} for i in range(4, 9)}
    best = sum(costs[i][t] for i, t in choose(units(costs, {}), 3).items())
    monkeypatch.setattr("tuner.choice.EXHAUSTIVE", 1)
    found = choose(units(costs, {}), 3)
    assert len(set(found.values())) <= 3
    assert best <= sum(costs[i][t] for i, t in found.items()) <= 1.3 * best
    assert Unit(["p"], [{A: 1.0}]).best([B]) == (float("inf"), {})


def test_groups_keep_one_of_equal_problems_and_leave_the_unaligned_out():
    groups = {str(group): group for group in make_groups(GOOGLENET_BLOCKS, [32], ["bf16"], KERNELS, 224)}
    assert list(groups) == [f"{kernel} bf16" for kernel in KERNELS]
    assert len(groups["K1 bf16"].cases) == 9
    assert len({case.key for case in groups["B4 bf16"].cases}) == len(groups["B4 bf16"].cases) < 27
    odd = {"3a": GOOGLENET_BLOCKS["3a"]._replace(in_channels=193)}
    aligned = {str(group) for group in make_groups(odd, [32], ["bf16"], KERNELS, 224)}
    assert aligned == {"K3 bf16", "K4 bf16", "N1 bf16", "N3 bf16"}
    tuned = [kernel for kernel in choice.RULES if not kernel.endswith("strided") and kernel not in choice.POOLS]
    assert sorted(tuned, key=lambda kernel: kernel.startswith("N")) == list(tune_run.KERNELS)


@full
def test_the_largest_candidates_compile_without_spills(tmp_path):
    """For sm_90, in a process that compiles; all of them: python tests/aot/tune_gate.py --all."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(Path(__file__).parents[1] / "aot" / "tune_gate.py"), "--dtypes", "bf16"]
    command += ["--kernels", "K2,B3,B4,B4 pool"]  # those of which other candidates were left out
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "5 binaries, 0 refused"
