"""GoogLeNet as parts in a row: what eager's kernels of each must do, and what ours are predicted to take.

    part                                              eager        ours
    a block                                           its kernels  its launches
    the stem's 1x1 and 3x3 with their ReLUs           its kernels  its launches
    a max-pool of stride 2                            its kernels  P1, P2
    the same behind a bias and ReLU, with these       its kernels  P1, P2
    other convolutions, the average pool, Linear      its kernels  none

Bias and ReLU between such a pool and a convolution that is PyTorch's are a part with the pool: its launches compute all
three. Sizes are the modules' own: nothing of the network is written down here. What PyTorch computes is taken at its
floor, a bound that nothing beats (eager_kernels.py), and what ours compute at its forecast, which tiles and
instructions are in (forecast.py, pool_forecast.py). A sum of both is therefore lower than the truth, by what PyTorch's
kernels need beyond their floors.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.block import chains
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS
from inception_fused.block.pools import PADDINGS, STRIDE, WINDOW, PoolShape
from inception_fused.block.reference import Inception
from inception_fused.block.shapes import BlockShape
from inception_fused.errors import InceptionInputError
from inception_fused.plan import eager_kernels, tuned
from inception_fused.plan.cards import Ceilings
from inception_fused.plan.counts import Counts
from inception_fused.plan.eager_kernels import Product
from inception_fused.plan.floors import Work, total
from inception_fused.plan.forecast import Forecast, forecast
from inception_fused.plan.pool_forecast import Pool, pool_forecast

BLOCK, STEM, CONVOLUTION, POOL, HEAD = "block", "stem convolutions", "convolution", "max-pool", "head"
"""Kinds of parts."""

FORMS = {"blocks fused": (BLOCK,), "stem too": (BLOCK, STEM), "pools too": (BLOCK, STEM, POOL)}
"""Kinds that run our launches, by what a table calls the network then. Each holds those before it."""

STEM_STAGES = ("b1", "b2")
"""Everything before the first block."""

STEM_SIDES = tuple(side for conv in chains.STEM.convs for side in conv.sides)
"""Of the convolutions that have launches of ours outside the blocks."""

PREDICTED: Callable[[Forecast], float] = attrgetter("predicted")


class Part(NamedTuple):
    """name: of a block as in GOOGLENET_BLOCKS, else its stage and what it is. stage: the network's child that has it.
    kind: of the kinds above. output: shape of what it returns. forward, backward: eager's kernels, in order, for all
    gradients but the image's. shape: of a block, of the stem's convolutions or of a max-pool, for their launches."""

    name: str
    stage: str
    kind: str
    output: tuple[int, ...]
    forward: tuple[Work, ...]
    backward: tuple[Work, ...]
    shape: BlockShape | Pool | None = None

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
            for layers in _handed_on(_runs(_leaves(module))):
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
        if part.kind in fused and part.shape is not None:
            options = dict(precision=precision, training=training, known=known)
            if isinstance(part.shape, Pool):
                launches = pool_forecast(part.shape, ceilings, **options)
            else:
                launches = forecast(part.shape, dtype, ceilings, gpu=gpu, **options)
        found.append(Estimate(part, total(works, ceilings, precision), len(works), tuple(launches)))
    return found


class _Bias(nn.Identity):
    """A convolution's, which eager adds in a pass of its own."""


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """Layers and blocks in order, a bias behind its convolution. A subclass of Sequential is its children, whatever its
    forward does with them."""
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    else:
        yield module
        if isinstance(module, nn.Conv2d) and module.bias is not None:
            yield _Bias()


def _handed_on(runs: Iterator[list[nn.Module]]) -> Iterator[list[nn.Module]]:
    """Runs, but that bias and ReLU of a single convolution are of the pool behind it, if its launches compute them."""
    run: list[nn.Module] = next(runs, [])
    for behind in runs:
        if [type(layer) for layer in run] == [nn.Conv2d, _Bias, nn.ReLU] and _padding(behind[0]) is not None:
            behind = [*run[1:], *behind]
            run = run[:1]
        yield run
        run = behind
    if run:
        yield run


def _padding(layer: nn.Module) -> int | None:
    """Of a max-pool that P1 computes, None for any other layer."""
    if not isinstance(layer, nn.MaxPool2d) or layer.return_indices:
        return None
    window, stride, padding, dilation = (
        side if isinstance(side, tuple) else (side, side)
        for side in (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    )
    served = (window, stride, dilation) == ((WINDOW, WINDOW), (STRIDE, STRIDE), (1, 1))
    return padding[0] if served and padding[0] == padding[1] and padding[0] in PADDINGS else None


def _runs(layers: Iterator[nn.Module]) -> Iterator[list[nn.Module]]:
    """Layers that are one part: convolutions behind each other, and bias, ReLU and Flatten behind what they follow."""
    run: list[nn.Module] = []
    for layer in layers:
        follows = isinstance(layer, (_Bias, nn.ReLU, nn.Flatten))
        joins = follows or all(isinstance(m, nn.Conv2d) for m in (layer, *run[:1]))
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
    shape = _stem_shape(layers, x) or _pool_shape(layers, x)
    forward: list[Work] = []
    backward: list[list[Work]] = []
    for place, layer in enumerate(layers):
        y = layer(x)
        there, back = _kernels(stage, layer, x, y, dx=not (first and place == 0))
        forward += there
        backward.insert(0, back)
        x = y
    if any(isinstance(layer, nn.MaxPool2d) for layer in layers):
        kind, what = POOL, "bias, ReLU, pool" if len(layers) > 1 else "pool"
    elif isinstance(head, nn.Conv2d):
        sides = [f"{layer.kernel_size[0]}x{layer.kernel_size[1]}" for layer in layers if isinstance(layer, nn.Conv2d)]
        kind, what = STEM if shape else CONVOLUTION, ", ".join(sides)
    else:
        kind, what = HEAD, "" if isinstance(head, nn.Linear) else "average pool"
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
        return [product.work("conv")], product.gradients(dx=dx)
    if isinstance(layer, _Bias):
        return [eager_kernels.bias(y.nbytes)], [eager_kernels.bias_gradient(y.nbytes)]
    if isinstance(layer, nn.Linear):
        # The bias is in the product's epilogue, and its gradient a sum of its own.
        product = Product(read, rows, x.shape[1], y.shape[1], 1, e)
        return [product.work("linear")], [eager_kernels.bias_gradient(product.y), *product.gradients(dx=dx)]
    if isinstance(layer, nn.ReLU):
        return [eager_kernels.relu(y.nbytes)], [eager_kernels.relu_gradient(y.nbytes)]
    if isinstance(layer, nn.MaxPool2d):
        pool = eager_kernels.Pool(read, rows, x.shape[1], e)
        return pool.forward(), pool.backward()
    if isinstance(layer, nn.AdaptiveAvgPool2d) and y.shape[2:].numel() == 1:
        return [Work("mean", 0, x.nbytes + y.nbytes)], [Work("mean'", 0, x.nbytes + y.nbytes)]
    if isinstance(layer, nn.Flatten):
        return [], []
    raise InceptionInputError(
        f"network: got {layer} in {stage}, wants GoogLeNet's layers: Conv2d without groups, ReLU, MaxPool2d, "
        "AdaptiveAvgPool2d to one pixel, Flatten, Linear, and Inception blocks"
    )


def _pool_shape(layers: Sequence[nn.Module], x: Tensor) -> Pool | None:
    """Of a max-pool for which there are launches, else None. x: what the first of the layers is given."""
    padding = _padding(layers[-1])
    if padding is None:
        return None
    sizes = PoolShape(x.shape[0], *x.shape[2:], padding, layers[-1].ceil_mode)
    return Pool(sizes, x.shape[1], x.dtype, epilogue=len(layers) > 1)


def _stem_shape(layers: Sequence[nn.Module], x: Tensor) -> BlockShape | None:
    """Of two convolutions with ReLUs for which there are launches, else None."""
    convs = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    if [type(layer) for layer in layers if not isinstance(layer, _Bias)] != [nn.Conv2d, nn.ReLU] * len(STEM_SIDES):
        return None
    for conv, side in zip(convs, STEM_SIDES, strict=True):
        settings = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        if settings != ((side, side), (1, 1), (side // 2, side // 2), (1, 1), 1):
            return None
    return BlockShape.of(x, [conv.weight for conv in convs])
