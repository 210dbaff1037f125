"""On a CUDA device: parity, layouts, determinism, streams, graphs, launches. Run by ``pytest -m gpu``."""

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import sanitizer_cases
import torch
from cases import DTYPES, ODD, ODD_SHAPES, SMALL, check_gradients, check_kernels, make_block

from inception_fused import GOOGLENET_BLOCKS, FallbackWarning, FusedInception, GoogLeNet, Inception, backend, info
from inception_fused.googlenet import spatial_size
from inception_fused.kernels.submit import record
from inception_fused.native import NativeLaunch, facts, obstacle
from inception_fused.testing import Error, assert_parity, sample_input, tolerance

pytestmark = pytest.mark.gpu


def _is_tf32(dtype: torch.dtype) -> bool:
    return dtype == torch.float32


@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GOOGLENET_BLOCKS)
def test_kernels_of_googlenet(name, dtype, batch):
    side = spatial_size(name)
    block = make_block(GOOGLENET_BLOCKS[name], (batch, side, side), dtype, device="cuda")
    out = block.forward()
    check_kernels(block, out, tf32=_is_tf32(dtype))
    check_gradients(block, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GOOGLENET_BLOCKS)
def test_parity_of_outputs_and_gradients(name, dtype):
    torch.manual_seed(0)
    block = FusedInception(*GOOGLENET_BLOCKS[name], device="cuda", dtype=dtype)
    with backend("kernels"):
        assert_parity(block, sample_input(name, 4, dtype=dtype, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", ODD_SHAPES)
def test_odd_shapes(shape, dtype):
    block = make_block(*ODD_SHAPES[shape], dtype, device="cuda")
    out = block.forward()
    check_kernels(block, out, tf32=_is_tf32(dtype))
    check_gradients(block, out)


@pytest.mark.parametrize("branch3", [3, 5])
@pytest.mark.parametrize("activation", ["relu", None])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_variants(bias, activation, branch3):
    for config in (SMALL, ODD):
        block = make_block(
            config, (2, 9, 7), torch.bfloat16, device="cuda", bias=bias, activation=activation, branch3=branch3
        )
        out = block.forward()
        check_kernels(block, out)
        check_gradients(block, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [[0.0, 1.0], [float("-inf")], [float("nan"), 0.0, 1.0], [0.0, -0.0]], ids=str)
def test_arg_max_on_special_values(values, dtype):
    block = make_block(SMALL, (3, 6, 7), dtype, device="cuda")
    palette = torch.tensor(values, dtype=dtype, device="cuda")
    x = palette[torch.randint(len(values), block.x.shape, device="cuda")].contiguous(memory_format=torch.channels_last)
    taps = block._replace(x=x).forward()[3]
    expected = block._replace(
        x=x.cpu(), weights=[w.cpu() for w in block.weights], biases=[b.cpu() for b in block.biases]
    )
    assert torch.equal(taps.cpu(), expected.forward("eager")[3])


def test_misaligned_and_sliced_inputs():
    """A slice whose first channel is not on 16 bytes is read in place, by the unaligned binaries."""
    for offset in (0, 1, 8):
        block = make_block(SMALL, (2, 6, 5), torch.float16, device="cuda")
        wide = torch.full((2, 64, 6, 5), float("nan"), dtype=torch.float16, device="cuda")
        wide = wide.contiguous(memory_format=torch.channels_last)
        wide[:, offset : offset + 24] = block.x
        given = block._replace(x=wide[:, offset : offset + 24])
        out = given.forward()
        check_kernels(given, out)
        check_gradients(given, out)


def test_repeats_are_bit_identical_and_an_image_does_not_depend_on_its_batch():
    block = make_block(GOOGLENET_BLOCKS["4b"], (32, 14, 14), torch.bfloat16, device="cuda")
    first = block.forward()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, block.forward(), strict=True))
    alone = block._replace(x=block.x[5:6]).forward()[0]
    bound = tolerance(torch.bfloat16, 9 * 112 + 512)
    assert Error.of(alone, first[0][5:6]).within(bound)


def test_four_launches_and_no_synchronisation():
    block = FusedInception(*GOOGLENET_BLOCKS["3a"], device="cuda", dtype=torch.bfloat16).to(
        memory_format=torch.channels_last
    )
    x = sample_input("3a", 2, dtype=torch.bfloat16, device="cuda")
    with backend("kernels"), torch.no_grad():
        block(x)
        with record() as launches:
            block(x)
        assert len(launches) == 4
        torch.cuda.set_sync_debug_mode("error")
        try:
            block(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_cuda_graph_and_side_stream():
    block = FusedInception(*GOOGLENET_BLOCKS["5a"], device="cuda", dtype=torch.float16).requires_grad_(False)
    x = sample_input("5a", 3, dtype=torch.float16, device="cuda")
    with backend("kernels"):
        expected = block(x)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            aside = block(x)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(aside, expected)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = block(x)
        x.copy_(sample_input("5a", 3, dtype=torch.float16, device="cuda", seed=1))
        graph.replay()
        assert torch.equal(captured, block(x))


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_device():
    block = make_block(SMALL, (2, 6, 5), torch.float16, device="cuda:1")
    check_kernels(block, block.forward())
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiled(compiler):
    torch._dynamo.reset()
    block = FusedInception(*SMALL, device="cuda")
    x = torch.randn(2, 24, 6, 5, device="cuda")
    compiled = torch.compile(block, fullgraph=True, backend=compiler)
    grads = []
    for run in (block, compiled):
        block.zero_grad()
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        grads.append([leaf.grad, *(p.grad.clone() for p in block.parameters())])
    for a, b in zip(*grads, strict=True):
        assert Error.of(a, b).within(tolerance(torch.float32, 10**3, tf32=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_training_step_under_autocast(dtype):
    """The whole network, fp32 parameters: ours follows eager, and every launch of ours is taken."""
    losses = []
    for block in (FusedInception, Inception):
        torch.manual_seed(1)
        net = GoogLeNet(block=block).cuda()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
        x, target = torch.randn(8, 1, 96, 96, device="cuda"), torch.arange(8, device="cuda") % 10
        with backend("kernels" if block is FusedInception else "auto"):
            for _ in range(3):
                with torch.autocast("cuda", dtype=dtype):
                    loss = torch.nn.functional.cross_entropy(net(x).float(), target)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - losses[1]) < 0.02


def test_fallbacks_warn_with_the_reason():
    block = FusedInception(*SMALL, device="cuda")
    x = torch.randn(1, 24, 4, 4, device="cuda")
    with pytest.warns(FallbackWarning, match="float64"):
        assert FusedInception(*SMALL, device="cuda", dtype=torch.float64)(x.double()).dtype == torch.float64
    before = torch.backends.cudnn.conv.fp32_precision
    try:
        torch.backends.cudnn.conv.fp32_precision = "ieee"
        with pytest.warns(FallbackWarning, match="strict fp32"):
            block(x)
    finally:
        torch.backends.cudnn.conv.fp32_precision = before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)


def test_info_says_that_kernels_run():
    kernels = info()["kernels"]
    assert kernels["K1"]["auto"] in ("native", "triton"), kernels
    ours = [name for name in kernels if name not in ("K1", "B3")]
    assert all(kernels[name]["auto"] == "triton" for name in ours), kernels


NATIVE = "K1=native"
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def native_k1():
    """The compiled K1 runs here; skipped where it was not built, failed where it was and does not load."""
    reason = obstacle(torch.device("cuda"))
    if reason is None:
        return
    if facts()["built"]:
        pytest.fail(f"the extension was built, but cannot run: {reason}")
    pytest.skip(reason)


def k1_of(block, out):
    """What K1 alone has written, one image after another: y's first slice, r, and the bytes of the slice's bits."""
    shape, (y, r, bits, _) = block.shape, out
    rows = (r, bits[:, : -(-shape.k1 // 8)])
    return y[:, : shape.k1], *(part.unflatten(0, (shape.n, shape.h * shape.w)) for part in rows)


def check_native(block):
    """K1's own results alone, which is what check_kernels cannot do: K2 to K4 have tests of their own."""
    sanitizer_cases.check(block, block.forward(NATIVE), "native")


@pytest.mark.usefixtures("native_k1")
class TestNativeK1:
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
