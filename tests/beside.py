"""Work in a process of its own, one after another on another core, while the tests run.

An interpreting process cannot compile kernels, and what compiles takes minutes. A test module's ``BESIDE`` says what
its fixtures wait for: the name of a fixture -> the work, which starts before the first test if one of the chosen tests
uses that fixture. ``beside.result(name)`` waits for it.

The process is forked before the first test: what a test puts in place of ``subprocess.run``, ``os.replace`` or a
variable of the environment while a work runs does not reach that work.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent


class Beside:
    """Works one after another, begun at once. works: name -> (work, its own empty folder), done as work(self, folder)
    in this order; what a work returns is pickled. full: whether this run has --full; workers: cores that a work may
    use."""

    def __init__(
        self, works: Mapping[str, tuple[Callable[[Beside, Path], Any], Path]], *, full: bool, workers: int
    ) -> None:
        self.full, self.workers = full, workers
        self._results: dict[str, tuple[bool, Any]] = {}
        self._process = None
        if not works:
            return
        context = multiprocessing.get_context("fork")
        self._answers, answers = context.Pipe(duplex=False)
        self._process = context.Process(target=self._work, args=(works, answers), daemon=True)
        self._process.start()
        answers.close()

    def _work(self, works: Mapping[str, tuple[Callable[[Beside, Path], Any], Path]], answers: Connection) -> None:
        # A group of its own, so that all that it starts can be ended with it.
        os.setpgid(0, 0)
        for name, (work, folder) in works.items():
            try:
                answer = True, work(self, folder)
            except Exception:  # whatever a work raises is its result, told where a test asks for it
                answer = False, traceback.format_exc()
            answers.send((name, *answer))

    def result(self, name: str) -> Any:
        """What a work returned, once it has. Raises AssertionError, with its traceback, where it failed."""
        while name not in self._results:
            try:
                found, *answer = self._answers.recv()
            except EOFError:
                self._results[name] = False, "the process that does the works beside the tests has ended"
            else:
                self._results[found] = answer
        done, value = self._results[name]
        assert done, value
        return value

    def run(self, script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run a script below this folder in a process that compiles kernels. Raises AssertionError where it fails."""
        done = self.attempt(script, *arguments, **environment)
        assert done.returncode == 0, (
            f"{script} ended with {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        )
        return done

    def attempt(self, script: str, *arguments: Any, **environment: str) -> subprocess.CompletedProcess[str]:
        """:meth:`run`, whatever the exit code."""
        command = [sys.executable, str(TESTS / script), *map(str, arguments)]
        return subprocess.run(command, env=_compiling() | environment, capture_output=True, text=True)

    def findings(self, script: str, folder: Path, *arguments: Any, **environment: str) -> Any:
        """What a script writes with ``--json``, whatever it exits with; Triton's cache is the folder's own. Raises
        AssertionError where it writes nothing."""
        found = folder / "found.json"
        cache = {"TRITON_CACHE_DIR": str(folder / "cache")}
        done = self.attempt(script, "--json", found, *arguments, **(cache | environment))
        assert found.exists(), f"exit code {done.returncode}: {done.stdout[-3000:]}{done.stderr[-3000:]}"
        return json.loads(found.read_text())

    def stop(self) -> None:
        """End what runs; nothing more is started."""
        if self._process is None:
            return
        # It may have ended, or not yet have made its group.
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.kill()
        self._process.join()


def _compiling() -> dict[str, str]:
    """The environment of a process in which Triton compiles, with this one's modules."""
    found = {name: value for name, value in os.environ.items() if not name.startswith("TRITON")}
    return found | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
