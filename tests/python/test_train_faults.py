"""What ends a training run from outside: one sentence, whole files, and resuming as if nothing had happened."""

from __future__ import annotations

import dataclasses
import errno
import io
import os
import resource
import shlex
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from train_fakes import (
    CHECKPOINT,
    CPU,
    FILES,
    assert_resumable,
    assert_whole,
    raised,
    restored,
    sentence,
)
from training import loop
from training.checkpoints import CHECKPOINT_NAME
from training.loop import Trainer
from training.presets import PRESETS

NO_SPACE = OSError(errno.ENOSPC, "No space left on device")


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

    monkeypatch.setattr(loop, "BAR_SECONDS", 0)
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


@pytest.mark.parametrize("error", [RuntimeError("shapes differ"), OSError(errno.ENOENT, "No such file"), KeyError("x")])
def test_an_error_of_the_program_keeps_its_traceback(train, second_epoch, error):
    second_epoch(raised(error))
    with pytest.raises(type(error)) as caught:
        train()
    assert caught.value is error


def test_the_command_keeps_what_no_checkpoint_holds_yet(train, monkeypatch, capsys, tiny):
    assert train("--device", "cpu", "--epochs", "1", "--preset", "digits", "--out", "o") == 0
    capsys.readouterr()
    recipe = dataclasses.replace(PRESETS["digits"], cosine=False, epochs=1)
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
