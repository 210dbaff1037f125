"""Launches from memory beside planned ones, through Triton's real launcher, up to a CUDA driver that runs nothing."""

import itertools
import json
from pathlib import Path

import pytest

import stub_libcuda
from beside import Beside
from inception_fused.runtime.replay import ALIGNMENT
from launcher_records import CASES, WAYS, Pass
from stub_libcuda import Arrived


def _records(beside: Beside, folder: Path) -> dict | str:
    try:
        stub_libcuda.compiler()
    except RuntimeError as error:
        return str(error)
    stub_libcuda.build(folder)
    # LD_LIBRARY_PATH is where PyTorch or Triton look for the driver themselves. Without LLVM's optimiser it takes two
    # thirds of the time; what a kernel computes does not matter.
    done = beside.run(
        "runtime/launcher_records.py", folder,
        TRITON_CACHE_DIR=str(folder / "cache"), LD_LIBRARY_PATH=str(folder), DISABLE_LLVM_OPT="1",
        INCEPTION_FUSED_BACKEND="auto", INCEPTION_FUSED_SYNC="0", INCEPTION_FUSED_CHECK="0",
    )  # fmt: skip
    return json.loads(done.stdout)


BESIDE = {"records": _records}


@pytest.fixture(scope="module")
def records(beside):
    """What launcher_records.py prints."""
    found = beside.result("records")
    if isinstance(found, str):
        pytest.skip(found)
    return found


@pytest.mark.parametrize("name", CASES)
def test_a_prepared_launch_is_the_public_one(records, name):
    """On the same tensors: grid, block, shared memory, stream, kernel, context and every byte of every parameter."""
    launches = records["cases"][name]["each"]
    assert len(launches) == CASES[name].launches
    for launch in launches:
        [public] = launch["arrived"]["public"]
        for way in WAYS:
            assert launch["arrived"][way] == [public], f"{way}: {public[0]}"
        arrived = Arrived(*public)
        assert [arrived.grid, arrived.block[0], arrived.shared] == launch["expected"]
        assert (arrived.device, arrived.stream) == (CASES[name].device, launch["stream"])


@pytest.mark.parametrize("name", CASES)
def test_a_remembered_call_is_the_planned_one(records, name):
    """Other tensors, another stream: the same launches in the same order, with the same places in those tensors."""
    case, found = CASES[name], records["cases"][name]
    planned = Pass(*found["planned"])
    check_pass(planned, case)
    assert (found["remembered"] is not None) == case.remembered
    if not case.remembered:
        return
    remembered = Pass(*found["remembered"])
    check_pass(remembered, case)
    begins: dict[str, int] = {}
    for a, b in zip(planned.launches, remembered.launches, strict=True):
        a, b = Arrived(*a), Arrived(*b)
        assert a._replace(stream=0, parameters=[]) == b._replace(stream=0, parameters=[])
        for there, here in zip(a.parameters, b.parameters, strict=True):
            if not isinstance(there, list) or there[0] not in planned.temporaries:
                assert there == here, a.name
            else:
                assert here[0] in remembered.temporaries, a.name
                assert begins.setdefault(there[0], here[1] - there[1]) == here[1] - there[1], a.name
    # All temporaries are parts of one buffer, in which they must not overlap.
    assert len(remembered.temporaries) == 1
    ends = sorted((begin, begin + planned.temporaries[name]) for name, begin in begins.items())
    assert all(begin % ALIGNMENT == 0 for begin, _ in ends)
    assert all(end <= begin for (_, end), (begin, _) in itertools.pairwise(ends))
    assert not ends or (ends[0][0] >= 0 and ends[-1][1] <= max(remembered.temporaries.values()))


def check_pass(call, case):
    """Every launch on the call's device and its current stream, every address in a tensor, and device 0 afterwards."""
    assert len(call.launches) == case.launches
    assert call.after == 0
    for launch in map(Arrived._make, call.launches):
        assert (launch.device, launch.stream) == (case.device, call.stream), launch.name
        assert not [p for p in launch.parameters if isinstance(p, int) and p >= 1 << 32], launch.name


def test_what_the_driver_refuses_is_raised(records):
    """In every way: a second dimension of more than 65535."""
    assert records["refusals"].keys() == {"public", *WAYS}
    for words in records["refusals"].values():
        assert "pack_kernel: launch of 1 programs" in words
        assert "invalid argument" in words
