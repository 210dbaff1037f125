"""A training run that is ended by a signal, or as a process of its own: whole files, one sentence, an exit status."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import train_googlenet
from marks import full, more
from train_fakes import (
    ARGUMENTS,
    CHECKPOINT,
    FILES,
    assert_resumable,
    assert_whole,
    raised,
    restored,
    send,
    sentence,
)
from training import checkpoints, faults
from training.checkpoints import CHECKPOINT_NAME
from training.loop import Trainer


@pytest.fixture(autouse=True)
def handlers():
    """Signals that reach the caller's handlers fail the test instead of ending the suite; they are back after a run."""

    def missed(signum: int, frame: object) -> None:
        raise AssertionError(f"signal {signum} reached the caller")

    signums = [getattr(signal, name) for name in faults.SIGNALS]
    before = [signal.signal(signum, missed) for signum in signums]
    yield missed
    after = [signal.signal(signum, handler) for signum, handler in zip(signums, before, strict=True)]
    assert after == [missed] * len(signums)


@pytest.mark.parametrize("name", faults.SIGNALS)
def test_a_signal_in_an_epoch(train, second_epoch, capsys, tiny, name):
    signum = getattr(signal, name)
    second_epoch(send(signum))
    assert train() == 128 + signum
    said = sentence(capsys)
    assert ("interrupted; " if name == "SIGINT" else f"ended by {name}; ") in said
    assert_resumable(said, 1, train, tiny)


@pytest.mark.parametrize("times", [1, 2, 3])
def test_signals_while_a_checkpoint_is_written(train, monkeypatch, capsys, tiny, times):
    """The first waits for the end, the second breaks the writing off, another is too late to change anything."""
    fsync = os.fsync

    def signalled(descriptor: int) -> None:
        if CHECKPOINT.exists():
            for _ in range(min(times, 2)):
                send(signal.SIGTERM)()
        fsync(descriptor)

    unlink = Path.unlink

    def unlinked(self: Path, **kwargs: bool) -> None:
        if self.suffix == ".part":
            send(signal.SIGTERM)()
        unlink(self, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", signalled)
        if times == 3:
            patch.setattr(Path, "unlink", unlinked)
        assert train() == 143
    said = sentence(capsys)
    assert "ended by SIGTERM; " in said
    assert_whole(CHECKPOINT_NAME)
    assert_resumable(said, 2 if times == 1 else 1, train, tiny)


def test_a_signal_while_the_results_are_written_waits(train, monkeypatch, capsys):
    draw = train_googlenet.draw_curve
    monkeypatch.setattr(train_googlenet, "draw_curve", lambda *args: (send(signal.SIGTERM)(), draw(*args)))
    assert train() == 143
    assert "; epoch 2 of 2 is saved; " in sentence(capsys)
    assert_whole(*FILES)


def test_a_signal_while_another_fault_is_reported(train, second_epoch, monkeypatch, capsys):
    second_epoch(raised(MemoryError()))
    describe = faults.describe
    left = [signal.SIGINT]

    def interrupted(error: BaseException) -> str | None:
        if left:
            send(left.pop())()
        return describe(error)

    monkeypatch.setattr(faults, "describe", interrupted)
    assert train() == 130
    assert "interrupted; epoch 1 of 2 is saved; go on with: " in sentence(capsys)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_signal_that_a_finalizer_swallows_ends_the_next_step(train, second_epoch, monkeypatch, capsys):
    class Finalized:
        def __del__(self) -> None:
            send(signal.SIGTERM)()

    second_epoch(Finalized)
    step, steps = Trainer._step, []
    monkeypatch.setattr(Trainer, "_step", lambda self, index: (steps.append(self.epoch), step(self, index))[1])
    assert train() == 143
    assert steps == [0, 0, 0, 1]
    assert "epoch 1 of 2 is saved; " in sentence(capsys)


def test_a_signal_before_the_first_epoch(train, monkeypatch, capsys):
    monkeypatch.setattr(train_googlenet, "shape_table", lambda *_: send(signal.SIGTERM)())
    assert train() == 143
    assert sentence(capsys).endswith("ended by SIGTERM; nothing was trained")


def test_a_signal_that_is_ignored_stays_ignored(train, second_epoch, handlers):
    """As nohup asks for."""
    second_epoch(send(signal.SIGHUP))
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert train() == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, handlers)


def process(setup: str = "", **options: object) -> subprocess.Popen:
    """The command line in a process of its own, on one thread; setup runs after the imports."""
    small = "import train_fakes; from training import loop; loop.build_model = train_fakes.small_model"
    command = [sys.executable, "-c", f"{small}\n{setup}\ntrain_fakes.main()", *ARGUMENTS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONUNBUFFERED", None)  # a stream that holds nothing back hides what its end would say
    return subprocess.Popen(command, env=environment, text=True, **options)


def test_sigterm_from_outside(train, tiny):
    endless = "from training.loop import Trainer; import time; s = Trainer._step\n"
    endless += "Trainer._step = lambda self, i: (time.sleep(60 * self.epoch), s(self, i))[1]"
    with process(endless, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        while not run.stdout.readline().startswith("epoch "):
            assert run.poll() is None
        run.terminate()
        error = run.stderr.read()
    assert run.returncode == 143
    assert error.startswith("train_googlenet.py: ended by SIGTERM; epoch 1 of 2 is saved; go on with: python -c ")
    assert error.count("\n") == 1
    assert_resumable(error[:-1].replace("python -c", "python python/train_googlenet.py"), 1, train, tiny)


@pytest.mark.parametrize("both", [False, more(True)], ids=["stdout", "stdout and stderr"])
def test_a_reader_that_goes(train, tiny, both):
    """As with ``| head -1`` and ``2>&1 | head -1``: Python itself may not complain at its end either."""
    stderr = subprocess.STDOUT if both else subprocess.PIPE
    setup = "import sys; T = loop.Trainer; T.run_epoch = lambda self, f=T.run_epoch: (sys.stdin.read(), f(self))[1]"
    with process(setup, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as run:
        while " training and " not in run.stdout.readline():
            assert run.poll() is None
        run.stdout.close()
        run.stdin.close()
        error = None if both else run.stderr.read()
    assert run.returncode == 141
    assert checkpoints.read_checkpoint(CHECKPOINT).state["epoch"] == 1
    assert_whole(CHECKPOINT_NAME)
    if not both:
        assert error.startswith("train_googlenet.py: error: stdout cannot be written (Broken pipe); epoch 1 of 2 is ")
        assert error.count("\n") == 1


@full
def test_without_any_output(train, tiny):
    """As with ``>&- 2>&-``: no file that is opened may get the descriptor of stderr."""
    setup = "import os; f = os.fsync; os.fsync = lambda fd: (os.write(2, b'a library speaks'), f(fd))"
    with process(setup, preexec_fn=lambda: (os.close(1), os.close(2))) as run:
        pass
    assert run.returncode == 0
    assert restored(CHECKPOINT, tiny).epoch == 2
    assert b"speaks" not in Path("o/history.json").read_bytes()


@full
def test_memory_that_is_really_short(train, tiny):
    """An address space that has no room for one more batch, from the second epoch on."""
    setup = """
import resource
from training.loop import Trainer
run = Trainer.run_epoch
def short(self):
    if self.epoch == 1:
        pages = int(open("/proc/self/statm").read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (64 << 20), -1))
        self.recipe = train_fakes.dataclasses.replace(self.recipe, image_size=4096)
    return run(self)
Trainer.run_epoch = short
"""
    with process(setup, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as run:
        error = run.stderr.read()
    assert run.returncode == 1
    assert "error: out of memory (tried to allocate 536870912 bytes); epoch 1 of 2 is saved; free memory, or " in error
    assert error.count("\n") == 1
    assert_whole(CHECKPOINT_NAME)
