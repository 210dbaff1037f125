"""The training script under torchrun: what is printed when, how a run of several ranks ends, and that it goes on."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from marks import full
from train_fakes import ARGUMENTS, CHECKPOINT, FILES, assert_whole
from training.checkpoints import CHECKPOINT_NAME, read_checkpoint

SCRIPT = Path(__file__).with_name("train_ranks.py")
TIMEOUT = 120
"""Seconds after which a run counts as one that hangs; the longest takes ten on an idle machine."""

SECOND_EPOCH = """
from training.loop import Trainer
import os, signal, time, torch
step = Trainer._step
def stepped(self, index):
    if self.epoch == 1 and len(index) == 8:
        fault(self)
    return step(self, index)
Trainer._step = stepped
"""
"""The beginning of a SETUP that defines a fault, which every step of eight images in the second epoch calls."""


class Ended(NamedTuple):
    """A run that has ended.

    status: torchrun's.
    statuses: of the ranks that have ended by themselves.
    out: stdout.
    said: the script's lines on stderr, without its name.
    err: all of stderr, torchrun's report included.
    """

    status: int
    statuses: dict[int, int]
    out: str
    said: list[str]
    err: str


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def start(*arguments: str, ranks: int = 2, setup: str = "") -> subprocess.Popen:
    """torchrun, on a free port."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "OMP_NUM_THREADS": "1",
        "SETUP": setup,
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*torchrun, str(SCRIPT), *(arguments or ARGUMENTS)], env=environment, **pipes)


def end(run: subprocess.Popen) -> Ended:
    try:
        out, err = run.communicate(timeout=TIMEOUT)
    finally:
        run.kill()
    files = {int(path.suffix[1:]): path for path in Path().glob("status.*")}
    statuses = {rank: int(path.read_text()) for rank, path in sorted(files.items())}
    for path in files.values():
        path.unlink()
    name = "train_googlenet.py: "
    said = [line.removeprefix(name) for line in err.splitlines() if line.startswith(name)]
    return Ended(run.returncode, statuses, out, said, err)


def torchrun(*arguments: str, ranks: int = 2, setup: str = "") -> Ended:
    return end(start(*arguments, ranks=ranks, setup=setup))


def root_cause(run: Ended) -> str:
    """The last part of torchrun's report."""
    return run.err.partition("Root Cause")[2]


def assert_goes_on(sentence: str, epoch: int, ranks: int = 2) -> None:
    """The sentence's epoch is on the disk, its command ends the run, as one without a fault ends."""
    assert f"; epoch {epoch} of 2 is saved; " in sentence
    assert read_checkpoint(CHECKPOINT).state["epoch"] == epoch
    assert_whole(CHECKPOINT_NAME)
    command = shlex.split(sentence.partition("go on with: ")[2])
    assert command[:4] == ["torchrun", "--nproc-per-node", str(ranks), str(SCRIPT)]
    again = torchrun(*command[4:], ranks=ranks)
    assert (again.status, again.statuses) == (0, dict.fromkeys(range(ranks), 0))
    assert f"resumed after epoch {epoch} of 2\n" in again.out
    assert_whole(*FILES)
    assert [row["epoch"] for row in read_checkpoint(CHECKPOINT).state["history"]] == [1, 2]


def without_times(state: dict) -> list[dict]:
    return [row | {"images_per_second": 0, "seconds": 0} for row in state["history"]]


def test_rank_0_alone_prints_and_a_killed_rank_costs_an_epoch():
    """SIGKILL, of which the rank can say nothing; the resumed run equals the one that was not killed."""
    whole = torchrun(*ARGUMENTS[:-1], "whole")
    assert (whole.status, whole.statuses, whole.said) == (0, {0: 0, 1: 0}, [])
    for line in ("layer  output\n", "2 ranks, each on CPU with 1 threads\n", "\nwritten: ", "\nfinal test accuracy "):
        assert whole.out.count(line) == 1
    assert whole.out.count("\nepoch ") == 2
    assert {path.name for path in Path("whole").iterdir()} == set(FILES)

    # Rank 0 learns of it by torchrun's SIGTERM, which may not be taken for one to all.
    fault = "def fault(self): os.kill(os.getpid(), signal.SIGKILL) if rank == 1 else time.sleep(60)"
    killed = torchrun(setup=SECOND_EPOCH + fault)
    assert (killed.status, killed.statuses) == (1, {0: 1})
    assert killed.out.count("\nepoch ") == 1
    assert len(killed.said) == 1
    assert killed.said[0].startswith("rank 1 has ended; epoch 1 of 2 is saved; go on with: torchrun ")
    assert "SIGKILL" in root_cause(killed)
    assert_goes_on(killed.said[0], 1)
    ours, theirs = (read_checkpoint(Path(out, CHECKPOINT_NAME)).state for out in ("o", "whole"))
    assert without_times(ours) == without_times(theirs)
    assert all(torch.equal(value, theirs["model"][name]) for name, value in ours["model"].items())


def test_no_memory_on_one_rank():
    fault = 'torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")'
    run = torchrun(setup=SECOND_EPOCH + f"def fault(self):\n    if rank == 1: raise {fault}")
    assert (run.status, run.statuses) == (1, {0: 1, 1: 1})
    own, others = sorted(run.said, key=lambda line: "out of memory" not in line)
    assert own.startswith("rank 1: error: out of memory (tried to allocate 2.00 GiB); epoch 1 of 2 is saved; free ")
    assert "; free memory, or train anew with a --batch-size below 8; go on with: torchrun --nproc-per-node 2 " in own
    assert others.startswith("rank 1 has ended; epoch 1 of 2 is saved; go on with: torchrun --nproc-per-node 2 ")
    assert own.partition("go on with: ")[2] == others.partition("go on with: ")[2]
    assert "rank      : 1 (local_rank: 1)" in root_cause(run)
    assert "traceback : rank 1: error: out of memory (tried to allocate 2.00 GiB); epoch 1" in root_cause(run)
    assert_whole(CHECKPOINT_NAME)
    assert read_checkpoint(CHECKPOINT).state["epoch"] == 1


def test_a_full_disk_on_rank_0():
    setup = """
import errno, os
replace = os.replace
def full(source, target):
    if target.name == "checkpoint.pt" and target.exists():
        raise OSError(errno.ENOSPC, "No space left on device")
    replace(source, target)
os.replace = full
"""
    run = torchrun(setup=setup)
    assert (run.status, run.statuses) == (1, {0: 1, 1: 1})
    assert len(run.said) == 1
    wanted = "rank 0: error: o/checkpoint.pt cannot be written (No space left on device); epoch 1 of 2 is saved; make "
    assert run.said[0].startswith(wanted)
    assert "rank      : 0 (local_rank: 0)" in root_cause(run)
    assert_whole(CHECKPOINT_NAME)
    assert read_checkpoint(CHECKPOINT).state["epoch"] == 1


def signalled(setup: str, signum: int) -> Ended:
    """A run whose torchrun gets a signal in the second epoch."""
    run = start(setup=SECOND_EPOCH + setup)
    with contextlib.ExitStack() as stack:
        stack.callback(run.kill)
        while not (line := run.stdout.readline()).startswith("epoch "):
            assert line, run.stderr.read()
        run.send_signal(signum)
        return end(run)


@pytest.mark.parametrize("name", ["SIGTERM", pytest.param("SIGINT", marks=full)])
def test_a_signal_to_all(name):
    signum = getattr(signal, name)
    run = signalled("def fault(self): time.sleep(60)", signum)
    assert run.status != 0
    assert run.statuses == {0: 128 + signum, 1: 128 + signum}
    what = "interrupted" if name == "SIGINT" else "ended by SIGTERM"
    assert len(run.said) == 1
    assert run.said[0].startswith(f"{what}; epoch 1 of 2 is saved; go on with: torchrun --nproc-per-node 2 ")


def test_a_signal_to_ranks_that_wait_inside_a_collective():
    """No handler of Python's runs there."""
    setup = "def fault(self):\n    import training.endings as e; e.PATIENCE = 0.5\n"
    setup += "    torch.distributed.recv(torch.zeros(1), src=1 - rank)"
    run = signalled(setup, signal.SIGTERM)
    assert run.statuses == {0: 143, 1: 143}
    assert len(run.said) == 1
    assert run.said[0].startswith("ended by SIGTERM; epoch 1 of 2 is saved; go on with: torchrun ")


@full
def test_a_signal_to_one_rank():
    run = torchrun(setup=SECOND_EPOCH + "def fault(self): rank == 1 and os.kill(os.getpid(), signal.SIGTERM)")
    assert (run.status, run.statuses) == (1, {0: 1, 1: 143})
    own, others = sorted(run.said, key=lambda line: "rank 1: " not in line)
    assert own.startswith("rank 1: ended by SIGTERM; epoch 1 of 2 is saved; go on with: torchrun ")
    assert others.startswith("rank 1 has ended; epoch 1 of 2 is saved; go on with: torchrun ")


def test_an_error_of_the_program_keeps_its_traceback():
    run = torchrun(setup=SECOND_EPOCH + "def fault(self):\n    if rank == 1: raise KeyError('a bug')")
    assert (run.status, run.statuses) == (1, {0: 1, 1: 1})
    assert [line.partition(";")[0] for line in run.said] == ["rank 1 has ended"]
    assert "\nKeyError: 'a bug'\n" in run.err.partition("Root Cause")[0]
    assert "KeyError: 'a bug'" in root_cause(run)
    assert "in fault" in root_cause(run)


def test_a_wrong_call_is_refused_once():
    run = torchrun("--device", "cuda:1", "--out", "o")
    assert (run.status, run.statuses) == (1, {0: 2, 1: 2})
    assert run.said == ["error: --device cuda:1: is one GPU for 2 ranks; leave :1 out"]


@full
def test_other_wrong_calls_are_refused_once():
    Path("file").touch()
    for arguments, message in (
        (("--epochs", "0"), "error: argument --epochs: got '0', wants a whole number from 1 to 10000"),
        (("--device", "cpu", "--out", "file"), "error: --out file: cannot be made or written (File exists); name "),
        (("--device", "cpu", "--resume", "none.pt"), "error: none.pt: no such file; wants the checkpoint.pt in the "),
        (("--device", "cpu", "--preset", "seed"), "error: data/FashionMNIST/raw/train-images-idx3-ubyte[.gz]: not "),
    ):
        run = torchrun(*arguments)
        assert (run.statuses, len(run.said)) == ({0: 2, 1: 2}, 1)
        assert run.said[0].startswith(message)
    helped = torchrun("--help")
    assert (helped.status, helped.statuses, helped.out.count("usage: ")) == (0, {0: 0, 1: 0}, 1)


@full
def test_a_killed_rank_0_leaves_the_sentence_to_the_next():
    setup = SECOND_EPOCH + "def fault(self): rank == 0 and os.kill(os.getpid(), signal.SIGKILL)"
    run = torchrun(setup=setup, ranks=3)
    assert run.statuses == {1: 1, 2: 1}
    assert len(run.said) == 1
    assert run.said[0].startswith("rank 0 has ended; epoch 1 of 2 is saved; go on with: torchrun --nproc-per-node 3 ")
    assert_goes_on(run.said[0], 1, ranks=3)


@full
def test_a_loss_that_is_not_finite():
    setup = SECOND_EPOCH + "def fault(self): self.model[-1].bias.data.fill_(float('nan'))"
    run = torchrun(setup=setup)
    assert (run.status, run.statuses) == (1, {0: 1, 1: 1})
    assert [re.sub(r"; train .*", "", line) for line in run.said] == ["error: epoch 2: the loss is nan"]
