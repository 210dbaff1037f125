"""The gate over the compiled kernels' machine code: it passes what is shipped and refuses what is spoilt on purpose."""

import shutil
from pathlib import Path

import pytest

import native_gate
import toolchain
from marks import each_once, more, quick

TILE, GEMM, DGRAD = "gemm_tile.cuh", "grouped_gemm.cuh", "grouped_dgrad.cuh"
TILES = {"grouped_gemm": {"128x128", "128x96", "64x64", "64x64 unaligned"},
         "grouped_dgrad": {"128x128", "64x64", "64x64 unaligned"}}  # fmt: skip


@pytest.fixture(scope="module")
def tools():
    try:
        host = toolchain.find_host_compiler()
        return toolchain.find_nvcc(host), host
    except toolchain.CannotBuild as problem:
        pytest.skip(str(problem))


@each_once
@pytest.mark.parametrize("element", quick(native_gate.MATRIX, "bf16"))
@pytest.mark.parametrize("kernel", native_gate.KERNELS)
def test_what_is_shipped_passes(tools, kernel, element):
    kernels = native_gate.judge(*tools, kernel, element, "90")
    assert {k.tile for k in kernels} == TILES[kernel]
    assert [k.refusals() for k in kernels] == [[]] * len(kernels)


def spoilt(folder: Path, file: str, old: str, new: str) -> Path:
    """A copy of the sources in which ``old``, which must be there, is ``new``."""
    csrc = folder / "csrc"
    shutil.copytree(native_gate.CSRC, csrc)
    text = (csrc / file).read_text()
    assert old in text
    (csrc / file).write_text(text.replace(old, new))
    return csrc


@pytest.mark.parametrize(("kernel", "file"), [("grouped_gemm", GEMM), more("grouped_dgrad", DGRAD)])
def test_spills_are_refused(tools, tmp_path, kernel, file):
    """Six blocks a multiprocessor leave 80 registers a thread, of which the large tile needs 225."""
    csrc = spoilt(tmp_path, file, "__launch_bounds__(Config::THREADS)", "__launch_bounds__(Config::THREADS, 6)")
    with pytest.raises(RuntimeError, match="(?i)spill"):
        native_gate.judge(*tools, kernel, "bf16", "90", csrc)


def test_warnings_are_refused(tools, tmp_path):
    csrc = spoilt(tmp_path, GEMM, "  Accumulators<Config> acc = {};", "  int unused;\n  Accumulators<Config> acc = {};")
    with pytest.raises(RuntimeError, match="unused"):
        native_gate.judge(*tools, "grouped_gemm", "bf16", "90", csrc)


COPY = "cp.async.cg.shared.global.L2::128B [%0], [%1], 16"
MULTIPLY = "ptx::multiply_add(acc[i][j], a[i], b[j / 2] + j % 2 * 2, typename Config::Element{});"
STORE = "if constexpr (Config::ALIGNED) {\n        if (Element"


STORE_DX = "if constexpr (Config::ALIGNED) {\n    *reinterpret_cast<ptx::Chunk*>(to) = out.chunk;"
LOAD = "if constexpr (Config::ALIGNED) {\n    if (matches"
LOAD_TAPS = "if constexpr (Config::ALIGNED && Config::CHUNK == 8) return"


@pytest.mark.parametrize(
    ("kernel", "file", "old", "new", "words"),
    [
        ("grouped_gemm", "ptx.cuh", COPY, "cp.async.ca.shared.global [%0], [%1], 8", "copies"),
        more("grouped_gemm", GEMM, STORE, STORE.replace("Config::ALIGNED", "false"), "stores"),
        more("grouped_gemm", TILE, MULTIPLY, "acc[i][j][0] += a[i][0] * b[j / 2][j % 2];", "no HMMA"),
        more("grouped_dgrad", DGRAD, STORE_DX, STORE_DX.replace("Config::ALIGNED", "false"), "stores"),
        more("grouped_dgrad", DGRAD, LOAD, LOAD.replace("Config::ALIGNED", "false"), "gather"),
        more("grouped_dgrad", DGRAD, LOAD_TAPS, "if constexpr (false) return", "gather"),
    ],
    ids=["narrow copies", "narrow stores", "no matrix instructions", "narrow stores of dx", "narrow loads of dpool",
         "narrow loads of taps"],
)  # fmt: skip
def test_slow_code_is_refused(tools, tmp_path, kernel, file, old, new, words):
    kernels = native_gate.judge(*tools, kernel, "bf16", "90", spoilt(tmp_path, file, old, new))
    refused = {k.tile: " ".join(k.refusals()) for k in kernels}
    assert words in refused["64x64"], refused
