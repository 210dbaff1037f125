"""On a CUDA device, the block with CUDA graphs, streams, devices, the allocator, inductor and a scaler."""

import copy

import pytest
import torch
from torch import nn

from checks.block_cases import ODD, SMALL
from inception_fused import FusedInception, Inception, backend, explain
from inception_fused.testing import Error, tolerance

pytestmark = pytest.mark.gpu

two_gpus = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.device_count() < 2, reason="needs two GPUs"
)  # fmt: skip


@pytest.fixture(autouse=True)
def demanded():
    """Kernels, or an error."""
    with backend("kernels"):
        yield


def _block(config=SMALL, *, kind=FusedInception, **kwargs) -> nn.Module:
    torch.manual_seed(3)
    return kind(*config, **({"device": "cuda", "dtype": torch.float16} | kwargs))


def _x(config=SMALL, n: int = 3, seed: int = 0, device: str = "cuda", dtype: torch.dtype = torch.float16):
    x = torch.randn((n, config.in_channels, 9, 7), generator=torch.Generator().manual_seed(seed))
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)


def _step(block: nn.Module, x: torch.Tensor, run=None) -> list[torch.Tensor]:
    """The output, dx and every parameter's gradient, which belong to nobody else."""
    leaf = x.detach().clone().requires_grad_()
    y = (run or block)(leaf)
    wanted = [leaf, *block.parameters()]
    return [y.detach().clone(), *(g.clone() for g in torch.autograd.grad(y.float().square().mean(), wanted))]


def _assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        assert torch.equal(a, b), f"tensor {i} of y, dx, parameters"


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["KCRS", "KRSC"])
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
def test_a_captured_forward_follows_its_input_and_weights(config, memory_format):
    block = _block(config).to(memory_format=memory_format)
    static = _x(config)
    with torch.no_grad():
        for _ in range(3):
            block(static)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = block(static)
        for seed in (1, 2):
            static.copy_(_x(config, seed=seed))
            block.p2_2.weight.mul_(-1.5)
            block.p4_2.bias.add_(0.25)
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, block(static))


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
def test_graphed_callables_train_as_the_block(config):
    """make_graphed_callables captures forward and backward apart; three steps of SGD end in the same weights."""
    plain = _block(config)
    graphed = copy.deepcopy(plain)
    call = torch.cuda.make_graphed_callables(graphed, (_x(config).requires_grad_(),))
    ends = []
    for block, run in ((plain, plain), (graphed, call)):
        optimizer = torch.optim.SGD(block.parameters(), lr=0.1)
        for seed in range(3):
            optimizer.zero_grad(set_to_none=False)
            leaf = _x(config, seed=seed).requires_grad_()
            run(leaf).float().square().mean().backward()
            optimizer.step()
        ends.append([leaf.grad.clone(), *(p.detach().clone() for p in block.parameters())])
    _assert_equal(ends[1], ends[0])


def test_a_captured_step_with_its_optimizer():
    block = _block(dtype=torch.float32)
    twin = copy.deepcopy(block)
    static = _x(dtype=torch.float32)
    optimizers = [torch.optim.SGD(b.parameters(), lr=0.1) for b in (block, twin)]

    def step(b, optimizer):
        optimizer.zero_grad(set_to_none=True)
        b(static).square().mean().backward()
        optimizer.step()

    start = copy.deepcopy(block.state_dict())
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):
            step(block, optimizers[0])
    torch.cuda.current_stream().wait_stream(aside)
    block.load_state_dict(start)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(block, optimizers[0])
    for seed in (1, 2):
        static.copy_(_x(seed=seed, dtype=torch.float32))
        graph.replay()
        step(twin, optimizers[1])
    _assert_equal(list(block.parameters()), list(twin.parameters()))


def test_streams_side_by_side():
    """Four streams at once, no memory shared: temporaries of one are not handed to another while they are read."""
    block = _block(ODD)
    inputs = [_x(ODD, n=17, seed=seed) for seed in range(4)]
    expected = [_step(block, x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(5):
        found = []
        for stream, x in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(_step(block, x))
        torch.cuda.synchronize()
        for ours, theirs in zip(found, expected, strict=True):
            _assert_equal(ours, theirs)


def test_launches_go_to_the_current_stream():
    """Behind a long sleep there, the output is not written yet; on the default stream it would be."""
    block, x = _block(), _x()
    stream, other, end = torch.cuda.Stream(), torch.cuda.Stream(), torch.cuda.Event()
    with torch.no_grad():
        # Another output's memory for either stream, since a first allocation there would wait for the sleep.
        for side in (stream, other):
            with torch.cuda.stream(side):
                for _ in range(3):
                    block(_x(seed=9)).clone()
        expected = block(x)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(100_000_000)
            y = block(x)
            end.record()
        with torch.cuda.stream(other):
            seen = y.clone()
        other.synchronize()
        assert not end.query(), "the sleep is too short to tell"
        stream.synchronize()
    assert not torch.equal(seen, expected)
    assert torch.equal(y, expected)


@two_gpus
@pytest.mark.parametrize("current", [0, 1])
@pytest.mark.parametrize("home", [0, 1])
def test_the_current_device_does_not_matter(home, current):
    expected = [t.cpu() for t in _step(_block(), _x())]
    device = f"cuda:{home}"
    block, x = _block(device=device), _x(device=device)
    with torch.cuda.device(current):
        for _ in range(4):
            found = _step(block, x)
            assert torch.cuda.current_device() == current
    assert all(t.device == torch.device(device) for t in found)
    for a, b in zip(found, expected, strict=True):
        assert Error.of(a.cpu(), b).within(tolerance(torch.float16, 10**3))


@pytest.mark.parametrize("autocast", [False, True], ids=["float16", "autocast"])
@pytest.mark.parametrize("config", [SMALL, ODD], ids=["aligned", "odd"])
def test_no_call_waits_for_the_gpu(config, autocast):
    """Once the binaries are there: not where launches are planned, nor from memory."""
    dtype = torch.float32 if autocast else torch.float16
    block, x = _block(config, dtype=dtype), _x(config, dtype=dtype).requires_grad_()
    dy = torch.randn((3, config.out_channels, 9, 7), device="cuda", dtype=torch.float16)

    def step():
        with torch.autocast("cuda", dtype=torch.float16, enabled=autocast):
            y = block(x)
        y.backward(dy)
        with torch.no_grad(), torch.autocast("cuda", dtype=torch.float16, enabled=autocast):
            block(x)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_all_memory_is_the_caching_allocators():
    """After the first steps neither the driver nor the allocator gives out any more, and nothing is kept."""
    block, x = _block(), _x(n=33)
    seen = []
    for steps in (4, 8):
        for _ in range(steps):
            _step(block, x)
        torch.cuda.synchronize()
        seen.append((torch.cuda.memory_reserved(), torch.cuda.memory_allocated(), torch.cuda.mem_get_info()[0]))
    assert seen[0] == seen[1], "reserved, allocated, the driver's free bytes"


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_inductor(mode):
    """Dynamic batches compile twice at most; with graphs of inductor's own the weights may still move."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    block = _block(dtype=torch.float32)
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for n in (3, 5, 7) if mode == "default" else (3, 3, 3, 3):
        x = _x(n=n, seed=n, dtype=torch.float32)
        torch.compiler.cudagraph_mark_step_begin()
        ours, theirs = _step(block, x, compiled), _step(block, x)
        for a, b in zip(ours, theirs, strict=True):
            assert Error.of(a, b).within(tolerance(torch.float32, 10**3, tf32=True))
        with torch.no_grad():
            for p in block.parameters():
                p.mul_(1.1)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_with_a_scaler(dtype):
    """fp32 weights and a scale that overflows fp16 at first. Eager skips as many steps or more, since its weights'
    gradients pass through fp16 and ours do not."""
    runs = []
    for kind, wish in ((FusedInception, "kernels"), (Inception, "auto")):
        block = _block(kind=kind, dtype=torch.float32)
        optimizer = torch.optim.SGD(block.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**24, growth_interval=1000)
        losses, scales = [], []
        with backend(wish):
            for _ in range(12):
                optimizer.zero_grad()
                with torch.autocast("cuda", dtype=dtype):
                    y = block(_x(dtype=torch.float32))
                loss = y.float().square().mean(dim=(0, 2, 3)).sum()
                scaler.scale(loss).backward()
                scaler.step(optimizer)
                scaler.update()
                losses.append(loss.item())
                scales.append(scaler.get_scale())
        assert all(p.grad.dtype == torch.float32 for p in block.parameters())
        runs.append((losses, scales))
    (ours, our_scales), (theirs, their_scales) = runs
    assert ours[-1] < ours[0]
    assert our_scales[-1] >= their_scales[-1]
    if dtype == torch.float16:
        assert our_scales[0] < 2.0**24
    else:
        assert our_scales[-1] == 2.0**24
        assert ours == pytest.approx(theirs, rel=0.02)


def test_explain_measures_the_card_and_the_block():
    block, x = _block().train(), _x()
    memory = torch.cuda.memory_allocated()
    found = explain(block, x)
    (row,) = found.rows
    assert (row.path, row.dtype) == ("kernels", torch.float16)
    for times in (row.forward, row.step):
        assert 0 < times.floor_us < times.predicted_us
        assert times.floor_us < times.measured_us < 1e6
    assert row.forward.measured_us < row.step.measured_us
    assert f"{torch.cuda.get_device_name()}, measured (" in str(found)
    assert "(a guess)" not in str(found)
    assert all(parameter.grad is None for parameter in block.parameters())
    del found
    assert torch.cuda.memory_allocated() <= memory + (1 << 20)
