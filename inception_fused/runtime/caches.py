"""The folders that outlive a process, the user's tiles and Triton's binaries, and what serves where one cannot be used.

Without a home folder (containers that run under a foreign user id) there is no user's table of tiles, and Triton would
write into a folder named "~" wherever the process stands. A home that is read-only or full would end every compile.
Both cost a private folder for temporary files and one warning, not the kernels.
"""

from __future__ import annotations

import atexit
import os
import shutil
import stat
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

LEAST_FREE_MIB = 32
"""What must be free for Triton's binaries; a guess at a network's 36 at most for one dtype, not measured."""

TRIAL = bytes(65536)
"""What is written to find out whether a folder takes files, since a quota shows nowhere else."""


class Given(NamedTuple):
    """The folder that Triton got in the place of its own, and why, as a sentence."""

    folder: str
    why: str


_given: Given | None = None


def home() -> Path | None:
    """The user's home folder; None without HOME and an entry of the user in the passwd database."""
    try:
        return Path.home()
    except RuntimeError:
        return None


def no_home() -> str:
    who = f"user {os.getuid()} has no entry in the passwd database" if hasattr(os, "getuid") else "no user is known"
    return f"no home folder (HOME is not set, and {who})"


def unusable(folder: Path) -> str | None:
    """Why new files cannot be made in a folder, or programs not run from it, to follow its name; None where they can.

    Where it does not exist, the folder that it would be made in is asked. Leaves nothing behind.
    """
    there = folder
    try:
        while not there.exists() and there != there.parent:
            there = there.parent
        with tempfile.NamedTemporaryFile(dir=there, prefix=".inception_fused-") as trial:
            trial.write(TRIAL)
            trial.flush()
        facts = os.statvfs(there)
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"
    except AttributeError:  # no statvfs: not a POSIX system
        return None
    if facts.f_flag & getattr(os, "ST_NOEXEC", 0):
        return "is on a file system that runs no programs (mounted noexec)"
    free = facts.f_bavail * facts.f_frsize >> 20
    # Some network file systems report no size at all.
    return f"has {free} MiB left, of {LEAST_FREE_MIB} wanted" if facts.f_blocks and free < LEAST_FREE_MIB else None


def triton_folder() -> str | None:
    """Where Triton keeps its binaries; None without Triton."""
    try:
        from triton import knobs

        # Triton takes an empty variable for a folder without a name and then gives up.
        return os.environ.get("TRITON_CACHE_DIR") or knobs.cache.get_triton_dir("cache")
    except Exception:  # a Triton that cannot be imported says so at its probe
        return None


def is_in_triton_cache(path: str) -> bool:
    folder = triton_folder()
    return folder is not None and Path(folder) in (Path(path), *Path(path).parents)


def prepare() -> None:
    """Before Triton's first compile: give it a folder that serves where its own cannot be used; warn once of either.

    A folder that TRITON_CACHE_DIR names stays, whatever is wrong with it: it may have been filled beforehand.
    """
    global _given
    folder = triton_folder()
    # A manager of somebody's own need not keep files.
    if folder is None or os.environ.get("TRITON_CACHE_MANAGER"):
        return
    problem = _problem(folder)
    if problem is None:
        if os.environ.get("TRITON_CACHE_DIR") == "":
            os.environ["TRITON_CACHE_DIR"] = folder
        return
    if os.environ.get("TRITON_CACHE_DIR"):
        warn_once(_named(problem))
        return
    own = _own_folder()
    if own is None:
        return
    _given = Given(own, problem)
    os.environ["TRITON_CACHE_DIR"] = own
    warn_once(_replaced(_given))


def facts() -> dict[str, Any]:
    """For a report, ready for JSON: triton (the folder of its binaries, or None) and problem (a sentence, or None)."""
    folder = triton_folder()
    if _given is not None and _given.folder == folder:
        return {"triton": folder, "problem": _replaced(_given)}
    problem = None if folder is None or os.environ.get("TRITON_CACHE_MANAGER") else _problem(folder)
    if problem is None:
        return {"triton": folder, "problem": None}
    if os.environ.get("TRITON_CACHE_DIR"):
        return {"triton": folder, "problem": _named(problem)}
    return {"triton": None, "problem": f"{problem}; on a GPU Triton would compile into a private temporary folder"}


def _problem(folder: str) -> str | None:
    """What is wrong with the folder of Triton's binaries, as a sentence."""
    if folder.startswith("~"):
        return no_home()
    reason = unusable(Path(folder))
    return None if reason is None else f"{folder} {reason}"


def _named(problem: str) -> str:
    return (
        f"TRITON_CACHE_DIR: {problem}; kernels that are not in it cannot be compiled; set TRITON_CACHE_DIR to a folder "
        "that can be written, or unset it"
    )


def _replaced(given: Given) -> str:
    return (
        f"{given.why}, so Triton compiles into {given.folder}; TRITON_CACHE_DIR=FOLDER chooses another, and "
        "INCEPTION_FUSED_CACHE=FOLDER one for tuned tiles"
    )


def _own_folder() -> str | None:
    """A folder for temporary files that only this user can write and whose programs may run; None where none is."""
    try:
        bases = [tempfile.gettempdir()]
    except FileNotFoundError:
        bases = []
    for base in dict.fromkeys([*bases, "/var/tmp", "/dev/shm"]):
        if not os.path.isdir(base) or unusable(Path(base)) is not None:
            continue
        folder = _users_folder(base) or _process_folder(base)
        if folder is not None:
            return os.path.join(folder, "triton")
    return None


def _users_folder(base: str) -> str | None:
    """The same for every process of this user, so that they share what is compiled; None where it is not his alone.

    Its files are loaded as programs, and anybody may make a folder of any name here.
    """
    if not hasattr(os, "geteuid"):
        return None
    folder = os.path.join(base, f"inception_fused-{os.geteuid()}")
    try:
        os.makedirs(folder, mode=0o700, exist_ok=True)
        found = os.lstat(folder)
    except OSError:
        return None
    mine = stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
    return folder if mine and unusable(Path(folder)) is None else None


def _process_folder(base: str) -> str | None:
    """A new folder, which goes with this process."""
    try:
        folder = tempfile.mkdtemp(prefix="inception_fused-", dir=base)
    except OSError:
        return None
    process = os.getpid()

    def remove() -> None:
        if os.getpid() == process:  # not a child that was forked
            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return folder


@cache
def warn_once(text: str) -> None:
    """A UserWarning, once for each text. Where warnings are errors it may not end a user's step: reports go on saying
    it."""
    try:
        warnings.warn(text, stacklevel=2)
    except UserWarning:
        return
