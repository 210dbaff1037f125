"""``convert(model)``: the Inception blocks of anybody's model run the kernels, and ``revert_`` undoes it.

Structure proposes (structure.py), a probe decides: a copy of the block with weights drawn anew computes a small random
input in float32, once by its own forward and once by the reference; a block that differs keeps its class. Parameters
stay the same objects, state_dict keeps its keys in their order.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from inception_fused.adapter import STATE, ConvertedBlock, adopt, release, settings_of, view_of
from inception_fused.errors import FallbackWarning, InceptionInputError
from inception_fused.reference import ACTIVATIONS, InceptionParams, inception_reference
from inception_fused.structure import Roles, candidates, is_lazy, layer

STRIDES = "_inception_fused_strides"
"""The attribute of a module whose weights were brought into channels_last: by name their shape and strides before."""

PROBE_SHAPE = (2, 5, 6)
"""N, H, W of the probe's input: odd, and no square, so that no transposition hides."""

PROBE_SCALES = (100.0, 0.01)
"""Of further inputs, on which a forward that clamps, or adds a constant, shows."""

PROBE_LIMIT = 1e-4
"""Largest error over the RMS: float32 is up to 9e-6 off float64 on the nine blocks, a missing ReLU 4.2."""


def convert(model: nn.Module, *, strict: bool = False, channels_last: bool = False) -> nn.Module:
    """A copy of the model whose Inception blocks run the kernels; see :func:`convert_`."""
    check_model(model)
    return convert_(copy.deepcopy(model), strict=strict, channels_last=channels_last)


def convert_(model: nn.Module, *, strict: bool = False, channels_last: bool = False) -> nn.Module:
    """Converts the model's Inception blocks in place and returns the model.

    A block becomes an instance of a subclass of its class: same Parameter objects, same state_dict. What looks like a
    block and is not converted is named by :func:`explain`, with the reason. A block whose parameters wait for their
    first input (LazyConv2d) is tried after it. Nothing else is touched: no strides, no storage.

    channels_last: bring all convolutions' weights into that memory format, which saves the launch that otherwise
    rewrites 3x3 and 5x5 weights at each call, as ``model.to(memory_format=torch.channels_last)`` does. Only before
    anything has recorded strides: DistributedDataParallel's buckets, broadcasts from or to a rank that has not done the
    same, a fused optimizer's moments and ``.grad`` from before would meet weights in another order, and values get
    mixed up without an error. Weights whose storage is not theirs alone (tied, views of a larger one, in shared memory)
    stay as they are.

    Raises:
        InceptionInputError: model is no nn.Module; with ``strict``, nothing in it was converted or is a FusedInception.
    Warns FallbackWarning in the latter case without ``strict``.
    """
    check_model(model)
    refused = []
    for name, module, proposal in list(candidates(model)):
        if view_of(module) is not None:
            continue
        activation, why = None, proposal.why
        known = True
        if proposal.roles is not None:
            known = not is_lazy([layer(module, conv) for conv in proposal.roles.convs])
            activation, why = try_block(module, type(module), proposal.roles) if known else (None, "")
        if not why:
            try:
                adopt(module, proposal.roles, activation, known=known, channels_last=channels_last)
            except TypeError as error:
                why = f"no subclass of {type(module).__name__} can be made: {error}"
        if why:
            refused.append(f"{name or type(module).__name__}: {why}")
    if not any(view_of(module) is not None for module in model.modules()):
        found = "; ".join(refused) or "nothing in it looks like one"
        message = f"model: got {type(model).__name__} without an Inception block that can be converted ({found})"
        if strict:
            raise InceptionInputError(f"{message}; explain(model) says more, strict=False leaves it as it is")
        warnings.warn(message, FallbackWarning, stacklevel=2)
        return model
    if channels_last:
        to_channels_last(model)
    return model


def revert_(model: nn.Module) -> nn.Module:
    """Undoes :func:`convert_` in place: classes are what they were and, of weights that it brought into channels_last
    and that were not tied to others since, strides; values are what they are now."""
    check_model(model)
    shared = shared_storages(model)
    for module in model.modules():
        if isinstance(module, ConvertedBlock) and STATE in module.__dict__:
            release(module)
        for name, (shape, strides) in module.__dict__.pop(STRIDES, {}).items():
            parameter = module._parameters.get(name)
            if parameter is None or parameter.shape != shape or parameter.stride() == strides:
                continue
            if owns_storage(parameter, shared):
                before = torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)
                parameter.data = before.copy_(parameter.detach())
    return model


def try_block(module: nn.Module, original: type[nn.Module], roles: Roles) -> tuple[str | None, str]:
    """(activation, "") of a block that computes what its structure says, by its class's own forward; (None, why) of
    another. The block itself is not run and not changed."""
    try:
        with ExitStack() as stack:
            # Nothing of the caller's: neither its random numbers nor its device, modes and autocast.
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch.device("cpu"))
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            return _probe(_drawn_anew(module), original, roles)
    except Exception as error:  # whatever somebody's forward raises is a reason, reported in full
        return None, f"a copy of it cannot be tried: {type(error).__name__}: {error}"


def _random(shape: Sequence[int], seed: int) -> Tensor:
    """Normal random values in float32 on the CPU, whatever the defaults are."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")


def _drawn_anew(module: nn.Module) -> nn.Module:
    """A float32 copy on the CPU with random values, in which no zero weight, equal channel or fresh statistic hides a
    difference."""
    twin = copy.deepcopy(module).to_empty(device="cpu").to(torch.float32)
    seeds = itertools.count()

    def fill(t: Tensor | None, scale: float, shift: float = 0.0) -> None:
        if t is not None:
            t.copy_(_random(t.shape, next(seeds)) * scale + shift)

    for inner in twin.modules():
        if isinstance(inner, nn.Conv2d):
            fill(inner.weight, (2 / inner.weight[0].numel()) ** 0.5)
            fill(inner.bias, 0.3)
        elif isinstance(inner, nn.BatchNorm2d):
            fill(inner.weight, 0.5, 1.0)
            fill(inner.bias, 0.3)
            fill(inner.running_mean, 0.3)
            if inner.running_var is not None:
                inner.running_var.copy_(_random(inner.running_var.shape, next(seeds)).square() + 0.5)
    return twin


def _probe(twin: nn.Module, original: type[nn.Module], roles: Roles) -> tuple[str | None, str]:
    params = roles.params(twin)
    if roles.norms and any(norm.mean is None for norm in params.batch_norms):
        return None, f"{roles.norms[0]} keeps no running statistics"
    n, h, w = PROBE_SHAPE
    x = _random((n, params.weights[0].shape[1], h, w), 1)
    given, before = x.clone(), settings_of(twin)
    y = original.forward(twin.eval(), given)
    if not isinstance(y, Tensor):
        return None, f"its forward returns a {type(y).__name__}, wants a tensor"
    if not torch.equal(given, x):
        return None, "its forward writes into its input"
    errors = {}
    for activation in ACTIVATIONS:
        truth = inception_reference(x, params, activation)
        if y.shape != truth.shape:
            return None, f"its forward gives {tuple(y.shape)} from {tuple(x.shape)}, its structure {tuple(truth.shape)}"
        errors[activation] = ((y - truth).abs().max() / truth.square().mean().sqrt()).item()
    activation = min(errors, key=errors.__getitem__)
    if not errors[activation] < PROBE_LIMIT:
        relu, none = errors["relu"], errors[None]
        return None, (
            "its forward computes something else than its structure says: on a random input it is "
            f"{relu:.2g} of the RMS off with ReLU, {none:.2g} without"
        )
    why = _other_ways(twin, original, params, activation, x)
    if not why and settings_of(twin) != before:
        why = "its forward changes its attributes"
    return (None, why) if why else (activation, "")


def _other_ways(
    twin: nn.Module, original: type[nn.Module], params: InceptionParams, activation: str | None, x: Tensor
) -> str:
    """Where else a block that is right in float32 and eval mode computes something else; "" for nowhere."""
    for scale in PROBE_SCALES:
        y, truth = original.forward(twin, x * scale), inception_reference(x * scale, params, activation)
        if not (y - truth).abs().max() < PROBE_LIMIT * truth.square().mean().sqrt():
            return f"its forward computes something else on values of {scale:g}"
    y, random = original.forward(twin, x.clone()), torch.get_rng_state()
    twin.train()
    for norm in (inner for inner in twin.modules() if isinstance(inner, nn.BatchNorm2d)):
        norm.eval()
    trained = original.forward(twin, x.clone())
    if not isinstance(trained, Tensor) or not torch.equal(trained, y):
        return "it computes something else in training mode"
    if not torch.equal(random, torch.get_rng_state()):
        return "it draws random numbers in training mode"
    twin.eval()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = original.forward(twin, x.clone())
    half = original.forward(twin.to(torch.bfloat16), x.bfloat16())
    for found, where in ((cast, "under autocast to bfloat16"), (half, "from bfloat16")):
        if found.dtype != torch.bfloat16:
            return f"its forward gives {found.dtype} {where}"
    return ""


def to_channels_last(model: nn.Module) -> None:
    """Brings the weights of the convolutions there are into channels_last, but for those whose storage is not theirs
    alone; revert_() knows their strides before."""
    shared = shared_storages(model)
    before: dict[Tensor, tuple[torch.Size, tuple[int, ...]]] = {}
    with torch.inference_mode(False):
        for module in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
            for name, weight in module._parameters.items():
                if weight is None or not _is_plain(weight) or weight.dim() != 4:
                    continue
                ready = weight.is_contiguous(memory_format=torch.channels_last)
                if weight not in before and (ready or not owns_storage(weight, shared)):
                    continue
                # A parameter that two modules share has its strides noted in both.
                noted = before.setdefault(weight, (weight.shape, weight.stride()))
                module.__dict__.setdefault(STRIDES, {}).setdefault(name, noted)
                weight.data = weight.data.contiguous(memory_format=torch.channels_last)


def shared_storages(model: nn.Module) -> set[int]:
    """The storages that more than one of a model's parameters and buffers lie in."""
    owners = Counter(t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers()) if _is_plain(t))
    return {storage for storage, count in owners.items() if count > 1}


def owns_storage(t: Tensor, shared: set[int]) -> bool:
    """Whether moving a tensor into a new storage leaves nothing behind that it was tied to. shared: of its model."""
    if not _is_plain(t):
        return False
    storage = t.untyped_storage()
    # PyTorch calls every tensor on a GPU shared.
    elsewhere = storage._cdata in shared or (t.device.type == "cpu" and t.is_shared())
    return not elsewhere and storage.nbytes() == t.numel() * t.element_size() and 0 not in t.stride()


def _is_plain(t: Tensor) -> bool:
    """Neither a tensor subclass, whose storage is its own affair, nor without a size yet."""
    return not isinstance(t, nn.parameter.UninitializedTensorMixin) and type(t.data) is Tensor


def check_model(model: Any) -> None:
    """Raises InceptionInputError unless model is an nn.Module."""
    if not isinstance(model, nn.Module):
        raise InceptionInputError(f"model: got {type(model).__name__}, wants an nn.Module")
