"""sanitizer_cases' calls with BatchNorm in training: what they launch, and that a wrong result of theirs is found."""

from __future__ import annotations

import pytest
import torch

from checks.block_cases import DTYPES, backward
from gpu import sanitizer_cases
from gpu.normed_cases import Normed, make_normed
from gpu.sanitizer_stage import TRITON_KERNELS
from inception_fused.plan.kernel_table import POOL_KERNELS
from inception_fused.runtime.submit import record
from marks import quick

CASES = [
    case._replace(own_stream=False, shape=(2, 7, 5) if case.shape[1] > 20 else case.shape)
    for case in sanitizer_cases.NORMED_CASES
]
"""On a CPU, and small."""


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_kernel_is_launched_by_a_case(dtype):
    """Of a block. B2 with its second sum for 3x3 and 5x5, and for the three windows of two 3x3."""
    wish, names, centred = sanitizer_cases.BACKENDS["triton"], set(), set()
    for case in (sanitizer_cases.CASES[5], *CASES):
        block = sanitizer_cases.make(case, dtype, "cpu")
        with record() as launches, torch.no_grad():
            if case.modes:
                normed = make_normed(block, case.modes)
                out = normed.forward(block, wish)
                normed.backward(block, out, torch.zeros_like(out[0]), wish)
            else:
                out = block.forward(wish)
                backward(block, out, torch.zeros_like(out[0]), wish)
        names |= {item.kernel.fn.__name__ for item in launches}
        found = [dict(zip(item.kernel.arg_names, item.args, strict=False)) for item in launches]
        sides = [args["R"] for args in found if args.get("dots_offset")]
        centred.add((len(case.modes), *sorted(sides)))
    assert names == set(TRITON_KERNELS) - {kernel.function for kernel in POOL_KERNELS}
    assert centred == {(0,), (6, 3, 5), (7, 3, 3, 3)}


@pytest.fixture
def no_extension(monkeypatch):
    monkeypatch.setitem(sanitizer_cases.BACKENDS, "native", "eager")


every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


@every_case
@pytest.mark.parametrize("dtype", quick(DTYPES, torch.bfloat16), ids=str)
def test_a_right_result(dtype, case, no_extension):
    for kernels in ("triton", "native"):
        sanitizer_cases.check_normed_case(case, sanitizer_cases.make(case, dtype, "cpu"), kernels)


RESULTS = {"y": 0, "raw": 1, "raw_r": 2, "r": 3, "stats": 5}


@every_case
@pytest.mark.parametrize("name", [*RESULTS, "gradients"])
def test_a_wrong_result(name, case, no_extension, monkeypatch):
    """One element of one result."""
    block, forward, gradients = sanitizer_cases.make(case, torch.float16, "cpu"), Normed.forward, Normed.backward

    def wrong_forward(self, block, wish):
        out = forward(self, block, wish)
        result = out[RESULTS[name]]
        result[(-1,) * (result.dim() - 1)][0] += 4
        return out

    def wrong_backward(self, block, out, dy, wish):
        grads = gradients(self, block, out, dy, wish)
        # The truth of the judgement is asked for in float64.
        if block.x.dtype == torch.float16:
            grads[2][0, 0] += 4
        return grads

    if name == "gradients":
        monkeypatch.setattr(Normed, "backward", wrong_backward)
    else:
        monkeypatch.setattr(Normed, "forward", wrong_forward)
    with pytest.raises(AssertionError, match="gradient of p2_1.weight" if name == "gradients" else None):
        sanitizer_cases.check_normed_case(case, block, "native")
