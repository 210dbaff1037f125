"""Running somebody's code as if the process were not the caller's: what it must not meet, and what must not meet it."""

from __future__ import annotations

import contextvars
import io
import logging
import os
import sys
import sysconfig
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.nn.modules import module as nn_module
from torch.utils._python_dispatch import _disable_current_modes

from inception_fused.modules.structure import GLOBAL_HOOKS

_alone = threading.RLock()
"""Two at once would each take the other's streams and hooks for the process's own."""


STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
PACKAGES = ("torch", "numpy", "inception_fused")
"""Whose code is not followed, as Python's own."""


def isolated(run: Callable[..., Any], *args: Any) -> Any:
    """``run(*args)`` on the CPU with gradients on, free of the caller's random numbers, context variables, hooks on all
    modules, modes, default device, inference mode and autocast, on one thread."""

    def inside() -> Any:
        with _alone, ExitStack() as stack:
            stack.enter_context(_without_global_hooks())
            stack.enter_context(_one_thread())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            stack.enter_context(torch._C.DisableTorchFunction())  # modes too, of which a default device is one
            stack.enter_context(_disable_current_modes())
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.enable_grad())
            stack.enter_context(torch.autocast("cpu", enabled=False))
            # In the place of the caller's, of which only the innermost are asked.
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t))
            return run(*args)

    return contextvars.copy_context().run(inside)


@contextmanager
def _without_global_hooks() -> Iterator[None]:
    """Hooks on every module are for the caller's model, not for a copy."""
    hooks = [getattr(nn_module, name) for name in GLOBAL_HOOKS]
    kept = [dict(known) for known in hooks]
    for known in hooks:
        known.clear()
    try:
        yield
    finally:
        for known, before in zip(hooks, kept, strict=True):
            known.update(before)


@contextmanager
def _one_thread() -> Iterator[None]:
    """24 pixels gain nothing from a second thread, which beside other work took up to twenty times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class Ear:
    """Hears what this thread prints, logs and warns, and keeps it from being seen. heard: the first of it, in words."""

    def __enter__(self) -> Ear:
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

            @property
            def buffer(self) -> io.BytesIO:
                ear.heard = ear.heard or "prints"
                return io.BytesIO()

            def __getattr__(self, name: str) -> Any:
                return getattr(self.beneath, name)

        def call_handlers(logger: logging.Logger, record: logging.LogRecord) -> None:
            if threading.get_ident() != thread:
                return ear.call_handlers(logger, record)
            if logger.name.partition(".")[0] != "torch":
                ear.heard = ear.heard or "logs"

        self.streams, self.call_handlers = (sys.stdout, sys.stderr), logging.Logger.callHandlers
        sys.stdout, sys.stderr = map(Stream, self.streams)
        logging.Logger.callHandlers = call_handlers
        self.warnings = warnings.catch_warnings()
        self.warnings.__enter__()
        warnings.simplefilter("always")
        show = warnings.showwarning

        def show_warning(message: Any, category: Any, filename: str, *rest: Any, **more: Any) -> None:
            if threading.get_ident() != thread:
                return show(message, category, filename, *rest, **more)
            if not is_library(filename):
                ear.heard = ear.heard or "warns"

        warnings.showwarning = show_warning
        return self

    def __exit__(self, *error: object) -> None:
        self.warnings.__exit__(*error)
        logging.Logger.callHandlers = self.call_handlers
        sys.stdout, sys.stderr = self.streams


def is_library(path: str) -> bool:
    """Whether a file of code belongs to Python or PACKAGES."""
    if path.startswith(STDLIB) and "site-packages" not in path:
        return True
    files = [sys.modules[name].__file__ or "" for name in PACKAGES if name in sys.modules]
    return path.startswith(("<frozen", *(os.path.dirname(file) + os.sep for file in files)))


def is_librarys(name: str) -> bool:
    """Whether a Python module of that name does."""
    root = name.partition(".")[0]
    return root in sys.stdlib_module_names or root in PACKAGES
