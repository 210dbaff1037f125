"""Why no kernel runs: every reason alone, several at once, their order, and the same words from all who say them."""

import types
import warnings

import pytest
import torch
from torch.autograd import forward_ad

from checks.block_cases import SMALL, make_block
from inception_fused import (
    BatchNorm,
    FallbackWarning,
    FusedInception,
    InceptionInputError,
    InceptionParams,
    KernelError,
    backend,
    explain,
    inception,
    info,
    precompile,
    verify,
)
from inception_fused.block.call_types import ForwardCall
from inception_fused.block.tensor_lists import BlockTensors
from inception_fused.op import autograd, backends, dispatch, operators, reasons
from inception_fused.plan import choice
from inception_fused.runtime import caches, native
from inception_fused.runtime.failures import Failure
from inception_fused.runtime.submit import record
from inception_fused.tools import environment

CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
FP32, BF16, FP64 = torch.float32, torch.bfloat16, torch.float64
NATIVE = f"{choice.COMPILED[0]}=native"
BOTH = f"{NATIVE},{choice.KERNELS[1]}=triton"
X = torch.zeros(1, 24, 3, 3)


class Tagged(torch.Tensor):
    pass


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on a GPU, where a caller is warned."""

    is_cuda = True


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    """What the machine lacks, "" for nothing; a test changes it. Everybody but the tests of probes asks these."""
    lacks = types.SimpleNamespace(triton="", extension="", tf32=True, interprets=True)
    monkeypatch.setattr(reasons, "why_no_triton", lambda index: lacks.triton or None)
    monkeypatch.setattr(native, "why_no_extension", lambda device: lacks.extension or None)
    monkeypatch.setattr(reasons, "tf32_allowed", lambda: lacks.tf32)
    monkeypatch.setattr(reasons, "interpreting", lambda: lacks.interprets)
    return lacks


def params(**fields):
    """SMALL's, with a BatchNorm behind each convolution where one of its fields is given for the first."""
    block = make_block(SMALL, (1, 1, 1))
    if not fields:
        return InceptionParams(tuple(block.weights), tuple(block.biases))
    norms = [BatchNorm(*(torch.ones(w.shape[0]) for _ in range(4)), 1e-3) for w in block.weights]
    norms[0] = norms[0]._replace(**fields)
    return InceptionParams(tuple(block.weights), tuple(block.biases), tuple(norms))


WANTED = params(mean=torch.zeros(SMALL.c1, requires_grad=True))
"""Gradients of BatchNorm's mean are, of which there are none."""


def kinds(*question, **more):
    found = reasons.every(*question, **more)
    assert reasons.first(*question, **more) == (found[0] if found else None)
    return [reason.kind for reason in found]


def test_nothing_speaks_against_a_usual_call():
    assert kinds(CUDA, BF16) == kinds(CUDA, FP32, "kernels") == kinds(CUDA, BF16, BOTH) == []
    assert kinds(CUDA, BF16, x=X, params=params(), too_large=False) == []
    assert kinds(CPU, FP64, "kernels") == [], "interpreted"
    twins = ",".join(f"{kernel}=eager" for kernel in choice.KERNELS)
    assert kinds(CUDA, BF16, twins) == [], "which the operator runs"


ALONE = {
    "block": (lambda: ((CUDA, BF16), {"block": "p1_1 has a hook"}), "p1_1 has a hook"),
    "backend": (lambda: ((CUDA, BF16, "eager"), {}), "backend is eager"),
    "subclass": (lambda: ((CUDA, FP32), {"x": X.as_subclass(Tagged), "params": params()}), "tensor subclass Tagged"),
    "batch norm": (
        lambda: ((CUDA, FP32), {"x": X, "params": params(mean=torch.ones(16, requires_grad=True))}),
        "a gradient of BatchNorm's mean or var is wanted",
    ),
    "device": (
        lambda: ((CPU, FP32), {}),
        "x is on the CPU; kernels run on a CUDA device, or on a CPU under TRITON_INTERPRET=1 "
        "INCEPTION_FUSED_BACKEND=kernels",
    ),
    "dtype": (
        lambda: ((CUDA, FP64), {}),
        "x is torch.float64; the kernels compute in float32 (as TF32), float16 and bfloat16",
    ),
    "size": (
        lambda: ((CUDA, BF16), {"too_large": True}),
        "sizes beyond the 32-bit offsets inside a tile; split the batch",
    ),
}


@pytest.mark.parametrize("kind", ALONE)
def test_each_alone(kind):
    question, text = ALONE[kind]
    given, more = question()
    assert reasons.every(*given, **more) == [reasons.Reason(kind, text)]
    assert reasons.first(*given, **more) == reasons.Reason(kind, text)


def test_batch_norms_whose_statistics_want_gradients():
    (reason,) = reasons.every(CUDA, FP32, x=X, params=WANTED)
    assert reason == ("batch norm", "a gradient of BatchNorm's mean or var is wanted")
    with torch.no_grad():
        assert reasons.every(CUDA, FP32, x=X, params=WANTED) == []


def test_forward_mode_concerns_a_call_alone():
    with forward_ad.dual_level():
        assert reasons.every(CUDA, FP32, x=X, params=params()) == [("forward mode", "forward-mode differentiation")]
        assert reasons.every(CUDA, FP32) == []


def test_a_cpu_of_which_kernels_are_demanded(machine):
    machine.interprets = False
    text = "x is on the CPU; kernels run on a CUDA device, or on a CPU under TRITON_INTERPRET=1"
    assert reasons.every(CPU, FP32, "kernels") == [("device", text)]
    assert reasons.every(CPU, FP32, NATIVE) == [], "the extension answers for itself: simulated, it runs there"
    machine.extension = "x is on the CPU; compiled kernels run on a CUDA device"
    assert reasons.every(CPU, FP32, NATIVE) == [("extension", machine.extension)]
    assert kinds(CPU, FP64, BOTH) == ["device", "dtype", "extension"]


@pytest.mark.parametrize("asked", ["auto", "kernels", NATIVE])
def test_another_device(asked):
    assert reasons.every(META, FP32, asked) == [("device", "x is on meta; kernels run on CUDA devices")]


def test_what_the_machine_lacks(machine):
    machine.tf32 = False
    (strict,) = reasons.every(CUDA, FP32)
    assert strict.kind == "strict fp32"
    assert 'torch.backends.cudnn.conv.fp32_precision = "tf32" allows it' in strict.text
    assert reasons.every(CUDA, BF16) == []
    machine.triton, machine.extension = "Triton is not installed: pip install triton", "it was not built"
    assert reasons.every(CUDA, BF16) == [("triton", machine.triton)], "nobody asked for the extension"
    assert reasons.every(CUDA, BF16, NATIVE) == [("extension", "it was not built")]
    assert kinds(CUDA, BF16, BOTH) == ["extension", "triton"]


def test_all_at_once_in_their_order(machine):
    machine.tf32, machine.triton = False, "too old"
    everything = {"block": "it has a hook", "x": X.as_subclass(Tagged), "params": WANTED, "too_large": True}
    with forward_ad.dual_level():
        call = kinds(CPU, torch.int8, "eager", **everything)
        assert call == ["block", "backend", "subclass", "batch norm", "forward mode", "device", "dtype", "size"]
        machine.extension = "it was not built"
        there = kinds(CUDA, FP32, BOTH, **everything)
    assert there == [k for k in reasons.KINDS if k not in ("backend", "device", "dtype")]


def test_the_first_is_found_without_a_probe(monkeypatch):
    monkeypatch.setattr(reasons, "why_no_triton", lambda index: pytest.fail("probed"))
    assert reasons.first(CUDA, FP64).kind == "dtype"
    assert reasons.first(CUDA, BF16, "eager").kind == "backend"


@pytest.mark.parametrize("device", [CPU, META, CUDA], ids=str)
@pytest.mark.parametrize("dtype", [FP32, FP64], ids=str)
@pytest.mark.parametrize("asked", ["auto", "kernels", NATIVE, BOTH])
@pytest.mark.parametrize("lack", ["", "triton", "extension", "tf32", "interprets"])
def test_the_fast_answer_is_that_of_all_reasons(machine, lack, asked, dtype, device):
    setattr(machine, lack or "none", "it lacks it" if lack in ("triton", "extension") else False)
    found = reasons.first(device, dtype, asked)
    if asked != "auto" or device.type == "cuda":  # what is left to it by op/autograd.py
        assert reasons.machine_runs(device, dtype, backends.parse(asked)) == (found is None)


@pytest.mark.parametrize(
    ("capability", "triton", "launches", "words"),
    [
        ((7, 5), True, True, "is sm_75; the kernels need sm_80"),
        ((9, 0), False, True, "Triton is not installed: pip install triton"),
        ((9, 0), True, False, "(RuntimeError: gcc: not found); install one (Debian, Ubuntu: apt-get install gcc"),
        ((8, 0), True, True, None),
    ],
)
def test_why_no_triton(capability, triton, launches, words, monkeypatch):
    from inception_fused.kernels import probe

    monkeypatch.undo()  # the machine of these tests
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Some GPU")
    monkeypatch.setattr(torch.cuda, "device", lambda index: torch.no_grad())
    monkeypatch.setattr(reasons, "find_spec", lambda name: object() if triton else None)

    def run():
        if not launches:
            raise RuntimeError("gcc: not found")

    monkeypatch.setattr(probe, "run", run)
    monkeypatch.setattr(caches, "prepare", lambda: None)
    found = reasons.why_no_triton.__wrapped__(0)
    found = found.text if isinstance(found, Failure) else found
    assert found is None if words is None else words in found


def first_words(call):
    """What a KernelError or a FallbackWarning of a call says behind its opening words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", FallbackWarning)
        try:
            call()
        except KernelError as error:
            return str(error).partition(" demands kernels that cannot run: ")[2]
    return str(caught[0].message).partition("the Inception block runs in eager PyTorch: ")[2]


def test_everybody_says_the_same(machine):
    """On a CPU that does not interpret: of a block that is as usual, and of one that is not."""
    block = FusedInception(*SMALL).eval()
    for spoil in (lambda: None, lambda: block.p1_1.register_forward_hook(lambda *_: None)):
        spoil()
        machine.interprets = True
        auto = reasons.first(CPU, FP32, block=block.eager_reason()).text
        assert explain(block).rows[0].path == explain(block, X).rows[0].path == f"eager: {auto}"
        found = [verify(block, X, backward=False).rows[0].why, precompile(block, X, progress=False).skipped["model"]]
        assert all(words.startswith(auto) for words in found), found
        machine.interprets = False
        with backend("kernels"):
            demanded = reasons.first(CPU, FP32, "kernels", block=block.eager_reason()).text
            assert first_words(lambda: block(X)) == demanded
            assert explain(block).rows[0].path == f"eager: {demanded}"
            assert precompile(block, X, progress=False).skipped["model"].startswith(demanded)


def test_everybody_says_the_same_of_an_input():
    block, x = FusedInception(*SMALL).eval(), X.as_subclass(Tagged)
    with backend("kernels"), pytest.raises(KernelError, match="cannot run: tensor subclass Tagged"):
        block(x)
    assert explain(block, x).rows[0].path == "eager: tensor subclass Tagged"
    assert verify(block, x, backward=False).rows[0].why == "tensor subclass Tagged"
    assert precompile(block, x, progress=False).skipped == {"model": "tensor subclass Tagged: nothing to compile"}


def test_everybody_says_the_same_of_a_gpu(machine, monkeypatch):
    """That is not there: what the operator, the Function's caller and info() say of it."""
    machine.triton = "Some GPU is sm_75; the kernels need sm_80 (Ampere) or newer"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    properties = types.SimpleNamespace(name="Some GPU", major=7, minor=5, multi_processor_count=1, total_memory=2**34)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    facts = info()
    assert facts["gpus"][0]["obstacle"] == machine.triton
    assert {kernel["why"] for kernel in facts["kernels"].values()} == {machine.triton}
    assert f"eager: {machine.triton}" in environment.format_info(facts)
    assert first_words(lambda: dispatch.choices("kernels", CUDA, BF16)) == machine.triton

    x = X.as_subclass(OnCuda)
    assert first_words(lambda: autograd.eager(x, reasons.first(CUDA, BF16).text, "auto", lambda x: x)) == machine.triton


def test_a_size_is_refused_or_told_in_the_same_words(monkeypatch):
    monkeypatch.setattr(choice, "exceeds_int32", lambda *_: True)
    block = make_block(SMALL, (1, 3, 3))
    assert first_words(lambda: block.forward("kernels")) == reasons.TOO_LARGE
    assert reasons.first(CUDA, BF16, too_large=True).text == reasons.TOO_LARGE
    with record() as launches:
        block.forward("auto")
    assert launches == []


def test_the_operator_warns_in_the_same_words():
    """Of what "auto" leaves to ATen, but not of what was asked of it."""
    x, weights, biases, _ = make_block(SMALL, (1, 3, 3))

    def call(asked):
        tensors = BlockTensors(weights, biases)
        return operators._planned_forward(
            ForwardCall(x.as_subclass(OnCuda), tensors, True, operators.SAVES_NOTHING, asked)
        )

    for asked in ("auto", f"{choice.FORWARD[0]}=eager"):
        assert first_words(lambda asked=asked: call(asked)) == reasons.first(CPU, FP32).text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        call(",".join(f"{kernel}=eager" for kernel in choice.FORWARD))


def test_a_warning_points_at_the_line_that_is_meant():
    with pytest.warns(FallbackWarning, match="^the Inception block runs in eager PyTorch: too old$") as caught:
        reasons.warn("too old", stacklevel=1)
    assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("text", "normal", "demands", "eager"),
    [
        ("auto", "auto", (), ()),
        ("kernels", "kernels", ("triton",), ()),
        ("eager", "eager", (), choice.KERNELS),
        (" K3 = eager , K1 = triton ", "K1=triton,K3=eager", ("triton",), ("K3",)),
        ("B3=native,K2=triton", "K2=triton,B3=native", ("native", "triton"), ()),
        ("K1=eager", "K1=eager", (), ("K1",)),
    ],
)
def test_a_backend_is_read_once(text, normal, demands, eager, monkeypatch):
    found = backends.parse(text)
    assert (found.text, found.demands, found.demands_kernels) == (normal, demands, demands != ())
    assert tuple(kernel for kernel in choice.KERNELS if found.asks_eager(kernel)) == eager
    assert found.is_eager == (text == "eager")
    monkeypatch.setattr(backends, "_parse", lambda *_: pytest.fail("read again"))
    assert backends.parse(text) is found


@pytest.mark.parametrize("wrong", [None, 3, ["auto"], "", "cuda", "K1", "K9=triton", "K2=native", "K1=triton,K1=eager"])
def test_a_backend_that_is_none(wrong):
    wants = 'wants "auto", "kernels", "eager" or a list such as "K1=native,B3=eager" of K1, K2, K3, K4, N1, '
    for _ in range(2):
        with pytest.raises(InceptionInputError) as caught:
            backends.parse(wrong, "here")
        assert str(caught.value).startswith(f"here: got {wrong!r}, ")
        assert wants in str(caught.value)


def test_a_compiled_call_follows_the_backend_in_force():
    """Although torch.compile takes what a text asks for as a constant."""
    given = params()
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: inception(x, given), backend="eager", fullgraph=True)
    counts = []
    for asked in ("auto", "kernels", "eager", "kernels"):
        with backend(asked), torch.no_grad(), record() as launches:
            compiled(X)
        counts.append(len(launches))
    assert counts == [0, 3, 0, 3]
