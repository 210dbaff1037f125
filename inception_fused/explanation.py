"""``explain(model)``: what runs each Inception block of a model, or why the kernels do not; with an input, how long.

    floor       max(FLOP / peak, bytes / bandwidth) of the block as one ideal kernel              floors.py
    predicted   this package's launches with the plan's tiles, or as they were timed by tuning    forecast.py
    measured    a call of the block as it is now, on the input that it gets                       measuring.py

On a GPU the ceilings are measured there. Elsewhere floor and prediction are those of the reference card.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inception_fused import dispatch, tuned
from inception_fused.adapter import STATE, variant, view_of
from inception_fused.conversion import check_model, try_block
from inception_fused.errors import InceptionInputError
from inception_fused.floors import H200, Ceilings, block_work
from inception_fused.forecast import forecast
from inception_fused.function import compute_dtype
from inception_fused.kernels.views import is_ready
from inception_fused.measuring import Contender, clock
from inception_fused.module import Block, FusedInception
from inception_fused.progress import progress
from inception_fused.reference import InceptionParams
from inception_fused.report import figure_of, table
from inception_fused.shapes import BlockShape
from inception_fused.structure import HOOKS, candidates
from inception_fused.timing import measure_ceilings, stopwatch_for
from inception_fused.verification import Item, capture, describe, quiet

COPY_BYTES, GEMM_SIZE, CEILING_SECONDS = 1 << 28, 4096, 0.05
"""Of what is timed for the ceilings: a third of a GiB in all, and large enough for most of the peak."""

WIDTH = 120


class Times(NamedTuple):
    """Microseconds of one call of a block, as explanation.py says; None for what is not known."""

    floor_us: float | None
    predicted_us: float | None
    measured_us: float | None


class Row(NamedTuple):
    """One block, or what looks like one. name: in the model, "" for the model itself; kind: its class's name.

    state: "fused" (built so), "converted" or "not converted"; what: its variant, in words; path: what runs it now, or
    why it is not converted. With an input: x_shape, dtype: of what the block was given, and in which it computes;
    forward, step: :class:`Times` of the forward without gradients, and of forward and backward for every gradient,
    the latter of a block in training mode only.
    """

    name: str
    kind: str
    state: str
    what: str
    path: str
    x_shape: tuple[int, ...] | None = None
    dtype: torch.dtype | None = None
    forward: Times | None = None
    step: Times | None = None


@dataclass(frozen=True)
class Explanation:
    """``print`` shows it as a table. rows: one :class:`Row` a block. notes: sentences on what the times are."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()

    @property
    def converted(self) -> int:
        """Blocks that are converted or were built fused."""
        return sum(row.state != "not converted" for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing in this model looks like an Inception block"
        head = ("block", "class", "state", "variant", "runs, or why not")
        parts = [table(head, [(_shown(row), *row[1:5]) for row in self.rows])]
        parts[0] += f"\n{self.converted} of {len(self.rows)} run as fused blocks where the kernels can run"
        titles = {"forward": "microseconds of a forward", "step": "microseconds of forward and backward"}
        for field, title in titles.items():
            timed = [(row, getattr(row, field)) for row in self.rows if getattr(row, field) is not None]
            if timed:
                parts.append(f"{title}\n{_times(timed)}")
        if self.notes:
            parts.append("\n".join(textwrap.fill(note, WIDTH, break_on_hyphens=False) for note in self.notes))
        return "\n\n".join(parts)

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as data ready for ``json.dumps``."""
        found = []
        for row in self.rows:
            plain = row._asdict()
            plain["dtype"] = None if row.dtype is None else str(row.dtype).removeprefix("torch.")
            for field in ("forward", "step"):
                plain[field] = None if plain[field] is None else plain[field]._asdict()
            found.append(plain)
        return found


def _shown(row: Row) -> str:
    return row.name or "(the model)"


def _times(timed: Sequence[tuple[Row, Times]]) -> str:
    """A line a block, and their sum where there are several."""

    def cells(times: Times) -> tuple[str, ...]:
        return tuple("" if value is None else figure_of(value) for value in times)

    lines = [
        (_shown(row), "x".join(map(str, row.x_shape)), str(row.dtype).removeprefix("torch."), *cells(times))
        for row, times in timed
    ]
    if len(timed) > 1:
        columns = zip(*(times for _, times in timed), strict=True)
        lines.append(("sum", "", "", *cells(Times(*(None if None in c else sum(c) for c in columns)))))
    return table(("block", "x", "computes in", "floor", "predicted", "measured"), lines)


class _Block(NamedTuple):
    """What is known of a row's block. params: None where there is nothing to time."""

    row: Row
    module: nn.Module
    params: InceptionParams | None


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Every Inception block of a model, and everything that looks like one: what runs it, or why the kernels do not.

    With x, what ``model(x)`` takes: also floor, predicted and measured time of each block on the input that it gets, in
    the mode in which it is. A block that has no time is no Inception block, was not called, or has hooks, which would
    run with it. Runs ``model(x)`` once, without gradients, under the caller's :func:`inception_fused.backend` and
    autocast, then each block on detached parameters; the model is left as it was. On CUDA the first call also times a
    copy and a GEMM, for the ceilings, and whatever has to be compiled is.

    Raises:
        InceptionInputError: model is no nn.Module, x no tensor, or model(x) fails.
    """
    check_model(model)
    if x is None:
        return Explanation(tuple(block.row for block in _blocks(model)))
    if not isinstance(x, Tensor):
        raise InceptionInputError(f"x: got {type(x).__name__}, wants a tensor that model(x) takes, or None")
    # First, since a block's parameters may wait for it.
    items = {item.name: item for item in capture(model, {name: m for name, m, _ in _found(model)}, x)}
    blocks = list(_blocks(model, items))
    if not any(block.params is not None for block in blocks):
        return Explanation(tuple(block.row for block in blocks))
    ceilings = _ceilings(x.device.index) if x.is_cuda else H200
    with torch.inference_mode(False), quiet():
        shown = progress(blocks, len(blocks), "blocks", "block")
        rows = tuple(_with_times(block, items[block.row.name], ceilings) for block in shown)
    return Explanation(rows, _notes(rows, ceilings, x.device))


def _found(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, module, proposal) of candidates() and, without a proposal, of blocks that it no longer recognises."""
    seen = set()
    for item in candidates(model):
        seen.add(item[1])
        yield item
    yield from ((name, m, None) for name, m in model.named_modules() if view_of(m) is not None and m not in seen)


def _blocks(model: nn.Module, items: dict[str, Item] | None = None) -> Iterator[_Block]:
    for name, module, proposal in _found(model):
        view, kind = view_of(module), type(module).__name__
        if view is None:
            why = proposal.why or try_block(module, type(module), proposal.roles)[1]
            what = "" if why else variant(module, proposal.roles)
            row = Row(name, kind, "not converted", what, why or "convert_(model) converts it")
            yield _Block(row, module, None if why else proposal.roles.params(module))
            continue
        native = isinstance(view, FusedInception)
        what = "built with FusedInception" if native else module.__dict__[STATE].what
        item = items[name] if items is not None else None
        given = _computes(item) if item is not None and item.x is not None else None
        reason = view.eager_reason() or _obstacle(*(given or _of_parameters(module)))
        row = Row(name, kind, "fused" if native else "converted", what, f"eager: {reason}" if reason else "kernels")
        yield _Block(row, module, _params(view))


def _params(view: Block) -> InceptionParams | None:
    """A block's parameters; None where the layers are no longer those that had them."""
    try:
        return view.params()
    except (AttributeError, KeyError, TypeError):
        return None


def _of_parameters(module: nn.Module) -> tuple[torch.device, torch.dtype]:
    parameter = next(module.parameters())
    return parameter.device, parameter.dtype


def _computes(item: Item) -> tuple[torch.device, torch.dtype]:
    with _autocast(item):
        return item.x.device, compute_dtype(item.x)


def _autocast(item: Item) -> Any:
    return torch.autocast(item.x.device.type, dtype=item.autocast) if item.autocast else nullcontext()


def _obstacle(device: torch.device, dtype: torch.dtype) -> str | None:
    wish = dispatch.current()
    if wish == "eager":
        return "backend is eager"
    if dispatch.demands_kernels(wish):
        return dispatch.refusal(wish, device, dtype)
    if device.type != "cuda":
        return f"it is on {device}; kernels run on a CUDA device"
    return dispatch.obstacle(device, dtype)


def _with_times(block: _Block, item: Item, ceilings: Ceilings) -> Row:
    """The block's row with what there is to know of its times."""
    row, module, params = block
    if item.x is None or params is None:
        return row
    device, dtype = _computes(item)
    row = row._replace(x_shape=tuple(item.x.shape), dtype=dtype)
    modes = (False, True) if module.training else (False,)
    measured = _measured(module, item, modes) if _can_be_timed(module, item, dtype) else [None] * len(modes)
    arithmetic = [_arithmetic(item.x, params, device, dtype, ceilings, training) for training in modes]
    times = [Times(*known, us) for known, us in zip(arithmetic, measured, strict=True)]
    return row._replace(forward=times[0], step=times[1] if module.training else None)


def _can_be_timed(module: nn.Module, item: Item, dtype: torch.dtype) -> bool:
    known = item.x.device.type in ("cpu", "cuda")
    interpreted = item.x.device.type == "cpu" and dispatch.demands_kernels(dispatch.current())
    hooked = any(getattr(inner, hooks) for inner in module.modules() for hooks in HOOKS)
    return known and not interpreted and not hooked and item.x.numel() > 0


def _arithmetic(
    x: Tensor, params: InceptionParams, device: torch.device, dtype: torch.dtype, ceilings: Ceilings, training: bool
) -> tuple[float | None, float | None]:
    """Floor and prediction in microseconds."""
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if dtype == torch.float32:
        precision = "tf32" if dispatch.tf32_allowed() else "fp32"
    if precision is None or x.numel() == 0:
        return None, None
    shape = BlockShape.of(x, params.weights)._replace(itemsize=dtype.itemsize)
    branch3 = params.weights[4].shape[-1]
    floor = block_work(shape, branch3=branch3, training=training).floor(ceilings, precision)
    if precision == "fp32" or (device.type == "cuda" and dispatch.obstacle(device, dtype) is not None):
        return floor * 1e6, None
    packs = params.batch_norms is not None or not all(is_ready(w, dtype) for w in params.weights)
    on_card: dict[str, Any] = {}
    if device.type == "cuda":
        on_card = {"chosen": dispatch.choices("auto", device, dtype), "gpu": tuned.key(device)}
    launches = forecast(
        shape, dtype, ceilings, precision=precision, branch3=branch3, training=training, packs=packs, **on_card
    )
    return floor * 1e6, sum(launch.predicted for launch in launches) * 1e6


def _measured(module: nn.Module, item: Item, modes: Sequence[bool]) -> list[float]:
    """Microseconds of a forward without gradients and, where modes has True, of forward and backward."""
    names, given = zip(*module.named_parameters(), strict=True)
    # BatchNorm in training mode writes into its statistics.
    buffers = {name: buffer.clone() for name, buffer in module.named_buffers()}

    def call(leaves: Sequence[Tensor]) -> Tensor:
        # Entered anew for each call, since it keeps the weights that it has cast until it is left.
        with _autocast(item):
            state = {**dict(zip(names, leaves[1:], strict=True)), **buffers}
            return functional_call(module, state, (leaves[0],))

    leaves = tuple(t.detach().requires_grad_() for t in (item.x, *given))
    with torch.no_grad():
        dy = torch.ones_like(call(leaves))
    contender = Contender(call, leaves, dy)
    found = []
    for training in modes:
        run: Callable[[], object] = contender.step if training else contender.infer
        for _ in range(2):
            # Compilation, algorithm search and the allocator's first blocks belong to no figure.
            run()
        found += clock([run], item.x.device)[0]
    return found


@cache
def _ceilings(index: int | None) -> Ceilings:
    device = torch.device("cuda", index if index is not None else torch.cuda.current_device())
    sizes = dict(copy_bytes=COPY_BYTES, gemm_size=GEMM_SIZE, seconds=CEILING_SECONDS, tf32=False)
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        found = measure_ceilings(stopwatch_for(device), device, **sizes)
    return Ceilings.measured(torch.cuda.get_device_name(device), found)


def _notes(rows: Sequence[Row], ceilings: Ceilings, device: torch.device) -> tuple[str, ...]:
    timed = [times for row in rows for times in (row.forward, row.step) if times is not None]
    if not timed:
        return ()
    card = (
        f"{ceilings.name} ({ceilings.bandwidth / 1e12:.2f} TB/s, {ceilings.flops['bf16'] / 1e12:.0f} TFLOP/s bf16, "
        f"{ceilings.flops['tf32'] / 1e12:.0f} TF32)"
    )
    why = "" if device.type == "cuda" else f", since x is on {device}"
    launch = f"{ceilings.launch * 1e6:.1f} us a launch{'' if device.type == 'cuda' else ' (a guess)'}"
    how = "device events, the host ahead" if device.type == "cuda" else "wall clock"
    notes = [
        f"floor: the block as one ideal kernel on {card}{why}.",
        f"predicted: the kernels with their tiles on {ceilings.multiprocessors} multiprocessors, {launch}; what the L2 "
        "cache can feed is not in it.",
    ]
    if any(times.measured_us is not None for times in timed):
        notes.append(f"measured: a call of the block as it is on {describe(device)}; median, {how}.")
    return tuple(notes)
