"""The list of seeded faults fits the package, and the script that runs them tells caught from missed."""

import ast
import signal
import sys
from functools import cache
from pathlib import Path

import pytest

import seeded_faults
from fault_kinds import GLUE_KINDS, KERNEL_KINDS, Fault
from fault_list import FAULTS
from inception_fused.plan.kernel_table import KERNELS
from seeded_faults import ROOT, Runner, read, run_all

FILES = {kernel.file for kernel in KERNELS} | {"common"}


@cache
def functions(file: str) -> set[str]:
    return {node.name for node in ast.walk(ast.parse((ROOT / file).read_text())) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_has_its_place_and_its_tests(fault):
    before = (ROOT / fault.file).read_text()
    after = fault.apply(before)
    assert ast.dump(ast.parse(after)) != ast.dump(ast.parse(before)), "it says the same"
    assert fault.breaks
    assert fault.tests
    for test in fault.tests:
        file, _, name = test.partition("::")
        assert not name or name.partition("[")[0] in functions(file), test
        assert (ROOT / file).name.startswith("test_")


def test_what_the_list_covers():
    assert len(FAULTS) == 54
    assert len({fault.name for fault in FAULTS}) == len({(fault.file, fault.old) for fault in FAULTS}) == 54
    assert {fault.kind for fault in FAULTS} == {*KERNEL_KINDS, *GLUE_KINDS}
    assert {Path(fault.file).stem for fault in FAULTS if "/kernels/" in fault.file} >= FILES


def test_a_text_that_is_not_there_once_is_refused():
    fault = Fault("twice", "a.py", "mask", "x", "y", "", ())
    for text, times in (("", 0), ("x = x", 2)):
        with pytest.raises(ValueError, match=f"twice: its text occurs {times} times in a.py, not once"):
            fault.apply(text)


@pytest.mark.parametrize(
    ("code", "output", "found"),
    [
        (1, "FAILED tests/test_a.py::test_b[1 - 2] - assert 1 == 2\n1 failed", ("tests/test_a.py::test_b[1 - 2]", "")),
        (1, "FAILED tests/test_a.py::test_b\n1 failed", ("tests/test_a.py::test_b", "")),
        (0, "3 passed", ("", "every test passes")),
        (1, "ERROR tests/test_a.py::test_b - no fixture\n1 error", ("", "pytest ends with 1")),
        (
            2,
            "ERROR tests/test_a.py - ImportError\n1 error",
            ("", "pytest ends with 2, no failed test: tests/test_a.py"),
        ),
        (4, "ERROR: unrecognized arguments: --full\n\n", ("", "ERROR: unrecognized arguments: --full")),
        (5, "no tests ran", ("", "pytest ends with 5, no failed test: no tests ran")),
        (-signal.SIGSEGV, "", ("", "the process dies of SIGSEGV")),
    ],
)
def test_what_counts_as_caught(code, output, found):
    caught_by, how = read(code, output)
    assert caught_by == found[0]
    assert found[1] in how


@pytest.fixture
def tree(tmp_path):
    """A package with one function, its test, and one that looks at nothing."""
    (tmp_path / "adder.py").write_text("def add(a, b):\n    return a + b\n")
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_adder.py").write_text(
        "from adder import add\n\ndef test_blind():\n    add(1, 2)\n\ndef test_seeing():\n    assert add(1, 2) == 3\n"
    )
    return tmp_path


def faults(test: str, **new: str) -> list[Fault]:
    return [Fault(name, "adder.py", "mask", "a + b", text, "", (test,)) for name, text in new.items()]


def test_a_fault_that_no_test_sees_is_missed(tree, capsys):
    """So is one for which the tests cannot even be collected."""
    seen = faults("tests/test_adder.py", seen="a - b")
    missed = faults("tests/test_adder.py::test_blind", missed="a - b", crash="a +")
    assert run_all(Runner(tree), [*seen, *missed], jobs=2) == 1
    out, err = capsys.readouterr()
    rows = {line.split(" | ")[0]: line for line in out.splitlines()}
    assert "| seen | adder.py | tests/test_adder.py::test_seeing | " in out
    assert "NOT CAUGHT: every test passes" in rows["| missed"]
    assert "NOT CAUGHT: pytest ends with" in rows["| crash"]
    assert "1 of 3 caught" in out
    assert not err
    assert (tree / "adder.py").read_text().endswith("a + b\n"), "the copy is changed, not the tree"


def test_tests_that_fail_anyway_prove_nothing(tree, capsys):
    (tree / "tests" / "test_adder.py").write_text("def test_broken():\n    assert False\n")
    assert run_all(Runner(tree), faults("tests/test_adder.py", seen="a - b")) == 1
    assert "the unchanged copy fails: tests/test_adder.py::test_broken" in capsys.readouterr().err


def test_a_hang_is_ended_with_what_it_has_started(tree):
    """A grandchild would hold the pipe to its end."""
    sleeper = f"__import__('subprocess').run([{sys.executable!r}, '-c', 'import time; time.sleep(30)'])"
    verdict = Runner(tree, limit_s=1).judge(faults("tests/test_adder.py", hang=sleeper)[0])
    assert (verdict.caught_by, verdict.how) == ("", "hangs for 1 s")
    assert verdict.seconds < 15


def test_the_command_line(tree, monkeypatch, capsys):
    """All faults pass --full on; a name chooses, an unknown one is refused."""
    commands = []
    chosen = faults("tests/test_adder.py", one="a - b", other="a * b")
    monkeypatch.setattr(seeded_faults, "FAULTS", chosen)
    monkeypatch.setattr(seeded_faults, "ROOT", tree)

    def judge(runner, fault, limit_s=0.0):
        commands.append((fault.name, runner.full))
        return seeded_faults.Verdict(fault, "a test" * (fault.name != "unchanged"), "every test passes", 0)

    monkeypatch.setattr(Runner, "judge", judge)
    for arguments, names in (([], ["one", "other"]), (["the", "--full"], ["other"])):
        commands.clear()
        monkeypatch.setattr(sys, "argv", ["seeded_faults.py", *arguments])
        assert seeded_faults.main() == 0
        assert commands == [(name, "--full" in arguments) for name in (*names, "unchanged")]
    monkeypatch.setattr(sys, "argv", ["seeded_faults.py", "nothing"])
    with pytest.raises(SystemExit, match="2"):
        seeded_faults.main()
    assert "no fault's name contains 'nothing'" in capsys.readouterr().err
