"""python/count.py: what it prints of a file, and of two. That it counts is tests/aot's to show."""

from __future__ import annotations

import pytest

import count
from inception_fused.plan import counts
from inception_fused.plan.counts import MAIN, as_text


def test_it_prints_the_file(capsys):
    assert count.main(["--print"]) == 0
    text = capsys.readouterr().out
    assert f"binaries, Triton {counts.shipped().triton}" in text
    for key, capability in counts.shipped().binaries:
        assert str(key) in text
        assert f"sm_{capability}" in text


def test_it_compares_two_files(tmp_path, capsys):
    known = counts.shipped()
    (key, chip), binary = next(item for item in known.binaries.items() if item[1].main is not None)
    parts = tuple(part.times(2) if part.kind == MAIN else part for part in binary.parts)
    before = tmp_path / "before.json"
    before.write_text(as_text(known._replace(binaries={**known.binaries, (key, chip): binary._replace(parts=parts)})))
    assert count.main(["--compare", str(before)]) == 0
    _, _, line = capsys.readouterr().out.splitlines()
    step = binary.main.of("issue")
    assert line.startswith(str(key))
    assert f"{2 * step:.0f} -> {step:.0f}" in line
    assert count.main(["--compare", str(before), str(before)]) == 0
    assert "nothing changed" in capsys.readouterr().out


def test_an_interpreting_process_does_not_count(tmp_path, capsys):
    with pytest.raises(SystemExit):
        count.main(["--out", str(tmp_path / "counts.json")])
    assert "TRITON_INTERPRET" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
