"""Prints, as JSON, what Triton's real launcher makes of a block's launches: planned, and from memory.

Run by test_launcher.py in a process of its own, since one that interprets kernels cannot compile them. Its argument is
the folder with the stub of libcuda; TRITON_CACHE_DIR is its own, for what it puts there has never seen ptxas.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from checks.block_cases import ODD, REDUCE_24, in_layout, make_block
from inception_fused import InceptionConfig, KernelError
from inception_fused.block import batch_stats
from inception_fused.block.call_types import NormedSaves, Saves
from inception_fused.block.folding import flatten
from inception_fused.block.views import BatchNorm
from inception_fused.op import normed_operators, operators, reasons
from inception_fused.op.launcher import apart
from inception_fused.plan import choice
from inception_fused.runtime import launch
from inception_fused.runtime.submit import Operands, record
from stub_libcuda import Arrived, Stub, pretending

WISH = ",".join(f"{kernel}=triton" for kernel in choice.KERNELS)

EVERY = (True,) * 13


class Case(NamedTuple):
    """One operator call, and how many launches it takes. needs: of a backward, else None; save: of a forward; apart:
    whether no two launches are made as one; normed: with the statistics of the batch; double: two 3x3 in branch 3."""

    launches: int
    config: InceptionConfig
    dtype: torch.dtype
    save: bool = False
    needs: tuple[bool, ...] | None = None
    norm: bool = False
    packed: bool = False
    device: int = 0
    remembered: bool = True
    apart: bool = False
    normed: bool = False
    double: bool = False


BF16, FP32, FP16 = torch.bfloat16, torch.float32, torch.float16
SOME = (True, False, True, True, False, False, True, *(False,) * 6)

CASES = {
    "inference": Case(3, REDUCE_24, BF16),
    "inference, packed weights": Case(2, REDUCE_24, BF16, packed=True),
    "inference, BatchNorm": Case(3, REDUCE_24, BF16, norm=True),
    "training": Case(3, REDUCE_24, BF16, save=True),
    "backward": Case(11, REDUCE_24, BF16, needs=EVERY),
    # Not B4 for the 5x5 convolution.
    "backward, some gradients": Case(10, REDUCE_24, BF16, needs=SOME),
    # Of another dtype, since what is remembered does not know of apart().
    "inference, apart, fp16": Case(5, REDUCE_24, FP16, apart=True),
    "training, apart, fp16": Case(5, REDUCE_24, FP16, save=True, apart=True),
    "inference, device 1": Case(3, REDUCE_24, BF16, device=1),
    "backward, device 1": Case(11, REDUCE_24, BF16, needs=EVERY, device=1),
    # The padding of r is written by ATen, so that this one is planned at each call.
    "training, odd, fp32": Case(5, ODD, FP32, save=True, remembered=False),
    "statistics of the batch": Case(9, REDUCE_24, BF16, save=True, normed=True),
    "statistics of the batch, nothing saved": Case(9, REDUCE_24, BF16, normed=True),
    "statistics of the batch, two 3x3, fp16": Case(13, REDUCE_24, FP16, save=True, normed=True, double=True),
    "statistics of the batch, backward": Case(15, REDUCE_24, BF16, needs=EVERY[:7], normed=True),
    "statistics of the batch, backward, some gradients": Case(14, REDUCE_24, BF16, needs=SOME[:7], normed=True),
    "statistics of the batch, backward, two 3x3, fp16": Case(
        19, REDUCE_24, FP16, needs=(*EVERY[:7], True), normed=True, double=True
    ),
    "inference, odd, fp32": Case(5, ODD, FP32),
    "backward, odd, fp32": Case(11, ODD, FP32, needs=EVERY),
}


class Call(NamedTuple):
    """A case on tensors of its own. inputs: in the order in which :func:`replay.replayed` gets them."""

    inputs: list[Tensor]
    run: Callable[[], Sequence[Tensor]]


def make_call(case: Case, seed: int) -> Call:
    call = usual_call(case, seed)
    return call._replace(run=apart()(call.run)) if case.apart else call


def usual_call(case: Case, seed: int) -> Call:
    if case.normed:
        return normed_call(case, seed)
    block = make_block(case.config, (2, 5, 4), case.dtype, seed=seed)
    if case.packed:
        block = block._replace(weights=in_layout(block.weights, "KRSC"))
    x, weights, biases, relu = block
    if case.needs is not None:
        saved = operators.outputs(x, block.shape, Saves(True, True, True))
        dy = torch.ones_like(saved[0])
        arguments = (dy, x, *saved[1:], weights, block.bias_dtypes, relu, case.needs, WISH)
        return Call([dy, x, *saved[1:], *weights], lambda: operators._backward(*arguments))
    norms, eps = flatten([norm_of(w) for w in weights]) if case.norm else ([], [])
    inputs = [x, *weights, *biases, *norms]
    if case.save:
        return Call(inputs, lambda: operators._forward(*block, True, True, True, WISH, norms, eps))
    return Call(inputs, lambda: [operators._infer(*block, WISH, norms, eps)])


def normed_call(case: Case, seed: int) -> Call:
    block = make_block(case.config, (2, 5, 4), case.dtype, bias=False, double=case.double, seed=seed)
    x, weights, _, relu = block
    given = [norm_of(w)._replace(mean=None, var=None) for w in weights]
    (norms, eps), modes = flatten(given), batch_stats.modes_of(given)
    if case.needs is None:
        saves, inputs = [case.save] * 4, [x, *weights, *norms]
        return Call(inputs, lambda: normed_operators._normed(x, weights, [], norms, eps, modes, relu, *saves, WISH))
    y, saved = normed_operators.outputs(x, block.shape, NormedSaves(True, True, True, True))
    needs = (*case.needs, *case.needs[1:])
    vectors = [name for need in case.needs[1:] for name in (("float32", "float32", "") if need else ("",) * 3)]
    arguments = torch.ones_like(y), x, *saved, weights, eps, modes, vectors, relu, needs, WISH
    return Call([*arguments[:7], *weights], lambda: normed_operators._normed_backward(*arguments))


def norm_of(w: Tensor) -> BatchNorm:
    return BatchNorm(*(torch.ones(w.shape[0]) for _ in range(4)), 1e-3)


WAYS = {"private": launch.PRIVATE_CALL, "handle": ((0, 0), (0, 0))}
"""How a prepared launch calls Triton; "handle" is what a version takes that is not known."""


def prepared(stub: Stub, item: launch.Launch, device: int, way: str) -> None:
    """Launch once more from memory. Every operand is found 16 bytes or more behind its slot's beginning."""
    slots: list[Tensor] = []

    def place(operand: Tensor) -> tuple[int, int]:
        slots.append(operand)
        return len(slots) - 1, 16 * len(slots)

    launch.PRIVATE_CALL = WAYS[way]
    run = item.prepare(place)
    addresses = [operand.data_ptr() - 16 * i for i, operand in enumerate(slots, 1)]
    run(Operands(addresses, slots, device, stub.streams[device]))


def each_launch(stub: Stub, case: Case) -> list[dict[str, Any]]:
    """Every launch of a call on the same tensors, in each way: what arrived."""
    call, found = make_call(case, 0), []
    with pretending(case.device), torch.cuda.device(case.device):
        with record() as launches:
            call.run()
        for item in launches:
            item.run()
            arrived = {"public": stub.arrived()}
            for way in WAYS:
                prepared(stub, item, case.device, way)
                arrived[way] = stub.arrived()
            expected = (*item.grid, 1, 1)[:3], 32 * item.tile.num_warps, item.compile().metadata.shared
            found.append({"arrived": arrived, "expected": expected, "stream": stub.streams[case.device]})
    launch.PRIVATE_CALL = WAYS["private"]
    return found


def refusals(stub: Stub) -> dict[str, str]:
    """What is raised where the driver refuses a launch, for its grid."""
    call, found = make_call(CASES["inference"], 0), {}
    with pretending(0):
        with record() as launches:
            call.run()
        item = launches[0]._replace(grid=(1, 1 << 16))
        ways = {"public": item.run, **{way: partial(prepared, stub, item, 0, way) for way in WAYS}}
        for way, run in ways.items():
            try:
                run()
            except KernelError as error:
                found[way] = str(error)
    launch.PRIVATE_CALL = WAYS["private"]
    return found


class Pass(NamedTuple):
    """One call as a whole. launches: their parameters are ("input 3", offset) where they are addresses, else numbers;
    stream: the one that was current; after: the device that was current afterwards; temporaries: bytes of each tensor
    that was neither given nor returned."""

    launches: list[Arrived]
    stream: int
    after: int
    temporaries: dict[str, int]


def whole_call(stub: Stub, case: Case, seed: int) -> Pass:
    """A call of a case on tensors and a stream of its own; device 0 is current before."""
    stub.change_streams()
    call = make_call(case, seed)
    with pretending(case.device) as mode:
        outputs = call.run()
    after, arrived = stub.device(), stub.arrived()
    places = Places(call.inputs, outputs, mode.memory.values())
    launches = [a._replace(parameters=[places.of(value) for _, value in a.parameters]) for a in arrived]
    alive.append((call, outputs, mode))
    return Pass(launches, stub.streams[case.device], after, places.temporaries)


alive: list[Any] = []
"""Everything that a call was given or made, so that no later one has an address again."""


class Places:
    """Which tensor an address is in."""

    def __init__(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], memory: Iterable[Tensor]) -> None:
        self.ranges: dict[int, tuple[str, int]] = {}
        self.temporaries: dict[str, int] = {}
        for kind, tensors in (("input", inputs), ("output", outputs), ("temporary", memory)):
            for i, tensor in enumerate(tensors):
                storage, name = tensor.untyped_storage(), f"{kind} {i}"
                if storage.nbytes() and storage.data_ptr() not in self.ranges:
                    self.ranges[storage.data_ptr()] = (name, storage.nbytes())
                    if kind == "temporary":
                        self.temporaries[name] = storage.nbytes()

    def of(self, value: int) -> Any:
        """(name, offset) of an address, any other number as it is."""
        for begin, (name, size) in self.ranges.items():
            if begin <= value < begin + size:
                return name, value - begin
        return value


def passes(stub: Stub, case: Case) -> dict[str, Pass | None]:
    """A planned call and the second one from memory; None where none is remembered. The planned call's successor is
    observed, and the first one from memory must leave nothing behind for the next."""
    planned = whole_call(stub, case, 1)
    whole_call(stub, case, 2)
    try:
        with ExitStack() as patches:
            for home, name in PLANS:
                patches.enter_context(mock.patch.object(home, name, refuse))
            whole_call(stub, case, 3)
            remembered = whole_call(stub, case, 4)
    except NotRememberedError:
        remembered = None
    return {"planned": planned, "remembered": remembered}


PLANS = (
    *((operators, name) for name in ("_planned_forward", "_planned_backward")),
    *((normed_operators, name) for name in ("_planned", "_planned_backward")),
)


class NotRememberedError(Exception):
    pass


def refuse(*_: Any) -> None:
    raise NotRememberedError


def main() -> None:
    torch.set_num_threads(1)
    stub = Stub(Path(sys.argv[1]))
    reasons.MACHINE = ()
    found = {name: {"each": each_launch(stub, case), **passes(stub, case)} for name, case in CASES.items()}
    print(json.dumps({"cases": found, "refusals": refusals(stub)}))


if __name__ == "__main__":
    main()
