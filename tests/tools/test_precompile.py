"""precompile() compiles what a model needs and nothing else, leaves the model alone, and says what it skipped."""

import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from beside import Beside
from checks.block_cases import SMALL
from inception_fused import (
    FusedInception,
    Inception,
    InceptionInputError,
    backend,
    convert_,
    inception,
    precompile,
    verify,
)
from inception_fused.conversion.fused_blocks import blocks_of
from inception_fused.op import operators, reasons
from inception_fused.runtime import replay
from inception_fused.runtime.launch import binary_key
from inception_fused.runtime.submit import record
from marks import full, more

module = sys.modules["inception_fused.tools.precompile"]
"""The package's attribute of this name is the function."""

X = torch.randn(2, 24, 5, 6, generator=torch.Generator().manual_seed(1))
PROCESSES = 4
ON_CPU = "x is on the CPU; kernels run on a CUDA device, or on a CPU under TRITON_INTERPRET=1"


@pytest.fixture
def planned(monkeypatch):
    """What was planned, in order."""
    calls = []
    for name in ("_planned_forward", "_planned_backward"):
        plan = getattr(operators, name)
        monkeypatch.setattr(operators, name, lambda *args, _n=name, _p=plan: (calls.append(_n), _p(*args))[1])
    return calls


def _afterwards(beside: Beside, folder: Path) -> dict:
    done = beside.run("tools/precompiled_launches.py", PROCESSES if beside.full else 1, TRITON_CACHE_DIR=str(folder))
    return json.loads(done.stdout)


BESIDE = {"afterwards": _afterwards}


@pytest.fixture(scope="module")
def afterwards(beside):
    """What precompiled_launches.py finds, in a process that compiles instead of interpreting."""
    return beside.result("afterwards")


@full
def test_processes_that_start_together_share_a_cache(afterwards):
    assert set(afterwards["exit codes"]) == {0}
    assert afterwards["broken"] == []
    assert (afterwards["inference"], afterwards["rewritten"]) == (3, False), "the last process found all of it"


def test_afterwards_nothing_is_compiled_loaded_or_planned(afterwards):
    assert afterwards["remembered"] == {"compiled": 0, "loaded": 0, "planned": 0}
    assert afterwards["expanded dy"] == {"compiled": 0, "loaded": 0, "planned": 1}
    assert afterwards["stem remembered"] == {"compiled": 0, "loaded": 0, "planned": 0}


def test_recorded_launches_are_not_run(afterwards):
    """Three times pack and two for inference and for training, eleven of the backward for either layout of dy."""
    assert afterwards["launches that ran"] == 3 * (3 + 3 + 2 * 11)
    assert re.fullmatch(r"14 binaries for 1 block in \d+\.\d s", afterwards["text"])
    assert afterwards["all"] == 14
    assert afterwards["binaries of the stem"] == 10


def test_launches_are_remembered(planned):
    model = nn.Sequential(nn.Conv2d(24, 24, 1), FusedInception(*SMALL))
    with backend("kernels"):
        found = precompile(model, X, progress=False)
        assert (found.binaries, found.blocks, found.skipped) == (0, ("1",), {}), "interpreted kernels have no binaries"
        planned.clear()
        x = model[0](X)
        y = model[1](x)
        torch.autograd.grad(y, (x, *model[1].parameters()), torch.ones_like(y))
        with torch.no_grad():
            model(X)
    assert planned == []


def test_without_backward(planned):
    with backend("kernels"):
        precompile(FusedInception(*SMALL), X, backward=False, progress=False)
    assert "_planned_backward" not in planned
    assert len(planned) == 2 + 2 * 2, "recorded once, planned twice, for inference and for training"


@pytest.mark.parametrize(
    ("model", "needs"),
    [
        (nn.Sequential(nn.Conv2d(24, 24, 1), FusedInception(*SMALL)), [True] * 13),
        more(nn.Sequential(FusedInception(*SMALL, bias=False)), [False] + [True] * 6 + [False] * 6),
        more(nn.Sequential(nn.Conv2d(24, 24, 1), FusedInception(*SMALL).requires_grad_(False)), [True] + [False] * 12),
    ],
    ids=["all", "first block, no bias", "frozen"],
)
def test_the_gradients_are_those_that_training_asks_for(model, needs, monkeypatch):
    seen, plan = [], operators._planned_backward
    monkeypatch.setattr(operators, "_planned_backward", lambda call: (seen.append(call.needs.flat), plan(call))[1])
    with backend("kernels"):
        precompile(model, X[:1], progress=False)
        model(X[:1]).sum().backward()
    assert seen
    assert all(some == needs for some in seen), "the last of them is training's own"


def test_a_frozen_model_needs_no_backward(planned):
    with backend("kernels"):
        precompile(FusedInception(*SMALL).requires_grad_(False), X, progress=False)
    assert planned == ["_planned_forward"] * 3


def test_under_autocast(planned):
    block = FusedInception(*SMALL)
    with backend("kernels"), torch.autocast("cpu", dtype=torch.bfloat16):
        precompile(block, X, backward=False, progress=False)
        planned.clear()
        with torch.no_grad():
            assert block(X).dtype == torch.bfloat16
    assert planned == []


def test_nothing_of_the_model_changes():
    model = nn.Sequential(nn.BatchNorm2d(24), nn.Dropout(), FusedInception(*SMALL), nn.BatchNorm2d(64)).train()
    model[2].p1_1.weight.grad = torch.ones_like(model[2].p1_1.weight)
    model[2].p4_2.weight.requires_grad_(False)
    before = {name: (t, t.clone(), t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()}
    modes, random, x = [m.training for m in model.modules()], torch.get_rng_state(), X.clone().requires_grad_()
    with backend("kernels"):
        precompile(model, x, progress=False)
    assert torch.equal(random, torch.get_rng_state())
    assert x.grad is None
    for name, t in model.state_dict(keep_vars=True).items():
        assert t is before[name][0]
        assert torch.equal(t, before[name][1])
        assert t.requires_grad == before[name][2]
        assert (t.grad is None) == (name != "2.p1_1.weight")
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert torch.is_grad_enabled()


class Several(nn.Module):
    """A block that is called, one that is not, one with a replaced child, and one that gets nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.idle, self.strange, self.empty = (FusedInception(*SMALL) for _ in range(4))
        self.strange.p4_1 = nn.AvgPool2d(3, stride=1, padding=1)

    def forward(self, x):
        return self.first(x), self.strange(x), self.empty(x[:0])


def test_what_is_skipped_and_why():
    with backend("kernels"):
        found = precompile(Several(), X, backward=False, progress=False)
    assert found.blocks == ("first",)
    assert found.skipped == {
        "idle": "model(x) did not call it",
        "strange": "p4_1 is an AvgPool2d, not a MaxPool2d, so it runs its own children: nothing to compile",
        "empty": "its input is empty",
    }
    assert "\nidle: skipped: model(x) did not call it\n" in str(found)


@pytest.mark.parametrize(
    ("wish", "why"),
    [
        (
            "auto",
            f"{ON_CPU} INCEPTION_FUSED_BACKEND=kernels: nothing to compile",
        ),
        ("eager", "backend is eager: nothing to compile"),
    ],
)
def test_a_block_that_no_kernel_runs(wish, why):
    with backend(wish):
        found = precompile(FusedInception(*SMALL), X, progress=False)
    assert (found.binaries, found.blocks, found.skipped) == (0, (), {"model": why})


def test_a_cpu_that_does_not_interpret_returns_whatever_is_demanded(monkeypatch):
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    with backend("kernels"):
        found = precompile(FusedInception(*SMALL), X, progress=False)
    assert found.skipped == {"model": f"{ON_CPU}: nothing to compile"}


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: precompile("net", X), "model: got str, wants an nn.Module"),
        (lambda: precompile(nn.Linear(2, 2), X), "model: got Linear without any FusedInception in it"),
        (lambda: precompile(FusedInception(*SMALL), [X]), "x: got list, wants a tensor"),
        (lambda: precompile(FusedInception(*SMALL), X[:, :7]), "x: got 7 channels"),
        (lambda: precompile(FusedInception(*SMALL), X, backward=1), "backward: got 1, wants True or False"),
        (lambda: precompile(FusedInception(*SMALL), X, threads=0), "threads: got 0, wants a positive number"),
        (lambda: precompile(FusedInception(*SMALL), X, threads=True), "threads: got True, wants a positive number"),
    ],
)
def test_wrong_calls(call, words):
    with pytest.raises(InceptionInputError, match=re.escape(words)):
        call()


def test_errors_of_the_compiler_are_collected():
    def fail():
        raise ValueError("PTX")

    errors = module.compile_together([lambda: 1, fail, lambda: 2, fail], 2)
    assert list(map(str, errors)) == ["PTX", "PTX"]
    assert module.compile_together([]) == []


def test_converted_blocks_are_blocks(planned):
    model = convert_(nn.Sequential(Inception(*SMALL)))
    assert list(blocks_of(model)) == ["0"]
    with backend("kernels"):
        found = precompile(model, X, progress=False)
    assert (found.blocks, found.skipped) == (("0",), {})
    assert planned
    with backend("kernels"):
        assert [row.path for row in verify(model, X, backward=False).rows] == ["interpreted"]


def test_a_wrapper_is_no_block():
    block = FusedInception(*SMALL)
    assert list(blocks_of(torch.compile(block))) == ["_orig_mod"]
    assert list(blocks_of(block)) == ["model"]


@pytest.mark.parametrize(("processes", "threads"), [(None, 6), ("4", 1), ("nonsense", 6), ("0", 6)])
def test_threads_are_shared_among_the_processes_of_a_machine(processes, threads, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: range(6), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert module.usual_threads() == threads


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    found = precompile(FusedInception(*SMALL), X)
    assert capsys.readouterr().err == ("" if terminal else f"inception_fused: {found}\n")
    assert module.compile_together([lambda: 1] * 3, 1, progress=True) == []
    assert ("compiling:" in capsys.readouterr().err) == terminal
    precompile(FusedInception(*SMALL), X, progress=False)
    assert capsys.readouterr().err == ""


def test_an_operand_off_a_16_byte_boundary_makes_another_binary():
    """Triton takes the boundary for granted where it sees one."""
    block = FusedInception(*SMALL)

    def keys(bias):
        params = block.params()
        params = params._replace(biases=(bias, *params.biases[1:]))
        with backend("kernels"), record() as launches, torch.no_grad():
            inception(X, params)
        return {binary_key(launch) for launch in launches}

    assert keys(torch.zeros(16)) == keys(torch.ones(32)[16:])
    assert len(keys(torch.zeros(16)) - keys(torch.zeros(17)[1:])) == 1


def test_a_launch_that_waits_holds_no_memory():
    aligned, shifted = torch.zeros(4), torch.zeros(5)[1:]
    found = module._without_memory((aligned, (shifted, None), 3))
    assert found[0].is_meta
    assert found[0].dtype == aligned.dtype
    assert found[1][0] is shifted
    assert found[1:] == ((shifted, None), 3)


def test_a_kernel_that_does_not_compile_is_named():
    class Bad(SimpleNamespace):
        def _replace(self, **_):
            return self

        def compile(self):
            raise ValueError("PTX")

        def describe(self):
            return "pool_proj_kernel"

    kernel = SimpleNamespace(fn=SimpleNamespace(__name__="k"))
    _, compiler = module._compiler(Bad(kernel=kernel, args=(), constexprs={}, tile=()), torch.device("cpu"))
    assert str(module.compile_together([compiler])[0]) == "pool_proj_kernel: ValueError: PTX"


def test_replay_is_what_remembers():
    """The number of runs after which a kind is known."""
    replay.forget()
    block = FusedInception(*SMALL).requires_grad_(False)
    with backend("kernels"):
        precompile(block, X, progress=False)
    assert [type(recipe) for recipe in replay._recipes.values()] == [replay.Recipe]
