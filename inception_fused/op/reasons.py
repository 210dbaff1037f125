"""Why no kernel runs here: every reason that speaks against it, in one order, in one set of words.

A warning, a KernelError, ``explain``, ``verify``, ``precompile``, ``info()`` and the commands give the first of them.
What speaks against a call comes before what the machine lacks, and what is cheap to find before a probe's launch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from inception_fused.block.batch_stats import takes_batch
from inception_fused.block.reference import InceptionParams, parameters_of
from inception_fused.errors import FallbackWarning, KernelError
from inception_fused.op.backends import ENVIRONMENT_VARIABLE, Backend, parse
from inception_fused.op.calls import PLAIN_SET, PLAIN_TENSORS
from inception_fused.runtime import caches, native, triton_versions
from inception_fused.runtime.failures import Failure, failure
from inception_fused.runtime.probing import remembered

MIN_CAPABILITY = (8, 0)
KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

KINDS = (
    "block", "backend", "subclass", "batch norm", "forward mode", "device", "dtype", "strict fp32", "extension",
    "triton", "size",
)  # fmt: skip
"""Of reasons, in their order."""

TOO_LARGE = "sizes beyond the 32-bit offsets inside a tile; split the batch"


class Reason(NamedTuple):
    """kind: one of KINDS. text: the reason, and the remedy where there is one."""

    kind: str
    text: str


class Question(NamedTuple):
    """What :func:`every` is asked about.

    block: what about a module keeps the kernels from standing in for its children, or None. x, params: of a call, as
    far as its tensors and the mode of autograd are to be judged too. too_large: whether its sizes are beyond what a
    tile's offsets can say (choice.exceeds_int32).
    """

    device: torch.device
    dtype: torch.dtype
    backend: Backend
    block: str | None = None
    x: Tensor | None = None
    params: InceptionParams | None = None
    too_large: bool = False

    @property
    def implementations(self) -> tuple[str, ...]:
        """Which must be able to run: every kernel has a Triton form, so where none is named it is that."""
        return self.backend.demands or ("triton",)


def every(device: torch.device, dtype: torch.dtype, backend: str = "auto", **more: Any) -> list[Reason]:
    """Every reason why no kernel, or none that the backend demands, runs; empty where they run.

    device: of x. dtype: in which the block computes. backend: what was asked for, as text. more: of a call or a module
    what else is to be judged, as :class:`Question` has it. May launch the probe of a device.
    """
    question = Question(device, dtype, parse(backend), **more)
    return [reason for source in (*CALL, *MACHINE, _size) if (reason := source(question)) is not None]


def first(device: torch.device, dtype: torch.dtype, backend: str = "auto", **more: Any) -> Reason | None:
    """The first of :func:`every`, looking for no further one.

    While torch.compile traces, the machine is not asked, which cannot be traced: the operator does so at run time.
    """
    question = Question(device, dtype, parse(backend), **more)
    return _first(CALL if torch.compiler.is_compiling() else (*CALL, *MACHINE, _size), question)


def machine_runs(device: torch.device, dtype: torch.dtype, backend: Backend) -> bool:
    """Whether the machine has nothing against it: what remains to be asked of a call that is as usual."""
    return _first(MACHINE, Question(device, dtype, backend)) is None


def _first(sources: tuple[Source, ...], question: Question) -> Reason | None:
    for source in sources:
        reason = source(question)
        if reason is not None:
            return reason
    return None


def refused(backend: str, reason: str) -> KernelError:
    """The error where a backend demands kernels that cannot run."""
    return KernelError(f'backend "{backend}" demands kernels that cannot run: {reason}')


def warn(reason: str, stacklevel: int) -> None:
    """The warning where a caller could have expected kernels. stacklevel: 1 is the line that calls this."""
    warnings.warn(f"the Inception block runs in eager PyTorch: {reason}", FallbackWarning, stacklevel=stacklevel + 1)


def _block(q: Question) -> Reason | None:
    return Reason("block", q.block) if q.block else None


def _backend(q: Question) -> Reason | None:
    return Reason("backend", "backend is eager") if q.backend.is_eager else None


def _subclass(q: Question) -> Reason | None:
    tensors = [q.x] if q.x is not None else []
    if q.params is not None:
        norms = [t for norm in q.params.batch_norms or () if norm for t in norm[:4] if t is not None]
        tensors += [*parameters_of(q.params), *norms]
    if set(map(type, tensors)) <= PLAIN_SET:
        return None
    kinds = {type(t).__name__ for t in tensors if type(t) not in PLAIN_TENSORS}
    return Reason("subclass", f"tensor subclass {', '.join(sorted(kinds))}")


def _batch_norm(q: Question) -> Reason | None:
    norms = q.params.batch_norms if q.params is not None else None
    if norms is None:
        return None
    fixed = [norm for norm in norms if norm is not None and norm.mean is not None]
    if torch.is_grad_enabled() and any(norm.mean.requires_grad or norm.var.requires_grad for norm in fixed):
        return Reason("batch norm", "a gradient of BatchNorm's mean or var is wanted")
    if not takes_batch(norms):
        return None
    if outlives_this_call() or transforming():
        return Reason("batch norm", "BatchNorm in training under torch.func, torch.export or torch.jit.trace")
    return None


def transforming() -> bool:
    """Whether a torch.func transform (vmap, grad, ...) is running, or is being traced by torch.compile.

    In the words that Dynamo folds rightly: to it a stack of interpreters is never empty.
    """
    return torch._C._are_functorch_transforms_active()


def outlives_this_call() -> bool:
    """Whether a graph keeps what this call does, of which gradients may be asked later or in another way than now.

    A Function in a graph of torch.export or torch.jit.trace is its bare operator, which has none; in one of
    torch.compile under a transform it has no rule for vmap, and torch.func looks through it.
    """
    if torch.compiler.is_compiling():
        return torch.compiler.is_exporting() or transforming()
    return torch._C._get_tracing_state() is not None


def _forward_mode(q: Question) -> Reason | None:
    if q.x is None or forward_ad._current_level < 0:
        return None
    return Reason("forward mode", "forward-mode differentiation")


def _device_of_auto(q: Question) -> Reason | None:
    """Without being told to, no kernel runs on another device, not even where Triton interprets."""
    if q.device.type == "cuda" or q.backend.demands_kernels:
        return None
    return Reason("device", _elsewhere(q.device, f"TRITON_INTERPRET=1 {ENVIRONMENT_VARIABLE}=kernels"))


def _device(q: Question) -> Reason | None:
    if q.device.type == "cuda" or not q.backend.demands_kernels:
        return None
    if q.device.type == "cpu" and (interpreting() or "triton" not in q.implementations):
        return None
    return Reason("device", _elsewhere(q.device, "TRITON_INTERPRET=1"))


def _elsewhere(device: torch.device, interpreter: str) -> str:
    if device.type != "cpu":
        return f"x is on {device}; kernels run on CUDA devices"
    return f"x is on the CPU; kernels run on a CUDA device, or on a CPU under {interpreter}"


def _dtype(q: Question) -> Reason | None:
    if q.dtype in KERNEL_DTYPES:
        return None
    if q.dtype == torch.float64 and q.device.type == "cpu" and "native" not in q.implementations:
        # The interpreter computes in it.
        return None
    return Reason("dtype", f"x is {q.dtype}; the kernels compute in float32 (as TF32), float16 and bfloat16")


def _strict_fp32(q: Question) -> Reason | None:
    if q.device.type != "cuda" or q.dtype != torch.float32 or tf32_allowed():
        return None
    return Reason(
        "strict fp32",
        "strict fp32: the kernels compute fp32 as TF32, which is switched off for convolutions; "
        'torch.backends.cudnn.conv.fp32_precision = "tf32" allows it',
    )


def _extension(q: Question) -> Reason | None:
    if "native" not in q.implementations or q.device.type not in ("cpu", "cuda"):
        return None
    why = native.why_no_extension(q.device)
    return None if why is None else Reason("extension", why)


def _triton(q: Question) -> Reason | None:
    if "triton" not in q.implementations or q.device.type != "cuda":
        return None
    why = why_no_triton(q.device.index if q.device.index is not None else torch.cuda.current_device())
    return None if why is None else Reason("triton", why)


def _size(q: Question) -> Reason | None:
    return Reason("size", TOO_LARGE) if q.too_large else None


Source = Callable[[Question], "Reason | None"]

CALL: tuple[Source, ...] = (_block, _backend, _subclass, _batch_norm, _forward_mode, _device_of_auto)
"""What a call itself says: the same on every machine, and traced by torch.compile."""

MACHINE: tuple[Source, ...] = (_device, _dtype, _strict_fp32, _extension, _triton)
"""What depends on the machine and its settings."""


@cache
def interpreting() -> bool:
    """Whether Triton is there and interprets kernels on the CPU (TRITON_INTERPRET=1 when it was imported)."""
    if find_spec("triton") is None:
        return False
    try:
        from triton import knobs
    except Exception:  # a broken one; on a GPU why_no_triton says what is wrong
        return False
    return bool(knobs.runtime.interpret)


def tf32_allowed() -> bool:
    """PyTorch's setting for fp32 convolutions on CUDA, in the words of PyTorch 2.9 and later or the older flag.

    Reading the old flag raises once the new per-operation settings differ from each other, so the new come first.
    """
    for level in (torch.backends.cudnn.conv, torch.backends.cudnn, torch.backends):
        precision = getattr(level, "fp32_precision", "none")
        if precision != "none":
            return precision == "tf32"
    return bool(torch.backends.cudnn.allow_tf32)


@remembered
def why_no_triton(index: int) -> Failure | str | None:
    """Why Triton cannot run on CUDA device ``index``: its age, Triton's absence or version, or what the probe met.

    Called, it returns None or the reason with its remedy as a string; asked again as probing.remembered() says.
    """
    if torch.version.hip is not None:
        return "this PyTorch is built for ROCm; the kernels are for NVIDIA GPUs"
    capability = torch.cuda.get_device_capability(index)
    if capability < MIN_CAPABILITY:
        name = torch.cuda.get_device_name(index)
        return f"{name} is sm_{capability[0]}{capability[1]}; the kernels need sm_80 (Ampere) or newer"
    if find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    try:
        import triton

        wrong = triton_versions.limit("wrong", triton.__version__, capability)
        if wrong is not None:
            return wrong
        caches.prepare()
        with torch.cuda.device(index):
            from inception_fused.kernels import probe

            probe.run()
    except Exception as error:  # whatever a toolchain raises is a reason
        return failure(error, "Triton cannot build or launch a kernel here")
    slow = triton_versions.limit("slow", triton.__version__, capability)
    if slow is not None:
        caches.warn_once(slow)
    return None
