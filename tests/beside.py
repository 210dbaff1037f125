"""Work in processes of its own, one after another on another core, while the tests run.

An interpreting process cannot compile kernels, and what compiles takes minutes. A test module's ``BESIDE`` says what
its fixtures wait for: the name of a fixture -> the work, which starts before the first test if one of the chosen tests
uses that fixture. ``beside.result(name)`` waits for it.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


class Beside:
    """Works one after another. full: whether this run has --full; workers: cores that a work may use."""

    def __init__(self, *, full: bool, workers: int) -> None:
        self.full, self.workers = full, workers
        self._thread = ThreadPoolExecutor(1)
        self._results: dict[str, Future[Any]] = {}
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def start(self, name: str, work: Callable[[Beside, Path], Any], folder: Path) -> None:
        """Call work(self, folder) after those that were started before it. folder: its own, empty."""
        self._results[name] = self._thread.submit(work, self, folder)

    def result(self, name: str) -> Any:
        """What a work returned, or raised, once it has."""
        return self._results[name].result()

    def run(self, script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script below this folder in a process that compiles kernels. Raises AssertionError where it fails."""
        done = self.attempt(script, *arguments, **environment)
        assert done.returncode == 0, (
            f"{script} ended with {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done

    def attempt(self, script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        """:meth:`run`, whatever the exit code."""
        if self._stopped:
            raise RuntimeError("the tests have ended")
        command = [sys.executable, str(TESTS / script), *map(str, arguments)]
        # A group of its own, so that the workers that it starts end with it.
        process = self._process = subprocess.Popen(
            command, env=_compiling() | environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        out, err = process.communicate()
        return subprocess.CompletedProcess(command, process.returncode, out, err)

    def stop(self) -> None:
        """End what runs and start nothing more."""
        self._stopped = True
        if self._process is not None and self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
        self._thread.shutdown(cancel_futures=True)


def _compiling() -> dict[str, str]:
    """The environment of a process in which Triton compiles, with this one's modules."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
