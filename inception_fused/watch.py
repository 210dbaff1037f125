"""What a block's modules and their classes were at one moment, and whether that still holds.

    modules   the ``__dict__`` of each: plain containers by content, hooks and children too; ``training`` either way;
              the parameters of a convolution and those and the buffers of a BatchNorm are read at every call instead
    classes   the dictionary of every class along their MROs; of nn.Module the methods that a call goes through

The check of every call is one comparison of dictionaries a module and a class. Where it fails, :func:`changed` and
:meth:`Classes.patched` look at every name, to say what has changed, or that it is of no consequence. What an attribute
refers to without being plain (a tensor, an array, somebody's object) may change unseen: :func:`unwatchable` names it.
"""

from __future__ import annotations

import copy
import dataclasses
import enum
import logging
import os
import pathlib
import re
import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from inception_fused.structure import FORWARDS, HOOKS

MAX_ENTRIES = 32
"""Of a container that is compared at every call."""

MAX_DEPTH = 4
"""Of containers in containers."""

APART = {nn.Conv2d: {"_parameters"}, nn.BatchNorm2d: {"_parameters", "_buffers"}}
"""Dictionaries that are read at every call, by the kind of the module; elsewhere they have to stay empty."""

READ = {
    nn.Conv2d: {
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode",
        "transposed", "output_padding", "_reversed_padding_repeated_twice",
    },
    nn.BatchNorm2d: {"num_features", "eps", "momentum", "affine", "track_running_stats"},
    nn.MaxPool2d: {"kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"},
}  # fmt: skip
"""Attributes that whoever asks for the reason judges by their meaning, by the kind of the module."""

OURS = "_inception_fused"
"""How the names of this package's own attributes begin."""

FREE = {
    "training", "_modules", "_compiled_call_impl", "_is_torch_compile", "_is_full_backward_hook",
    "_non_persistent_buffers_set", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks_with_kwargs", "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
}  # fmt: skip
"""Names that :func:`changed` leaves to others, or that no forward reads."""

REPLICA = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "_former_parameters", "_is_replica"}
"""What DataParallel puts into the ``__dict__`` of a copy."""

METADATA = {
    "__doc__", "__annotations__", "__annotate__", "__annotate_func__", "__annotations_cache__", "__static_attributes__",
    "__firstlineno__", "__abstractmethods__", "_abc_impl", "__dict__", "__weakref__", "___needs_mutation_patch",
}  # fmt: skip
"""Names in a class's dictionary that no forward depends on; Python and torch.compile add some later."""

COMPILERS = {"__init__", "__setstate__", "__setattr__"}
"""Methods that torch.compile replaces by its own, in order to notice new modules and attributes."""

CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward", "__getattr__", "_compiled_call_impl")
"""Of nn.Module: what a call of a child goes through."""

IMMUTABLE = (
    bool, int, float, complex, str, bytes, type(None), type(...), range, slice, type, enum.Enum, torch.dtype,
    torch.device, torch.layout, torch.memory_format, torch.Size, types.FunctionType, re.Pattern, pathlib.PurePath,
    logging.Logger,
)  # fmt: skip

OWNERS = (types.ModuleType, type, type(None))
"""Of builtin functions that are no methods of an object."""

MAPPINGS = (dict, OrderedDict, defaultdict)
CONTAINERS = (*MAPPINGS, list, tuple, set, frozenset)

ABSENT = type("ABSENT", (), {"__repr__": lambda self: "not there"})()


class Classes:
    """The dictionaries of classes along MROs, as they were when this was made. A copy is the same object."""

    __slots__ = ("calls", "dictionaries")

    def __init__(self, kinds: Iterable[type], skipped: type = object) -> None:
        """kinds: whose MROs; skipped: whose subclasses nobody watches."""
        found: dict[type, dict[str, Any]] = {}
        for base in dict.fromkeys(base for kind in kinds for base in kind.__mro__):
            if base not in (object, nn.Module) and (skipped is object or not issubclass(base, skipped)):
                now = {name: value if name in METADATA else copied(value) for name, value in base.__dict__.items()}
                # One for all blocks.
                found[base] = _last[base] = _last[base] if _same(_last.get(base), now) else now
        self.dictionaries, self.calls = tuple(found.items()), _calls()

    def __deepcopy__(self, memo: dict[int, Any]) -> Classes:
        return self

    def hold(self) -> bool:
        """Whether they are as they were. False says nothing."""
        try:
            for kind, then in self.dictionaries:
                if kind.__dict__ != then:
                    return False
        except Exception:  # whatever a value's __eq__ raises, it is another
            return False
        return _calls() == self.calls

    def patched(self) -> str:
        """Which class is no longer what it was; "" where none."""
        for kind, then in self.dictionaries:
            now = kind.__dict__
            for name in {**then, **now}:
                value = now.get(name, ABSENT)
                if name in METADATA or _same(value, then.get(name, ABSENT)):
                    continue
                if not (name in COMPILERS and _is_torchs(value)):
                    return f"{kind.__name__}.{name} was replaced"
        for name, now, method in zip(CALLS, _calls(), self.calls, strict=True):
            # Symbolic tracing replaces two of them for its own time.
            if now is not method and not _is_torchs(now):
                return f"nn.Module.{name} was replaced"
        return ""


_last: dict[type, dict[str, Any]] = {}
"""The latest dictionary of every class."""


def _calls() -> tuple[Any, ...]:
    module = nn.Module
    return (
        module.__call__, module._wrapped_call_impl, module._call_impl, module._slow_forward, module.__getattr__,
        module._compiled_call_impl,
    )  # fmt: skip


class Seen:
    """The modules of a block, parents first, as they were when this was made. kinds: their classes.

    A copy is of the copied modules and the same classes; a pickle is empty, since another process has other classes.
    """

    __slots__ = ("before", "classes", "kinds", "modules")

    def __init__(self, modules: Iterable[nn.Module], skipped: type = object) -> None:
        """skipped: as for :class:`Classes`."""
        self.modules = tuple(modules)
        self.kinds = [type(module) for module in self.modules]
        both = [_in_both_modes(module) for module in self.modules]
        self.before = [before for before, _ in both], [before for _, before in both]
        self.classes = Classes(self.kinds, skipped)

    def __deepcopy__(self, memo: dict[int, Any]) -> Seen:
        memo[id(self)] = twin = Seen(())
        twin.modules, twin.before = copy.deepcopy(self.modules, memo), copy.deepcopy(self.before, memo)
        twin.kinds, twin.classes = self.kinds, self.classes
        return twin

    def __reduce__(self) -> tuple[Any, ...]:
        return Seen, ((),)

    def holds(self) -> bool:
        """Whether all is as it was. False says nothing."""
        try:
            now = [module.__dict__ for module in self.modules]
            # Mostly all modules are in one mode; one comparison of lists takes half as long as one of each pair.
            if now != self.before[now[0]["training"]]:
                for d, *before in zip(now, *self.before, strict=True):
                    if d != before[d["training"]]:
                        return False
        except Exception:  # whatever a value's __eq__ raises, it is another
            return False
        return list(map(type, self.modules)) == self.kinds and self.classes.hold()


def changed(module: nn.Module, before: dict[str, Any], *, hooks: bool = True) -> str:
    """Which attribute of a module is no longer what it was; "" for none, or one that is judged by its meaning.

    before: of one of the two lists in Seen.before. hooks: whether a hook counts.
    """
    d, read = module.__dict__, READ.get(type(module), ())
    for name in {**before, **d}:
        if name in FREE or name in read or name.startswith(OURS):
            continue
        if name in HOOKS:
            if hooks and d.get(name):
                return "has a hook or a forward of its own"
            continue
        if name in FORWARDS and name in d:
            return "has a hook or a forward of its own"
        if "_is_replica" in d and (name in REPLICA or name in ("_parameters", "_buffers")):
            continue
        now, then = d.get(name, ABSENT), before.get(name, ABSENT)
        if name in ("_parameters", "_buffers") and name in APART.get(type(module), ()):
            continue
        if not _same(now, then):
            if torch.compiler.is_compiling():
                return "its " + name + " is another"
            return f"its {name} is {now!r:.80}, was {then!r:.80}"
    return ""


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
    for inner_kind in {kind, *(type(inner) for inner in own if inner is not module)}:
        for base in inner_kind.__mro__:
            if base is object or base.__module__.partition(".")[0] in ("torch", "inception_fused"):
                continue
            for key, value in base.__dict__.items():
                if not key.startswith("__") and key not in METADATA and not hasattr(type(value), "__get__"):
                    why = _unwatchable_value(value, own)
                    if why:
                        return f"{base.__name__}.{key} {why}"
    return ""


def _unwatchable_value(value: Any, own: set[nn.Module], depth: int = 0) -> str:
    """What about an attribute's value can change unseen, in words that follow its name; "" where nothing can."""
    if isinstance(value, nn.Module) and value in own:
        return ""
    if isinstance(value, types.MethodType) and value.__self__ in own:
        return ""
    if isinstance(value, types.BuiltinFunctionType) and isinstance(
        value.__self__, (types.ModuleType, type, type(None))
    ):
        return ""
    if isinstance(value, IMMUTABLE):
        return ""
    if dataclasses.is_dataclass(value) and value.__dataclass_params__.frozen:
        fields = [getattr(value, field.name) for field in dataclasses.fields(value)]
        return next(filter(None, (_unwatchable_value(field, own, depth + 1) for field in fields)), "")
    if type(value) in CONTAINERS or (isinstance(value, tuple) and hasattr(value, "_fields")):
        if len(value) > MAX_ENTRIES or depth >= MAX_DEPTH:
            return f"is a {type(value).__name__} of more than {MAX_ENTRIES} entries or {MAX_DEPTH} levels"
        items = [*value.keys(), *value.values()] if isinstance(value, dict) else value
        return next(filter(None, (_unwatchable_value(item, own, depth + 1) for item in items)), "")
    return f"is or holds a {type(value).__name__}, which may change unseen"


def copied(value: Any) -> Any:
    """A plain container by content, which compares equal while that stays; anything else as it is."""
    if type(value) in MAPPINGS:
        return {key: copied(item) for key, item in value.items()}
    if type(value) is list:
        return [copied(item) for item in value]
    if type(value) is tuple:
        items = tuple([copied(item) for item in value])
        # The same object where it may be, which a comparison need not look into.
        return value if all(a is b for a, b in zip(items, value, strict=True)) else items
    return set(value) if type(value) is set else value


def _in_both_modes(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's ``__dict__`` in eval and in training mode."""
    apart = APART.get(type(module), ())
    kept = {name: value if name in apart else copied(value) for name, value in module.__dict__.items()}
    return kept | {"training": False}, kept | {"training": True}


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:  # whatever an __eq__ raises
        return False


TORCH = os.path.dirname(torch.__file__) + os.sep


def _is_torchs(function: Any) -> bool:
    """Whether PyTorch's own code defines a function."""
    return getattr(getattr(function, "__code__", None), "co_filename", "").startswith(TORCH)


def is_pristine(kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether what a call of these layers goes through is PyTorch's own."""
    return all(_is_torchs(getattr(kind, name)) for kind in kinds for name in FORWARDS if hasattr(kind, name))
