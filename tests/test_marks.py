"""What a quick run leaves out, and that it says so."""

from __future__ import annotations

import itertools

import pytest

from marks import covering, more, quick

pytest_plugins = ["pytester"]


@pytest.mark.parametrize("sizes", [(1,), (4,), (9, 4), (3, 2, 5), (2, 2, 2, 2)], ids=str)
def test_every_value_is_covered_by_few(sizes):
    combinations = [
        dict(zip("abcd", places, strict=False)) for places in itertools.product(*(range(size) for size in sizes))
    ]
    kept = [combinations[place] for place in covering(combinations)]
    for name, size in zip("abcd", sizes, strict=False):
        taken = [combination[name] for combination in kept]
        assert set(taken) == set(range(size))
        # In turn, not one for all.
        assert max(map(taken.count, taken)) - min(map(taken.count, taken)) <= 1
    assert len(kept) == max(sizes)


def test_a_value_that_is_none_is_named():
    with pytest.raises(ValueError, match=r"quick: \['c'\] is none of \['a', 'b'\]"):
        quick(["a", "b"], "c")


TESTS = """
import pytest
from marks import each_once, full, more, quick

def test_always(): pass

@full
def test_more(): pass

@pytest.mark.parametrize("x", [1, more(2)])
def test_value(x): pass

@pytest.mark.parametrize("x", quick("abc", "b"))
def test_chosen(x): pass

@each_once
@pytest.mark.parametrize("x", [1, 2, 3])
@pytest.mark.parametrize("y", [1, 2])
def test_combinations(x, y): pass
"""


@pytest.mark.parametrize(
    ("arguments", "passed", "said"),
    [
        ([], 6, "--full adds 7 tests"),
        more(["--full"], 13, None),
        (["tests/test_it.py::test_more", "tests/test_it.py::test_chosen[c]"], 2, None),
    ],
    ids=str,
)
def test_a_run(pytester, request, arguments, passed, said):
    """What is asked for by itself runs, whatever it is."""
    for name in ("conftest.py", "tests/conftest.py", "tests/beside.py", "tests/marks.py"):
        pytester.path.joinpath("tests").mkdir(exist_ok=True)
        pytester.path.joinpath(name).write_text((request.config.rootpath / name).read_text())
    pytester.path.joinpath("tests/test_it.py").write_text(TESTS)
    pytester.makeini("[pytest]\nmarkers = full\n each_once\n gpu\ntestpaths = tests\n")
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider", *arguments)
    result.assert_outcomes(passed=passed)
    text = result.stdout.str()
    assert said in text if said else "--full adds" not in text
