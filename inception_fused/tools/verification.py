"""``verify(model, x)``: every fused block of a model on its real input, against float64 and beside eager PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.block.batch_stats import takes_batch
from inception_fused.block.reference import InceptionParams
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tolerance import Row
from inception_fused.block.views import row_stride
from inception_fused.op import backends, dispatch, reasons
from inception_fused.plan import choice, launches
from inception_fused.runtime.submit import count
from inception_fused.testing import parity
from inception_fused.tools.capture import Item, arguments, capture, quiet
from inception_fused.tools.environment import gpu_problem, versions
from inception_fused.tools.measuring import Costs, contenders, costs

PACKAGES = ("inception_fused", "torch", "triton")


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

    device: in words. versions: package -> version or None. backend: the one in force. backward: whether gradients
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
        from inception_fused.tools.report import text

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
        from inception_fused.tools.picture import draw

        draw(self, Path(path))


def verify(model: nn.Module, x: Tensor, *, backward: bool = True) -> Verification:
    """Check every fused block of a model on the input that it really gets, and measure it beside eager.

    model: a block or a model with blocks in it, in any mode; x: what ``model(x)`` takes, on the model's device.
    backward: whether gradients are checked too, all of them, whatever of them the model wants. A block with BatchNorm
    is checked in the mode in which it is: in training with the statistics of the batch, which are checked themselves.

    Runs ``model(x)`` once, without gradients, under the caller's :func:`inception_fused.backend` and autocast. Then,
    block by block: the error of each branch and gradient against float64, by :func:`inception_fused.testing.parity`;
    launches, memory and time as :mod:`inception_fused.tools.measuring` says. A block that no kernel ran is checked as
    eager PyTorch, and the result says so. The model is left as it was: mode, parameters and their gradients, buffers,
    hooks, PyTorch's random numbers. On CUDA, compiling takes a while and the peak statistics of memory are reset.

    Raises:
        InceptionInputError: a model without such a block, or an x with which it does not run.
        KernelError: the backend in force demands kernels that cannot run, or a launch failed.
    """
    blocks = arguments(model, x, backward)
    return check(capture(model, blocks, x), x.device, backward=backward)


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
    return Verification(describe(device), versions(PACKAGES), backends.current(), backward, tuple(notes), rows)


def describe(device: torch.device) -> str:
    """A device in words."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (CUDA {torch.version.cuda})"
    if device.type != "cpu":
        return str(device)
    threads = torch.get_num_threads()
    return f"CPU with {threads} thread{'s' * (threads != 1)}"


def _report(item: Item, backward: bool) -> BlockReport:
    name, block, x = item[:3]
    if x is None:
        return BlockReport(name, None, None, "not checked", item.why)
    dtype, shape = item.dtype, tuple(x.shape)
    reason = block.eager_reason()
    if reason is not None:
        why = f"{reason}, so it runs its own children; what they compute is not this package's"
        return BlockReport(name, shape, dtype, "not checked", why)
    if x.numel() == 0 or not x.isfinite().all():
        why = "its input is empty" if x.numel() == 0 else "its input has values that are infinite or NaN"
        return BlockReport(name, shape, dtype, "not checked", why)
    pair = contenders(block, x, item.autocast)
    path, why = _path(pair.fused.infer, x, dtype, block.params())
    with item.autocasting():
        rows = tuple(parity(block, x, backward=backward))
    found = costs(pair, x.device, backward=backward, timed=path != "interpreted")
    return BlockReport(name, shape, dtype, path, why, rows, found)


def _path(call: Callable[[], object], x: Tensor, dtype: torch.dtype, params: InceptionParams) -> tuple[str, str]:
    """Which path one forward takes, as it shows itself by what it launches."""
    backend = backends.current()
    with count() as made:
        call()
    if made:
        table = launches.table_of(params.weights, normed=takes_batch(params.batch_norms))
        used = {row.kernel.name for rows in table.rows.values() for row in rows}
        choices = dispatch.choices(backend, x.device, dtype).items()
        return (
            "interpreted" if x.device.type == "cpu" else "kernels",
            ", ".join(f"{kernel} {form}" for kernel, form in choices if kernel in used),
        )
    shape = BlockShape.of(x, params.weights)
    too_large = choice.exceeds_int32(shape, row_stride(x) or shape.c)
    reason = reasons.first(x.device, dtype, backend, x=x, params=params, too_large=too_large)
    # None where a list names every kernel as eager.
    return "eager", reason.text if reason is not None else f"backend is {backend}"


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
