"""``precompile(model, x)``: every Triton binary that a model's blocks need, compiled in threads before the first step.

A block's launches are recorded on its real input and compiled without being run, and so are those of GoogLeNet's
max-pools of stride 2. Then each block runs three times, so
that its binaries are loaded and its launches remembered (runtime/replay.py): what follows, such as the capture of a
CUDA graph, compiles, loads and waits for nothing. A block whose BatchNorm trains is made ready for eval too, as the
test after an epoch runs it.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Hashable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.block import folding
from inception_fused.block.batch_stats import NONE, modes_of, takes_batch
from inception_fused.block.chains import each
from inception_fused.block.leaves import is_tracked, leaf
from inception_fused.block.reference import InceptionParams
from inception_fused.block.tensor_lists import BlockTensors, Flags
from inception_fused.block.views import accumulator_of
from inception_fused.errors import InceptionInputError, KernelError
from inception_fused.op import backends, normed, normed_autograd, reasons, saved
from inception_fused.op.autograd import convolved
from inception_fused.op.saved import dtype_names
from inception_fused.runtime.submit import Runnable, record
from inception_fused.tools.capture import Item, arguments, capture, quiet
from inception_fused.tools.pool_calls import PoolCall, pools_of
from inception_fused.tools.progress import bar_library
from inception_fused.tools.progress import progress as behind_a_bar

WARM_RUNS = 3
"""The second run of a kind is observed, the third is from memory: see runtime/replay.py."""


class Precompiled(NamedTuple):
    """The result of :func:`precompile`: ``print`` shows it.

    binaries: how many there are, those that Triton's cache had included. seconds: of the whole call. blocks: names of
    those that are ready. skipped: the others, name -> reason.
    """

    binaries: int
    seconds: float
    blocks: tuple[str, ...]
    skipped: dict[str, str]

    def __str__(self) -> str:
        number = len(self.blocks)
        line = f"{self.binaries} binaries for {number} block{'s' * (number != 1)} in {self.seconds:.1f} s"
        return "\n".join([line, *(f"{name}: skipped: {reason}" for name, reason in self.skipped.items())])


def precompile(
    model: nn.Module, x: Tensor, *, backward: bool = True, threads: int | None = None, progress: bool = True
) -> Precompiled:
    """Compile what the blocks of a model need for inputs like x, and run each block until its launches are remembered;
    likewise the max-pools of stride 2 of GoogLeNet, and what b1 has in its.

    model: a block or a model with blocks in it, in any mode; x: what ``model(x)`` takes, on the model's device, of the
    shape, dtype and strides to come. backward: whether the backward is compiled too, for the gradients that the
    parameters' ``requires_grad`` asks for and a dy in channels_last or NCHW memory. threads: of the compiler; None
    takes the CPU cores, shared with the other processes that torchrun has started here. progress: a bar on stderr
    where that is a terminal and tqdm is installed, else a line at the end.

    Runs ``model(x)`` once, in eager PyTorch, under the caller's autocast, for each block's input (of its first call).
    Blocks run on detached copies under the caller's :func:`inception_fused.backend`; the model is left as it was:
    mode, parameters and their gradients, buffers, random numbers. Several processes may share Triton's cache.
    A block that the kernels cannot run is skipped, with the reason, whatever the backend demands.

    Raises:
        InceptionInputError: a model without such a block, an x with which it does not run, threads below 1.
        KernelError: a kernel does not compile or cannot be launched.
    """
    started = time.perf_counter()
    blocks = arguments(model, x, backward)
    if threads is not None and (isinstance(threads, bool) or not isinstance(threads, int) or threads < 1):
        raise InceptionInputError(f"threads: got {threads!r}, wants a positive number, or None for the CPU's cores")
    with backends.backend("eager"):
        # With kernels the model itself would compile them, one after another.
        pools = pools_of(model)
        captured = capture(model, blocks | pools, x, gradients=True)
    items, pooled = captured[: len(blocks)], captured[len(blocks) :]
    skipped = {item.name: reason for item in items if (reason := _why_skipped(item)) is not None}
    calls = [call for item in items if item.name not in skipped for call in _Call.of(item)]
    with torch.inference_mode(False), quiet():
        pool_calls = [call for item in pooled if (call := PoolCall.of(pools[item.name], item)) is not None]
        compilers: dict[Hashable, Callable[[], Any]] = {}
        for call in (*calls, *pool_calls):
            for key, compiler in _compilers(call.launches(backward), call.x.device):
                compilers.setdefault(key, compiler)
        errors = compile_together(list(compilers.values()), threads, progress=progress)
        if errors:
            raise KernelError(f"{len(errors)} of {len(compilers)} binaries do not compile: {errors[0]}") from errors[0]
        for call in (*calls, *pool_calls):
            call.warm(backward, WARM_RUNS)
        for device in {call.x.device for call in calls if call.x.is_cuda}:
            # A launch that fails says so here.
            torch.cuda.synchronize(device)
    names = tuple(item.name for item in items if item.name not in skipped)
    found = Precompiled(len(compilers), time.perf_counter() - started, names, skipped)
    if progress and not bar_library():
        print(f"inception_fused: {found}", file=sys.stderr)
    return found


def compile_together(
    compilers: Sequence[Callable[[], Any]], threads: int | None = None, *, progress: bool = False
) -> list[Exception]:
    """Call all of them in threads, behind a bar where there may be one; returns what they have raised."""
    if not compilers:
        return []
    with ThreadPoolExecutor(max_workers=threads or usual_threads()) as pool:
        done: Iterable[Future] = as_completed([pool.submit(compiler) for compiler in compilers])
        if progress:
            done = behind_a_bar(done, len(compilers), "compiling", "kernel")
        return [error for future in done if (error := future.exception()) is not None]


def usual_threads() -> int:
    """The CPU cores that this process may use, divided by the processes that torchrun has started on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    processes = os.environ.get("LOCAL_WORLD_SIZE", "1")
    return max(1, cores // max(1, int(processes) if processes.isdigit() else 1))


def _why_skipped(item: Item) -> str | None:
    """Why there is nothing to compile for a block; None where there is."""
    if item.x is None:
        return item.why
    reason = item.block.eager_reason()
    if reason is not None:
        return f"{reason}, so it runs its own children: nothing to compile"
    if item.x.numel() == 0:
        return "its input is empty"
    x, params = item.x, item.block.params()
    reason = reasons.first(x.device, item.dtype, backends.current(), x=x, params=params)
    return None if reason is None else f"{reason.text}: nothing to compile"


class _Call(NamedTuple):
    """A block's call. x: its input; tensors: detached; needs: whether a gradient of x and of each of the tensors is
    wanted; modes: of its BatchNorms where one takes the statistics of the batch, else none."""

    item: Item
    x: Tensor
    tensors: BlockTensors
    needs: Flags
    modes: Sequence[int]

    @classmethod
    def of(cls, item: Item) -> list[_Call]:
        """The call as it is and, where BatchNorm trains, the one without gradients in eval."""
        params = item.block.params()
        if not takes_batch(params.batch_norms):
            return [cls._with(item, params, True)]
        return [cls._with(item, params, True), cls._with(item, item.block.params_in_eval(), False)]

    @classmethod
    def _with(cls, item: Item, params: InceptionParams, wanted: bool) -> _Call:
        tensors, norms = folding.tensors_of(params), params.batch_norms
        needs = [wanted and item.x_grad, *(wanted and t.requires_grad and is_tracked(t) for t in tensors.flat)]
        detached = BlockTensors.of([t.detach() for t in tensors.flat], tensors.eps)
        modes = modes_of(norms) if takes_batch(norms) else ()
        return cls(item, item.x, detached, Flags.of(needs, tensors.eps), modes)

    def launches(self, backward: bool) -> list[Runnable]:
        """What this call would launch. Nothing is run: outputs hold what they hold."""
        relu, backend = self.item.block.activation == "relu", backends.current()
        x, made = self.x.to(self.item.dtype), self._normed if self.modes else self._usual
        with torch.no_grad(), record() as launches:
            made(x, relu, backend, backward)
        return launches

    def _usual(self, x: Tensor, relu: bool, backend: str, backward: bool) -> None:
        """Calls the operators for this call, those of gradients where they are wanted."""
        weights, biases, norms, eps = self.tensors
        needs, saves = folding.operator_needs(self.needs).flat, saved.saves(self.needs, relu)
        more = (norms, list(eps)) if norms else ()
        torch.ops.inception_fused._infer(x, weights, biases, relu, backend, *more)
        if not any(needs):
            return
        y, *outputs = torch.ops.inception_fused._forward(x, weights, biases, relu, *saves, backend, *more)
        kinds = [b.dtype for b in biases]
        if norms:
            weights = folding.Folded.of(self.tensors, x.dtype).weights
            kinds = each(accumulator_of(x.dtype), weights)
        for dy in _layouts(y) if backward else ():
            torch.ops.inception_fused._backward(dy, x, *outputs, weights, dtype_names(kinds), relu, needs, backend)

    def _normed(self, x: Tensor, relu: bool, backend: str, backward: bool) -> None:
        """The same with the statistics of the batch."""
        weights, biases, norms, eps = self.tensors
        needs, operators = normed_autograd.operator_needs(self.needs), torch.ops.inception_fused
        given = (x, weights, biases, norms, eps, self.modes, relu)
        operators._normed(*given, *normed_autograd.SAVES_NOTHING, backend)
        if not any(needs.flat):
            return
        y, *outputs = operators._normed(*given, *normed.saves(needs, relu), backend)
        dtypes = BlockTensors.of([t.dtype for t in self.tensors.flat], eps)
        vectors = normed_autograd.vector_dtypes(dtypes, self.needs)
        for dy in _layouts(y) if backward else ():
            operators._normed_backward(dy, x, *outputs, weights, eps, self.modes, vectors, relu, needs.flat, backend)

    def warm(self, backward: bool, runs: int) -> None:
        """Run the block as the model would, on leaves of its own, whose gradients nobody keeps."""
        given = (self.x, *self.tensors.flat)
        x, *leaves = (leaf(t, need) for t, need in zip(given, self.needs.flat, strict=True))
        wanted = [t for t in (x, *leaves) if t.requires_grad]
        there = [mode != NONE for mode in self.modes] or None
        params = folding.params_of(BlockTensors.of(leaves, self.tensors.eps), there)

        def forward() -> Tensor:
            with self.item.autocasting():
                return convolved(x, params, activation=self.item.block.activation)

        for _ in range(runs):
            with torch.no_grad():
                forward()
            if not wanted:
                continue
            with torch.enable_grad():
                y = forward()
            for dy in _layouts(y.detach()) if backward else ():
                torch.autograd.grad(y, wanted, dy, retain_graph=True)


def _layouts(y: Tensor) -> list[Tensor]:
    """dy as it comes to a block: in y's channels_last memory, and NCHW as from an average pool."""
    ones = torch.ones_like(y)
    dense = ones.contiguous()
    return [ones] if dense.stride() == ones.stride() else [ones, dense]


def _compilers(launches: Sequence[Any], device: torch.device) -> list[tuple[Hashable, Callable[[], Any]]]:
    """(identity, compile) of each binary of some launches."""
    if reasons.interpreting() and device.type == "cpu":
        return []
    return [_compiler(launch, device) for launch in launches if hasattr(launch, "compile")]


def _compiler(launch: Any, device: torch.device) -> tuple[Hashable, Callable[[], Any]]:
    """The identity of a launch's binary, and how to compile it on whatever thread."""
    from inception_fused.runtime.launch import binary_key

    key, light = binary_key(launch), launch._replace(args=_without_memory(launch.args))

    def compiler() -> Any:
        # A thread begins on device 0, and Triton compiles for the current one.
        with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
            try:
                return light.compile()
            except Exception as error:
                raise KernelError(f"{light.describe()}: {type(error).__name__}: {error}") from error

    return (device, key), compiler


def _without_memory(arg: Any) -> Any:
    """A launch's argument with tensors of no memory, which would hold every block's activations until all is compiled;
    one that lies off a 16-byte boundary stays, since its address matters."""
    if isinstance(arg, tuple):
        return tuple(map(_without_memory, arg))
    if not isinstance(arg, Tensor) or arg.data_ptr() % 16:
        return arg
    return torch.empty(0, dtype=arg.dtype, device="meta")
