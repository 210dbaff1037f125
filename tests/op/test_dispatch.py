"""Which implementation runs: backends, single kernels, the TF32 setting, info(). Why none does: test_reasons.py."""

import copy
import subprocess
import sys
import threading
import types
import warnings
from contextlib import nullcontext

import pytest
import torch

from checks.block_cases import SMALL, make_block
from inception_fused import FallbackWarning, FusedInception, KernelError, backend, info
from inception_fused.op import autograd, backends, launcher, operators, reasons
from inception_fused.plan.choice import KERNELS
from inception_fused.plan.launches import NAMES, ROWS
from inception_fused.runtime.submit import record
from inception_fused.testing import Error, tolerance
from inception_fused.tools import environment
from marks import more

FORWARD, BACKWARD = (
    tuple(dict.fromkeys(row.kernel.name for row in ROWS[direction][1:])) for direction in ("forward", "backward")
)
"""Of a block whose BatchNorm does not take the statistics of the batch; test_normed.py has the others."""


def test_backends_nest_and_end():
    assert backends.current() == "auto"
    with backend("kernels"):
        with backend(" K3 = eager , K1 = triton "):
            assert backends.current() == "K1=triton,K3=eager"
        assert backends.current() == "kernels"
        with pytest.raises(ZeroDivisionError), backend("eager"):
            raise ZeroDivisionError
        assert backends.current() == "kernels"
    assert backends.current() == "auto"


def test_backends_belong_to_a_thread():
    seen = []
    with backend("eager"):
        thread = threading.Thread(target=lambda: seen.append(backends.current()))
        thread.start()
        thread.join()
    assert seen == ["auto"]


@pytest.mark.parametrize("kernel", FORWARD)
def test_single_kernels(kernel):
    """One kernel ours, the others eager or as in "auto"; the launches are counted and the results agree."""
    block = make_block(SMALL, (2, 4, 5))
    expected = block.forward("eager")
    others = ",".join(f"{k}=eager" for k in KERNELS if k != kernel)
    for wish, count in ((f"{kernel}=triton", 2), (f"{kernel}=triton,{others}", 2)):
        with record() as launches:
            block.forward(wish)
        assert len(launches) == count, "the pack launch and the kernel"
        for ours, theirs in zip(block.forward(wish), expected, strict=True):
            if ours.dtype == torch.uint8:
                assert torch.equal(ours, theirs)
            else:
                assert Error.of(ours, theirs).within(tolerance(torch.float32, 10**3))


@pytest.mark.parametrize(("kernel", "launches"), list(zip(BACKWARD, (1, 3, 1, 4, 1), strict=True)))
def test_single_kernels_of_the_backward(kernel, launches):
    block = make_block(SMALL, (2, 4, 5))
    saved = block.forward("eager")[1:]
    dy = torch.randn(2, SMALL.out_channels, 4, 5)

    def backward(wish):
        return torch.ops.inception_fused._backward(
            dy, block.x, *saved, block.weights, block.bias_dtypes, True, [True] * 13, wish
        )

    expected = backward("eager")
    others = ",".join(f"{k}=eager" for k in KERNELS if k != kernel)
    for wish in (f"{kernel}=triton", f"{kernel}=triton,{others}"):
        with record() as recorded:
            backward(wish)
        assert len(recorded) == 1 + launches, "the pack launch and the kernel's own"
        for ours, theirs in zip(backward(wish), expected, strict=True):
            assert Error.of(ours, theirs).within(tolerance(torch.float32, 10**3))


def test_launches_of_a_backward():
    """Eleven for every gradient, in the documented order; fewer where fewer are wanted."""
    block = make_block(SMALL, (2, 4, 5))
    dy = torch.randn(2, SMALL.out_channels, 4, 5)
    launches = operators.backward_launches(dy, block.x, block.weights, block.biases)
    assert [name for name, _ in launches] == list(NAMES["backward"])
    wanted = {"b1": 2, "w4": 3, "w2": 3, "w2_reduce": 5, "x": 6}
    positions = {"x": 0, "w2_reduce": 2, "w2": 3, "w4": 6, "b1": 7}
    saved = block.forward()[1:]
    for name, count in wanted.items():
        needs = [i == positions[name] for i in range(13)]
        with record() as recorded:
            torch.ops.inception_fused._backward(
                dy, block.x, *saved, block.weights, block.bias_dtypes, True, needs, "kernels"
            )  # fmt: skip
        assert len(recorded) == count, name


def test_launches_of_a_block():
    """Two for few pixels with parameters that a kernel can read, three where they must be permuted first; four and five
    where no two are made as one."""
    module = FusedInception(*SMALL)
    x = torch.randn(2, 24, 4, 5)
    permuted = copy.deepcopy(module).to(memory_format=torch.channels_last)
    for block, count in ((module, 1), (permuted, 0)):
        for launched, pairs in ((2, nullcontext()), (4, launcher.apart())):
            with backend("kernels"), torch.no_grad(), pairs, record() as launches:
                block(x)
            assert len(launches) == count + launched


def _tf32(monkeypatch, conv="none", cudnn="none", every="none", flag=True):
    level = types.SimpleNamespace
    backends = level(
        cudnn=level(conv=level(fp32_precision=conv), fp32_precision=cudnn, allow_tf32=flag), fp32_precision=every
    )
    monkeypatch.setattr(torch, "backends", backends)
    return reasons.tf32_allowed()


@pytest.mark.parametrize(
    ("settings", "allowed"),
    [
        ({}, True),
        ({"flag": False}, False),
        ({"conv": "tf32", "flag": False}, True),
        ({"conv": "ieee", "every": "tf32"}, False),
        ({"cudnn": "ieee"}, False),
        ({"every": "ieee"}, False),
        ({"cudnn": "tf32", "every": "ieee"}, True),
    ],
    ids=str,
)
def test_tf32_setting(settings, allowed, monkeypatch):
    assert _tf32(monkeypatch, **settings) == allowed


def test_tf32_setting_of_this_torch():
    assert reasons.tf32_allowed() is True
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        assert reasons.tf32_allowed() is False
    finally:
        torch.backends.cudnn.conv.fp32_precision = before


class _OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on a GPU, so that the warning of the CUDA path can be seen here."""

    is_cuda = True


def test_fallback_warns_once_with_the_reason_on_a_gpu_and_never_on_a_cpu():
    x = torch.zeros(1, 2, 3, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        autograd.eager(x, "some reason", "auto", lambda x: x)
        autograd.eager(x.as_subclass(_OnCuda), "some reason", "eager", lambda x: x)
    with pytest.warns(FallbackWarning, match="runs in eager PyTorch: some reason") as caught:
        autograd.eager(x.as_subclass(_OnCuda), "some reason", "auto", lambda x: x)
    assert len(caught) == 1
    with pytest.raises(KernelError, match="demands kernels that cannot run: some reason"):
        autograd.eager(x, "some reason", "kernels", lambda x: x)


def test_subclasses_of_tensor_run_in_eager():
    class Tagged(torch.Tensor):
        pass

    block = FusedInception(*SMALL)
    x = torch.randn(1, 24, 3, 3).as_subclass(Tagged)
    assert type(block(x)) is Tagged
    with backend("kernels"), pytest.raises(KernelError, match="tensor subclass Tagged"):
        block(x)


def test_info_is_complete_and_printable():
    facts = info()
    assert set(facts["kernels"]) == {"pack", *KERNELS}
    # A wheel's metadata may leave out which CUDA it is for: 2.14.1 of a torch that calls itself 2.14.1+cu130.
    assert facts["versions"]["torch"].partition("+")[0] == torch.__version__.partition("+")[0]
    if not torch.cuda.is_available():
        assert all(kernel["auto"] == "eager" for kernel in facts["kernels"].values())
        assert "eager PyTorch on the CPU" in facts["kernels"]["K1"]["why"] or facts["problem"]
    text = environment.format_info(facts)
    for word in ("torch", "driver", "K4", "B5", "interprets kernels on the CPU"):
        assert word in text


@pytest.mark.parametrize("arguments", [more([]), more(["info"]), ["info", "--json"]], ids=str)
def test_command_line(arguments):
    done = subprocess.run(
        [sys.executable, "-m", "inception_fused", *arguments], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "K3" in done.stdout


@pytest.mark.parametrize(
    ("driver", "cuda", "words"),
    [
        ((12, 4), "13.0", 'pip install "torch<2.11"'),
        ((13, 0), None, "a build without CUDA"),
        ((13, 0), "12.8", "CUDA_VISIBLE_DEVICES"),
        (None, "13.0", None),
    ],
)
def test_a_driver_that_torch_does_not_use(driver, cuda, words, monkeypatch):
    monkeypatch.setattr(environment, "cuda_driver", lambda: driver)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    problem = environment.gpu_problem()
    assert problem is None if words is None else words in problem
    assert words is None or words in info()["kernels"]["K1"]["why"]
