"""What a block's modules and their classes were at one moment, and whether that still holds.

    modules   the ``__dict__`` of each: plain containers by content (watchable.py), hooks and children; ``training``
              in both modes; a convolution's parameters, a BatchNorm's and its buffers, are read at every call instead
    classes   the dictionary of every class along their MROs; of nn.Module the methods that a call goes through

The check of every call is one comparison of dictionaries a module and a class. Where it fails, :meth:`Seen.changed` and
:meth:`Classes.patched` look at every name, to say what has changed, or that it is of no consequence.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from inception_fused.modules.isolation import is_librarys
from inception_fused.modules.refusals import named
from inception_fused.modules.structure import FORWARDS, HOOKS
from inception_fused.modules.watchable import APART, DESCRIPTORS, FREE, METADATA, OURS, anatomy, copied

READ = {
    nn.Conv2d: {
        "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", "_reversed_padding_repeated_twice",
    },
    nn.BatchNorm2d: {"eps", "momentum"},
    nn.SyncBatchNorm: {"eps", "momentum"},
    nn.MaxPool2d: {"kernel_size", "stride", "padding", "dilation", "return_indices", "ceil_mode"},
}  # fmt: skip
"""Attributes that whoever asks for the reason judges by their meaning, by the kind of the module."""

REPLICA = {"weight", "bias", "running_mean", "running_var", "num_batches_tracked", "_former_parameters", "_is_replica"}
"""What DataParallel puts into the ``__dict__`` of a copy."""

COMPILERS = {"__init__", "__setstate__", "__setattr__"}
"""Methods that torch.compile replaces by its own, in order to notice new modules and attributes."""

CALLS = ("__call__", "_wrapped_call_impl", "_call_impl", "_slow_forward", "__getattr__", "_compiled_call_impl")
"""Of nn.Module: what a call of a child goes through."""

STANDARD = frozenset(nn.Module().__dict__)

ABSENT = type("ABSENT", (), {"__repr__": lambda self: "not there"})()


class Classes:
    """The dictionaries of classes along MROs, as they were when this was made. A copy is the same object."""

    __slots__ = ("anatomies", "calls", "dictionaries", "kinds", "mros", "skipped")

    def __init__(self, kinds: Iterable[type], skipped: type = object) -> None:
        """kinds: whose MROs; skipped: a class that nobody watches."""
        self.kinds, self.skipped = tuple(kinds), skipped
        self.renew()

    def renew(self) -> None:
        """Takes the classes as they are now for what they were."""
        found: dict[type, dict[str, Any]] = {}
        self.anatomies = []
        for base in dict.fromkeys(base for kind in self.kinds for base in kind.__mro__):
            if base in (object, nn.Module, self.skipped):
                continue
            if sys.version_info < (3, 14):
                base.__annotations__  # noqa: B018  Python makes an entry of it when somebody first asks
            now = {name: value if name in METADATA else copied(value) for name, value in base.__dict__.items()}
            # One for all blocks.
            found[base] = _last[base] = _last[base] if _same(_last.get(base), now) else now
            if not is_librarys(base.__module__):
                data = [n for n, v in base.__dict__.items() if not (n.startswith("__") or isinstance(v, DESCRIPTORS))]
                self.anatomies += [(base, name, anatomy(base.__dict__[name])) for name in data]
        self.mros = [(kind, kind.__mro__) for kind in dict.fromkeys(self.kinds) if not is_librarys(kind.__module__)]
        self.dictionaries = tuple(found.items())
        # Those that symbolic tracing puts there for its own time are gone when torch.compile asks.
        self.calls = tuple(then if _is_torchs(now, "fx") else now for then, now in zip(_first, _calls(), strict=True))

    def __deepcopy__(self, memo: dict[int, Any]) -> Classes:
        return self

    def hold(self) -> bool:
        """Whether they are as they were. False says nothing."""
        try:
            for kind, then in self.dictionaries:
                if kind.__dict__ != then:
                    return False
            for kind, name, then in self.anatomies:
                if anatomy(getattr(kind, name)) != then:
                    return False
            for kind, mro in self.mros:
                if kind.__mro__ != mro:
                    return False
        except Exception:  # whatever a value's __eq__ raises, it is another
            return False
        return _calls() == self.calls

    def fault(self) -> str | None:
        """Which class is no longer what it was, None where that is of no consequence, and need not be looked at
        again."""
        if self.hold():
            return None
        reason = self.patched() or None
        if reason is None and not torch.compiler.is_compiling():
            self.renew()
        return reason

    def patched(self) -> str:
        """Which class is no longer what it was; "" where none."""
        if torch.compiler.is_dynamo_compiling():
            # Which cannot look through a class's dictionary once it has seen another one change.
            return "" if self.hold() else "one of its layers' classes is another"
        for kind, mro in self.mros:
            if kind.__mro__ != mro:
                return f"{kind.__name__} has other bases"
        anatomies = {(kind, name): then for kind, name, then in self.anatomies}
        for kind, then in self.dictionaries:
            now = kind.__dict__
            for name in {**then, **now}:
                value, known = now.get(name, ABSENT), anatomies.get((kind, name))
                same = _same(value, then.get(name, ABSENT)) and known in (None, anatomy(value))
                if not (same or name in METADATA or (name in COMPILERS and _is_torchs(value))):
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


_first = _calls()


class Seen:
    """The modules of a block, parents first, as they were when this was made.

    kinds: their classes. before: their ``__dict__`` in eval and in training mode. orders: of those with several
    children, (place, names). anatomies: (place, name, anatomy) of attributes of modules that are not PyTorch's.
    A copy is of the copied modules and the same classes; a pickle is empty, since another process has other classes.
    """

    __slots__ = ("anatomies", "before", "classes", "kinds", "modules", "orders")

    def __init__(self, modules: Iterable[nn.Module], skipped: type = object) -> None:
        """skipped: as for :class:`Classes`."""
        self.modules = tuple(modules)
        self.kinds = [type(module) for module in self.modules]
        both = [_in_both_modes(module) for module in self.modules]
        self.before = [before for before, _ in both], [before for _, before in both]
        self.orders = [(i, list(m._modules)) for i, m in enumerate(self.modules) if len(m._modules) > 1]
        self.anatomies = [
            (i, name, anatomy(value))
            for i, module in enumerate(self.modules)
            if not is_librarys(type(module).__module__)
            for name, value in module.__dict__.items()
            if name not in STANDARD and not name.startswith(OURS)
        ]
        self.classes = Classes(self.kinds, skipped)

    def __deepcopy__(self, memo: dict[int, Any]) -> Seen:
        memo[id(self)] = twin = copy.copy(self)
        twin.modules, twin.before = copy.deepcopy(self.modules, memo), copy.deepcopy(self.before, memo)
        return twin

    def __copy__(self) -> Seen:
        twin = Seen(())
        for name in Seen.__slots__:
            setattr(twin, name, getattr(self, name))
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
            for i, order in self.orders:
                if list(now[i]["_modules"]) != order:
                    return False
            for i, name, then in self.anatomies:
                if anatomy(now[i][name]) != then:
                    return False
        except Exception:  # whatever a value's __eq__ raises, it is another
            return False
        return list(map(type, self.modules)) == self.kinds and self.classes.hold()

    def changed(self, place: int, module: nn.Module, *, hooks: bool = True) -> str:
        """Which attribute of the module in a place is no longer what it was; "" for none, or one that is judged by its
        meaning. hooks: whether a hook counts."""
        d, before, read = module.__dict__, self.before[0][place], READ.get(type(module), ())
        anatomies = {name: then for i, name, then in self.anatomies if i == place}
        for name in {**before, **d}:
            if name in FREE or name in read or name.startswith(OURS) or name in APART.get(type(module), ()):
                continue
            if name in HOOKS or name in FORWARDS:
                if name in FORWARDS or (hooks and d.get(name)):
                    return "has a hook or a forward of its own"
                continue
            if "_is_replica" in d and (name in REPLICA or name in ("_parameters", "_buffers")):
                continue
            now, then = d.get(name, ABSENT), before.get(name, ABSENT)
            if not _same(now, then) or (name in anatomies and anatomy(now) != anatomies[name]):
                if torch.compiler.is_dynamo_compiling():
                    return "its " + name + " is another"
                return f"its {name} is {_brief(now)}, was {_brief(then)}"
        for i, order in self.orders:
            if i == place and list(module._modules) != order and set(module._modules) == set(order):
                return "its layers are in another order"
        return ""


def _in_both_modes(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's ``__dict__`` in eval and in training mode."""
    apart = APART.get(type(module), ())
    kept = {name: value if name in apart else copied(value) for name, value in module.__dict__.items()}
    return kept | {"training": False}, kept | {"training": True}


def _brief(value: Any) -> str:
    """The beginning of a value's repr, in one line."""
    try:
        return " ".join(repr(value).split())[:80]
    except Exception:  # whatever a __repr__ raises
        return f"{named(type(value).__name__)} without a repr"


def _same(a: Any, b: Any) -> bool:
    try:
        return a is b or bool(a == b)
    except Exception:  # whatever an __eq__ raises
        return False


TORCH = os.path.dirname(torch.__file__) + os.sep


def _is_torchs(function: Any, folder: str = "") -> bool:
    """Whether PyTorch's own code defines a function, or that in one of its folders."""
    return getattr(getattr(function, "__code__", None), "co_filename", "").startswith(os.path.join(TORCH, folder))


def is_pristine(kinds: Sequence[type[nn.Module]]) -> bool:
    """Whether what a call of these layers goes through is PyTorch's own."""
    return all(_is_torchs(getattr(kind, name)) for kind in kinds for name in FORWARDS if hasattr(kind, name))
