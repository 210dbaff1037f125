"""What the build finds, asks for, writes and stores: with fake compilers and fake installers, nothing is compiled."""

from __future__ import annotations

import ctypes
import json
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("setuptools", minversion="77")

from setuptools import Distribution, Extension, build_meta
from setuptools.errors import CompileError, OptionError

import build_backend
import build_native
import toolchain
from toolchain import CannotBuild, HostCompiler, Nvcc

GXX = HostCompiler("/usr/bin/g++", "g++ 12.2.0")
NVCC = """#!/bin/sh
case "$*" in
  *--version*) echo "Cuda compilation tools, release {version}, V{version}.88" ;;
  *--dryrun*) echo '#$ TOP={root}/bin/..' >&2 ;;
  *--list-gpu-code*) printf 'sm_75\\nsm_80\\nsm_90\\nsm_103\\n' ;;
esac
"""


def script(path: Path, text: str = "#!/bin/sh\nexit 1\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def toolkit(root: Path, version: str = "13.0", lib: str = "lib64", files: bool = True) -> Path:
    script(root / "bin" / "nvcc", NVCC.format(version=version, root=root))
    for file in (root / "include" / "cuda_runtime.h", root / lib / "libcudart_static.a") if files else ():
        file.parent.mkdir()
        file.touch()
    return root


@pytest.fixture(autouse=True)
def _nothing_of_this_machine(monkeypatch, tmp_path):
    monkeypatch.setattr(toolchain, "DEFAULT_TOOLKIT", tmp_path / "no default")
    monkeypatch.setattr(build_backend, "REFUSAL", tmp_path / "build" / "refusal.json")
    monkeypatch.delenv(toolchain.VARIABLE, raising=False)


@pytest.mark.parametrize(("value", "wish"), [(None, None), ("", None), ("0", False), ("1", True)])
def test_what_is_requested(value, wish):
    assert toolchain.requested({} if value is None else {toolchain.VARIABLE: value}) is wish


def test_another_wish_is_refused_everywhere(monkeypatch):
    monkeypatch.setenv(toolchain.VARIABLE, "yes")
    with pytest.raises(ValueError, match="INCEPTION_FUSED_CUDA is 'yes'; it takes 1"):
        toolchain.requested()
    with pytest.raises(SystemExit, match="it takes 1"):
        build_backend.compiler_requirements()
    with pytest.raises(OptionError, match="it takes 1"):
        build_native.BuildNative(Distribution()).run()


PLATFORMS = [("darwin", "arm64", ""), ("linux", "ppc64le", "glibc"), ("linux", "x86_64", "")]


@pytest.mark.parametrize(("system", "machine", "libc"), PLATFORMS)
def test_other_platforms(monkeypatch, system, machine, libc):
    monkeypatch.setattr(toolchain.sys, "platform", system)
    monkeypatch.setattr(toolchain.platform, "machine", lambda: machine)
    monkeypatch.setattr(toolchain.platform, "libc_ver", lambda: (libc, ""))
    with pytest.raises(CannotBuild, match=f"this is {system} {machine}"):
        toolchain.check_platform()


def test_host_compiler(tmp_path):
    script(tmp_path / "c++", "#!/bin/sh\necho 14.1.0\n")
    assert toolchain.find_host_compiler({"PATH": str(tmp_path)}) == (str(tmp_path / "c++"), "c++ 14.1.0")
    script(tmp_path / "g++", "#!/bin/sh\necho 12.2.0\n")
    assert toolchain.find_host_compiler({"PATH": str(tmp_path)}).name == "g++ 12.2.0"
    other = script(tmp_path / "other" / "clang++", "#!/bin/sh\necho 19.1.0\n")
    found = toolchain.find_host_compiler({"PATH": "", "CXX": f"/x/ccache {other} -m64"})
    assert found == (str(other), "clang++ 19.1.0")


def test_no_host_compiler(tmp_path):
    with pytest.raises(CannotBuild, match=r"no C\+\+ compiler on PATH"):
        toolchain.find_host_compiler({"PATH": str(tmp_path)})
    with pytest.raises(CannotBuild, match="CXX names a compiler that is not there"):
        toolchain.find_host_compiler({"PATH": os.environ["PATH"], "CXX": "no-such-compiler"})
    script(tmp_path / "g++")
    with pytest.raises(CannotBuild, match=r"g\+\+ does not run"):
        toolchain.find_host_compiler({"PATH": str(tmp_path)})


def test_nvcc_behind_a_wrapper(tmp_path):
    root = toolkit(tmp_path / "cuda")
    script(tmp_path / "bin" / "nvcc", f'#!/bin/sh\nexec {root}/bin/nvcc "$@"\n')
    nvcc = toolchain.find_nvcc(GXX, {"PATH": str(tmp_path / "bin")}, [])
    assert nvcc[:5] == (str(tmp_path / "bin" / "nvcc"), "system", root, (13, 0), ("80", "90"))
    assert nvcc[5:] == (root / "include", root / "lib64")


def test_order_of_places(tmp_path, monkeypatch):
    homes = {name: toolkit(tmp_path / name) for name in ("home", "path", "default")}
    toolkit(tmp_path / "site" / "nvidia" / "cu13", lib="lib")
    monkeypatch.setattr(toolchain, "DEFAULT_TOOLKIT", homes["default"])
    environ = {"CUDA_HOME": str(tmp_path / "nowhere"), "CUDA_PATH": str(homes["home"]), "PATH": f"{homes['path']}/bin"}
    search = ["", str(tmp_path), str(tmp_path / "site")]
    assert toolchain.find_nvcc(GXX, environ, search).root == homes["home"]
    del environ["CUDA_PATH"]
    assert toolchain.find_nvcc(GXX, environ, search).root == homes["path"]
    environ["PATH"] = ""
    assert toolchain.find_nvcc(GXX, environ, search).root == homes["default"]
    monkeypatch.setattr(toolchain, "DEFAULT_TOOLKIT", tmp_path)
    nvcc = toolchain.find_nvcc(GXX, environ, search)
    assert nvcc.origin == "wheels"
    assert nvcc.library == tmp_path / "site" / "nvidia" / "cu13" / "lib"
    with pytest.raises(CannotBuild, match="no nvcc in"):
        toolchain.find_nvcc(GXX, environ, search[:2])


UNUSABLE = [
    (lambda root: toolkit(root, version="11.8"), "nvcc of PATH is CUDA 11.8; 12.0 or newer is wanted"),
    (lambda root: toolkit(root, files=False), r"without CUDA's headers \(cuda_runtime.h\)"),
    (lambda root: script(root / "bin" / "nvcc"), "nvcc of PATH does not run"),
]


@pytest.mark.parametrize(("change", "reason"), UNUSABLE)
def test_unusable_nvcc(tmp_path, change, reason):
    change(tmp_path / "cuda")
    environ = {"PATH": str(tmp_path / "cuda" / "bin")}
    with pytest.raises(CannotBuild, match=reason):
        toolchain.find_nvcc(GXX, environ, [])
    toolkit(tmp_path / "nvidia" / "cu13", lib="lib")
    assert toolchain.find_nvcc(GXX, environ, [str(tmp_path)]).origin == "wheels"


def test_driver_version(monkeypatch):
    def answer(number):
        number._obj.value = 12020
        return status

    monkeypatch.setattr(ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=answer))
    status = 0
    assert toolchain.driver_version() == (12, 2)
    status = 34
    assert toolchain.driver_version() is None


def test_driver_of_the_compilers_generation_is_enough():
    toolchain.check_driver(None, (13, 0), "nvcc")
    toolchain.check_driver((13, 0), (13, 2), "nvcc")
    with pytest.raises(CannotBuild, match="supports CUDA 12.9") as caught:
        toolchain.check_driver((12, 9), (13, 0), "nvcc")
    assert "a CUDA 12 toolkit" in caught.value.remedy


def refuse(*_args):
    raise CannotBuild("not here", "get one")


SITUATIONS = [  # INCEPTION_FUSED_CUDA, what is other than on a machine without nvcc, wheels asked for, why not
    (None, {}, True, None),
    ("1", {}, True, None),
    ("0", {}, False, None),
    *((None, {name: refuse}, False, None) for name in ("check_platform", "python_headers", "find_host_compiler")),
    (None, {"find_nvcc": lambda host: NVCC}, False, None),
    (None, {"driver_version": lambda: (13, 0)}, True, None),
    (None, {"driver_version": lambda: (12, 9)}, False, "supports CUDA 12.9"),
    (None, {"pip_refusal": lambda: CannotBuild("pip cannot", "get one")}, False, "pip cannot"),
]


@pytest.mark.parametrize(("wish", "patch", "asked", "kept"), SITUATIONS)
def test_compiler_requirements(monkeypatch, wish, patch, asked, kept):
    here = {"check_platform": lambda: None, "python_headers": list, "find_host_compiler": lambda: GXX}
    here |= {"find_nvcc": refuse, "driver_version": lambda: None, "pip_refusal": lambda: None} | patch
    for name, function in here.items():
        monkeypatch.setattr(build_backend if name == "pip_refusal" else toolchain, name, function)
    if wish is not None:
        monkeypatch.setenv(toolchain.VARIABLE, wish)
    build_backend.REFUSAL.parent.mkdir(parents=True)
    build_backend.REFUSAL.write_text("of an older install")
    assert build_backend.compiler_requirements() == (build_backend.COMPILER_WHEELS if asked else [])
    refusal = build_backend.kept_refusal()
    assert (refusal is None) if kept is None else kept in refusal.reason
    monkeypatch.setattr(os, "getppid", lambda: -1)
    assert build_backend.kept_refusal() is None


PIP_SAYS = [
    (0, "", None),
    (1, "/bin/python: No module named pip", None),
    (1, "WARNING: slow\nERROR: No distribution at https://h/x\nERROR: more", r"distribution at \(address\)"),
    (2, "no such option: --dry-run", "this pip cannot say"),
]


@pytest.mark.parametrize(("code", "error", "reason"), PIP_SAYS)
def test_pip_is_asked(monkeypatch, code, error, reason):
    def run(command, env, **_keywords):
        assert "PYTHONPATH" not in env
        assert command[-1] == build_backend.COMPILER_WHEELS[-1]
        return subprocess.CompletedProcess(command, code, "", error)

    monkeypatch.setenv("PYTHONPATH", "overlay")
    monkeypatch.setattr(subprocess, "run", run)
    refusal = build_backend.pip_refusal()
    assert (refusal is None) if reason is None else re.search(reason, refusal.reason)


def test_index_options():
    kept = ["--no-index", "-f", "wheels", "--index-url=a", "--extra-index-url", "b"]
    assert build_backend.index_options(["python", "-m", "pip", "install", *kept, "-e", ".", "--upgrade"]) == kept


def test_every_hook_is_there():
    assert {name for name in build_meta.__all__ if re.match("build_|get_|prepare_", name)} == set(build_backend.__all__)


def tools(tmp_path: Path, ninja: str = "exit 0") -> build_native.Tools:
    nvcc = Nvcc("/opt/a b/nvcc", "system", Path("/opt"), (13, 0), ("80", "90"), Path("/opt/inc"), Path("/opt/lib"))
    fake = script(tmp_path / "ninja", f"#!/bin/sh\n{ninja}\n")
    return build_native.Tools(GXX, nvcc, [Path("/opt/inc"), Path("pybind11-3.0")], {}, [str(fake)])


def test_ninja_file(tmp_path):
    text = build_native.ninja_file(tools(tmp_path), "_native.so")
    device = next(line for line in text.splitlines() if "nvcc" in line)
    assert "'/opt/a b/nvcc' -ccbin /usr/bin/g++ -std=c++17 -O3 -Xcompiler=-fPIC,-fvisibility=hidden" in device
    assert "'-gencode=arch=compute_80,code=[sm_80,compute_80]' -gencode=arch=compute_90,code=sm_90" in device
    assert "-isystem /opt/inc -isystem pybind11-3.0 -DINCEPTION_FUSED_ELEMENT=$element -MMD -MF $out.d" in device
    assert re.findall(r"element = (\w+)", text) == ["bf16", "fp16", "tf32"] * 2
    objects = re.findall(r"build (\w+\.o):", text)
    assert objects[::3] == ["grouped_gemm_bf16.o", "grouped_dgrad_bf16.o", "bind.o"]
    assert f"build _native.so: link {' '.join(objects)}\n" in text
    assert "-L /opt/lib -lcudart_static -ldl -lrt -lpthread" in text


def command(tmp_path: Path) -> tuple[build_native.BuildNative, Path, Path]:
    """The build command, with its output under tmp_path; a stale extension; the record."""
    extension = Extension("inception_fused._native", sources=[])
    built = build_native.BuildNative(Distribution({"ext_modules": [extension]}))
    built.build_lib = str(tmp_path / "lib")
    built.ensure_finalized()
    stale = Path(built.get_ext_fullpath(extension.name))
    stale.parent.mkdir(parents=True)
    stale.touch()
    return built, stale, stale.with_name("_build.json")


def test_failing_compiler(tmp_path, monkeypatch):
    shown = ("FAILED: bind.o", f"g++ -c {tmp_path}/error.cpp", f"{tmp_path}/bind.cpp:3:1: error: no {{")
    output = "; ".join([*(f"echo '{line}'" for line in shown), "exit 1"])

    def find_tools(facts):
        facts["cuda"] = "13.0"
        return tools(tmp_path, output)

    monkeypatch.setattr(build_native, "ROOT", tmp_path)
    monkeypatch.setattr(build_native, "find_tools", find_tools)
    built, stale, record = command(tmp_path)
    built.run()
    facts = json.loads(record.read_text())
    assert not stale.exists()
    assert facts["reason"] == "compiling failed: bind.cpp:3:1: error: no {"
    assert (facts["built"], facts["cuda"], facts["architectures"], facts["ptx"]) == (False, "13.0", [], None)
    assert built.get_outputs() == [str(record)]
    monkeypatch.setenv(toolchain.VARIABLE, "1")
    with pytest.raises(CompileError, match="INCEPTION_FUSED_CUDA=1, but compiling failed"):
        built.run()


def test_what_does_not_import_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(build_native, "ROOT", tmp_path)
    monkeypatch.setattr(build_native, "find_tools", lambda facts: tools(tmp_path, 'touch "$2/_native.so"'))
    reason = build_native.attempt(tmp_path / "_native.so", None).reason
    assert reason.startswith("the extension was built and does not import: ImportError")


def test_refusal_of_the_wheels_is_part_of_the_reason(tmp_path, monkeypatch):
    for name in ("check_platform", "python_headers"):
        monkeypatch.setattr(toolchain, name, lambda: None)
    monkeypatch.setattr(toolchain, "find_host_compiler", lambda: GXX)
    monkeypatch.setattr(toolchain, "find_nvcc", refuse)
    monkeypatch.setattr(build_backend, "kept_refusal", lambda: CannotBuild("pip cannot", "get pip"))
    outcome = build_native.attempt(tmp_path / "_native.so", None)
    assert outcome[:3] == (False, "not here, and pip cannot", "get pip")


def test_switched_off(tmp_path):
    assert build_native.attempt(tmp_path / "_native.so", False).reason == "INCEPTION_FUSED_CUDA=0 was set"
