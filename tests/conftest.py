"""Mode of the process, fresh memory, seeds.

Triton interprets or compiles, once for a process: every run but ``pytest -m gpu`` interprets kernels on the CPU.
"""

import os
from pathlib import Path

import pytest

from beside import Beside
from marks import left_to_full


def pytest_configure(config: pytest.Config) -> None:
    # The suite's results may not depend on what was tuned on the machine; a test that wants a table sets its folder.
    os.environ["INCEPTION_FUSED_TUNED"] = "0"
    if not wants_gpu(config):
        # Small tensors, and compilers on the other core: threads that wait for each other took ten times as long.
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        # Before anything imports Triton, which reads the variable when a kernel is decorated.
        os.environ["TRITON_INTERPRET"] = "1"
    # Not in pyproject.toml, from which pytest would import the package, and with it Triton, before this function runs.
    config.addinivalue_line("filterwarnings", "error::inception_fused.errors.FallbackWarning")


LEFT_OUT = pytest.StashKey[int]()


def waits_for(item: pytest.Item) -> list[str]:
    """The works of its module's BESIDE that a test waits for."""
    return [name for name in getattr(item.module, "BESIDE", ()) if name in getattr(item, "fixturenames", ())]


def wants_full(config: pytest.Config) -> bool:
    return bool(config.getoption("full"))


def wants_gpu(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "gpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # Last those that wait for what runs beside the tests, and of them the gate's.
    items.sort(key=lambda item: (bool(waits_for(item)), "gate" in waits_for(item)))
    if wants_gpu(config):
        import torch

        reason = None if torch.cuda.is_available() else "no GPU that torch can use"
    else:
        reason = "needs a process that does not interpret kernels: pytest -m gpu"
    for item in items:
        if reason and item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))
    leave_out_full(config, items)


def leave_out_full(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect what --full adds, unless that is all that was asked for."""
    # On a GPU every test runs: there it is the hardware that is new, and an hour costs more than the tests.
    if wants_full(config) or wants_gpu(config):
        return
    left = set(left_to_full(items))
    if left and len(left) < len(items):
        config.stash[LEFT_OUT] = len(left)
        config.hook.pytest_deselected(items=list(left))
        items[:] = [item for item in items if item not in left]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    count = config.stash.get(LEFT_OUT, 0)
    if count:
        terminalreporter.write_line(f"--full adds {count} tests: more sizes, architectures and processes of the same")


@pytest.fixture
def tiles_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An empty folder of the user's tables, which are in force; no package's table is."""
    from inception_fused.plan import tuned

    monkeypatch.setenv("INCEPTION_FUSED_TUNED", "1")
    monkeypatch.setenv("INCEPTION_FUSED_CACHE", str(tmp_path / "tiles"))
    monkeypatch.setattr(tuned, "PACKAGE_TABLES", tmp_path / "package")
    tuned.forget()
    yield tmp_path / "tiles"
    tuned.forget()


@pytest.fixture(scope="session")
def full_run(request: pytest.FixtureRequest) -> bool:
    """Whether this run has --full."""
    return wants_full(request.config)


@pytest.fixture(scope="session", autouse=True)
def beside(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, full_run: bool):
    """What the chosen tests wait for, started before the first of them."""
    chosen = {name: item.module.BESIDE[name] for item in request.session.items for name in waits_for(item)}
    alone = all(map(waits_for, request.session.items))
    # The gate last: it takes longest.
    works = {
        name: (chosen[name], tmp_path_factory.mktemp(name)) for name in sorted(chosen, key=lambda name: name == "gate")
    }
    works = Beside(works, full=full_run, workers=(os.cpu_count() or 1) if alone else 1)
    yield works
    works.stop()


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """torch.empty and its kin give NaN (integers: their largest value), so an element that nothing wrote is seen."""
    import torch

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def nothing_remembered():
    """Tests replace plans and kernels, on which remembered launches depend."""
    from inception_fused.runtime import replay

    replay.forget()


@pytest.fixture(scope="session")
def simulator_build(tmp_path_factory: pytest.TempPathFactory):
    """The compiled extension for simulated hardware, built once; unoptimised, so that mutants can share its objects."""
    import simulator

    try:
        simulator.compiler()
    except RuntimeError as error:
        pytest.skip(str(error))
    return simulator.Simulator(simulator.build(tmp_path_factory.mktemp("simulator"), simulator.FLAGS))


@pytest.fixture
def simulator(simulator_build):
    """Simulated hardware with one device, its record of calls empty."""
    simulator_build.configure()
    simulator_build.device = 0
    simulator_build.calls()
    simulator_build.last_error()
    return simulator_build


@pytest.fixture
def installed(simulator, monkeypatch: pytest.MonkeyPatch):
    """The simulator in the extension's place, so that CPU tensors can be given to it."""
    from inception_fused.runtime import native

    monkeypatch.setattr(native, "extension", lambda: simulator.module)
    return simulator


@pytest.fixture
def loads(monkeypatch: pytest.MonkeyPatch):
    """An extension that loads, of which nothing is launched."""
    from inception_fused.runtime import native

    monkeypatch.setattr(native, "why_no_extension", lambda device: None)
