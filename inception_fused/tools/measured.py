"""Which kernels were last measured on which GPU, and whether these are still the same.

``python python/gpu_check.py`` writes the record, measured.json beside this file, when it ends on a GPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inception_fused.plan.tile_table import kernel_sources
from inception_fused.runtime import files

RECORD = Path(__file__).parents[1] / "measured.json"

COMMAND = "python python/gpu_check.py measures them"


def facts() -> dict[str, Any] | None:
    """{gpu, commit, dirty, date, changed}, changed being whether the Triton kernels are others now; None where nothing
    was measured, or the record cannot be read."""
    try:
        found = json.loads(RECORD.read_text())
        return {
            **{name: found[name] for name in ("gpu", "commit", "dirty", "date")},
            "changed": found["kernel_sources"] != kernel_sources(),
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
    }
    files.write(RECORD, (json.dumps(found, indent=1) + "\n").encode())
