"""Folders and files import in one direction, late imports included; nobody finds the others by sys.path."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").exists())

LAYERS = ("errors", "block", "runtime plan", "kernels", "op", "modules", "conversion", "testing", "tools")
"""Each may import those before it. The files beside them (__init__, __main__, pickles) may import all."""

PATH_INSERTS = {
    "benchmarks/counted.py",
    "benchmarks/report.py",
    "benchmarks/roofline.py",
    "python/gpu/sanitizer_cases.py",
    "python/gpu_check.py",
    "python/tune.py",
    "setup.py",
    "tests/aot/aot_gate.py",
    "tests/aot/tune_gate.py",
    "tests/csrc/native_gate.py",
    "tests/csrc/native_mutants.py",
    "tests/csrc/native_suite.py",
    "tests/install_cases.py",
    "tests/ptx/pool_gate.py",
    "tests/ptx/ptx_bugs.py",
    "tests/ptx/ptx_gate.py",
}
"""Files that put a folder on sys.path. To become fewer, never more."""


@cache
def imports(path):
    """Dotted names that a file imports anywhere, other than for type checkers only."""
    found, nodes = set(), [ast.parse(path.read_text(), str(path))]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: a relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.stmt) and not (
            isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        ):
            nodes += [child for child in ast.iter_child_nodes(node) if isinstance(child, (ast.stmt, ast.excepthandler))]
        elif isinstance(node, (ast.Module, ast.excepthandler)):
            nodes += node.body
    return found


FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in (ROOT / "inception_fused").rglob("*.py")
}


@cache
def graph():
    """Module -> modules of the package that it imports."""
    found = {}
    for name, path in FILES.items():
        dotted = [d for d in imports(path) if d.startswith("inception_fused.")]
        found[name] = {d if d in FILES else d.rpartition(".")[0] for d in dotted} & set(FILES)
    return found


def layer(name):
    """The place of a module's folder, None where it may import all."""
    return next((i for i, names in enumerate(LAYERS) if name.split(".")[1] in names.split()), None)


def test_a_folder_imports_only_lower_ones():
    assert {name.split(".")[1] for name in FILES if layer(name) is None} == {"__init__", "__main__", "pickles"}
    wrong = [
        f"{name} imports {other}"
        for name, others in graph().items()
        for other in others
        if layer(name) is not None and (layer(other) is None or layer(other) > layer(name))
    ]
    assert not wrong
    parallel = [
        f"{a} imports {b}"
        for a, bs in graph().items()
        for b in bs
        if a.split(".")[1] == "runtime" and b.split(".")[1] == "plan"
    ]
    assert not parallel, "plan knows the runtime's files, not the other way round"


def test_no_circles():
    left = dict(graph())
    while free := [name for name, others in left.items() if not others & set(left)]:
        for name in free:
            del left[name]
    assert not left, f"these import each other, or what does: {sorted(left)}"


def test_kernels_holds_kernels():
    others = [
        path.name for path in (ROOT / "inception_fused/kernels").glob("*.py") if "@triton.jit" not in path.read_text()
    ]
    assert set(others) <= {"__init__.py", "common.py"}


def test_a_folder_does_not_hide_a_function():
    import inception_fused

    folders = {path.parent.name for path in (ROOT / "inception_fused").glob("*/__init__.py")}
    assert folders == {name for names in LAYERS for name in names.split()} - {"errors", "testing"}
    assert not folders & set(inception_fused.__all__)


@pytest.mark.parametrize("folder", ["inception_fused", "benchmarks", "python", "csrc"])
def test_nothing_imports_from_the_tests(folder):
    tests = {path.stem for path in (ROOT / "tests").rglob("*.py")} - {"__init__", "conftest"}
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        own = {other.stem for other in path.parent.glob("*.py")}
        if {d.partition(".")[0] for d in imports(path)} & (tests - own | {"tests"}):
            found.add(str(path.relative_to(ROOT)))
    assert not found


def test_sys_path():
    files = [
        path
        for folder in ("inception_fused", "benchmarks", "python", "csrc", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]
    found = {
        str(path.relative_to(ROOT))
        for path in [*files, *ROOT.glob("*.py")]
        if re.search(r"^ *sys\.path(\.(insert|append|extend)\(|\[)", path.read_text(), re.MULTILINE)
    }
    assert found == PATH_INSERTS
