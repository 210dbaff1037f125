"""What ends a run from outside: a signal, no memory, a disk that is full, an output that is closed.

These are told from errors of the program, which keep their traceback. All of them leave every file whole and end with
one sentence, of which :func:`describe` is the first half.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any, TextIO

import torch

from inception_fused.runtime import files

SIGNALS = ("SIGINT", "SIGTERM", "SIGHUP")
"""Those that end a run: Ctrl-C, a batch system or a shutdown, a terminal that is closed."""

SIGPIPE = 13
"""signal.SIGPIPE, which Windows lacks."""

PROBE_BYTES = 4096

NO_ROOM = (errno.ENOSPC, errno.EDQUOT)

NO_MEMORY = re.compile(
    "can't allocate memory|not enough memory|out of memory|bad_alloc|ALLOC_FAILED|could not create a primitive"
)
"""In a RuntimeError: PyTorch's allocators, the CUDA driver, C++, cuBLAS and cuDNN; oneDNN, which gives no reason."""


class Ended(KeyboardInterrupt):
    """A signal that ends the run; raised in the main thread, as Ctrl-C is."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class StorageError(RuntimeError):
    """A file that cannot be written; the one that was there before is untouched."""

    def __init__(self, path: Path, reason: OSError) -> None:
        super().__init__(f"{path} cannot be written ({reason.strerror or reason})")
        self.errno = reason.errno


class StdoutError(RuntimeError):
    """Standard output that takes no more: its reader has gone, or it is a file on a full disk."""

    def __init__(self, reason: OSError) -> None:
        super().__init__(f"stdout cannot be written ({reason.strerror or reason})")
        self.errno = reason.errno


class LostError(RuntimeError):
    """Another rank of this run that has ended, which ends this one too."""


class _Signals:
    """What has arrived in the run that is :func:`guarded`."""

    def __init__(self) -> None:
        self.held = False
        self.first: int | None = None
        self.ending = False

    def arrived(self, signum: int, frame: FrameType | None) -> None:
        if self.ending:
            return  # the run is on its way out, a matter of milliseconds, which another signal would only confuse
        waits = self.held and self.first is None
        self.first = self.first or signum
        if not waits:
            self.end()

    def end(self) -> None:
        self.ending = True
        assert self.first is not None
        raise Ended(self.first)


_signals = _Signals()


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Inside, the :data:`SIGNALS` raise :class:`Ended`, once, and a stderr that is closed is no error.

    Where a signal was ignored before, as under nohup, it still is. Handlers and stderr are the caller's again after it.
    Outside the main thread, where Python allows no handlers, signals do what they did.
    """
    global _signals
    _fill_descriptors()
    _signals = _Signals()
    before: dict[int, Any] = {}
    try:
        if threading.current_thread() is threading.main_thread():
            for signum in (getattr(signal, name) for name in SIGNALS if hasattr(signal, name)):
                # None is a handler that is not Python's, and which Python could not put back.
                if signal.getsignal(signum) not in (signal.SIG_IGN, None):
                    before[signum] = signal.getsignal(signum)
                    signal.signal(signum, _signals.arrived)
        with contextlib.redirect_stderr(_Courtesy(sys.stderr)):
            yield
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
        _signals = _Signals()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Inside, a first signal waits for the end, such that what is being written is kept; a second one breaks it off.

    A fault of the body goes before the signal that waits: it says more.
    """
    check()
    _signals.held = True
    try:
        yield
    finally:
        _signals.held = False
    check()


def check() -> None:
    """Raise :class:`Ended` if a signal has come and has not ended the run.

    It waited in :func:`held`, or was raised where Python ignores exceptions, as in a finalizer.
    """
    if _signals.first is not None:
        _signals.end()


def is_held() -> bool:
    """Whether something is being written that a first signal may not break off."""
    return _signals.held


def hear_no_more() -> None:
    """From now on no signal raises: how the run ends is decided."""
    _signals.ending = True


def store(path: Path, content: bytes | memoryview) -> None:
    """Replace a file at once, and make its folder anew, with a word on stderr, if somebody has removed it.

    Raises:
        StorageError: the file is as it was.
    """
    gone = not path.parent.is_dir()
    try:
        files.write(path, content)
    except OSError as error:
        raise StorageError(path, error) from error
    if gone:
        print(f"{path.parent} was removed while this ran: made anew for {path.name}", file=sys.stderr)


def try_folder(out: Path) -> None:
    """Make a folder, and write, sync and remove a small file there: one that takes none is known before it is needed.

    Raises:
        OSError: the folder cannot be made or is read-only, or its disk is full.
    """
    probe = out / f"probe.{os.getpid()}"
    with held():
        try:
            files.write(probe, bytes(PROBE_BYTES))
        finally:
            with contextlib.suppress(OSError):
                probe.unlink()


def serialised(state: dict[str, Any]) -> memoryview:
    """What torch.save writes, in memory: of a file that fails its writer says no more than "unexpected pos"."""
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
    except RuntimeError as error:
        if isinstance(error.__context__, MemoryError):
            raise error.__context__ from error
        raise
    return buffer.getbuffer()


def say(text: str) -> None:
    """Print to stdout, at once.

    Raises:
        StdoutError: it takes no more, and from now on what goes there is dropped.
    """
    try:
        print(f"{text}\n", end="", flush=True)  # one write even if unbuffered: a reader of one line has got its own
    except OSError as error:
        _drop(sys.stdout)
        raise StdoutError(error) from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device or the CPU had no memory left; each library says so in its own way."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and NO_MEMORY.search(str(error)) is not None


def describe(error: BaseException) -> str | None:
    """What happened, as the beginning of a sentence; None for an error of the program."""
    if isinstance(error, Ended) and error.signum != signal.SIGINT:
        return f"ended by {error}"
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    if isinstance(error, LostError):
        return str(error)
    if isinstance(error, (StorageError, StdoutError)):
        return f"error: {error}"
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        # Of a library, such as a compiler's cache.
        return f"error: {error.filename or 'a file'} cannot be written ({error.strerror})"
    if is_out_of_memory(error):
        amount = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        detail = f"tried to allocate {amount[1]}" if amount else str(error).partition("\n")[0]
        return f"error: out of memory ({detail})" if detail else "error: out of memory"
    return None


def remedy(error: BaseException, batch_size: int | None = None) -> str:
    """What to change before the run can go on; empty if nothing has to be.

    batch_size: that of the run, of which the advice is to take less; None if it is not known yet.
    """
    if isinstance(error, StorageError) or (isinstance(error, OSError) and error.errno in NO_ROOM):
        if error.errno in NO_ROOM:
            change = "make room there"
        elif error.errno == errno.EFBIG:
            change = "raise the limit on the size of a file (ulimit -f)"
        else:
            change = "make that folder writable"
        return f"{change}, or name another folder with --out"
    if is_out_of_memory(error):
        if batch_size == 1:
            return "free memory, or train anew with a smaller --image-size"
        smaller = "a smaller --batch-size" if batch_size is None else f"a --batch-size below {batch_size}"
        return f"free memory, or train anew with {smaller}"
    return ""


def exit_status(error: BaseException) -> int:
    """128 + the signal's number, which is also what a closed pipe ends other programs with; else 1."""
    if isinstance(error, KeyboardInterrupt):
        return 128 + getattr(error, "signum", signal.SIGINT)
    return 128 + SIGPIPE if isinstance(error, StdoutError) and error.errno == errno.EPIPE else 1


class _Courtesy:
    """A stderr, or none, for bars and notices: none of them is worth a run."""

    def __init__(self, stream: TextIO | None) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            if self._stream is not None:
                self._stream.write(text)
        except (OSError, ValueError):  # the latter if it is closed in this process
            _drop(self._stream)
        return len(text)

    def flush(self) -> None:
        try:
            if self._stream is not None:
                self._stream.flush()
        except (OSError, ValueError):
            _drop(self._stream)

    def isatty(self) -> bool:
        return self._stream is not None and not self._stream.closed and self._stream.isatty()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _drop(stream: TextIO | None) -> None:
    """Send what a stream still holds nowhere; Python would fail once more when it flushes it at its end."""
    # A stream without a descriptor is not the process's own, and nobody flushes it.
    with contextlib.suppress(OSError, ValueError, AttributeError):
        fd = stream.fileno()
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, fd)
        os.close(nowhere)


def _fill_descriptors() -> None:
    """Open 0 to 2 where the caller closed them (``2>&-``): else a file gets the number, and what libraries print."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)
