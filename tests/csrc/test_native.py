"""The compiled kernels on simulated hardware: every result against float64, every seeded bug, every refusal."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import native_mutants
from marks import each_once, full, quick
from native_problems import Case, Problem
from native_suite import attempt, wanted_problems
from simulator import CSRC, ELEMENTS, SANITIZE, SIM, TIMINGS, WARNINGS, build, compiler

SUITE = Path(__file__).with_name("native_suite.py")


@each_once
@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("problem", quick(wanted_problems(large=True), *wanted_problems(large=False)), ids=str)
def test_against_float64(simulator, problem, timing):
    for seed in range(3 if timing == "random" else 1):
        wrong = attempt(simulator, problem, timing, seed)
        assert wrong is None, wrong


@full
def test_under_sanitizers(tmp_path):
    """Every problem once more with AddressSanitizer and UndefinedBehaviorSanitizer, in a process of its own."""
    module = build(tmp_path, ("-O1", "-g1", *SANITIZE))
    libraries = [
        subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libubsan.so")
    ]
    environment = os.environ | {"LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, SUITE, module, "--timings", "lazy,random", "--seeds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]


@full
def test_every_mutant_is_caught(simulator, tmp_path, capsys):
    for mutant in native_mutants.CONTROLS:
        control = native_mutants.judge(mutant, simulator.folder, tmp_path / mutant.kernel)
        assert not control.caught, control
    verdicts = list(native_mutants.judge_all(simulator.folder, tmp_path))
    with capsys.disabled():
        print("\n" + native_mutants.table(verdicts))
    assert [v.mutant.name for v in verdicts if not v.caught] == []
    readme = (SIM / "README.md").read_text()
    assert [v.mutant.name for v in verdicts if f"| {v.mutant.name} |" not in readme] == [], "the table is out of date"


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_row_does_not_depend_on_batch_or_tile(simulator, element):
    """Bit for bit: the order of a sum is that of the channels, whatever the tile."""
    seen = []
    for m, tile in ((3, (64, 64)), (70, (64, 64)), (130, (128, 96)), (300, (128, 128))):
        case = Case(Problem(m, 72, (40, 16, 8), element, tile))
        case.run(simulator.module)
        seen.append([out[:3].copy() for out in case.outputs()])
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert np.array_equal(a, b)


def test_tf32_neither_shrinks_nor_changes_what_needs_no_rounding(simulator):
    """Sums of positive products: cut operands would lose 7e-4 of each, 40 times the bound here."""
    case = Case(Problem(64, 256, (64, 64, 64), "tf32", shift=None))
    for buffer in (case.x, *case.w):
        buffer.matrix[:] = np.abs(buffer.matrix)
    case.run(simulator.module)
    ratios = [out / (case.x.matrix.astype(float) @ w.matrix.T) for out, w in zip(case.outputs(), case.w, strict=True)]
    assert abs(np.mean(ratios) - 1) < 2e-5
    for buffer in (case.x, *case.w):
        buffer.matrix[:] = np.round(buffer.matrix * 64) / 64  # at most 9 bits
    case.run(simulator.module)
    for out, w in zip(case.outputs(), case.w, strict=True):
        assert np.array_equal(out, case.x.matrix @ w.matrix.T)


def test_rows_beyond_32_bit_offsets(simulator):
    """Three rows of x, y, r and bits, each 2**30 elements after the one before: the third begins at element 2**31."""
    case, stride = Case(Problem(3, 40, (16, 8, 8))), 2**30
    expected = Case(case.problem)
    expected.run(simulator.module)
    buffers = {name: getattr(expected, name) for name in ("x", "y", "r", "bits")}
    wide = {
        name: np.memmap("/dev/zero", dtype=b.all.dtype, mode="c", shape=2 * stride + 64) for name, b in buffers.items()
    }
    for row in range(3):
        wide["x"][row * stride :][:40] = case.x.matrix[row]
    places = {name: (memory.ctypes.data, stride) for name, memory in wide.items()}
    places["r"] = (*places["r"], case.r5)
    simulator.module.grouped_gemm(**case.arguments() | places)
    for name, columns in (("y", slice(0, 16)), ("r", slice(0, 16)), ("bits", slice(0, 2))):
        for row in range(3):
            assert np.array_equal(wide[name][row * stride :][columns], buffers[name].matrix[row, columns]), (name, row)


LIMIT = 2**31 - 1024


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ('element: got "int8"', {"element": "int8"}),
        ("tile: got 96x96", {"tile": (96, 96)}),
        ("tile: got 128x128 unaligned", {"tile": (128, 128), "aligned": False}),
        ("sizes", {"m": -1}),
        ("sizes", {"c": 0}),
        ("sizes", {"k": (0, 0, 0)}),
        ("sizes", {"k": (8, -8, 16)}),
        ("under 2", {"m": LIMIT + 1}),
        ("under 2", {"c": LIMIT + 8, "x": (0, 2**31)}),
        ("under 2", {"k": (LIMIT // 2, LIMIT // 2, 16), "y": (0, 2**31), "r": (0, 2**32, LIMIT), "bits": (0, 0)}),
        ("x_stride: got 8, wants at least c = 16", {"x": (0, 8)}),
        ("y_stride: got 7, wants at least k", {"y": (0, 7)}),
        ("r5: got 0, wants at least k", {"r": (0, 16, 0)}),
        ("r5: got 4294967304", {"r": (0, 16, 2**32 + 8)}),
        ("r_stride: got 8, wants at least r5", {"r": (0, 8, 8)}),
        ("bits_stride 0", {"bits": (1, 0)}),
        ("bits_stride 1, wants ReLU and at least 2 bytes", {"k": (16, 8, 8), "bits": (1, 1)}),
        ("relu 0", {"relu": False}),
        ("shift_type: got 9", {"shift_type": 9}),
        ("scale_type: got -1", {"scale_type": -1}),
        *(("multiples of 8", change) for change in (
            {"x": (0, 17)}, {"y": (0, 36)}, {"r": (0, 20, 8)}, {"r": (0, 24, 12)}, {"k": (4, 8, 8)}, {"k": (8, 4, 8)},
            {"k": (8, 8, 4)}, {"c": 12},
        )),
        *(("no multiple of 16", {"w": address}) for address in ((2, 0, 0), (0, 2, 0), (0, 0, 2))),
        *(("no multiple of 16", change) for change in ({"x": (2, 16)}, {"y": (2, 32)}, {"r": (2, 16, 8)})),
    ],
)  # fmt: skip
def test_a_problem_that_contradicts_itself_is_refused(simulator, words, change):
    """Each of these would read or write outside a tensor, or off a boundary."""
    with pytest.raises(ValueError, match="grouped_gemm: ") as raised:
        simulator.module.grouped_gemm(**Case(Problem(10, 16, (8, 8, 8))).arguments() | change)
    assert words in str(raised.value)
    assert simulator.calls() == []


def test_no_rows_is_no_launch(simulator):
    case = Case(Problem(1, 16, (8, 8, 8)))
    simulator.module.grouped_gemm(**case.arguments() | {"m": 0})
    assert simulator.calls() == []


def test_no_access_of_shared_memory_waits_for_another(tmp_path):
    """Bank conflicts show in no result; every tile's copies, loads, stores and reads take one turn each."""
    try:
        found = compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    program = tmp_path / "banks"
    flags = ["-std=c++20", *WARNINGS, f"-I{SIM}", f"-I{CSRC}", "-include", "machine.h", "-x", "c++"]
    subprocess.run([found, *flags, SIM / "banks.cpp", "-o", program], check=True, timeout=120)
    lines = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout.splitlines()
    tiles = [" ".join(line.split()[:3]) for line in lines]
    assert tiles == [
        *(f"K1 {element} {tile}" for element in ("bf16", "tf32") for tile in ("128x128", "128x96", "64x64")),
        *(f"B3 {element} {tile}" for element in ("bf16", "tf32") for tile in ("128x128", "64x64")),
    ]
    assert {tile: line.split()[3:] for tile, line in zip(tiles, lines, strict=True)} == {
        tile: ["1.000"] * 4 for tile in tiles
    }
