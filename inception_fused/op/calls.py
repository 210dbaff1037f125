"""What a call of the block is checked for, and the dtype that it computes in.

Each check has a fast form, made at every call, that says whether all is as usual, and a slow one that finds the words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from itertools import cycle

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from inception_fused.block import chains, folding
from inception_fused.block.chains import BLOCKS, COUNTS_IN_WORDS, ORDER, variant_of
from inception_fused.block.checks import check_device, check_parameter_shapes, named_parameters
from inception_fused.block.reference import InceptionParams, check_activation
from inception_fused.block.tensor_lists import FIELDS, BlockTensors
from inception_fused.block.views import BatchNorm
from inception_fused.errors import InceptionInputError

PLAIN_TENSORS = (Tensor, Parameter, FakeTensor)
PLAIN_SET = frozenset(PLAIN_TENSORS)


def compute_dtype(x: Tensor) -> torch.dtype:
    """x's dtype, or autocast's where it is on; autocast leaves float64 alone, as in PyTorch."""
    if autocast_enabled(x) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return x.dtype


def autocast_enabled(x: Tensor) -> bool:
    """Asking about a device without autocast, such as meta, raises."""
    kind = x.device.type
    return (kind in ("cpu", "cuda") or torch.amp.is_autocast_available(kind)) and torch.is_autocast_enabled(kind)


def check_call(
    x: Tensor, params: InceptionParams, activation: str | None, variants: Mapping[int, chains.Variant] = BLOCKS
) -> None:
    """Raise InceptionInputError unless the arguments of :func:`inception` fit together.

    variants: of which it may be, by their number of convolutions."""
    check_activation(activation)
    if not torch.compiler.is_compiling() and _fits(x, params, variants):
        return
    if not isinstance(params, InceptionParams):
        raise InceptionInputError(f"params: got {type(params).__name__}, wants InceptionParams(weights, biases)")
    weights, biases, batch_norms = params
    _check_tensors("params.weights", weights, counts=tuple(variants))
    if biases is not None:
        _check_tensors("params.biases", biases, weights, counts=(len(weights),))
    norms = _checked_norms(batch_norms, weights) if batch_norms is not None else ()
    tensors = BlockTensors(weights, biases or (), norms)
    check_parameter_shapes(tensors)
    check_input(x, chains.first(weights).shape[1])
    check_device(x, tensors)
    autocast = autocast_enabled(x)
    for name, t in named_parameters(tensors._replace(norms=())):
        if t.dtype != x.dtype and not autocast:
            raise InceptionInputError(
                f"x: got {x.dtype}, {name} is {t.dtype}; wants one dtype for both: use x.to({t.dtype}), or autocast"
            )


def _fits(x: object, params: object, variants: Mapping[int, chains.Variant]) -> bool:
    """Whether a call of plain tensors of one dtype is right: the check of every call, a third of the time of finding
    out what is wrong. False says nothing."""
    if type(x) not in PLAIN_TENSORS or type(params) is not InceptionParams:
        return False
    weights, biases, batch_norms = params
    if type(weights) is not tuple or len(weights) not in variants:
        return False
    if biases is not None and (type(biases) is not tuple or len(biases) != len(weights)):
        return False
    tensors = weights if biases is None else weights + biases
    norms = ()
    if batch_norms is not None:
        if type(batch_norms) is not tuple or len(batch_norms) != len(weights):
            return False
        usual = folding.flat_if_usual(batch_norms)
        if usual is not None:
            norms, _ = usual
        else:
            usual = folding.flat_if_batch(batch_norms)
            if usual is None:
                return False
            # Gammas and betas; for the others nothing stands there.
            norms = usual[0][2 * len(weights) :]
    dtype, device = x.dtype, x.device
    try:
        return (
            set(map(type, (*tensors, *norms))) <= PLAIN_SET
            and {t.dtype for t in tensors} == {dtype}
            and {t.device for t in (*tensors, *norms)} == {device}
            and all(t.is_floating_point() for t in norms)
            and all(t.shape == w.shape[:1] for t, w in zip(norms, cycle(weights), strict=False))
            and dtype.is_floating_point
            and x.layout is torch.strided
            and _shapes_fit(x.shape[1:], *[t.shape for t in tensors])
        )
    except TypeError:
        # A tracer's symbolic sizes cannot be looked up.
        return False


@lru_cache(maxsize=256)
def _shapes_fit(image: tuple[int, ...], *shapes: tuple[int, ...]) -> bool:
    """Whether x [N, *image] and the parameters, biases among them or not, make a block of images that are not empty."""
    tensors = BlockTensors.of(shapes)
    weights = tensors.weights
    if len(image) != 3 or 0 in image or tensors.fault() or any(len(shape) != 4 or 0 in shape for shape in weights):
        return False
    read = chains.inputs(image[0], [k for k, *_ in weights])
    kernels = zip(variant_of(weights).convs, weights, read, strict=True)
    return all(
        c == channels and rows == columns and rows in conv.sides for conv, (_, c, rows, columns), channels in kernels
    ) and all(b == w[:1] for w, b in zip(weights, tensors.biases, strict=False))


def _checked_norms(batch_norms: object, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """The vectors in the order of tensor_lists.FIELDS, None where one is not given."""
    names = variant_of(weights).names
    wants = f"wants {COUNTS_IN_WORDS[len(names)]} BatchNorm or None in the order {', '.join(names)}, or None for all"
    if not isinstance(batch_norms, (tuple, list)) or len(batch_norms) != len(names):
        got = f"{len(batch_norms)} items" if isinstance(batch_norms, (tuple, list)) else type(batch_norms).__name__
        raise InceptionInputError(f"params.batch_norms: got {got}, {wants}")
    for conv, norm in zip(names, batch_norms, strict=True):
        if norm is None:
            continue
        if not isinstance(norm, BatchNorm):
            raise InceptionInputError(f"params.batch_norms: got {type(norm).__name__} for {conv}, {wants}")
        for field in FIELDS:
            t = getattr(norm, field)
            if t is None and (field in ("gamma", "beta") or (norm.mean is None and norm.var is None)):
                continue
            if t is None:
                wants = "wants a tensor, or None for both mean and var: those of the batch"
                raise InceptionInputError(f"{conv} batch_norm.{field}: got None, {wants}")
            if not isinstance(t, Tensor):
                raise InceptionInputError(f"{conv} batch_norm.{field}: got {type(t).__name__}, wants a tensor")
            if not t.is_floating_point():
                raise InceptionInputError(f"{conv} batch_norm.{field}: got {t.dtype}, wants a floating point dtype")
            if not t.numel():
                raise InceptionInputError(f"{conv} batch_norm.{field}: got no elements, wants one a filter")
        eps = norm.eps
        if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not eps >= 0:
            raise InceptionInputError(f"{conv} batch_norm.eps: got {eps!r}, wants a number of at least 0")
    return [getattr(norm, field, None) for field in FIELDS for norm in batch_norms]


def _check_tensors(
    name: str, tensors: object, weights: Sequence[Tensor] | None = None, *, counts: Sequence[int]
) -> None:
    """weights: those that these go with; None where they are asked about themselves. counts: how many may be."""
    if not isinstance(tensors, (tuple, list)) or len(tensors) not in counts:
        got = f"{len(tensors)} items" if isinstance(tensors, (tuple, list)) else type(tensors).__name__
        wants = ORDER if weights is None else f"{COUNTS_IN_WORDS[len(weights)]} tensors, one for each weight"
        raise InceptionInputError(f"{name}: got {got}, wants {wants}")
    for conv, t in zip(variant_of(tensors).names, tensors, strict=True):
        if t is None and weights is not None:
            continue
        if not isinstance(t, Tensor):
            raise InceptionInputError(f"{name}: got {type(t).__name__} for {conv}, wants a tensor")
        if not t.is_floating_point():
            raise InceptionInputError(f"{name}: got {t.dtype} for {conv}, wants a floating point dtype")
        if weights is not None and not t.numel():
            raise InceptionInputError(f"{name}: got no elements for {conv}, wants one a filter, or None for no bias")


def check_input(x: object, channels: int | str = "C") -> None:
    """Raise InceptionInputError unless x is [N, channels, H, W], floating and dense; "C" stands for any number."""
    if not isinstance(x, Tensor):
        raise InceptionInputError(f"x: got {type(x).__name__}, wants a tensor [N, {channels}, H, W]")
    shape = tuple(x.shape)
    if len(shape) != 4:
        hint = "; add the batch dimension with x.unsqueeze(0)" if len(shape) == 3 else ""
        raise InceptionInputError(f"x: got {len(shape)} dimensions {shape}, wants [N, {channels}, H, W]{hint}")
    if shape[1] != channels and channels != "C":
        hint = "; x looks like NHWC, wants x.permute(0, 3, 1, 2)" if shape[3] == channels else ""
        raise InceptionInputError(f"x: got {shape[1]} channels in shape {shape}, wants {channels}{hint}")
    if shape[2] < 1 or shape[3] < 1:
        raise InceptionInputError(f"x: got an empty image {shape[2]}x{shape[3]}, wants at least 1x1")
    if not x.is_floating_point():
        hint = "; use x.dequantize(), or quantize the block's layers too" if x.is_quantized else ""
        raise InceptionInputError(f"x: got {x.dtype}, wants a floating point dtype such as torch.float32{hint}")
    if x.layout is not torch.strided:
        raise InceptionInputError(f"x: got layout {x.layout}, wants a dense tensor: x.to_dense()")


def refuse_derivatives(operator: str, tensors: Sequence[Tensor]) -> None:
    """Raise InceptionInputError where a gradient or a tangent of an operator is wanted, which has none: autograd would
    leave it out, and torch.func would take it for zero.

    Asked inside the operator, behind autograd; a kernel at autograd's own key would cost every call 4 us.
    """
    if torch.is_grad_enabled() and True in [t.requires_grad for t in tensors]:
        got = "an input that requires grad"
        more = ", or the operator, which a decomposed program of torch.export has, under torch.no_grad()"
    elif forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in tensors):
        got, more = "an input with a tangent", ""
    else:
        return
    raise InceptionInputError(
        f"inception_fused::{operator}: got {got}, wants none, since the operator has no derivative: call "
        f"inception_fused.inception(...) or the module{more}"
    )
