"""verify() finds what is wrong, counts and weighs what it says, and leaves the model alone."""

import dataclasses
import json
import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from checks.block_cases import SMALL
from inception_fused import FusedInception, InceptionConfig, InceptionInputError, KernelError, backend, verify
from inception_fused.block.reference import CONV_NAMES
from inception_fused.op import autograd, dispatch, gradients, launcher
from inception_fused.runtime import submit
from inception_fused.tools import measuring
from inception_fused.tools.measuring import Launches, contenders, count_launches
from marks import full, more

SECOND = InceptionConfig(64, 8, (8, 16), (8, 16), 8)
EAGER = (Launches(0, 14), Launches(0, 16))
"""Eager's forward: six convolutions, six ReLUs, pool, cat. Its backward: as many but for cat's, whose gradients are
views, and three additions for the branches' dx."""


def _model(**options) -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(FusedInception(*SMALL, **options), nn.ReLU(), FusedInception(*SECOND, **options))


def _dense(model: nn.Module) -> nn.Module:
    return model.to(memory_format=torch.channels_last)


X = torch.randn(2, 24, 5, 6, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Three timed calls, and one thread: on a busy machine two wait for each other, a hundred times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measuring, "CPU_SECONDS", 0.0)
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def interpreted():
    """Both blocks, interpreted, with weights in channels_last."""
    with backend("kernels"):
        return verify(_dense(_model()), X.contiguous(memory_format=torch.channels_last))


def test_every_slice_and_gradient_of_every_block(interpreted):
    assert interpreted.ok
    assert [row.name for row in interpreted.rows] == ["0", "2"]
    names = [f"{n}.{kind}" for kind in ("weight", "bias") for n in CONV_NAMES]
    expected = [*(f"branch {i}" for i in range(1, 5)), "d x", *(f"d {name}" for name in names)]
    for row in interpreted.rows:
        assert [r.what for r in row.parity] == expected
        assert (row.path, row.dtype) == ("interpreted", torch.float32)
        assert "K1 triton" in row.why
        assert "B5 triton" in row.why
    assert [row.x_shape for row in interpreted.rows] == [(2, 24, 5, 6), (2, 64, 5, 6)]


def test_launches(interpreted):
    for row in interpreted.rows:
        assert row.costs.launches_forward == (Launches(2, 0), EAGER[0])
        assert row.costs.launches_backward == (Launches(11, 0), EAGER[1])
        assert (row.costs.forward_us, row.costs.step_us, row.costs.peak_bytes) == (None, None, None)


def test_weights_that_need_packing_cost_one_launch():
    with backend("kernels"):
        costs = verify(_model()[0], X, backward=False).rows[0].costs
    assert costs.launches_forward == (Launches(3, 1), EAGER[0])  # and x in NCHW one copy
    assert (costs.launches_backward, costs.held_bytes) == (None, None)


def test_launches_count_on_every_thread_and_record_does_not():
    block = _dense(_model())[0]
    with backend("kernels"), submit.count() as names:
        with submit.record() as recorded, torch.no_grad():
            block(X)
        assert (len(recorded), names) == (2, [])
        with torch.no_grad():
            block(X)
    assert len(names) == 2
    assert submit._counts == []


def test_a_mixed_backend_counts_both():
    pair = contenders(_dense(_model())[0], X.contiguous(memory_format=torch.channels_last), None)
    wish = ",".join(f"{k}={'eager' if k in ('K3', 'B4') else 'triton'}" for k in dispatch.KERNELS)
    with backend(wish):
        found = count_launches(pair.fused.infer, torch.device("cpu"))
    assert found.ours == 2, "K1 with K2, and K4"
    assert found.aten >= 1


def test_memory_is_a_hand_count(interpreted):
    """Ours: r, a bit an element of y, four bits an element of x. Eager: the pool's 64-bit indices, the pooled x, both
    reductions, four branches' outputs, and what cat made of them is not kept."""
    pixels = 2 * 5 * 6
    (c, c1, (k2, c2), (k3, c3), c4) = SMALL
    ours = pixels * (4 * (k2 + k3) + (c1 + c2 + c3 + c4) // 8 + c // 2)
    eager = pixels * ((8 + 4) * c + 4 * (k2 + k3 + c1 + c2 + c3 + c4))
    assert interpreted.rows[0].costs.held_bytes == (ours, eager)


def test_a_cpu_without_a_wish_runs_eager_and_says_so():
    found = verify(_model(), X)
    assert found.ok
    text = str(found)
    assert "2 blocks: no kernel ran: x is on the CPU; kernels run on a CUDA device, or on a CPU under" in text
    assert "(same path)" in text
    assert not re.search(r"\d\dx\)", text)
    for row in found.rows:
        assert row.path == "eager"
        assert row.costs.launches_backward.fused.ours == 0
        assert row.costs.step_us.fused > 0


def test_eager_by_wish():
    with backend("eager"):
        assert "no kernel ran: backend is eager" in str(verify(_model(), X, backward=False))


@pytest.mark.parametrize("on_gpu", [False, True])
@pytest.mark.parametrize("names", [["0"], ["a.rather.long.path.to.the.block" * 4, "b"]])
def test_the_table_fits_a_terminal(names, on_gpu, interpreted):
    rows = tuple(row._replace(name=name) for row, name in zip(interpreted.rows, names, strict=False))
    if on_gpu:
        figures = dict.fromkeys(("peak_bytes", "forward_us", "step_us", "host_us"), measuring.Pair(1.2e9, 3.4e9))
        rows = tuple(row._replace(path="eager", costs=row.costs._replace(**figures)) for row in rows)
    text = str(dataclasses.replace(interpreted, rows=rows))
    assert max(map(len, text.splitlines())) <= 120
    assert text.count("fwd launches") == text.count("held KiB") == 1
    assert text.count("fwd + bwd ms") == on_gpu
    assert "ok: every slice and gradient" in text


@pytest.mark.parametrize("kernel", ["K1", "K2", "K3"])
def test_a_launcher_that_spoils_one_slice_is_found(kernel, monkeypatch):
    """The slice of one branch 3% too large, in the second block only."""
    function_of = launcher.function_of

    def spoilt(launched, implementation):
        launch = function_of(launched, implementation)
        if launched.name != kernel:
            return launch

        def run(x, w, y, *args, **options):
            launch(x, w, y, *args, **options)
            if y.channels == {"K1": 8, "K2": 8, "K3": 16}[kernel]:
                y.rows(options["gemm_m"]).mul_(1.03)

        return run

    monkeypatch.setattr(launcher, "function_of", spoilt)
    with backend("kernels"), launcher.apart():
        found = verify(nn.Sequential(_model()[2]), torch.randn(1, 64, 4, 4), backward=False)
    branch = {"K1": "branch 1", "K2": "branch 4", "K3": "branch 2"}[kernel]
    assert not found.ok
    assert [r.what for r in found.rows[0].parity if not r.ok] == [branch]
    assert re.search(rf"^0 .*{branch}, rms.*NOT OK$", str(found), re.MULTILINE)
    assert f"NOT OK: beyond its bound: 0: {branch} (" in str(found)


@pytest.mark.parametrize("what", ["d x", more("d p2_2.weight"), more("d p4_2.bias")])
def test_a_gradient_off_by_3_percent_is_found(what, monkeypatch):
    names = ["d x", *(f"d {n}.{kind}" for kind in ("weight", "bias") for n in CONV_NAMES)]
    backward = gradients.block_backward

    def spoilt(*args, **options):
        grads = backward(*args, **options)
        grads[names.index(what)].mul_(1.03)
        return grads

    monkeypatch.setattr(gradients, "block_backward", spoilt)
    with backend("kernels"):
        found = verify(_dense(_model())[0], X)
    assert not found.ok
    assert f"NOT OK: beyond its bound: model: {what} (" in str(found)
    assert str(found).count("NOT OK") == 2
    data = found.to_json()
    assert (data["ok"], data["blocks"][0]["ok"], data["blocks"][0]["worst"]) == (False, False, what)


def test_a_nan_is_beyond_every_bound_and_json_has_none(monkeypatch, tmp_path):
    whole = autograd.convolved
    monkeypatch.setattr(autograd, "convolved", lambda *a, **k: whole(*a, **k) * torch.nan)
    found = verify(_model()[0], X, backward=False)
    assert not found.ok
    assert json.loads(json.dumps(found.to_json(), allow_nan=False))["blocks"][0]["parity"][0]["ours"]["rms"] is None
    found.save_picture(tmp_path / "nan.png")


def test_nothing_of_the_model_changes():
    model = nn.Sequential(nn.BatchNorm2d(24), nn.Dropout(), _model(), nn.BatchNorm2d(48)).train()
    model[2][0].p1_1.weight.grad = torch.ones_like(model[2][0].p1_1.weight)
    model[2][2].eval()
    calls = []
    model[2][0].register_forward_hook(lambda *_: calls.append(1))
    before = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    modes = [m.training for m in model.modules()]
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    x, random = X.clone().requires_grad_(), torch.get_rng_state()
    verify(model, x)
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, X)
    assert x.grad is None
    for name, t in model.state_dict(keep_vars=True).items():
        assert t is before[name][0]
        assert torch.equal(t, before[name][1])
        assert (t.grad is None) == (name != "2.0.p1_1.weight.".rstrip("."))
    assert modes == [m.training for m in model.modules()]
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert len(calls) == 1
    assert torch.is_grad_enabled()


class Shared(nn.Module):
    """One block under two names and called twice, one never called, one with a replaced child."""

    def __init__(self) -> None:
        super().__init__()
        self.first = FusedInception(*SMALL)
        self.again = self.first
        self.idle = FusedInception(*SMALL)
        self.strange = FusedInception(*SECOND)
        self.strange.p4_1 = nn.AvgPool2d(3, stride=1, padding=1)

    def forward(self, x):
        return self.strange(self.first(x=x) + self.again(-x).mul_(2))


def test_shared_idle_and_strange_blocks():
    found = verify(Shared(), X, backward=False)
    assert found.ok
    assert [(row.name, row.path) for row in found.rows] == [
        ("first", "eager"),
        ("idle", "not checked"),
        ("strange", "not checked"),
    ]
    text = str(found)
    assert "idle: not checked: model(x) did not call it" in text
    assert "strange: not checked: p4_1 is an AvgPool2d" in text
    assert text.endswith("ok: every slice of 1 block is within its bound; 2 not checked")


def test_nothing_checked_is_not_ok():
    model = nn.Sequential(nn.Identity())
    model[0].block = FusedInception(*SMALL)
    found = verify(model, X)
    assert not found.ok
    assert str(found).endswith("NOT OK: nothing was checked")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: verify("net", X), "model: got str, wants an nn.Module"),
        (lambda: verify(nn.Linear(2, 2), X), "model: got Linear without any FusedInception in it, wants at least one"),
        (lambda: verify(_model(), [X]), "x: got list, wants a tensor"),
        (lambda: verify(_model(), X[:, :7]), "x: got 7 channels in shape (2, 7, 5, 6), wants 24"),
        (
            lambda: verify(nn.Sequential(nn.Linear(3, 3), _model()), X),
            "x: got shape (2, 24, 5, 6), torch.float32 on cpu",
        ),
        (lambda: verify(_model(), X, backward=1), "backward: got 1, wants True or False"),
        (
            lambda: verify(_model(), X, backward=False).save_picture("no/such/a.png"),
            "wants a file in a folder that exist",
        ),
        (
            lambda: verify(_model(), X, backward=False).save_picture("a.doc"),
            "'a.doc', wants a file name ending in one of",
        ),
    ],
)
def test_wrong_calls(call, words):
    with pytest.raises(InceptionInputError) as caught:
        call()
    assert words in str(caught.value)


def test_demanded_kernels_that_cannot_run():
    with backend("kernels"), pytest.raises(KernelError, match="demands kernels that cannot run"):
        verify(_model().double().to("meta"), X.double().to("meta"))


@full
@pytest.mark.parametrize("dtype", [torch.bfloat16, more(torch.float16)])
def test_under_autocast(dtype):
    with backend("kernels"), torch.autocast("cpu", dtype=dtype):
        found = verify(_dense(_model())[0], X.contiguous(memory_format=torch.channels_last))
    assert found.ok
    assert (found.dtypes, found.rows[0].costs.launches_forward.fused.ours) == (str(dtype)[6:], 3)


@pytest.mark.parametrize("spoilt", [False, True])
def test_pictures(spoilt, interpreted, tmp_path):
    rows = interpreted.rows
    if spoilt:
        row = rows[0].parity[0]
        bad = row._replace(ours=row.ours._replace(rms=1.0))
        rows = (rows[0]._replace(parity=(bad, *rows[0].parity[1:])), *rows[1:])
    file = tmp_path / "blocks.png"
    dataclasses.replace(interpreted, rows=rows).save_picture(file)
    assert file.read_bytes().startswith(b"\x89PNG")
    assert file.stat().st_size > 20_000


def test_no_matplotlib(interpreted, tmp_path, monkeypatch):
    from inception_fused.tools import picture

    def missing(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(picture, "import_module", missing)
    with pytest.raises(InceptionInputError, match="not installed: python -m pip install matplotlib"):
        interpreted.save_picture(tmp_path / "a.png")


def test_kernels_among_the_events_of_a_profiler():
    """Copies, fills by the copy engine, annotations and what ran on the CPU are none."""
    cuda, cpu = torch.autograd.DeviceType.CUDA, torch.autograd.DeviceType.CPU
    names = ["conv_fprop_kernel", "void cudnn::winograd", "Memcpy DtoD (Device -> Device)", "Memset (Device)"]
    events = [SimpleNamespace(name=name, device_type=cuda) for name in names]
    events += [SimpleNamespace(name="ProfilerStep#1", device_type=cuda), SimpleNamespace(name="relu", device_type=cpu)]
    events.append(SimpleNamespace(name="mine", device_type=cuda, is_user_annotation=True))
    assert measuring.gpu_kernels(events) == 2
