"""The table of Tritons: what it asks, skips, lists and refuses; none of it compiles."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest

import triton_table
from triton_table import Judged, Known

SPILL = "spills: 64 bytes of stack"


def binary(capability: int = 80, *faults: str, kernel: str = "k", dtype: str = "bf16", stack: int = 0) -> dict:
    return {
        "name": f"{kernel} 3ax1 {dtype}", "kernel": kernel, "dtype": dtype,
        "capability": capability, "stack": stack, "faults": list(faults),
    }  # fmt: skip


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> dict[str, Judged]:
    """What each Triton makes, in place of compiling."""
    rows: dict[str, Judged] = {}
    monkeypatch.setattr(triton_table, "judge", lambda version, *_: rows[version])
    return rows


def test_a_triton_that_pip_cannot_get_is_skipped_by_name(tmp_path, monkeypatch, capsys):
    def pip(command: list[str], **_):
        return subprocess.CompletedProcess(command, 1, "", "WARNING: retrying\nERROR: no route to host\n")

    monkeypatch.setattr(triton_table.subprocess, "run", pip)
    assert triton_table.main(["--triton", "3.8.0", "--folder", str(tmp_path)]) == 0
    assert "Triton 3.8.0: skipped, pip cannot get it: ERROR: no route to host" in capsys.readouterr().out


def test_a_triton_is_installed_once_and_by_itself(tmp_path, monkeypatch):
    asked = []

    def pip(command: list[str], **_):
        asked.append(command[-1])
        assert "--no-deps" in command
        Path(command[command.index("--target") + 1], "triton").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(triton_table.subprocess, "run", pip)
    for version in ("3.8.0", "3.8.0", "newest", "installed"):
        place = triton_table.provide(version, tmp_path)
        assert place == (None if version == "installed" else tmp_path / version)
    assert asked == ["triton==3.8.0", "triton"]


def test_a_fault_is_refused_and_named(judged, capsys):
    judged["3.8.0"] = Judged("3.8.0", [binary(80, stack=8), binary(90, SPILL, stack=64)])
    assert triton_table.main(["--triton", "3.8.0"]) == 1
    out = capsys.readouterr().out
    assert f"Triton 3.8.0 k 3ax1 bf16 sm_90: {SPILL}" in out
    assert "| 3.8.0 | 2.14 | 1 clean, stack 8 |  | 0 clean, stack 0, **1 refused** |" in out


KNOWN = Known("k", "bf16", (90,), 64, "borne until it is rewritten")


def test_a_known_spill_is_listed_with_its_figure_and_reason(judged, monkeypatch, capsys):
    monkeypatch.setattr(triton_table, "EXCEPTIONS", (KNOWN,))
    known = binary(90, SPILL, stack=64)
    judged["3.8.0"] = Judged("3.8.0", [known])
    assert triton_table.main(["--triton", "3.8.0"]) == 0
    out = capsys.readouterr().out
    assert "- borne until it is rewritten (3.8.0 sm_90 bf16 64)." in out
    assert "0 clean, stack 0, 1 known" in out
    # More bytes, another fault, kernel, dtype or architecture is not covered.
    others = (
        binary(90, "spills: 72 bytes of stack", stack=72), binary(90, SPILL, "no matrix instruction", stack=64),
        binary(90, SPILL, kernel="l", stack=64), binary(90, SPILL, dtype="fp32", stack=64),
        binary(80, SPILL, stack=64),
    )  # fmt: skip
    for other in others:
        judged["3.8.0"] = Judged("3.8.0", [known, other])
        assert triton_table.main(["--triton", "3.8.0"]) == 1
    judged["3.8.0"] = Judged("3.8.0", [known])
    monkeypatch.setattr(triton_table, "EXCEPTIONS", (KNOWN._replace(tritons=("3.7.1",)),))
    assert triton_table.main(["--triton", "3.8.0"]) == 1


def test_an_exception_that_nothing_needs_any_more_is_refused(judged, monkeypatch, capsys):
    monkeypatch.setattr(triton_table, "EXCEPTIONS", (KNOWN,))
    for version in triton_table.TRITONS:
        judged[version] = Judged(version, [binary(90)])
    assert triton_table.main([]) == 1
    assert "no longer needed" in capsys.readouterr().out
    # Where its architecture or a Triton was not judged nothing can be said.
    assert triton_table.main(["--capabilities", "80"]) == 0
    assert triton_table.main(["--triton", "3.8.0"]) == 0
    judged["3.5.1"] = Judged("3.5.1", [binary(90, SPILL, stack=64)])
    assert triton_table.main([]) == 0


def test_the_gate_is_asked_with_that_triton_in_front(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (tmp_path / "3.8.0" / "triton").mkdir(parents=True)
    real, seen = subprocess.Popen, {}

    def popen(command: list[str], *, env: dict[str, str], **kwargs):
        seen.update(env=env, command=command)
        findings = command[command.index("--json") + 1]
        text = json.dumps({"triton": "3.8.0", "binaries": [binary()]})
        return real(["sh", "-c", f"echo one; cat > {findings} <<'E'\n{text}\nE"], env=env, **kwargs)

    monkeypatch.setattr(triton_table.subprocess, "Popen", popen)
    found = triton_table.judge("3.8.0", tmp_path, [80, 90], ["bf16"])
    assert found == Judged("3.8.0", [binary()])
    assert seen["env"]["PYTHONPATH"].startswith(str(tmp_path / "3.8.0"))
    assert "TRITON_INTERPRET" not in seen["env"]
    assert seen["command"][seen["command"].index("--capabilities") + 1] == "80,90"


def test_a_gate_that_dies_is_an_error(tmp_path, monkeypatch):
    real = subprocess.Popen
    monkeypatch.setattr(
        triton_table.subprocess, "Popen",
        lambda command, **kwargs: real(["sh", "-c", "echo Traceback; exit 3"], **kwargs),
    )  # fmt: skip
    with pytest.raises(RuntimeError, match="(?s)ended with 3.*Traceback"):
        triton_table.judge("installed", tmp_path, [80], ["bf16"])


def test_design_has_the_whole_table():
    """Every Triton and architecture, nothing refused, and a line for each exception."""
    design = (triton_table.ROOT / "DESIGN.md").read_text(encoding="utf-8")
    section = triton_table.SECTION.search(design)[0]
    head, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    assert re.findall(r"sm_(\d+)", head) == [str(capability) for capability in triton_table.CAPABILITIES]
    pinned = [version for version in triton_table.TRITONS if version != "newest"]
    assert [row.split("|")[1].strip() for row in rows][: len(pinned)] == pinned
    assert len(rows) == len(triton_table.TRITONS)
    assert "refused" not in section
    assert all(row.count("clean") == len(triton_table.CAPABILITIES) for row in rows)
    assert section.count("\n- ") == len(triton_table.EXCEPTIONS)


def test_the_section_is_replaced(tmp_path):
    path = tmp_path / "DESIGN.md"
    path.write_text("a\n<!-- table:triton -->\nold\n<!-- /table:triton -->\nb\n")
    triton_table.write("| new \\1 |", path)
    assert path.read_text() == "a\n<!-- table:triton -->\n| new \\1 |\n<!-- /table:triton -->\nb\n"
    path.write_text("none")
    with pytest.raises(ValueError, match="wants one section"):
        triton_table.write("", path)
