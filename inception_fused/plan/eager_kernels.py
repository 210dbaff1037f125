"""What eager PyTorch's kernels must do in channels_last, each alone: of a layer, and of a block of layers.

    convolution      product, bias                                 x, w -> y;  y -> y
    ReLU             one pass                                      y -> y
    BatchNorm        statistics, then normalised                   y;  y -> y
    max-pool         values and int64 indices                      x -> y, indices
    average pool     one pass                                      x -> y
    linear           product and bias in one                       x, w -> y

and backwards, in autograd's order, ReLU's mask (y, dy -> dy), the bias's sum, dgrad and wgrad, the pool's zeros and
scatter. A floor of these is a bound that eager cannot beat, and no forecast: a kernel's tiles, its launch and a
workspace are not in it. Vectors of one value a channel are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from inception_fused.block import chains
from inception_fused.block.shapes import BlockShape
from inception_fused.plan.floors import Work

INDEX_BYTES = 8
"""Eager's max-pool writes an int64 index beside each element, whether somebody asks or not."""


class Product(NamedTuple):
    """A convolution or a linear layer. read, rows: pixels of its input and of its output; element: bytes of one."""

    read: int
    rows: int
    channels: int
    outputs: int
    taps: int
    element: int

    @property
    def y(self) -> int:
        """Bytes of the output."""
        return self.element * self.rows * self.outputs

    def work(self, name: str) -> Work:
        """The product, its dgrad and its wgrad each touch x, w and y once, with as many multiply-adds."""
        weights = self.channels * self.taps * self.outputs
        return Work(
            name,
            2 * self.rows * weights,
            self.element * (self.read * self.channels + self.rows * self.outputs + weights),
        )

    def gradients(self, *, dx: bool = True) -> list[Work]:
        """dx: whether somebody wants the gradient of its input."""
        return [self.work(name) for name in (["dgrad"] if dx else []) + ["wgrad"]]


def bias(y: int) -> Work:
    """cuDNN's convolution has none; added in place. y: bytes."""
    return Work("bias", 0, 2 * y)


def bias_gradient(y: int) -> Work:
    return Work("db", 0, y)


def relu(y: int) -> Work:
    return Work("relu", 0, 2 * y)


def relu_gradient(y: int) -> Work:
    return Work("relu'", 0, 3 * y)


class Pool(NamedTuple):
    """A max-pool. read, rows: pixels of its input and of its output; element: bytes of one."""

    read: int
    rows: int
    channels: int
    element: int

    def forward(self) -> list[Work]:
        return [Work("pool", 0, self._moved)]

    def backward(self) -> list[Work]:
        """Zeros everywhere, then dy where its index says."""
        return [Work("zeros", 0, self.element * self.read * self.channels), Work("pool'", 0, self._moved)]

    @property
    def _moved(self) -> int:
        return self.channels * (self.element * (self.read + self.rows) + INDEX_BYTES * self.rows)


def eager_kernels(shape: BlockShape, *, normed: bool = False) -> tuple[Work, ...]:
    """The launches of a block's eager forward: for each convolution itself, bias and ReLU (the last two read and write
    the whole output each), the max-pool with its int64 indices, and the concatenation. 20 of six convolutions, 23 of
    seven.

    normed: as torchvision has it, without biases and with BatchNorm in training, which reads the output for its
    statistics, then reads and writes it. 26 launches of six convolutions, 30 of seven.
    """
    found = _pool(shape).forward()
    for product in products(shape):
        y = product.y
        behind = [Work("bn statistics", 0, y), Work("bn", 0, 2 * y)] if normed else [bias(y)]
        found += [product.work("conv"), *behind, relu(y)]
    found.append(Work("cat", 0, 2 * shape.itemsize * shape.gemm_m * shape.k))
    return tuple(found)


def eager_backward_kernels(shape: BlockShape, *, normed: bool = False) -> tuple[Work, ...]:
    """The launches of a block's eager backward for all gradients, in autograd's order: for each convolution ReLU's
    mask, the bias's sum, dgrad and wgrad; the pool's zeros and scatter; three sums of two gradients to x. The
    concatenation's gradient is views. 29 of six convolutions, 33 of seven.

    normed: with BatchNorm in training, no convolution has a bias, and behind each mask BatchNorm reads dy and its input
    for two sums, then both again, and writes. 35 launches of six convolutions, 40 of seven.
    """

    def gradients(product: Product) -> Iterator[Work]:
        dy = product.y
        yield relu_gradient(dy)
        yield from [Work("bn' sums", 0, 2 * dy), Work("bn'", 0, 3 * dy)] if normed else [bias_gradient(dy)]
        yield from product.gradients()

    *others, last = chains.by_chain(products(shape))
    found = [*(work for product in reversed(last) for work in gradients(product)), *_pool(shape).backward()]
    for chain in reversed(others):
        found += [work for product in reversed(chain) for work in gradients(product)]
        found.append(Work("add", 0, 3 * shape.itemsize * shape.gemm_m * shape.c))
    return tuple(found)


def products(shape: BlockShape) -> list[Product]:
    """The convolutions of a block, in the order of their variant."""
    rows = shape.gemm_m
    return [
        Product(rows, rows, c, k, side**2, shape.itemsize)
        for c, k, side in zip(shape.inputs, shape.filters, shape.sides, strict=True)
    ]


def _pool(shape: BlockShape) -> Pool:
    return Pool(shape.gemm_m, shape.gemm_m, shape.c, shape.itemsize)
