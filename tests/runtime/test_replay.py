"""Launches from memory: the same results as planned ones, on other tensors, and never for tensors of another kind."""

import gc
import json
import weakref

import pytest
import torch

from checks.block_cases import (
    DTYPES,
    ODD,
    REDUCE_24,
    SMALL,
    backward,
    check_backward,
    check_kernels,
    in_layout,
    make_block,
)
from inception_fused import FusedInception, FusedInceptionFunction, InceptionInputError, KernelError, backend
from inception_fused.op import operators
from inception_fused.runtime import replay
from inception_fused.runtime.submit import count, record
from marks import each_once, full, quick


@pytest.fixture
def planned(monkeypatch):
    """How often each pass was planned."""
    calls = {"forward": 0, "backward": 0}

    def counted(name):
        plan = getattr(operators, f"_planned_{name}")

        def call(*args):
            calls[name] += 1
            return plan(*args)

        return call

    for name in calls:
        monkeypatch.setattr(operators, f"_planned_{name}", counted(name))
    return calls


def step(block, wish="kernels"):
    out = block.forward(wish)
    dy = torch.randn_like(out[0])
    return out, dy, backward(block, out, dy, wish)


@each_once
@pytest.mark.parametrize("dtype", quick(DTYPES, torch.bfloat16), ids=str)
@pytest.mark.parametrize("config", [SMALL, REDUCE_24], ids=["small", "24"])
def test_from_the_third_call_on_other_tensors(planned, config, dtype):
    """Every call has tensors of its own, so an address that was remembered would show."""
    for seed in range(4):
        block = make_block(config, (2, 5, 4), dtype, seed=seed)
        out, dy, grads = step(block)
        check_kernels(block, out)
        check_backward(block, out, dy, grads)
    assert planned == {"forward": 2, "backward": 2}
    assert torch.equal(block.forward(save=False)[0], out[0])


@pytest.mark.parametrize(
    "variant", quick(["without bias", "without ReLU", "3x3", "cast", "KCRS", "NCHW"], "cast", "NCHW")
)
def test_variants(planned, variant):
    """The packed weights are temporaries; x that is no matrix of rows is copied before anything is remembered."""
    options = {"without bias": {"bias": False}, "without ReLU": {"activation": None}, "3x3": {"branch3": 3}}
    for seed in range(4):
        block = make_block(SMALL, (2, 5, 4), seed=seed, **options.get(variant, {}))
        if variant == "cast":
            block = block._replace(x=block.x.half(), biases=[b.half() for b in block.biases])
        if variant == "NCHW":
            block = block._replace(x=block.x.contiguous())
        out, dy, grads = step(block)
        rounded = block._replace(weights=[w.to(block.x.dtype) for w in block.weights])
        check_kernels(rounded, out)
        check_backward(rounded, out, dy, grads)
        for g, t in zip(grads[1:], (*block.weights, *block.biases), strict=False):
            assert (g.dtype, g.stride()) == (t.dtype, t.stride())
        assert out[0].is_contiguous(memory_format=torch.channels_last)
    assert planned == {"forward": 2, "backward": 2}


def test_the_outputs_are_those_of_a_planned_call():
    """Shapes, strides and dtypes, of the empty ones too."""
    block = make_block(SMALL, (1, 5, 4))
    results = [[*block.forward(save=False), *block.forward()] for _ in range(3)]
    results = [[(t.shape, t.stride(), t.dtype) for t in outputs] for outputs in results]
    assert results[0] == results[1] == results[2]
    some = [True, False, True, False, False, False, True] + [False] * 6
    out = block.forward()
    dy = torch.randn_like(out[0])
    grads = [
        torch.ops.inception_fused._backward(
            dy, block.x, *out[1:], block.weights, block.bias_dtypes, block.relu, some, "kernels"
        )
        for _ in range(3)
    ]
    for g in zip(*grads, strict=True):
        assert len({(t.shape, t.stride(), t.dtype) for t in g}) == 1
    assert all(torch.equal(a, b) for a, b in zip(grads[0], grads[2], strict=True))


def test_another_kind_is_planned_anew(planned):
    block = make_block(SMALL, (2, 5, 4))
    seen = 0
    memory = torch.empty(block.x.numel() + 1)
    unaligned = memory[1:].as_strided(block.x.shape, block.x.stride()).copy_(block.x)
    others = [
        block,
        make_block(SMALL, (2, 4, 5)),
        make_block(SMALL, (1, 5, 4)),
        make_block(SMALL, (2, 5, 4), torch.float16),
        make_block(SMALL, (2, 5, 4), branch3=3),
        make_block(SMALL, (2, 5, 4), bias=False),
        make_block(SMALL, (2, 5, 4), activation=None),
        block._replace(weights=[w.contiguous(memory_format=torch.channels_last) for w in block.weights]),
        block._replace(biases=[b.double() for b in block.biases]),
        block._replace(x=torch.nn.functional.pad(block.x.permute(0, 2, 3, 1), (0, 8)).permute(0, 3, 1, 2)[:, :24]),
        block._replace(x=unaligned),
    ]
    for other in others:
        for _ in range(2):
            out = other.forward()
        seen += 2
        assert planned["forward"] == seen
        check_kernels(other, out)
    for wish in ("K1=eager,K2=triton,K3=triton,K4=triton", "eager"):
        for _ in range(2):
            block.forward(wish)
        seen += 2
        assert planned["forward"] == seen
    for save in (False, True, False, True):
        block.forward(save=save)
    assert planned["forward"] == seen + 2, "only what is not saved had not been seen"


@pytest.mark.parametrize("why", ["padding of r", "one parameter twice", "ATen", "an address", "two at one address"])
def test_what_is_planned_at_every_call(planned, why):
    for seed in range(4):
        block = make_block(ODD if why == "padding of r" else SMALL, (2, 5, 4), seed=seed)
        wish = "K1=triton,K2=triton,K3=eager,K4=triton" if why == "ATen" else "kernels"
        if why == "one parameter twice":
            weights = list(block.weights)
            weights[1] = weights[3] = weights[5]
            block = block._replace(weights=weights)
        if why == "an address":
            biases = [torch.cat((b[:1], b))[1:] for b in block.biases]
            block = block._replace(biases=biases)
        if why == "two at one address":
            weights = list(block.weights)
            weights[0] = block.x.permute(0, 2, 3, 1).reshape(-1)[: 16 * 24].view(16, 24, 1, 1)
            block = block._replace(weights=weights)
        out = block.forward(wish)
        check_kernels(block, out)
    assert planned["forward"] == 4


@pytest.mark.parametrize("config", [SMALL, ODD], ids=["small", "odd"])
def test_temporaries_lie_where_their_binary_was_compiled_for(config, monkeypatch):
    """On 16-byte boundaries as the observed call's were, whatever the size of those before them."""
    from inception_fused.runtime.launch import Launch

    prepare, aligned = Launch.prepare, []

    def noted(launch, place):
        def placed(operand):
            slot, offset = place(operand)
            aligned.append(operand.data_ptr() % 16 != 0 or offset % 16 == 0)
            return slot, offset

        return prepare(launch, placed)

    monkeypatch.setattr(Launch, "prepare", noted)
    block = make_block(config, (1, 5, 3))
    for _ in range(2):
        block.forward(save=False)
        step(block)
    assert len(aligned) > 50
    assert all(aligned)


def test_a_failed_launch_names_its_kernel(monkeypatch):
    from inception_fused.kernels import pool_proj

    block = make_block(SMALL, (1, 5, 4))
    block = block._replace(weights=in_layout(block.weights, "KRSC"))
    for _ in range(2):
        block.forward()

    def fail(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(type(pool_proj.pool_proj_kernel), "__getitem__", lambda self, grid: fail)
    with pytest.raises(KernelError, match=r"pool_and_reduce_kernel: launch of .* failed: MemoryError: no room"):
        block.forward()


def test_recording_and_counting_see_every_launch(planned):
    block = make_block(SMALL, (1, 5, 4))
    for _ in range(3):
        block.forward()
    with record() as launches:
        block.forward()
    with count() as names:
        block.forward()
    assert len(launches) == len(names) == 3, "pack and two"
    assert planned["forward"] == 4


def test_nothing_that_was_given_or_returned_is_kept():
    """Above all not what the second call, which is observed, was given."""
    for _ in range(3):
        block = make_block(SMALL, (1, 5, 4))
        out, dy, grads = step(block)
        alive = [weakref.ref(t) for t in (block.x, *block.weights, dy, *out, *grads)]
        del block, out, dy, grads
        gc.collect()
        assert not [ref for ref in alive if ref() is not None]


def test_an_observer_that_sees_nothing_remembers_nothing(planned):
    """The strided biases are copied with ATen, of which the mode hears nothing here."""
    block = make_block(SMALL, (2, 5, 4))
    block = block._replace(biases=[torch.stack((b, b), dim=1)[:, 0] for b in block.biases])
    with torch._C._DisableTorchDispatch():
        for _ in range(3):
            out = block.forward()
    check_kernels(block, out)
    assert planned["forward"] == 3


def test_a_failure_while_observed_is_forgotten(planned, monkeypatch):
    from inception_fused.runtime import launch

    def fail(self):
        raise KernelError("no room")

    block = make_block(SMALL, (1, 5, 4))
    block.forward()
    with monkeypatch.context() as patch:
        patch.setattr(launch.Launch, "run", fail)
        with pytest.raises(KernelError, match="no room"):
            block.forward()
    for _ in range(3):
        out = block.forward()
    check_kernels(block, out)
    assert planned["forward"] == 3, "the first, the one that failed, the one that was observed"


def swapped(block, name, *shape):
    getattr(block, name).weight.data = torch.randn(shape)


SWAPS = {
    "dy: got shape .2, 64, 5, 4., wants .2, 448, 5, 4.": lambda block, x: swapped(block, "p1_1", 400, 24, 1, 1),
    "p2_2.weight: got shape .24, 4, 3, 3.": lambda block, x: swapped(block, "p2_2", 24, 4, 3, 3),
    "p4_2.weight: got shape .0, 24, 1, 1.": lambda block, x: swapped(block, "p4_2", 0, 24, 1, 1),
    "dy: got shape .2, 64, 5, 4., wants .2, 64, 9, 9.": lambda block, x: setattr(x, "data", torch.randn(2, 24, 9, 9)),
    "p1_1.weight: its memory was freed": lambda block, x: block.p1_1.weight.untyped_storage().resize_(0),
    "r: got torch.float32 .* wants dense torch.float16": lambda block, x: setattr(x, "data", x.data.half()),
}


@each_once
@pytest.mark.parametrize("words", SWAPS)
@pytest.mark.parametrize("before", [0, 3], ids=["planned", "remembered"])
def test_what_was_swapped_between_forward_and_backward_is_refused(before, words):
    """Autograd keeps parameters, not their memory, so kernels would read beyond the new one, or beyond dy."""
    for i in range(before + 1):
        block = FusedInception(*SMALL)
        x = torch.randn(2, 24, 5, 4).requires_grad_()
        with backend("kernels"):
            y = block(x)
        if i < before:
            y.sum().backward()
    SWAPS[words](block, x)
    with pytest.raises(InceptionInputError, match=words):
        y.sum().backward()


@pytest.mark.parametrize("change", ["strides", "dtype", "rows"])
def test_saved_tensors_that_a_hook_has_changed_are_refused(change):
    def unpack(t):
        if t.dtype != torch.uint8:
            return t
        return {"strides": t.t().contiguous().t(), "dtype": t.half(), "rows": t[1:]}[change]

    block, x = FusedInception(*SMALL), torch.randn(2, 24, 5, 4).requires_grad_()
    with backend("kernels"), torch.autograd.graph.saved_tensors_hooks(lambda t: t, unpack):
        y = block(x)
        with pytest.raises(InceptionInputError, match="bits: got .* as the forward saved it"):
            y.sum().backward()


def test_a_device_is_part_of_a_kind():
    """A launch from memory does not look where an address points to."""

    class Elsewhere(torch.Tensor):
        def get_device(self):
            return 1

    here = torch.empty(4)
    assert replay.key_of([here])[0] == replay.key_of([torch.empty(4)])[0]
    assert replay.key_of([here])[0] != replay.key_of([here.as_subclass(Elsewhere)])[0]
    block = make_block(SMALL, (1, 5, 4))
    with pytest.raises(InceptionInputError, match="x: got device cpu, p1_1.weight is on meta"):
        operators._forward(block.x, [w.to("meta") for w in block.weights], [], True, False, False, False, "kernels")


@pytest.mark.parametrize("wrong", ["channels", "bias", "count"])
def test_the_function_checks_its_tensors(wrong):
    block = make_block(SMALL, (1, 5, 4))
    weights, biases = list(block.weights), list(block.biases)
    if wrong == "channels":
        weights[5] = torch.randn(3, 10, 1, 1)
    elif wrong == "bias":
        biases[2] = torch.randn(1)
    else:
        biases.pop()
    words = {"channels": "p4_2.weight: got shape", "bias": "p2_2.bias: got shape", "count": "6 and 5 biases"}[wrong]
    with pytest.raises(InceptionInputError, match=words):
        FusedInceptionFunction.apply(block.x, True, "kernels", (True, True, True), *weights, *biases)


def test_memory_is_bounded(planned, monkeypatch):
    monkeypatch.setattr(replay, "MOST_RECIPES", 3)
    blocks = [make_block(SMALL, (1, 3, w)) for w in range(1, 9)]
    for _ in range(3):
        for block in blocks:
            block.forward()
            assert len(replay._recipes) <= 3
    assert planned["forward"] == 24


def test_the_compiled_kernels(installed, planned):
    wish = "K1=native,B3=native"
    for seed in range(4):
        block = make_block(REDUCE_24, (1, 5, 4), torch.bfloat16, seed=seed)
        rest = "K2=triton,K3=triton,K4=triton,B1=triton,B2=triton,B4=triton,B5=triton"
        installed.calls()
        out, dy, grads = step(block, f"{wish},{rest}")
        assert [name for name, _ in installed.calls()].count("launch") == 2
        check_kernels(block, out)
        check_backward(block, out, dy, grads)
    assert planned == {"forward": 2, "backward": 2}


BESIDE = {"enqueued": lambda beside, folder: json.loads(beside.run("runtime/enqueued_launches.py").stdout)}


@pytest.fixture(scope="module")
def enqueued(beside):
    """What reaches Triton's launcher, planned and from memory; in a process that compiles instead of interpreting."""
    return beside.result("enqueued")


@full
@pytest.mark.parametrize("way", ["private", "public", "hooked"])
def test_the_launcher_gets_what_a_planned_launch_gives_it(enqueued, way):
    """Grid, stream, binary and every argument of 16 launches, addresses by the order of their first appearance."""
    assert len(enqueued["planned"]) == 16, "pack and K1 to K4, then eleven"
    for planned, replayed in zip(enqueued["planned"], enqueued[way], strict=True):
        assert planned == replayed


def test_launches_of_compiled_kernels_keep_nothing(enqueued):
    assert not enqueued["kept"], "tensors of the observed call"


def test_a_profilers_hook_reaches_the_launcher(enqueued):
    """Triton's launcher calls it, which the stub does not: what counts is that it was handed over."""
    assert enqueued["metadata"] == [True] * 11
