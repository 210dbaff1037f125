"""Hooks of a benchmark run: its options, its cases in order, its time limit, what its JSON says, its closing table."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest
import torch

from benchmarks.cases.machine import machine
from benchmarks.cases.records import COMPILE, Record, of_extra_info, with_ratios
from benchmarks.cases.runner import Bench, NotMeasuredError
from benchmarks.cases.suite import Case, cases
from benchmarks.figures.closing import HOST_NOTE, closing

GPU = torch.cuda.is_available()
LIMITS = {(True, False): 480.0, (False, False): 180.0, (True, True): 0.0, (False, True): 900.0}
"""Default seconds of a run by (GPU, --full); 0 is none."""

BEGUN = pytest.StashKey[float]()
BENCH = pytest.StashKey[Bench]()
RECORDS = pytest.StashKey[list[Record]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("inception_fused")
    group.addoption("--no-compile", action="store_true", help="leave torch.compile out")
    group.addoption(
        "--time-limit",
        type=float,
        metavar="SECONDS",
        help="skip what could not end by then (default 480 on a GPU, 180 on a CPU; with --full none and 900; 0: none)",
    )


def pytest_configure(config: pytest.Config) -> None:
    # Before pytest-benchmark reads its own options.
    if getattr(config.option, "benchmark_columns", None) is None:
        config.option.benchmark_columns = ["median"]
    config.stash[BEGUN], config.stash[RECORDS] = time.monotonic(), []
    config.stash[BENCH] = Bench("cuda") if GPU else Bench("cpu", seconds=1.0, least=5)


def option(config: pytest.Config, name: str) -> object:
    """One of ours; None where this file was found too late to add it."""
    return config.getoption(name, default=None)


def time_limit(config: pytest.Config) -> float:
    given = option(config, "time_limit")
    if given is not None and not given >= 0:
        raise pytest.UsageError(f"--time-limit: got {given:g}, wants a number of seconds, 0 for none")
    return LIMITS[GPU, bool(option(config, "full"))] if given is None else given


def pytest_report_header(config: pytest.Config) -> list[str]:
    limit = time_limit(config)
    until = f"what could not end within {limit:.0f} s is skipped" if limit else "no time limit"
    if not GPU:
        path = "no CUDA device, so this measures the CPU path, which says nothing about the kernels"
        return [f"inception_fused benchmarks: {path}; {until}"]
    return [
        f"inception_fused benchmarks on {torch.cuda.get_device_name()}; {until}",
        "results are medians of device time in the closing table; " + HOST_NOTE.replace("above", "before it"),
    ]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        config = metafunc.config
        chosen = cases(gpu=GPU, full=bool(option(config, "full")), compile=not option(config, "no_compile"))
        mine = [case for case in chosen if case.suite in metafunc.module.SUITES]
        metafunc.parametrize("case", mine, ids=[case.id for case in mine])


def case_of(item: pytest.Item) -> Case | None:
    """The case of one of our tests; None for a benchmark of another kind."""
    callspec = getattr(item, "callspec", None)
    case = callspec.params.get("case") if callspec else None
    return case if isinstance(case, Case) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # One order over all files; benchmarks of other kinds come before torch.compile, which takes the longest.
    place = {case.id: index for index, case in enumerate(cases(gpu=GPU, full=bool(option(config, "full"))))}
    compiled = [place[case.id] for item in items if (case := case_of(item)) and case.implementation in COMPILE]
    others = min(compiled, default=len(place)) - 0.5
    items.sort(key=lambda item: others if (case := case_of(item)) is None else place[case.id])


def pytest_runtest_setup(item: pytest.Item) -> None:
    limit = time_limit(item.config)
    case = case_of(item)
    if limit:
        needs = case.seconds if GPU and case is not None else 0.0
        left = limit - (time.monotonic() - item.config.stash[BEGUN])
        if left <= needs:
            pytest.skip(f"the time limit of {limit:.0f} s left too little (raise --time-limit, or 0 for none)")


@pytest.fixture
def timed(request: pytest.FixtureRequest, benchmark) -> Callable[[Case], None]:
    """timed(case): measures it, and hands the record to pytest-benchmark and the closing table."""
    stash = request.config.stash
    bench = stash[BENCH]

    def run(case: Case) -> None:
        benchmark.group = f"{case.suite}: the host's wall time, NOT the result (device_us)"
        try:
            record = bench.run(case, lambda call: benchmark.pedantic(call, rounds=5 if GPU else 3, warmup_rounds=1))
        except NotMeasuredError as reason:
            pytest.skip(str(reason))
        except Exception:
            if bench.lost():
                pytest.exit("the device no longer answers: nothing more can be measured in this process", 3)
            raise
        benchmark.extra_info.update(record.extra_info())
        stash[RECORDS].append(record)

    return run


def pytest_benchmark_generate_machine_info(config: pytest.Config) -> dict[str, object]:
    return {
        **machine(),
        "ceilings": config.stash[BENCH].found,
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def pytest_benchmark_generate_commit_info(config: pytest.Config) -> dict[str, object]:
    """What pytest-benchmark would add (branch, project, times) says nothing about the figures."""
    found = machine()
    return {"id": found["commit"], "dirty": found["dirty"]}


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    ours = [entry for entry in output_json["benchmarks"] if of_extra_info(entry["extra_info"]) is not None]
    records = with_ratios(of_extra_info(entry["extra_info"]) for entry in ours)
    for entry, record in zip(ours, records, strict=True):
        entry["extra_info"] = {**entry["extra_info"], **record.extra_info()}
        # The case itself, which JSON cannot hold; every field of it is in extra_info.
        entry["params"] = None


@pytest.hookimpl(trylast=True)  # below pytest-benchmark's own table
def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not option(config, "benchmark_only") and not config.stash[RECORDS]:
        return
    reasons = [report.longrepr[2].removeprefix("Skipped: ") for report in terminalreporter.stats.get("skipped", [])]
    terminalreporter.section("inception_fused: device time")
    terminalreporter.write_line(closing(config.stash[RECORDS], reasons, gpu=GPU))
    terminalreporter.write_line("\n" + HOST_NOTE)
