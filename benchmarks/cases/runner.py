"""Measures one case: builds it, compares what it computes with a reference, and only then times it.

The reference is PyTorch's own module in NCHW and strict fp32 on the very same weights and inputs. On a GPU our block
has its parity test against float64 besides, once for each block, size, batch and dtype. A result that differs raises
AssertionError before the stopwatch is touched.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from benchmarks.cases.baselines import (
    DTYPES,
    LAYOUTS,
    Point,
    assert_agree,
    assert_block_parity,
    build,
    call_of,
    compiled,
    graphed,
    operands,
    stepped,
    tensor_core_settings,
)
from benchmarks.cases.networks import NETWORKS, batch_norm_block, build_network, layers_of
from benchmarks.cases.records import COMPILE, NORMED, OURS_BLOCKS, Record
from benchmarks.cases.suite import COMPILE_MODES, GRAPHS, Case
from inception_fused import FusedInception, Inception, backend
from inception_fused.block.googlenet_blocks import spatial_size
from inception_fused.modules.stem import FusedStem
from inception_fused.plan.cards import Ceilings
from inception_fused.plan.floors import total
from inception_fused.tools.measuring import count_launches, peak_bytes
from inception_fused.tools.timing import Call, Stopwatch, measure, measure_ceilings, stopwatch_for

CUDA_GRAPHED = (*GRAPHS, *(name for name in COMPILE if COMPILE_MODES[name] != "default"))
"""Implementations that replay a CUDA graph: their memory is the graph's, and the allocator's peak says nothing."""


SETTLED = 3
"""Calls from which on a block repeats its launches from memory, as the timed ones do: what they compute is judged."""


class NotMeasuredError(Exception):
    """The case cannot be measured here; the message is the reason, with its figures."""


class Bench:
    """Where and how cases are measured; one a session.

    device: "cuda" or "cpu". backend: what is asked for of our blocks. seconds: of device time for one figure.
    least: calls in each of a figure's two halves at least. The card's ceilings are measured when first asked for.
    """

    def __init__(
        self, device: str, *, stopwatch: Stopwatch | None = None, backend: str | None = None, seconds: float = 0.06,
        least: int = 10,
    ) -> None:  # fmt: skip
        self.device, self.seconds, self.least = device, seconds, least
        self.stopwatch = stopwatch_for(device) if stopwatch is None else stopwatch
        # On a GPU a fallback must fail, not be timed as ours.
        self.backend = ("kernels" if device == "cuda" else "auto") if backend is None else backend
        self.found: dict[str, float] | None = None
        self.verified: set[Point | Case] = set()
        self._expected: tuple[object, list[Tensor]] | None = None

    @property
    def name(self) -> str:
        """Of the device."""
        return torch.cuda.get_device_name() if self.device == "cuda" else self.device

    def ceilings(self) -> Ceilings | None:
        """Measured on this card in this session; None on a CPU, which has no floor here."""
        if self.device != "cuda":
            return None
        if self.found is None:
            with tensor_core_settings():
                self.found = measure_ceilings(self.stopwatch, self.device)
        return Ceilings.measured(self.name, self.found)

    def run(self, case: Case, wall: Callable[[Call], object]) -> Record:
        """Gate, then figures; ``wall`` is given the call, waiting included, for a wall clock of its own.

        Raises NotMeasuredError where the case cannot run here, AssertionError where what it computes is wrong.
        """
        self._refuse_too_large(case)
        try:
            return self._measured(case, wall)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
        finally:
            self._tidy(case)
        self._expected = None
        raise NotMeasuredError(f"out of memory: {reason}")

    def _measured(self, case: Case, wall: Callable[[Call], object]) -> Record:
        """A frame of its own: what it holds is free when the memory is tidied."""
        with tensor_core_settings(), backend(self.backend):
            call = self.gated(case)
            record = self._figures(case, call)

            def waiting() -> None:
                call()
                self.stopwatch.synchronize()

            wall(waiting)
            return record

    def _refuse_too_large(self, case: Case) -> None:
        if self.device != "cuda":
            return
        needed, (free, _) = case.needed_bytes(), torch.cuda.mem_get_info()
        if needed > free:
            raise NotMeasuredError(f"needs about {needed / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")

    def _tidy(self, case: Case) -> None:
        if case.implementation in COMPILE:
            torch.compiler.reset()
        if self.device == "cuda":
            # Graphs and autograd's cycles hold memory that the next case may need.
            gc.collect()
            torch.cuda.empty_cache()

    def lost(self) -> bool:
        """Whether the device no longer answers, as after an illegal address."""
        try:
            self.stopwatch.synchronize()
        except Exception:
            return True
        return False

    def gated(self, case: Case) -> Call:
        """The call to be timed. Raises AssertionError, before any timing, where its output or a gradient is wrong."""
        if case.implementation.startswith("ours") and self.device == "cuda":
            self._assert_parity(case)
        expected = self._reference(case)
        call = self.call_of(case)
        for _ in range(SETTLED):
            outputs = call()
        outputs = tuple(output.clone() for output in outputs)
        if case.implementation in GRAPHS:
            call, outputs = graphed(call)
            # Whatever the replay leaves out stays NaN.
            for output in outputs:
                output.fill_(float("nan"))
            call()
        assert_agree(f"{case.id}", outputs, expected, limits=case.limits, slices=case.slices)
        return call

    def _assert_parity(self, case: Case) -> None:
        """Our blocks of a case against float64, at its sizes, once a session, and its stem beside its own layers."""
        for point in blocks_of(case):
            if point not in self.verified:
                assert_block_parity(point, self.device, backward=True)
                self.verified.add(point)
        stem = replace(case, mode="training", implementation="ours", rank=0)
        if case.is_network and stem not in self.verified:
            assert_stem_agrees(stem, self.device)
            self.verified.add(stem)

    def _reference(self, case: Case) -> list[Tensor]:
        """What the call should return; that of the last point is kept, since its implementations follow each other."""
        key = replace(case, implementation="", rank=0)
        if self._expected is None or self._expected[0] != key:
            self._expected = None
            module = module_of(case, self.device).to(dtype=torch.float32)
            x, dy = inputs_of(case, self.device, torch.contiguous_format)
            x, dy = x.detach().float().requires_grad_(x.requires_grad), dy.float()
            with tensor_core_settings(tf32=False):
                self._expected = key, list(call_of(module, x, dy, case.mode)())
        return self._expected[1]

    def call_of(self, case: Case) -> Call:
        """The call of an implementation, before it is captured in a graph."""
        name, memory_format = case.implementation, LAYOUTS[weights_of(case)]
        module = module_of(case, self.device, memory_format, fused=name.startswith("ours"))
        x, dy = inputs_of(case, self.device, memory_format)
        if name not in COMPILE:
            return call_of(module, x, dy, case.mode)
        call = call_of(compiled(module, COMPILE_MODES[name]), x, dy, case.mode)
        return stepped(call) if name in CUDA_GRAPHED else call

    def _figures(self, case: Case, call: Call) -> Record:
        device = torch.device(self.device)
        timing = measure(call, self.stopwatch, seconds=self.seconds, least=self.least)
        works, ceilings = case.works(), self.ceilings()
        floor_us = None if ceilings is None else 1e6 * total(works, ceilings, case.dtype)
        launches = count_launches(call, device)
        on_gpu = self.device == "cuda"
        return Record(
            suite=case.suite,
            subject=case.subject,
            image=case.image,
            size=case.size,
            batch=case.batch,
            dtype=case.dtype,
            mode=case.mode,
            implementation=case.implementation,
            device=self.name,
            device_us=timing.us,
            spread=timing.spread,
            calls=timing.calls,
            host_us=timing.host_us,
            tflops=sum(work.flop for work in works) / timing.us / 1e6,
            gbs=sum(work.bytes for work in works) / timing.us / 1e3,
            floor_us=floor_us,
            x_floor=None if floor_us is None else timing.us / floor_us,
            peak_bytes=peak_bytes(call, device) if on_gpu and case.implementation not in CUDA_GRAPHED else None,
            launches=None if launches.aten is None else launches.total,
            weights=weights_of(case),
        )


def blocks_of(case: Case) -> Sequence[Point]:
    """The points at which a case's blocks are tested for parity: its own, or those of its network's nine. None of
    blocks that were converted: what they compute is compared with the reference alone."""
    if case.suite == NORMED:
        return []
    if not case.is_network:
        return [replace(case.point, mode="forward")]
    network = NETWORKS[case.subject]
    return [
        Point(name, config, spatial_size(name, case.image), case.batch, case.dtype, activation=network.activation)
        for name, config in (network.blocks or {}).items()
    ]


def assert_stem_agrees(case: Case, device: str) -> None:
    """Asserts that the stem of a case's network, its kernels demanded, agrees with its layers in strict fp32: what it
    returns, and the gradients of its input and parameters. Nothing where the network has no stem of ours.

    The input is the one that it gets there. The limits are a block's.
    """
    network = module_of(case, device, torch.channels_last, fused=True)
    x, _ = inputs_of(case, device, torch.channels_last)
    for part in network.children():
        if isinstance(part, FusedStem):
            break
        with torch.no_grad():
            x = part(x)
    else:
        return
    layers = layers_of(part)
    with torch.no_grad():
        dy = torch.randn_like(layers(x))
    with backend("kernels"):
        actual = call_of(part, x.requires_grad_(), dy, "training")()
    # The layers themselves: the fused part owns the same ones, and is not called again.
    layers, x = layers.float(), x.detach().float().requires_grad_()
    with tensor_core_settings(tf32=False):
        expected = call_of(layers, x, dy.float(), "training")()
    assert_agree(f"the stem of {case.id}", actual, expected)


def weights_of(case: Case) -> str:
    """The layout of a case's weights, a key of LAYOUTS."""
    return "KCRS" if case.implementation == "eager_nchw" else "channels_last"


def module_of(
    case: Case, device: str, memory_format: torch.memory_format = torch.contiguous_format, *, fused: bool = False
) -> nn.Module:
    """The block or network in the case's dtype, in training or evaluation mode as the case is."""
    if case.is_network:
        module = build_network(case.subject, fused=fused, stem=case.implementation != OURS_BLOCKS)
        module = module.to(device=device, dtype=DTYPES[case.dtype], memory_format=memory_format)
    elif case.suite == NORMED:
        module = build(partial(batch_norm_block, fused=fused), case.point, device, memory_format)
    else:
        module = build(FusedInception if fused else Inception, case.point, device, memory_format)
    return module.train(case.training)


def inputs_of(case: Case, device: str, memory_format: torch.memory_format) -> tuple[Tensor, Tensor]:
    """x and dy, normal random values of the case's dtype. A block wants the gradient of x, a network of its weights."""
    if not case.is_network:
        return operands(case.point, device, memory_format)
    network = NETWORKS[case.subject]
    generator = torch.Generator(device).manual_seed(0)
    shape = (case.batch, network.channels, case.image, case.image)
    x = torch.randn(shape, generator=generator, device=device)
    dy = torch.randn((case.batch, network.classes), generator=generator, device=device)
    return x.to(dtype=DTYPES[case.dtype], memory_format=memory_format), dy.to(DTYPES[case.dtype])
