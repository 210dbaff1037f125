"""On a CUDA device: parity, layouts, determinism, streams, graphs, launches. Run by ``pytest -m gpu``."""

import warnings

import pytest
import torch

from checks.block_cases import (
    DTYPES,
    ODD,
    ODD_SHAPES,
    ODD_STEM,
    SMALL,
    SMALL_STEM,
    backward,
    check_gradients,
    check_kernels,
    make_block,
)
from inception_fused import GOOGLENET_BLOCKS, FallbackWarning, FusedInception, GoogLeNet, Inception, backend, info
from inception_fused.block.googlenet_blocks import GOOGLENET_STEM, branch3_options, spatial_size
from inception_fused.runtime.submit import count, record
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


@pytest.mark.parametrize("image", [224, 96])
@pytest.mark.parametrize("batch", [1, 32, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernels_of_the_stem(dtype, batch, image):
    side = spatial_size("stem", image)
    block = make_block(GOOGLENET_STEM, (batch, side, side), dtype, device="cuda")
    out = block.forward()
    check_kernels(block, out, tf32=_is_tf32(dtype))
    check_gradients(block, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [SMALL_STEM, ODD_STEM], ids=["aligned", "odd"])
@pytest.mark.parametrize(("bias", "activation"), [(True, "relu"), (False, "relu"), (True, None)], ids=str)
def test_variants_of_the_stem(bias, activation, config, dtype):
    block = make_block(config, (2, 9, 7), dtype, device="cuda", bias=bias, activation=activation)
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
@pytest.mark.parametrize("name", ["3a", "4b", "4e", "5b"])
def test_kernels_of_two_windows(name, dtype):
    """The narrowest reductions, those of 24 channels, the widest windows, the smallest image."""
    side = spatial_size(name)
    block = make_block(GOOGLENET_BLOCKS[name], (32, side, side), dtype, device="cuda", double=True)
    out = block.forward()
    check_kernels(block, out, tf32=_is_tf32(dtype))
    check_gradients(block, out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
@pytest.mark.parametrize(("bias", "activation"), [(True, "relu"), (False, "relu"), (True, None)], ids=str)
def test_variants_of_two_windows(bias, activation, config, dtype):
    block = make_block(config, (2, 9, 7), dtype, device="cuda", bias=bias, activation=activation, double=True)
    out = block.forward()
    check_kernels(block, out, tf32=_is_tf32(dtype))
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


@pytest.mark.parametrize(("branch3", "count"), [((5,), 4), ((3, 3), 5)], ids=str)
def test_launches_and_no_synchronisation(branch3, count):
    block = FusedInception(*GOOGLENET_BLOCKS["3a"], **branch3_options(branch3), device="cuda", dtype=torch.bfloat16).to(
        memory_format=torch.channels_last
    )
    x = sample_input("3a", 2, dtype=torch.bfloat16, device="cuda")
    with backend("kernels"), torch.no_grad():
        block(x)
        with record() as launches:
            block(x)
        assert len(launches) == count
        torch.cuda.set_sync_debug_mode("error")
        try:
            block(x)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_launches_from_memory(dtype):
    """From the third call on no launch is planned: other tensors, of the same kind, give what planning them gives."""
    blocks = [make_block(GOOGLENET_BLOCKS["4b"], (3, 14, 14), dtype, device="cuda", seed=seed) for seed in range(4)]
    dy = [torch.randn_like(block.forward()[0]) for block in blocks]

    def steps():
        for block, d in zip(blocks, dy, strict=True):
            out = block.forward()
            yield [block.forward(save=False)[0], *out, *backward(block, out, d)]

    remembered = list(steps())
    with count():
        planned = list(steps())
    for ours, theirs in zip(remembered, planned, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


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
