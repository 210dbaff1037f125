"""Launches remembered: what an operator has launched for tensors of one kind is launched again without planning it.

Planning a block (slices, tiles, grids, Triton's own look at every argument) takes the host several times as long as
launching it. All of it follows from the tensors' shapes, strides and dtypes, flags and the backend, which are the key
of a :class:`Recipe`. A recipe holds no tensor and no address: outputs are allocated anew at each call, temporaries are
one buffer, and every launch gets the addresses of that call. The second call of a kind is observed, from the third on
it is replayed. What computes with ATen, or reads memory that is not at a 16-byte address, is planned at each call.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from inception_fused.runtime.submit import Operands, PreparedLaunch, launching, observe, plain

ALIGNMENT = 256
"""Bytes between the beginnings of two temporaries; CUDA's own allocations begin at multiples of 256."""

MOST_RECIPES = 1024
"""Kinds that are remembered; then all are forgotten. A network of nine blocks has 18, times its sizes of a batch."""

ALLOCATIONS = frozenset(("empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided"))
"""ATen operators that write nothing; views know it of themselves."""


class Spec(NamedTuple):
    """An output: what torch.empty_strided wants."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class Recipe(NamedTuple):
    """outputs: in their order. workspace: bytes of all temporaries. launches: as submit.prepare() made them."""

    outputs: tuple[Spec, ...]
    workspace: int
    launches: tuple[PreparedLaunch, ...]

    def run(self, inputs: Sequence[Tensor], addresses: Sequence[int]) -> list[Tensor]:
        """The outputs, being computed on the current stream. addresses: of the inputs."""
        device = inputs[0].device
        outputs = [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.outputs
        ]
        workspace = torch.empty(self.workspace, dtype=torch.uint8, device=device)
        places = [*addresses, *[t.data_ptr() for t in outputs], workspace.data_ptr()]
        stream = _current_stream(device.index) if device.type == "cuda" else 0
        operands = Operands(places, (*inputs, *outputs, workspace), device.index or 0, stream)
        for launch in self.launches:
            launch(operands)
        return outputs


def _current_stream(index: int) -> int:
    """torch.cuda.current_stream(index).cuda_stream, a tenth as long where PyTorch has the shorter way that its own
    compiler uses."""
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return raw(index) if raw is not None else torch.cuda.current_stream(index).cuda_stream


SEEN, UNSUITABLE = object(), object()

_recipes: dict[Hashable, Any] = {}


def key_of(tensors: Sequence[Tensor]) -> tuple[Hashable, list[int]]:
    """What a recipe depends on of its inputs, and their addresses; (None, ...) where one is at no 16-byte address, or
    at none.

    The device of each, since a launch from memory would take a host address for a device's: a parameter may have been
    moved between forward and backward.
    """
    addresses = [t.data_ptr() for t in tensors]
    if 0 in addresses and any(not address and t.numel() for t, address in zip(tensors, addresses, strict=True)):
        # Memory that was freed, as sharded training does; planning says so, a kernel would read address 0.
        return None, addresses
    together = 0
    for address in addresses:
        together |= address
    if together & 15:
        return None, addresses
    return tuple([(t.shape, t.stride(), t.dtype, t.get_device()) for t in tensors]), addresses


def replayed(plan: Callable[[], Sequence[Tensor]], inputs: Sequence[Tensor], *flags: Hashable) -> Sequence[Tensor]:
    """``plan()``, or the same launches from memory.

    plan: computes the outputs from ``inputs`` with this package's launches. flags: everything beside the inputs' kinds
    that its launches depend on. The tensors' device is current.
    """
    if not plain():
        # Launches are being recorded, counted or waited for, which wants them one by one.
        return plan()
    kind, addresses = key_of(inputs)
    if kind is None:
        return plan()
    key = (kind, flags)
    known = _recipes.get(key)
    if type(known) is Recipe:
        return known.run(inputs, addresses)
    if known is None:
        if len(_recipes) >= MOST_RECIPES:
            _recipes.clear()
        _recipes[key] = SEEN
    if known is not SEEN:
        return plan()
    with observe() as launches, _Computing() as aten:
        outputs = plan()
    _recipes[key] = UNSUITABLE if aten.seen or aten.blind else _recipe(inputs, addresses, outputs, launches)
    return outputs


def forget() -> None:
    """Forget every recipe: whoever changes what launches depend on, such as a plan or a kernel, must say so."""
    _recipes.clear()


class _Computing(TorchDispatchMode):
    """Whether an ATen operator computed something. blind: whether it has not even seen an output allocated, as where
    the caller has switched modes off (torch._C._DisableTorchDispatch)."""

    seen, blind = False, True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.blind = False
        name = func._schema.name.partition("::")[2]
        self.seen = self.seen or not (launching() or func.is_view or name in ALLOCATIONS)
        return func(*args, **(kwargs or {}))


def _recipe(
    inputs: Sequence[Tensor], addresses: Sequence[int], outputs: Sequence[Tensor], launches: Sequence[Any]
) -> Any:
    """A recipe of launches that were observed; UNSUITABLE where an operand cannot be told by its address."""
    known = {}
    for slot, tensor in enumerate((*inputs, *outputs)):
        if tensor.numel():
            if tensor.data_ptr() in known:
                return UNSUITABLE
            known[tensor.data_ptr()] = slot
    given = {t.untyped_storage().data_ptr() for t in (*inputs, *outputs)}
    temporaries: dict[int, int] = {}
    size = 0

    def place(operand: Tensor) -> tuple[int, int]:
        """(slot, bytes from its beginning) of an operand."""
        nonlocal size
        slot = known.get(operand.data_ptr())
        if slot is not None:
            return slot, 0
        storage = operand.untyped_storage()
        if storage.data_ptr() in given:
            raise LookupError("an operand is a part of a tensor that was given")
        if storage.data_ptr() not in temporaries:
            temporaries[storage.data_ptr()] = size
            size += -(-storage.nbytes() // ALIGNMENT) * ALIGNMENT
        return len(inputs) + len(outputs), temporaries[storage.data_ptr()] + operand.data_ptr() - storage.data_ptr()

    try:
        prepared = tuple(launch.prepare(place) for launch in launches)
    except LookupError:
        return UNSUITABLE
    specs = tuple(Spec(tuple(t.shape), t.stride(), t.dtype) for t in outputs)
    return Recipe(specs, size, prepared)
