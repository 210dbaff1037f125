"""``convert(model)``: the Inception blocks of anybody's model run the kernels, and ``revert_`` undoes it.

Structure proposes (modules/structure.py), a trial of a copy decides (trial.py); a block that does anything else than
its layers say keeps its class. Parameters stay the same objects, state_dict keeps its keys in their order.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import nn

from inception_fused.conversion.channels_last import STRIDES, owns_storage, shared_storages, to_channels_last
from inception_fused.conversion.converted import ConvertedBlock, adopt, converted_class, release
from inception_fused.conversion.fused_blocks import view_of
from inception_fused.conversion.inspection import STATE, is_stale
from inception_fused.conversion.trial import try_block
from inception_fused.errors import FallbackWarning, InceptionInputError
from inception_fused.modules.structure import candidates, is_lazy, layer, propose


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
            if not isinstance(module, ConvertedBlock):
                continue
            module.__dict__[STATE].channels_last |= channels_last
            if not is_stale(module):
                continue
            release(module)
            proposal = propose(module)
        why, roles = proposal.why, proposal.roles
        if not why:
            known = not is_lazy([layer(module, conv) for conv in roles.convs])
            activation, why = try_block(module, type(module), roles, converted_class) if known else (None, "")
        if not why:
            try:
                adopt(module, roles, activation, known=known, channels_last=channels_last)
            except Exception as error:  # whatever a class that refuses to be subclassed raises
                why = f"no subclass of {type(module).__name__} serves it: {type(error).__name__}: {error}"
        if why:
            refused.append(f"{name or type(module).__name__}: {why}")
    if not any(view_of(module) is not None for module in model.modules()):
        reasons = "; ".join(refused) or "nothing in it looks like one"
        message = f"model: got {type(model).__name__} without an Inception block that can be converted ({reasons})"
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


def check_model(model: Any) -> None:
    """Raises InceptionInputError unless model is an nn.Module whose modules can be listed."""
    if not isinstance(model, nn.Module):
        raise InceptionInputError(f"model: got {type(model).__name__}, wants an nn.Module")
    try:
        list(model.modules())
    except Exception as error:  # of a module whose __init__ called no super().__init__(), or whatever it overrides
        got = f"model: got {type(model).__name__} whose modules cannot be listed"
        raise InceptionInputError(f"{got}: {type(error).__name__}: {error}") from error
