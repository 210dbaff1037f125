"""How a run of several ranks ends before its time: which rank says what, and in which order they go.

A rank that ends by an error of its own says so itself. The others then find their connection closed, or torchrun ends
them with SIGTERM; the lowest of them says what is saved and how to go on, for a rank that was killed says nothing. A
signal to all is one sentence, of the lowest rank that has got it.

The ranks know of each other by the store of the process group, in which a rank leaves a word: ``ended`` for an error of
its own, ``lost`` if it ends because another did, ``signal`` when one has come. torchrun holds the store, so that it
outlives every rank. Whether a rank of this machine is alive its process number says.

A rank that waits inside a collective runs no signal handler of Python. Over gloo that is no matter: if a peer dies, its
connections close and the wait raises at once. A GPU that waits for one in NCCL's kernel waits on, and so does a CPU
that reads its results: NCCL gives up after ten minutes, torchrun kills after thirty seconds. So a thread of its own
learns of signals, and ends the rank in its stead if it has not done so after :data:`PATIENCE`.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import torch.distributed as dist

from training import faults
from training.loop import TrainingError
from training.ranks import Ranks, RefusedError

PATIENCE = 5.0
"""Seconds: for a rank that has got a signal to end by itself, for one that is lost to get torchrun's SIGTERM."""

GRACE = 3.0
"""Seconds for the words of other ranks. torchrun signals all of them within milliseconds, and looks for those that have
ended ten times a second."""

COMMUNICATION = re.compile("gloo|nccl", re.IGNORECASE)
PEER_HAS_GONE = re.compile("closed by peer|reset by peer|broken pipe|remote process exit", re.IGNORECASE)
"""In a RuntimeError: gloo's connections, and NCCL's ncclRemoteError."""

ALIKE = (RefusedError, TrainingError)
"""Errors that every rank raises."""


class Verdict(NamedTuple):
    """What a rank makes of the error that ends it.

    error: the error, or :class:`training.faults.LostError` in its place.
    speaks: whether this rank says it.
    alone: whether it is this rank's own, so that the rank is named.
    root: whether it goes at once, or lets torchrun see first which rank was the cause.
    """

    error: BaseException
    speaks: bool
    alone: bool
    root: bool


class Endings:
    """The end of this rank, and what it knows of the others'.

    Args:
        ranks: this process among its ranks.
        sentence: what to say about an error, without a line feed at its end; None for an error of the program.
        status: the exit status for an error.
    """

    def __init__(
        self,
        ranks: Ranks,
        sentence: Callable[[BaseException], str | None],
        status: Callable[[BaseException], int],
    ) -> None:
        self.ranks, self.sentence, self.status = ranks, sentence, status
        self._store: dist.Store | None = None
        self._pids: dict[int, int] = {}
        self._gone_before_signal: list[int] = []
        self._signalled = threading.Event()
        self._concluding = threading.Lock()

    def join(self) -> None:
        """Make the process group and begin to watch; in the main thread, inside :func:`training.faults.guarded`."""
        if self.ranks.world == 1:
            return
        # Late: a PyTorch without distributed has no such module, and trains in one process.
        from torch.distributed.rendezvous import rendezvous

        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        signal.set_wakeup_fd(theirs.detach(), warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(ours,), daemon=True).start()
        store, *_ = next(rendezvous("env://", self.ranks.rank, self.ranks.world))
        self._store = store.clone()  # a connection of its own: the watch may not wait for one that waits
        self.ranks.join(store)
        here = socket.gethostname()
        processes = self.ranks.gather((here, os.getpid()))
        self._pids = {rank: pid for rank, (host, pid) in enumerate(processes) if host == here}

    def leave(self) -> None:
        """The end of a run that has done its work: of one process nothing, of several all end here, when all are done.

        torchrun ends the others where one has ended with a status that is not zero.
        """
        if self.ranks.world > 1:
            self.ranks.wait()
            faults.hear_no_more()
            dist.destroy_process_group()
            _exit(0)

    def conclude(self, error: BaseException) -> int | None:
        """Say what there is to say about the error that ends this process.

        Returns:
            The exit status; None for an error of the program, which is to be raised. Of several ranks none returns:
            the process ends here.
        """
        if self.ranks.world == 1:
            text = self.sentence(error)
            if text is not None:
                self._print(text)
            return None if text is None else self.status(error)
        faults.hear_no_more()
        if not self._concluding.acquire(blocking=False):
            threading.Event().wait()  # the other thread, the watch or the main one, is about to end the process
        verdict = self._verdict(error)
        text = self.sentence(verdict.error)
        if text is None:
            text = "".join(traceback.format_exception(error)).rstrip()
            print(text, file=sys.stderr)
        elif verdict.speaks:
            text = "\n".join(f"{self.ranks}: {line}" if verdict.alone else line for line in text.split("\n"))
            self._print(text)
        else:
            text = f"{self.ranks} has ended with the others"
        if not verdict.root:
            self._signalled.wait(PATIENCE)
        self._report(text)
        _exit(self.status(verdict.error))

    def _verdict(self, error: BaseException) -> Verdict:
        first = self.ranks.first
        if isinstance(error, ALIKE):
            return Verdict(error, speaks=first, alone=False, root=first)
        if isinstance(error, KeyboardInterrupt):
            self._signalled.wait(GRACE)
            if not self._gone_before_signal:
                with_us = self._signalled_ranks()
                alone = with_us == [self.ranks.rank]
                if alone:
                    self._post("ended")
                return Verdict(error, speaks=self.ranks.rank == with_us[0], alone=alone, root=True)
        elif not self._is_lost(error):
            self._post("ended")
            return Verdict(error, speaks=True, alone=True, root=True)
        self._post("lost")
        lower = range(self.ranks.rank)
        words = ("ended", "lost", "signal")
        told = bool(lower) and self._until(lambda: any(self._posted(word, rank) for rank in lower for word in words))
        self._until(lambda: bool(self._gone()))
        gone = self._gone()
        lost = faults.LostError(f"rank {gone[0]} has ended" if gone else "another rank has ended")
        return Verdict(lost, speaks=not told, alone=False, root=False)

    def _is_lost(self, error: BaseException) -> bool:
        """Whether an error says no more than that another rank has ended."""
        text = str(error)
        if not isinstance(error, RuntimeError) or not COMMUNICATION.search(text):
            return False
        return PEER_HAS_GONE.search(text) is not None or self._until(lambda: bool(self._gone()))

    def _gone(self) -> list[int]:
        """The ranks that are known to have ended, or to be ending by an error of their own."""
        others = (rank for rank in range(self.ranks.world) if rank != self.ranks.rank)
        return [rank for rank in others if self._posted("ended", rank) or not _is_alive(self._pids.get(rank))]

    def _signalled_ranks(self) -> list[int]:
        """The ranks that have got a signal, this one among them."""
        start = self.ranks.rank - self.ranks.local_rank
        here = range(start, start + self.ranks.local_world)
        self._until(lambda: all(self._posted("signal", rank) for rank in here))
        if self._store is None:
            return list(here)  # before there is a store there is nothing but the start, which is ended as a whole
        return sorted({self.ranks.rank, *(r for r in range(self.ranks.world) if self._posted("signal", r))})

    def _watch(self, signals: socket.socket) -> None:
        """Learn of a signal when it comes; end the process if the main thread has not."""
        while (signum := signals.recv(1)[0]) not in (getattr(signal, name, None) for name in faults.SIGNALS):
            pass
        # Now, since ranks that have got it too are still there: none goes before all have left their word.
        self._gone_before_signal = self._gone()
        self._post("signal")
        self._signalled.set()
        waited = 0.0
        while waited < PATIENCE:
            time.sleep(0.1)
            # What is being written is kept.
            waited = 0.0 if faults.is_held() else waited + 0.1
        self.conclude(faults.Ended(signum))

    def _post(self, word: str) -> None:
        with contextlib.suppress(RuntimeError, AttributeError):  # torchrun has gone, or the store is not there yet
            self._store.set(f"{word}/{self.ranks.rank}", "")

    def _posted(self, word: str, rank: int) -> bool:
        with contextlib.suppress(RuntimeError, AttributeError):
            return self._store.check([f"{word}/{rank}"])
        return False

    def _until(self, condition: Callable[[], bool]) -> bool:
        """Whether a condition holds within :data:`GRACE`."""
        end = time.monotonic() + GRACE
        while not (holds := condition()) and time.monotonic() < end:
            time.sleep(0.02)
        return holds

    def _print(self, text: str) -> None:
        lines = "".join(f"train_googlenet.py: {line}\n" for line in text.split("\n"))
        print(lines, end="", file=sys.stderr)

    def _report(self, text: str) -> None:
        """What torchrun's summary says of this rank, in the form of torch.distributed.elastic's ErrorHandler."""
        path = os.environ.get("TORCHELASTIC_ERROR_FILE")
        if path:
            # The summary prints py_callstack, which its handler has filled with a traceback, before the message.
            information = {"py_callstack": text, "timestamp": str(int(time.time()))}
            with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
                json.dump({"message": {"message": text, "extraInfo": information}}, file)


def _exit(status: int) -> NoReturn:
    """End the process without taking it down: there gloo's threads have ended 4 of 7 runs with SIGABRT (torch 2.13),
    destroyed process group or not, and NCCL's may wait for peers that have gone."""
    if threading.current_thread() is threading.main_thread():
        atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def _is_alive(pid: int | None) -> bool:
    """Whether a process of this machine is there; one that is not known, of another machine, is taken to be."""
    if pid is None or os.name != "posix":
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
