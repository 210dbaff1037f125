"""What runs beside the tests, apart from what they replace in this process."""

import os
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import pytest

from beside import Beside


def _waits_and_looks(beside, folder):
    while not (folder / "replaced").exists():
        time.sleep(0.01)
    said = subprocess.run(["echo", os.environ.get("OF_A_TEST", "unset")], capture_output=True, text=True)
    return beside.workers, said.stdout


def _raises(beside, folder):
    raise ValueError("as the work says")


def _starts_a_process(beside, folder):
    process = subprocess.Popen(["sleep", "600"])
    (folder / "pid.part").write_text(str(process.pid))
    (folder / "pid.part").rename(folder / "pid")
    process.wait()


def test_what_a_test_replaces_does_not_reach_a_work(tmp_path, monkeypatch):
    beside = Beside({"looks": (_waits_and_looks, tmp_path)}, full=False, workers=3)
    monkeypatch.setenv("OF_A_TEST", "set")
    monkeypatch.setattr(subprocess, "run", None)
    (tmp_path / "replaced").touch()
    assert beside.result("looks") == (3, "unset\n")
    beside.stop()


def test_a_work_that_fails_says_so_and_the_next_is_done(tmp_path):
    tmp_path.joinpath("replaced").touch()
    beside = Beside({"raises": (_raises, tmp_path), "looks": (_waits_and_looks, tmp_path)}, full=False, workers=1)
    assert beside.result("looks")[0] == 1
    for _ in range(2):
        with pytest.raises(AssertionError, match="ValueError: as the work says"):
            beside.result("raises")
    beside.stop()


def test_nothing_is_left_of_what_is_stopped(tmp_path):
    beside = Beside({"starts": (_starts_a_process, tmp_path)}, full=False, workers=1)
    while not (tmp_path / "pid").exists():
        time.sleep(0.01)
    started = int((tmp_path / "pid").read_text())
    beside.stop()
    with suppress(ProcessLookupError, FileNotFoundError):
        for _ in range(500):
            if Path(f"/proc/{started}/stat").read_text().split()[2] == "Z":
                break
            time.sleep(0.01)
        else:
            pytest.fail("it still runs")
    with pytest.raises(AssertionError, match="has ended"):
        beside.result("starts")
    Beside({}, full=False, workers=1).stop()
