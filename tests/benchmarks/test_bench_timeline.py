"""A step's launches on one time axis: by arithmetic, from a profiler's events, and on a GPU itself."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from benchmarks.cases.baselines import Point
from benchmarks.cases.timeline import KINDS, PASSES, floor_timeline, kernel_rows, kind_of, point_words, record_timeline
from benchmarks.figures import pictures
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS
from inception_fused.plan.cards import H200
from inception_fused.plan.eager_kernels import eager_backward_kernels, eager_kernels
from inception_fused.plan.floors import total
from inception_fused.plan.launches import NAMES

POINT = Point("5b", GOOGLENET_BLOCKS["5b"], 7, 2, "bf16")


def test_timeline_by_arithmetic_follows_the_floors():
    rows = floor_timeline("4d", 128, "bf16")
    by = {
        key: [row for row in rows if (row["implementation"], row["pass"]) == key]
        for key in (("eager", "forward"), ("eager", "backward"), ("ours", "forward"), ("ours", "backward"))
    }
    assert [len(some) for some in by.values()] == [20, 29, 4, 11]
    assert tuple(row["name"] for row in by["ours", "backward"]) == NAMES["backward"]
    shape = Point("4d", GOOGLENET_BLOCKS["4d"], 14, 128, "bf16").shape
    for direction, works in (("forward", eager_kernels(shape)), ("backward", eager_backward_kernels(shape))):
        last = by["eager", direction][-1]
        assert last["start_us"] + last["us"] == pytest.approx(total(works, H200, "bf16") * 1e6)
    assert all(kind_of(row) != "other" for row in rows)
    assert {row["weights"] for row in rows} == {"channels_last"}, "in KCRS ours had a fifth launch, pack"
    assert point_words(rows).endswith("block 4d, batch 128, bf16, channels_last weights")


def event(name, start, end, *, gpu=True, **more):
    device = torch.autograd.DeviceType.CUDA if gpu else torch.autograd.DeviceType.CPU
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, device_type=device, time_range=span, **more)


SPIN = event("at::cuda::(anonymous namespace)::spin_kernel(long)", 10, 50)


def test_kernels_behind_the_lead_become_rows():
    """Out of order as the profiler may give them; the flush, copies, annotations and what the host did are none."""
    events = [
        event("second", 70, 75), event("at::native::reduce_kernel", 0, 9), SPIN, event("first", 60, 64.5),
        event("Memcpy DtoD", 65, 66), event("aten::conv2d", 61, 62, gpu=False),
        event("mine", 60, 90, is_user_annotation=True),
    ]  # fmt: skip
    assert kernel_rows(events, "eager", "forward") == [
        {"implementation": "eager", "pass": "forward", "name": "first", "start_us": 0, "us": 4.5},
        {"implementation": "eager", "pass": "forward", "name": "second", "start_us": 10, "us": 5},
    ]


@pytest.mark.parametrize("events", [[], [SPIN], [event("kernel", 1, 2)], [event("kernel", 1, 2), SPIN]])
def test_a_profiler_that_sees_nothing_is_an_error(events):
    with pytest.raises(RuntimeError, match=r"saw no kernel of ours's backward .* \(CUPTI\)"):
        kernel_rows(events, "ours", "backward")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the answer without a GPU")
def test_recording_needs_a_gpu():
    with pytest.raises(RuntimeError, match="needs a CUDA device"):
        record_timeline(POINT)


@pytest.mark.gpu
def test_recorded_launches():
    """Ours are four and eleven and nothing else; eager's are more."""
    # The tests' own filling of fresh memory launches kernels.
    torch.utils.deterministic.fill_uninitialized_memory = False
    torch.use_deterministic_algorithms(False)
    rows = record_timeline(POINT)
    counts = {}
    for implementation in ("eager", "ours"):
        for direction in PASSES:
            some = [row for row in rows if (row["implementation"], row["pass"]) == (implementation, direction)]
            assert some[0]["start_us"] == 0
            starts = [row["start_us"] for row in some]
            assert starts == sorted(starts)
            assert all(row["us"] > 0 and row["block"] == "5b" for row in some)
            assert implementation == "eager" or all(kind_of(row) != "other" for row in some)
            counts[implementation, direction] = len(some)
    assert (counts["ours", "forward"], counts["ours", "backward"]) == (4, len(NAMES["backward"]))
    assert counts["eager", "forward"] > 4
    assert counts["eager", "backward"] > 11


@pytest.mark.parametrize(
    ("kind", "direction", "name"),
    [
        ("convolution", "forward", "sm90_xmma_fprop_implicit_gemm_bf16bf16_bf16f32_f32_nhwckrsc_nhwc_tilesize128x128"),
        ("convolution", "backward", "void cutlass__5x_cudnn::Kernel<cutlass_tensorop_bf16_s16816dgrad_optimized>"),
        ("convolution", "backward", "conv_wgrad_kernel"),
        ("convolution", "forward", "void inception::grouped_gemm_kernel<Config>(GroupedGemm)"),
        ("bias, ReLU", "forward", "void at::native::elementwise_kernel<4, CUDAFunctor_add<float>>"),
        ("copy, sum", "backward", "void at::native::elementwise_kernel<4, CUDAFunctor_add<float>>"),
        ("bias, ReLU", "backward", "void at::native::vectorized_elementwise_kernel<4, at::native::threshold_kernel>"),
        ("bias, ReLU", "backward", "void at::native::reduce_kernel<128, 4, at::native::ReduceOp<float>>"),
        ("copy, sum", "backward", "reduce_kernel"),
        ("pool", "forward", "void at::native::max_pool_forward_nhwc<c10::BFloat16>"),
        ("copy, sum", "forward", "void at::native::CatArrayBatchedCopy_aligned16_contig<>"),
        ("bias, ReLU", "backward", "mask_grad_kernel"),
        ("other", "forward", "something else"),
    ],
)  # fmt: skip
def test_kinds_of_kernels(kind, direction, name):
    assert kind_of({"name": name, "pass": direction}) == kind
    assert set(KINDS) | {"other"} == set(pictures.KIND_COLOURS) == set(pictures.INK)
