"""Options that tests and benchmarks share."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    help = (
        "tests: the same ideas on more sizes, architectures and processes; benchmarks: the whole matrix, hours on a GPU"
    )
    parser.getgroup("inception_fused").addoption("--full", action="store_true", help=help)
