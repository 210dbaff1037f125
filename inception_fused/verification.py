"""``verify(model, x)``: every fused block of a model on its real input, against float64 and beside eager PyTorch."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inception_fused import dispatch
from inception_fused.adapter import blocks_of, view_of
from inception_fused.environment import gpu_problem, versions
from inception_fused.errors import FallbackWarning, InceptionInputError, KernelError
from inception_fused.function import compute_dtype
from inception_fused.kernels.submit import count
from inception_fused.measuring import Costs, contenders, costs
from inception_fused.module import Block
from inception_fused.testing import Row, parity

PACKAGES = ("inception_fused", "torch", "triton")


class Item(NamedTuple):
    """A block with what it was called with: its name, its input (None where the model did not call it), autocast's
    dtype there, and whether a gradient of the input is wanted."""

    name: str
    block: Block
    x: Tensor | None
    autocast: torch.dtype | None = None
    x_grad: bool = False


class BlockReport(NamedTuple):
    """What was found of one block.

    x_shape, dtype: of its input, and in which it computes; None where it was not called. path: "kernels",
    "interpreted", "eager", or "not checked"; why: what ran, or why no kernel did. parity: the rows of
    :func:`inception_fused.testing.parity`; costs: see there. Both are empty where the block was not checked.
    """

    name: str
    x_shape: tuple[int, ...] | None
    dtype: torch.dtype | None
    path: str
    why: str
    parity: tuple[Row, ...] = ()
    costs: Costs | None = None

    @property
    def checked(self) -> bool:
        return bool(self.parity)

    @property
    def ok(self) -> bool:
        """Whether no slice and no gradient is beyond its bound."""
        return all(row.ok for row in self.parity)

    @property
    def worst(self) -> Row:
        """The slice or gradient that is nearest to its bound, or farthest beyond it."""
        return max(self.parity, key=lambda row: (not row.ok, row.decisive.ratio))


@dataclass(frozen=True)
class Verification:
    """The result of :func:`verify`: ``print`` shows it as tables of at most 120 columns.

    device: in words. versions: package -> version or None. backend: the wish in force. backward: whether gradients
    were checked. notes: sentences on what was left out and on the machine. rows: one :class:`BlockReport` a block.
    """

    device: str
    versions: dict[str, str | None]
    backend: str
    backward: bool
    notes: tuple[str, ...]
    rows: tuple[BlockReport, ...]

    @property
    def ok(self) -> bool:
        """Whether something was checked and nothing is beyond its bound."""
        return any(row.checked for row in self.rows) and all(row.ok for row in self.rows)

    @property
    def dtypes(self) -> str:
        return ", ".join(sorted({str(row.dtype).removeprefix("torch.") for row in self.rows if row.dtype}))

    def __str__(self) -> str:
        from inception_fused.report import text

        return text(self)

    def to_json(self) -> dict[str, Any]:
        """Everything as data ready for ``json.dumps``; a figure that is no finite number becomes None."""
        blocks = []
        for row in self.rows:
            fields = {name: value for name, value in row._asdict().items() if name not in ("parity", "costs")}
            fields |= {"ok": row.ok if row.checked else None, "worst": row.worst.what if row.checked else None}
            fields["parity"] = [r._asdict() | {"ok": r.ok, "ratio": r.decisive.ratio} for r in row.parity]
            blocks.append(fields | {"costs": row.costs})
        facts = {name: getattr(self, name) for name in ("ok", "device", "versions", "backend", "backward", "notes")}
        return _plain(facts | {"blocks": blocks})

    def save_picture(self, path: str | Path) -> None:
        """Draw errors, launches, memory and time of every block into a file; its suffix says of which kind.

        Raises:
            InceptionInputError: matplotlib is not installed, or does not know the suffix.
        """
        from inception_fused.picture import draw

        draw(self, Path(path))


def verify(model: nn.Module, x: Tensor, *, backward: bool = True) -> Verification:
    """Check every :class:`FusedInception` of a model on the input that it really gets, and measure it beside eager.

    model: a block or a model with blocks in it, in any mode; x: what ``model(x)`` takes, on the model's device.
    backward: whether gradients are checked too, all 13, whatever of them the model wants.

    Runs ``model(x)`` once, without gradients, under the caller's :func:`inception_fused.backend` and autocast. Then,
    block by block: the error of each branch and gradient against float64, by :func:`inception_fused.testing.parity`;
    launches, memory and time as :mod:`inception_fused.measuring` says. A block that no kernel ran is checked as
    eager PyTorch, and the result says so. The model is left as it was: mode, parameters and their gradients, buffers,
    hooks, PyTorch's random numbers. On CUDA, compiling takes a while and the peak statistics of memory are reset.

    Raises:
        InceptionInputError: a model without such a block, or an x with which it does not run.
        KernelError: the backend in force demands kernels that cannot run, or a launch failed.
    """
    blocks = arguments(model, x, backward)
    return check(capture(model, blocks, x), x.device, backward=backward)


def arguments(model: object, x: object, backward: object) -> dict[str, nn.Module]:
    """The blocks of a model, after a look at what :func:`verify` and its like are given. Raises InceptionInputError."""
    if not isinstance(model, nn.Module):
        raise InceptionInputError(f"model: got {type(model).__name__}, wants an nn.Module with FusedInception blocks")
    if not isinstance(x, Tensor):
        raise InceptionInputError(f"x: got {type(x).__name__}, wants a tensor that model(x) takes")
    if not isinstance(backward, bool):
        raise InceptionInputError(f"backward: got {backward!r}, wants True or False")
    blocks = blocks_of(model)
    if not blocks:
        raise InceptionInputError(
            f"model: got {type(model).__name__} without any FusedInception in it, wants at least one; "
            "build its blocks with FusedInception(in_channels, c1, c2, c3, c4), or take GoogLeNet()"
        )
    return blocks


def capture(model: nn.Module, blocks: dict[str, nn.Module], x: Tensor, *, gradients: bool = False) -> list[Item]:
    """Run model(x) once and keep a copy of the input of each block's first call. Leaves the model as it was.

    gradients: whether the model runs as for a backward, which shows whether an input wants a gradient; what autograd
    would save for that is thrown away at once.
    """
    found: dict[nn.Module, tuple[Tensor, torch.dtype | None, bool]] = {}

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("x")
        if block not in found and isinstance(given, Tensor):
            kind = given.device.type
            on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
            found[block] = _copy(given), torch.get_autocast_dtype(kind) if on else None, given.requires_grad

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if gradients:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda _: None))
        stack.enter_context(_unchanged(model, x))
        for block in blocks.values():
            handle = block.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        if "torch._dynamo" in sys.modules:
            # A compiled model would run without the hooks.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(quiet())
        try:
            model(x)
        except (InceptionInputError, KernelError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise InceptionInputError(
                f"x: got shape {tuple(x.shape)}, {x.dtype} on {x.device}, with which model(x) fails: {error}; "
                "wants an input of the model's shape, dtype and device"
            ) from error
    return [Item(name, view_of(block), *found.get(block, (None, None, False))) for name, block in blocks.items()]


def check(
    items: Sequence[Item],
    device: torch.device,
    *,
    backward: bool,
    progress: Callable[[Sequence[Item]], Iterable[Item]] = iter,
) -> Verification:
    """Check and measure each item. progress: what is wrapped round the items while they are gone through."""
    with torch.inference_mode(False), quiet():
        rows = tuple(_report(item, backward) for item in progress(items))
    notes = []
    if any(row.path == "interpreted" for row in rows):
        notes.append("time is left out: that of interpreted kernels is the interpreter's and says nothing of a GPU")
    if device.type == "cpu" and (problem := gpu_problem()):
        notes.append(problem)
    return Verification(describe(device), versions(PACKAGES), dispatch.current(), backward, tuple(notes), rows)


def describe(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    return f"CPU with {torch.get_num_threads()} threads" if device.type == "cpu" else str(device)


def _report(item: Item, backward: bool) -> BlockReport:
    name, block, x, autocast, _ = item
    if x is None:
        return BlockReport(name, None, None, "not checked", "model(x) did not call it")
    with torch.autocast(x.device.type, dtype=autocast) if autocast else nullcontext():
        dtype = compute_dtype(x)
    shape = tuple(x.shape)
    obstacle = block.eager_reason()
    if obstacle is not None:
        why = f"{obstacle}, so it runs its own children; what they compute is not this package's"
        return BlockReport(name, shape, dtype, "not checked", why)
    if x.numel() == 0 or not x.isfinite().all():
        why = "its input is empty" if x.numel() == 0 else "its input has values that are infinite or NaN"
        return BlockReport(name, shape, dtype, "not checked", why)
    pair = contenders(block, x, autocast)
    path, why = _path(pair.fused.infer, x, dtype)
    with torch.autocast(x.device.type, dtype=autocast) if autocast else nullcontext():
        rows = tuple(parity(block, x, backward=backward))
    found = costs(pair, x.device, backward=backward, timed=path != "interpreted")
    return BlockReport(name, shape, dtype, path, why, rows, found)


def _path(call: Callable[[], object], x: Tensor, dtype: torch.dtype) -> tuple[str, str]:
    """Which path one forward takes, as it shows itself: by what it launches and what it warns of."""
    wish = dispatch.current()
    with warnings.catch_warnings(record=True) as caught, count() as launches:
        warnings.simplefilter("always", FallbackWarning)
        call()
    if launches:
        choices = dispatch.choices(wish, x.device, dtype)
        return (
            "interpreted" if x.device.type == "cpu" else "kernels",
            ", ".join(f"{kernel} {choice}" for kernel, choice in choices.items()),
        )
    if wish == "eager":
        return "eager", "backend is eager"
    if x.device.type == "cpu":
        return (
            "eager",
            f"x is on the CPU; to interpret them (slow): TRITON_INTERPRET=1 {dispatch.ENVIRONMENT_VARIABLE}=kernels",
        )
    warned = [str(item.message) for item in caught if issubclass(item.category, FallbackWarning)]
    reason = warned[0].partition(": ")[2] if warned else dispatch.obstacle(x.device, dtype)
    return "eager", reason or f"x is on {x.device}"


@contextmanager
def quiet() -> Iterator[None]:
    """Without FallbackWarnings: the result says what they say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


@contextmanager
def _unchanged(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Puts back PyTorch's random state and every buffer, the object as well as its values."""
    devices = {t.device.index for t in (x, *model.parameters(), *model.buffers()) if t.is_cuda}
    buffers = [(m, name, t, t.clone()) for m in model.modules() for name, t in m._buffers.items() if t is not None]
    with torch.random.fork_rng(devices=sorted(devices)):
        try:
            yield
        finally:
            for module, name, buffer, values in buffers:
                module._buffers[name] = buffer
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def _copy(x: Tensor) -> Tensor:
    """x with its strides, those of a slice of channels too; a copy, since the model may go on to write into it."""
    x = x.detach()
    if type(x) is not Tensor or 0 in x.stride():
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)


def _plain(value: Any) -> Any:
    """value in dicts, lists, strings, finite numbers and None."""
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
