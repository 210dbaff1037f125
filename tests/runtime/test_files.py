"""Files that are whole or as they were, whatever stops the writing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from inception_fused.runtime import files


def test_a_file_is_replaced_and_its_folder_made(tmp_path):
    path = tmp_path / "new" / "file"
    for content in (b"first", memoryview(b"second"), b""):
        files.write(path, content)
        assert path.read_bytes() == bytes(content)
        assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("call", ["open", "fsync", "replace"])
@pytest.mark.parametrize("reason", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_is_stopped_leaves_the_old_file_alone(tmp_path, monkeypatch, call, reason):
    path = tmp_path / "file"
    files.write(path, b"old")

    def stopped(*_: object) -> None:
        raise reason

    owner = files if call == "open" else os
    monkeypatch.setattr(owner, call, stopped, raising=False)
    with pytest.raises(type(reason)):
        files.write(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_the_reason_is_not_hidden_by_a_folder_that_is_gone(tmp_path, monkeypatch):
    def gone(source: Path, target: Path) -> None:
        source.unlink()
        tmp_path.rmdir()
        raise OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(os, "replace", gone)
    with pytest.raises(OSError, match="Stale"):
        files.write(tmp_path / "file", b"new")


def test_content_is_on_the_disk_before_the_name_is(tmp_path, monkeypatch):
    order = []
    for name in ("fsync", "replace"):
        original = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *args, n=name, f=original: (order.append(n), f(*args)))
    files.write(tmp_path / "file", b"new")
    assert order == ["fsync", "replace"]
