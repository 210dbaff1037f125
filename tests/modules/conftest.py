"""What tests of the network's modules share.

The package is imported late: with it comes Triton, before tests/conftest.py has said that it interprets.
"""

import pytest
import torch


@pytest.fixture(scope="module")
def nets():
    """Fused and eager, of one seed."""
    from inception_fused import FusedInception, GoogLeNet, Inception

    found = []
    for block in (FusedInception, Inception):
        torch.manual_seed(11)
        found.append(GoogLeNet(block=block))
    return found
