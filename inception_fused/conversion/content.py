"""What of an object can change: taken, compared and put back; containers, tensors, arrays, generators of random numbers
and whatever has attributes."""

from __future__ import annotations

import array
import contextvars
import random
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from inception_fused.errors import InceptionInputError
from inception_fused.modules.watch import ABSENT
from inception_fused.modules.watchable import IMMUTABLE


def content_of(value: Any) -> Any:
    """What of an object can change: a list or dictionary of what it refers to, a copy of numbers, or its words."""
    if isinstance(value, dict):
        return dict(value)
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return list(value)
    if isinstance(value, Tensor) and not value.is_meta and value.layout is torch.strided:
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, torch.Generator):
        return value.get_state()
    if isinstance(value, bytearray):
        return bytes(value)
    if isinstance(value, array.array):
        return value[:]
    if hasattr(value, "tobytes") and type(value).__module__ == "numpy":
        return value.copy()
    if type(value).__module__.startswith("numpy.random"):
        return value.bit_generator.state if hasattr(value, "bit_generator") else value.get_state()
    if isinstance(value, random.Random):
        return value.getstate()
    if isinstance(value, contextvars.ContextVar):
        return [value.get(ABSENT)]
    slots = [s for base in type(value).__mro__ for s in _slots(base) if hasattr(value, s)]
    if slots or hasattr(value, "__dict__"):
        return {**{s: getattr(value, s) for s in slots}, **getattr(value, "__dict__", {})}
    return repr(value)


def _slots(base: type) -> Iterable[str]:
    slots = base.__dict__.get("__slots__", ())
    return [slots] if isinstance(slots, str) else [s for s in slots if s not in ("__dict__", "__weakref__")]


def items_of(content: Any) -> Iterable[Any]:
    if isinstance(content, dict):
        return content.values()
    return content if isinstance(content, list) else ()


def alike(now: Any, then: Any) -> bool:
    if isinstance(then, dict):
        return list(now) == list(then) and all(same(now[key], then[key]) for key in then)
    if isinstance(then, list):
        return len(now) == len(then) and all(same(a, b) for a, b in zip(now, then, strict=True))
    if isinstance(then, Tensor):
        alike_apart = now.shape == then.shape and now.requires_grad == then.requires_grad
        return alike_apart and frozen(now) == frozen(then)
    return frozen(now) == frozen(then)


def same(a: Any, b: Any) -> bool:
    """Whether a name still refers to the same: numbers and strings by value, since they are made anew."""
    return a is b or (type(a) is type(b) and isinstance(a, IMMUTABLE) and (a == b or a != a))


def restore(value: Any, then: Any) -> None:
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
        value.requires_grad_(then.requires_grad)
    elif isinstance(value, (bytearray, array.array)) or hasattr(value, "tobytes"):
        value[:] = then
    elif isinstance(value, random.Random):
        value.setstate(then)
    elif hasattr(value, "bit_generator"):
        value.bit_generator.state = then
    elif hasattr(value, "set_state"):
        value.set_state(then)
    elif isinstance(value, contextvars.ContextVar):
        pass  # which the caller's context has as ever
    elif isinstance(then, dict):
        for name in set(getattr(value, "__dict__", ())) - set(then):
            del value.__dict__[name]
        put = setattr if isinstance(value, threading.local) else object.__setattr__
        for name, item in then.items():
            put(value, name, item)
    else:
        raise InceptionInputError(f"a {type(value).__name__} has nothing to be set")


def frozen(value: Any) -> Any:
    """What can be compared with ``==``."""
    if isinstance(value, Tensor):
        return value.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b""
    if hasattr(value, "tobytes"):
        return value.tobytes()
    if isinstance(value, dict):
        return {key: frozen(item) for key, item in value.items()}
    return tuple(map(frozen, value)) if isinstance(value, tuple) else value
