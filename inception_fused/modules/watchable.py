"""What can be told to be another later: which values of an attribute are plain, and their copies and anatomy.

A number, a string, a function or a class is what it is. A plain container is compared by content. What refers to
anything else (a tensor, an array, somebody's object) may change unseen, and :func:`unwatchable` names it.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import logging
import numbers
import pathlib
import re
import sys
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from inception_fused.modules.isolation import is_librarys
from inception_fused.modules.structure import HOOKS, NORMS

MAX_ENTRIES = 32
"""Of a container that is compared at every call."""

MAX_DEPTH = 4
"""Of containers in containers."""

APART = {nn.Conv2d: {"_parameters"}, **{norm: {"_parameters", "_buffers"} for norm in NORMS}}
"""Dictionaries that are read at every call, by the kind of the module; elsewhere they have to stay empty."""

OURS = "_inception_fused"
"""How the names of this package's own attributes begin."""

FREE = {
    "training", "_modules", "_compiled_call_impl", "_is_torch_compile", "_is_full_backward_hook",
    "_non_persistent_buffers_set", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks", "_is_fsdp_managed_module", "_fsdp_use_orig_params",
}  # fmt: skip
"""Names that :func:`changed` leaves to others, or that no forward reads."""

METADATA = {
    "__doc__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__",
    "__firstlineno__", "__abstractmethods__", "_abc_impl", "__dict__", "__weakref__", "___needs_mutation_patch",
}  # fmt: skip
"""Names in a class's dictionary that no forward depends on; Python and torch.compile add some later."""

IMMUTABLE = (
    numbers.Number, str, bytes, type(None), type(...), range, slice, type, enum.Enum, torch.dtype, torch.device,
    torch.layout, torch.memory_format, torch.Size, types.FunctionType, types.MethodDescriptorType,
    types.WrapperDescriptorType, types.GenericAlias, types.UnionType, torch._ops.OpOverload,
    torch._ops.OpOverloadPacket, re.Pattern, pathlib.PurePath, logging.Logger,
)  # fmt: skip

OWNERS = (types.ModuleType, type, type(None))
"""Of builtin functions that are no methods of an object."""

MAPPINGS = (dict, OrderedDict, defaultdict)
CONTAINERS = (*MAPPINGS, list, tuple, set, frozenset)

DESCRIPTORS = (
    types.FunctionType, property, staticmethod, classmethod, functools.cached_property, functools.partialmethod,
    functools.singledispatchmethod, types.GetSetDescriptorType, types.BuiltinFunctionType, types.MethodDescriptorType,
)  # fmt: skip
"""Of a class: what is code and keeps nothing for an instance outside its ``__dict__``."""

PLAIN_MODULES = ("collections", "types", "array", "builtins", "queue", "weakref", "contextvars")
"""Modules of Python whose objects are data. An object of another one (a lock, a counter of ids) beside a class's
methods is none that a forward computes with."""


def unwatchable(module: nn.Module, kind: type[nn.Module]) -> str:
    """Which attribute of a block, its children or their classes may change unseen; "" where none. kind: the block's
    class before any conversion."""
    own = set(module.modules())
    for name, inner in module.named_modules():
        where = f"{name}'s" if name else "its"
        for key in ("_parameters", "_buffers"):
            extra = [n for n in inner.__dict__[key] if key not in APART.get(type(inner), ())]
            if extra:
                return f"{where} {extra[0]} is a parameter or buffer beside the convolutions'"
        for key, value in inner.__dict__.items():
            if not (key in FREE or key in HOOKS or key in ("_parameters", "_buffers") or key.startswith(OURS)):
                why = _unwatchable_value(value, own)
                if why:
                    return f"{where} {key} {why}"
    kinds = dict.fromkeys((kind, *(type(inner) for inner in own if inner is not module)))
    bases = dict.fromkeys(base for inner in kinds for base in inner.__mro__ if not is_librarys(base.__module__))
    return next(filter(None, map(_unwatchable_class, bases)), "")


def _unwatchable_class(kind: type) -> str:
    for key, value in kind.__dict__.items():
        if key.startswith("__") or key in METADATA or isinstance(value, DESCRIPTORS):
            continue
        if hasattr(type(value), "__get__"):
            return f"{kind.__name__}.{key} is a {type(value).__name__}, which may keep values of its own"
        root = type(value).__module__.partition(".")[0]
        if root in sys.stdlib_module_names and root not in PLAIN_MODULES:
            continue
        why = _unwatchable_value(value, set())
        if why:
            return f"{kind.__name__}.{key} {why}"
    return ""


def _unwatchable_value(value: Any, own: set[nn.Module], depth: int = 0, frozen: bool = False) -> str:
    """What about an attribute's value can change unseen, in words that follow its name; "" where nothing can. frozen:
    inside of what is compared as a whole, where a container would not be compared by content."""

    def first(items: Iterable[Any], frozen: bool = frozen) -> str:
        return next(filter(None, (_unwatchable_value(item, own, depth + 1, frozen) for item in items)), "")

    if isinstance(value, enum.Enum):
        return first([value.value], frozen=True)
    if isinstance(value, IMMUTABLE) or type(value).__module__ == "typing":
        return ""
    if isinstance(value, nn.Module) and value in own:
        return ""
    if isinstance(value, types.MethodType) and value.__self__ in own:
        return ""
    if isinstance(value, types.BuiltinFunctionType) and isinstance(value.__self__, OWNERS):
        return ""
    if type(value) is functools.partial:
        return first([value.func, *value.args, *value.keywords.values()], frozen=True)
    if dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen and value.__dataclass_params__.eq:
        fields = dataclasses.fields(value)
        if all(field.compare for field in fields):
            return first([getattr(value, field.name) for field in fields], frozen=True)
    if type(value) in (tuple, frozenset) or (type(value) in CONTAINERS and not frozen) or hasattr(value, "_fields"):
        if len(value) > MAX_ENTRIES or depth >= MAX_DEPTH:
            return f"is a {type(value).__name__} of more than {MAX_ENTRIES} entries or {MAX_DEPTH} levels"
        return first([*value.keys(), *value.values()] if isinstance(value, dict) else value)
    return f"is or holds a {type(value).__name__}, which may change unseen"


def copied(value: Any) -> Any:
    """A plain container by content, which compares equal while that stays; anything else as it is."""
    if type(value) in MAPPINGS:
        return {key: copied(item) for key, item in value.items()}
    if type(value) is list:
        return [copied(item) for item in value]
    if isinstance(value, tuple):
        items = tuple([copied(item) for item in value])
        # The same object where it may be, which a comparison need not look into.
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return set(value) if type(value) is set else value


def anatomy(value: Any) -> Any:
    """The types of a value and of its content, and the order of its keys: what ``==`` does not ask."""
    if type(value) in MAPPINGS:
        return type(value), tuple(value), tuple([anatomy(item) for item in value.values()])
    if isinstance(value, (list, tuple)):
        return type(value), tuple([anatomy(item) for item in value])
    return type(value)
