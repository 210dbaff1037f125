"""The compiled extension in its place: devices, streams, threads, errors, the block, routes, what was built."""

import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch

from checks.block_cases import DTYPES, ODD, ODD_SHAPES, REDUCE_24, SMALL, check_kernels, make_block
from inception_fused import GOOGLENET_BLOCKS, KernelError, backend, info
from inception_fused.op import backends, dispatch, reasons
from inception_fused.plan import choice
from inception_fused.plan.launches import USUAL
from inception_fused.runtime import native
from inception_fused.runtime.submit import record
from inception_fused.tools.environment import format_info
from marks import each_once
from native_problems import Case, Problem
from simulator import ELEMENTS, KERNELS, Simulator

NO_DEVICE, OLD_DRIVER, NO_IMAGE = 100, 35, 209


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


def test_the_tensors_device_and_its_current_stream_are_passed_on(installed, monkeypatch):
    """From Python: a launch for cuda:2, as it would be made there, on the stream that is current when it runs."""
    installed.configure(devices=3)
    with record() as launches:
        make_block(SMALL, (1, 4, 3)).forward("K1=native,K2=eager,K3=eager,K4=eager")
    (item,) = launches
    for stream in (0x5550, 0x7770):
        current = types.SimpleNamespace(cuda_stream=stream)
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device, current=current: (device.index == 2) and current
        )
        item._replace(device=torch.device("cuda", 2)).run()
        arrived = dict(installed.calls())["launch"]
        assert (arrived["device"], arrived["stream"]) == (2, stream)


def test_every_device_is_asked_for_its_shared_memory(simulator):
    """Also one whose first attempt was refused, and one beyond the 64 that are remembered."""
    simulator.configure(devices=70)
    case = Case(Problem(130, 16, (136, 8, 8), tile=(128, 128)))
    simulator.configure(devices=70, refusal=NO_IMAGE)
    with pytest.raises(RuntimeError, match="no code for the device"):
        simulator.module.grouped_gemm(**case.arguments() | {"device": 5})
    simulator.configure(devices=70)
    for device in (5, 64, 0, 69, 64):
        assert launch(simulator, device=device)["device"] == device


def test_an_error_is_not_left_for_the_next_caller(simulator):
    """What PyTorch asks after its own launches would otherwise blame them."""
    with pytest.raises(RuntimeError, match="device 5"):
        simulator.module.grouped_gemm(**Case(Problem(10, 16, (8, 8, 8))).arguments() | {"device": 5})
    assert simulator.last_error() == 0


def test_probe(simulator):
    """Loads every kernel on the device that is asked for, launches none."""
    simulator.configure(devices=3)
    simulator.device = 1
    simulator.module.probe(device=2)
    assert [(name, fields["device"]) for name, fields in simulator.calls()] == [
        ("set_device", 2),
        ("set_device", 1),
    ] * len(KERNELS) * len(ELEMENTS)
    with pytest.raises(RuntimeError, match="on device 7"):
        simulator.module.probe(device=7)
    simulator.configure(devices=3, refusal=NO_IMAGE)
    with pytest.raises(RuntimeError, match="no code for the device"):
        simulator.module.probe(device=0)


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


@each_once
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_in_the_block(installed, shape, dtype):
    """Every kernel of the block against float64 with K1 native and its neighbours interpreted; then those in ATen."""
    block = make_block(*ODD_SHAPES[shape], dtype)
    out = y, r, _, _ = block.forward("K1=native,K2=triton,K3=triton,K4=triton")
    check_kernels(block, out, tf32=dtype == torch.float32)
    assert [name for name, _ in installed.calls()] == ["launch"], "one launch, so x is read once"
    y_eager, r_eager, _, _ = block.forward("K1=native,K2=eager,K3=eager,K4=eager")
    k1 = block.shape.branch_channels[0]
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
    operands = [
        a for argument in item.arguments.values() for a in (argument if isinstance(argument, tuple) else (argument,))
    ]
    tensors = [a.tensor for a in operands if isinstance(a, native.Address)]
    assert len(tensors) >= 7, "x, three weights, y, r and bits at least"
    kept = [t.clone() for t in tensors]
    item.run()
    assert "GEMM_M 12" in item.describe()
    assert any(not torch.equal(a, b) for a, b in zip(kept, tensors, strict=True))


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((8, 0), "native"), ((8, 6), "native"), ((8, 9), "native"), ((9, 0), "triton"), ((10, 0), "triton"),
     ((10, 3), "triton"), ((12, 0), "native"), ((12, 1), "native")],
)  # fmt: skip
def test_routes(monkeypatch, capability, expected):
    """The table decides where nothing is asked for; Triton serves where the extension is missing."""
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index=None: capability)
    monkeypatch.setattr(reasons, "MACHINE", ())
    monkeypatch.setattr(native, "why_no_extension", lambda device: None)
    chosen = dispatch.choices("auto", device, torch.bfloat16)
    assert chosen == dict.fromkeys(choice.KERNELS, "triton") | dict.fromkeys(choice.COMPILED, expected)
    assert dispatch.choices("K1=triton", device, torch.bfloat16)["K1"] == "triton"
    assert dispatch.choices("K1=native", device, torch.bfloat16)["K1"] == "native"
    monkeypatch.setattr(native, "why_no_extension", lambda device: "it was not built")
    assert dispatch.choices("auto", device, torch.bfloat16)["K1"] == "triton"


def test_tiles_of_googlenet_compute_few_columns_in_vain():
    useful = computed = 0
    for config in GOOGLENET_BLOCKS.values():
        gemm_n = config.c1 + config.c2[0] + config.c3[0]
        tile = USUAL.forward.reductions.kernel.native.choose(torch.bfloat16, 128 * 784, gemm_n, unit=8)
        assert (tile.BLOCK_M, tile.BLOCK_N) in USUAL.forward.reductions.kernel.native.large
        useful, computed = useful + gemm_n, computed + -(-gemm_n // tile.BLOCK_N) * tile.BLOCK_N
    assert useful / computed > 0.9


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


def test_a_record_of_another_python_is_not_believed(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "RECORD", tmp_path / "_build.json")
    (tmp_path / "_build.json").write_text('{"built": false, "python": "cpython-399", "reason": "it was switched off"}')
    monkeypatch.setattr(native, "extension", lambda: None)
    assert native.facts()["built"]
    assert native.facts()["reason"] is None
    assert "native     built\n" in format_info(info())

    def missing():
        raise ImportError("No module named 'inception_fused._native'")

    monkeypatch.setattr(native, "extension", missing)
    (tmp_path / "_build.json").write_text('{"built": true, "python": "cpython-399", "reason": null}')
    assert not native.facts()["built"]
    assert "the last installation was for cpython-399" in native.facts()["reason"]
    assert "not built: the last installation" in format_info(info())


@pytest.mark.parametrize(
    ("file", "interface", "words"),
    [("/elsewhere/inception_fused/_native.so", native.INTERFACE, "belongs to another copy"),
     (str(native.RECORD.with_name("_native.so")), native.INTERFACE + 1, "older or newer sources")],
)  # fmt: skip
def test_an_extension_of_other_sources_is_not_taken(monkeypatch, file, interface, words):
    module = types.SimpleNamespace(__file__=file, INTERFACE=interface)
    monkeypatch.setattr(native.importlib, "import_module", lambda name: module)
    with pytest.raises(ImportError, match=words):
        native.extension.__wrapped__()


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
    monkeypatch.setattr(native, "why_no_extension", lambda device: None)
    block = make_block(SMALL, (1, 3, 3))
    with pytest.raises(KernelError, match=r"grouped_gemm \(K1, GEMM_M 9.*needs an NVIDIA GPU and a driver for CUDA"):
        block.forward("K1=native,K2=eager,K3=eager,K4=eager")


def test_on_the_cpu_the_extension_is_no_choice():
    """With the extension of this installation, or without one."""
    block = make_block(SMALL, (1, 3, 3))
    with pytest.raises(KernelError, match="x is on the CPU|was not built|does not load"), backend("K1=native"):
        block.forward(backends.current())
