"""The compiled extension as the package sees it: what the installation built, whether it runs here, and its launchers.

The extension itself (csrc/, ``inception_fused._native``) knows addresses and sizes only. It is optional: where it is
missing every kernel has a Triton twin, and :func:`facts` says why it is missing and what brings it.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inception_fused.block.views import ChannelSlice, Epilogue, Tile
from inception_fused.errors import KernelError
from inception_fused.runtime.failures import Failure, failure
from inception_fused.runtime.probing import remembered
from inception_fused.runtime.submit import Operands, Place, PreparedLaunch, submit

ELEMENTS = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "tf32"}
VECTOR_TYPES = {torch.float32: 1, torch.float16: 2, torch.bfloat16: 3, torch.float64: 4}
"""As csrc/grouped_gemm.h numbers them; 0 is none."""

RECORD = Path(__file__).parents[1] / "_build.json"
"""What the installation wrote of its attempt to build the extension."""

REINSTALL = "python -m pip install -e . with this Python, in the folder of this copy"

NEVER_BUILT = {
    "built": False,
    "reason": "this copy of the package was not installed, so nothing was built",
    "remedy": REINSTALL,
}


INTERFACE = 2
"""Version of the binding, as csrc/bind.cpp has it; counted up there and here when its functions change."""


@cache
def extension() -> ModuleType:
    """The extension module. Raises ImportError where there is none that this Python can load, or it is another's."""
    module = importlib.import_module("inception_fused._native")
    if Path(module.__file__).resolve().parent != Path(__file__).resolve().parents[1]:
        # An editable install of another checkout serves its own extension to any package of this name.
        raise ImportError(f"{module.__file__} belongs to another copy of inception_fused")
    if getattr(module, "INTERFACE", None) != INTERFACE:
        raise ImportError("the extension was built from older or newer sources than this package")
    return module


def facts() -> dict[str, Any]:
    """The outcome of the build, ready for JSON.

    Keys: built (for this Python), reason and remedy (why not, and what to do; None where built), cuda, compiler,
    architectures, ptx, host_compiler, python, seconds (of the build), loaded (whether this Python can load it) and
    error (why not, or None).
    """
    error = None
    try:
        extension()
    except ImportError as reason:
        error = str(reason)
    try:
        found = json.loads(RECORD.read_text())
    except (OSError, ValueError):
        found = dict(NEVER_BUILT)
    python, here = found.get("python", sys.implementation.cache_tag), sys.implementation.cache_tag
    if python != here:
        # Several Pythons may share a checkout; the record is the last one's.
        found = {"built": error is None, "python": here, "reason": None, "remedy": None}
        if error is not None:
            found |= {"reason": f"the last installation was for {python}, this is {here}", "remedy": REINSTALL}
    return {**found, "loaded": error is None, "error": error}


def why_no_extension(device: torch.device) -> str | None:
    """Why no compiled kernel can run on a device, with the remedy; None where they can."""
    try:
        module = extension()
    except ImportError as error:
        found = facts()
        if found["built"]:
            return f"the compiled extension does not load: {error}; {REINSTALL}"
        return f"the compiled extension was not built: {found['reason']}; {found['remedy']}"
    if device.type == "cpu":
        # Only a build for simulated hardware, as the tests make one, runs on host memory.
        return None if getattr(module, "SIMULATED", False) else "x is on the CPU; compiled kernels run on a CUDA device"
    return _unloadable(device.index if device.index is not None else torch.cuda.current_device())


@remembered
def _unloadable(index: int) -> Failure | None:
    try:
        extension().probe(device=index)
    except RuntimeError as error:
        return failure(error)
    return None


class Address(NamedTuple):
    """Where an operand begins: ``offset`` bytes behind a tensor's first element. It keeps the tensor alive."""

    tensor: Tensor
    offset: int = 0


class NativeLaunch(NamedTuple):
    """One launch of the extension. arguments: its keywords, less device and stream; an :class:`Address` for each
    operand, alone or in a tuple."""

    function: str
    arguments: dict[str, Any]
    device: torch.device

    def run(self) -> None:
        """Enqueue on the current stream of the device. Raises KernelError where the extension or CUDA refuses."""
        addresses = {name: _found(argument, _address) for name, argument in self.arguments.items()}
        on_cuda = self.device.type == "cuda"
        stream = torch.cuda.current_stream(self.device).cuda_stream if on_cuda else 0
        self._enqueue(addresses, self.device.index or 0, stream)

    def _enqueue(self, arguments: dict[str, Any], device: int, stream: int) -> None:
        try:
            getattr(extension(), self.function)(**arguments, device=device, stream=stream)
        except (ImportError, RuntimeError, TypeError, ValueError) as error:
            raise KernelError(f"compiled kernel: {error}") from error

    def prepare(self, place: Place) -> PreparedLaunch:
        """The same launch for operands at other addresses."""
        slots = {
            name: _found(argument, lambda a: _Slot(place(a.tensor), a.offset))
            for name, argument in self.arguments.items()
        }
        bare = self._replace(arguments={})

        def run(operands: Operands) -> None:
            def address(slot: _Slot) -> int:
                (index, start), offset = slot
                return operands.addresses[index] + start + offset

            arguments = {name: _found(argument, address) for name, argument in slots.items()}
            bare._enqueue(arguments, operands.device, operands.stream)

        return run

    def describe(self) -> str:
        a = self.arguments
        return f"{self.function} of the compiled extension, {a['element']}, GEMM_M {a['m']}, tile {a['tile']}"


class _Slot(NamedTuple):
    """An :class:`Address` whose tensor will be known by its place."""

    place: tuple[int, int]
    offset: int


def _address(operand: Address) -> int:
    return operand.tensor.data_ptr() + operand.offset


def _found(argument: Any, find: Callable[[Any], Any]) -> Any:
    """An argument with ``find`` of every address in it."""
    if isinstance(argument, (Address, _Slot)):
        return find(argument)
    return tuple([_found(item, find) for item in argument]) if type(argument) is tuple else argument


def grouped_gemm(
    x: ChannelSlice,
    weights: tuple[Tensor, Tensor, Tensor],
    y: ChannelSlice,
    r3: ChannelSlice,
    r5: ChannelSlice,
    bits: ChannelSlice | None,
    *,
    gemm_m: int,
    epilogues: tuple[Epilogue, Epilogue, Epilogue],
    tile: Tile,
    unit: int,
) -> None:
    """Launch K1 as csrc/grouped_gemm.cuh; the arguments are those of its Triton twin, kernels/grouped_gemm.py.

    tile: as choice.native_tile_of() gives it. unit: 1 takes the unaligned kernel.
    """
    shifts, scales = [e.shift for e in epilogues], [e.scale for e in epilogues]
    arguments = dict(
        **_launch_of(x, tile, unit),
        m=gemm_m,
        c=x.channels,
        k=(y.channels, r3.channels, r5.channels),
        x=_rows(x),
        w=tuple(map(Address, weights)),
        y=_rows(y),
        r=(*_rows(r3), r5.c_offset - r3.c_offset),
        bits=_rows(bits) if bits else (0, 0),
        relu=epilogues[0].relu,
        **_vectors("shift", shifts),
        **_vectors("scale", scales),
    )
    submit(NativeLaunch("grouped_gemm", arguments, x.base.device))


def grouped_dgrad(
    g: ChannelSlice,
    w_t: Tensor,
    dpool: ChannelSlice,
    taps: Tensor,
    dx: ChannelSlice,
    *,
    gemm_m: int,
    image: tuple[int, int],
    tile: Tile,
    unit: int,
) -> None:
    """Launch B3 as csrc/grouped_dgrad.cuh; the arguments are those of its Triton twin, kernels/grouped_dgrad.py.

    tile, unit: as for :func:`grouped_gemm`.
    """
    arguments = dict(
        **_launch_of(g, tile, unit),
        m=gemm_m,
        k=g.channels,
        c=dx.channels,
        image=image,
        g=_rows(g),
        w=Address(w_t),
        dpool=_rows(dpool),
        taps=(Address(taps), taps.shape[1]),
        dx=_rows(dx),
    )
    submit(NativeLaunch("grouped_dgrad", arguments, g.base.device))


def _launch_of(operand: ChannelSlice, tile: Tile, unit: int) -> dict[str, Any]:
    """What every launch is told beside its problem."""
    return dict(element=ELEMENTS[operand.base.dtype], tile=(tile.BLOCK_M, tile.BLOCK_N), aligned=unit > 1)


def _rows(rows: ChannelSlice) -> tuple[Address, int]:
    """Address of a slice's first element and its row stride."""
    return Address(rows.base, rows.c_offset * rows.base.element_size()), rows.row_stride


def _vectors(name: str, vectors: list[Tensor | None]) -> dict[str, Any]:
    """An epilogue's three vectors, all of one dtype or all None, as the extension's two keywords."""
    if vectors[0] is None:
        return {name: (0, 0, 0), f"{name}_type": 0}
    return {name: tuple(map(Address, vectors)), f"{name}_type": VECTOR_TYPES[vectors[0].dtype]}
