"""Which kernels were last measured on which GPU, and whether these are still the same.

``python python/gpu_check.py`` writes the record, measured.json in the package's folder, when it ends on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from inception_fused.plan.sources import PACKAGE, kernel_sources, native_sources
from inception_fused.runtime import files

RECORD = PACKAGE / "measured.json"

COMMAND = "python python/gpu_check.py measures them"


def facts() -> dict[str, Any] | None:
    """{gpu, commit, dirty, date, changed}; None where nothing was measured, or the record cannot be read.

    changed: whether the kernels are others now, the compiled ones as far as their sources are there.
    """
    try:
        found = json.loads(RECORD.read_text())
        return {
            **{name: found[name] for name in ("gpu", "commit", "dirty", "date")},
            "changed": found["kernel_sources"] != kernel_sources()
            or native_sources() not in (None, found.get("native_sources")),
        }
    except (OSError, ValueError, KeyError, TypeError):
        return None


def describe(found: Mapping[str, Any] | None) -> str:
    """:func:`facts` in one line."""
    if found is None:
        return f"never on a GPU; {COMMAND}"
    commit = f"commit {found['commit'][:12]}" if found["commit"] else "a commit that is not known"
    commit += " with changes" if found["dirty"] else ""
    since = "the kernels have changed since" if found["changed"] else "the kernels have not changed since"
    return f"{found['gpu']}, {found['date']}, {commit}; {since}"


def write(gpu: str, machine: Mapping[str, Any], date: str) -> None:
    """Keeps that these kernels were measured on a GPU. machine: has "commit" and "dirty". Replaces the file at once."""
    found = {
        "gpu": gpu,
        "commit": machine.get("commit"),
        "dirty": machine.get("dirty"),
        "date": date,
        "kernel_sources": kernel_sources(),
        "native_sources": native_sources(),
    }
    files.write(RECORD, (json.dumps(found, indent=1) + "\n").encode())
