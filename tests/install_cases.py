"""Installs the project as different machines would, each into a fresh virtual environment, and judges the outcome.

Tools are hidden in a private mount namespace, the network by a private network namespace, an old driver is a stub: the
machine itself is left as it is. torch, triton and numpy are those of the calling environment.

    python tests/install_cases.py --list
    python tests/install_cases.py --case nvcc --case wheels --json cases.json
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "csrc"))

import toolchain

ROOT = Path(__file__).resolve().parents[1]
COMPILERS = ("g++", "c++", "gcc", "cc", "clang++", "clang")
BUILD_TOOLS = ("setuptools", "pybind11", "ninja")
STUB_DRIVER = """
int cuDriverGetVersion(int *version) { *version = 12020; return 0; }
int cuInit(unsigned flags) { return 100; }
"""
LOOK = """
import importlib.util as util, json, pathlib, sys
sys.modules["torch"] = None
package = pathlib.Path(util.find_spec("inception_fused").origin).parent
facts = json.loads((package / "_build.json").read_text())
facts["files"] = [path.name for path in package.glob("_native*")]
for name in facts["files"]:
    spec = util.spec_from_file_location("inception_fused._native", package / name)
    spec.loader.exec_module(util.module_from_spec(spec))
facts["libcuda"] = "libcuda.so" in pathlib.Path("/proc/self/maps").read_text()
print(json.dumps(facts))
"""


class Case(NamedTuple):
    """One machine. compiler: the origin of nvcc that is expected, None where nothing is built; words: of the reason."""

    what: str
    compiler: str | None = None
    words: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    wish: str = ""
    network: bool = True
    isolated: bool = True
    few_wheels: bool = False
    old_driver: bool = False
    way: str = "editable"


CASES = {
    "nvcc": Case("nvcc on the machine; a second install compiles only what changed", "system"),
    "wheels": Case("no nvcc: NVIDIA's wheels", "wheels", hidden=("nvcc",)),
    "nothing": Case(
        "no nvcc and an index without NVIDIA's wheels",
        words=("no nvcc", "pip cannot get"), hidden=("nvcc",), few_wheels=True,
    ),
    "no-compiler": Case("no C++ compiler", words=("no C++ compiler",), hidden=COMPILERS),
    "old-driver": Case("a driver older than nvcc", words=("driver supports CUDA 12.2",), old_driver=True),
    "old-driver-wheels": Case(
        "no nvcc, and a driver older than NVIDIA's wheels",
        words=("no nvcc", "driver supports CUDA 12.2"), hidden=("nvcc",), old_driver=True,
    ),
    "switched-off": Case("INCEPTION_FUSED_CUDA=0", words=("INCEPTION_FUSED_CUDA=0",), wish="0"),
    "offline": Case("no network, --no-build-isolation", "system", network=False, isolated=False),
    "sdist": Case("an sdist, installed", "system", way="sdist"),
    "wheel": Case("a wheel, installed into another environment", "system", way="wheel"),
}  # fmt: skip


class Failed(Exception):  # noqa: N818 (an expectation, not an error of this script)
    """A case did not come out as expected; the message says what was seen."""


class Skipped(Exception):  # noqa: N818
    """A case cannot be made on this machine; the message says why."""


class Machine:
    """A folder with a copy of the project, a fresh virtual environment and the case's hidings."""

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.source, self.venv = folder / "source", folder / "venv"
        self.python = self.venv / "bin" / "python"
        files = _git("ls-files", "--cached", "--others", "--exclude-standard", "-z").split("\0")
        for name in filter(None, files):
            if (ROOT / name).is_file():
                (self.source / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, self.source / name)
        self.environ = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
        self.environ |= {toolchain.VARIABLE: case.wish, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
        if case.hidden:
            for name in ("CUDA_HOME", "CUDA_PATH", "CXX", "CC"):
                self.environ.pop(name, None)
        self.fresh_environment()
        self.inside = _namespace(case)
        if case.few_wheels:
            wheels = folder / "wheels"
            self.run([self.python, "-m", "pip", "download", "-q", "--no-deps", "-d", wheels, *BUILD_TOOLS])
            self.environ |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(wheels)}
        if case.old_driver:
            (folder / "driver.c").write_text(STUB_DRIVER)
            self.run(["cc", "-shared", "-o", folder / "libcuda.so.1", folder / "driver.c"])
            self.environ["LD_LIBRARY_PATH"] = str(folder)

    def fresh_environment(self) -> None:
        """A virtual environment that sees the caller's packages after its own."""
        self.run([sys.executable, "-m", "venv", "--clear", self.venv])
        site = next(self.venv.glob("lib/python*/site-packages"))
        # Sorts after the line of an editable install, so that a copy in the caller's environment is not the one found.
        (site / "zz_caller.pth").write_text(sysconfig.get_path("purelib") + "\n")
        if not self.case.isolated:
            # Python 3.11's venv brings a setuptools that is too old, and it would come before the caller's.
            self.run([self.python, "-m", "pip", "uninstall", "-q", "-y", "setuptools"])

    def run(self, command: Sequence[object], prefix: Sequence[str] = ()) -> str:
        """The stdout of a command that ends well. Raises Failed with the end of its output for another."""
        words = [*prefix, *map(str, command)]
        done = subprocess.run(words, cwd=self.folder, env=self.environ, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"{shlex.join(words[len(prefix) :])}: {(done.stdout + done.stderr)[-1500:]}")
        return done.stdout

    def pip(self, *words: object, inside: bool = True) -> None:
        options = [] if self.case.isolated else ["--no-build-isolation"]
        command = [self.python, "-m", "pip", *words[:1], "--no-deps", *options, *words[1:]]
        self.run(command, self.inside if inside else ())


def editable(machine: Machine) -> None:
    """``pip install -e``."""
    machine.pip("install", "-e", machine.source)


def sdist(machine: Machine) -> None:
    """An sdist by the project's own backend, in the calling environment, then installed."""
    _needs("setuptools")
    make = "import sys; sys.path.insert(0, 'csrc'); import build_backend; build_backend.build_sdist(sys.argv[1])"
    (machine.source / "inception_fused" / "_build.json").write_text("{}")
    machine.run(["env", "-C", machine.source, sys.executable, "-c", make, machine.folder])
    (archive,) = machine.folder.glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        names = {name.partition("/")[2] for name in packed.getnames()}
    wanted = {f"csrc/{path.name}" for path in (machine.source / "csrc").iterdir() if path.is_file()}
    wanted.add("conftest.py")  # without which no test runs
    unwanted = [name for name in names if name.endswith(("_build.json", ".so", ".pyc"))]
    if wanted - names or unwanted:
        raise Failed(f"the sdist lacks {sorted(wanted - names)} and has {unwanted}")
    machine.pip("install", archive)


def wheel(machine: Machine) -> None:
    """A wheel, installed into another environment than the one that built it."""
    machine.pip("wheel", "-w", machine.folder / "dist", machine.source)
    (built,) = (machine.folder / "dist").glob("*.whl")
    names = zipfile.ZipFile(built).namelist()
    if built.stem.endswith("-none-any") or "inception_fused/_build.json" not in names:
        raise Failed(f"{built.name} is no platform wheel with _build.json in it: {names}")
    machine.fresh_environment()
    machine.pip("install", "--no-index", built, inside=False)


def reinstall(machine: Machine) -> float:
    """The seconds of a second editable install after a change to one file, which alone may be compiled again."""
    objects = {path: path.stat().st_mtime_ns for path in machine.source.glob("build/native/*/*.o")}
    with (machine.source / "csrc" / "bind.cpp").open("a") as file:
        file.write("// changed\n")
    started = time.perf_counter()
    editable(machine)
    changed = sorted(path.name for path, stamp in objects.items() if path.stat().st_mtime_ns != stamp)
    if changed != ["bind.o"]:
        raise Failed(f"after a change to bind.cpp alone, a second install compiled {changed}")
    return time.perf_counter() - started


WAYS: dict[str, Callable[[Machine], None]] = {"editable": editable, "sdist": sdist, "wheel": wheel}


def run_case(name: str, case: Case) -> dict[str, Any]:
    """The facts of one case: status ("as expected", "FAILED", "skipped"), seconds, _build.json, what info() says."""
    facts: dict[str, Any] = {"case": name, "what": case.what, "status": "as expected"}
    with tempfile.TemporaryDirectory(prefix="install_case_") as folder:
        try:
            _check_possible(case)
            machine = Machine(case, Path(folder))
            started = time.perf_counter()
            WAYS[case.way](machine)
            facts["seconds"] = round(time.perf_counter() - started, 1)
            if case.old_driver:
                machine.environ.pop("LD_LIBRARY_PATH")
            facts["build"] = json.loads(machine.run([machine.python, "-c", LOOK]))
            lines = machine.run([machine.python, "-m", "inception_fused"]).splitlines()
            facts["info"] = next((line for line in lines if line.startswith("native")), None)
            judge(case, facts["build"])
            if name == "nvcc":
                facts["seconds_again"] = round(reinstall(machine), 1)
        except (Failed, Skipped) as outcome:
            facts |= {"status": "skipped" if isinstance(outcome, Skipped) else "FAILED", "why": str(outcome)}
    return facts


def judge(case: Case, build: dict[str, Any]) -> None:
    """Raises Failed where an install came to something else than its case says."""
    seen = {"built": build["built"], "compiler": build["compiler"] if build["built"] else None}
    wanted = {"built": case.compiler is not None, "compiler": case.compiler}
    lacking = [word for word in case.words if word not in (build["reason"] or "")]
    if seen != wanted or bool(build["files"]) != build["built"] or build["libcuda"] or lacking:
        raise Failed(f"wanted {wanted} and {case.words} in the reason; found {json.dumps(build)}")


def _check_possible(case: Case) -> None:
    try:
        nvcc = toolchain.find_nvcc(toolchain.find_host_compiler())
    except toolchain.CannotBuild as problem:
        raise Skipped(f"needs a machine with its own compilers: {problem}") from None
    if nvcc.origin != "system" and case.compiler == "system":
        raise Skipped("needs a CUDA toolkit on the machine")
    if not case.isolated:
        for name in BUILD_TOOLS:
            _needs(name)
    if case.hidden or not case.network:
        if shutil.which("unshare") is None:
            raise Skipped("needs unshare (util-linux) to hide tools or the network")
        with tempfile.NamedTemporaryFile() as file:
            trial = subprocess.run([*_namespace(case, [file.name]), "true"], capture_output=True, text=True)
        if trial.returncode != 0:
            raise Skipped(f"namespaces are not permitted: {trial.stderr.strip()}")


def _namespace(case: Case, files: Sequence[str] | None = None) -> list[str]:
    """The words before a command that run it where the case's programs are /dev/null, and without its network."""
    if not case.hidden and case.network:
        return []
    flags = ["--mount", *([] if case.network else ["--net"]), *(["--map-root-user"] if os.geteuid() else [])]
    mounts = [f"mount --bind /dev/null {shlex.quote(file)}" for file in files or _programs(case.hidden)]
    return ["unshare", *flags, "sh", "-c", "; ".join(["set -e", *mounts, 'exec "$@"']), "sh"]


def _programs(names: Sequence[str]) -> list[str]:
    folders = [*os.environ["PATH"].split(os.pathsep), *(f"{os.environ.get(home, '')}/bin" for home in toolchain.HOMES)]
    # The real nvcc behind a wrapper script lies in the folder of its toolkit.
    nvcc = toolchain.find_nvcc(toolchain.find_host_compiler())
    folders += [str(nvcc.root / "bin"), str(toolchain.DEFAULT_TOOLKIT / "bin")]
    paths = [Path(folder) / name for folder in folders for name in names]
    return list(dict.fromkeys(str(path.resolve()) for path in paths if path.is_file()))


def _needs(package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise Skipped(f"needs {package} in the calling environment")


def _git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout


def record(path: Path, results: Sequence[dict[str, Any]]) -> None:
    """Writes {"cores", "python", "cases": [{case, what, status, built, seconds, seconds_again, why}]}.

    The rest of the facts names folders of this machine.
    """
    keys = ("case", "what", "status", "seconds", "seconds_again", "why")
    cases = [
        {key: facts[key] for key in keys if key in facts} | {"built": facts.get("build", {}).get("built")}
        for facts in results
    ]
    found = {"cores": os.cpu_count(), "python": sys.version.split()[0], "cases": cases}
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(found, indent=2) + "\n")
    os.replace(part, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="only this case; may be repeated")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument("--json", type=Path, help="write every case's outcome and seconds to this file")
    parser.add_argument("--strict", action="store_true", help="count a skipped case as a failure")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{name:<18} {case.what}" for name, case in CASES.items()))
        return
    results = []
    for name in args.case or CASES:
        facts = run_case(name, CASES[name])
        results.append(facts)
        seconds = " + ".join(str(facts[key]) for key in ("seconds", "seconds_again") if key in facts) or "-"
        built = facts.get("build", {}).get("built", "-")
        says = facts.get("why") or facts.get("info") or facts["build"]["reason"] or ""
        print(f"{name:<18} {seconds:>12} s  built {built!s:<5}  {facts['status']}  {says}", flush=True)
    if args.json:
        record(args.json, results)
    sys.exit(any(facts["status"] in ("FAILED", "skipped" if args.strict else "") for facts in results))


if __name__ == "__main__":
    main()
