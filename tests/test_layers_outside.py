"""Imports go one way outside the package, too: benchmarks, python, tests; and sys.path is a command's own affair."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

LEVELS = (
    ("benchmarks/cases",),
    ("benchmarks/figures",),
    ("benchmarks",),
    ("python/checks", "python/training"),
    ("python/tuner", "python/counter"),
    ("python/gpu",),
    ("python",),
    ("tests",),
)
"""Folders from the lowest; each may import from itself, from those below, and from inception_fused."""

FILES = sorted(path for folder in ("benchmarks", "python", "tests") for path in (ROOT / folder).rglob("*.py"))
KNOWN = frozenset(FILES)


def folder_of(path: Path) -> str:
    """The longest of the folders in LEVELS that holds a file."""
    name = path.relative_to(ROOT).as_posix()
    return max((f for level in LEVELS for f in level if name.startswith(f + "/")), key=len)


def level_of(folder: str) -> int:
    return next(index for index, level in enumerate(LEVELS) if folder in level)


@cache
def imported(path: Path) -> list[Path]:
    """The files outside the package that a file imports, anywhere in its text."""
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
    places = [ROOT, ROOT / "python", ROOT / "tests", *(p for p in (ROOT / "tests").iterdir() if p.is_dir())]
    found = [place / f"{name.replace('.', '/')}.py" for name in names for place in places]
    return [file for file in found if file in KNOWN]


@pytest.mark.parametrize("folder", [folder for level in LEVELS for folder in level])
def test_imports_go_one_way(folder):
    wrong = [
        f"{path.relative_to(ROOT)} imports {other.relative_to(ROOT)}"
        for path in FILES if folder_of(path) == folder
        for other in imported(path)
        if folder_of(other) != folder and level_of(folder_of(other)) >= level_of(folder)
    ]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_only_a_command_changes_the_path_of_imports():
    """And once; the sanitizer's program, which lies beside the stages that import it, twice."""
    for path in FILES:
        text = path.read_text(encoding="utf-8")
        changes = len(re.findall(r"^\s*sys\.path\b(?! for)", text, re.MULTILINE))
        if changes:
            assert 'if __name__ == "__main__":' in text, path
            assert changes <= (2 if path.name == "sanitizer_cases.py" else 1), path
