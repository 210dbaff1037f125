"""The build command of inception_fused._native: finds the tools, compiles with ninja, stores what came of it.

An install never fails because of it, unless INCEPTION_FUSED_CUDA=1 wants that. Whatever happens is written to
inception_fused/_build.json, because pip shows the output of a build to nobody; info() reads it.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, OptionError

import build_backend
import toolchain
from toolchain import CannotBuild, HostCompiler, Nvcc

ROOT = Path(__file__).resolve().parents[1]
KERNELS, BINDING = ("csrc/grouped_gemm.cu", "csrc/grouped_dgrad.cu"), "csrc/bind.cpp"
SOURCES = [*KERNELS, BINDING]
ELEMENTS = ("bf16", "fp16", "tf32")
COMMON_FLAGS = ("-std=c++17", "-O3")
HOST_FLAGS = ("-fPIC", "-fvisibility=hidden")
DEVICE_FLAGS = (f"-Xcompiler={','.join(HOST_FLAGS)}", "-Xfatbin=-compress-all", "--threads=2")
LINK_FLAGS = ("-shared", "-Wl,--exclude-libs,ALL")
LIBRARIES = ("-lcudart_static", "-ldl", "-lrt", "-lpthread")
RECORD = "_build.json"
FAULT = re.compile(r"\b(error|fatal|undefined reference|cannot find)\b", re.IGNORECASE)
FOLDERS = re.compile(r"(?<![\w.-])/(?:[^\s:/'\"()]+/)+")
IMPORT = """
import importlib.util as util, sys
spec = util.spec_from_file_location("inception_fused._native", sys.argv[1])
spec.loader.exec_module(util.module_from_spec(spec))
"""


class Outcome(NamedTuple):
    """What a build came to, as stored in inception_fused/_build.json. reason and remedy are None where it built.

    python: the tag of the interpreter that it was built for; several may share one checkout.
    """

    built: bool
    reason: str | None = None
    remedy: str | None = None
    cuda: str | None = None
    compiler: str | None = None
    architectures: tuple[str, ...] = ()
    ptx: str | None = None
    seconds: float = 0.0
    host_compiler: str | None = None
    python: str = sys.implementation.cache_tag


class Tools(NamedTuple):
    """What the build uses. links: stable name -> folder, for folders that pip puts elsewhere at every install.

    includes are other projects' headers, by such a name where there is one.
    """

    host: HostCompiler
    nvcc: Nvcc
    includes: list[Path]
    links: dict[str, Path]
    ninja: list[str]


class BuildNative(build_ext):
    """``build_ext`` with nvcc and ninja in place of setuptools' own compiler.

    Raises OptionError for a value of INCEPTION_FUSED_CUDA that is none; CompileError where it is 1 and nothing was
    built.
    """

    def run(self) -> None:
        try:
            requested = toolchain.requested()
        except ValueError as error:
            raise OptionError(str(error)) from None
        (extension,) = self.extensions
        target = Path(self.get_ext_fullpath(extension.name))
        outcome = attempt(target, requested)
        target.with_name(RECORD).write_text(json.dumps(outcome._asdict(), indent=2) + "\n")
        if outcome.built:
            return
        sentence = f"inception_fused is installed without its native extension: {outcome.reason}. {outcome.remedy}."
        if requested:
            raise CompileError(f"{toolchain.VARIABLE}=1, but {outcome.reason}. Remedy: {outcome.remedy}.")
        self.warn(sentence)

    def get_outputs(self) -> list[str]:
        return list(self._files())

    def get_output_mapping(self) -> dict[str, str]:
        return self._files() if self.inplace else {}

    def _files(self) -> dict[str, str]:
        """Path in the build folder -> path where :meth:`run` wrote it, of the files that are there."""
        (extension,) = self.extensions
        written = Path(self.get_ext_fullpath(extension.name))
        built = Path(self.build_lib) / self.get_ext_filename(extension.name)
        pairs = [(built, written), (built.with_name(RECORD), written.with_name(RECORD))]
        return {str(there): str(here) for there, here in pairs if here.is_file()}


def attempt(target: Path, requested: bool | None) -> Outcome:
    """Build the extension at target; where that cannot be, remove what an older build left there."""
    started = time.perf_counter()
    facts: dict[str, Any] = {}
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        if requested is False:
            raise CannotBuild(f"{toolchain.VARIABLE}=0 was set", f"unset {toolchain.VARIABLE} and install again")
        tools = find_tools(facts)
        compile_native(tools, target)
    except (CannotBuild, OSError) as problem:
        if isinstance(problem, OSError):
            problem = CannotBuild(
                f"the build's files cannot be written ({problem.strerror})",
                "free space, or remove the folder build/ that another user's installation may have left",
            )
        with contextlib.suppress(OSError):
            target.unlink(missing_ok=True)
        facts |= {"reason": problem.reason, "remedy": problem.remedy}
    else:
        facts |= {"architectures": tools.nvcc.architectures, "ptx": tools.nvcc.architectures[0]}
    return Outcome(built="reason" not in facts, seconds=round(time.perf_counter() - started, 1), **facts)


def find_tools(facts: dict[str, Any]) -> Tools:
    """Everything that the build uses; facts receives what is found, also when a later tool is missing.

    Raises CannotBuild for the first that is missing.
    """
    toolchain.check_platform()
    host = toolchain.find_host_compiler()
    facts["host_compiler"] = host.name
    headers = toolchain.python_headers()
    try:
        nvcc = toolchain.find_nvcc(host)
    except CannotBuild as missing:
        refusal = build_backend.kept_refusal()
        if refusal is None:
            raise
        raise CannotBuild(f"{missing.reason}, and {refusal.reason}", refusal.remedy) from None
    facts |= {"cuda": toolchain.dotted(nvcc.version), "compiler": nvcc.origin}
    toolchain.check_driver(toolchain.driver_version(), nvcc.version, "nvcc")
    pybind11 = _module("pybind11")
    bindings = f"pybind11-{pybind11.__version__}"
    links = {bindings: Path(pybind11.get_include())}
    if nvcc.origin == "wheels":
        name = f"cuda-{toolchain.dotted(nvcc.version)}"
        links[name] = nvcc.root
        moved = {key: Path(name) / getattr(nvcc, key).relative_to(nvcc.root) for key in ("include", "library")}
        nvcc = nvcc._replace(path=f"{name}/bin/nvcc", **moved)
    # As a system folder /usr/include would hide the C library's headers from those of C++.
    includes = [folder for folder in (nvcc.include, *headers, Path(bindings)) if folder != Path("/usr/include")]
    return Tools(host, nvcc, includes, links, _ninja())


def compile_native(tools: Tools, target: Path) -> None:
    """Compile and link in a folder that outlives this install, then put the extension at target.

    Raises CannotBuild with the compiler's first error, or where what was linked does not import.
    """
    versions = f"cuda-{toolchain.dotted(tools.nvcc.version)}-{tools.host.name.replace(' ', '-')}"
    folder = ROOT / "build" / "native" / f"{sys.implementation.cache_tag}-{versions}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        # Installs at the same time would spoil each other's objects.
        fcntl.flock(lock, fcntl.LOCK_EX)
        _compile_locked(tools, folder, target)


def _compile_locked(tools: Tools, folder: Path, target: Path) -> None:
    for name, place in tools.links.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(place)
    (folder / "build.ninja").write_text(ninja_file(tools, target.name))
    done = subprocess.run(
        [*tools.ninja, "-C", str(folder)],
        env=os.environ | {"LC_ALL": "C"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(done.stdout, flush=True)
    if done.returncode != 0:
        raise CannotBuild(
            f"compiling failed: {first_error(done.stdout)}",
            f"see the whole output with pip install -v, try another compiler by CXX or CUDA_HOME, or set "
            f"{toolchain.VARIABLE}=0",
        )
    trial = subprocess.run(
        [sys.executable, "-I", "-c", IMPORT, str(folder / target.name)], capture_output=True, text=True
    )
    if trial.returncode != 0:
        raise CannotBuild(
            f"the extension was built and does not import: {first_error(trial.stderr)}",
            f"try another compiler by CXX or CUDA_HOME, or set {toolchain.VARIABLE}=0",
        )
    # Replaced as a whole: writing into a file that a running process has mapped would crash it.
    fresh = target.with_name(target.name + ".new")
    shutil.copyfile(folder / target.name, fresh)
    fresh.chmod(0o755)
    fresh.replace(target)


def ninja_file(tools: Tools, output: str) -> str:
    """The text of build.ninja: an object for each kernel and element type, one of the binding, one shared object.

    Folders of other projects' headers are given as system folders, so that the depfiles list this project's headers
    alone: those in pip's isolated environment are new at every install and would recompile everything.
    """
    nvcc, host = tools.nvcc, tools.host.path
    first, *others = nvcc.architectures
    codes = [f"-gencode=arch=compute_{first},code=[sm_{first},compute_{first}]"]
    codes += [f"-gencode=arch=compute_{name},code=sm_{name}" for name in others]
    includes = ["-I", str(ROOT / "csrc"), *(word for folder in tools.includes for word in ("-isystem", str(folder)))]
    lines = [
        "ninja_required_version = 1.5",
        "rule device",
        f"  command = {_words(nvcc.path, '-ccbin', host, *COMMON_FLAGS, *DEVICE_FLAGS, *codes, *includes)} "
        "-DINCEPTION_FUSED_ELEMENT=$element -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule host",
        f"  command = {_words(host, *COMMON_FLAGS, *HOST_FLAGS, *includes)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {_words(host, *LINK_FLAGS)} $in -o $out {_words('-L', str(nvcc.library), *LIBRARIES)}",
    ]
    objects = {f"{Path(source).stem}_{element}.o": (source, element) for source in KERNELS for element in ELEMENTS}
    for name, (source, element) in objects.items():
        lines += [f"build {name}: device {_path(ROOT / source)}", f"  element = {element}"]
    lines += [f"build bind.o: host {_path(ROOT / BINDING)}"]
    lines += [f"build {output}: link {' '.join(objects)} bind.o"]
    return "\n".join(lines) + "\n"


def first_error(output: str) -> str:
    """The first line of a compiler's output that tells of an error, without the folders of this machine."""
    # ninja repeats the failed command, whose flags and paths may hold the same words.
    lines = [line.strip() for line in output.splitlines() if line.strip() and " -c " not in line]
    told = next((line for line in lines if FAULT.search(line)), lines[-1] if lines else "no output")
    return FOLDERS.sub("", told)[:300]


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise CannotBuild(
            f"the Python package {name} is missing ({error})",
            f"install {name}, or install without --no-build-isolation",
        ) from None


def _ninja() -> list[str]:
    if importlib.util.find_spec("ninja"):
        return [sys.executable, "-m", "ninja"]
    if found := shutil.which("ninja"):
        return [found]
    raise CannotBuild("ninja is missing", "install ninja, or install without --no-build-isolation")


def _words(*words: str) -> str:
    return " ".join(shlex.quote(word) for word in words).replace("$", "$$")


def _path(path: Path) -> str:
    return re.sub(r"([$ :])", r"$\1", str(path))
