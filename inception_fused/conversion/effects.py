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
import io
import random
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from inception_fused.conversion.content import alike, content_of, frozen, items_of, restore, same
from inception_fused.errors import InceptionInputError
from inception_fused.modules.isolation import Ear, is_library, is_librarys
from inception_fused.modules.watch import ABSENT
from inception_fused.modules.watchable import DESCRIPTORS, IMMUTABLE

MAX_OBJECTS = 10_000
"""Of what code refers to, entries of containers counted: 17 ms; what names more is not tried."""

IMPLIED = ("forward", "backward", "setup_context", "_call_impl", "_wrapped_call_impl")
"""Methods that a call reaches without naming them, beside those with two underscores."""

DYNAMIC = {"globals", "locals", "vars", "eval", "exec", "__import__"}

CUDNN = ("enabled", "benchmark", "deterministic")

SWITCHES: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "draws random numbers (PyTorch's)": (torch.get_rng_state, torch.set_rng_state),
    "draws random numbers (Python's)": (random.getstate, random.setstate),
    "changes the default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "switches deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda mode: torch.use_deterministic_algorithms(mode[0], warn_only=mode[1]),
    ),
    "switches anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "changes the precision of matrix products": (
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision,
    ),
    "switches cuDNN": (
        lambda: tuple(getattr(torch._C, f"_get_cudnn_{name}")() for name in CUDNN),
        lambda on: [getattr(torch._C, f"_set_cudnn_{name}")(value) for name, value in zip(CUDNN, on, strict=True)],
    ),
}  # fmt: skip


class Effects:
    """The state that the calls of a module can reach; see the file. found: what was changed, in words; "" for nothing.

    Raises InceptionInputError where the code refers to more than :data:`MAX_OBJECTS`, to an iterator or to a file.
    """

    def __init__(self, module: nn.Module, kind: type[nn.Module]) -> None:
        """kind: the class whose forward is called, of which the module is an instance or was one."""
        self.found = ""
        self._kinds: dict[type, None] = {}
        self._places: dict[tuple[int, str], tuple[Any, str, Any, str]] = {}
        self._objects: dict[int, tuple[Any, Any, str]] = {}
        self._names: set[str] = set()
        self._functions: dict[int, types.FunctionType] = {}
        self._modules: dict[int, tuple[types.ModuleType, str]] = {}
        self._left = MAX_OBJECTS
        for inner_kind in (kind, *(type(inner) for inner in module.modules() if inner is not module)):
            self._add(inner_kind)
        for inner in module.modules():
            for name, value in inner.__dict__.items():
                if callable(value) and not isinstance(value, nn.Module):
                    self._visit(value, name)
        # Attributes of modules and classes by the names that the code has, which grow with the code; new ones too.
        known = -1
        while known != len(self._names) + len(self._modules) + len(self._kinds):
            known = len(self._names) + len(self._modules) + len(self._kinds)
            for namespace, words in list(self._modules.values()):
                for name in sorted(self._names):
                    self._place(namespace.__dict__, name, f"{words}.{name}")
            for base in dict.fromkeys(base for kind in list(self._kinds) for base in _own_bases(kind)):
                for name in sorted(self._names - set(base.__dict__)):
                    self._place(base, name, f"{base.__name__}.{name}")

    def __enter__(self) -> Effects:
        self._switches = {words: frozen(get()) for words, (get, _) in _switches().items()}
        self._states = {words: get() for words, (get, _) in _switches().items()}
        self._ear = Ear()
        self._ear.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._ear.__exit__(*error)
        self.found = self._ear.heard
        for words, (get, put) in _switches().items():
            if frozen(get()) != self._switches[words]:
                self.found = self.found or words
                put(self._states[words])
        for owner, name, then, words in self._places.values():
            if not same(_get(owner, name), then):
                self._back(words, _put, owner, name, then)
        for value, then, words in self._objects.values():
            if not alike(content_of(value), then):
                self._back(words, restore, value, then)

    def _back(self, words: str, put: Callable[..., None], *args: Any) -> None:
        self.found = self.found or f"changes {words}"
        try:
            put(*args)
        except Exception as error:  # whatever somebody's object raises; the others have to be put back
            self.found = f"changes {words}, which cannot be put back: {type(error).__name__}: {error}"

    def _place(self, owner: Any, name: str, words: str) -> None:
        """owner: a dictionary, a class or a cell."""
        if (id(owner), name) not in self._places:
            value = _get(owner, name)
            self._places[id(owner), name] = owner, name, value, words
            self._visit(value, words)

    def _add(self, kind: type) -> None:
        """A class whose methods the code may call: those that it names, and those that Python calls by itself."""
        if kind not in self._kinds:
            self._kinds[kind] = None
            for base in _own_bases(kind):
                self._visit(base, base.__name__)
                for name, value in list(base.__dict__.items()):
                    if name in IMPLIED or name in self._names or (name.startswith("__") and name != "__init__"):
                        self._visit(value, name)

    def _reach(self, function: types.FunctionType) -> None:
        """A function's code, if it is neither PyTorch's nor Python's."""
        if id(function) in self._functions:
            return
        self._functions[id(function)] = function
        if is_library(function.__code__.co_filename):
            # A decorator of Python's or PyTorch's round somebody's function.
            inside = [getattr(function, "__wrapped__", None), *(_get(cell, "") for cell in function.__closure__ or ())]
            for value in inside:
                if isinstance(value, types.FunctionType):
                    self._reach(value)
            return
        names, attributes = _names(function.__code__)
        if names & DYNAMIC:
            raise InceptionInputError(f"its forward uses {min(names & DYNAMIC)}(), which may reach anything")
        fresh, self._names = attributes - self._names, self._names | attributes
        for name in names & set(sys.modules):  # imported by it
            self._visit(sys.modules[name], name)
        for name in sorted(names):
            if name in function.__globals__ or not hasattr(builtins, name):
                self._place(function.__globals__, name, f"the global {name}")
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self._place(cell, "cell_contents", f"{name} of {function.__qualname__}")
        words = f"a default argument of {function.__qualname__}"
        for value in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()):
            self._visit(value, words)
        self._visit(function.__dict__, f"an attribute of {function.__qualname__}")
        everything = "getattr" in names
        for kind in list(self._kinds):
            for base in _own_bases(kind):
                for name, value in list(base.__dict__.items()):
                    if name in fresh or (everything and isinstance(value, types.FunctionType)):
                        self._visit(value, name)

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
        elif isinstance(value, functools._lru_cache_wrapper):
            self._visit(value.__wrapped__, words)
        elif isinstance(value, weakref.ref):
            self._visit(value(), words)
        elif isinstance(value, types.ModuleType):
            if not is_librarys(value.__name__):
                self._modules.setdefault(id(value), (value, words))
        elif isinstance(value, type):
            if not is_librarys(value.__module__):
                for name, item in list(value.__dict__.items()):
                    if not name.startswith("__") and not isinstance(item, DESCRIPTORS):
                        self._place(value, name, f"{value.__name__}.{name}")
                self._add(value)
        elif not isinstance(value, IMMUTABLE) and id(value) not in self._objects:
            self._keep(value, words)

    def _keep(self, value: Any, words: str) -> None:
        if isinstance(value, (Iterator, io.IOBase)):
            raise InceptionInputError(f"its forward names {words}, a {type(value).__name__}, which cannot be put back")
        content = content_of(value)
        self._left -= 1 + (len(content) if isinstance(content, (list, dict)) else 0)
        if self._left < 0:
            raise InceptionInputError(
                f"its forward names more than {MAX_OBJECTS} objects, too many to compare: {words}"
            )
        self._objects[id(value)] = value, content, words
        if not is_librarys(type(value).__module__):
            self._add(type(value))
        for item in items_of(content):
            self._visit(item, words)


def _names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """(globals, attributes) that code names, with the code inside it."""
    names, attributes = set(), set()
    for instruction in dis.get_instructions(code):
        if instruction.opname.endswith(("_GLOBAL", "_NAME")):
            names.add(instruction.argval)
        elif instruction.opname.endswith(("_ATTR", "_METHOD", "_FROM")):
            attributes.add(instruction.argval)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names, attributes = (a | b for a, b in zip((names, attributes), _names(constant), strict=True))
    return names, attributes


def _own_bases(kind: type) -> list[type]:
    """The classes along an MRO that are somebody's own."""
    return [base for base in kind.__mro__ if not is_librarys(base.__module__)]


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


def _switches() -> dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]]:
    if "numpy" not in sys.modules:
        return SWITCHES
    numpy = sys.modules["numpy"].random
    return SWITCHES | {"draws random numbers (NumPy's)": (numpy.get_state, numpy.set_state)}
