"""``explain(model)``: what runs each Inception block of a model, or why the kernels do not; with an input, how long
each takes (block_times.py)."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.conversion.api import check_model
from inception_fused.conversion.converted import ConvertedBlock, converted_class, original_of
from inception_fused.conversion.fused_blocks import fused_part, is_built, view_of, words_of
from inception_fused.conversion.inspection import WAITING, variant
from inception_fused.conversion.trial import try_block
from inception_fused.errors import InceptionInputError, KernelError
from inception_fused.modules.fused_inception import Block
from inception_fused.modules.structure import Proposal, candidates, is_lazy, layer, scripted
from inception_fused.op import backends, reasons
from inception_fused.op.backends import parse
from inception_fused.plan.cards import H200, Ceilings
from inception_fused.plan.forecast import Forecast
from inception_fused.tools import predictions
from inception_fused.tools.block_times import Subject, Times, block_times, card_ceilings, pack_remedy
from inception_fused.tools.capture import Item, capture, quiet, unchanged
from inception_fused.tools.flattening import flattened
from inception_fused.tools.progress import progress
from inception_fused.tools.report import figure_of, table
from inception_fused.tools.verification import describe

WIDTH = 120
EAGER = "eager: "
"""What the path of a block that runs no kernel begins with, before the reason."""

CONVERTIBLE = "convert_(model) converts"
"""What the path of a block that is not converted begins with, where it can be."""

PLURAL = {WAITING: "their parameters wait for the first input"}
"""Of several blocks."""


class Row(NamedTuple):
    """One block, or what looks like one. name: in the model, "" for the model itself; kind: its class's name.

    state: "fused" (built so), "converted" or "not converted"; what: its variant, in words; path: what runs it now, or
    why it is not converted. With an input: x_shape, dtype: of what the block was given, and in which it computes;
    forward, step: :class:`Times` of the forward without gradients, and of forward and backward for every gradient,
    the latter of a block in training mode only. remedy: what saves a launch at each call, "" where nothing does.
    launches: what the forecast says of each launch, of a step where there is one.
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
    remedy: str = ""
    launches: tuple[Forecast, ...] = ()


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
            return "\n".join(["nothing in this model looks like an Inception block", *map(_filled, self.notes)])
        head = ("block", "class", "state", "variant", "runs, or why not")
        lines = [[" ".join(cell.split()) for cell in (_shown(row), *row[1:5])] for row in self.rows]
        parts = [f"{_wrapped(table(head, lines))}\n{_filled(self._summary())}"]
        titles = {"forward": "microseconds of a forward", "step": "microseconds of forward and backward"}
        for field, title in titles.items():
            timed = [(row, getattr(row, field)) for row in self.rows if any(getattr(row, field) or ())]
            if timed:
                parts.append(f"{title}\n{_times(timed)}")
        remedies = [
            f"{', '.join(_shown(row) for row in self.rows if row.remedy == remedy)}: {remedy}."
            for remedy in dict.fromkeys(row.remedy for row in self.rows if row.remedy)
        ]
        if notes := (*remedies, *self.notes):
            parts.append("\n".join(map(_filled, notes)))
        return "\n\n".join(parts)

    def _summary(self) -> str:
        """What is converted and what could be, and what runs now, with the reasons why the others do not."""
        total, now = len(self.rows), sum(row.path == "kernels" for row in self.rows)
        said = [f"{self.converted} of {total} {'is a fused block' if total == 1 else 'are fused blocks'}"]
        if self.converted:
            eager = [row.path.removeprefix(EAGER) for row in self.rows if row.path.startswith(EAGER)]
            counts = {reason: eager.count(reason) for reason in dict.fromkeys(eager)}
            whose = {reason: PLURAL.get(reason, reason) if number > 1 else reason for reason, number in counts.items()}
            runs = f"{now} of {total} {'runs' if total == 1 else 'run'} kernels now"
            if len(counts) == 1 and len(eager) == self.converted:
                said.append(f"{runs}, because {whose[eager[0]]}")
            else:
                verbs = {reason: "does" if number == 1 else "do" for reason, number in counts.items()}
                said.append(runs)
                said += [f"{number} {verbs[why]} not, because {whose[why]}" for why, number in counts.items()]
        if could := sum(row.path.startswith(CONVERTIBLE) for row in self.rows):
            said.append(f"{CONVERTIBLE} {could if self.converted or could < total else 'it' if could == 1 else 'them'}")
        return "; ".join(said)

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as data ready for ``json.dumps``."""
        found = []
        for row in self.rows:
            plain = row._asdict()
            plain["dtype"] = None if row.dtype is None else str(row.dtype).removeprefix("torch.")
            for field in ("forward", "step"):
                plain[field] = None if plain[field] is None else plain[field]._asdict()
            plain["launches"] = predictions.as_data(row.launches)
            found.append(plain)
        return found


def _filled(text: str) -> str:
    return textwrap.fill(text, WIDTH, break_on_hyphens=False)


def _wrapped(text: str) -> str:
    """A table whose last column goes on below itself where a line is too long."""
    head, _, *lines = text.splitlines()
    column = head.index("runs, or why not")
    room = max(WIDTH - column, 40)
    found = [head, "-" * min(max(map(len, (head, *lines))), column + room)]
    for line in lines:
        first, *more = textwrap.wrap(line[column:], room, break_on_hyphens=False)
        found += [line[:column] + first, *(" " * column + rest for rest in more)]
    return "\n".join(found)


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


def explain(model: nn.Module, x: Tensor | None = None) -> Explanation:
    """Every Inception block of a model, and everything that looks like one: what runs it, or why the kernels do not.
    GoogLeNet's stem is such a block.

    With x, what ``model(x)`` takes: also floor, predicted and measured time of each block on the input of its first
    call, in the mode in which it is; where there is no time, a note says why. Runs ``model(x)`` once, without
    gradients, under the caller's :func:`inception_fused.backend` and autocast, then each block on detached parameters.
    The model is left as it was, but that parameters which wait for their first input get it. On CUDA the first call
    also times a copy and a GEMM, for the ceilings, and whatever has to be compiled is.

    Raises:
        InceptionInputError: model is no nn.Module, x no tensor, or model(x) fails.
        KernelError: the backend in force demands kernels that cannot run, or a launch failed.
    """
    check_model(model)
    if x is None:
        blocks = list(_blocks(model))
        return Explanation(tuple(block.row for block in blocks), _of_the_model(model, blocks))
    if not isinstance(x, Tensor):
        raise InceptionInputError(f"x: got {type(x).__name__}, wants a tensor that model(x) takes, or None")
    # First, since a block's parameters may wait for it.
    items = {item.name: item for item in capture(model, {name: m for name, m, _ in _found(model)}, x)}
    blocks = list(_blocks(model, items))
    ceilings = card_ceilings(x.device) if any(block.subject for block in blocks) else H200
    rows: list[Row] = []
    untimed: dict[str, list[str]] = {}
    with torch.inference_mode(False), torch.enable_grad(), quiet(), unchanged(model, x):
        for block in progress(blocks, len(blocks), "blocks", "block"):
            row = block.row
            if block.subject is not None:
                row, why = _timed(row, block.subject, items.get(row.name, Item(row.name, None, None)), ceilings)
                untimed.setdefault(why, []).append(_shown(row))
            rows.append(row)
    untimed.pop("", None)
    notes = _notes(rows, untimed, ceilings, x.device)
    return Explanation(tuple(rows), (*_of_the_model(model, blocks, ran=True), *notes))


def _timed(row: Row, subject: Subject, item: Item, ceilings: Ceilings) -> tuple[Row, str]:
    """The row with its times, and why the clock did not run."""
    if item.x is None:
        return row, item.why
    forward, step, why, launches = block_times(subject, item, ceilings)
    if forward is None:
        return row, why
    times = dict(forward=forward, step=step, launches=launches)
    return row._replace(x_shape=tuple(item.x.shape), dtype=item.dtype, **times), why


def _found(model: nn.Module) -> Iterator[tuple[str, nn.Module, Any]]:
    """(name, module, proposal) of candidates() and, without a proposal, of the stem and of blocks that those no longer
    recognise; in the model's order."""
    found = list(candidates(model))
    seen = {module for _, module, _ in found}
    places = {module: i for i, module in enumerate(model.modules())}
    found += [(name, m, None) for name, m in model.named_modules() if view_of(m) is not None and m not in seen]
    yield from sorted(found, key=lambda item: places.get(item[1], len(places)))


class _Block(NamedTuple):
    """A row without times, and what there is to time. fusible: whether its output is channels_last, now or once it is
    converted."""

    row: Row
    module: nn.Module
    subject: Subject | None = None
    fusible: bool = True


def _blocks(model: nn.Module, items: dict[str, Item] | None = None) -> Iterator[_Block]:
    for name, module, proposal in _found(model):
        item = (items or {}).get(name)
        view = view_of(module)
        try:
            yield _unconverted(name, module, proposal, item) if view is None else _fused(name, module, view, item)
        except (InceptionInputError, KernelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # of modules that lack what their class has, or whose attributes raise
            state = "not converted" if view is None else "fused" if is_built(view) else "converted"
            why = f"it cannot be looked at: {type(error).__name__}: {error}"
            yield _Block(Row(name, _kind_of(module).__name__, state, "", why), module, fusible=view is not None)


def _kind_of(module: nn.Module) -> type[nn.Module]:
    return original_of(module) if isinstance(module, ConvertedBlock) else type(module)


def _fused(name: str, module: nn.Module, view: Block, item: Item | None) -> _Block:
    device, dtype, x = _given(module, item)
    reason = view.eager_reason() or _scattered(module, x)
    # Not the parameters: a wrapper that shards them gives the block whole ones at its call.
    asked = device, dtype, backends.current()
    why = reasons.first(*asked, block=reason, x=x)
    path = "kernels" if why is None else f"{EAGER}{why.text}"
    row = Row(name, _kind_of(module).__name__, "fused" if is_built(view) else "converted", words_of(view), path)
    if reason is None:
        row = row._replace(remedy=pack_remedy(view.params(), dtype))
    kernels = reason is None and not parse(backends.current()).is_eager
    subject = Subject(
        fused_part(module), view.params, kernels=kernels, interpreted=why is None and device.type == "cpu"
    )
    return _Block(row, module, subject)


def _scattered(module: nn.Module, x: Tensor | None) -> str | None:
    """Why a block cannot run whose parameters lie on several devices; None if they lie on one, or a call shows it."""
    devices = dict.fromkeys(str(p.device) for p in module.parameters())
    return (
        f"its parameters lie on {' and '.join(devices)}, wants one device" if x is None and len(devices) > 1 else None
    )


def _given(module: nn.Module, item: Item | None) -> tuple[torch.device, torch.dtype, Tensor | None]:
    """Where and in which dtype a block computes, and its input: as it was called, or as its parameters are."""
    if item is not None and item.x is not None:
        return item.x.device, item.dtype, item.x
    # A quantized block has neither.
    owned = next((t for t in (*module.parameters(), *module.buffers()) if t.is_floating_point()), torch.empty(0))
    return owned.device, owned.dtype, None


def _unconverted(name: str, module: nn.Module, proposal: Proposal, item: Item | None) -> _Block:
    why, roles, what = proposal.why, proposal.roles, ""
    path = f"{CONVERTIBLE} it"
    lazy = roles is not None and is_lazy([layer(module, conv) for conv in roles.convs])
    if lazy:
        path += ", once it has its first input and computes what its layers say"
    elif not why:
        why = try_block(module, type(module), roles, converted_class)[1]
    if not why:
        what = variant(module, roles)
    row = Row(name, type(module).__name__, "not converted", what, why or path)
    if why or lazy:
        return _Block(row, module, fusible=not why)
    row = row._replace(remedy=pack_remedy(roles.params(module), _given(module, item)[1]))
    return _Block(row, module, Subject(module, lambda: roles.params(module), kernels=True))


def _of_the_model(model: nn.Module, blocks: Sequence[_Block], *, ran: bool = False) -> tuple[str, ...]:
    """Notes on what no row says. ran: whether the model did, so that only what is not converted yet can still fail."""
    behind = [b.module for b in blocks if b.fusible and not (ran and b.row.state != "not converted")]
    found = dict.fromkeys(flattened(model, behind))
    said = "is scripted: nobody can look into it, and convert_ leaves it alone."
    return (*found, *(f"{name or 'The model'} {said}" for name in scripted(model)))


def _notes(
    rows: Sequence[Row], untimed: dict[str, list[str]], ceilings: Ceilings, device: torch.device
) -> tuple[str, ...]:
    found = [times for row in rows for times in (row.forward, row.step) if times is not None]
    has = {name: any(getattr(times, name) is not None for times in found) for name in Times._fields}
    on_card, notes = device.type == "cuda", []
    if has["floor_us"]:
        notes.append(
            f"floor: the block as one ideal kernel on {ceilings.name} ({ceilings.bandwidth / 1e12:.2f} TB/s, "
            f"{ceilings.flops['bf16'] / 1e12:.0f} TFLOP/s bf16, {ceilings.flops['tf32'] / 1e12:.0f} TF32)"
            f"{'' if on_card else f', since x is on {device}'}."
        )
    if has["predicted_us"]:
        notes += predictions.notes([launch for row in rows for launch in row.launches], ceilings, on_card)
    if has["measured_us"]:
        how = "device events, the host ahead" if on_card else "wall clock"
        notes.append(f"measured: the first call of the block as it is, on {describe(device)}; median, {how}.")
    notes += [f"{', '.join(names)}: not timed: {why}." for why, names in untimed.items()]
    return tuple(notes)
