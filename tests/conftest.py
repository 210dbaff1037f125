"""Mode of the process, fresh memory, seeds.

Triton interprets or compiles, once for a process: every run but ``pytest -m gpu`` interprets kernels on the CPU.
"""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports Triton, which reads the variable when a kernel is decorated.
    if not wants_gpu(config):
        os.environ["TRITON_INTERPRET"] = "1"


def wants_gpu(config: pytest.Config) -> bool:
    return config.getoption("markexpr") == "gpu"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if wants_gpu(config):
        import torch

        reason = None if torch.cuda.is_available() else "no GPU that torch can use"
    else:
        reason = "needs a process that does not interpret kernels: pytest -m gpu"
    for item in items:
        if reason and "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def fresh_memory_is_nan():
    """torch.empty and its kin give NaN (integers: their largest value), so an element that nothing wrote is seen."""
    import torch

    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
