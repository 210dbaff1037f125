"""A bar for what takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any, TypeVar

T = TypeVar("T")


def bar_library() -> Any:
    """tqdm, where it is installed and stderr a terminal, else None."""
    if not sys.stderr.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm


def progress(items: Iterable[T], total: int, what: str, unit: str) -> Iterable[T]:
    """The items, ``total`` of them, behind a bar on stderr where there may be one."""
    tqdm = bar_library()
    if tqdm is None:
        return items
    return tqdm(items, total=total, desc=what, unit=unit, file=sys.stderr, leave=False)
