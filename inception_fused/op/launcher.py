"""How the launches of one call are made: implementation, tile and unit of each, forward and backward alike."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, cached_property, partial
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch

from inception_fused.block.shapes import BlockShape
from inception_fused.block.views import ChannelSlice, Tile
from inception_fused.op import reasons
from inception_fused.plan import choice, pairs, problems, tuned
from inception_fused.plan.kernel_table import Kernel
from inception_fused.plan.launches import Row
from inception_fused.plan.problems import Launch
from inception_fused.plan.rules import PLANNED, Capability
from inception_fused.runtime import aten, aten_norms, aten_pools, native


class Launcher:
    """For one block. chosen: "native", "triton" or "eager" by kernel, as dispatch.choices() gives it. x: the block's
    input; dtype: of what the kernels compute in."""

    def __init__(self, chosen: Mapping[str, str], x: ChannelSlice, shape: BlockShape, dtype: torch.dtype) -> None:
        self.chosen, self.shape, self.dtype = chosen, shape, dtype
        self.x, self.aligned = x, x.base.is_meta or x.base.data_ptr() % 16 == 0

    @cached_property
    def gpu(self) -> tuned.Gpu | None:
        return tuned.key(self.x.base.device)

    @cached_property
    def capability(self) -> Capability:
        device = self.x.base.device
        return torch.cuda.get_device_capability(device) if device.type == "cuda" else _planned[-1]

    def launch(self, row: Row) -> Launch:
        x = dict(x_row_stride=self.x.row_stride, aligned=self.aligned, capability=self.capability)
        return problems.launch_of(row, self.shape, self.dtype, **x)

    def __call__(self, row: Row) -> Callable[..., None]:
        """The launcher of a row, with everything but its operands."""
        launch = self.launch(row)
        return self.bind(launch, self.tile(launch))

    def in_order(self, calls: Sequence[tuple[Row, tuple[Any, ...], dict[str, Any]]]) -> None:
        """Makes the calls of a forward, two in one launch where the plan pairs them. calls: row, operands, and those
        that have names."""
        rest = iter(calls)
        for step in self.steps([row for row, _, _ in calls]):
            some = [next(rest) for _ in step.halves]
            if step.pair is None:
                ((row, args, kwargs),) = some
                self(row)(*args, **kwargs)
            else:
                halves = zip(some, step.halves, strict=True)
                given = [(args, kwargs | self._options(launch)) for (_, args, kwargs), launch in halves]
                pair_function(step.pair)(*given)

    def steps(self, rows: Sequence[Row]) -> list[pairs.Step]:
        """The rows of a forward as they are launched."""
        found = [self.launch(row) for row in rows]
        if _apart or _listed or _forced:
            return [pairs.Step((launch,)) for launch in found]
        return pairs.steps(found, self.gpu, self.chosen)

    def _options(self, launch: Launch) -> dict[str, Any]:
        return {"tile": self.tile(launch), "unit": launch.unit}

    def implementation(self, kernel: Kernel) -> str:
        """Packing has no choice of its own: a kernel where any other of its pass is Triton's."""
        if kernel.name in self.chosen:
            return self.chosen[kernel.name]
        names = choice.FORWARD if kernel.direction == "forward" else choice.BACKWARD
        return "triton" if "triton" in [self.chosen[name] for name in names] else "eager"

    def tile(self, launch: Launch) -> Tile | None:
        """None for the ATen twin."""
        form = self.implementation(launch.kernel)
        if form == "eager":
            return None
        if launch.rules in _forced:
            return _forced[launch.rules]
        if form == "native":
            return choice.native_tile_of(launch)
        if reasons.interpreting():
            return choice.interpreter_tile(*launch.gemm[:3])
        return choice.tile_of(launch, self.gpu)

    def bind(self, launch: Launch, tile: Tile | None) -> Callable[..., None]:
        """The launcher of a launch with a tile of :meth:`tile`."""
        implementation = self.implementation(launch.kernel)
        if _listed:
            return lambda *args, **kwargs: _listed[-1].append(Call(launch, args, kwargs))
        return _bound(launch, implementation, tile)

    def bind_untiled(self, row: Row, interpreted: Tile) -> Callable[..., Any]:
        """The launcher of a row that has no rules but one tile of its own. interpreted: the interpreter's."""
        launch = self.launch(row)
        form = self.implementation(row.kernel)
        options: dict[str, Any] = {}
        if form != "eager":
            options |= {} if launch.unit is None else {"unit": launch.unit}
            options |= {"tile": interpreted} if reasons.interpreting() else {}
        return partial(function_of(row.kernel, form), **options)


class Call(NamedTuple):
    """A launcher's call. args, kwargs: all but tile and unit."""

    launch: Launch
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def run(self, implementation: str, tile: Tile | None) -> None:
        """Makes it. implementation: "triton", "native" or "eager", whose tile is None."""
        _bound(self.launch, implementation, tile)(*self.args, **self.kwargs)


_planned = [PLANNED]
"""The compute capability of launches on tensors without data, the last one's."""

_apart: list[bool] = []
_forced: dict[str, Tile] = {}
_listed: list[list[Call]] = []
"""For the tuner, which has a process of its own: whatever thread launches meanwhile is listed along."""


@contextmanager
def planned_for(capability: Capability) -> Iterator[None]:
    """Within it launches on tensors that are on no GPU are those of a compute capability."""
    _planned.append(capability)
    try:
        yield
    finally:
        _planned.pop()


@contextmanager
def forced(rules: str, tile: Tile) -> Iterator[None]:
    """Within it every launch with these rules takes a tile, whatever table or rule says, and no two are made as one."""
    _forced[rules] = tile
    try:
        yield
    finally:
        del _forced[rules]


@contextmanager
def apart() -> Iterator[None]:
    """Within it no two launches are made as one."""
    _apart.append(True)
    try:
        yield
    finally:
        _apart.pop()


@contextmanager
def listed() -> Iterator[list[Call]]:
    """Within it calls of launchers whose tile the plan chooses are listed instead of made."""
    _listed.append([])
    try:
        yield _listed[-1]
    finally:
        _listed.pop()


def _bound(launch: Launch, implementation: str, tile: Tile | None) -> Callable[..., None]:
    function = function_of(launch.kernel, implementation)
    return function if tile is None else partial(function, tile=tile, unit=launch.unit)


def function_of(kernel: Kernel, implementation: str) -> Callable[..., Any]:
    """A kernel's launcher: "native", "triton", or for "eager" its ATen twin. Triton's are imported late, since Triton
    is not everywhere."""
    if implementation == "eager":
        twins = next(module for module in (aten, aten_norms, aten_pools) if hasattr(module, kernel.file))
        return getattr(twins, kernel.file)
    if implementation == "native":
        return getattr(native, kernel.file)
    return getattr(_module_of(kernel), kernel.file)


def pair_function(pair: pairs.Pair) -> Callable[..., None]:
    """The launcher of a pair, which has no other form than Triton's."""
    return getattr(_module_of(pair), pair.file)


@cache
def _module_of(kernel: Kernel | pairs.Pair) -> ModuleType:
    return import_module(f"inception_fused.kernels.{kernel.file}")
