"""Floors on a machine's ceilings of the nine blocks, beside those of eager PyTorch's launches, and of whole networks.

What a block's own kernels must do stands in inception_fused/plan/floors.py, what eager's must in eager_kernels.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.cases.baselines import DTYPES, Point
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, branch3_name, spatial_size
from inception_fused.block.shapes import BlockShape
from inception_fused.plan.cards import H200, Ceilings
from inception_fused.plan.eager_kernels import INDEX_BYTES, eager_backward_kernels, eager_kernels, products
from inception_fused.plan.floors import Work, block_work, total, works
from inception_fused.plan.forecast import forecast

FOUR = ("DRAM", "L2", "tensor cores", "instructions")
"""Units whose figures are not assumed, as latency and a bank's conflicts are."""


def kept_bytes(shape: BlockShape) -> tuple[int, int]:
    """Bytes that (ours, eager) keep for the backward of a block with BatchNorm in training, beyond x and parameters.

    Ours: what the convolutions gave, r behind ReLU, four bits an element of x. Eager: of each convolution its output
    for BatchNorm and what ReLU made of that, the pool's output and its indices. Statistics are left out on both sides.
    """
    rows, e, c, k, r = shape.gemm_m, shape.itemsize, shape.c, shape.k, shape.r_width
    ours = rows * (e * (k + 2 * r) + shape.taps_width)
    return ours, rows * (2 * e * sum(shape.filters) + c * (e + INDEX_BYTES))


def network_works(
    module: nn.Module, x: Tensor, dtype: str, *, blocks: tuple[type[nn.Module], ...], training: bool = False
) -> tuple[Work, ...]:
    """A whole network as a series of ideal kernels: one for each of ``blocks``, one for every other convolution or
    linear layer, each with the ReLU, BatchNorm and pool that follow it.

    module, x: the network and its input, on any device; "meta" computes nothing. Each kernel reads its input and
    weights and writes what is left after the pool. With ``training`` it is charged as :func:`block_work` does, but the
    first one has no gradient to its input. FLOP are those of the convolutions and linear layers, biases left out.
    """
    inside = {inner for block in module.modules() if isinstance(block, blocks) for inner in block.modules()}
    units = [m for m in module.modules() if isinstance(m, blocks)]
    units += [m for m in module.modules() if isinstance(m, (nn.Conv2d, nn.Linear)) and m not in inside]
    pools = [m for m in module.modules() if isinstance(m, (nn.MaxPool2d, nn.AdaptiveAvgPool2d)) and m not in inside]
    sizes: list[dict[str, int]] = []

    def product(layer: nn.Module, _: object, y: Tensor) -> None:
        sizes[-1]["flop"] += 2 * y.numel() * layer.weight[0].numel()
        sizes[-1]["w"] += layer.weight.numel()

    def begin(unit: nn.Module, args: tuple[Tensor, ...]) -> None:
        sizes.append({"x": args[0].numel(), "y": 0, "w": 0, "flop": 0})

    def end(_: nn.Module, __: object, y: Tensor) -> None:
        sizes[-1]["y"] = y.numel()

    handles = [unit.register_forward_pre_hook(begin) for unit in units]
    handles += [unit.register_forward_hook(end) for unit in (*units, *pools)]
    layers = [layer for unit in units for layer in unit.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    handles += [layer.register_forward_hook(product) for layer in layers]
    try:
        with torch.no_grad():
            module(x)
    finally:
        for handle in handles:
            handle.remove()
    found, e = [], DTYPES[dtype].itemsize
    for index, n in enumerate(sizes):
        times = (3 if index else 2) if training else 1
        found.append(
            Work(f"layer {index + 1}", times * n["flop"], e * (times * (n["x"] + n["w"]) + (1 + training) * n["y"]))
        )
    return tuple(found)


def valid_tap_fraction(shape: BlockShape) -> float:
    """Share of a block's multiply-adds whose input pixel lies inside the image, which is square, not in the padding."""

    def valid(kernel: int) -> float:
        pairs = sum(max(0, shape.h - abs(shift)) for shift in range(-(kernel // 2), kernel // 2 + 1))
        return (pairs / (shape.h * kernel)) ** 2

    macs = [(p.channels * p.outputs * p.taps, valid(round(p.taps**0.5))) for p in products(shape)]
    return sum(n * share for n, share in macs) / sum(n for n, _ in macs)


def table(
    batch: int, dtype: str, image_size: int = 224, ceilings: Ceilings = H200, branch3: tuple[int, ...] = (5,)
) -> str:
    """Floors in microseconds of the nine blocks as a Markdown table. branch3: sides of their third branch's windows.

    Each launch carries the term that bounds them (C compute, M memory) and their FLOP/byte; "four" (of two windows
    "five") is their sum, "one" the block as one kernel, "eager" its eager launches, "fwd+bwd" a training step as one.
    """
    peak = ceilings.flops[dtype]
    shapes = {
        name: Point(name, config, spatial_size(name, image_size), batch, dtype, branch3=branch3).shape
        for name, config in GOOGLENET_BLOCKS.items()
    }
    names = [work.name for work in works(next(iter(shapes.values())), "forward")]
    form = "" if branch3 == (5,) else f"branch 3 {branch3_name(branch3)}, "
    lines = [
        f"{ceilings.name}: {ceilings.bandwidth / 1e12:.2f} TB/s, {peak / 1e12:.0f} TFLOP/s {dtype}; "
        f"{form}batch {batch}, image {image_size}x{image_size}, microseconds",
        "",
        f"| block | HxW | GFLOP | {' | '.join(names)} | {('four', 'five')[len(names) - 4]} | one | eager | fwd+bwd |",
        "|---" * (7 + len(names)) + "|",
    ]
    sums = [0.0] * 5
    for name, shape in shapes.items():
        kernels = works(shape, "forward")
        forward = block_work(shape)
        row = [
            forward.flop / 1e9,
            total(kernels, ceilings, dtype) * 1e6,
            forward.floor(ceilings, dtype) * 1e6,
            total(eager_kernels(shape), ceilings, dtype) * 1e6,
            block_work(shape, training=True).floor(ceilings, dtype) * 1e6,
        ]
        sums = [a + b for a, b in zip(sums, row, strict=True)]
        cells = [
            f"{k.floor(ceilings, dtype) * 1e6:.1f} {k.bound(ceilings, dtype)} ({k.flop / k.bytes:.0f})" for k in kernels
        ]
        figures = [f"{value:.1f}" for value in row[1:]]
        lines.append("| " + " | ".join([name, f"{shape.h}x{shape.w}", f"{row[0]:.2f}", *cells, *figures]) + " |")
    figures = " | ".join(f"{value:.1f}" for value in sums[1:])
    lines.append(f"| sum | | {sums[0]:.2f} |{' |' * len(names)} {figures} |")
    return "\n".join(lines)


def batch_norm_table(
    batch: int, dtype: str, image_size: int = 224, ceilings: Ceilings = H200, branch3: tuple[int, ...] = (5,)
) -> str:
    """A training step of the nine blocks with BatchNorm in training as Markdown: every launch, ours and eager's, summed
    over the blocks, and what is kept for the backward.

    MB: read and written. floor: by FLOP and bytes, each launch on its own. four units: the busiest of :data:`FOUR` of
    each of our launches, counted (plan/forecast.py).
    """
    shapes = [
        Point(name, config, spatial_size(name, image_size), batch, dtype, branch3=branch3).shape
        for name, config in GOOGLENET_BLOCKS.items()
    ]
    options = dict(precision=dtype, training=True, normed=True)
    sides: dict[str, dict[str, list[float]]] = {"ours": {}, "eager": {}}

    def add(side: str, work: Work, counted: float) -> None:
        into = sides[side].setdefault(work.name, [0, 0.0, 0.0, 0.0])
        figures = (1, work.bytes / 1e6, 1e6 * work.floor(ceilings, dtype), 1e6 * counted)
        sides[side][work.name] = [a + b for a, b in zip(into, figures, strict=True)]

    for shape in shapes:
        found = {item.name: item for item in forecast(shape, DTYPES[dtype], ceilings, **options, planned={})}
        for work in (*works(shape, "forward", normed=True), *works(shape, "backward", normed=True)):
            units = found[work.name].units
            add("ours", work, max(units.get(unit, 0.0) for unit in FOUR))
        for work in (*eager_kernels(shape, normed=True), *eager_backward_kernels(shape, normed=True)):
            add("eager", work, 0.0)
    form = "" if branch3 == (5,) else f"branch 3 {branch3_name(branch3)}, "
    lines = [
        f"{ceilings.name}: a training step of the nine blocks with BatchNorm in training, {form}batch {batch}, "
        f"{dtype}, image {image_size}x{image_size}, microseconds",
        "", "| | launch | launches | MB | floor | four units |", "|---" * 6 + "|",
    ]  # fmt: skip
    sums = {side: [sum(column) for column in zip(*rows.values(), strict=True)] for side, rows in sides.items()}
    for side, rows in sides.items():
        for name, (count, size, floor, counted) in [*rows.items(), ("all", sums[side])]:
            last = f"{counted:.1f}" if side == "ours" else ""
            lines.append(f"| {side} | {name} | {count:.0f} | {size:.0f} | {floor:.1f} | {last} |")
    ours, eager = (sum(sizes) for sizes in zip(*map(kept_bytes, shapes), strict=True))
    share, eagers = sums["ours"][3] / sums["eager"][2], sums["eager"][2]
    lines += [
        "",
        f"Four units over eager's floor: {sums['ours'][3]:.0f} / {eagers:.0f} = {share:.2f}; floor over floor "
        f"{sums['ours'][2] / eagers:.2f}. Kept for the backward: {ours / 1e6:.0f} MB / {eager / 1e6:.0f} = "
        f"{ours / eager:.2f}.",
    ]
    return "\n".join(lines)
