"""GoogLeNet as parts in a row: what eager's kernels of each must do, and what ours are predicted to take.

    part                                          eager        ours
    a block                                       its kernels  its launches
    the stem's 1x1 and 3x3 with their ReLUs       its kernels  its launches
    other convolutions with their ReLUs           its kernels  none
    a max-pool between, the average pool, Linear  its kernels  none

Sizes are the modules' own: nothing of the network is written down here. What PyTorch computes is taken at its floor, a
bound that nothing beats (eager_kernels.py), and what ours compute at its forecast, which tiles and instructions are in
(forecast.py). A sum of both is therefore lower than the truth, by what PyTorch's kernels need beyond their floors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.block import chains
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS
from inception_fused.block.reference import Inception
from inception_fused.block.shapes import BlockShape
from inception_fused.errors import InceptionInputError
from inception_fused.plan import eager_kernels, tuned
from inception_fused.plan.cards import Ceilings
from inception_fused.plan.counts import Counts
from inception_fused.plan.eager_kernels import Pool, Product
from inception_fused.plan.floors import Work, total
from inception_fused.plan.forecast import Forecast, forecast

BLOCK, STEM, CONVOLUTION, POOL, HEAD = "block", "stem convolutions", "convolution", "max-pool", "head"
"""Kinds of parts."""

FORMS = {"blocks fused": (BLOCK,), "stem too": (BLOCK, STEM)}
"""Kinds that run our launches, by what a table calls the network then. Each holds those before it."""

STEM_STAGES = ("b1", "b2")
"""Everything before the first block."""

STEM_SIDES = tuple(side for conv in chains.STEM.convs for side in conv.sides)
"""Of the convolutions that have launches of ours outside the blocks."""

PREDICTED: Callable[[Forecast], float] = attrgetter("predicted")


class Part(NamedTuple):
    """name: of a block as in GOOGLENET_BLOCKS, else its stage and what it is. stage: the network's child that has it.
    kind: of the kinds above. output: shape of what it returns. forward, backward: eager's kernels, in order, for all
    gradients but the image's. shape: of a block or of the stem's convolutions, for their launches."""

    name: str
    stage: str
    kind: str
    output: tuple[int, ...]
    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    shape: BlockShape | None = None

    def kernels(self, *, training: bool) -> tuple[Work, ...]:
        return (*self.forward, *self.backward) if training else self.forward


class Estimate(NamedTuple):
    """One part. floor: seconds of eager's kernels, so many. launches: of ours; none where PyTorch computes it."""

    part: Part
    floor: float
    kernels: int
    launches: tuple[Forecast, ...]

    def seconds(self, of: Callable[[Forecast], float] = PREDICTED) -> float:
        """A figure of our launches, summed; where there are none, eager's floor."""
        return sum(map(of, self.launches)) if self.launches else self.floor


def busiest(launch: Forecast) -> float:
    """Seconds of a launch's busiest unit, without the launch itself."""
    return max(launch.units.values())


def summed(some: Iterable[Estimate], of: Callable[[Forecast], float] = PREDICTED) -> float:
    """Seconds of several parts."""
    return sum(estimate.seconds(of) for estimate in some)


def stem_share(some: Sequence[Estimate], of: Callable[[Forecast], float] = PREDICTED) -> tuple[float, float]:
    """Of the whole network's time: what the stem takes, and of that what PyTorch computes."""
    stem = [estimate for estimate in some if estimate.part.stage in STEM_STAGES]
    whole = summed(some, of)
    return summed(stem, of) / whole, summed([estimate for estimate in stem if not estimate.launches], of) / whole


def parts_of(network: nn.Module, images: Tensor) -> list[Part]:
    """The parts of GoogLeNet, in order.

    network: children in a row, each a layer, a block or an nn.Sequential of them. images: [N, C, H, W] of the
    network's dtype; on the meta device nothing is computed.

    Raises:
        InceptionInputError: a layer of another kind than GoogLeNet's, or a block too many.
    """
    found: list[Part] = []
    names, x = iter(GOOGLENET_BLOCKS), images
    with torch.no_grad():
        for stage, module in network.named_children():
            for layers in _runs(_leaves(module)):
                part, x = _part(stage, layers, x, names, first=not found)
                found.append(part)
    return found


def estimates(
    parts: Sequence[Part],
    dtype: torch.dtype,
    ceilings: Ceilings,
    *,
    precision: str,
    training: bool,
    fused: Collection[str] = (BLOCK,),
    gpu: tuned.Gpu | None = None,
    known: Counts | None = None,
) -> list[Estimate]:
    """Every part on a card. fused: kinds that run our launches; the others are PyTorch's. precision, training, gpu,
    known: as forecast() takes them; weights are channels_last."""
    found = []
    for part in parts:
        works, launches = part.kernels(training=training), []
        if part.kind in fused:
            options = dict(precision=precision, training=training, gpu=gpu, known=known)
            launches = forecast(part.shape, dtype, ceilings, **options)
        found.append(Estimate(part, total(works, ceilings, precision), len(works), tuple(launches)))
    return found


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Layers and blocks in order. A subclass of Sequential is its children, whatever its forward does with them."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def _runs(layers: Iterator[nn.Module]) -> Iterator[list[nn.Module]]:
    """Layers that are one part: convolutions behind each other, and ReLU and Flatten behind what they follow."""
    run: list[nn.Module] = []
    for layer in layers:
        joins = isinstance(layer, (nn.ReLU, nn.Flatten)) or all(isinstance(m, nn.Conv2d) for m in (layer, *run[:1]))
        if run and not joins:
            yield run
            run = []
        run.append(layer)
    if run:
        yield run


def _part(
    stage: str, layers: Sequence[nn.Module], x: Tensor, names: Iterator[str], *, first: bool
) -> tuple[Part, Tensor]:
    """A part and its output. first: whether its input is the image, whose gradient nobody wants."""
    head = layers[0]
    if isinstance(head, Inception):
        return _block(stage, head, x, names)
    shape = _stem_shape(layers, x)
    forward: list[Work] = []
    backward: list[list[Work]] = []
    for place, layer in enumerate(layers):
        y = layer(x)
        there, back = _kernels(stage, layer, x, y, dx=not (first and place == 0))
        forward += there
        backward.insert(0, back)
        x = y
    kind = STEM if shape else {nn.Conv2d: CONVOLUTION, nn.MaxPool2d: POOL}.get(type(head), HEAD)
    sides = [f"{layer.kernel_size[0]}x{layer.kernel_size[1]}" for layer in layers if isinstance(layer, nn.Conv2d)]
    what = {POOL: "pool", HEAD: "" if isinstance(head, nn.Linear) else "average pool"}.get(kind, ", ".join(sides))
    works = tuple(forward), tuple(work for some in backward for work in some)
    return Part(f"{stage} {what}".strip(), stage, kind, tuple(x.shape), *works, shape), x


def _block(stage: str, block: Inception, x: Tensor, names: Iterator[str]) -> tuple[Part, Tensor]:
    name = next(names, None)
    if name is None:
        raise InceptionInputError(f"network: got more than {len(GOOGLENET_BLOCKS)} blocks, wants GoogLeNet's")
    shape = BlockShape.of(x, [layer.weight for layer in block.children() if isinstance(layer, nn.Conv2d)])
    y = x.new_empty(x.shape[0], shape.k, *x.shape[2:])
    works = eager_kernels.eager_kernels(shape), eager_kernels.eager_backward_kernels(shape)
    return Part(name, stage, BLOCK, tuple(y.shape), *works, shape), y


def _kernels(stage: str, layer: nn.Module, x: Tensor, y: Tensor, *, dx: bool) -> tuple[list[Work], list[Work]]:
    """Eager's kernels of one layer, forward and backward. dx: whether its input has a gradient."""
    e = y.element_size()
    read, rows = x.numel() // x.shape[1], y.numel() // y.shape[1]
    if isinstance(layer, nn.Conv2d) and layer.groups == 1:
        product = Product(read, rows, x.shape[1], y.shape[1], layer.weight[0, 0].numel(), e)
        has_bias = layer.bias is not None
        forward = [product.work("conv"), *([eager_kernels.bias(product.y)] if has_bias else [])]
        return forward, [*([eager_kernels.bias_gradient(product.y)] if has_bias else []), *product.gradients(dx=dx)]
    if isinstance(layer, nn.Linear):
        # The bias is in the product's epilogue, and its gradient a sum of its own.
        product = Product(read, rows, x.shape[1], y.shape[1], 1, e)
        return [product.work("linear")], [eager_kernels.bias_gradient(product.y), *product.gradients(dx=dx)]
    if isinstance(layer, nn.ReLU):
        return [eager_kernels.relu(y.nbytes)], [eager_kernels.relu_gradient(y.nbytes)]
    if isinstance(layer, nn.MaxPool2d):
        pool = Pool(read, rows, x.shape[1], e)
        return pool.forward(), pool.backward()
    if isinstance(layer, nn.AdaptiveAvgPool2d) and y.shape[2:].numel() == 1:
        return [Work("mean", 0, x.nbytes + y.nbytes)], [Work("mean'", 0, x.nbytes + y.nbytes)]
    if isinstance(layer, nn.Flatten):
        return [], []
    raise InceptionInputError(
        f"network: got {layer} in {stage}, wants GoogLeNet's layers: Conv2d without groups, ReLU, MaxPool2d, "
        "AdaptiveAvgPool2d to one pixel, Flatten, Linear, and Inception blocks"
    )


def _stem_shape(layers: Sequence[nn.Module], x: Tensor) -> BlockShape | None:
    """Of two convolutions with ReLUs for which there are launches, else None."""
    if [type(layer) for layer in layers] != [nn.Conv2d, nn.ReLU] * len(STEM_SIDES):
        return None
    convs = layers[::2]
    for conv, side in zip(convs, STEM_SIDES, strict=True):
        settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        if settings != ((side, side), (1, 1), (side // 2, side // 2), (1, 1), 1):
            return None
    return BlockShape.of(x, [conv.weight for conv in convs])
