"""Pairs of torch and Triton, what is known against a Triton on a GPU, and the ptxas that it would use."""

import subprocess
import sys

import pytest
import torch
from triton import knobs

from inception_fused import KernelError
from inception_fused.op import dispatch, reasons
from inception_fused.runtime import caches, triton_versions
from inception_fused.runtime.triton_versions import LIMITS, Limit, describe_pair, is_known, limit, ptxas
from inception_fused.tools import environment


@pytest.mark.parametrize(
    ("ours", "triton", "known"),
    [
        ("2.9.1+cu128", "3.5.1", True),
        ("2.9.0", "3.5.1", False),
        ("2.10.0", "3.6.0", True),
        ("2.14.1", "3.8.0", True),
        ("2.14.1", "3.80.0", False),
        ("2.1", "3.6.0", False),
        ("3.0", "4.0.0", False),
    ],
)
def test_pairs(ours, triton, known):
    assert is_known(ours, triton) == known
    assert (": in the table" in describe_pair(ours, triton)) == known


@pytest.mark.parametrize(
    ("triton", "capability", "words"),
    [
        ("3.4.0", (8, 0), "older than 3.5"),
        ("3.4.0", (10, 0), "older than 3.5"),
        ("3.5.1", (9, 0), None),
        ("3.5.1", (10, 3), "races of its own on sm_100 to sm_110"),
        ("3.6.0", (12, 0), None),
        ("3.6.0+git99", (10, 0), 'pip install "torch>=2.12"'),
        ("3.6.0", (9, 0), None),
        ("3.7.0", (10, 0), None),
        ("9.0.0", (15, 0), None),
        ("unreadable", (8, 0), None),
    ],
)
def test_what_is_wrong(triton, capability, words):
    found = limit("wrong", triton, capability)
    assert found is None if words is None else words in found


def test_what_is_slow(monkeypatch):
    assert limit("slow", "3.6.0", (9, 0)) is None
    monkeypatch.setattr(triton_versions, "LIMITS", (entry("slow"), entry("slow")))
    assert limit("slow", "3.6.0", (9, 0)).count("stores 4 bytes") == 2, "all that is known"
    assert limit("slow", "3.6.0", (9, 1)) is None
    assert limit("slow", "3.6.0", (8, 9)) is None


def test_limits_are_complete():
    for entry in LIMITS:
        assert entry.kind in ("wrong", "slow")
        assert entry.sentence
        assert entry.remedy
        assert entry.triton[0] <= entry.triton[1]
        assert entry.kind == "wrong" or any(c.isdigit() for c in entry.sentence), "slow by what figure?"


@pytest.fixture
def on_gpu(monkeypatch):
    """A GPU of sm_90, on which the probe's kernel runs. Returns the list of its runs."""
    from inception_fused.kernels import probe

    runs = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(probe, "run", lambda: runs.append(1))
    monkeypatch.setattr(caches, "prepare", lambda: None)
    caches.warn_once.cache_clear()
    return runs


def entry(kind):
    return Limit(kind, ((3, 0), (99, 0)), ((9, 0), (9, 0)), "stores 4 bytes at a time", "pip install another")


def test_a_triton_that_is_wrong_is_not_run(on_gpu, monkeypatch):
    monkeypatch.setattr(triton_versions, "LIMITS", (entry("wrong"),))
    reason = reasons.why_no_triton.__wrapped__(0)
    assert reason.endswith("stores 4 bytes at a time; pip install another")
    assert on_gpu == [], "not even the probe"
    monkeypatch.setattr(reasons, "why_no_triton", lambda index: reason)
    with pytest.raises(KernelError, match="stores 4 bytes at a time; pip install another"):
        dispatch.choices("kernels", torch.device("cuda", 0), torch.bfloat16)
    assert set(dispatch.choices("auto", torch.device("cuda", 0), torch.bfloat16).values()) == {"eager"}


def test_a_triton_that_is_slow_runs_and_is_told_once(on_gpu, monkeypatch):
    monkeypatch.setattr(triton_versions, "LIMITS", (entry("slow"),))
    with pytest.warns(UserWarning, match="stores 4 bytes at a time") as caught:
        assert [reasons.why_no_triton.__wrapped__(0) for _ in range(2)] == [None, None]
    assert len(caught) == 1
    assert len(on_gpu) == 2


def test_an_unknown_triton_runs_in_silence(on_gpu, monkeypatch, recwarn):
    import triton

    monkeypatch.setattr(triton, "__version__", "17.3.0")
    assert reasons.why_no_triton.__wrapped__(0) is None
    assert len(recwarn) == 0
    assert "not in the table" in describe_pair("5.0", "17.3.0")


def test_the_ptxas_that_triton_uses(tmp_path, monkeypatch):
    found = ptxas(90)
    version = subprocess.run([knobs.nvidia.ptxas.path, "--version"], capture_output=True, text=True).stdout
    assert f"release {knobs.nvidia.ptxas.version}" in version
    assert found.endswith(("bin/ptxas)", "bin/ptxas-blackwell)"))
    own = tmp_path / "ptxas"
    own.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 77.1, V77.1.9'\n")
    own.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(own))
    assert ptxas(80) == f"77.1 for sm_80 ({own})"
    facts = environment.info()
    assert facts["ptxas"] == ptxas(80)
    assert "77.1 for sm_80" in environment.format_info(facts)
    assert "the table of pairs" in environment.format_info(facts)
    monkeypatch.setattr("triton.backends.nvidia.compiler.get_ptxas", lambda arch: 1 / 0)
    assert ptxas() == "none: ZeroDivisionError: division by zero"


def test_a_report_of_a_broken_triton(tmp_path):
    """Reports say what is wrong with it, and do not end."""
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton" / "__init__.py").write_text("raise ImportError('libtriton.so: undefined symbol')")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import inception_fused as f; print(f.info()['ptxas'])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert "none: ImportError: libtriton.so" in done.stdout, done.stderr
