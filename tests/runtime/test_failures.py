"""What a first compile or launch meets: every cause its own remedy, found in what Triton and CUDA really say."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from triton.runtime import build

from inception_fused.runtime import failures
from inception_fused.runtime.failures import CAUSES, cause_of, failure

SOURCE = "#include <Python.h>\nint inception_fused_test(void) { return 0; }\n"

SAID = [
    ("capture", True, "CUDA error: operation not permitted when stream is capturing"),
    ("capture", True, "operation failed due to a previous error during capture (cudaErrorStreamCaptureInvalidated)"),
    ("memory of the machine", True, "the C compiler gcc returned: gcc: fatal error: Killed signal terminated program"),
    ("memory of the machine", True, "cc1: out of memory allocating 65536 bytes after a total of 1351680 bytes"),
    ("memory of the machine", True, "OSError: [Errno 12] Cannot allocate memory"),
    ("memory of the machine", True, "PTXASError: PTXAS error: `ptxas` failed with error code -9"),
    ("memory of the GPU", True, "Triton Error [CUDA]: out of memory"),
    ("memory of the GPU", True, "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 MiB."),
    ("no space", True, "OSError: [Errno 28] No space left on device"),
    ("no space", True, "OSError: [Errno 122] Disk quota exceeded"),
    ("open files", True, "OSError: [Errno 24] Too many open files: '/tmp/x'"),
    ("temporary folder", True, "FileNotFoundError: [Errno 2] No usable temporary directory found in ['/tmp', '/']"),
    ("noexec", False, "ImportError: /c/cuda_utils.so: failed to map segment from shared object"),
    ("no C compiler", False, "RuntimeError: Failed to find C compiler. Please specify via CC environment variable"),
    ("no C compiler", False, "sh: 1: gcc: not found"),
    ("half a C compiler", False, "gcc: fatal error: cannot execute 'cc1': execvp: No such file or directory"),
    ("Python.h", False, "main.c:10:10: fatal error: Python.h: No such file or directory"),
    ("Python.h", False, "main.c:10:10: fatal error: 'Python.h' file not found"),
    ("libcuda", False, 'AssertionError: libcuda.so cannot found! Please make sure GPU is set up and then run "/sbin'),
    ("libcuda", False, "/usr/bin/ld: cannot find -lcuda: No such file or directory"),
    ("libcuda", False, "/usr/bin/ld: cannot find -l:libcuda.so.1: No such file or directory"),
    ("libcuda", False, "FileNotFoundError: [Errno 2] No such file or directory: '/sbin/ldconfig'"),
    ("C headers", False, "/t/include/cuda.h:56:10: fatal error: stdlib.h: No such file or directory"),
    ("Triton's backend", False, "RuntimeError: 0 active drivers ([]). There should only be one."),
    ("no ptxas", False, "RuntimeError: Cannot find ptxas"),
    ("no ptxas", False, "RuntimeError: Cannot find ptxas-blackwell"),
    ("no ptxas", False, "PermissionError: [Errno 13] Permission denied: '/t/nvidia/bin/ptxas-blackwell'"),
    ("no ptxas", False, "OSError: [Errno 8] Exec format error: '/t/nvidia/bin/ptxas'"),
    ("old ptxas", False, "PTXASError: PTXAS error: ptxas fatal : Value 'sm_121a' is not defined for option 'gpu-name'"),
    ("ptxas", False, "PTXASError: PTXAS error: Internal Triton PTX codegen error `ptxas` stderr: ..."),
    ("driver", False, "RuntimeError: Triton Error [CUDA]: device kernel image is invalid"),
    ("driver", False, "the provided PTX was compiled with an unsupported toolchain. (cudaErrorUnsupportedPtxVersion)"),
    ("driver", False, "CUDA driver version is insufficient for CUDA runtime version (cudaErrorInsufficientDriver)"),
    ("driver", False, "ImportError: /c/cuda_utils.so: undefined symbol: cuTensorMapEncodeIm2col"),
    ("architecture", False, "CUDA error: no kernel image is available for execution on the device"),
    ("broken context", False, "CUDA error: an illegal memory access was encountered"),
    ("GPU taken", True, "CUDA error: CUDA-capable device(s) is/are busy or unavailable"),
    ("GPU not ready", True, "system not yet initialized (cudaErrorSystemNotReady)"),
    ("fork", False, "RuntimeError: Cannot re-initialize CUDA in forked subprocess."),
    ("no result", False, "RuntimeError: a probe kernel ran and did not write its result"),
    ("file system", True, "OSError: [Errno 16] Device or resource busy: '/c/x.so'"),
    ("file system", True, "OSError: [Errno 116] Stale file handle: '/c/x.json'"),
    ("file system", True, "OSError: [Errno 39] Directory not empty: '/c/tmp.pid_7'"),
    ("file system", True, "FileNotFoundError: [Errno 2] No such file or directory: '/c/x' in Triton's cache folder"),
    ("file system", True, "JSONDecodeError: Expecting value: line 1 column 1 (char 0)"),
    ("file system", True, "ImportError: /c/cuda_utils.so: file too short"),
    ("Triton's cache", False, "OSError: [Errno 30] Read-only file system: '/c/ABC' in Triton's cache folder"),
    ("permission", False, "PermissionError: [Errno 13] Permission denied: '/tmp/tmp1'"),
    ("Triton's installation", False, "ImportError: libtriton.so: version `GLIBCXX_3.4.30' not found"),
    ("Triton's installation", False, "ModuleNotFoundError: No module named 'triton._C'"),
]


@pytest.mark.parametrize(("name", "passes", "said"), SAID, ids=[f"{name}-{said[:40]}" for name, _, said in SAID])
def test_causes_are_told_apart(name, passes, said):
    cause = cause_of(said)
    assert cause is not None
    assert (cause.name, cause.passes) == (name, passes)


def test_no_remedy_speaks_of_what_is_not_wrong():
    """The table's promise: a C compiler is advised where it is the cause, and nowhere else."""
    about_compilers = {cause.name for cause in CAUSES if "apt-get install" in cause.remedy or "set CC" in cause.remedy}
    assert about_compilers == {
        "CC", "no C compiler", "half a C compiler", "Python.h", "C headers", "C compiler crashed",
    }  # fmt: skip
    assert len({cause.name for cause in CAUSES}) == len(CAUSES)


def test_what_is_not_known_gets_its_own_words_and_no_advice():
    found = failure(RuntimeError("PassManager::run failed"), "Triton cannot")
    assert found.text == "Triton cannot (RuntimeError: PassManager::run failed); it is tried again later"
    assert (found.kind, found.passes) == ("RuntimeError", True)
    assert failure(RuntimeError("the extension's own words")).text == "the extension's own words"


def test_a_log_of_pages_becomes_a_line():
    log = "`ptxas` failed with error code 255\n`ptxas` stderr:\nfatal: no\n\nRepro command: /secret/path -o /x.o\n"
    said = failures.words(RuntimeError(log))
    assert said == "RuntimeError: `ptxas` failed with error code 255 `ptxas` stderr: fatal: no"
    assert len(failures.words(RuntimeError("x" * 10**5))) < 600


@pytest.fixture
def compile_source(tmp_path, monkeypatch):
    """Triton's own build of a C module as it builds its launcher; returns the Failure, or None where it succeeds."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("CC", raising=False)
    finders = [getattr(build, "_find_compiler", None)]  # of Triton 3.8 and later, which remember what they found
    for finder in filter(None, finders):
        finder.cache_clear()

    def run():
        try:
            # A name of its own, so that nothing that was loaded before is found.
            build.compile_module_from_src(src=SOURCE, name="inception_fused_no_module")
        except ImportError as error:
            # It was built and can be loaded: it has no PyInit function.
            return None if "PyInit" in str(error) else failure(error, "Triton cannot")
        except Exception as error:
            return failure(error, "Triton cannot")
        return None

    yield run
    for finder in filter(None, finders):
        finder.cache_clear()


def fake_compiler(folder: Path, script: str) -> str:
    path = folder / "cc-fake"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return str(path)


FAKES = [
    ("Python.h", False, 'echo "main.c:1:10: fatal error: Python.h: No such file or directory" >&2; exit 1'),
    ("memory of the machine", True, "kill -KILL $$"),
    ("C compiler crashed", True, "kill -SEGV $$"),
    (
        "no space",
        True,
        'echo "main.c:9:1: fatal error: error writing to /tmp/a.s: No space left on device" >&2; exit 1',
    ),
    ("CalledProcessError", True, "exit 3"),
]


@pytest.mark.parametrize(("kind", "passes", "script"), FAKES, ids=[kind for kind, _, _ in FAKES])
def test_compilers_that_fail(kind, passes, script, compile_source, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("CC", fake_compiler(tmp_path, script))
    found = compile_source()
    assert (found.kind, found.passes) == (kind, passes), found.text
    assert "cc-fake" in found.text
    assert ("it is tried again later" in found.text) == passes
    assert "-Wno-psabi" not in found.text, "Triton's command line says nothing to a user"
    capfd.readouterr()


def test_a_compiler_that_fails_once(compile_source, tmp_path, monkeypatch):
    real = shutil.which("gcc") or shutil.which("clang")
    if real is None:
        pytest.skip("no C compiler")
    flag = tmp_path / "flag"
    script = f'[ -e {flag} ] && exec {real} "$@"; touch {flag}; exit 1'
    monkeypatch.setenv("CC", fake_compiler(tmp_path, script))
    found = compile_source()
    assert (found.kind, found.passes) == ("C compiler failed once", True), found.text


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("PATH", "/nonexistent", "no C compiler"),
        ("CC", "nonsense", "CC"),
        ("CC", "gcc -O0", "CC"),
        ("CC", "/etc/passwd", "CC"),
        ("TRITON_CACHE_DIR", "/etc/passwd/cache", "Triton's cache"),
        ("TRITON_CACHE_DIR", "/proc/cache", "file system"),
    ],
)
def test_environments_that_fail(name, value, kind, compile_source, monkeypatch):
    monkeypatch.setenv(name, value)
    found = compile_source()
    assert found.kind == kind, found.text
    assert name == "PATH" or f"which {name} names" in found.text


def test_a_program_that_said_why_it_failed():
    error = subprocess.CalledProcessError(1, [sys.executable, "--version"], output=b"GLIBC_2.38 not found")
    assert "GLIBC_2.38 not found" in failures.words(error)
