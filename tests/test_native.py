"""The compiled K1 on simulated hardware: every result against float64, then its launcher and its place in the block."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import native_mutants
import numpy as np
import pytest
import torch
from cases import DTYPES, ODD, ODD_SHAPES, REDUCE_24, SMALL, check_kernels, make_block
from native_problems import Case, Problem, large_problems, problems
from native_suite import attempt
from simulator import ELEMENTS, SANITIZE, SIM, TIMINGS, Simulator, build, compiler

from inception_fused import GOOGLENET_BLOCKS, KernelError, backend, dispatch, info, native, plan
from inception_fused.kernels.submit import record

SUITE = Path(__file__).with_name("native_suite.py")
NO_DEVICE, OLD_DRIVER, NO_IMAGE = 100, 35, 209


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The build that mutants share their unchanged objects with."""
    try:
        compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    return tmp_path_factory.mktemp("simulator")


@pytest.fixture(scope="module")
def built(folder) -> Simulator:
    return Simulator(build(folder, native_mutants.FLAGS))


@pytest.fixture
def simulator(built) -> Simulator:
    built.configure()
    built.device = 0
    built.calls()
    return built


@pytest.fixture
def installed(simulator, monkeypatch) -> Simulator:
    """The simulator in the extension's place, so that CPU tensors can be given to it."""
    monkeypatch.setattr(native, "extension", lambda: simulator.module)
    return simulator


@pytest.mark.parametrize("timing", TIMINGS)
@pytest.mark.parametrize("problem", problems() + large_problems(), ids=str)
def test_against_float64(simulator, problem, timing):
    for seed in range(3 if timing == "random" else 1):
        wrong = attempt(simulator, problem, timing, seed)
        assert wrong is None, wrong


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


def test_every_mutant_is_caught(built, folder, tmp_path, capsys):
    control = native_mutants.judge(native_mutants.Mutant("unchanged", "", ""), folder, tmp_path / "control")
    assert not control.caught, control
    verdicts = list(native_mutants.judge_all(folder, tmp_path))
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


def test_rows_beyond_32_bit_offsets(simulator):
    """x of three rows, each 2**30 elements after the one before: the third begins at element 2**31."""
    case = Case(Problem(3, 40, (16, 8, 8)))
    stride = 2**30
    wide = np.memmap("/dev/zero", dtype=np.uint16, mode="c", shape=2 * stride + 64)
    for row in range(3):
        wide[row * stride : row * stride + 40] = case.x.matrix[row]
    simulator.module.grouped_gemm(**case.arguments() | {"x": (wide.ctypes.data, stride)})
    assert case.check() is None


def refused(simulator: Simulator, **changes: object) -> str:
    case = Case(Problem(10, 16, (8, 8, 8)))
    with pytest.raises(ValueError, match="grouped_gemm: ") as raised:
        simulator.module.grouped_gemm(**case.arguments() | changes)
    assert case.y.untouched_outside(np.arange(0)), "nothing was written"
    return str(raised.value)


def test_a_problem_that_contradicts_itself_is_refused(simulator):
    """Each of these would read or write outside a tensor, or off a boundary."""
    case = Case(Problem(10, 16, (8, 8, 8)))
    x, y, r, bits = (case.arguments()[name] for name in ("x", "y", "r", "bits"))
    assert "element" in refused(simulator, element="int8")
    assert "tile: got 96x96" in refused(simulator, tile=(96, 96))
    assert "tile: got 128x128 unaligned" in refused(simulator, tile=(128, 128), aligned=False)
    assert "sizes" in refused(simulator, m=-1)
    assert "sizes" in refused(simulator, c=0)
    assert "sizes" in refused(simulator, k=(0, 0, 0))
    assert "sizes" in refused(simulator, m=2**31 - 1)
    assert "x_stride: got 8, wants at least c = 16" in refused(simulator, x=(x[0], 8))
    assert "y_stride" in refused(simulator, y=(y[0], 7))
    assert "r5: got 0, wants at least k[1] = 8" in refused(simulator, r=(r[0], r[1], 0))
    assert "r_stride" in refused(simulator, r=(r[0], 8, 8))
    assert "bits" in refused(simulator, bits=(bits[0], 0))
    assert "bits" in refused(simulator, relu=False)
    assert "multiples of 8" in refused(simulator, x=(x[0], 17))
    assert "multiples of 8" in refused(simulator, k=(8, 4, 8))
    assert "no multiple of 16" in refused(simulator, x=(x[0] + 2, 16))


def test_no_rows_is_no_launch(simulator):
    case = Case(Problem(1, 16, (8, 8, 8)))
    simulator.module.grouped_gemm(**case.arguments() | {"m": 0})
    assert simulator.calls() == []


def launch(simulator: Simulator, **changes: object) -> dict[str, int]:
    """Launch one problem and return what arrived at the simulated device."""
    case = Case(Problem(130, 16, (136, 8, 8), tile=(128, 128)))
    simulator.calls()
    simulator.module.grouped_gemm(**case.arguments() | changes)
    assert case.check() is None
    return dict(simulator.calls())["launch"]


def test_device_and_stream_arrive_and_the_device_before_is_current_again(simulator):
    simulator.configure(devices=3)
    simulator.device = 1
    arrived = launch(simulator, device=2, stream=0xABC0)
    assert (arrived["device"], arrived["stream"]) == (2, 0xABC0)
    assert (arrived["blocks"], arrived["threads"]) == (4, 128)
    assert simulator.device == 1
    # More than 48 KB must be asked for on every device; one that was not asked refuses the launch.
    assert arrived["shared"] > 48 << 10
    assert launch(simulator, device=0)["device"] == 0
    assert simulator.device == 1


def test_a_fresh_thread_is_served(simulator):
    """Autograd calls from threads that have never touched CUDA: the device is made current there too."""
    simulator.configure(devices=2)
    arrived = []
    thread = threading.Thread(target=lambda: arrived.append(launch(simulator, device=1)))
    thread.start()
    thread.join()
    here = launch(simulator, device=1)
    assert arrived[0]["device"] == here["device"] == 1
    assert arrived[0]["thread"] != here["thread"]


def test_the_device_before_is_current_again_after_an_error(simulator):
    simulator.configure(devices=2)
    simulator.device = 1
    with pytest.raises(RuntimeError, match=r"grouped_gemm \(K1, GEMM_M 10, .* device 5\)"):
        simulator.module.grouped_gemm(**Case(Problem(10, 16, (8, 8, 8))).arguments() | {"device": 5})
    assert simulator.device == 1


@pytest.mark.parametrize(
    ("refusal", "words"),
    [(NO_DEVICE, "needs an NVIDIA GPU"), (OLD_DRIVER, "driver for CUDA 13"), (NO_IMAGE, "no code for the device")],
)
def test_refusals_say_what_to_do(installed, refusal, words):
    block = make_block(SMALL, (1, 3, 3))
    installed.configure(refusal=refusal)
    with pytest.raises(KernelError, match=words):
        block.forward("K1=native,K2=eager,K3=eager,K4=eager")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_in_the_block(installed, shape, dtype):
    """Every kernel of the block against float64 with K1 native and its neighbours interpreted; then those in ATen."""
    block = make_block(*ODD_SHAPES[shape], dtype)
    out = y, r, _, _ = block.forward("K1=native,K2=triton,K3=triton,K4=triton")
    check_kernels(block, out, tf32=dtype == torch.float32)
    assert [name for name, _ in installed.calls()] == ["launch"], "one launch, so x is read once"
    y_eager, r_eager, _, _ = block.forward("K1=native,K2=eager,K3=eager,K4=eager")
    k1 = block.shape.k1
    assert torch.equal(y[:, :k1], y_eager[:, :k1])
    assert torch.equal(r, r_eager)


@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_variants_in_the_block(installed, bias, activation):
    for config in (SMALL, ODD, REDUCE_24):
        block = make_block(config, (2, 5, 3), torch.bfloat16, bias=bias, activation=activation)
        check_kernels(block, block.forward("K1=native"))


def test_sliced_and_misaligned_input(installed):
    for offset in (0, 1, 8):
        block = make_block(SMALL, (2, 6, 5), torch.float16)
        wide = torch.full((2, 64, 6, 5), float("nan"), dtype=torch.float16).contiguous(
            memory_format=torch.channels_last
        )
        wide[:, offset : offset + 24] = block.x
        given = block._replace(x=wide[:, offset : offset + 24])
        check_kernels(given, given.forward("K1=native"))


def test_biases_of_every_dtype(installed):
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        block = make_block(SMALL, (1, 4, 3), torch.bfloat16)
        block = block._replace(biases=[b.to(dtype) for b in block.biases])
        check_kernels(block, block.forward("K1=native"))


def test_the_argument_tensors_live_as_long_as_a_recorded_launch(installed):
    block = make_block(SMALL, (1, 4, 3))
    with record() as launches:
        block.forward("K1=native,K2=eager,K3=eager,K4=eager")
    (item,) = launches
    kept = [t.clone() for t in item.tensors if t is not None]
    item.run()
    assert "GEMM_M 12" in item.describe()
    assert any(not torch.equal(a, b) for a, b in zip(kept, filter(torch.is_tensor, item.tensors), strict=True))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "native"), ((8, 6), "native"), ((8, 9), "native"), ((9, 0), "triton"), ((10, 0), "triton"),
     ((10, 3), "triton"), ((12, 0), "native"), ((12, 1), "native")],
)  # fmt: skip
def test_routes(monkeypatch, capability, expected):
    """The table decides where nothing is asked for; Triton serves where the extension is missing."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(dispatch, "obstacle", lambda *_: None)
    monkeypatch.setattr(native, "obstacle", lambda device: None)
    chosen = dispatch.choices("auto", device, torch.bfloat16)
    assert chosen == {"K1": expected, "K2": "triton", "K3": "triton", "K4": "triton"}
    assert dispatch.choices("K1=triton", device, torch.bfloat16)["K1"] == "triton"
    assert dispatch.choices("K1=native", device, torch.bfloat16)["K1"] == "native"
    monkeypatch.setattr(native, "obstacle", lambda device: "it was not built")
    assert dispatch.choices("auto", device, torch.bfloat16)["K1"] == "triton"


def test_tiles_of_googlenet_compute_few_columns_in_vain():
    useful = computed = 0
    for config in GOOGLENET_BLOCKS.values():
        gemm_n = config.c1 + config.c2[0] + config.c3[0]
        tile = plan.native_tile(torch.bfloat16, gemm_m=128 * 784, gemm_n=gemm_n, unit=8)
        assert (tile.BLOCK_M, tile.BLOCK_N) in plan.NATIVE_LARGE
        useful, computed = useful + gemm_n, computed + -(-gemm_n // tile.BLOCK_N) * tile.BLOCK_N
    assert useful / computed > 0.9


@pytest.mark.parametrize("element", ELEMENTS)
def test_the_plan_knows_the_tiles_that_are_compiled(simulator, element):
    found = simulator.module.grouped_gemm_tiles(element)
    planned = [(*block, 1) for block in (*plan.NATIVE_LARGE, plan.NATIVE_SMALL)] + [(*plan.NATIVE_UNALIGNED, 0)]
    assert [tuple(facts[:3]) for facts in found] == planned
    assert all(shared <= plan.MIN_SHARED_BYTES for *_, shared in found)


def test_without_the_extension(monkeypatch, tmp_path):
    """Not built: demanded it is an error with reason and remedy, otherwise nothing is said."""

    def missing():
        raise ImportError("No module named 'inception_fused._native'")

    monkeypatch.setattr(native, "extension", missing)
    monkeypatch.setattr(native, "RECORD", tmp_path / "_build.json")
    block = make_block(SMALL, (1, 3, 3))
    with pytest.raises(KernelError, match="not built: this copy .* was not installed.*pip install"):
        block.forward("K1=native")
    (tmp_path / "_build.json").write_text('{"built": false, "reason": "no C++ compiler", "remedy": "install g++"}')
    with pytest.raises(KernelError, match="not built: no C\\+\\+ compiler; install g"):
        block.forward("K1=native")
    block.forward("kernels")
    assert info()["native"]["reason"] == "no C++ compiler"


LOAD = """
import importlib.util, sys
sys.modules["torch"] = None
spec = importlib.util.spec_from_file_location("_native", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with open("/proc/self/maps") as maps:
    loaded = maps.read()
assert "libcuda." not in loaded and "libtorch" not in loaded and "libcudart" not in loaded
print(module.cuda, len(module.grouped_gemm_tiles("bf16")))
"""


@pytest.fixture
def real() -> Path:
    """The extension that this installation built."""
    facts = native.facts()
    if not facts["built"]:
        pytest.skip(f"the extension was not built: {facts['reason']}")
    assert facts["loaded"], facts["error"]
    return Path(native.extension().__file__)


def test_the_extension_loads_without_torch_and_without_a_driver(real):
    done = subprocess.run([sys.executable, "-I", "-c", LOAD, real], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [native.facts()["cuda"], "4"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_call_without_a_gpu_says_what_is_missing(real, monkeypatch):
    monkeypatch.setattr(native, "obstacle", lambda device: None)
    block = make_block(SMALL, (1, 3, 3))
    with pytest.raises(KernelError, match=r"grouped_gemm \(K1, GEMM_M 9.*needs an NVIDIA GPU and a driver for CUDA"):
        block.forward("K1=native,K2=eager,K3=eager,K4=eager")


def test_on_the_cpu_the_extension_is_no_choice():
    """With the extension of this installation, or without one."""
    block = make_block(SMALL, (1, 3, 3))
    with pytest.raises(KernelError, match="x is on the CPU|was not built"), backend("K1=native"):
        block.forward(dispatch.current())
