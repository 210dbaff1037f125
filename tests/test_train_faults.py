"""What ends a training run from outside: one sentence, whole files, and resuming as if nothing had happened."""

from __future__ import annotations

import errno
import io
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faults
import pytest
import torch
import train_googlenet
import training
from curve import store_figure
from datasets import Dataset
from matplotlib.figure import Figure
from torch import nn
from train_fakes import CPU, assert_same_run
from training import CHECKPOINT_NAME, Recipe, Trainer

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
ARGUMENTS = ("--device", "cpu", "--epochs", "2", "--batch-size", "8", "--out", "o")
FILES = (CHECKPOINT_NAME, "weights.pt", "history.json", "curve.png")
CHECKPOINT = Path("o", CHECKPOINT_NAME)


def small_model(recipe: Recipe, dataset: Dataset) -> nn.Module:
    torch.manual_seed(recipe.seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(recipe.image_size**2, 8), nn.Dropout(), nn.Linear(8, 10))


@pytest.fixture
def train(cli, monkeypatch):
    """The command line, with a network of two layers, whose run is a matter of milliseconds."""
    monkeypatch.setattr(training, "build_model", small_model)
    monkeypatch.setattr(train_googlenet, "shape_table", lambda *_: "layer  output")
    monkeypatch.setattr(train_googlenet, "draw_curve", lambda *args: store_figure(Figure(), args[-1]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more of them only wait for one another in so small a network
    yield lambda *args: cli(*(args or ARGUMENTS))
    torch.set_num_threads(threads)


@pytest.fixture
def second_epoch(monkeypatch):
    """Call a function in the middle of the second epoch, once."""
    step = Trainer._step

    def arrange(fault: Callable[[], object]) -> None:
        left = [fault]

        def stepped(self: Trainer, index: torch.Tensor):
            if self.epoch == 1 and len(index) == 8 and left:
                left.pop()()
            return step(self, index)

        monkeypatch.setattr(Trainer, "_step", stepped)

    return arrange


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


def raised(error: BaseException) -> Callable[..., None]:
    def fault(*_: object, **__: object) -> None:
        raise error

    return fault


def send(signum: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), signum)


def sentence(capsys) -> str:
    """What stood on stderr: one line."""
    text = capsys.readouterr().err
    assert text.startswith("train_googlenet.py: ")
    assert text.endswith("\n")
    assert text.count("\n") == 1
    return text[:-1]


def assert_whole(*names: str) -> None:
    assert {path.name for path in Path("o").iterdir()} == set(names)


def assert_resumable(said: str, epoch: int, train: Callable[..., int], tiny: Dataset) -> None:
    """The sentence's epoch is on the disk, and its command ends where a run without the fault does."""
    assert f"; epoch {epoch} of 2 is saved; " in said
    assert training.read_checkpoint(CHECKPOINT).state["epoch"] == epoch
    program, script, *command = shlex.split(said.partition("go on with: ")[2])
    assert (program, script) == ("python", "python/train_googlenet.py")
    assert train(*command) == 0
    assert_whole(*FILES)
    resumed = restored(CHECKPOINT, tiny)
    assert train(*ARGUMENTS[:-1], "whole") == 0
    assert_same_run(resumed, restored(Path("whole", CHECKPOINT_NAME), tiny))
    for name, value in torch.load("o/weights.pt").items():
        assert torch.equal(value, resumed.model.state_dict()[name])


def restored(path: Path, tiny: Dataset) -> Trainer:
    checkpoint = training.read_checkpoint(path)
    trainer = Trainer(checkpoint.recipe, tiny, CPU)
    trainer.restore(checkpoint)
    return trainer


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("reason", [NO_SPACE, OSError(errno.EROFS, "Read-only file system")], ids=["full", "read-only"])
def test_a_file_that_cannot_be_written(train, monkeypatch, capsys, tiny, name, reason):
    replace = os.replace

    def fails_later(source: Path, target: Path) -> None:
        if target.name == name and (name != CHECKPOINT_NAME or target.exists()):
            raise reason
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_later)
    assert train() == 1
    monkeypatch.setattr(os, "replace", replace)
    said = sentence(capsys)
    assert f"error: o/{name} cannot be written ({reason.strerror}); epoch " in said
    assert f"; {'make room there' if reason is NO_SPACE else 'make that folder writable'}, or name another" in said
    written = FILES[: FILES.index(name)]
    assert_whole(*(written or [CHECKPOINT_NAME]))
    assert_resumable(said, 2 if written else 1, train, tiny)


def test_a_limit_on_the_size_of_a_file(train, second_epoch, capsys, tiny):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    second_epoch(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, limits[1])))
    try:
        assert train() == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    said = sentence(capsys)
    assert "o/checkpoint.pt cannot be written (File too large); " in said
    assert "raise the limit on the size of a file (ulimit -f)" in said
    assert_whole(CHECKPOINT_NAME)
    assert_resumable(said, 1, train, tiny)


def test_the_first_checkpoint_that_cannot_be_written(train, monkeypatch, capsys):
    monkeypatch.setattr(torch, "save", lambda *_: monkeypatch.setattr(os, "fsync", raised(NO_SPACE)))
    assert train() == 1
    assert "; nothing was saved, in epoch 1, before the first checkpoint; make room there, or " in sentence(capsys)
    assert_whole()


def test_a_folder_that_takes_no_file_is_refused_before_the_first_epoch(train, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "run_epoch", raised(AssertionError("trained")))
    Path("file").touch()
    assert train("--device", "cpu", "--out", "file/below") == 2
    assert "error: --out file/below: cannot be made or written (Not a directory); name another" in sentence(capsys)
    for call in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, call, raised(OSError(errno.EROFS, "Read-only file system")))
            assert train() == 2
        assert "error: --out o: cannot be made or written (Read-only file system)" in sentence(capsys)
        assert_whole()


def test_a_folder_that_is_removed_is_made_anew(train, second_epoch, capsys, tiny):
    second_epoch(lambda: shutil.rmtree("o"))
    assert train() == 0
    assert capsys.readouterr().err == "o was removed while this ran: made anew for checkpoint.pt\n"
    assert_whole(*FILES)
    assert restored(CHECKPOINT, tiny).epoch == 2


def test_a_folder_that_is_removed_and_cannot_be_made_anew(train, second_epoch, capsys):
    second_epoch(lambda: (shutil.rmtree("o"), Path("o").touch()))
    assert train() == 1
    said = sentence(capsys)
    assert "error: o/checkpoint.pt cannot be written (File exists); nothing is saved, o/checkpoint.pt is gone; " in said
    assert "go on with" not in said


@pytest.mark.parametrize(("reason", "status"), [(BrokenPipeError(errno.EPIPE, "Broken pipe"), 141), (NO_SPACE, 1)])
def test_a_stdout_that_takes_no_more(train, monkeypatch, capsys, tiny, reason, status):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            if text.startswith("epoch "):
                raise reason
            return len(text)

    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", Full())
        assert train() == status
    said = sentence(capsys)
    assert f"error: stdout cannot be written ({reason.strerror}); " in said
    assert_resumable(said, 1, train, tiny)


@pytest.mark.parametrize("error", [errno.EPIPE, errno.EIO, None], ids=["pipe", "terminal", "closed"])
def test_a_stderr_that_takes_nothing_is_no_fault(train, monkeypatch, error):
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise ValueError("I/O operation on closed file") if error is None else OSError(error, "gone")

        def flush(self) -> None:
            self.write("")

        def isatty(self) -> bool:
            return True

    monkeypatch.setattr(training, "BAR_SECONDS", 0)
    for stderr in (Gone(), None):
        monkeypatch.setattr(sys, "stderr", stderr)
        assert train() == 0
        assert sys.stderr is stderr
    assert_whole(*FILES)


@pytest.mark.parametrize(
    ("error", "detail"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), " (tried to allocate 2.00 GiB)"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 64 bytes. Error code 12"),
         " (tried to allocate 64 bytes)"),
        (RuntimeError("could not create a primitive"), " (could not create a primitive)"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might"), " (CUDA error: out of memory)"),
        (MemoryError(), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), " ([Errno 12] Cannot allocate memory)"),
    ],
    ids=["cuda", "cpu", "onednn", "driver", "python", "os"],
)  # fmt: skip
def test_out_of_memory(train, second_epoch, capsys, tiny, error, detail):
    second_epoch(raised(error))
    assert train() == 1
    said = sentence(capsys)
    assert f"error: out of memory{detail}; epoch 1 of 2 is saved; " in said
    assert "; free memory, or train anew with a --batch-size below 8; go on with: " in said
    assert_resumable(said, 1, train, tiny)


def test_out_of_memory_with_one_image_in_a_batch(train, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "_step", raised(MemoryError()))
    assert train("--device", "cpu", "--batch-size", "1", "--out", "o") == 1
    said = sentence(capsys)
    assert "out of memory; nothing was saved, in epoch 1, before the first checkpoint; free memory, or train" in said
    assert said.endswith("with a smaller --image-size")


def test_a_checkpoint_that_memory_has_no_room_for_is_not_called_damaged(train, monkeypatch, capsys):
    assert train() == 0
    for name in ("load", "load_state_dict"):
        with monkeypatch.context() as patch:
            patch.setattr(torch if name == "load" else nn.Module, name, raised(RuntimeError("std::bad_alloc")))
            assert train("--resume", str(CHECKPOINT), "--device", "cpu") == 1
        assert "error: out of memory (std::bad_alloc); nothing was trained; free memory, or train" in sentence(capsys)


def test_no_memory_for_writing_a_checkpoint(train, monkeypatch, capsys, tiny):
    save = torch.save

    def fails_later(state: dict, buffer: io.BytesIO) -> None:
        if state.get("epoch") != 2:
            return save(state, buffer)
        try:
            raise MemoryError
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # as torch's writer does

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fails_later)
        assert train() == 1
    said = sentence(capsys)
    assert "error: out of memory; epoch 1 of 2 is saved; " in said
    assert_resumable(said, 1, train, tiny)


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
def test_a_signal_that_a_finalizer_swallows_ends_the_next_step(train, second_epoch, capsys):
    class Finalized:
        def __del__(self) -> None:
            send(signal.SIGTERM)()

    second_epoch(Finalized)
    assert train() == 143
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


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "No such file"), KeyError("x")])
def test_an_error_of_the_program_keeps_its_traceback(train, second_epoch, error):
    second_epoch(raised(error))
    with pytest.raises(type(error)) as caught:
        train()
    assert caught.value is error


def test_the_command_keeps_what_no_checkpoint_holds_yet(train, monkeypatch, capsys, tiny):
    assert train("--device", "cpu", "--epochs", "1", "--preset", "digits", "--out", "o") == 0
    capsys.readouterr()
    recipe = train_googlenet.dataclasses.replace(train_googlenet.PRESETS["digits"], cosine=False, epochs=1)
    trainer = Trainer(recipe, tiny, CPU)
    trainer.run_epoch()
    trainer.save(CHECKPOINT)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_epoch", raised(KeyboardInterrupt()))
        assert train("--resume", str(CHECKPOINT), "--epochs", "3", "--out", "p", "--device", "cpu") == 130
    said = sentence(capsys)
    assert said.endswith(f"--resume {CHECKPOINT} --epochs 3 --out p --device cpu")
    assert train(*shlex.split(said.partition("go on with: ")[2])[2:]) == 0
    assert restored(Path("p", CHECKPOINT_NAME), tiny).epoch == 3


def process(setup: str = "", **options: object) -> subprocess.Popen:
    """The command line in a process of its own, on one thread; setup runs after the imports."""
    small = "import train_fakes, training, test_train_faults as t; training.build_model = t.small_model"
    command = [sys.executable, "-c", f"{small}\n{setup}\ntrain_fakes.main()", *ARGUMENTS]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, text=True, **options)


def test_sigterm_from_outside(train, tiny):
    endless = "from training import Trainer; import time; s = Trainer._step\n"
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


@pytest.mark.parametrize("both", [False, True], ids=["stdout", "stdout and stderr"])
def test_a_reader_that_goes(train, tiny, both):
    """As with ``| head -1`` and ``2>&1 | head -1``: Python itself may not complain at its end either."""
    stderr = subprocess.STDOUT if both else subprocess.PIPE
    setup = "import sys; t.Trainer.run_epoch = lambda self, f=t.Trainer.run_epoch: (sys.stdin.read(), f(self))[1]"
    with process(setup, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stderr) as run:
        while " training and " not in run.stdout.readline():
            assert run.poll() is None
        run.stdout.close()
        run.stdin.close()
        error = None if both else run.stderr.read()
    assert run.returncode == 141
    assert training.read_checkpoint(CHECKPOINT).state["epoch"] == 1
    assert_whole(CHECKPOINT_NAME)
    if not both:
        assert error.startswith("train_googlenet.py: error: stdout cannot be written (Broken pipe); epoch 1 of 2 is ")
        assert error.count("\n") == 1


def test_without_any_output(train, tiny):
    """As with ``>&- 2>&-``: no file that is opened may get the descriptor of stderr."""
    setup = "import os; f = os.fsync; os.fsync = lambda fd: (os.write(2, b'a library speaks'), f(fd))"
    with process(setup, preexec_fn=lambda: (os.close(1), os.close(2))) as run:
        pass
    assert run.returncode == 0
    assert restored(CHECKPOINT, tiny).epoch == 2
    assert b"speaks" not in Path("o/history.json").read_bytes()


def test_memory_that_is_really_short(train, tiny):
    """An address space that has no room for one more batch, from the second epoch on."""
    setup = """
import resource
from training import Trainer
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
