"""What a call does beside its output: everything outside a module that its code names, before and after.

    code       the forward, the functions, methods and properties that it names, and theirs; not PyTorch's or Python's
    places     globals, closures and class attributes of that code, and attributes of modules that it names
    objects    what those refer to, deeply: containers, tensors, arrays, attributes of objects
    process    random numbers, PyTorch's switches, what is printed, logged or warned

``with Effects(...) as effects`` puts all of it back at its end; ``effects.found`` then says in words what had changed.
"""

from __future__ import annotations

import builtins
import dis
import functools
import inspect
import io
import logging
import os
import random
import sys
import sysconfig
import threading
import types
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from inception_fused.errors import InceptionInputError
from inception_fused.watch import ABSENT, IMMUTABLE

MAX_OBJECTS = 10_000
"""Of what code refers to, entries of containers counted: 20 ms; what names more is not tried."""

STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
PACKAGES = ("torch", "numpy", "inception_fused")
"""Whose code is not followed, as Python's own."""

DUNDERS = ("__call__", "__getattr__", "__getattribute__", "__setattr__", "_call_impl", "_wrapped_call_impl")
"""Methods that a call reaches without naming them."""

SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "draws random numbers (PyTorch's)": (torch.get_rng_state, torch.set_rng_state),
    "draws random numbers (Python's)": (random.getstate, random.setstate),
    "changes the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "switches deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms,
    ),
    "changes the precision of matrix products": (
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision,
    ),
    "switches cudnn.benchmark": (
        lambda: torch.backends.cudnn.benchmark, lambda on: setattr(torch.backends.cudnn, "benchmark", on),
    ),
}  # fmt: skip


class Effects:
    """The state that the calls of a module can reach; see the file. found: what was changed, in words; "" for nothing.

    Raises InceptionInputError where the code refers to more than :data:`MAX_OBJECTS`, to an iterator or to a file.
    """

    def __init__(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """kind: the class whose forward is called, of which the module is an instance or was one."""
        self.found = ""
        self._kinds = [kind, *(type(inner) for inner in module.modules() if inner is not module)]
        self._places: list[tuple[Any, str, Any, str]] = []
        self._objects: dict[int, tuple[Any, Any, str]] = {}
        self._names: set[str] = set()
        self._functions: dict[int, types.FunctionType] = {}
        self._modules: dict[int, tuple[types.ModuleType, str]] = {}
        self._left = MAX_OBJECTS
        for inner_kind in dict.fromkeys(self._kinds):
            for name in ("forward", *DUNDERS):
                self._visit(inspect.getattr_static(inner_kind, name, None), name)
            for base in inner_kind.__mro__:
                self._visit(base, base.__name__)
        for inner in module.modules():
            for name, value in inner.__dict__.items():
                if callable(value) and not isinstance(value, nn.Module):
                    self._visit(value, name)
        # Attributes of modules by the names that the code has, which grow with the code.
        known = -1
        while known != len(self._names) + len(self._modules):
            known = len(self._names) + len(self._modules)
            for namespace, words in list(self._modules.values()):
                for name in self._names & set(namespace.__dict__):
                    self._place(namespace.__dict__, name, f"{words}.{name}")

    def __enter__(self) -> Effects:
        self._switches = {words: _frozen(get()) for words, (get, _) in _switches().items()}
        self._states = {words: get() for words, (get, _) in _switches().items()}
        self._ear = _Ear()
        self._ear.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._ear.__exit__(*error)
        self.found = self._ear.heard
        for words, (get, put) in _switches().items():
            if _frozen(get()) != self._switches[words]:
                self.found = self.found or words
                put(self._states[words])
        for owner, name, then, words in self._places:
            now = _get(owner, name)
            if not _same(now, then):
                self.found = self.found or f"changes {words}"
                _put(owner, name, then)
        for value, then, words in self._objects.values():
            if not _alike(_content(value), then):
                self.found = self.found or f"changes {words}"
                _restore(value, then)

    def _place(self, owner: Any, name: str, words: str) -> None:
        """owner: a dictionary, a class or a cell."""
        if any(known is owner and other == name for known, other, *_ in self._places):
            return
        value = _get(owner, name)
        self._places.append((owner, name, value, words))
        self._visit(value, words)

    def _reach(self, function: types.FunctionType) -> None:
        """A function's code, if it is neither PyTorch's nor Python's."""
        if id(function) in self._functions or _is_library(function.__code__.co_filename):
            return
        self._functions[id(function)] = function
        names, attributes = _names(function.__code__)
        fresh, self._names = attributes - self._names, self._names | attributes
        for name in sorted(names):
            if name in function.__globals__ or not hasattr(builtins, name):
                self._place(function.__globals__, name, f"the global {name}")
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._place(cell, "cell_contents", f"{name} of {function.__qualname__}")
        words = f"a default argument of {function.__qualname__}"
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(value, words)
        self._visit(function.__dict__, f"an attribute of {function.__qualname__}")
        for kind in dict.fromkeys(self._kinds):
            for name in sorted(fresh):
                self._visit(inspect.getattr_static(kind, name, None), name)

    def _visit(self, value: Any, words: str) -> None:
        if isinstance(value, (staticmethod, classmethod)):
            value = value.__func__
        if isinstance(value, types.FunctionType):
            self._reach(value)
        elif isinstance(value, property):
            for method in (value.fget, value.fset):
                self._visit(method, words)
        elif isinstance(value, (functools.partial, functools.partialmethod)):
            self._visit([value.func, value.args, value.keywords], words)
        elif isinstance(value, types.MethodType):
            self._visit(value.__func__, words)
            self._visit(value.__self__, words)
        elif isinstance(value, types.BuiltinFunctionType):
            self._visit(value.__self__, words)
        elif hasattr(value, "__wrapped__") and not isinstance(value, type):
            self._visit(value.__wrapped__, words)
        elif isinstance(value, weakref.ref):
            self._visit(value(), words)
        elif isinstance(value, types.ModuleType):
            if not _is_librarys(value.__name__):
                self._modules.setdefault(id(value), (value, words))
        elif isinstance(value, type):
            if not _is_librarys(value.__module__):
                for name in list(value.__dict__):
                    if not name.startswith("__") and not _is_code(value.__dict__[name]):
                        self._place(value, name, f"{value.__name__}.{name}")
        elif not isinstance(value, IMMUTABLE) and id(value) not in self._objects:
            self._keep(value, words)

    def _keep(self, value: Any, words: str) -> None:
        if isinstance(value, (Iterator, io.IOBase)):
            raise InceptionInputError(f"its forward names {words}, a {type(value).__name__}, which cannot be put back")
        content = _content(value)
        self._left -= 1 + (len(content) if isinstance(content, (list, dict)) else 0)
        if self._left < 0:
            raise InceptionInputError(
                f"its forward names more than {MAX_OBJECTS} objects, too many to compare: {words}"
            )
        self._objects[id(value)] = value, content, words
        for item in _items(content):
            self._visit(item, words)


def _names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """(globals, attributes) that code names, with the code inside it."""
    names, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.endswith(("_GLOBAL", "_NAME")):
            names.add(instruction.argval)
        elif instruction.opname.endswith(("_ATTR", "_METHOD")):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names, attributes = (a | b for a, b in zip((names, attributes), _names(constant), strict=True))
    return names, attributes


def _is_library(path: str) -> bool:
    """Whether a file of code belongs to Python or PACKAGES."""
    if path.startswith(STDLIB) and "site-packages" not in path:
        return True
    files = [sys.modules[name].__file__ or "" for name in PACKAGES if name in sys.modules]
    return path.startswith(("<frozen", *(os.path.dirname(file) + os.sep for file in files)))


def _is_librarys(name: str) -> bool:
    """Whether a module of that name does."""
    root = name.partition(".")[0]
    return root in sys.stdlib_module_names or root in PACKAGES


def _is_code(value: Any) -> bool:
    return isinstance(value, (types.FunctionType, staticmethod, classmethod, property, type)) or hasattr(
        type(value), "__get__"
    )


def _get(owner: Any, name: str) -> Any:
    if isinstance(owner, types.CellType):
        try:
            return owner.cell_contents
        except ValueError:  # an empty one
            return ABSENT
    return (owner.__dict__ if isinstance(owner, type) else owner).get(name, ABSENT)


def _put(owner: Any, name: str, value: Any) -> None:
    if isinstance(owner, dict):
        if value is ABSENT:
            owner.pop(name, None)
        else:
            owner[name] = value
    elif value is ABSENT:
        delattr(owner, name)
    else:
        setattr(owner, name, value)


def _content(value: Any) -> Any:
    """What of an object can change: a list or dictionary of what it refers to, a copy of numbers, or its words."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, Tensor) and not value.is_meta:
        return value.detach().clone()
    if isinstance(value, bytearray):
        return bytes(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return value.copy()
    if isinstance(value, random.Random):
        return value.getstate()
    slots = [s for base in type(value).__mro__ for s in _slots(base) if hasattr(value, s)]
    if slots or hasattr(value, "__dict__"):
        return {**{s: getattr(value, s) for s in slots}, **getattr(value, "__dict__", {})}
    return repr(value)


def _slots(base: type) -> Iterable[str]:
    slots = base.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else [s for s in slots if s not in ("__dict__", "__weakref__")]


def _items(content: Any) -> Iterable[Any]:
    if isinstance(content, dict):
        return content.values()
    return content if isinstance(content, list) else ()


def _alike(now: Any, then: Any) -> bool:
    if isinstance(then, dict):
        return list(now) == list(then) and all(_same(now[key], then[key]) for key in then)
    if isinstance(then, list):
        return len(now) == len(then) and all(_same(a, b) for a, b in zip(now, then, strict=True))
    if isinstance(then, Tensor):
        return now.shape == then.shape and _frozen(now) == _frozen(then)
    return _frozen(now) == _frozen(then)


def _same(a: Any, b: Any) -> bool:
    """Whether a name still refers to the same: numbers and strings by value, since they are made anew."""
    return a is b or (type(a) is type(b) and isinstance(a, IMMUTABLE) and (a == b or a != a))


def _restore(value: Any, then: Any) -> None:
    if isinstance(value, dict):
        value.clear()
        value.update(then)
    elif isinstance(value, list):
        value[:] = then
    elif isinstance(value, (set, deque)):
        value.clear()
        value.update(then) if isinstance(value, set) else value.extend(then)
    elif isinstance(value, Tensor):
        with torch.no_grad():
            value.resize_(then.shape).copy_(then) if value.shape != then.shape else value.copy_(then)
    elif isinstance(value, bytearray) or hasattr(value, "tobytes"):
        value[:] = then
    elif isinstance(value, random.Random):
        value.setstate(then)
    elif isinstance(then, dict):
        for name in set(getattr(value, "__dict__", ())) - set(then):
            del value.__dict__[name]
        for name, item in then.items():
            object.__setattr__(value, name, item)


def _frozen(value: Any) -> Any:
    """What can be compared with ``==``."""
    if isinstance(value, Tensor):
        return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    if hasattr(value, "tobytes"):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: _frozen(item) for key, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, tuple) else value


def _switches() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    if "numpy" not in sys.modules:
        return SWITCHES
    numpy = sys.modules["numpy"].random
    return SWITCHES | {"draws random numbers (NumPy's)": (numpy.get_state, numpy.set_state)}


class _Ear:
    """Hears what this thread prints, logs and warns, and keeps it from being seen. heard: the first of it, in words."""

    def __enter__(self) -> _Ear:
        self.heard, thread = "", threading.get_ident()
        ear = self

        class Stream(io.TextIOBase):
            def __init__(self, beneath: Any) -> None:
                self.beneath = beneath

            def write(self, text: str) -> int:
                if threading.get_ident() != thread:
                    return self.beneath.write(text)
                ear.heard = ear.heard or "prints"
                return len(text)

            def __getattr__(self, name: str) -> Any:
                return getattr(self.beneath, name)

        def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
            if threading.get_ident() != thread:
                return ear.call_handlers(logger, record)
            ear.heard = ear.heard or "logs"

        self.streams, self.call_handlers = (sys.stdout, sys.stderr), logging.Logger.callHandlers
        sys.stdout, sys.stderr = map(Stream, self.streams)
        logging.Logger.callHandlers = call_handlers
        self.warnings = warnings.catch_warnings(record=True)
        self.caught = self.warnings.__enter__()
        warnings.simplefilter("always")
        return self

    def __exit__(self, *error: object) -> None:
        self.warnings.__exit__(*error)
        logging.Logger.callHandlers = self.call_handlers
        sys.stdout, sys.stderr = self.streams
        if any(not _is_library(item.filename) for item in self.caught):
            self.heard = self.heard or "warns"
