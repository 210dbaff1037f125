"""Why a first compile or launch fails, in one table: the signs of a cause, its remedy, and whether it can pass.

Whoever tells of such a failure (the probe of a device, the extension's probe) asks :func:`failure` for the words. The
signs are those of Triton 3.5 to 3.9, CUDA, gcc, clang and Linux. What the table does not know is told in its own words.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from inception_fused.runtime import caches

RERUN_S = 60.0
"""Most seconds for asking the C compiler again what was wrong."""

LONGEST = 500
"""Characters of an error's words in a reason: a compiler's or ptxas's log goes on for pages."""

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
ANEW = "pip install --force-reinstall triton"


class Cause(NamedTuple):
    """signs: a regular expression, searched for in the error's words, capitals or not; remedy: empty where the words
    say all; passes: whether another attempt may succeed although nobody does anything about this process."""

    name: str
    signs: str
    remedy: str
    passes: bool = False


CAUSES = (
    Cause("capture", r"is capturing|StreamCapture|during capture|uncaptured", "", True),
    Cause(
        "memory of the machine",
        r"\bSIGKILL\b|error code -9\b|Killed signal|Cannot allocate memory|\bMemoryError|virtual memory exhausted"
        r"|out of memory allocating \d+ bytes",
        "free memory of the machine, or raise this container's limit",
        True,
    ),
    Cause(
        "memory of the GPU",
        r"out of memory|MemoryAllocation",
        "free memory of the GPU; nvidia-smi shows who holds it",
        True,
    ),
    Cause(
        "no space",
        r"No space left|Disk quota exceeded|\[Errno (28|122)\]",
        "free some, or set TRITON_CACHE_DIR and TMPDIR to folders that have it",
        True,
    ),
    Cause("open files", r"Too many open files|\[Errno (23|24)\]", "raise the limit (ulimit -n)", True),
    Cause("temporary folder", r"No usable temporary directory", "set TMPDIR to a folder that can be written", True),
    Cause(
        "noexec",
        r"failed to map segment|cannot apply additional memory protection",
        "that folder's file system runs no programs (mounted noexec): set TRITON_CACHE_DIR to a folder on another",
    ),
    Cause("CC", r"which CC names", "set CC to the path of a C compiler, without options, or unset it"),
    Cause(
        "no C compiler",
        r"Failed to find C(\+\+)? compiler|(gcc|clang|\bcc): (command )?not found",
        "install one (Debian, Ubuntu: apt-get install gcc; Fedora: dnf install gcc), or set CC to one",
    ),
    Cause(
        "half a C compiler",
        r"cannot execute|installation problem|cannot find .?ld\b|unable to execute command",
        "the C compiler is not complete: install it anew (Debian, Ubuntu: apt-get install gcc binutils)",
    ),
    Cause(
        "Python.h",
        r"(Python|pyconfig)\.h\b.{0,3}(: No such file| file not found)",
        f"install Python's headers (Debian, Ubuntu: apt-get install python{PYTHON}-dev; Fedora: dnf install "
        "python3-devel)",
    ),
    Cause(
        "libcuda",
        r"libcuda\.so cannot found|cannot find -l:?(lib)?cuda|unable to find library -l:?(lib)?cuda"
        r"|/sbin/ldconfig|Failed to open libcuda",
        "run ldconfig as root where the NVIDIA driver is, or set TRITON_LIBCUDA_PATH to the folder of its "
        "libcuda.so.1 (Triton 3.5 wants a libcuda.so beside it)",
    ),
    Cause(
        "C headers",
        r"\.h\b.{0,3}(: No such file| file not found)|cannot find -lc\b|cannot find \S*crt\w+\.o",
        "install the C library's headers (Debian, Ubuntu: apt-get install libc6-dev; Fedora: dnf install glibc-devel)",
    ),
    Cause(
        "C compiler crashed",
        r"C compiler .* (died with|.*(internal compiler error|Segmentation fault))",
        "if it goes on, set CC to another C compiler",
        True,
    ),
    Cause("C compiler failed once", r"C compiler .* (but not a second time|took more than \d+ s)", "", True),
    Cause(
        "Triton's backend",
        r"active drivers|Unknown backend device|Backend device .* is not active",
        f"unset TRITON_DEFAULT_BACKEND or set it to nvidia; where that does not help: {ANEW}",
    ),
    Cause(
        "no ptxas",
        r"Cannot find ptxas|(Permission denied|Exec format error|No such file or directory): '[^']*ptxas",
        f"Triton's ptxas is missing or cannot be run: {ANEW}, or set TRITON_PTXAS_PATH (TRITON_PTXAS_BLACKWELL_PATH "
        "where Triton has two) to another",
    ),
    Cause(
        "old ptxas",
        r"not defined for option 'gpu-name'|Unsupported \.version|Unsupported \.target|unsupported gpu arch",
        "this ptxas is too old for the GPU or for Triton: unset TRITON_PTXAS_PATH if it is set, or take a newer Triton",
    ),
    Cause(
        "ptxas",
        r"PTXASError|\bptxas\b",
        f"another ptxas may do: {ANEW}, or set TRITON_PTXAS_PATH (TRITON_PTXAS_BLACKWELL_PATH where Triton has two)",
    ),
    Cause(
        "driver",
        r"unsupported toolchain|UnsupportedPtxVersion|driver version is insufficient|InsufficientDriver"
        r"|device kernel image is invalid|InvalidKernelImage|PTX JIT|forward compatibility was attempted"
        r"|undefined symbol: cu[A-Z]|unsupported display driver",
        "the NVIDIA driver is too old for this torch or Triton: update it, or install a torch for the CUDA that it "
        "supports (python -m inception_fused shows which)",
    ),
    Cause(
        "architecture",
        r"no kernel image|NoKernelImage|invalid device function|InvalidDeviceFunction",
        "this build of torch or Triton has no code for the GPU: install one that has (torch.cuda.get_arch_list()), "
        "and unset TRITON_OVERRIDE_ARCH if it is set",
    ),
    Cause(
        "broken context",
        r"illegal memory access|misaligned address|unspecified launch failure|device-side assert|illegal instruction"
        r"|uncorrectable|IllegalAddress|LaunchFailure",
        "an earlier kernel of this process failed, and CUDA runs nothing more in it: start it anew, with "
        "CUDA_LAUNCH_BLOCKING=1 to find the kernel",
    ),
    Cause(
        "GPU taken",
        r"busy or unavailable|DevicesUnavailable",
        "another process may hold the GPU for itself: nvidia-smi -q -d COMPUTE,PIDS",
        True,
    ),
    Cause(
        "GPU not ready",
        r"system not yet initialized|SystemNotReady",
        "the machine's NVLink is not up: start nvidia-fabricmanager, or wait for it",
        True,
    ),
    Cause("fork", r"in forked subprocess", 'start the process by "spawn" or "forkserver"'),
    Cause(
        "no result",
        r"did not write its result",
        "the GPU or its driver does not work: nvidia-smi and the kernel's log (dmesg, lines with Xid) may say why",
    ),
    Cause(
        "file system",
        r"\[Errno (4|5|11|16|17|26|39|110|116)\]|resource busy|Stale file handle|temporarily unavailable"
        r"|Text file busy|timed out|TimeoutError|JSONDecodeError|EOFError|file too short"
        r"|invalid ELF header|FileNotFoundError.* in Triton's cache folder",
        "if it goes on, set TRITON_CACHE_DIR to a folder on this machine's own disk that no other process uses",
        True,
    ),
    Cause(
        "Triton's cache",
        r" in Triton's cache folder|Could not create or locate cache dir",
        "set TRITON_CACHE_DIR to a folder that this process may write",
    ),
    Cause(
        "permission",
        r"Permission denied|Read-only file system|Operation not permitted|Not a directory",
        "let this process have access to it",
    ),
    Cause(
        "Triton's installation",
        r"^(Import|ModuleNotFound|Attribute|Name|Syntax)Error|undefined symbol|GLIBC|cannot open shared object",
        f"this Triton cannot be used: {ANEW}, or take another one (python -m inception_fused shows which pairs with "
        "torch are known)",
    ),
)
"""The first whose signs are found is it: the more particular come first."""


class Failure(NamedTuple):
    """A reason for a user. text: the error's words and the remedy; kind: the cause's name, or the error's type where
    none is known; passes: whether another attempt may succeed."""

    text: str
    kind: str
    passes: bool


def cause_of(words: str) -> Cause | None:
    """The cause whose signs are in an error's words; None where the table knows none."""
    return next((cause for cause in CAUSES if re.search(cause.signs, words, re.IGNORECASE | re.DOTALL)), None)


def failure(error: Exception, what: str | None = None) -> Failure:
    """The reason that an error is. what: what could not be done, whose remedies the table has; None for an error whose
    message says both already.

    What no cause is known for may pass: to ask again costs little, and to give up would be for the process's life.
    """
    said = words(error)
    cause = cause_of(said)
    kind, passes = (type(error).__name__, True) if cause is None else (cause.name, cause.passes)
    if what is None:
        return Failure(str(error), kind, passes)
    parts = [f"{what} ({said})", cause.remedy if cause is not None else "", "it is tried again later" if passes else ""]
    return Failure("; ".join(filter(None, parts)), kind, passes)


def words(error: Exception) -> str:
    """What an error says, in one line, with what it leaves out: a compiler's own words, and whose the file is."""
    if isinstance(error, subprocess.CalledProcessError):
        return _short(_of_program(error))
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and error.filename is not None:
        if str(error.filename) == os.environ.get("CC"):
            text += ", which CC names"
        elif caches.is_in_triton_cache(str(error.filename)):
            text += " in Triton's cache folder"
            text += ", which TRITON_CACHE_DIR names" if os.environ.get("TRITON_CACHE_DIR") else ""
    return _short(text)


def _short(text: str) -> str:
    line = " ".join(text.partition("Repro command:")[0].split())
    return line if len(line) <= LONGEST else line[:LONGEST] + " ..."


def _of_program(error: subprocess.CalledProcessError) -> str:
    """A program that failed. Triton's command line is left out: its paths say nothing and could read like signs."""
    command = [str(part) for part in error.cmd] if isinstance(error.cmd, (list, tuple)) else [str(error.cmd)]
    how = str(error).rpartition("' ")[2].rstrip(".")  # "returned non-zero exit status 1", "died with <Signals...>"
    compiles = "-shared" in command
    text = f"{type(error).__name__}: {'the C compiler ' if compiles else ''}{command[0]} {how}"
    said = _compiler_words(command) if compiles else (error.stderr or error.output or b"")
    said = said.decode(errors="replace") if isinstance(said, bytes) else said
    return f"{text}: {said}" if said.strip() else text


def _compiler_words(command: list[str]) -> str:
    """The first error that the C compiler reports when it is asked again: the first time it told only stderr.

    Where Triton's source was temporary one line takes its place, which wants the same headers and libraries.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            given = next(part for part in command if part.endswith((".c", ".cpp")))
            source = Path(given)
            if not source.is_file():
                source = Path(folder, f"again{source.suffix}")
                source.write_text("#include <Python.h>\n")
            again = [str(source) if part == given else part for part in command]
            again[again.index("-o") + 1] = str(Path(folder, "again.so"))
            done = subprocess.run(
                again, capture_output=True, text=True, errors="replace", timeout=RERUN_S,
                env=os.environ | {"LC_ALL": "C"},
            )  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"asked again, it took more than {RERUN_S:.0f} s"
    except (OSError, StopIteration, ValueError) as error:
        return f"{type(error).__name__}: {error}" if isinstance(error, OSError) else ""
    if done.returncode == 0:
        return "but not a second time"
    lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
    telling = (line for line in lines if re.search(r"error|cannot|fatal|killed|unable|No space", line, re.IGNORECASE))
    return next(telling, lines[0] if lines else "")
