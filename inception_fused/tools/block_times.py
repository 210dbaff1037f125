"""Floor, predicted and measured time of one block of a model.

    floor       max(FLOP / peak, bytes / bandwidth) of the block as one ideal kernel              plan/floors.py
    predicted   the busiest unit of each launch with the plan's tiles, from counted instructions,
                or as it was timed by tuning                                                      plan/forecast.py
    measured    a call of the block as it is now, on the input that it gets                       measuring.py

On a GPU the ceilings are measured there. Elsewhere floor and prediction are those of the reference card.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

from inception_fused.block import batch_stats
from inception_fused.block.leaves import leaf
from inception_fused.block.reference import InceptionParams
from inception_fused.block.shapes import BlockShape
from inception_fused.block.views import is_ready
from inception_fused.errors import KernelError
from inception_fused.modules.structure import HOOKS, is_globally_hooked
from inception_fused.op import dispatch, reasons
from inception_fused.plan import tuned
from inception_fused.plan.cards import H200, Ceilings
from inception_fused.plan.floors import block_work
from inception_fused.plan.forecast import Forecast, forecast
from inception_fused.tools.capture import Item
from inception_fused.tools.measuring import Contender, clock
from inception_fused.tools.timing import measure_ceilings, stopwatch_for

COPY_BYTES, GEMM_SIZE, CEILING_SECONDS = 1 << 28, 4096, 0.05
"""Of what is timed for the ceilings: a third of a GiB in all, and large enough for most of the peak."""


class Times(NamedTuple):
    """Microseconds of one call of a block, as the file says; None for what is not known."""

    floor_us: float | None
    predicted_us: float | None
    measured_us: float | None


class Subject(NamedTuple):
    """A block to be timed. params: reads its parameters. kernels: whether they can stand in for its layers, on a device
    that has them; interpreted: whether they do so on this CPU."""

    module: nn.Module
    params: Callable[[], InceptionParams]
    kernels: bool
    interpreted: bool = False


class BlockTimes(NamedTuple):
    """Times of a forward without gradients and, in training mode, of forward and backward; why the clock did not run.
    launches: what the forecast says of the latter where it is there, else of the former."""

    forward: Times | None
    step: Times | None
    why: str
    launches: tuple[Forecast, ...] = ()


def block_times(subject: Subject, item: Item, ceilings: Ceilings) -> BlockTimes:
    """What a block takes. item: has an input. The module's buffers are written into; see capture.unchanged().
    Raises KernelError where a launch fails.
    """
    x, module = item.x, subject.module
    if x.dim() != 4 or x.numel() == 0:
        return BlockTimes(None, None, f"its input has shape {tuple(x.shape)}")
    try:
        params = subject.params()
        shape = BlockShape.of(x, params.weights)._replace(itemsize=item.dtype.itemsize)
    except (AttributeError, KeyError, TypeError):
        return BlockTimes(None, None, "its layers are no longer those of a block")
    modes = (False, True) if module.training else (False,)
    measured: Sequence[float | None] = [None] * len(modes)
    why = _why_not_timed(subject, item)
    if not why:
        try:
            measured = _measured(module, item, modes)
        except (KernelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever somebody's forward raises
            why = f"a call of it alone fails: {type(error).__name__}: {error}".rstrip(".")
    arithmetic = [_arithmetic(subject, item, params, shape, ceilings, training) for training in modes]
    times = [Times(floor, _total_us(found), us) for (floor, found), us in zip(arithmetic, measured, strict=True)]
    return BlockTimes(times[0], times[1] if module.training else None, why, tuple(arithmetic[-1][1] or ()))


def _total_us(launches: Sequence[Forecast] | None) -> float | None:
    return None if launches is None else sum(launch.predicted for launch in launches) * 1e6


def _why_not_timed(subject: Subject, item: Item) -> str:
    """Why the clock cannot or must not run; "" where it may."""
    if item.x.device.type not in ("cpu", "cuda"):
        return f"it is on {item.x.device}"
    if subject.interpreted:
        return "the time of interpreted kernels says nothing of a GPU"
    if is_globally_hooked() or any(getattr(inner, hooks) for inner in subject.module.modules() for hooks in HOOKS):
        return "it has hooks, which would run with it"
    return ""


def _arithmetic(
    subject: Subject, item: Item, params: InceptionParams, shape: BlockShape, ceilings: Ceilings, training: bool
) -> tuple[float | None, list[Forecast] | None]:
    """Floor in microseconds, and the forecast; None where there is none."""
    device, dtype = item.x.device, item.dtype
    precision = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if dtype == torch.float32:
        precision = "tf32" if reasons.tf32_allowed() else "fp32"
    if precision is None:
        return None, None
    floor = block_work(shape, training=training).floor(ceilings, precision)
    missing = device.type == "cuda" and reasons.first(device, dtype) is not None
    if precision == "fp32" or missing or not subject.kernels:
        return floor * 1e6, None
    packs = has_to_pack(params, dtype)
    on_card: dict[str, Any] = {}
    if device.type == "cuda":
        on_card = {"chosen": dispatch.choices("auto", device, dtype), "gpu": tuned.key(device)}
    kind = dict(training=training, normed=batch_stats.takes_batch(params.batch_norms), packs=packs)
    launches = forecast(shape, dtype, ceilings, precision=precision, **kind, **on_card)
    return floor * 1e6, launches


def has_to_pack(params: InceptionParams, dtype: torch.dtype) -> bool:
    """Whether a forward that computes in dtype begins with pack, the launch that prepares parameters."""
    return is_folded(params) or not all(is_ready(w, dtype) for w in params.weights)


def is_folded(params: InceptionParams) -> bool:
    """Whether BatchNorm goes into the weights: not where it takes the statistics of the batch."""
    return params.batch_norms is not None and not batch_stats.takes_batch(params.batch_norms)


def pack_remedy(params: InceptionParams, dtype: torch.dtype) -> str:
    """What saves a block that launch, in words; "" where there is none, or where other strides would not save it."""
    relaid = [w for w in params.weights if w.shape[-1] > 1 and not w.is_contiguous(memory_format=torch.channels_last)]
    # Of subclasses, FSDP's shards take no other strides.
    plain = all(w.dtype == dtype and type(w.data) is Tensor for w in params.weights)
    if not relaid or is_folded(params) or not plain:
        return ""
    sides = " and ".join(sorted({"x".join([str(w.shape[-1])] * 2) for w in relaid}))
    return (
        f"one launch more (pack) rewrites the {sides} weights at each call; "
        "model.to(memory_format=torch.channels_last), before wrappers and optimizers exist, or "
        "convert_(model, channels_last=True) saves it"
    )


def _measured(module: nn.Module, item: Item, modes: Sequence[bool]) -> list[float]:
    """Microseconds of a forward without gradients and, where modes has True, of forward and backward."""
    names, given = zip(*module.named_parameters(), strict=True)

    def call(leaves: Sequence[Tensor]) -> Tensor:
        # Entered anew for each call, since it keeps the weights that it has cast until it is left.
        with item.autocasting():
            return functional_call(module, dict(zip(names, leaves[1:], strict=True)), (leaves[0],))

    leaves = tuple(leaf(t, t.is_floating_point()) for t in (item.x, *given))
    with torch.no_grad():
        dy = torch.ones_like(call(leaves))
    contender = Contender(call, leaves, dy)
    found = []
    for training in modes:
        run: Callable[[], object] = contender.step if training else contender.infer
        for _ in range(2):
            # Compilation, algorithm search and the allocator's first blocks belong to no figure.
            run()
        found += clock([run], item.x.device)[0]
    return found


def card_ceilings(device: torch.device) -> Ceilings:
    """Those of a GPU, measured at the first call; the reference card's for another device."""
    if device.type != "cuda":
        return H200
    return _measured_ceilings(device.index if device.index is not None else torch.cuda.current_device())


@cache
def _measured_ceilings(index: int) -> Ceilings:
    device = torch.device("cuda", index)
    sizes = dict(copy_bytes=COPY_BYTES, gemm_size=GEMM_SIZE, seconds=CEILING_SECONDS, tf32=False)
    with torch.inference_mode(False), torch.no_grad(), torch.cuda.device(device):
        found = measure_ceilings(stopwatch_for(device), device, **sizes)
    return Ceilings.measured(torch.cuda.get_device_name(device), found)
