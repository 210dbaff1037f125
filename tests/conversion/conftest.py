"""What lets a converted block whose BatchNorm trains take the operators on a CPU.

The package is imported late: with it comes Triton, before tests/conftest.py has said that it interprets.
"""

import pytest


@pytest.fixture
def calls(monkeypatch):
    """The calls of blocks that took the operators: shape and dtype of x."""
    from inception_fused.conversion import batch_norm_training

    made, run = [], batch_norm_training.normed_call

    def seen(x, params, **options):
        made.append((x.shape, x.dtype))
        return run(x, params, **options)

    monkeypatch.setattr(batch_norm_training, "normed_call", seen)
    return made


@pytest.fixture
def twins(monkeypatch, calls):
    """Within it "auto" takes the operators on a CPU too, which run the kernels' ATen twins; the calls that did."""
    from inception_fused.op import reasons

    left = tuple(reason for reason in reasons.CALL if reason is not reasons._device_of_auto)
    assert len(left) == len(reasons.CALL) - 1
    monkeypatch.setattr(reasons, "CALL", left)
    return calls
