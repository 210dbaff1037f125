"""What a card can do: every constant of floors and forecast, with its source.

What was measured says so, what a data sheet says is nominal, the rest says guess. "Guide" is NVIDIA's CUDA C++
Programming Guide: its table "Throughput of Native Arithmetic Instructions" counts results a cycle and multiprocessor,
its "Technical Specifications per Compute Capability" what fits on one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple


class Multiprocessor(NamedTuple):
    """One multiprocessor of an architecture. alu, imad, fma, xu: lanes a cycle of the units of plan/counts.py; float
    and integer multiply-adds share ``fma``, of which the integer ones reach ``imad``.

    warps, programs, shared: most of each at once, shared in bytes; a program takes RESERVED bytes more than it asks.
    """

    alu: int
    imad: int
    fma: int
    xu: int
    warps: int
    programs: int
    shared: int

    def resident(self, num_warps: int, registers: int, shared: int) -> int:
        """Programs that run at once, at least one."""
        a_warp = -(-registers * 32 // REGISTER_UNIT) * REGISTER_UNIT
        limits = (
            self.programs,
            self.warps // num_warps,
            REGISTERS // max(1, a_warp * num_warps),
            self.shared // (shared + RESERVED),
        )
        return max(1, min(limits))


REGISTERS, REGISTER_UNIT, RESERVED = 65536, 256, 1024
"""Of a multiprocessor, by which a warp gets them, bytes of shared memory that the driver takes of a program (Guide)."""

ISSUE = 4
"""Warp instructions a cycle and multiprocessor: four schedulers (Guide)."""

SHARED_LINE = 128
"""Bytes a cycle through shared memory and L1: 32 banks of four bytes (Guide)."""

L2_PORT = 64
"""Bytes a cycle from L2 to one multiprocessor (NVIDIA A100 white paper; taken for the others too: a guess)."""

MULTIPROCESSORS: Mapping[int, Multiprocessor] = {
    80: Multiprocessor(alu=64, imad=64, fma=64, xu=16, warps=64, programs=32, shared=164 << 10),
    86: Multiprocessor(alu=64, imad=64, fma=128, xu=16, warps=48, programs=16, shared=100 << 10),
    89: Multiprocessor(alu=64, imad=64, fma=128, xu=16, warps=48, programs=24, shared=100 << 10),
    90: Multiprocessor(alu=64, imad=64, fma=128, xu=16, warps=64, programs=32, shared=228 << 10),
    100: Multiprocessor(alu=64, imad=64, fma=128, xu=16, warps=64, programs=32, shared=228 << 10),
    120: Multiprocessor(alu=64, imad=64, fma=128, xu=16, warps=48, programs=24, shared=100 << 10),
}
"""By compute capability (Guide; sm_100 and sm_120 are taken as sm_90 and sm_89). Integer addition, logic, shifts,
comparison and minimum have 64 lanes on all of them, half of what four schedulers issue."""


@dataclass(frozen=True)
class Ceilings:
    """What a card can do: ``bandwidth`` in bytes/s (read + written), ``flops`` in FLOP/s by dtype name ("bf16", "fp16",
    "tf32", "fp32"), ``launch`` in seconds from the end of a kernel to the beginning of the next.

    capability: 90 for sm_90. clock: cycles a second under load. l2: bytes/s from L2 to all multiprocessors. start:
    seconds of the card for each program of a grid, whatever it does.
    """

    name: str
    bandwidth: float
    flops: Mapping[str, float]
    multiprocessors: int
    launch: float
    capability: int
    clock: float
    l2: float
    start: float

    @property
    def multiprocessor(self) -> Multiprocessor:
        return MULTIPROCESSORS[max(chip for chip in MULTIPROCESSORS if chip <= max(80, self.capability))]

    @classmethod
    def measured(cls, name: str, found: Mapping[str, float]) -> Ceilings:
        """From what timing.measure_ceilings found on a card; fp16 is taken as bf16, TF32 that was not measured as half
        of it, and everything that was not measured as that of :func:`known`."""
        base = known(name)
        flops = {
            "bf16": found["bf16"],
            "fp16": found["bf16"],
            "tf32": found.get("tf32", found["bf16"] / 2),
            "fp32": base.flops["fp32"],
        }
        return replace(
            base,
            name=f"{name}, measured",
            bandwidth=found["bandwidth"],
            flops=flops,
            multiprocessors=int(found.get("multiprocessors", base.multiprocessors)),
            launch=found["launch_us"] * 1e-6 if "launch_us" in found else base.launch,
            capability=int(found.get("capability", base.capability)),
        )


H200 = Ceilings(
    "NVIDIA H200", 4.3e12, {"bf16": 790e12, "fp16": 790e12, "tf32": 395e12, "fp32": 67e12}, 132, 1.3e-6,
    capability=90, clock=1.7e9, l2=7.0e12, start=1e-9,
)  # fmt: skip
"""The reference card. bandwidth: measured, a large device copy (4.8 nominal). bf16: measured, a dense 8192^3 GEMM of
random data (989 nominal); TF32 is half of it, fp32 the data sheet's. launch: a guess. clock: a guess, 1.98 GHz is the
highest and long products run at about 1.7. l2: a guess, published measurements of an H100 are 5.5 to 7 TB/s. start: a
guess, two cycles or so of the one unit that hands out programs."""

H100 = replace(H200, name="NVIDIA H100", bandwidth=3.0e12)
"""The SXM card: the H200's chip. bandwidth: a guess, 0.9 of the nominal 3.35 TB/s, as the H200's copy reaches."""

A100 = Ceilings(
    "NVIDIA A100", 1.8e12, {"bf16": 265e12, "fp16": 265e12, "tf32": 132e12, "fp32": 19.5e12}, 108, 1.3e-6,
    capability=80, clock=1.41e9, l2=5.0e12, start=1.2e-9,
)  # fmt: skip
"""The SXM card with 80 GB. bandwidth: a guess, 0.9 of the nominal 2.04 TB/s. flops: a guess, 0.85 of the nominal 312
and 156; fp32 nominal. clock: its boost clock. l2: a guess; 5120 bytes a cycle nominal (white paper: 7.2 TB/s), measured
lower. launch and start: guesses, as the H200's at its clock."""

RTX_4090 = Ceilings(
    "NVIDIA GeForce RTX 4090", 0.92e12, {"bf16": 160e12, "fp16": 160e12, "tf32": 80e12, "fp32": 82e12}, 128, 1.3e-6,
    capability=89, clock=2.52e9, l2=5.0e12, start=0.8e-9,
)  # fmt: skip
"""bandwidth: a guess, 0.91 of the nominal 1.008 TB/s. flops: with sums in fp32, a guess, 0.97 of the nominal 165 and 83
(Ada white paper); fp32 nominal. clock: its boost clock. l2: a guess by public microbenchmarks. launch and start:
guesses."""

CARDS = {"H200": H200, "H100": H100, "A100": A100, "RTX 4090": RTX_4090}
"""By the part of PyTorch's device name that tells them."""


def known(name: str) -> Ceilings:
    """The card of a device name; the reference card's constants for one that is not listed."""
    return next((card for part, card in CARDS.items() if part in name), H200)
