"""The one place where a Triton kernel is launched. The caller has made the tensors' device current.

A launch by Triton's public way looks at every argument anew: 14 us on one CPU, of which 1 us is the launch itself. One
that is prepared keeps the compiled kernel and takes addresses; it knows Triton's private call, and only this file does.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from inception_fused.block.views import Tile
from inception_fused.errors import KernelError
from inception_fused.runtime.submit import Operands, Place, PreparedLaunch, submit, watchers

INTERPRETED = knobs.runtime.interpret
"""Whether this process interprets kernels on the CPU; Triton decides it when a kernel is decorated."""

OPTIONS = {"enable_fp_fusion": True}
"""Said explicitly: the default changes between Triton 3.9 and 3.10, and 3.9 warns where it is not said."""

TRITON_NAMES = {
    torch.uint8: "u8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}

PRIVATE_CALL = ((3, 5), (3, 9))
"""The Tritons, first and last, whose CompiledKernel.run is called as :func:`_addressed` does: with each of them the
driver gets the same bytes as by the public way (tests/runtime/test_launcher.py). Others get CompiledKernel's public
way, which costs 2 us more."""

_lock = threading.Lock() if INTERPRETED else nullcontext()
"""The interpreter replaces functions of triton.language while a kernel runs, so one thread at a time."""

if INTERPRETED:
    from inception_fused.runtime import interpreter

    interpreter.repair()


class Arguments(NamedTuple):
    """What a kernel is given. programs: of its grid; args, constexprs: as of a Launch, without its tile's."""

    programs: int
    args: tuple[Any, ...]
    constexprs: dict[str, Any]


Call = tuple[Sequence[Any], Mapping[str, Any]]
"""What a launcher takes: operands, and those that have names, tile and unit among them."""


class Launch(NamedTuple):
    """One launch. args: positional arguments of the kernel up to its constexprs, which are given by name."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constexprs: dict[str, Any]
    tile: Tile

    def run(self) -> None:
        """Enqueue on the current stream. Raises KernelError if Triton cannot compile or launch."""
        try:
            with _lock:
                self.kernel[self.grid](*self.args, **self.constexprs, **self.tile._asdict(), **OPTIONS)
        except Exception as error:
            raise KernelError(f"{self.describe()} failed: {type(error).__name__}: {error}") from error

    def compile(self) -> Any:
        """Triton's CompiledKernel for this launch, which is not run; from its cache where it has one."""
        return self.kernel.warmup(*self.args, grid=self.grid, **self.constexprs, **self.tile._asdict(), **OPTIONS)

    def prepare(self, place: Place) -> PreparedLaunch:
        """The same launch for operands at other addresses, which must be multiples of 16 where these are."""
        constants = self.constexprs | self.tile._asdict()
        tail = [constants[name] for name in self.kernel.arg_names[len(self.args) :]]
        if INTERPRETED:
            return _interpreted(self, place, tail)
        return _addressed(self, place, tail, self.compile())

    def describe(self) -> str:
        return f"{self.kernel.fn.__name__}: launch of {self.grid[0]} programs with {self.tile}"


def launch(kernel: Any, grid: tuple[int, ...], args: tuple[Any, ...], constexprs: dict[str, Any], tile: Tile) -> None:
    """Run a kernel, or have it recorded.

    Triton's launcher skips a grid of 2**31 programs or more without a word, but no block has one: each program has at
    least 16x16 outputs of its own, about 1 TiB in all, or a tile of the weights, which choice.exceeds_int32 bounds. Of
    a second dimension beyond 65535 the driver says that it is invalid.
    """
    submit(Launch(kernel, grid, args, constexprs, tile))


def launcher_of(kernel: Any, arguments: Callable[..., Arguments]) -> Callable[..., None]:
    """The launcher of a kernel by itself: it takes what ``arguments`` takes, the tile among it by name."""

    def launch_one(*args: Any, tile: Tile, **given: Any) -> None:
        found = arguments(*args, tile=tile, **given)
        launch(kernel, (found.programs,), found.args, found.constexprs, tile)

    return launch_one


def launch_pair(
    kernel: Any, first: tuple[Arguments, Tile], second: tuple[Arguments, Tile], own: tuple[str, ...] = ()
) -> None:
    """Run two kernels' programs as one grid, the first's before the second's, or have that recorded.

    kernel: takes the arguments of the one, then of the other. own: constexprs that each has of its own, numbered 1 and
    2; the others are common to both. Tiles have one number of warps. The launch's stages and blocks are the first's;
    the second's have a 2 behind their name.
    """
    (one, tile), (other, tile2) = first, second
    common = {name: value for name, value in (one.constexprs | other.constexprs).items() if name not in own}
    differs = [name for name, value in common.items() if one.constexprs.get(name, value) != value]
    if differs or tile.num_warps != tile2.num_warps:
        raise KernelError(f"{kernel.fn.__name__}: its halves differ in {', '.join(differs) or 'num_warps'}")
    numbered = {f"{name}{i}": half.constexprs[name] for i, half in enumerate((one, other), 1) for name in own}
    blocks = {f"{name}2": value for name, value in tile2._asdict().items() if not name.startswith("num_")}
    blocks["STAGES2"] = tile2.num_stages
    grid, args = (one.programs + other.programs,), (*one.args, *other.args)
    submit(Launch(kernel, grid, args, common | numbered | blocks, tile))


def kind_of(arg: Any) -> Any:
    """Triton's name for the type of a launch's argument; of a tuple one for each item."""
    if isinstance(arg, tuple):
        return tuple(map(kind_of, arg))
    if isinstance(arg, Tensor):
        return "*" + TRITON_NAMES[arg.dtype]
    if arg is None:
        return "constexpr"
    return "fp32" if isinstance(arg, float) else "i32"


def binary_key(launch: Launch) -> tuple[Any, ...]:
    """What makes Triton compile anew: kernel, types, operands off 16-byte boundaries, constexprs, warps and stages;
    sizes do not."""
    kinds = tuple(map(kind_of, launch.args))
    aligned = tuple(map(is_aligned, launch.args))
    fixed = tuple(sorted((name, str(value)) for name, value in launch.constexprs.items()))
    return (launch.kernel.fn.__name__, kinds, aligned, fixed, tuple(launch.tile))


def is_aligned(arg: Any) -> Any:
    """Whether Triton may take a launch's argument for a pointer to a 16-byte boundary; of a tuple one for each item."""
    if isinstance(arg, tuple):
        return tuple(map(is_aligned, arg))
    return not isinstance(arg, Tensor) or arg.is_meta or arg.data_ptr() % 16 == 0


def _addressed(launch: Launch, place: Place, tail: list[Any], compiled: Any) -> PreparedLaunch:
    """A launch of a CompiledKernel, with addresses in the place of tensors."""
    template = [*launch.args, *tail]
    places = [(i, *place(arg)) for i, arg in enumerate(template) if isinstance(arg, Tensor)]
    nested = [
        (i, [(j, *place(item)) for j, item in enumerate(arg) if isinstance(item, Tensor)])
        for i, arg in enumerate(template)
        if isinstance(arg, tuple) and any(isinstance(item, Tensor) for item in arg)
    ]
    # The tensors of the call that was observed would live as long as the recipe.
    template = [_without_tensors(arg) for arg in template]
    x, y, z = grid = (*launch.grid, 1, 1)[:3]
    version = tuple(map(int, triton.__version__.split(".")[:2]))
    known = PRIVATE_CALL[0] <= version <= PRIVATE_CALL[1]
    try:
        public, call, function, metadata = compiled[grid], None, None, None
        if known:
            call, function, metadata = compiled.run, compiled.function, compiled.packed_metadata
    except (AttributeError, TypeError) as error:
        # The call that was observed has succeeded: what cannot be kept is planned again.
        raise LookupError(f"this Triton's handle cannot be kept: {error}") from error
    what = launch.describe()

    def run(operands: Operands) -> None:
        args, addresses = template.copy(), operands.addresses
        for i, slot, offset in places:
            args[i] = addresses[slot] + offset
        for i, items in nested:
            filled = list(args[i])
            for j, slot, offset in items:
                filled[j] = addresses[slot] + offset
            args[i] = tuple(filled)
        try:
            if known:
                call(x, y, z, operands.stream, function, metadata, None, None, None, *args)
            else:
                public(*args, stream=operands.stream)
        except Exception as error:
            raise KernelError(f"{what} failed: {type(error).__name__}: {error}") from error

    return run


def _without_tensors(arg: Any) -> Any:
    """An argument with 0 in the place of every tensor."""
    if isinstance(arg, tuple):
        return tuple([_without_tensors(item) for item in arg])
    return 0 if isinstance(arg, Tensor) else arg


def _interpreted(launch: Launch, place: Place, tail: list[Any]) -> PreparedLaunch:
    """A launch of the interpreter, which wants tensors: those in the slots, or parts of the buffer of temporaries."""

    def finder(arg: Any) -> Callable[[Operands], Any]:
        if isinstance(arg, tuple):
            finders = [finder(item) for item in arg]
            return lambda operands: tuple([find(operands) for find in finders])
        if not isinstance(arg, Tensor):
            return lambda operands: arg
        (slot, offset), dtype = place(arg), arg.dtype
        size = arg.untyped_storage().nbytes() - arg.storage_offset() * arg.element_size()

        def find(operands: Operands) -> Tensor:
            base = operands.tensors[slot]
            return base if base.dtype == dtype and not offset else base[offset : offset + size].view(dtype)

        return find

    finders, what = [finder(arg) for arg in (*launch.args, *tail)], launch.describe()
    # Not the launch itself, whose tensors would live as long as the recipe.
    kernel, grid = launch.kernel, launch.grid

    def run(operands: Operands) -> None:
        try:
            with _lock:
                kernel[grid](*[find(operands) for find in finders])
        except Exception as error:
            raise KernelError(f"{what} failed: {type(error).__name__}: {error}") from error

    return run


def _hooked() -> bool:
    """Whether a profiler wants to hear of each launch, which Triton's public call tells it."""
    runtime = knobs.runtime
    return bool(_calls(runtime.launch_enter_hook) or _calls(runtime.launch_exit_hook))


watchers.append(_hooked)


def _calls(hook: Any) -> Any:
    """What a hook calls: it is None, a function, or a chain of functions that may be empty."""
    return getattr(hook, "calls", hook)


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """fp32 for every dtype that a GPU runs; fp64 for fp64, which only the interpreter does (gradient checks)."""
    return tl.float64 if dtype == torch.float64 else tl.float32
