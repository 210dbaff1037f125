"""The tuner on a CUDA device: a short run, and a block that then takes its tiles. Run by ``pytest -m gpu``."""

import pytest
import torch

from inception_fused import GOOGLENET_BLOCKS, FusedInception, backend, info
from inception_fused.plan import tuned
from inception_fused.runtime.submit import record
from inception_fused.testing import assert_parity, sample_input
from tuner import session

pytestmark = pytest.mark.gpu

KERNELS = ("K3", "K4", "B2", "B4")
"""Those that Triton computes on every GPU; two of each pass are enough to see the machinery work."""


@pytest.fixture
def tuned_block(tiles_folder):
    """(result of a run on 5a at batch 2, the block, an input of eight images) with the run's table in force."""
    torch.use_deterministic_algorithms(False)  # fresh memory is filled by another launch, which would be timed
    result = session.tune(
        120, kernels=KERNELS, blocks={"5a": GOOGLENET_BLOCKS["5a"]}, dtypes=("bf16",), batches=(2,), image_size=224
    )
    torch.manual_seed(0)
    block = FusedInception(*GOOGLENET_BLOCKS["5a"], device="cuda", dtype=torch.bfloat16)
    return result, block, sample_input("5a", 8, dtype=torch.bfloat16, device="cuda")


def test_a_run_and_the_block_that_takes_its_tiles(tuned_block):
    result, block, x = tuned_block
    assert (result["ended"], result["failed"], result["refused"]) == (None, [], [])
    assert {entry["kernel"] for entry in result["winners"]} == set(KERNELS)
    assert all(0 < entry["us"] < 1e5 and 0 <= entry["parity"] <= 1 for entry in result["winners"])
    assert all(item["reason"].startswith(("spills", "OutOfResources")) for item in result["rejected"])
    assert tuned.key(x.device) is not None
    assert f"tuned on {torch.cuda.get_device_name()}" in info()["tiles"]
    with backend("kernels"), torch.no_grad(), record() as launches:
        block(x[:2])
    taken = [tuple(item.tile) for item in launches if getattr(item, "kernel", None) and "conv_fprop" in item.describe()]
    wanted = [tuple(e["tile"].values()) for e in result["winners"] if e["kernel"] in ("K3", "K4")]
    assert taken == wanted
    with backend("kernels"):
        assert_parity(block, x[:2])


def test_an_images_result_does_not_depend_on_its_batch(tuned_block):
    """Batches 1 and 2 take the table's tiles, 8 the rules'."""
    _, block, x = tuned_block
    with backend("kernels"), torch.no_grad():
        first, second, eighth = (block(x[:n])[0] for n in (1, 2, 8))
    assert torch.equal(first, second)
    assert torch.equal(first, eighth)


def test_a_run_of_two_windows(tiles_folder):
    torch.use_deterministic_algorithms(False)
    result = session.tune(
        120, kernels=("K4", "B2", "B4"), blocks={"5a": GOOGLENET_BLOCKS["5a"]}, dtypes=("bf16",), batches=(2,),
        branch3=(3, 3),
    )  # fmt: skip
    assert (result["ended"], result["failed"], result["refused"]) == (None, [], [])
    torch.manual_seed(0)
    block = FusedInception(
        *GOOGLENET_BLOCKS["5a"], branch3_kernel_size=3, branch3_convs=2, device="cuda", dtype=torch.bfloat16
    )
    with backend("kernels"):
        assert_parity(block, sample_input("5a", 2, dtype=torch.bfloat16, device="cuda"))
