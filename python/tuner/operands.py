"""One problem of the tuner with tensors: its launches with any tile, and its results judged against float64.

The launches are those that the operators make: a block is run with the tile forced, its launches are listed instead of
run, and the one of the problem is kept with its operands. Their values are normal and random, and depend on the problem
only. The truth is the launcher's ATen twin in float64 on the very operands that the kernel reads, so that no error
hides behind another kernel's.

Of a block with BatchNorm in training the launches that only such a block has are problems of their own. Its K1 to K4
and B2, which write raw values and sum a product more, take the tiles that were timed without it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inception_fused.block import chains
from inception_fused.block.call_types import BackwardCall, ForwardCall, Saved, Saves
from inception_fused.block.googlenet_blocks import BRANCH3, Config, branch3_name
from inception_fused.block.shapes import BlockShape
from inception_fused.block.tensor_lists import BlockTensors, Needs
from inception_fused.block.views import ChannelSlice, Tile, accumulator_of
from inception_fused.op import forward, gradients, launcher, operators
from inception_fused.op.launcher import Call
from inception_fused.plan import choice, launches
from inception_fused.plan.problems import Launch
from inception_fused.plan.rules import PLANNED, Capability
from inception_fused.runtime import aten
from inception_fused.runtime.submit import record
from inception_fused.testing import PEAK_FACTOR, Error, tolerance
from tuner import normed


def problems_of(shape: BlockShape, dtype: torch.dtype, *, capability: Capability = PLANNED) -> list[Launch]:
    """What is timed of a block: its launches without BatchNorm in order, then those that BatchNorm in training adds; of
    the stem the former."""
    is_block = len(shape.filters) in chains.BLOCKS
    added = choice.tiled(shape, dtype, capability=capability, normed=True) if is_block else []
    plain = choice.tiled(shape, dtype, capability=capability)
    return [*plain, *(problem for problem in added if problem.row.role in launches.NORMS)]


@dataclass(frozen=True)
class Case:
    """A problem and where in the network it comes from, a block or the stem. size: H = W of its feature map."""

    block: str
    config: Config
    batch: int
    size: int
    dtype: str
    problem: Launch

    @property
    def key(self) -> str:
        """Its identity in files: two blocks with equal channels, pixels and windows share one."""
        p = self.problem
        return f"{p.rules} {self.dtype} {p.gemm.m} {p.gemm.n} {p.gemm.k} {p.gemm.taps}"

    @property
    def branch3(self) -> tuple[int, ...]:
        """Sides of the windows of the block's third branch; none of the stem."""
        return tuple(chains.third_windows(self.problem.shape.sides))

    @property
    def bond(self) -> tuple[str, int, int] | None:
        """Equal for cases whose tiles must have one height: those whose sums over rows share a buffer.

        Forms of a block that differ in branch 3 alone have one bond, since they share the 3x3 of branch 2.
        """
        row = self.problem.row
        shares = row in launches.table_of(self.problem.shape.filters).backward.dgrad_windows
        return (self.block, self.batch, self.size) if shares else None

    def __str__(self) -> str:
        usual = self.branch3 in ((), next(iter(BRANCH3.values())))
        form = "" if usual else f" {branch3_name(self.branch3)}"
        return f"{self.problem.name} {self.block}{form} batch {self.batch} {self.dtype}"


class Workload:
    """A case's operands on a device ("meta" for tensors without data)."""

    def __init__(self, case: Case, device: torch.device | str) -> None:
        self.case, self.problem, self.device = case, case.problem, torch.device(device)
        self.shape, self.row = self.problem.shape, self.problem.row
        self.forms = (False, True) if self.row.role == launches.FPROP and self.problem.is_output else (True,)
        self.in_place = normed.is_in_place(self.problem)
        self._generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(0)
        s = self.shape
        self.x, self.dy = self._images(s.c), self._images(s.k)
        sizes = zip(s.filters, s.inputs, s.sides, strict=True)
        weights = [self._draw((k, c, r, r), scale=(2 / (c * r * r)) ** 0.5) for k, c, r in sizes]
        weights = [w.contiguous(memory_format=torch.channels_last) for w in weights]
        self.tensors = BlockTensors(weights, [self._draw((k,)) for k in s.filters])
        self._drawn: dict[int, Tensor] = {}

    def launches(self, tile: Tile) -> list[Any]:
        """What is timed: of a convolution's forward the launch of inference and that of training, which writes bits and
        taps."""
        found = []
        for save in self.forms:
            call = self.call(tile, save)
            with record() as made:
                call.run("triton", tile)
            found += made
        return found

    def check(self, tile: Tile) -> float:
        """The largest error of a tile's results over its bound. Raises AssertionError where one is beyond it."""
        worst = 0.0
        for save in self.forms:
            call = self.call(tile, save)
            results = self.results(call)
            for result in () if self.in_place else results.values():
                result.fill_(float("nan") if result.is_floating_point() else 255)
            call.run("triton", tile)
            for name, result in results.items():
                where = f"{self.case}, {tile}, {'saving' if save else 'not saving'}: {name}"
                worst = max(worst, self._judge(where, name, result, call, tile))
        return worst

    def call(self, tile: Tile, save: bool) -> Call:
        """The launcher's call that a block makes with a tile, with values in whatever it reads."""
        with torch.no_grad(), record(), launcher.forced(self.problem.rules, tile), launcher.listed() as calls:
            self._block(save)
        call = next(call for call in calls if call.launch.row == self.row)
        written = set(map(_place, self._parts(call).values()))
        read = [part for part in _parts_of((call.args, call.kwargs)) if _place(part) not in written]
        known, values = {id(t) for t in (self.x, self.dy, *self.tensors.flat)}, {}
        for i, part in enumerate(read):
            # What another launch would have written. A buffer may hold results of this one beside it.
            if id(_base(part)) in known or id(_base(part)) in values:
                continue
            if i not in self._drawn:
                self._drawn[i] = self._value(part)
            values[id(_base(part))] = self._drawn[i]
        if self.in_place:
            values |= normed.share(call, values[id(call.args[0])])
        return _replaced(call, lambda t: values.get(id(t), t))

    def results(self, call: Call) -> dict[str, Tensor]:
        """What a launch writes: matrices of rows; parts and sums with their ranges before them."""
        found = {}
        for name, part in self._parts(call).items():
            rows = _base(part).shape[0] if name == "sums" else self.shape.gemm_m
            found[name] = part.rows(rows) if isinstance(part, ChannelSlice) else part
        return found

    @property
    def bound(self) -> float:
        length = self.problem.gemm.taps * self.problem.gemm.k
        if self.row.role in (launches.MASK, launches.DGRAD):
            length = max(length, self.shape.gemm_m)  # of the sums over rows
        if self.row.role == launches.STATISTICS:
            # Nothing is rounded to the dtype.
            return tolerance(accumulator_of(self.problem.dtype), self.shape.gemm_m)
        multiplies = self.row.role not in launches.NORMS
        tf32 = multiplies and self.device.type == "cuda" and self.problem.dtype == torch.float32
        return tolerance(self.problem.dtype, length, tf32=tf32)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Results of the twin in float64."""
        doubles: dict[int, Tensor] = {}

        def double(t: Tensor) -> Tensor:
            return doubles.setdefault(id(t), t.double() if t.is_floating_point() else t.clone())

        given = self.call(choice.tile_of(self.problem), True)
        if self.row.direction == "backward" and given.kwargs.get("relu"):
            given = normed.behind_mask(given)
        call = _replaced(given, double)
        results = self.results(call)
        for name in set(results) & {"part", "sums"}:
            results[name].zero_()
        call.run("eager", None)
        # The twin fills the first of all ranges.
        return {
            name: normed.moments(result[:1], call, self.shape.gemm_m) if name == "moments" else _summed(name, result)
            for name, result in results.items()
        }

    def _judge(self, where: str, name: str, result: Tensor, call: Call, tile: Tile) -> float:
        if name in ("bits", "taps", "borders"):
            # The bits are those of the stored result, which may be rounded to zero.
            expected = aten.pack_bits(self.results(call)["y"]) if name == "bits" else self.truth[name]
            assert torch.equal(result, expected), f"{where} differ from what they have to be"
            return 0.0
        if name == "moments":
            found = normed.moments(result, call, call.kwargs["ranges"][1] * tile.BLOCK_M)
        else:
            found = _summed(name, result)
        error, bound = Error.of(found, self.truth[name]), self.bound
        assert error.within(bound), f"{where} is wrong: {error}, bound {bound:.2e}"
        return max(error.rms, error.peak / PEAK_FACTOR) / bound

    def _block(self, save: bool) -> None:
        """Every launch of the problem's pass, in Triton."""
        if self.row.role in launches.NORMS:
            normed.launch_block(self.shape, self.tensors, self.x, self.dy, self.row.direction)
            return
        s, chosen, saves = self.shape, dict.fromkeys(choice.KERNELS, "triton"), Saves(True, save, save)
        y, *outputs = operators.outputs(self.x, s, saves)
        if self.row.direction == "forward":
            call = ForwardCall(self.x, self.tensors, True, saves, "kernels")
            x = ChannelSlice(self.x, s.c, 0, s.c)
            forward.launch_forward(launcher.Launcher(chosen, x, s, self.x.dtype), call, y, Saved(*outputs))
            return
        weights, biases = self.tensors.weights, self.tensors.biases
        needs = Needs(True, [True] * len(weights), [True] * len(weights))
        dtypes = [b.dtype for b in biases]
        call = BackwardCall(self.dy, self.x, Saved(*outputs), weights, dtypes, True, needs, "kernels")
        gradients.block_backward(call, chosen)

    def _parts(self, call: Call) -> dict[str, ChannelSlice | Tensor]:
        """The operands that a launch writes."""
        args, role = call.args, self.row.role
        if role == launches.FPROP:
            group = ("y", "r3", "r5", "bits") if len(self.row.convs) > 1 else ("y", "bits", "taps")
            found = dict(zip(group, args[2:], strict=False))
        elif role == launches.MASK:
            found = {f"g{i}": g for i, g in enumerate(args[2])} | {"sums": args[3], "borders": args[4]}
        elif role == launches.DGRAD:
            found = {"dr": args[3]._replace(channels=call.kwargs["width"]), "sums": args[4]}
        elif role in launches.NORMS:
            found = normed.parts(self.row, args)
        else:
            found = {"dx": args[4]} if role == launches.DGRAD_X else {"part": args[2]}
        return {name: part for name, part in found.items() if part is not None}

    def _value(self, part: ChannelSlice | Tensor) -> Tensor:
        """Random values for an operand: rows, or a weight, or bits in rows, or taps; borders; BatchNorm's numbers."""
        t, is_rows = _base(part), isinstance(part, ChannelSlice)
        if normed.is_table(self.problem, t):
            return normed.table_values(t, self._generator)
        if t.dtype == torch.int16:
            return aten.border_words(self.shape.image, t.numel(), t.device)
        if t.dtype != torch.uint8:
            return self._draw(tuple(t.shape), scale=1.0 if is_rows or self.in_place else 0.1)
        if is_rows:
            return self._bytes(256, tuple(t.shape))
        return aten.pack_taps(self._bytes(9, (t.shape[0], self.shape.c)))

    def _images(self, channels: int) -> Tensor:
        s = self.shape
        return self._draw((s.n, channels, s.h, s.w)).contiguous(memory_format=torch.channels_last)

    def _draw(self, size: tuple[int, ...], scale: float = 1.0) -> Tensor:
        t = torch.randn(size, generator=self._generator, device=self.device, dtype=torch.float32)
        return (t * scale).to(self.problem.dtype)

    def _bytes(self, high: int, size: tuple[int, ...]) -> Tensor:
        return torch.randint(high, size, generator=self._generator, device=self.device, dtype=torch.uint8)


def _summed(name: str, result: Tensor) -> Tensor:
    """A result, of partial sums their sum."""
    return result.double().sum(0) if name in ("part", "sums") else result


def _base(part: ChannelSlice | Tensor) -> Tensor:
    return part.base if isinstance(part, ChannelSlice) else part


def _place(part: ChannelSlice | Tensor) -> tuple[int, int]:
    return id(_base(part)), part.c_offset if isinstance(part, ChannelSlice) else 0


def _parts_of(value: Any) -> Iterator[ChannelSlice | Tensor]:
    """Every operand in a launcher's arguments."""
    if isinstance(value, (ChannelSlice, Tensor)):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _parts_of(item)


def _replaced(value: Any, new: Callable[[Tensor], Tensor]) -> Any:
    """The same with other tensors in its operands."""
    if isinstance(value, Tensor):
        return new(value)
    if isinstance(value, Launch):
        return value
    if isinstance(value, dict):
        return {name: _replaced(item, new) for name, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_replaced(item, new) for item in value))
    return type(value)(_replaced(item, new) for item in value) if isinstance(value, (tuple, list)) else value
