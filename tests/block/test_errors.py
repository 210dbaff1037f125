"""Wrong calls: each raises InceptionInputError and names the argument, what it got and what it wants."""

import os
import subprocess
import sys
import types

import pytest
import torch

from checks.block_cases import SMALL, make_block
from inception_fused import (
    FusedInception,
    GoogLeNet,
    Inception,
    InceptionInputError,
    InceptionParams,
    KernelError,
    backend,
    inception,
    testing,
)
from inception_fused.runtime.launch import _addressed


def _block() -> FusedInception:
    return FusedInception(*SMALL)


def _params(**changes) -> InceptionParams:
    """SMALL's parameters with some weights ("w0" to "w5") or biases ("b0" to "b5") replaced."""
    block = make_block(SMALL, (1, 1, 1))
    weights, biases = list(block.weights), list(block.biases)
    for name, value in changes.items():
        (weights if name[0] == "w" else biases)[int(name[1])] = value
    return InceptionParams(tuple(weights), tuple(biases))


X = torch.zeros(1, 24, 3, 3)

WRONG_CALLS = {
    "3-D x": (lambda: _block()(X[0]), "x: got 3 dimensions (24, 3, 3), wants [N, 24, H, W]; add the batch dimension"),
    "2-D x": (lambda: _block()(X[0, 0]), "x: got 2 dimensions (3, 3), wants [N, 24, H, W]"),
    "channels of x": (lambda: _block()(X[:, :20]), "x: got 20 channels in shape (1, 20, 3, 3), wants 24"),
    "NHWC x": (lambda: _block()(torch.zeros(1, 3, 3, 24)), "x looks like NHWC, wants x.permute(0, 3, 1, 2)"),
    "empty image": (lambda: _block()(torch.zeros(1, 24, 0, 3)), "x: got an empty image 0x3, wants at least 1x1"),
    "integer x": (lambda: _block()(X.long()), "x: got torch.int64, wants a floating point dtype"),
    "bool x": (lambda: _block()(X.bool()), "x: got torch.bool, wants a floating point dtype"),
    "complex x": (lambda: _block()(X.to(torch.complex64)), "x: got torch.complex64, wants a floating point dtype"),
    "x of another dtype": (lambda: _block()(X.bfloat16()), "x: got torch.bfloat16, p1_1.weight is torch.float32; wants one"),
    "x on another device": (lambda: _block()(X.to("meta")), "x: got device meta, p1_1.weight is on cpu; wants one device"),
    "weight on another device": (
        lambda: inception(X, _params(w4=torch.zeros(16, 8, 5, 5, device="meta"))), "x: got device cpu, p3_2.weight is on meta",
    ),
    "x is a list": (lambda: _block()([1.0]), "x: got list, wants a tensor [N, 24, H, W]"),
    "sparse x": (lambda: _block()(X.to_sparse()), "x: got layout torch.sparse_coo, wants a dense tensor"),
    "activation of the call": (
        lambda: inception(X, _params(), activation="gelu"), "activation: got 'gelu', wants \"relu\" or None",
    ),
    "params is a list": (lambda: inception(X, list(_params())), "params: got list, wants InceptionParams"),
    "five weights": (
        lambda: inception(X, InceptionParams(_params().weights[:5])), "params.weights: got 5 items, wants six tensors",
    ),
    "no biases but not None": (
        lambda: inception(X, InceptionParams(_params().weights, ())), "params.biases: got 0 items, wants six tensors",
    ),
    "two biases": (
        lambda: inception(X, InceptionParams(_params().weights, _params().biases[:2])), "params.biases: got 2 items",
    ),
    "weight is None": (lambda: inception(X, _params(w2=None)), "params.weights: got NoneType for p2_2, wants a tensor"),
    "integer weight": (lambda: inception(X, _params(w0=torch.ones(16, 24, 1, 1).int())), "params.weights: got torch.int32"),
    "weight of 5x5 in branch 2": (
        lambda: inception(X, _params(w2=torch.zeros(24, 8, 5, 5))),
        "p2_2.weight: got shape (24, 8, 5, 5), wants (K, 8, R, R) with kernel 3x3",
    ),
    "weight of 7x7 in branch 3": (
        lambda: inception(X, _params(w4=torch.zeros(16, 8, 7, 7))),
        "p3_2.weight: got shape (16, 8, 7, 7), wants (K, 8, R, R) with kernel 3x3 or 5x5",
    ),
    "weight with other channels": (
        lambda: inception(X, _params(w5=torch.zeros(8, 20, 1, 1))),
        "p4_2.weight: got shape (8, 20, 1, 1), wants (K, 24, R, R) with kernel 1x1",
    ),
    "weight does not follow its reduction": (
        lambda: inception(X, _params(w2=torch.zeros(24, 9, 3, 3))), "p2_2.weight: got shape (24, 9, 3, 3), wants (K, 8, R, R)",
    ),
    "matrix as weight": (lambda: inception(X, _params(w0=torch.zeros(16, 24))), "p1_1.weight: got shape (16, 24), wants"),
    "bias too long": (lambda: inception(X, _params(b3=torch.zeros(9))), "p3_1.bias: got shape (9,), wants (8,)"),
    "c2 is a number": (lambda: FusedInception(24, 16, 8, (8, 16), 8), "c2: got 8, wants a pair (reduction channels"),
    "c3 has three": (lambda: FusedInception(24, 16, (8, 8), (8, 8, 8), 8), "c3: got (8, 8, 8), wants a pair"),
    "c1 is 0": (lambda: FusedInception(24, 0, (8, 8), (8, 8), 8), "c1: got 0, wants a positive number of channels"),
    "in_channels is text": (lambda: Inception("24", 8, (8, 8), (8, 8), 8), "in_channels: got '24', wants a positive number"),
    "c2[1] is negative": (lambda: Inception(24, 8, (8, -8), (8, 8), 8), "c2[1]: got -8, wants a positive number"),
    "c4 is a bool": (lambda: Inception(24, 8, (8, 8), (8, 8), True), "c4: got True, wants a positive number"),
    "branch3_kernel_size": (
        lambda: FusedInception(*SMALL, branch3_kernel_size=7), "branch3_kernel_size: got 7, wants 5 or 3",
    ),
    "activation of the module": (
        lambda: FusedInception(*SMALL, activation="tanh"), "activation: got 'tanh', wants \"relu\" or None",
    ),
    "integer module": (lambda: FusedInception(*SMALL, dtype=torch.int8), "dtype: got torch.int8, wants a floating point"),
    "num_classes": (lambda: GoogLeNet(0), "num_classes: got 0, wants a positive integer"),
    "block": (lambda: GoogLeNet(block="fused"), "block: got 'fused', wants a module class"),
    "backend is a word": (lambda: backend("fast").__enter__(), "backend: got 'fast', wrong at 'fast'; wants \"auto\""),
    "backend has K9": (lambda: backend("K1=triton,K9=eager").__enter__(), "wrong at 'K9=eager'; wants \"auto\""),
    "backend twice": (lambda: backend("K1=triton,K1=eager").__enter__(), "wrong at 'K1=eager'"),
    "backend is None": (lambda: backend(None).__enter__(), "backend: got None, wants \"auto\""),
    "tolerance of an integer": (lambda: testing.tolerance(torch.int8, 4), "dtype: got torch.int8, wants one of torch.float64"),
    "tolerance of nothing": (lambda: testing.tolerance(torch.float32, 0), "reduction_length: got 0, wants at least 1"),
    "sample of block 6a": (lambda: testing.sample_input("6a"), "block: got '6a', wants one of 3a, 3b"),
}  # fmt: skip


@pytest.mark.parametrize("wish", ["auto", "kernels"])
@pytest.mark.parametrize("name", WRONG_CALLS)
def test_wrong_call(name, wish):
    """Three times, since the third call of a kind may be one from memory."""
    call, words = WRONG_CALLS[name]
    for _ in range(3):
        with backend(wish), pytest.raises(InceptionInputError) as caught:
            call()
        assert words in str(caught.value)


@pytest.mark.parametrize("wish", ["kernels", "K3=triton", "K1=eager,K2=triton"])
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_demanded_kernels_that_cannot_run(device, wish):
    block = FusedInception(*SMALL, device=device)
    x = X.to(device)
    if device == "cpu":
        block.p1_1.stride = (2, 2)
    with backend(wish), pytest.raises(KernelError, match="demands kernels that cannot run: (x is on meta|p1_1 is)"):
        block(x)


def _in_a_process(code: str, **environment: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("TRITON", "INCEPTION_FUSED"))}
    return subprocess.run(
        [sys.executable, "-c", code], env=clean | environment, capture_output=True, text=True, timeout=120, check=False
    )


CALL = "import torch, inception_fused as f; f.FusedInception(8, 8, (8, 8), (8, 8), 8)(torch.zeros(1, 8, 3, 3))"


def test_kernels_on_a_cpu_without_the_interpreter():
    done = _in_a_process(CALL, INCEPTION_FUSED_BACKEND="kernels")
    assert done.returncode != 0
    assert "KernelError" in done.stderr
    assert "x is on the CPU; kernels run on a CUDA device, or on a CPU under TRITON_INTERPRET=1" in done.stderr


def test_backend_from_the_environment():
    assert _in_a_process(CALL, INCEPTION_FUSED_BACKEND="kernels", TRITON_INTERPRET="1").returncode == 0
    done = _in_a_process(CALL, INCEPTION_FUSED_BACKEND="quick")
    assert "InceptionInputError: INCEPTION_FUSED_BACKEND: got 'quick'" in done.stderr


@pytest.mark.parametrize("handle", [None, types.SimpleNamespace(), "a future kernel"], ids=str)
def test_a_handle_of_another_triton_is_not_kept(handle):
    """Rather than failing a call that has succeeded: what raises LookupError is planned again."""
    asked = types.SimpleNamespace(args=[], grid=(1,), describe=lambda: "some kernel")
    with pytest.raises(LookupError, match="this Triton's handle cannot be kept"):
        _addressed(asked, lambda _: (0, 0), [], handle)
