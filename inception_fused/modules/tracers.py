"""Who traces a block: when a graph of torch.fx is to have its layers instead of one call, and what TorchScript gets."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from inspect import getclosurevars, unwrap
from types import FunctionType
from typing import Any

import torch
from torch import nn

from inception_fused.errors import InceptionInputError
from inception_fused.op import backends, reasons
from inception_fused.op.backends import parse

KEEPERS = "torch.export, torch.compile and torch.jit.trace keep the kernels"


def wants_layers(x: torch.fx.Proxy) -> bool:
    """Whether the symbolic trace that x comes from is to show a block's layers: under backend("eager"), and where
    torch.ao.quantization looks for layers to quantize.

    Raises KernelError in the latter where the backend demands kernels.
    """
    backend = backends.current()
    if parse(backend).is_eager:
        return True
    quantization = sys.modules.get("torch.ao.quantization.fx.tracer")
    if quantization is None or not isinstance(x.tracer, quantization.QuantizationTracer):
        return False
    if parse(backend).demands_kernels:
        raise reasons.refused(
            backend, 'torch.ao.quantization takes the layers of a block; prepare the model under backend("auto")'
        )
    return True


def refuse_script(module: nn.Module) -> None:
    """For a module whose forward TorchScript cannot compile."""
    raise InceptionInputError(
        f"torch.jit.script: got a {type(module).__name__}, whose forward TorchScript cannot compile; {KEEPERS}"
    )


def announce_script(module: nn.Module) -> None:
    """Says that TorchScript compiles a block's own forward, where one could have expected kernels: a FallbackWarning on
    CUDA, a KernelError where the backend demands them."""
    backend = backends.current()
    if parse(backend).demands_kernels:
        raise reasons.refused(backend, f"torch.jit.script compiles a block's own forward; {KEEPERS}")
    if not parse(backend).is_eager and any(p.is_cuda for p in module.parameters()):
        reasons.warn(f"torch.jit.script compiles its own forward; {KEEPERS}", stacklevel=3)


def with_names_of(function: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """A function with the globals of another, whose source TorchScript compiles in its place, and with what that one
    closes over. It must read no global itself."""
    original = unwrap(original)
    if not isinstance(original, FunctionType):
        return function
    names = original.__globals__
    if original.__closure__:
        names = {**names, **getclosurevars(original).nonlocals}
    return FunctionType(function.__code__, names, function.__name__, function.__defaults__, function.__closure__)


def in_place_of(original: Callable[..., Any], run: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    """run as the forward of a class in the place of its parent's: of the original's signature, and for TorchScript of
    its source. run: what is computed of the module and its input."""

    def forward(self: nn.Module, input: Any) -> Any:
        return run(self, input)

    return wraps(original)(with_names_of(forward, original))
