"""INCEPTION_FUSED_CHECK lets right kernels pass and names the first slice or gradient that is wrong."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from checks.block_cases import ODD, SMALL
from inception_fused import GOOGLENET_BLOCKS, FusedInception, KernelError, backend
from inception_fused.op import checking, gradients, launcher
from inception_fused.testing import GRADIENT_NAMES
from marks import each_once, more, quick


@pytest.fixture(autouse=True)
def on():
    with checking.checked(), backend("kernels"):
        yield


def _step(config=SMALL, dtype=torch.float32, *, x_grad=True, frozen=(), scale=1.0, calls=1, **options):
    """Forward and backward of a block as a user would run it."""
    torch.manual_seed(1)
    block = FusedInception(*config, **options).to(dtype)
    for name in frozen:
        getattr(block, name).requires_grad_(False)
    for _ in range(calls):
        x = torch.randn(2, config.in_channels, 5, 6).to(dtype).requires_grad_(x_grad)
        y = block(x)
        y.backward(torch.randn_like(y) * scale)


@pytest.fixture
def judged(monkeypatch):
    """The names of what is compared."""
    names, judge = [], checking._judge

    def noted(what, *args):
        names.append(what)
        judge(what, *args)

    monkeypatch.setattr(checking, "_judge", noted)
    return names


SLICES = [f"branch {i}" for i in range(1, 5)]
EVERY = [*SLICES, *(f"d {name}" for name in GRADIENT_NAMES)]


@each_once
@pytest.mark.parametrize("dtype", [more(torch.float32), more(torch.float16), torch.bfloat16], ids=str)
@pytest.mark.parametrize("config", [more(SMALL), ODD], ids=["small", "odd"])
def test_right_kernels_pass(config, dtype, judged):
    """Three times, so that launches from memory are checked too."""
    _step(config, dtype, calls=3)
    assert judged == EVERY * 3


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ({"bias": False}, 11),
        ({"activation": None}, 17),
        ({"branch3_kernel_size": 3}, 17),
        ({"x_grad": False}, 16),
        ({"frozen": ("p2_2", "p3_2", "p2_1", "p3_1"), "x_grad": False}, 8),
        ({"frozen": ("p1_1", "p2_1", "p2_2", "p3_1", "p3_2", "p4_2")}, 5),
    ],
    ids=str,
)
def test_variants_pass(options, count, judged):
    """Without the saved r, bits or taps that a frozen part needs none of."""
    _step(**options)
    assert len(judged) == count


def test_under_autocast(judged):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _step()
    assert judged == EVERY


def test_what_overflows_in_eager_too_is_no_difference(judged):
    """A loss scaled too far, as fp16 training meets it."""
    _step(dtype=torch.float16, scale=40_000.0)
    assert judged == EVERY


@each_once
@pytest.mark.parametrize(("kernel", "channels", "branch"), [("K1", 16, 1), ("K3", 24, 2), ("K4", 16, 3), ("K2", 8, 4)])
@pytest.mark.parametrize("train", [False, True])
def test_a_spoilt_slice_is_named(kernel, channels, branch, train, monkeypatch):
    function_of = launcher.function_of

    def spoilt(launched, implementation):
        launch = function_of(launched, implementation)
        if launched.name != kernel:
            return launch

        def run(x, w, y, *args, **options):
            launch(x, w, y, *args, **options)
            if y.channels == channels:
                y.rows(options["gemm_m"])[7, 3] += 1.0

        return run

    monkeypatch.setattr(launcher, "function_of", spoilt)
    block = FusedInception(*SMALL)
    words = (
        rf"block \(24, 16, \(8, 24\), \(8, 16\), 8\), x \(2, 24, 5, 6\) torch.float32 on cpu: branch {branch} differs "
        r"from the reference: peak error \d\S+, bound \d\S+, eager's own \d\S+, relative"
    )
    with launcher.apart(), pytest.raises(KernelError, match=words), torch.set_grad_enabled(train):
        block(torch.randn(2, 24, 5, 6))


@pytest.mark.parametrize(
    ("index", "fault"),
    quick(
        [*((i, "3 percent") for i in range(13)), (0, "one NaN"), (3, "one NaN"), (12, "one NaN")],
        (0, "3 percent"),
        (5, "3 percent"),
        (12, "3 percent"),
        (3, "one NaN"),
    ),
    ids=lambda value: GRADIENT_NAMES[value] if isinstance(value, int) else value,
)
def test_a_spoilt_gradient_is_named(index, fault, monkeypatch):
    backward = gradients.block_backward

    def spoilt(*args, **options):
        grads = backward(*args, **options)
        if fault == "one NaN":
            grads[index][(0,) * grads[index].dim()] = torch.nan
        else:
            grads[index].mul_(1.03)
        return grads

    monkeypatch.setattr(gradients, "block_backward", spoilt)
    with pytest.raises(KernelError, match=f": d {GRADIENT_NAMES[index]} differs from the reference: "):
        _step()


def test_a_block_of_googlenet_has_its_name(monkeypatch):
    function_of = launcher.function_of
    nothing = lambda *args, **options: None  # noqa: E731
    packs = lambda kernel, form: function_of(kernel, form) if kernel.name == "pack" else nothing  # noqa: E731
    monkeypatch.setattr(launcher, "function_of", packs)
    words = r"block 5a \(832, 256, \(160, 320\), \(32, 128\), 128\)"
    with launcher.apart(), pytest.raises(KernelError, match=words), torch.no_grad():
        FusedInception(*GOOGLENET_BLOCKS["5a"])(torch.randn(1, 832, 1, 1))


def test_transforms_empty_batches_and_second_derivatives_are_not_checked(judged):
    block = FusedInception(*SMALL)
    torch.func.vmap(block)(torch.randn(2, 1, 24, 3, 3))
    torch.func.grad(lambda x: block(x).sum())(torch.randn(1, 24, 3, 3))
    assert block(torch.randn(0, 24, 3, 3)).shape[0] == 0
    assert judged == []
    x = torch.randn(1, 24, 3, 3, requires_grad=True)
    torch.autograd.grad(block(x).sum(), x, create_graph=True)
    assert judged == SLICES


def test_a_compiled_call_is_not_checked(judged):
    block = FusedInception(*SMALL)
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    compiled(torch.randn(1, 24, 3, 3)).sum().backward()
    assert judged == []


def test_eager_calls_are_not_checked(judged):
    with backend("eager"):
        _step()
    assert judged == []


def test_off_by_default_and_read_from_the_environment():
    script = "from inception_fused.op import checking; print(checking.on)"
    found = []
    for value in ("", "0", "1"):
        environment = os.environ | {
            "INCEPTION_FUSED_CHECK": value,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        }
        done = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        )
        found.append(done.stdout.strip())
    assert found == ["False", "False", "True"]
    with checking.checked(False):
        assert not checking.on
    assert checking.on


def test_relu_in_place_may_follow(judged):
    model = nn.Sequential(FusedInception(*SMALL), nn.ReLU(inplace=True))
    model(torch.randn(1, 24, 4, 4)).sum().backward()
    assert len(judged) == 16
