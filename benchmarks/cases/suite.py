"""The cases of the suite as data, the most valuable first, and what each is made of.

Three sets: the short one of a GPU, the whole matrix (--full), and a small one for a machine without a GPU. A case's
id, ``3a-128-bf16-training-ours``, names the block or network, with ``@SIDE`` where the image has not the usual size.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor, nn

from benchmarks.cases.baselines import DTYPES, GRADIENT_LIMIT, OUTPUT_LIMIT, Point
from benchmarks.cases.networks import BLOCK_TYPES, NETWORKS, BatchNormInception, build_network
from benchmarks.cases.records import COMPILE, EAGER, NORMED, OURS_BLOCKS, OWN_BLOCKS, SUITES, TWO
from benchmarks.cases.roofline import network_works
from inception_fused import Inception
from inception_fused.block.googlenet_blocks import BRANCH3, GOOGLENET_BLOCKS, branch3_options, spatial_size
from inception_fused.plan.floors import Work, block_work

MODES = ("forward", "training")
QUICK = ("ours", EAGER, "ours_graph", "eager_nchw")
"""What needs no compiler of PyTorch's, in the order in which it is measured at a point."""

GRAPHS = ("ours_graph", "eager_graph")
COMPILE_MODES = dict(zip(COMPILE, ("default", "reduce-overhead", "max-autotune"), strict=True))
IMPLEMENTATIONS = (*QUICK, OURS_BLOCKS, "eager_graph", *COMPILE)

KERNELBENCH6 = ("4a", 10, 224)
"""Level 3, problem 6: block 4a without activation, batch, H = W of the feature map."""

WORKSPACE_BYTES = 1 << 30
"""What cuDNN's algorithms and the L2 flush may take beside the tensors: a guess."""

NETWORK_LIMITS = {"fp32": (1e-3, 0.02), "tf32": (0.02, 0.5), "fp16": (0.02, 0.5), "bf16": (0.05, 0.75)}
"""Relative norms of logits and of a gradient against strict fp32, by dtype: the seed network's were up to 0.011 and
0.42 in bf16, 0.002 and 0.24 in fp16, because masks and arg-maxes flip along 22 layers. A gradient that has nothing to
do with the true one is 1.4 off, one that is zero 1; each block of ours has its parity test besides."""

BATCH_NORM_LIMITS = {"fp32": (1e-3, 0.1), "tf32": (0.25, 2.5), "fp16": (0.25, 2.5), "bf16": (0.25, 2.5)}
"""The same of a network with BatchNorm in training. Through 57 BatchNorms with batch statistics a rounded gradient soon
has nothing to do with the true one: eager's was up to 1.7 off in bf16 and 0.9 in fp16, where the logits were 0.16 and
0.02 off. What remains of the gate is that gradients are finite and of the right size. A single block has the limits of
any block: eager's output was up to 0.005 off in bf16, its gradients 0.07."""

WINDOWS = BRANCH3 | {NORMED: (3,)}
"""Sides of branch 3's windows by suite, where it has not GoogLeNet's."""


@dataclass(frozen=True)
class Case:
    """One implementation at one point; the fields are those of :class:`benchmarks.cases.records.Record`. rank: 0 in the
    short set."""

    suite: str
    subject: str
    image: int
    batch: int
    dtype: str
    mode: str
    implementation: str
    rank: int = 0

    @property
    def id(self) -> str:
        own = {suite: f"{self.subject}-{suite}" for suite in OWN_BLOCKS}
        label = ({"kernelbench6": "kernelbench6"} | own).get(self.suite, self.subject)
        usual = NETWORKS[self.subject].image if self.is_network else 224
        label += "" if self.image == usual else f"@{self.image}"
        return f"{label}-{self.batch}-{self.dtype}-{self.mode}-{self.implementation}"

    @property
    def training(self) -> bool:
        return self.mode == "training"

    @property
    def is_network(self) -> bool:
        return self.subject in NETWORKS

    @property
    def size(self) -> int:
        return spatial_size(self.subject, self.image) if self.suite in ("block", *OWN_BLOCKS) else self.image

    @property
    def point(self) -> Point:
        """Of a block."""
        activation = None if self.suite == "kernelbench6" else "relu"
        config, windows = GOOGLENET_BLOCKS[self.subject], WINDOWS.get(self.suite, (5,))
        return Point(self.subject, config, self.size, self.batch, self.dtype, self.mode, activation, windows)

    @property
    def slices(self) -> tuple[int, ...] | None:
        """Channels of the branches in the output; None for a network."""
        if self.is_network:
            return None
        config = GOOGLENET_BLOCKS[self.subject]
        return (config.c1, config.c2[1], config.c3[1], config.c4)

    @property
    def limits(self) -> tuple[float, float]:
        """Largest relative norms of error, of the output and of a gradient, that may be timed."""
        if self.is_network:
            return (BATCH_NORM_LIMITS if self.batch_statistics else NETWORK_LIMITS)[self.dtype]
        return NETWORK_LIMITS["fp32"] if self.dtype == "fp32" else (OUTPUT_LIMIT, GRADIENT_LIMIT)

    @property
    def batch_statistics(self) -> bool:
        """Whether its blocks have BatchNorm, and that learns."""
        return self.is_network and NETWORKS[self.subject].blocks is None and self.training

    @property
    def seconds(self) -> float:
        """Roughly what the case takes on a data-centre card, all its compiling and checking included: a guess, by
        which no case is begun that would end beyond the time limit."""
        if self.implementation == "compile_max_autotune":
            return 300.0 if self.is_network else 90.0
        if self.implementation in COMPILE:
            return (60.0 if self.is_network else 8.0) * (2 if self.training else 1)
        return 4.0 if self.is_network else 2.0

    def works(self) -> tuple[Work, ...]:
        """The ideal kernels of this case: one of a block, one for each block and layer of a network."""
        if not self.is_network:
            return (block_work(self.point.shape, training=self.training),)
        return _network_works(self.subject, self.image, self.batch, self.dtype, self.training)

    def needed_bytes(self) -> int:
        """GPU memory that the case and the checks before it may take: every operator's output (in training also its
        gradient), in float64 where our blocks' parity is checked, and :data:`WORKSPACE_BYTES`."""
        elements, indices = _traffic(self.suite, self.subject, self.image, self.batch)
        double = self.implementation.startswith("ours") and not self.is_network
        # A network's blocks are checked one by one, and the reference of the agreement is fp32.
        element = 8 if double else max(4, DTYPES[self.dtype].itemsize)
        return (2 if self.training or double else 1) * elements * element + indices + WORKSPACE_BYTES


@cache
def _network_works(name: str, image: int, batch: int, dtype: str, training: bool) -> tuple[Work, ...]:
    module, x = meta_subject(name, image, batch)
    return network_works(module, x, dtype, blocks=BLOCK_TYPES, training=training)


def meta_subject(name: str, image: int, batch: int) -> tuple[nn.Module, Tensor]:
    """A network and its input on the meta device."""
    with torch.device("meta"):
        return build_network(name).eval(), torch.empty(batch, NETWORKS[name].channels, image, image)


@cache
def _traffic(suite: str, subject: str, image: int, batch: int) -> tuple[int, int]:
    """Elements of all floating tensors that eager's operators return, and bytes of the pools' indices; x included."""
    case = Case(suite, subject, image, batch, "fp32", "forward", EAGER)
    if case.is_network:
        module, x = meta_subject(subject, image, batch)
    else:
        with torch.device("meta"):
            point = case.point
            if suite == NORMED:
                module = BatchNormInception(*point.config)
            else:
                module = Inception(*point.config, activation=point.activation, **branch3_options(point.branch3))
            x = torch.empty(batch, point.config.in_channels, case.size, case.size)
    sizes = [x.numel()]
    indices = [0]

    def add(layer: nn.Module, args: tuple[Tensor, ...], y: Tensor) -> None:
        # A convolution's output again after BatchNorm or ReLU, and a block's slices again in its concatenation.
        if next(layer.children(), None) is None or isinstance(layer, BLOCK_TYPES):
            sizes.append(y.numel() * (2 if isinstance(layer, nn.Conv2d) else 1))
        if isinstance(layer, nn.MaxPool2d):
            indices.append(8 * y.numel())

    handles = [layer.register_forward_hook(add) for layer in module.modules()]
    with torch.no_grad():
        module(x)
    for handle in handles:
        handle.remove()
    return sum(sizes) + sum(p.numel() for p in module.parameters()), sum(indices)


def cases(*, gpu: bool, full: bool = False, compile: bool = True) -> list[Case]:
    """Every case in the order in which it is to be measured, so that a cut costs least.

    First all that needs no torch.compile, then torch.compile's default, then its other modes; within each the short
    set before the rest of the matrix, bf16 before other dtypes and large batches before small ones; a point's
    implementations together. compile: whether torch.compile is among them.
    """
    chosen = _gpu_full() if gpu and full else _gpu_short() if gpu else _cpu(full)
    unique = {case.id: case for case in sorted(chosen, key=lambda case: -case.rank)}
    wanted = [case for case in unique.values() if compile or case.implementation not in COMPILE]
    return sorted(wanted, key=_order)


def _order(case: Case) -> tuple:
    tier = max(0, IMPLEMENTATIONS.index(case.implementation) - IMPLEMENTATIONS.index("eager_graph"))
    dtype = tuple(DTYPES).index(case.dtype)
    place = (case.rank, dtype, -case.batch, SUITE_ORDER.index(case.suite), -case.image, case.subject)
    return (tier, *place, MODES.index(case.mode), IMPLEMENTATIONS.index(case.implementation))


SUITE_ORDER = SUITES


def _matrix(
    suite: str, subjects: Iterable[str], images: Sequence[int], batches: Sequence[int], dtypes: Sequence[str],
    implementations: Sequence[str], rank: int = 0,
) -> list[Case]:  # fmt: skip
    return [
        Case(suite, subject, image, batch, dtype, mode, implementation, rank)
        for subject in subjects
        for image in images
        for batch in batches
        for dtype in dtypes
        for mode in MODES
        for implementation in implementations
    ]


def _gpu_short() -> list[Case]:
    points = ((1, 128), ("bf16", "tf32"), (*QUICK, "compile"))
    blocks = _matrix("block", ("3a", "4e", "5b"), (224,), *points)
    normed = _training(_matrix(NORMED, ("3a", "4e", "5b"), (224,), (128,), ("bf16",), (*QUICK, "compile")))
    # What a default run has time for beside torch.compile, which takes a network a minute; the rest is in the matrix.
    large = _matrix("network", ("googlenet",), (224,), (128,), ("bf16", "tf32"), ("ours", EAGER, OURS_BLOCKS))
    return blocks + normed + large + _matrix("network", ("googlenet",), (96,), *points)


def _training(found: Iterable[Case]) -> list[Case]:
    return [case for case in found if case.training]


def _gpu_full() -> list[Case]:
    dtypes, batches = ("bf16", "fp16", "tf32"), (1, 32, 128)
    found, names = _gpu_short(), tuple(name for name in IMPLEMENTATIONS if name not in ("eager_graph", OURS_BLOCKS))
    found += _matrix("network", ("googlenet",), (224, 96), batches, dtypes, (OURS_BLOCKS,), 1)
    for chosen, some in ((names, batches), (("eager_graph",), (1,))):
        found += _matrix("block", GOOGLENET_BLOCKS, (224, 96), some, dtypes, chosen, 1)
        found += _matrix("network", ("googlenet",), (224, 96), some, dtypes, chosen, 1)
        normed = _matrix("torchvision", ("torchvision",), (224,), some, dtypes, chosen, 1)
        normed += _matrix("cifar", ("cifar",), (32,), some, dtypes, chosen, 1)
        found += _matrix(TWO, GOOGLENET_BLOCKS, (224,), some, dtypes, chosen, 1)
        found += _training(_matrix(NORMED, GOOGLENET_BLOCKS, (224,), some, dtypes, chosen, 1))
        # BatchNorm does not learn from one image.
        found += [case for case in normed if case.batch > 1 or not case.training]
    block, batch, side = KERNELBENCH6
    found += _matrix("kernelbench6", (block,), (side,), (batch,), ("tf32",), names, 1)
    return found + _matrix("kernelbench7", ("kernelbench7",), (224,), (10,), ("tf32",), names, 1)


def _cpu(full: bool) -> list[Case]:
    """Small sizes, since this says nothing about the kernels: that everything runs and agrees, and what the module
    costs beside eager where it runs PyTorch's own operators."""
    names, block = ("ours", EAGER, "eager_nchw"), KERNELBENCH6[0]
    found = _matrix("block", ("3a", "5b"), (96,), (1, 4), ("fp32",), names)
    found += _matrix("network", ("googlenet",), (64,), (1,), ("fp32",), (*names, OURS_BLOCKS))
    found += _matrix("kernelbench6", (block,), (14,), (1,), ("fp32",), names)
    found += _matrix(TWO, ("5b",), (96,), (1,), ("fp32",), names)
    found += _training(_matrix(NORMED, ("3a",), (96,), (2,), ("fp32",), names))
    if full:
        found += _matrix("block", GOOGLENET_BLOCKS, (96,), (1, 4), ("fp32", "bf16"), names, 1)
        found += _matrix("network", ("googlenet",), (96,), (1, 4), ("fp32", "bf16"), (*names, OURS_BLOCKS), 1)
        found += _matrix("kernelbench7", ("kernelbench7",), (64,), (1,), ("fp32",), names, 1)
        found += _matrix("torchvision", ("torchvision",), (96,), (4,), ("fp32",), names, 1)
        found += _matrix("cifar", ("cifar",), (32,), (4,), ("fp32",), names, 1)
    return found
