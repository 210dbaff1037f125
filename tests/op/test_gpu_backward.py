"""The backward on a CUDA device: strides, special values, launches, memory, graphs. Run by ``pytest -m gpu``.

Parity of every gradient at GoogLeNet's sizes is in test_gpu.py, beside the forward that it needs.
"""

import warnings

import pytest
import torch

from checks.block_cases import DTYPES, ODD, SMALL, backward, check_gradients, make_block
from inception_fused import GOOGLENET_BLOCKS, FusedInception, Inception, backend, precompile
from inception_fused.block.googlenet_blocks import branch3_options
from inception_fused.op import checking
from inception_fused.runtime.submit import record
from inception_fused.testing import Error, sample_input, tolerance

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("double", [False, True], ids=["one window", "two"])
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize("layout", ["NCHW", "sliced", "off 16 bytes", "stride 0"])
def test_strides_of_dy(layout, config, double):
    block = make_block(config, (2, 6, 5), torch.bfloat16, device="cuda", double=double)
    out = block.forward()
    dy = torch.randn_like(out[0])
    if layout == "NCHW":
        dy = dy.contiguous()
    elif layout == "stride 0":
        dy = dy[:, :, :1, :1].expand_as(dy)
    else:
        first = 8 if layout == "sliced" else 1
        n, k, h, w = dy.shape
        wide = torch.full((n, h, w, k + 16), float("nan"), dtype=dy.dtype, device="cuda").permute(0, 3, 1, 2)
        wide[:, first : first + k] = dy
        dy = wide[:, first : first + k]
    check_gradients(block, out, dy)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("values", [[0.0, 1.0], [float("-inf"), 1.0], [float("nan"), 0.0, 1.0]], ids=str)
def test_gradients_on_special_values(values, dtype):
    """On the GPU and in ATen on the CPU, from the same saved tensors."""
    block = make_block(SMALL, (2, 6, 7), dtype, device="cuda")
    palette = torch.tensor(values, dtype=dtype, device="cuda")
    x = palette[torch.randint(len(values), block.x.shape, device="cuda")].contiguous(memory_format=torch.channels_last)
    block = block._replace(x=x)
    out = block.forward()
    dy = torch.randn_like(out[0])
    host = block._replace(x=x.cpu(), weights=[w.cpu() for w in block.weights], biases=[b.cpu() for b in block.biases])
    expected = backward(host, tuple(t.cpu() for t in out), dy.cpu(), "eager")
    for ours, theirs in zip(backward(block, out, dy), expected, strict=True):
        finite = theirs.isfinite()
        assert torch.equal(ours.cpu().isfinite(), finite)
        error = Error.of(ours.cpu()[finite], theirs[finite])
        assert error.within(4 * tolerance(dtype, 10**3, tf32=dtype == torch.float32)), error


@pytest.mark.parametrize(("branch3", "count"), [((5,), 11), ((3, 3), 13)], ids=str)
def test_launches_backward_and_no_synchronisation(branch3, count):
    block = FusedInception(*GOOGLENET_BLOCKS["3a"], **branch3_options(branch3), device="cuda", dtype=torch.bfloat16)
    block = block.to(memory_format=torch.channels_last)
    x = sample_input("3a", 2, dtype=torch.bfloat16, device="cuda").requires_grad_()
    with backend("kernels"):
        y = block(x)
        dy = torch.randn_like(y)
        y.backward(dy)
        double = len(branch3) > 1
        saved = make_block(GOOGLENET_BLOCKS["3a"], (2, 28, 28), torch.bfloat16, device="cuda", double=double)
        out = saved.forward()
        with record() as launches:
            backward(saved, out, dy)
        assert len(launches) == count
        torch.cuda.set_sync_debug_mode("error")
        try:
            block(x).backward(dy)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("name", ["3a", "4e", "5b"])
def test_peak_memory_of_a_step(name):
    """Forward and backward together need no more than eager's, whose saved activations are four times ours."""
    peaks = []
    x = sample_input(name, 32, dtype=torch.bfloat16, device="cuda")
    for block_type, wish in ((FusedInception, "kernels"), (Inception, "eager")):
        block = block_type(*GOOGLENET_BLOCKS[name], device="cuda", dtype=torch.bfloat16)
        block = block.to(memory_format=torch.channels_last)
        with backend(wish):
            for _ in range(2):
                leaf = x.clone().requires_grad_()
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
                block(leaf).square().mean().backward()
                torch.cuda.synchronize()
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert peaks[0] <= peaks[1], f"{peaks[0] / 2**20:.1f} MiB, eager {peaks[1] / 2**20:.1f} MiB"


@pytest.mark.parametrize("branch3", [(5,), (3, 3)], ids=str)
def test_training_graph(branch3):
    """Forward and backward captured together: no allocation or synchronisation that a capture forbids."""
    block = FusedInception(*GOOGLENET_BLOCKS["5a"], **branch3_options(branch3), device="cuda", dtype=torch.float16)
    block = block.to(memory_format=torch.channels_last)
    x = sample_input("5a", 3, dtype=torch.float16, device="cuda").requires_grad_()
    dy = torch.randn(3, GOOGLENET_BLOCKS["5a"].out_channels, 7, 7, device="cuda", dtype=torch.float16)
    parameters = [x, *block.parameters()]
    with backend("kernels"):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            expected = torch.autograd.grad(block(x), parameters, dy)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = torch.autograd.grad(block(x), parameters, dy)
        for grad in captured:
            grad.fill_(float("nan"))
        graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_a_graph_is_captured_right_after_precompile():
    """The capture is the model's first call with kernels: nothing may be left to compile, load or wait for."""
    config = GOOGLENET_BLOCKS["4b"]
    block = FusedInception(*config, device="cuda", dtype=torch.bfloat16).to(memory_format=torch.channels_last)
    x = sample_input("4b", 5, dtype=torch.bfloat16, device="cuda").requires_grad_()
    dy = torch.randn(5, config.out_channels, 14, 14, device="cuda", dtype=torch.bfloat16)
    parameters = [x, *block.parameters()]
    with backend("kernels"):
        found = precompile(block, x, progress=False)
        assert found.blocks == ("model",), found
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(x)
            captured = torch.autograd.grad(y, parameters, dy)
        graph.replay()
        expected = torch.autograd.grad(block(x), parameters, dy)
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checked_calls_pass(dtype):
    """INCEPTION_FUSED_CHECK at GoogLeNet's sizes and its backward, on autograd's thread."""
    block = FusedInception(*GOOGLENET_BLOCKS["4b"], device="cuda", dtype=dtype)
    x = sample_input("4b", 2, dtype=dtype, device="cuda").requires_grad_()
    with checking.checked(), backend("kernels"):
        y = block(x)
        y.backward(torch.randn_like(y))


def test_deterministic_mode_stays_quiet():
    block = FusedInception(*SMALL, device="cuda")
    torch.use_deterministic_algorithms(True)
    try:
        with backend("kernels"), warnings.catch_warnings():
            warnings.simplefilter("error")
            block(torch.randn(1, 24, 3, 3, device="cuda", requires_grad=True)).sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
