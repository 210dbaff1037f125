"""The floors' FLOP and bytes, against a count of what PyTorch itself does and against hand arithmetic."""

from __future__ import annotations

import re

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases.baselines import Point
from benchmarks.cases.roofline import valid_tap_fraction
from benchmarks.roofline import main
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, branch3_options, spatial_size
from inception_fused.block.reference import Inception
from inception_fused.plan.cards import H200
from inception_fused.plan.eager_kernels import eager_backward_kernels, eager_kernels
from inception_fused.plan.floors import block_work, total, works

BLOCKS = list(GOOGLENET_BLOCKS)
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32}


WINDOWS = [(5,), (3, 3)]


def meta_block(
    block: str, batch: int, dtype: str, *, bias: bool = True, branch3: tuple[int, ...] = (5,)
) -> tuple[Inception, torch.Tensor]:
    config, size = GOOGLENET_BLOCKS[block], spatial_size(block)
    module = Inception(*config, bias=bias, device="meta", dtype=DTYPES[dtype], **branch3_options(branch3))
    return module, torch.empty(batch, config.in_channels, size, size, device="meta", dtype=DTYPES[dtype])


def point_shape(block: str, batch: int, dtype: str, image_size: int = 224, branch3: tuple[int, ...] = (5,)):
    size = spatial_size(block, image_size)
    return Point(block, GOOGLENET_BLOCKS[block], size, batch, dtype, branch3=branch3).shape


def nine(counted, batch=128, dtype="bf16", image_size=224):
    """Microseconds of a function of the block, summed over the nine."""
    return 1e6 * sum(counted(point_shape(name, batch, dtype, image_size)) for name in BLOCKS)


@pytest.mark.parametrize("branch3", WINDOWS, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_flop_are_those_that_pytorch_counts(block, branch3):
    module, x = meta_block(block, 3, "bf16", branch3=branch3)
    x.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        y = module(x)
    with FlopCounterMode(display=False) as backward:
        y.sum().backward()
    shape = point_shape(block, 3, "bf16", branch3=branch3)
    assert sum(work.flop for work in works(shape, "forward")) == forward.get_total_flops()
    assert block_work(shape).flop == forward.get_total_flops()
    assert block_work(shape, training=True).flop == forward.get_total_flops() + backward.get_total_flops()


@pytest.mark.parametrize("branch3", WINDOWS, ids=str)
@pytest.mark.parametrize("block", BLOCKS)
def test_backward_flop_are_those_that_pytorch_counts(block, branch3):
    module, x = meta_block(block, 3, "bf16", branch3=branch3)
    y = module(x.requires_grad_())
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    found = works(point_shape(block, 3, "bf16", branch3=branch3), "backward")
    assert sum(work.flop for work in found) == counter.get_total_flops()


def test_backward_of_3a_at_batch_128_by_hand():
    """192 channels to 64, 96 -> 128, 16 -> 32, 32 on 28x28: M = 100352 rows of bf16."""
    found = {work.name: work for work in works(point_shape("3a", 128, "bf16"), "backward")}
    assert found["B1"].bytes == 100352 * (2 * 256 * 2 + 32)
    assert found["B2 3x3"].bytes == 2 * (100352 * (128 + 96 + 96) + 9 * 96 * 128)
    assert found["B3"].bytes == 2 * (100352 * (176 + 192 + 192) + 176 * 192) + 100352 * 96
    assert found["B4 5x5"].bytes == 2 * 100352 * (32 + 16) + 4 * 25 * 16 * 32
    assert found["B4 5x5"].flop == 2 * 100352 * 25 * 16 * 32
    assert found["B5"].bytes == 6 * 163328
    assert found["pack"].bytes == 4 * 163328


@pytest.mark.parametrize("branch3", WINDOWS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", BLOCKS)
def test_bytes_are_those_of_the_tensors(block, dtype, branch3):
    module, x = meta_block(block, 2, dtype, bias=False, branch3=branch3)
    outputs = {}
    for name, child in module.named_children():
        child.register_forward_hook(lambda _, __, output, name=name: outputs.update({name: output}))
    y = module(x)
    weight = {name: child.weight for name, child in module.named_children() if name != "p4_1"}

    def size(*tensors: torch.Tensor) -> int:
        return sum(tensor.nbytes for tensor in tensors)

    first = ("p1_1", "p2_1", "p3_1")
    expected = {
        "K1": size(x, *(weight[n] for n in first), *(outputs[n] for n in first)),
        "K2": size(x, weight["p4_2"], outputs["p4_2"]),
        "K3": size(outputs["p2_1"], weight["p2_2"], outputs["p2_2"]),
    }
    names = ("K4",) if len(branch3) == 1 else ("K4 first", "K4 second")
    for name, before, conv in zip(names, ("p3_1", "p3_2"), ("p3_2", "p3_3"), strict=False):
        expected[name] = size(outputs[before], weight[conv], outputs[conv])
    shape = point_shape(block, 2, dtype, branch3=branch3)
    assert {work.name: work.bytes for work in works(shape, "forward")} == expected
    assert block_work(shape).bytes == size(x, y, *weight.values())
    training = size(x, y, *weight.values()) + size(x, x, y, *weight.values(), *weight.values())
    assert block_work(shape, training=True).bytes == training
    assert sum(shape.weight_sizes) == sum(w.numel() for w in weight.values())


@pytest.mark.parametrize(("dtype", "eager", "share"), [("bf16", 4181, 0.28), ("tf32", 7919, 0.35)])
def test_a_training_step_with_batch_norm(dtype, eager, share, capsys):
    """Ours by bytes, L2, matrix units and instructions is at most 0.85 of eager's floor, and half is kept."""
    main(["--batch-norm", "--dtype", dtype])
    *_, said = lines = capsys.readouterr().out.splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("| ours")]
    names = {name: float(size) for _, name, _, size, *_ in rows}
    assert {"N1 r", "N2 y", "N3 y", "N4 y", "N5 r", "N6 y", "B2 3x3", "all"} <= set(names)
    # Of y, one pass for the statistics, two to normalise, two for the gradient's sums, three for the gradient.
    assert [names[f"{name} y"] / names["N1 y"] for name in ("N3", "N4", "N6")] == pytest.approx([2, 2, 3], rel=0.01)
    found = re.search(r"eager's floor: (\d+) / (\d+) = ([\d.]+); floor over floor ([\d.]+)\. .* = ([\d.]+)\.$", said)
    ours, theirs, ratio, _, kept = map(float, found.groups())
    assert (theirs, kept) == (eager, share)
    assert ratio == pytest.approx(ours / theirs, abs=0.005)
    assert ratio <= 0.85


@pytest.mark.parametrize(
    ("batch", "dtype", "image_size", "backward"),
    [
        (128, "bf16", 224, 2313.1),
        (32, "bf16", 224, 579.6),
        (1, "bf16", 224, 21.5),
        (128, "tf32", 224, 4404.3),
    ],
)
def test_eager_backward_over_the_nine_blocks(batch, dtype, image_size, backward):
    floor = nine(lambda shape: total(eager_backward_kernels(shape), H200, dtype), batch, dtype, image_size)
    assert floor == pytest.approx(backward, abs=0.05)


def test_3a_at_batch_128_by_hand():
    """M = 128 * 28 * 28 = 100,352 rows."""
    k1, k2, k3, k4 = works(point_shape("3a", 128, "bf16"), "forward")
    assert (k1.flop, k1.bytes) == (2 * 100_352 * 176 * 192, 2 * (100_352 * (192 + 176) + 176 * 192))
    assert (k2.flop, k2.bytes) == (2 * 100_352 * 32 * 192, 2 * (100_352 * (192 + 32) + 32 * 192))
    assert (k3.flop, k3.bytes) == (2 * 100_352 * 128 * 864, 2 * (100_352 * (96 + 128) + 128 * 864))
    assert (k4.flop, k4.bytes) == (2 * 100_352 * 32 * 400, 2 * (100_352 * (16 + 32) + 32 * 400))
    # 73.93 MB at 4.3 TB/s against 6.78 GFLOP at 790 TFLOP/s; 22.2 GFLOP at 790 TFLOP/s against 45.2 MB.
    assert k1.floor(H200, "bf16") == pytest.approx(17.19e-6, rel=1e-3)
    assert k3.floor(H200, "bf16") == pytest.approx(28.10e-6, rel=1e-3)
    assert [work.bound(H200, "bf16") for work in (k1, k2, k3, k4)] == ["M", "M", "C", "C"]


@pytest.mark.parametrize(
    ("batch", "dtype", "image_size", "one", "four", "eager"),
    [
        (128, "bf16", 224, 357.7, 417.1, 1385.7),
        (32, "bf16", 224, 89.4, 104.6, 347.1),
        (1, "bf16", 224, 4.1, 4.9, 12.5),
        (128, "tf32", 224, 715.5, 834.1, 2549.6),
        (128, "fp32", 224, 4218.2, 4220.7, 5756.3),
        (128, "bf16", 96, 65.7, 77.0, 255.2),
    ],
)
def test_sums_over_the_nine_blocks(batch, dtype, image_size, one, four, eager):
    point = (batch, dtype, image_size)
    assert nine(lambda shape: block_work(shape).floor(H200, dtype), *point) == pytest.approx(one, abs=0.05)
    assert nine(lambda shape: total(works(shape, "forward"), H200, dtype), *point) == pytest.approx(four, abs=0.05)
    assert nine(lambda shape: total(eager_kernels(shape), H200, dtype), *point) == pytest.approx(eager, abs=0.05)


def test_training_is_three_times_the_forward_where_compute_bounds_it():
    floor = nine(lambda shape: block_work(shape, training=True).floor(H200, "bf16"))
    assert floor == pytest.approx(1073.2, abs=0.05)


@pytest.mark.parametrize("block", ["3a", "4e", "5b"])
def test_valid_taps_are_those_inside_the_image(block):
    """Convolving ones with ones counts, at each pixel, the taps that fall inside."""
    config, size = GOOGLENET_BLOCKS[block], spatial_size(block)
    ones = torch.ones(1, 1, size, size, dtype=torch.float64)
    module = Inception(*config, device="meta")
    valid = everything = 0.0
    for conv in (module.p1_1, module.p2_1, module.p2_2, module.p3_1, module.p3_2, module.p4_2):
        side, macs = conv.kernel_size[0], conv.weight.numel()
        inside = torch.nn.functional.conv2d(ones, torch.ones(1, 1, side, side).double(), padding=side // 2)
        valid += macs / side**2 * inside.sum().item()
        everything += macs * size**2
    assert valid_tap_fraction(point_shape(block, 1, "bf16")) == pytest.approx(valid / everything)


def test_the_script_prints_the_table(capsys):
    main(["--batch", "128"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("NVIDIA H200: 4.30 TB/s, 790 TFLOP/s bf16")
    assert lines[-1] == "| sum | | 282.62 | | | | | 417.1 | 357.7 | 1385.7 | 1073.2 |"
    assert [line.split(" | ")[0] for line in lines[4:-1]] == [f"| {block}" for block in BLOCKS]


def test_the_script_prints_the_table_of_two_windows(capsys):
    main(["--batch", "128", "--branch3", "two-3x3"])
    lines = capsys.readouterr().out.splitlines()
    assert "bf16; branch 3 two-3x3, batch 128" in lines[0]
    assert "| K1 | K2 | K3 | K4 first | K4 second | five | one | eager | fwd+bwd |" in lines[2]
    shapes = [point_shape(block, 128, "bf16", branch3=(3, 3)) for block in BLOCKS]
    sums = [
        sum(total(works(shape, "forward"), H200, "bf16") for shape in shapes),
        sum(block_work(shape).floor(H200, "bf16") for shape in shapes),
        sum(total(eager_kernels(shape), H200, "bf16") for shape in shapes),
    ]
    assert [cell.strip(" |") for cell in lines[-1].split(" | ")[-4:-1]] == [f"{1e6 * value:.1f}" for value in sums]
