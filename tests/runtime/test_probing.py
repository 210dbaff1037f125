"""What a device can run: remembered for good, or asked again after a wait that grows; each probe anew."""

import errno
import itertools
import types

import pytest
import torch

from inception_fused.op import reasons
from inception_fused.runtime import caches, probing
from inception_fused.runtime.failures import Failure
from inception_fused.runtime.probing import FIRST_WAIT_S, LONGEST_WAIT_S, remembered


@pytest.fixture
def clock(monkeypatch):
    """The seconds that probing waits by, in a list of one."""
    now = [100.0]
    monkeypatch.setattr(probing, "clock", lambda: now[0])
    return now


def test_reasons_that_pass_are_not_remembered(monkeypatch, clock):
    """Memory is freed and a capture ends; a missing compiler stays missing. What worked once is not asked again."""
    passing = [Failure("CUDA out of memory", "memory", True), Failure("Stale file handle", "file system", True)]
    reasons = iter([*passing, None, "not reached"])
    asked = []

    @remembered
    def obstacle(index):
        asked.append(index)
        return next(reasons)

    answers = []
    for _ in range(5):
        answers.append(obstacle(0))
        clock[0] += LONGEST_WAIT_S
    assert answers == ["CUDA out of memory", "Stale file handle", None, None, None]
    assert asked == [0] * 3
    missing = remembered(lambda index: asked.append(index) or Failure("gcc: not found", "no C compiler", False))
    assert [missing(1), missing(1), missing(2)] == ["gcc: not found"] * 3
    assert asked[3:] == [1, 2]

    capturing = True
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    fine = remembered(lambda index: asked.append(index))
    assert "inside a CUDA graph's capture" in fine(0)
    assert asked[5:] == [], "what synchronises would end the capture"
    capturing = False
    assert fine(0) is None
    capturing = True
    assert fine(0) is None
    assert asked[5:] == [0]


def test_what_goes_on_failing_is_asked_ever_more_rarely(clock):
    """Four calls a second for an hour: fifteen attempts, one sentence."""
    attempts = []

    @remembered
    def obstacle(index):
        attempts.append(clock[0] - 100.0)
        return Failure(f"no space in /tmp/tmp{len(attempts)}", "no space", True)

    said = set()
    for _ in range(3600 * 4):
        said.add(obstacle(0))
        clock[0] += 0.25
    assert attempts[:5] == [0, 1, 3, 7, 15]
    assert len(attempts) == 15
    assert max(b - a for a, b in itertools.pairwise(attempts)) == LONGEST_WAIT_S
    assert said == {"no space in /tmp/tmp1"}, "another sentence would be another FallbackWarning"


def test_another_kind_of_failure_is_told(clock):
    kinds = iter(["no space", "no space", "file system"])
    obstacle = remembered(lambda index: Failure(kind := next(kinds), kind, True))
    said = []
    for _ in range(3):
        said.append(obstacle(0))
        clock[0] += LONGEST_WAIT_S
    assert said == ["no space", "no space", "file system"]


def test_probes_of_both_kinds_are_asked_again(loads, monkeypatch, clock):
    from inception_fused.kernels import probe
    from inception_fused.runtime import native

    errors = []

    def fail(**_):
        error = errors.pop(0)
        if error is not None:
            raise error

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(reasons, "find_spec", lambda name: object())
    monkeypatch.setattr(probe, "run", fail)
    monkeypatch.setattr(caches, "prepare", lambda: None)
    passing = [
        (RuntimeError("Triton Error [CUDA]: out of memory"), "free memory of the GPU"),
        (OSError(errno.ESTALE, "Stale file handle"), "if it goes on, set TRITON_CACHE_DIR"),
        (OSError(errno.ENOSPC, "No space left on device"), "free some"),
    ]
    for index, (error, words) in enumerate(passing, 991):  # no other test's
        errors[:] = [error, None]
        assert words in reasons.why_no_triton(index)
        assert "C compiler" not in reasons.why_no_triton(index), "and not asked at once"
        clock[0] += FIRST_WAIT_S
        assert reasons.why_no_triton(index) is None

    errors[:] = [RuntimeError("grouped_gemm: out of memory (cudaErrorMemoryAllocation)"), None]
    monkeypatch.setattr(native, "extension", lambda: types.SimpleNamespace(probe=fail))
    assert native._unloadable(991) == "grouped_gemm: out of memory (cudaErrorMemoryAllocation)"
    clock[0] += FIRST_WAIT_S
    assert native._unloadable(991) is None


def test_a_probe_that_failed_starts_anew(monkeypatch):
    """Triton keeps a kernel whose binary could not be loaded, and would launch it without a function."""
    from inception_fused.kernels import probe

    class Kernel:
        device_caches = {0: "a kernel without a function"}  # noqa: RUF012

        def __getitem__(self, grid):
            def launch(out, *, enable_fp_fusion):  # Triton 3.9 warns where it is not said
                raise RuntimeError("Triton Error [CUDA]: out of memory")

            return launch

    zeros = torch.zeros
    monkeypatch.setattr(probe, "probe_kernel", Kernel())
    monkeypatch.setattr(torch, "zeros", lambda *shape, device, **options: zeros(*shape, **options))
    with pytest.raises(RuntimeError, match="out of memory"):
        probe.run()
    assert Kernel.device_caches == {}
