"""The compiled kernels K1 and B3 on a CUDA device, each alone. Run by ``pytest -m gpu``."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from checks.block_cases import DTYPES, ODD, ODD_SHAPES, SMALL, backward, check_backward, check_kernels, make_block
from gpu import sanitizer_cases
from inception_fused import GOOGLENET_BLOCKS, FusedInception, backend
from inception_fused.block.googlenet_blocks import spatial_size
from inception_fused.runtime.native import NativeLaunch, facts, why_no_extension
from inception_fused.runtime.submit import record
from inception_fused.testing import sample_input

pytestmark = pytest.mark.gpu

NATIVE, NATIVE_B3 = "K1=native", "B3=native"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def extension():
    """The compiled kernels run here; skipped where it was not built, failed where it was and does not load."""
    reason = why_no_extension(torch.device("cuda"))
    if reason is None:
        return
    if facts()["built"]:
        pytest.fail(f"the extension was built, but cannot run: {reason}")
    pytest.skip(reason)


def _is_tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


def k1_of(block, out):
    """What K1 alone has written, one image after another: y's first slice, r, and the bytes of the slice's bits."""
    shape, (y, r, bits, _) = block.shape, out
    rows = (r, bits[:, : -(-shape.branch_channels[0] // 8)])
    return y[:, : shape.branch_channels[0]], *(part.unflatten(0, (shape.n, shape.h * shape.w)) for part in rows)


def check_native(block):
    """K1's own results alone, which is what check_kernels cannot do: K2 to K4 have tests of their own."""
    sanitizer_cases.check(block, block.forward(NATIVE), "native")


class TestK1:
    @pytest.mark.parametrize("batch", [1, 32])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", GOOGLENET_BLOCKS)
    def test_googlenet(self, name, dtype, batch):
        side = spatial_size(name)
        block = make_block(GOOGLENET_BLOCKS[name], (batch, side, side), dtype, device="cuda")
        check_kernels(block, block.forward(NATIVE), tf32=_is_tf32(dtype))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", ODD_SHAPES)
    def test_odd_shapes(self, shape, dtype):
        check_native(make_block(*ODD_SHAPES[shape], dtype, device="cuda"))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("activation", ["relu", None])
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    def test_variants(self, bias, activation, dtype):
        for config in (SMALL, ODD):
            block = make_block(config, (2, 9, 7), dtype, device="cuda", bias=bias, activation=activation)
            check_native(block)

    def test_biases_of_every_dtype(self):
        for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            block = make_block(SMALL, (2, 6, 5), torch.bfloat16, device="cuda")
            block = block._replace(biases=[b.to(dtype) for b in block.biases])
            check_native(block)

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_misaligned_and_sliced_inputs(self, dtype):
        for offset in (0, 1, 8):
            block = make_block(SMALL, (2, 6, 5), dtype, device="cuda")
            wide = torch.full((2, 64, 6, 5), float("nan"), dtype=dtype, device="cuda")
            wide = wide.contiguous(memory_format=torch.channels_last)
            wide[:, offset : offset + 24] = block.x
            check_native(block._replace(x=wide[:, offset : offset + 24]))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bit_for_bit_over_runs_and_batches(self, dtype):
        """A batch of 32 takes a large tile, one image the small one; the order of every sum is the same."""
        block = make_block(GOOGLENET_BLOCKS["4b"], (32, 14, 14), dtype, device="cuda")
        first = k1_of(block, block.forward(NATIVE))
        for _ in range(3):
            again = k1_of(block, block.forward(NATIVE))
            assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        for image in (0, 5, 31):
            one = block._replace(x=block.x[image : image + 1])
            alone = k1_of(one, one.forward(NATIVE))
            assert all(torch.equal(a[0], b[image]) for a, b in zip(alone, first, strict=True))

    def test_it_is_the_native_kernel_that_is_launched_and_nothing_waits(self):
        block = make_block(GOOGLENET_BLOCKS["3a"], (2, 28, 28), torch.bfloat16, device="cuda")
        block.forward(NATIVE)
        with record() as launches:
            block.forward(NATIVE)
        assert sum(isinstance(item, NativeLaunch) for item in launches) == 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            block.forward(NATIVE)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def test_a_stream_of_its_own(self):
        """The stream is kept busy first, so that a launch on any other would read x before it is written."""
        block = make_block(GOOGLENET_BLOCKS["4a"], (4, 14, 14), torch.float16, device="cuda")
        expected = k1_of(block, block.forward(NATIVE))
        late = block._replace(x=torch.zeros_like(block.x))
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            late.x.copy_(block.x)
            aside = late.forward(NATIVE)
        stream.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(k1_of(late, aside), expected, strict=True))

    def test_cuda_graph(self):
        block = FusedInception(*GOOGLENET_BLOCKS["5a"], device="cuda", dtype=torch.float16).requires_grad_(False)
        x = sample_input("5a", 3, dtype=torch.float16, device="cuda")
        with backend(NATIVE):
            block(x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                captured = block(x)
            x.copy_(sample_input("5a", 3, dtype=torch.float16, device="cuda", seed=1))
            captured.fill_(float("nan"))
            graph.replay()
            assert torch.equal(captured, block(x))

    def test_a_fresh_thread(self):
        block = make_block(SMALL, (2, 6, 5), torch.float16, device="cuda")
        found = []
        thread = threading.Thread(target=lambda: found.append(block.forward(NATIVE)))
        thread.start()
        thread.join()
        torch.cuda.synchronize()
        assert len(found) == 1, "the thread raised"
        check_kernels(block, found[0])

    @pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
    def test_a_second_device(self):
        check_native(make_block(SMALL, (2, 6, 5), torch.float16, device="cuda:1"))
        assert torch.cuda.current_device() == 0

    def test_waiting_for_every_launch(self):
        script = """
import torch
from inception_fused import FusedInception, backend
from inception_fused.kernels import submit
torch.manual_seed(0)
block = FusedInception(24, 16, (8, 24), (8, 16), 8, device="cuda", dtype=torch.float16)
x = torch.randn(2, 24, 6, 5, device="cuda", dtype=torch.float16)
with torch.no_grad(), backend("K1=native"):
    y = block(x)
    assert torch.equal(y, block(x)) and y.isfinite().all()
print("waited:", submit.SYNCHRONISE)
"""
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        environment["INCEPTION_FUSED_SYNC"] = "1"
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "waited: True" in done.stdout


def check_b3(block):
    """Every gradient, of which B3 makes that of x."""
    out = block.forward()
    dy = torch.randn_like(out[0])
    check_backward(block, out, dy, backward(block, out, dy, NATIVE_B3), tf32=_is_tf32(block.x.dtype))


class TestB3:
    @pytest.mark.parametrize("batch", [1, 32])
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("name", GOOGLENET_BLOCKS)
    def test_googlenet(self, name, dtype, batch):
        side = spatial_size(name)
        check_b3(make_block(GOOGLENET_BLOCKS[name], (batch, side, side), dtype, device="cuda"))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shape", ODD_SHAPES)
    def test_odd_shapes(self, shape, dtype):
        check_b3(make_block(*ODD_SHAPES[shape], dtype, device="cuda"))

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_bit_for_bit_over_runs_and_against_a_single_image(self, dtype):
        """A batch of 32 takes a large tile, one image the small one; the order of every sum is the same."""
        block = make_block(GOOGLENET_BLOCKS["4b"], (32, 14, 14), dtype, device="cuda")
        out = block.forward()
        dy = torch.randn_like(out[0])
        first = backward(block, out, dy, NATIVE_B3)[0]
        assert all(torch.equal(first, backward(block, out, dy, NATIVE_B3)[0]) for _ in range(3))
        rows = slice(5 * 14 * 14, 6 * 14 * 14)
        one, saved = block._replace(x=block.x[5:6]), (out[0][5:6], *(part[rows] for part in out[1:]))
        alone = backward(one, saved, dy[5:6], NATIVE_B3)[0]
        assert torch.equal(alone[0], first[5])

    def test_it_is_the_native_kernel_that_is_launched_and_nothing_waits(self):
        block = make_block(GOOGLENET_BLOCKS["3a"], (2, 28, 28), torch.bfloat16, device="cuda")
        out = block.forward()
        dy = torch.randn_like(out[0])
        backward(block, out, dy, NATIVE_B3)
        with record() as launches:
            backward(block, out, dy, NATIVE_B3)
        assert sum(isinstance(item, NativeLaunch) for item in launches) == 1
        torch.cuda.set_sync_debug_mode("error")
        try:
            backward(block, out, dy, NATIVE_B3)
        finally:
            torch.cuda.set_sync_debug_mode("default")
