"""What the caller asks for: ``backend(...)``, INCEPTION_FUSED_BACKEND, and their text as a :class:`Backend`.

The text is "auto" (kernels where they can run, eager PyTorch elsewhere), "kernels" (kernels or KernelError), "eager",
or a list such as "K1=triton,K3=eager" for single kernels, the others as in "auto". It passes through the operators'
schemas as it is; :func:`parse` reads it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch

from inception_fused.errors import InceptionInputError
from inception_fused.plan.choice import COMPILED, IMPLEMENTATIONS, KERNELS

ENVIRONMENT_VARIABLE = "INCEPTION_FUSED_BACKEND"
WHOLE = ("auto", "kernels", "eager")

EXAMPLE = f"{COMPILED[0]}=native,{COMPILED[-1]}=eager"
WANTS = f'wants "auto", "kernels", "eager" or a list such as "{EXAMPLE}" of {", ".join(KERNELS)}'


class Backend(NamedTuple):
    """What was asked for.

    text: in its normal form. kernels: kernel -> "native", "triton" or "eager", of those that were named; "eager" names
    all. demands: the implementations that must be able to run, "native", "triton" or both.
    """

    text: str
    kernels: Mapping[str, str]
    demands: tuple[str, ...]

    @property
    def is_eager(self) -> bool:
        """Whether eager PyTorch was asked for, by that word."""
        return self.text == "eager"

    @property
    def demands_kernels(self) -> bool:
        """Whether at least one kernel of this package must run, so that it is an error where it cannot."""
        return self.demands != ()

    def asks_eager(self, kernel: str) -> bool:
        """Whether the caller asked for a kernel's ATen twin, hence does not want to hear of it."""
        return self.kernels.get(kernel) == "eager"


_known: dict[str, Backend] = {}


@torch.compiler.assume_constant_result
def parse(text: object, source: str = "backend") -> Backend:
    """What a text asks for. source: where it came from, for the error. A text that is known costs a lookup, and
    torch.compile does not trace this.

    Raises:
        InceptionInputError: on what is no such text.
    """
    found = _known.get(text) if isinstance(text, str) else None
    if found is None:
        found = _known[text] = _parse(text, source)
    return found


def _parse(given: object, source: str) -> Backend:
    if not isinstance(given, str):
        raise InceptionInputError(f"{source}: got {given!r}, {WANTS}")
    text = given.replace(" ", "")
    if text in WHOLE:
        kernels = dict.fromkeys(KERNELS, "eager") if text == "eager" else {}
        return Backend(text, kernels, ("triton",) if text == "kernels" else ())
    chosen: dict[str, str] = {}
    for item in text.split(","):
        kernel, _, choice = item.partition("=")
        if kernel not in KERNELS or kernel in chosen:
            raise InceptionInputError(f"{source}: got {given!r}, wrong at {item!r}; {WANTS}")
        if choice not in IMPLEMENTATIONS[kernel]:
            known = " or ".join(IMPLEMENTATIONS[kernel])
            raise InceptionInputError(f"{source}: got {given!r}, wrong at {item!r}: {kernel} can be {known}; {WANTS}")
        chosen[kernel] = choice
    kernels = {kernel: chosen[kernel] for kernel in KERNELS if kernel in chosen}
    text = ",".join(f"{kernel}={choice}" for kernel, choice in kernels.items())
    return Backend(text, kernels, tuple(sorted(set(kernels.values()) - {"eager"})))


class _InForce(threading.local):
    """Not a ContextVar: torch.compile guards on an attribute of a thread-local, but cannot trace ContextVar.get."""

    text: str | None = None


_in_force = _InForce()
_from_environment = os.environ.get(ENVIRONMENT_VARIABLE) or "auto"


def current() -> str:
    """The backend in force, in its normal form: the innermost :func:`backend` of this thread, else the environment's,
    else "auto"."""
    text = _in_force.text
    return text if text is not None else parse(_from_environment, ENVIRONMENT_VARIABLE).text


@contextmanager
def backend(spec: str) -> Iterator[None]:
    """Within it every block of this thread runs as ``spec`` says; backward passes follow their forward's.

    Activation checkpointing runs a forward again during backward, under the backend in force then: hold both passes
    inside one ``backend(...)``, or set the environment variable, which every thread sees.

    Raises:
        InceptionInputError: on a spec that is none of "auto", "kernels", "eager", "K1=native,K3=eager,...".
    """
    outer, _in_force.text = _in_force.text, parse(spec).text
    try:
        yield
    finally:
        _in_force.text = outer
