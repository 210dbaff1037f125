"""The compiled B3 beyond its problems: refusals, rows and sizes, and its place in a block's backward."""

import numpy as np
import pytest
import torch

from checks.block_cases import DTYPES, ODD_SHAPES, SMALL, make_block
from inception_fused import KernelError
from inception_fused.plan.kernel_table import KERNELS
from inception_fused.plan.rules import MIN_SHARED_BYTES
from inception_fused.runtime import native
from inception_fused.runtime.submit import record
from inception_fused.testing import Error, tolerance
from native_dgrad_problems import Case, Problem
from simulator import ELEMENTS

LIMIT = 2**31 - 1024


@pytest.mark.parametrize("element", ELEMENTS)
def test_a_row_does_not_depend_on_batch_or_tile(simulator, element):
    """Bit for bit: the order of a sum is that of the channels, then of the taps, whatever the tile."""
    seen = []
    for n, tile in ((1, (64, 64)), (5, (64, 64)), (3, (128, 128)), (11, (128, 128))):
        case = Case(Problem(n, 5, 6, 72, 136, element, tile))
        case.run(simulator.module)
        seen.append(case.dx.matrix[:30].copy())
    for other in seen[1:]:
        assert np.array_equal(seen[0], other)


def test_rows_beyond_32_bit_offsets(simulator):
    """A column of three pixels, whose rows begin 2**30 elements one after the other: the third at element 2**31."""
    case, stride = Case(Problem(1, 3, 1, 40, 24)), 2**30
    expected = Case(case.problem)
    expected.run(simulator.module)
    buffers = {"g": expected.g, "dpool": expected.dpool, "taps": expected.packed, "dx": expected.dx}
    wide = {
        name: np.memmap("/dev/zero", dtype=b.all.dtype, mode="c", shape=2 * stride + 64) for name, b in buffers.items()
    }
    for name in ("g", "dpool", "taps"):
        for row in range(3):
            wide[name][row * stride :][: buffers[name].width] = buffers[name].matrix[row]
    places = {name: (memory.ctypes.data, stride) for name, memory in wide.items()}
    simulator.module.grouped_dgrad(**case.arguments() | places)
    for row in range(3):
        assert np.array_equal(wide["dx"][row * stride :][:24], expected.dx.matrix[row]), row


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ('element: got "int8"', {"element": "int8"}),
        ("tile: got 128x96", {"tile": (128, 96)}),
        ("tile: got 128x128 unaligned", {"tile": (128, 128), "aligned": False}),
        ("sizes", {"m": -6}),
        ("sizes", {"k": 0}),
        ("sizes", {"c": 0}),
        ("image: got 2 x 4, wants height and width of whole images in m = 12 rows", {"image": (2, 4)}),
        ("image", {"image": (0, 3)}),
        ("image", {"image": (2, -3)}),
        ("image", {"image": (2**16, 2**16)}),
        ("under 2", {"m": LIMIT + 1, "image": (1, 1)}),
        ("under 2", {"k": LIMIT + 8, "g": (0, 2**31)}),
        ("under 2", {"c": LIMIT + 8, "dpool": (0, 2**31), "dx": (0, 2**31), "taps": (0, 2**30)}),
        ("g_stride: got 8, wants at least k = 16", {"g": (0, 8)}),
        ("dpool_stride: got 16, wants at least c = 24", {"dpool": (0, 16)}),
        ("taps_stride: got 8, wants at least ceil(c / 2) = 12", {"taps": (0, 8)}),
        ("taps_stride: got 12, wants at least ceil(c / 2) = 13", {"c": 25, "dpool": (0, 32), "dx": (0, 32)}),
        ("dx_stride: got 16, wants at least c = 24", {"dx": (0, 16)}),
        *(("multiples of 8", change) for change in (
            {"k": 12}, {"c": 20}, {"g": (0, 20)}, {"dpool": (0, 28)}, {"dx": (0, 28)},
        )),
        *(("no multiple of 16, wants g, w, dpool and dx on 16 bytes", change) for change in (
            {"g": (8, 16)}, {"w": 8}, {"dpool": (8, 24)}, {"dx": (8, 24)},
        )),
        ("multiples of 4", {"taps": (0, 14)}),
        ("no multiple of 4, wants taps on 4 bytes", {"taps": (2, 12)}),
        ("no multiple of 2, wants taps on 2 bytes", {"element": "tf32", "taps": (1, 12)}),
    ],
)  # fmt: skip
def test_a_problem_that_contradicts_itself_is_refused(simulator, words, change):
    """Each of these would read or write outside a tensor, or off a boundary."""
    with pytest.raises(ValueError, match="grouped_dgrad: ") as raised:
        simulator.module.grouped_dgrad(**Case(Problem(2, 2, 3, 16, 24)).arguments() | change)
    assert words in str(raised.value)
    assert simulator.calls() == []


def test_what_the_unaligned_kernel_takes(simulator):
    """Anything that the aligned ones refuse, but strides that are too small."""
    case = Case(Problem(2, 2, 3, 12, 20, aligned=False, pad=1, offset=1))
    case.run(simulator.module)
    assert case.check() is None
    with pytest.raises(ValueError, match="dx_stride: got 19"):
        simulator.module.grouped_dgrad(**case.arguments() | {"dx": (0, 19)})


def test_no_rows_is_no_launch(simulator):
    simulator.module.grouped_dgrad(**Case(Problem(1, 2, 3, 16, 24)).arguments() | {"m": 0})
    assert simulator.calls() == []


def test_device_and_stream_arrive(simulator):
    simulator.configure(devices=3)
    simulator.device = 1
    case = Case(Problem(2, 9, 8, 16, 136, tile=(128, 128)))
    simulator.module.grouped_dgrad(**case.arguments() | {"device": 2, "stream": 0xABC0})
    assert case.check() is None
    arrived = dict(simulator.calls())["launch"]
    assert (arrived["device"], arrived["stream"]) == (2, 0xABC0)
    assert (arrived["blocks"], arrived["threads"]) == (4, 128)
    assert simulator.device == 1
    with pytest.raises(RuntimeError, match=r"grouped_dgrad \(B3, GEMM_M 144, GEMM_K 16, GEMM_N 136, .* device 5\)"):
        simulator.module.grouped_dgrad(**case.arguments() | {"device": 5})
    assert (simulator.device, simulator.last_error()) == (1, 0)


@pytest.mark.parametrize("element", ELEMENTS)
def test_the_plan_knows_the_tiles_that_are_compiled(simulator, element):
    for kernel in (kernel for kernel in KERNELS if kernel.native is not None):
        found, known = getattr(simulator.module, f"{kernel.file}_tiles")(element), kernel.native
        planned = [(*block, 1) for block in (*known.large, known.small)] + [(*known.unaligned, 0)]
        assert [tuple(facts[:3]) for facts in found] == planned
        assert all(shared <= MIN_SHARED_BYTES for *_, shared in found)


def backward(block, dy, out, wish="B3=native", needs=(True,) * 13):
    """The operator's gradients from what a forward saved."""
    return torch.ops.inception_fused._backward(
        dy, block.x, *out[1:], block.weights, block.bias_dtypes, block.relu, list(needs), wish
    )


def check(block, dy, out):
    """B3=native launches B3 once and gives eager's gradients: dx within rounding, all others bit for bit."""
    expected = backward(block, dy, out, "eager")
    with record() as launches:
        backward(block, dy, out)
    native_launches = [item for item in launches if isinstance(item, native.NativeLaunch)]
    assert [item.function for item in native_launches] == ["grouped_dgrad"]
    assert f"grouped_dgrad of the compiled extension, {native.ELEMENTS[dy.dtype]}" in native_launches[0].describe()
    dx, *others = backward(block, dy, out)
    bound = tolerance(dy.dtype, block.shape.reductions_width + 9, tf32=dy.dtype == torch.float32)
    assert Error.of(dx, expected[0]).within(2 * bound), Error.of(dx, expected[0])
    assert dx.is_contiguous(memory_format=torch.channels_last)
    assert all(torch.equal(a, b) for a, b in zip(others, expected[1:], strict=True) if b is not None)


@pytest.mark.parametrize("shape", ODD_SHAPES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_backward_of_a_block(installed, dtype, shape):
    block = make_block(*ODD_SHAPES[shape], dtype)
    out = block.forward("eager")
    check(block, torch.randn_like(out[0]), out)


@pytest.mark.parametrize(("bias", "activation"), [(False, "relu"), (True, None), (False, None)])
def test_backward_without_bias_or_activation(installed, bias, activation):
    for config, shape in (ODD_SHAPES["7x5"], ODD_SHAPES["17 channels"]):
        block = make_block(config, shape, torch.bfloat16, bias=bias, activation=activation)
        out = block.forward("eager")
        dy = torch.randn_like(out[0])
        if bias:
            check(block, dy, out)
            continue
        needs = (*(True,) * 7, *(False,) * 6)
        dx, expected = (backward(block, dy, out, wish, needs)[0] for wish in ("B3=native", "eager"))
        assert Error.of(dx, expected).within(2 * tolerance(torch.bfloat16, 100))


def test_backward_of_dy_of_any_strides(installed):
    block = make_block(*ODD_SHAPES["7x5"], torch.float16)
    out = block.forward("eager")
    n, k, h, w = out[0].shape
    for dy in (torch.ones((), dtype=torch.float16).expand(n, k, h, w), torch.randn(n, k, h, w).half().contiguous(),
               torch.randn(n, 2 * k, h, w).half()[:, ::2]):  # fmt: skip
        check(block, dy, out)


def test_backward_of_an_empty_batch(installed):
    block = make_block(SMALL, (0, 4, 3), torch.bfloat16)
    out = block.forward("eager")
    grads = backward(block, torch.empty_like(out[0]), out)
    assert installed.calls() == []
    assert grads[0].shape == block.x.shape
    assert all(not grad.any() for grad in grads[1:])


def test_only_dx_wants_the_kernel(installed):
    block = make_block(SMALL, (1, 4, 3), torch.bfloat16)
    out = block.forward("eager")
    backward(block, torch.randn_like(out[0]), out, needs=(False, *(True,) * 12))
    assert installed.calls() == []


def test_a_refusal_is_a_kernel_error(installed):
    block = make_block(SMALL, (1, 4, 3), torch.bfloat16)
    out = block.forward("eager")
    installed.configure(refusal=209)
    with pytest.raises(KernelError, match="grouped_dgrad .*no code for the device"):
        backward(block, torch.randn_like(out[0]), out)
