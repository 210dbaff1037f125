"""The truth: the Inception block in plain PyTorch, as a module and as a function of its parameters.

The block of "Going deeper with convolutions" (Szegedy et al., 2014, figure 2b): four branches over one input,
concatenated on channels.

    branch 1: 1x1                     c1 channels          p1_1
    branch 2: 1x1 -> 3x3 (pad 1)      c2 = (c2[0], c2[1])  p2_1, p2_2
    branch 3: 1x1 -> 5x5 (pad 2)      c3 = (c3[0], c3[1])  p3_1, p3_2
    branch 4: 3x3 max-pool -> 1x1     c4 channels          p4_1, p4_2

Every convolution has a bias and is followed by ReLU. ``branch3_kernel_size=3`` is torchvision's variant,
``activation=None`` KernelBench's. With ``branch3_convs=2`` branch 3 is 1x1 -> 3x3 -> 3x3, the 5x5 in two steps, as most
networks for CIFAR have it: p3_1, p3_2, p3_3, the last two of c3[1] channels each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_fused.block.chains import CONV_NAMES as CONV_NAMES
from inception_fused.block.chains import PROJECTION, variant_of
from inception_fused.block.views import BatchNorm
from inception_fused.errors import InceptionInputError

ACTIVATIONS = ("relu", None)


class InceptionParams(NamedTuple):
    """Parameters of one block, each list of six in the order p1_1, p2_1, p2_2, p3_1, p3_2, p4_2, or of seven, with p3_3
    behind p3_2, where branch 3 has two convolutions of 3x3.

    weights: tensors [K, C, R, S]: (c1, C, 1, 1), (c2[0], C, 1, 1), (c2[1], c2[0], 3, 3), (c3[0], C, 1, 1),
        (c3[1], c3[0], R3, R3) with R3 3 or 5, (c4, C, 1, 1); of seven, with any t, (t, c3[0], 3, 3) and
        (c3[1], t, 3, 3) in the place of the last but one; any strides.
    biases: one [K] for each weight, or None where the block has none.
    batch_norms: one :class:`BatchNorm` for each weight, between that convolution and its activation, or None where the
        block has none.

    Where only some convolutions have a bias or a BatchNorm, None stands in its place.
    """

    weights: tuple[Tensor, ...]
    biases: tuple[Tensor | None, ...] | None = None
    batch_norms: tuple[BatchNorm | None, ...] | None = None


def with_parameters(params: InceptionParams, tensors: Sequence[Tensor]) -> InceptionParams:
    """The same with other weights and biases, given in one list as parameters_of() gives them; BatchNorm as it is."""
    rest = iter(tensors)
    weights = tuple([next(rest) for _ in params.weights])
    biases = tuple([None if b is None else next(rest) for b in params.biases or ()])
    return params._replace(weights=weights, biases=biases or None)


def parameters_of(params: InceptionParams) -> list[Tensor]:
    """The weights, and the biases that are there."""
    return [*params.weights, *(b for b in params.biases or () if b is not None)]


_conv2d, _max_pool2d, _relu, _cat = torch.conv2d, torch.max_pool2d, torch.relu, torch.cat
"""By these names, since somebody may have put other functions into torch.nn.functional."""


def inception_reference(
    x: Tensor,
    params: InceptionParams,
    activation: str | None = "relu",
    *,
    norm: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """The block as PyTorch would run it, differentiable to any order.

    x: [N, C, H, W], any floating dtype, strides and device. Returns [N, c1 + c2[1] + c3[1] + c4, H, W] in the
    memory format that the convolutions give. norm: called as norm(y, i) between convolution i and its activation, in
    the place of ``params.batch_norms``.
    """

    def conv(x: Tensor, i: int) -> Tensor:
        y = convolution(x, params, i)
        if norm is not None:
            y = norm(y, i)
        return _relu(y) if activation == "relu" else y

    branches = []
    variant = variant_of(params.weights)
    for places in variant.places:
        y = x
        for i in places:
            y = conv(_max_pool2d(y, 3, 1, 1) if variant.convs[i].role == PROJECTION else y, i)
        branches.append(y)
    return _cat(branches, dim=1) if len(branches) > 1 else branches[0]


def convolution(x: Tensor, params: InceptionParams, i: int) -> Tensor:
    """The i-th convolution of x, with its BatchNorm and before its activation."""
    w = params.weights[i]
    y = _conv2d(x, w, params.biases[i] if params.biases is not None else None, padding=w.shape[-1] // 2)
    norm = params.batch_norms[i] if params.batch_norms is not None else None
    return batch_norm(y, norm) if norm is not None else y


def batch_norm(y: Tensor, norm: BatchNorm) -> Tensor:
    """BatchNorm of y [N, K, H, W], in y's dtype, with vectors of any floating dtype."""
    given = [t for t in norm[:4] if t is not None]
    kinds = {t.dtype for t in given}
    dtype = y.dtype
    # What PyTorch itself takes: one dtype for all, or fp32 vectors beside 16-bit activations.
    if kinds and kinds != {dtype} and not (kinds == {torch.float32} and dtype in (torch.float16, torch.bfloat16)):
        for kind in (torch.float32, *kinds):
            dtype = torch.promote_types(dtype, kind)
        norm = BatchNorm(*(t.to(dtype) if t is not None else None for t in norm[:4]), norm.eps)
    batch = norm.mean is None
    out = F.batch_norm(y.to(dtype), norm.mean, norm.var, norm.gamma, norm.beta, training=batch, eps=norm.eps)
    return out.to(y.dtype)


class Inception(nn.Module):
    """The eager block: constructor, child names and initial weights of the original.

    Args:
        in_channels: C of the input.
        c1: output channels of branch 1.
        c2: (reduction, output) channels of branch 2.
        c3: (reduction, output) channels of branch 3.
        c4: output channels of branch 4.
        branch3_kernel_size: of the convolution behind branch 3's reduction: 5, or 3 for torchvision's variant.
        branch3_convs: how many of these stand there: 1, or 2 with ``branch3_kernel_size=3`` (1x1 -> 3x3 -> 3x3).
        activation: "relu" after every convolution, or None.
        bias: whether the convolutions have a bias.
        device, dtype: of the parameters, as in every PyTorch module.

    Raises:
        InceptionInputError: naming the argument that is wrong.
    """

    def __init__(
        self,
        in_channels: int,
        c1: int,
        c2: tuple[int, int],
        c3: tuple[int, int],
        c4: int,
        *,
        branch3_kernel_size: int = 5,
        branch3_convs: int = 1,
        activation: str | None = "relu",
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_channels, c1, c4 = (_count(n, v) for n, v in (("in_channels", in_channels), ("c1", c1), ("c4", c4)))
        c2, c3 = _pair("c2", c2), _pair("c3", c3)
        if branch3_kernel_size not in (3, 5):
            raise InceptionInputError(f"branch3_kernel_size: got {branch3_kernel_size!r}, wants 5 or 3")
        if branch3_convs not in (1, 2) or isinstance(branch3_convs, bool):
            raise InceptionInputError(f"branch3_convs: got {branch3_convs!r}, wants 1 or 2")
        if branch3_convs == 2 and branch3_kernel_size != 3:
            got = f"branch3_convs: got 2 with branch3_kernel_size={branch3_kernel_size}"
            raise InceptionInputError(f"{got}, wants branch3_kernel_size=3 with it")
        check_activation(activation)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise InceptionInputError(f"dtype: got {dtype!r}, wants a floating point torch.dtype or None")

        def conv(c: int, k: int, r: int) -> nn.Conv2d:
            return nn.Conv2d(c, k, kernel_size=r, padding=r // 2, bias=bias, device=device, dtype=dtype)

        self.activation = activation
        self.p1_1 = conv(in_channels, c1, 1)
        self.p2_1 = conv(in_channels, c2[0], 1)
        self.p2_2 = conv(c2[0], c2[1], 3)
        self.p3_1 = conv(in_channels, c3[0], 1)
        self.p3_2 = conv(c3[0], c3[1], branch3_kernel_size)
        if branch3_convs == 2:
            self.p3_3 = conv(c3[1], c3[1], branch3_kernel_size)
        self.p4_1 = nn.MaxPool2d(kernel_size=3, stride=1, padding=1)
        self.p4_2 = conv(in_channels, c4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] -> [N, c1 + c2[1] + c3[1] + c4, H, W], through the child modules and their hooks."""
        act = F.relu if self.activation == "relu" else nn.Identity()
        y1 = act(self.p1_1(x))
        y2 = act(self.p2_2(act(self.p2_1(x))))
        y3 = act(self.p3_2(act(self.p3_1(x))))
        if "p3_3" in self._modules:
            y3 = act(self.p3_3(y3))
        y4 = act(self.p4_2(self.p4_1(x)))
        return torch.cat((y1, y2, y3, y4), dim=1)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A pickle of a block from before it had an ``activation`` is one with ReLU."""
        super().__setstate__(state)
        self.__dict__.setdefault("activation", "relu")

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def check_activation(activation: object) -> None:
    if activation not in ACTIVATIONS:
        raise InceptionInputError(f'activation: got {activation!r}, wants "relu" or None')


def _count(name: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise InceptionInputError(f"{name}: got {value!r}, wants a positive number of channels")
    return value


def _pair(name: str, value: object) -> tuple[int, int]:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        raise InceptionInputError(f"{name}: got {value!r}, wants a pair (reduction channels, output channels)")
    return _count(f"{name}[0]", value[0]), _count(f"{name}[1]", value[1])
