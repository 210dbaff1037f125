"""``convert(model)``: the Inception blocks of anybody's model run the kernels, and ``revert_`` undoes it.

Structure proposes (structure.py), a probe decides: a copy of the block with weights drawn anew computes a small random
input in float32, once by its own forward and once by the reference; a block that differs keeps its class. Parameters
stay the same objects, state_dict keeps its keys in their order.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from inception_fused import dispatch
from inception_fused.adapter import STATE, ConvertedBlock, adopt, release, view_of
from inception_fused.errors import FallbackWarning, InceptionInputError
from inception_fused.explanation import Explanation, Row
from inception_fused.module import FusedInception
from inception_fused.reference import ACTIVATIONS, inception_reference
from inception_fused.structure import Roles, candidates, is_lazy, layer

STRIDES = "_inception_fused_strides"
"""The attribute of a module whose parameters were brought into channels_last: their names and strides before."""

PROBE_SHAPE = (2, 5, 6)
"""N, H, W of the probe's input: odd, and no square, so that no transposition hides."""

PROBE_LIMIT = 1e-4
"""Largest error over the RMS: two orders of summation in float32 differ by 3e-6 at 832 channels, a ReLU by 0.5."""


def convert(model: nn.Module, *, strict: bool = False, channels_last: bool = True) -> nn.Module:
    """A copy of the model whose Inception blocks run the kernels; see :func:`convert_`."""
    _check_model(model)
    return convert_(copy.deepcopy(model), strict=strict, channels_last=channels_last)


def convert_(model: nn.Module, *, strict: bool = False, channels_last: bool = True) -> nn.Module:
    """Converts the model's Inception blocks in place and returns the model.

    A block becomes an instance of a subclass of its class: same Parameter objects, same state_dict. What looks like a
    block and is not converted is named by :func:`explain`, with the reason. A block whose parameters wait for their
    first input (LazyConv2d) is tried after it. channels_last: bring all convolutions' weights into that memory format,
    in which the blocks compute and return.

    Raises:
        InceptionInputError: model is no nn.Module; with ``strict``, nothing in it was converted or is a FusedInception.
    Warns FallbackWarning in the latter case without ``strict``.
    """
    _check_model(model)
    refused = []
    for name, module, proposal in list(candidates(model)):
        if view_of(module) is not None:
            continue
        activation, why = None, proposal.why
        known = True
        if proposal.roles is not None:
            known = not is_lazy([layer(module, conv) for conv in proposal.roles.convs])
            activation, why = try_block(module, type(module), proposal.roles) if known else (None, "")
        if why:
            refused.append(f"{name or type(module).__name__}: {why}")
        else:
            adopt(module, proposal.roles, activation, known=known, channels_last=channels_last)
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
    """Undoes :func:`convert_` in place: classes and strides are what they were, values what they are now."""
    _check_model(model)
    for module in model.modules():
        if isinstance(module, ConvertedBlock):
            release(module)
        for name, strides in module.__dict__.pop(STRIDES, {}).items():
            parameter = module._parameters.get(name)
            if parameter is not None and len(strides) == parameter.dim():
                before = torch.empty_strided(parameter.shape, strides, dtype=parameter.dtype, device=parameter.device)
                parameter.data = before.copy_(parameter.detach())
    return model


def explain(model: nn.Module) -> Explanation:
    """Every Inception block of a model, and everything that looks like one: what runs it, or why the kernels do not.

    Raises InceptionInputError if model is no nn.Module.
    """
    _check_model(model)
    rows = []
    for name, module, proposal in candidates(model):
        view, kind = view_of(module), type(module).__name__
        if view is None:
            why = proposal.why or try_block(module, type(module), proposal.roles)[1]
            what = "" if why else _words(module, proposal.roles)
            rows.append(Row(name, kind, "not converted", what, why or "convert_(model) converts it"))
            continue
        native = isinstance(view, FusedInception)
        what = "built with FusedInception" if native else _words(module, module.__dict__[STATE].roles)
        state = "fused" if native else "converted"
        reason = view.eager_reason() or _device_obstacle(module)
        rows.append(Row(name, kind, state, what, f"eager: {reason}" if reason else "kernels"))
    return Explanation(tuple(rows))


def _device_obstacle(module: nn.Module) -> str | None:
    parameter = next(module.parameters())
    wish = dispatch.current()
    if wish == "eager":
        return "backend is eager"
    if dispatch.demands_kernels(wish):
        return dispatch.refusal(wish, parameter.device, parameter.dtype)
    if not parameter.is_cuda:
        return f"it is on {parameter.device}; kernels run on a CUDA device"
    return dispatch.obstacle(parameter.device, parameter.dtype)


def _words(module: nn.Module, roles: Roles) -> str:
    side = layer(module, roles.convs[4]).kernel_size[0]
    return f"{side}x{side} in branch 3" + (", BatchNorm" if roles.norms else "")


def try_block(module: nn.Module, original: type[nn.Module], roles: Roles) -> tuple[str | None, str]:
    """(activation, "") of a block that computes what its structure says, by its class's own forward; (None, why) of
    another. The block itself is not run and not changed."""
    try:
        with torch.random.fork_rng(devices=[]), torch.no_grad(), torch.autocast("cpu", enabled=False):
            return _probe(_drawn_anew(module), original, roles)
    except Exception as error:  # whatever somebody's forward raises is a reason, reported in full
        return None, f"a copy of it cannot be tried: {type(error).__name__}: {error}"


def _drawn_anew(module: nn.Module) -> nn.Module:
    """A float32 copy on the CPU with random values, in which no zero weight, equal channel or fresh statistic hides a
    difference."""
    with torch.random.fork_rng(devices=[]):
        twin = copy.deepcopy(module).to_empty(device="cpu").to(torch.float32)
    generator = torch.Generator().manual_seed(0)

    def fill(t: Tensor | None, scale: float, shift: float = 0.0) -> None:
        if t is not None:
            t.copy_(torch.randn(t.shape, generator=generator) * scale + shift)

    for inner in twin.modules():
        if isinstance(inner, nn.Conv2d):
            fill(inner.weight, (2 / inner.weight[0].numel()) ** 0.5)
            fill(inner.bias, 0.3)
        elif isinstance(inner, nn.BatchNorm2d):
            fill(inner.weight, 0.5, 1.0)
            fill(inner.bias, 0.3)
            fill(inner.running_mean, 0.3)
            if inner.running_var is not None:
                inner.running_var.copy_(torch.rand(inner.running_var.shape, generator=generator) + 0.5)
    return twin


def _probe(twin: nn.Module, original: type[nn.Module], roles: Roles) -> tuple[str | None, str]:
    n, h, w = PROBE_SHAPE
    x = torch.randn((n, layer(twin, roles.convs[0]).in_channels, h, w), generator=torch.Generator().manual_seed(1))
    y = original.forward(twin.eval(), x.clone())
    if not isinstance(y, Tensor):
        return None, f"its forward returns a {type(y).__name__}, wants a tensor"
    params = roles.params(twin)
    if roles.norms and any(norm.mean is None for norm in params.batch_norms):
        return None, f"{roles.norms[0]} keeps no running statistics"
    found = []
    for activation in ACTIVATIONS:
        truth = inception_reference(x, params, activation)
        if y.shape != truth.shape:
            return None, f"its forward gives {tuple(y.shape)} from {tuple(x.shape)}, its structure {tuple(truth.shape)}"
        error = ((y - truth).abs().max() / truth.square().mean().sqrt()).item()
        found.append(error)
        if error < PROBE_LIMIT:
            if not roles.norms and not torch.equal(original.forward(twin.train(), x.clone()), y):
                return None, "it computes something else in training mode"
            return activation, ""
    return None, (
        "its forward computes something else than its structure says: on a random input it is "
        f"{found[0]:.2g} of the RMS off with ReLU, {found[1]:.2g} without"
    )


def to_channels_last(model: nn.Module) -> None:
    """Brings the weights of all convolutions there are into channels_last; revert_() knows their strides before."""
    before: dict[Tensor, tuple[int, ...]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            lazy = isinstance(parameter, nn.parameter.UninitializedParameter)
            if parameter is None or lazy or parameter.dim() != 4:
                continue
            # A parameter that two modules share has its strides noted in both.
            strides = before.setdefault(parameter, parameter.stride())
            module.__dict__.setdefault(STRIDES, {}).setdefault(name, strides)
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise InceptionInputError(f"model: got {type(model).__name__}, wants an nn.Module")
