"""Whether a block computes what its structure says: a copy of it is tried on the CPU, against the reference.

The copy has weights drawn anew, in which no zero weight, equal channel or fresh statistic hides a difference, and runs
its class's own forward:

    float64    values, gradients to the input and every parameter, statistics of BatchNorm: in eval, in training, in
               training with BatchNorm in eval; with and without gradients, of inputs and parameters that want them and
               that do not. No value of the truth lies so near to ReLU's kink that a rounding could decide.
    others     values far from one, NaN, float32, bfloat16, autocast
    beside     the copy's own attributes and buffers (modules/watch.py), and everything that the code names (effects.py)

A difference of any kind is a reason to leave the block alone.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inception_fused.block.chains import first, optional, variant_of
from inception_fused.block.reference import ACTIVATIONS, InceptionParams, convolution, inception_reference
from inception_fused.conversion.diagnosis import likely
from inception_fused.conversion.effects import Effects
from inception_fused.conversion.twin import FRESH_BATCHES, drawn_anew, random_values
from inception_fused.modules.isolation import isolated
from inception_fused.modules.structure import Roles, layer
from inception_fused.modules.watch import Seen
from inception_fused.modules.watchable import unwatchable

SHAPES = ((2, 3, 2), (1, 5, 3), (2, 1, 5))
"""N, H, W of the inputs: no squares, so that no transposition hides; the first is of those with gradients."""

SCALES = (1.0, 100.0, 0.01)
"""Of the inputs: on values far from one a forward shows that clamps, or adds a constant."""

LIMIT = 1e-8
"""Largest error over the RMS in float64: PyTorch is up to 5e-14 off itself on the nine blocks."""

NOTHING = 1e-4
"""A gradient whose RMS is that small beside the largest one's may be off by LIMIT of this part of that one."""

LIMIT_FP32, LIMIT_16 = 1e-4, 0.1
"""The same in float32, 3e-6 on the nine blocks, and in 16 bits, 0.025; a missing ReLU is 4.2."""

KINK = 1e-9
"""Values of the truth that are nearer to zero than that, over the RMS, make another input be drawn."""


class Mode(NamedTuple):
    """How the copy is called. training: of the block; batch: whether its BatchNorms take the batch's statistics; grad:
    whether gradients are on; x, params: whether input and parameters want them."""

    training: bool
    batch: bool
    grad: bool
    x: bool
    params: bool = True

    def __str__(self) -> str:
        words = [" in training mode" if self.training else ""]
        words.append(" with BatchNorm in eval mode" if self.training and not self.batch else "")
        words.append("" if self.grad else " without gradients")
        words.append("" if self.x == self.grad else f" of an input that wants {'one' if self.x else 'none'}")
        return "".join(words) + ("" if self.params else " with frozen parameters")


def try_block(
    module: nn.Module, original: type[nn.Module], roles: Roles, subclass: Callable[..., type[nn.Module]]
) -> tuple[str | None, str]:
    """(activation, "") of a block that computes what its structure says, by the forward of ``original``, the class that
    it has or had; (None, why) of another. The block itself is neither run nor changed.

    subclass: of ``original``, the class that a converted block gets (converted.converted_class).
    """
    try:
        why = unwatchable(module, original)
        if why:
            return None, why
        try:
            subclass(original)
        except Exception as error:  # whatever a class that refuses to be subclassed raises
            return None, f"no subclass of {original.__name__} can be made: {type(error).__name__}: {error}"
        return isolated(_tried, module, original, roles, subclass(original))
    except (Exception, SystemExit) as error:  # whatever somebody's forward raises is a reason, reported in full
        return None, f"a copy of it cannot be tried: {type(error).__name__}: {error}"


def _tried(module: nn.Module, original: type[nn.Module], roles: Roles, kind: type[nn.Module]) -> tuple[str | None, str]:
    # What it will be, for forwards that look at their class; and made here, since copying may draw and change things.
    twin = drawn_anew(module, kind)
    with Effects(module, type(twin)) as effects:
        activation, why = _Trial(twin, original, roles).outcome()
    if not why and effects.found:
        why = f"its forward {effects.found}"
    return (None, why) if why else (activation, "")


class _Truth(NamedTuple):
    """Of one input and activation, in float64. statistics: running mean and variance afterwards, two a BatchNorm, None
    where it keeps none."""

    x: Tensor
    y: Tensor
    statistics: list[Tensor | None]


class _Trial:
    """The copy of one block, and what it should compute."""

    def __init__(self, twin: nn.Module, original: type[nn.Module], roles: Roles) -> None:
        self.twin, self.original, self.roles = twin, original, roles
        self.convs = [layer(self.twin, name) for name in roles.convs]
        self.behind = [layer(self.twin, name) if name else None for name in roles.norms]
        self.norms = [norm for norm in self.behind if norm is not None]
        self.parameters, self.buffers = list(self.twin.parameters()), list(self.twin.buffers())
        self.values = [t.detach().clone() for t in self.parameters]
        self.statistics = [t.clone() for t in self.buffers]
        self.seen = Seen(list(self.twin.modules()))
        self.activation: str | None = None
        self.truths: dict[tuple[int, str | None, bool], _Truth] = {}
        self.gradients: dict[bool, Sequence[Tensor]] = {}

    def outcome(self) -> tuple[str | None, str]:
        steps = (self._find_activation, *(partial(self._differs, mode) for mode in self._modes()), self._others)
        why = next(filter(None, (step() for step in steps)), "")
        return (None, why) if why else (self.activation, "")

    def _reference(self, x: Tensor, activation: str | None, batch: bool) -> tuple[Tensor, list[Tensor | None], float]:
        """(y, statistics, kink): kink is the smallest value before an activation, over the RMS."""
        statistics, kinks = [], []

        def norm(y: Tensor, i: int) -> Tensor:
            n = self.behind[i] if self.behind else None
            if n is not None:
                mean, var = (t if t is None else t.detach().clone() for t in (n.running_mean, n.running_var))
                factor = n.momentum if n.momentum is not None else 1 / (FRESH_BATCHES + 1)
                y = F.batch_norm(y, mean, var, n.weight, n.bias, batch or mean is None, factor, n.eps)
                statistics.extend((mean, var))
            kinks.append((y.detach().abs().amin() / y.detach().square().mean().sqrt()).item())
            return y

        weights, biases = tuple(conv.weight for conv in self.convs), tuple(conv.bias for conv in self.convs)
        params = InceptionParams(weights, optional(biases))
        return inception_reference(x, params, activation, norm=norm), statistics, min(kinks)

    def _truth(self, index: int, batch: bool, activation: str | None) -> _Truth:
        """On an input of SHAPES[index] that is far from every kink."""
        if (index, activation, batch) not in self.truths:
            n, h, w = SHAPES[index]
            for seed in itertools.count(100 * index + 1):
                x = random_values((n, first(self.convs).weight.shape[1], h, w), seed) * SCALES[index]
                with torch.no_grad():
                    y, statistics, kink = self._reference(x, activation, batch)
                if kink > KINK:
                    break
            self.truths[index, activation, batch] = _Truth(x, y, statistics)
        return self.truths[index, activation, batch]

    def _gradients(self, batch: bool) -> tuple[Tensor, Sequence[Tensor]]:
        """A gradient of y with values of many sizes, and from it those of x and the parameters, on the first input."""
        truth = self._truth(0, batch, self.activation)
        dy = random_values(truth.y.shape, 1) * 10 ** (2 * random_values(truth.y.shape, 2)).clamp(-4, 4)
        if batch not in self.gradients:
            x = truth.x.clone().requires_grad_()
            y, *_ = self._reference(x, self.activation, batch)
            self.gradients[batch] = torch.autograd.grad(y, (x, *self.parameters), dy)
        return dy, self.gradients[batch]

    def _find_activation(self) -> str:
        self._set(Mode(False, False, True, False))
        errors = {}
        for activation in ACTIVATIONS:
            truth = self._truth(0, False, activation)
            given = truth.x.clone()
            with torch.no_grad():
                y = self.original.forward(self.twin, given)
            if not torch.equal(given, truth.x):
                return "its forward writes into its input"
            if not isinstance(y, Tensor):
                return f"its forward returns a {type(y).__name__}, wants a tensor"
            if y.shape != truth.y.shape:
                x, wanted = tuple(truth.x.shape), tuple(truth.y.shape)
                return f"its forward gives {tuple(y.shape)} from {x}, its structure {wanted}"
            if y.dtype != torch.float64:
                return f"its forward gives {y.dtype} from float64"
            errors[activation] = _error(y, truth.y)
            if errors[activation] < LIMIT:
                self.activation = activation
                return ""
        params = self.roles.params(self.twin, batch=False)
        known = likely(y, truth.x, variant_of(self.convs), lambda z, i: convolution(z, params, i), LIMIT)
        return known or (
            "its forward computes something else than its structure says: on a random input it is "
            f"{errors['relu']:.2g} of the RMS off with ReLU, {errors[None]:.2g} without"
        )

    def _modes(self) -> Sequence[Mode]:
        """Gradients first, as the dearest to be wrong about."""
        kinds = [(False, False), (True, False)] + [(True, True)] * bool(self.norms)
        modes = [Mode(*kind, grad, x) for grad in (True, False) for kind in kinds for x in (grad, not grad)]
        return [*modes, Mode(False, False, True, True, params=False), Mode(True, False, True, False, params=False)]

    def _set(self, mode: Mode) -> None:
        self.twin.train(mode.training)
        for norm in self.norms:
            norm.train(mode.batch)
        for p in self.parameters:
            p.requires_grad_(mode.params)
        for t, value in zip(self.buffers, self.statistics, strict=True):
            t.copy_(value)

    def _differs(self, mode: Mode) -> str:
        """What the copy does otherwise than its structure says when it is called so; "" for nothing."""
        self._set(mode)
        wants = mode.grad and (mode.x or mode.params)
        index = 0 if wants else 1 + mode.training
        truth = self._truth(index, mode.batch, self.activation)
        before = [m.training for m in self.twin.modules()], [t._version for t in self.parameters]
        x, random = truth.x.clone().requires_grad_(mode.x), torch.get_rng_state()
        with torch.set_grad_enabled(mode.grad):
            # No leaf, and rows of channels, in one of two cases.
            given = x.clone(memory_format=torch.channels_last) if mode.training else x
            y = self.original.forward(self.twin, given)
            if torch.is_grad_enabled() != mode.grad:
                return f"its forward leaves gradients switched{mode}"
        if not isinstance(y, Tensor):
            return f"its forward returns a {type(y).__name__}{mode}"
        if y.shape != truth.y.shape or not _error(y.detach(), truth.y) < LIMIT:
            values = "" if SCALES[index] == 1 else f" on values of {SCALES[index]:g}"
            return f"its forward computes something else{values}{mode}"
        if not torch.equal(torch.get_rng_state(), random):
            return f"its forward draws random numbers{mode}"
        if y.requires_grad != wants:
            return f"its output {'wants a' if y.requires_grad else 'has no'} gradient{mode}"
        if not torch.equal(given, truth.x) or x.requires_grad != mode.x:
            return f"its forward writes into its input{mode}"
        after = [m.training for m in self.twin.modules()], [t._version for t in self.parameters]
        why = self._other_gradient(mode, given, y) if wants else ""
        return why or self._changes(mode, truth, before == after)

    def _changes(self, mode: Mode, truth: _Truth, same: bool) -> str:
        """What the call has left in the copy. same: whether training modes and versions of parameters are as before."""
        if not self.seen.holds():
            reasons = [self.seen.changed(place, module) for place, module in enumerate(self.seen.modules)]
            why = next(filter(None, reasons), self.seen.classes.patched() or "it has another layer")
            return f"its forward changes its attributes{mode}: {why}"
        if not same or any(p.requires_grad != mode.params for p in self.parameters):
            return f"its forward changes its parameters or training modes{mode}"
        if any(a is not b for a, b in zip(self.twin.parameters(), self.parameters, strict=True)):
            return f"its forward replaces a parameter{mode}"
        expected = dict(zip(map(id, self.buffers), self.statistics, strict=True))
        for i, norm in enumerate(self.norms if mode.batch else ()):
            if norm.running_mean is None:
                continue
            expected[id(norm.running_mean)], expected[id(norm.running_var)] = truth.statistics[2 * i : 2 * i + 2]
            if norm.num_batches_tracked is not None:
                expected[id(norm.num_batches_tracked)] = torch.tensor(FRESH_BATCHES + 1)
        for name, t in self.twin.named_buffers():
            if not torch.allclose(t.double(), expected[id(t)].double(), rtol=LIMIT, atol=LIMIT):
                return f"its forward changes its {name} otherwise than its structure says{mode}"
        return ""

    def _other_gradient(self, mode: Mode, x: Tensor, y: Tensor) -> str:
        wanted = [t for t in (x, *self.parameters) if t.requires_grad]
        if not _leaves(y) <= {id(x), *map(id, self.parameters)} | _leaves(x):
            return f"gradients of its output reach a tensor that is not its own{mode}"
        dy, exact = self._gradients(mode.batch)
        if y.retains_grad or y.__dict__ or x.__dict__ or any(p._backward_hooks for p in self.parameters):
            return f"its forward sets hooks or attributes on a tensor{mode}"
        found = dict(zip(map(id, wanted), torch.autograd.grad(y, wanted, dy, allow_unused=True), strict=True))
        names = ["its input", *(name for name, _ in self.twin.named_parameters())]
        # A bias before BatchNorm with batch statistics has a gradient of roundings alone.
        least = NOTHING * max(truth.square().mean().sqrt().item() for truth in exact)
        for name, t, truth in zip(names, (x, *self.parameters), exact, strict=True):
            g = found.get(id(t), truth)
            if g is None or not _error(g, truth, least) < LIMIT:
                return f"the gradient to {name} is {'missing' if g is None else 'something else'}{mode}"
        return ""

    def _others(self) -> str:
        """Where else a block that is right in float64 computes something else; "" for nowhere."""
        self._set(Mode(False, False, True, False))
        truth = self._truth(2, False, self.activation)
        with torch.inference_mode():
            y = self.original.forward(self.twin, truth.x.clone())
            if not _error(y, truth.y) < LIMIT or not y.is_inference():
                return "its forward computes something else in inference mode"
        with torch.no_grad():
            x = truth.x.clone()
            x[0, 0, 0, 0], x[-1, 0, -1, -1] = float("nan"), float("inf")
            y, spoilt = self.original.forward(self.twin, x.clone()), self._reference(x, self.activation, False)[0]
            if not torch.equal(y.isnan(), spoilt.isnan()) or not torch.equal(y.isinf(), spoilt.isinf()):
                return "its forward computes something else on NaN and Inf"
            if not all(map(torch.equal, self.parameters, self.values)):
                return "its forward changes its parameters"
            truth = self._truth(0, False, self.activation)
            single = self.original.forward(self.twin.float(), truth.x.float())
            with torch.autocast("cpu", dtype=torch.bfloat16), torch.enable_grad():
                cast = self.original.forward(self.twin, truth.x.float())
                if not cast.requires_grad:
                    return "its output has no gradient under autocast"
            half = [(t, self.original.forward(self.twin.to(t), truth.x.to(t))) for t in _half_dtypes()]
        for y, dtype, limit, where in (
            (single, torch.float32, LIMIT_FP32, "from float32"),
            (cast, torch.bfloat16, LIMIT_16, "under autocast to bfloat16"),
            *((y, dtype, LIMIT_16, f"from {dtype}".replace("torch.", "")) for dtype, y in half),
        ):
            if y.dtype != dtype:
                return f"its forward gives {y.dtype} {where}"
            if not _error(y.detach().double(), truth.y) < limit:
                return f"its forward computes something else {where}"
        return ""


@cache
def _half_dtypes() -> tuple[torch.dtype, ...]:
    """bfloat16, and float16 where this CPU's PyTorch has convolutions for it."""
    x = torch.ones((1, 1, 3, 3), dtype=torch.float16, device="cpu")
    try:
        F.conv2d(F.relu(F.max_pool2d(x, 3, 1, 1)), x)
        F.batch_norm(x, x[0, 0, 0, :1], x[0, 0, 0, :1])
    except RuntimeError:
        return (torch.bfloat16,)
    return torch.bfloat16, torch.float16


def _error(y: Tensor, truth: Tensor, least: float = 0.0) -> float:
    """Largest error over the RMS, which counts as ``least`` where it is smaller."""
    return ((y - truth).abs().amax() / truth.square().mean().sqrt().clamp(min=least)).item()


def _leaves(y: Tensor) -> set[int]:
    """The ids of the leaves that a gradient of y reaches."""
    found, seen, todo = set(), set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            found.add(id(node.variable))
        todo.extend(parent for parent, _ in node.next_functions)
    return found
