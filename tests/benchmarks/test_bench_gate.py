"""A wrong implementation is refused before it is timed, and leaves no figure behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.cases import runner
from benchmarks.cases.baselines import LAYOUTS
from benchmarks.cases.records import FIELDS, load
from benchmarks.cases.runner import SETTLED, Bench, NotMeasuredError
from benchmarks.cases.suite import Case
from inception_fused import GOOGLENET_BLOCKS, InceptionConfig
from inception_fused.conversion import api
from inception_fused.modules.stem import FusedStem
from inception_fused.op import launcher
from inception_fused.runtime import replay
from inception_fused.tools.timing import HostStopwatch
from marks import full, more

ROOT = Path(__file__).resolve().parents[2]
BLOCK_5B = GOOGLENET_BLOCKS["5b"]
TINY = InceptionConfig(16, 8, (8, 16), (8, 16), 8)
CASE = Case("block", "5b", 96, 2, "fp32", "training", "ours")


class Untouched(HostStopwatch):
    """Fails the test that has it run; synchronising is no timing."""

    def device(self, call, calls, lead_us=0.0):
        pytest.fail("timed something that it should have refused")

    host = device


@pytest.fixture(autouse=True)
def _tiny_block(monkeypatch):
    monkeypatch.setitem(GOOGLENET_BLOCKS, "5b", TINY)


def interpreted(stopwatch=None):
    """Our kernels in Triton's interpreter, demanded as on a GPU."""
    return Bench("cpu", stopwatch=stopwatch or Untouched(), backend="kernels", seconds=0.0, least=1)


def spoil(monkeypatch, kernel, slice_at, damage):
    """The kernel's launcher runs, then ``damage`` changes the rows of the slice it wrote."""
    function_of = launcher.function_of

    def spoilt(launched, implementation):
        run = function_of(launched, implementation)
        if launched.name != kernel:
            return run

        def launch(*args, **kwargs):
            run(*args, **kwargs)
            damage(args[slice_at].rows(kwargs["gemm_m"]))

        return launch

    monkeypatch.setattr(launcher, "function_of", spoilt)


@pytest.mark.parametrize("mode", ["forward", more("training")])
def test_the_kernels_as_they_are_pass_and_are_timed(mode):
    calls = []
    record = interpreted(HostStopwatch()).run(replace(CASE, mode=mode), calls.append)
    assert (record.subject, record.mode, record.implementation, record.device) == ("5b", mode, "ours", "cpu")
    assert record.device_us > 0
    assert len(calls) == 1
    assert (record.host_us, record.x_floor, record.peak_bytes) == (None, None, None)


@pytest.mark.parametrize(
    ("kernel", "slice_at", "damage", "message"),
    [
        more("K2", 2, lambda rows: rows.mul_(1.01), "the output, branch 4, is 0.01 off"),
        ("K3", 2, lambda rows: rows[-1].fill_(float("nan")), "the output, branch 2, is nan off"),
        ("B3", 4, lambda rows: rows.mul_(1.1), "gradient 1 is 0.1 off"),
    ],
)
def test_a_wrong_launcher_is_refused(monkeypatch, kernel, slice_at, damage, message):
    spoil(monkeypatch, kernel, slice_at, damage)
    with launcher.apart(), pytest.raises(AssertionError, match=message):
        interpreted().run(CASE, pytest.fail)


def test_a_graph_that_leaves_its_outputs_alone_is_refused(monkeypatch):
    """Its first call was right; the replay is what counts."""
    from benchmarks.cases import runner

    monkeypatch.setattr(runner, "graphed", lambda call: (lambda: None, call()))
    with pytest.raises(AssertionError, match="branch 1, is nan off"):
        Bench("cpu", stopwatch=Untouched()).run(replace(CASE, implementation="ours_graph"), pytest.fail)


def test_launches_from_memory_are_what_is_judged(monkeypatch):
    """The timed calls repeat launches from memory, which a first call does not."""
    remembered = replay.Recipe.run

    def wrong(self, inputs, addresses):
        outputs = remembered(self, inputs, addresses)
        outputs[0][:, 0] *= 2
        return outputs

    monkeypatch.setattr(replay.Recipe, "run", wrong)
    with pytest.raises(AssertionError, match="branch 1, is"):
        interpreted().run(CASE, pytest.fail)


@pytest.mark.parametrize("name", ["compile", "compile_reduce_overhead", "compile_max_autotune"])
def test_a_wrong_baseline_is_refused_too_and_compiled_as_it_should_be(monkeypatch, name):
    asked, steps = [], []

    def compile(module, **options):
        asked.append(options)
        module.register_forward_hook(lambda _, __, y: y * 1.01)
        return module

    monkeypatch.setattr(torch, "compile", compile)
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: steps.append(1))
    with pytest.raises(AssertionError, match="branch 1, is 0.01 off"):
        Bench("cpu", stopwatch=Untouched()).run(replace(CASE, mode="forward", implementation=name), pytest.fail)
    mode = {"compile_reduce_overhead": "reduce-overhead", "compile_max_autotune": "max-autotune"}.get(name, "default")
    assert asked == [{"dynamic": False, "fullgraph": True, "mode": mode}]
    assert len(steps) == (SETTLED if mode != "default" else 0)


def test_a_network_with_one_wrong_block_is_refused(monkeypatch):
    """22 layers blur an error; one block that gives half of what it should is still seen in the logits."""
    from inception_fused import FusedInception

    original = FusedInception.forward
    broken = GOOGLENET_BLOCKS["4c"].c2[1]
    monkeypatch.setattr(
        FusedInception,
        "forward",
        lambda self, x: original(self, x) * (0.9 if self.p2_2.out_channels == broken else 1.0),
    )
    monkeypatch.setitem(GOOGLENET_BLOCKS, "5b", BLOCK_5B)
    case = Case("network", "googlenet", 32, 1, "fp32", "forward", "ours")
    with pytest.raises(AssertionError, match="the output is"):
        Bench("cpu", stopwatch=Untouched()).run(case, pytest.fail)


@pytest.mark.parametrize(
    ("kernel", "slice_at", "damage", "message"),
    [
        (None, None, None, None),
        ("K3", 2, lambda rows: rows[:, 5].zero_(), "the stem of googlenet@32-1-fp32-training-ours: the output is"),
        more("K4", 2, lambda rows: rows.mul_(1.05), "the output is"),
        ("B2", 3, lambda rows: rows.mul_(1.2), "gradient 1 is 0.44 off"),
    ],
    ids=str,
)
def test_a_wrong_stem_is_refused(kernel, slice_at, damage, message, monkeypatch):
    case = Case("network", "googlenet", 32, 1, "fp32", "training", "ours")
    if kernel is None:
        runner.assert_stem_agrees(case, "cpu")
        return
    spoil(monkeypatch, kernel, slice_at, damage)
    with launcher.apart(), pytest.raises(AssertionError, match=message):
        runner.assert_stem_agrees(case, "cpu")


def test_our_blocks_are_measured_with_pytorchs_stem(monkeypatch):
    monkeypatch.setitem(GOOGLENET_BLOCKS, "5b", BLOCK_5B)
    case, timed = Case("network", "googlenet", 32, 1, "fp32", "forward", "ours_blocks"), []
    record = Bench("cpu", seconds=0.001, least=1).run(case, timed.append)
    assert (record.implementation, record.subject, len(timed)) == ("ours_blocks", "googlenet", 1)
    original = FusedStem.forward
    monkeypatch.setattr(FusedStem, "forward", lambda self, x: 1.5 * original(self, x))
    Bench("cpu", seconds=0.001, least=1).run(case, timed.append)
    with pytest.raises(AssertionError, match="the output is"):
        Bench("cpu", stopwatch=Untouched()).run(replace(case, implementation="ours"), pytest.fail)


@pytest.mark.parametrize("mode", ["forward", "training"])
def test_a_block_of_two_windows_is_measured_and_a_wrong_one_refused(mode, monkeypatch):
    from inception_fused import FusedInception

    case, timed = Case("two-3x3", "3a", 32, 2, "fp32", mode, "ours"), []
    found = Bench("cpu", seconds=0.001, least=1).run(case, timed.append)
    assert (found.suite, found.subject, found.size, len(timed)) == ("two-3x3", "3a", 4, 1)
    original = FusedInception.forward

    def spoilt(self, x):
        y = original(self, x)
        # The first of branch 3's 32 channels.
        return y * (torch.arange(y.shape[1]) != 64 + 128)[:, None, None]

    monkeypatch.setattr(FusedInception, "forward", spoilt)
    with pytest.raises(AssertionError, match="the output, branch 3, is"):
        Bench("cpu", stopwatch=Untouched()).run(case, pytest.fail)


@pytest.mark.parametrize("name", ["ours", "eager"])
def test_a_block_with_batch_norm_is_measured(name):
    case, timed = Case("batch-norm", "3a", 32, 2, "fp32", "training", name), []
    found = Bench("cpu", seconds=0.001, least=1).run(case, timed.append)
    assert (found.suite, found.subject, found.size, len(timed)) == ("batch-norm", "3a", 4, 1)


def test_a_wrong_gradient_behind_batch_norm_is_refused(monkeypatch):
    from benchmarks.cases import runner

    case = Case("batch-norm", "3a", 32, 2, "fp32", "training", "ours")
    original = runner.batch_norm_block

    def spoilt(*config, fused, **options):
        block = original(*config, fused=fused, **options)
        if fused:
            block.branch2[0][1].weight.register_hook(lambda grad: 1.2 * grad)
        return block

    monkeypatch.setattr(runner, "batch_norm_block", spoilt)
    with pytest.raises(AssertionError, match=r"gradient \d+ is 0\.2 off"):
        Bench("cpu", stopwatch=Untouched()).run(case, pytest.fail)


@full
@pytest.mark.parametrize("name", ["torchvision", "cifar"])
def test_a_converted_network_is_measured_and_a_wrong_block_of_it_refused(name, monkeypatch):
    monkeypatch.setitem(GOOGLENET_BLOCKS, "5b", BLOCK_5B)
    case, timed = Case(name, name, 32, 2, "fp32", "forward", "ours"), []
    Bench("cpu", seconds=0.001, least=1).run(case, timed.append)
    assert len(timed) == 1
    original = api.adopt

    def without_activation(module, roles, activation, **rest):
        original(module, roles, None if module.branch1[0].out_channels == 160 else activation, **rest)

    monkeypatch.setattr(api, "adopt", without_activation)
    with pytest.raises(AssertionError, match="the output is"):
        Bench("cpu", stopwatch=Untouched()).run(case, pytest.fail)


def test_what_cannot_be_measured_says_why(monkeypatch):
    bench = Bench("cpu", stopwatch=Untouched())

    def allocate(case):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB\nmore")

    monkeypatch.setattr(bench, "gated", allocate)
    with pytest.raises(NotMeasuredError, match="^out of memory: CUDA out of memory. Tried to allocate 9 GiB$"):
        bench.run(CASE, pytest.fail)
    monkeypatch.setattr(bench, "device", "cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (1 << 28, 1 << 34))
    with pytest.raises(NotMeasuredError, match=r"^needs about 1\.0 GiB, 0\.2 GiB are free$"):
        bench.run(CASE, pytest.fail)


PLUGIN = """
import os
import inception_fused
from inception_fused.tools import timing

original, device = inception_fused.FusedInception.forward, timing.HostStopwatch.device

def forward(self, x):
    y = original(self, x)
    if y.requires_grad:
        y.register_hook(lambda gradient: gradient * 1.2)
    elif x.shape[1] == 192:
        y = y.clone()
        y[:, :8] *= 1.5
    else:
        y = y.clone()
        y[-1, -1] = float("nan")
    return y

def logged(self, call, calls, lead_us=0.0):
    with open(os.environ["STOPWATCH_LOG"], "a") as log:
        log.write(os.environ["PYTEST_CURRENT_TEST"] + "\\n")
    return device(self, call, calls, lead_us)

inception_fused.FusedInception.forward, timing.HostStopwatch.device = forward, logged
"""


def test_the_command_fails_on_wrong_kernels_and_its_json_has_no_figure_of_theirs(tmp_path):
    """A slice, a gradient and a NaN, by the command that a user types; eager beside them is measured."""
    if torch.cuda.is_available():
        pytest.skip("measures the cases of a machine without a GPU")
    (tmp_path / "spoilt_kernels.py").write_text(PLUGIN)
    cases = [f"3a@96-1-fp32-{what}" for what in ("forward-eager", "forward-ours", "training-ours")]
    cases.append("5b@96-1-fp32-forward-ours")
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT), *filter(None, sys.path)]),
        "STOPWATCH_LOG": str(tmp_path / "log"),
    }
    out = tmp_path / "found.json"
    command = f"-m pytest -p spoilt_kernels -p no:cacheprovider --benchmark-only --benchmark-json={out}".split()
    nodes = [f"benchmarks/test_blocks.py::test_block[{case}]" for case in cases]
    done = subprocess.run(
        [sys.executable, *command, *nodes], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "3 failed, 1 passed" in done.stdout
    for message in ("the output, branch 1, is", "gradient 1 is 0.2 off", "the output, branch 4, is nan off"):
        assert message in done.stdout
    timed = (tmp_path / "log").read_text().splitlines()
    assert timed
    assert all("3a@96-1-fp32-forward-eager" in line for line in timed)
    entries = json.loads(out.read_text())["benchmarks"]
    assert [entry["name"] for entry in entries] == ["test_block[3a@96-1-fp32-forward-eager]"]
    assert set(FIELDS) <= set(entries[0]["extra_info"])
    (record,) = load(out)
    assert (record.implementation, record.x_eager, record.x_compile) == ("eager", None, None)
    assert "say nothing about the kernels" in done.stdout
    assert "no CUDA device, so this measures the CPU path" in done.stdout


@pytest.mark.parametrize(("implementation", "weights"), [("ours", "channels_last"), ("eager_nchw", "KCRS")])
def test_a_record_says_which_weights_were_timed(implementation, weights, monkeypatch):
    built = []
    original = runner.module_of

    def module_of(*args, **how):
        built.append(original(*args, **how))
        return built[-1]

    monkeypatch.setattr(runner, "module_of", module_of)
    case = Case("kernelbench6", "4a", 5, 1, "fp32", "forward", implementation)
    found = Bench("cpu", seconds=0.001, least=1).run(case, lambda _: None)
    assert found.weights == weights
    assert built[-1].p2_2.weight.is_contiguous(memory_format=LAYOUTS[weights])
