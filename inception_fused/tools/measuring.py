"""What one block costs: launches, bytes held between forward and backward, peak memory, time; ours beside eager's.

Both run on detached copies of the block's parameters with every gradient wanted, ours on x and the weights as they
are, eager on channels_last ones, the layout in which it is fastest. A block whose BatchNorm trains is measured so,
without the update of running statistics in either. Nothing of the block is changed.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inception_fused.block.chains import ends
from inception_fused.block.leaves import leaf, learned, with_learned
from inception_fused.block.reference import inception_reference
from inception_fused.modules.fused_inception import Block
from inception_fused.op import normed_operators, operators
from inception_fused.op.autograd import compute_dtype, convolved
from inception_fused.runtime.submit import count, launching
from inception_fused.tools.timing import LEAD_LIMIT_US, LEAD_MARGIN, SPIN_CYCLES_PER_US

CPU_RUNS, CUDA_RUNS = 7, 30
"""Timed calls of each of the two at most: medians of so many still differ by some percent from run to run."""

CPU_SECONDS = 0.5
"""On a CPU no further call is timed after so long, but three in any case."""

ALLOCATIONS = frozenset(("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"))
"""ATen operators that write nothing; views know it of themselves."""


class Launches(NamedTuple):
    """ours: launches of this package's kernels. aten: GPU kernels that ATen launched beside them or, on a CPU, its
    operators that compute; None where no profiler could tell."""

    ours: int
    aten: int | None

    @property
    def total(self) -> int:
        return self.ours + (self.aten or 0)


class Pair(NamedTuple):
    """One figure of both: of the fused block and of eager PyTorch."""

    fused: Any
    eager: Any


class Costs(NamedTuple):
    """Figures of one block; of a pass that was not run, or not measured, None.

    launches_forward, launches_backward: pairs of :class:`Launches`. held_bytes: what autograd keeps from the forward
    for the backward, beyond the parameters and x. peak_bytes: CUDA memory at the worst moment of a step beyond what was
    there before it. forward_us, step_us: time of the forward without gradients, and of forward and backward.
    host_us: until the call of a step (of the forward, where no backward is run) returns, on CUDA.
    """

    launches_forward: Pair
    launches_backward: Pair | None = None
    held_bytes: Pair | None = None
    peak_bytes: Pair | None = None
    forward_us: Pair | None = None
    step_us: Pair | None = None
    host_us: Pair | None = None


class Contender(NamedTuple):
    """A block to be measured. block(leaves) is its forward; leaves: x and the parameters; dy: the gradient of y."""

    block: Callable[[Sequence[Tensor]], Tensor]
    leaves: tuple[Tensor, ...]
    dy: Tensor

    def infer(self) -> Tensor:
        with torch.no_grad():
            return self.block(self.leaves)

    def forward(self) -> Tensor:
        with torch.enable_grad():
            return self.block(self.leaves)

    def gradients(self, y: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(y, self.leaves, self.dy, allow_unused=True)

    def step(self) -> None:
        self.gradients(self.forward())


def contenders(block: Block, x: Tensor, autocast: torch.dtype | None) -> Pair:
    """The fused block and eager's, each a :class:`Contender`, under autocast to a dtype or without (None)."""
    params = block.params()
    with torch.autocast(x.device.type, dtype=autocast) if autocast else nullcontext():
        dtype = compute_dtype(x)
    channels = sum(w.shape[0] for w in ends(params.weights))
    dy = x.new_ones((x.shape[0], channels, *x.shape[2:]), dtype=dtype).contiguous(memory_format=torch.channels_last)
    given = [t.detach() for t in (x, *learned(params).values())]

    def contender(run: Callable[..., Tensor], leaves: Sequence[Tensor]) -> Contender:
        def call(leaves: Sequence[Tensor]) -> Tensor:
            # Entered anew for each call, since it keeps the weights that it has cast until it is left.
            with torch.autocast(x.device.type, dtype=autocast) if autocast else nullcontext():
                return run(leaves[0], with_learned(params, leaves[1:]), block.activation)

        return Contender(call, tuple(map(leaf, leaves)), dy)

    dense = [t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t for t in given]
    fused = contender(lambda x, params, activation: convolved(x, params, activation=activation), given)
    return Pair(fused, contender(inception_reference, dense))


def costs(pair: Pair, device: torch.device, *, backward: bool, timed: bool) -> Costs:
    """Every figure of a :func:`contenders` pair. timed: whether the clock runs too, after a
    warm-up; a GPU needs it."""
    if timed:
        for contender in pair:
            # Compilation, algorithm search and the allocator's first blocks belong to no figure.
            contender.step() if backward else contender.infer()
    if backward:
        steps = [count_step(contender, device) for contender in pair]
        found = Costs(*(Pair(*figures) for figures in zip(*steps, strict=True)))
    else:
        found = Costs(Pair(*(count_launches(contender.infer, device) for contender in pair)))
    step = [c.step if backward else c.infer for c in pair]
    if device.type == "cuda":
        found = found._replace(peak_bytes=Pair(*(peak_bytes(call, device) for call in step)))
    if timed:
        forward_us, host_us = _paired(clock([c.infer for c in pair], device))
        found = found._replace(forward_us=forward_us, host_us=host_us)
        if backward:
            step_us, host_us = _paired(clock(step, device))
            found = found._replace(step_us=step_us, host_us=host_us)
    return found


def _paired(times: tuple[list[float], list[float] | None]) -> tuple[Pair, Pair | None]:
    us, host_us = times
    return Pair(*us), None if host_us is None else Pair(*host_us)


def count_launches(call: Callable[[], object], device: torch.device) -> Launches:
    """The launches of one call: the one way in which this package counts them.

    Ours are counted where all of them go, runtime/submit.py, interpreted ones as well. ATen's are counted on CUDA as
    the GPU kernels that torch.profiler sees less ours; copies and fills by the copy engine are no kernels. A CPU
    launches nothing: there ATen's are the operators that compute, those inside this package's operators included;
    views, allocations and operators that return no tensor are left out.

    The call runs once; on CUDA it should have run before, so that no search for algorithms is counted. What other
    threads launch meanwhile is counted along. On CUDA no other profiler may be running.
    """
    if device.type != "cuda":
        with count() as ours, _Operators() as dispatched:
            call()
        return Launches(len(ours), dispatched.computing)
    torch.cuda.synchronize(device)
    if not _profiler_sees(device.index):
        with count() as ours:
            call()
        return Launches(len(ours), None)
    with _gpu_profiler() as profiler, count() as ours:
        call()
        torch.cuda.synchronize(device)
    kernels = gpu_kernels(profiler.events())
    return Launches(len(ours), kernels - len(ours) if kernels >= len(ours) else None)


@cache
def _profiler_sees(index: int | None) -> bool:
    """Whether torch.profiler sees a GPU's kernels: without rights to CUPTI, as in many containers, it sees none.

    Its first use, which may lose events while CUPTI starts, is spent here.
    """
    if torch.profiler.ProfilerActivity.CUDA not in torch.profiler.supported_activities():
        return False
    device = torch.device("cuda", index if index is not None else torch.cuda.current_device())
    for _ in range(2):
        with _gpu_profiler() as profiler:
            torch.ones(64, device=device).sin_()
            torch.cuda.synchronize(device)
    return gpu_kernels(profiler.events()) > 0


def _gpu_profiler() -> torch.profiler.profile:
    return torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])


def gpu_kernels(events: Sequence[Any]) -> int:
    """How many of torch.profiler's events are kernels that ran on a GPU."""
    on_gpu = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    marks = ("Memcpy", "Memset", "ProfilerStep", "Context Sync", "Stream Sync", "Event Sync", "Stream Wait Event")
    return sum(not event.name.startswith(marks) and not getattr(event, "is_user_annotation", False) for event in on_gpu)


class _Operators(TorchDispatchMode):
    """Counts the ATen operators that compute, on this thread, which on a CPU runs the backward too."""

    computing = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, _, name = func._schema.name.partition("::")
        if namespace == "inception_fused":
            # The implementation itself, with the mode on: called as an operator it would hide what it calls.
            with self:
                home = operators if hasattr(operators, name) else normed_operators
                return getattr(home, name)(*args, **(kwargs or {}))
        if launching():
            return func(*args, **(kwargs or {}))
        out = func(*args, **(kwargs or {}))
        tensors = any("Tensor" in str(value.type) for value in func._schema.returns)
        self.computing += tensors and name not in ALLOCATIONS and not (func.is_view and _is_alias(out, args))
        return out


def _is_alias(out: Any, args: Sequence[Any]) -> bool:
    """Whether what a view operator returned lies in memory that it was given: contiguous() and to() may copy."""
    if not isinstance(out, Tensor):
        return True
    given = {t.untyped_storage().data_ptr() for t in args if isinstance(t, Tensor)}
    return out.untyped_storage().data_ptr() in given


def count_step(contender: Contender, device: torch.device) -> tuple[Launches, Launches, int]:
    """Launches of a forward and of its backward, and the bytes that autograd holds between the two.

    Every storage counts once and whole; those of x and the parameters do not, since they are there anyway.
    """
    known = {t.untyped_storage().data_ptr() for t in contender.leaves}
    held: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return t

    y: list[Tensor] = []  # keeps what is saved alive: a freed storage's address would serve twice
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward = count_launches(lambda: y.append(contender.forward()), device)
    return forward, count_launches(lambda: contender.gradients(y[0]), device), sum(held.values())


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """CUDA memory that PyTorch's allocator hands out at the worst moment of a call, beyond what it had before.

    Resets the device's peak statistics.
    """
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def clock(calls: Sequence[Callable[[], object]], device: torch.device) -> tuple[list[float], list[float] | None]:
    """Median microseconds of each call, in turn so that none has the cooler machine; then the host's, on CUDA.

    On CUDA the time between two events, the device held back by a spinning kernel until the host has enqueued the
    call: what the kernels take where the host is ahead, as inside a network. What the host needs is the second list.
    On a CPU it is wall-clock time, and the second is None. The calls should have run before.
    """
    if device.type != "cuda":
        walls: list[list[float]] = [[] for _ in calls]
        begin = time.perf_counter()
        for i in range(CPU_RUNS):
            if i >= 3 and time.perf_counter() - begin > CPU_SECONDS:
                break
            for call, times in zip(calls, walls, strict=True):
                start = time.perf_counter()
                call()
                times.append((time.perf_counter() - start) * 1e6)
        return [median(times) for times in walls], None

    host = [median(_host_us(call, device) for _ in range(5)) for call in calls]
    spin = getattr(torch.cuda, "_sleep", None)
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in calls]
    for _ in range(CUDA_RUNS):
        for call, lead_us, pairs in zip(calls, host, events, strict=True):
            pair = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            if spin is not None:
                spin(int(min(LEAD_MARGIN * lead_us, LEAD_LIMIT_US) * SPIN_CYCLES_PER_US))
            pair[0].record()
            call()
            pair[1].record()
            pairs.append(pair)
    torch.cuda.synchronize(device)
    return [median(start.elapsed_time(end) * 1e3 for start, end in pairs) for pairs in events], host


def _host_us(call: Callable[[], object], device: torch.device) -> float:
    """Microseconds until a call returns, on an idle device."""
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    call()
    passed = (time.perf_counter() - start) * 1e6
    torch.cuda.synchronize(device)
    return passed
