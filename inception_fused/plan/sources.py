"""What decides a figure, as a hash: whether the kernels that were timed are still the same.

Of Triton's kernels the syntax tree counts, without comments and docstrings, so that words may change and tables of
tiles stay. Of the compiled ones every byte of csrc/ counts, where it is there: an installed package has none.
"""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1]

COMPILED = (".cu", ".cuh", ".h", ".cpp")


@cache
def kernel_sources() -> str:
    """SHA-256 over the names and code of kernels/*.py: tables of tiles are timed for these kernels."""
    return hash_of_kernels(PACKAGE)


def hash_of_kernels(package: Path) -> str:
    """:func:`kernel_sources` of a package's folder.

    A tree is written back as text, since a newer Python adds fields to its trees.
    """
    digest = hashlib.sha256()
    for path in sorted((package / "kernels").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + _code(path.read_text(encoding="utf-8")).encode() + b"\0")
    return digest.hexdigest()


def native_sources(root: Path = PACKAGE.parent) -> str | None:
    """SHA-256 over the names and contents of csrc's sources; None where they are not there."""
    paths = sorted(path for path in (root / "csrc").glob("*") if path.suffix in COMPILED)
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest() if paths else None


def _code(text: str) -> str:
    """A module without comments and docstrings."""
    tree = ast.parse(text)
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [part for part in body if not _is_words(part)] or [ast.Pass()]
    return ast.unparse(tree)


def _is_words(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
