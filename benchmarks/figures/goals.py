"""What the kernels are to reach, as data: a scenario, the measured cases that sum up to it, its gate and its moonshot.

The gate is the first release worth using, the moonshot what no floor excludes. Times and multiples of the floor are
those of an NVIDIA H200; ratios hold on any card. All are of device time: what the host needs is not in them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.cases.records import COMPILE, EAGER
from benchmarks.figures.result_files import Case
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS

NINE = tuple(GOOGLENET_BLOCKS)


@dataclass(frozen=True)
class Bar:
    """Least ratios eager / ours and best compile / ours, most multiples of the floor, most microseconds; None: any."""

    eager: float
    compile: float
    floor: float | None = None
    us: float | None = None


@dataclass(frozen=True)
class Scenario:
    """A row of the goals: which cases, and what they are to reach.

    image: None for any; subjects: those summed, None for all that there are; implementation: ours by launches or in a
    CUDA graph. Eager is channels_last, by launches in either.
    """

    name: str
    suite: str
    batch: int
    dtype: str
    gate: Bar
    moonshot: Bar
    mode: str = "forward"
    image: int | None = 224
    subjects: tuple[str, ...] | None = NINE
    implementation: str = "ours"


SCENARIOS = (
    Scenario(
        "inference, batch 1, bf16, CUDA graph", "block", 1, "bf16",
        Bar(6, 1.7, us=150), Bar(15, 4, us=70), implementation="ours_graph",
    ),
    Scenario(
        "inference, batch 1, TF32, CUDA graph", "block", 1, "tf32",
        Bar(5, 1.5, us=180), Bar(12, 3.5, us=85), implementation="ours_graph",
    ),
    Scenario("inference, batch 32, bf16", "block", 32, "bf16", Bar(5, 1.6, floor=2.2), Bar(8, 2.2, us=145)),
    Scenario("inference, batch 128, bf16", "block", 128, "bf16", Bar(2.8, 1.9, 1.75, 625), Bar(4.0, 2.5, us=485)),
    Scenario("inference, batch 128, TF32", "block", 128, "tf32", Bar(2.6, 1.8, 1.8, 1290), Bar(3.5, 2.4, us=1000)),
    Scenario(
        "training step, batch 128, bf16", "block", 128, "bf16",
        Bar(2.4, 1.7, 2.0, 2150), Bar(3.4, 2.4, us=1500), mode="training",
    ),
    Scenario(
        "training step, batch 128, TF32", "block", 128, "tf32",
        Bar(2.0, 1.5, 2.2, 4700), Bar(2.6, 2.0, us=3650), mode="training",
    ),
    Scenario(
        "training step at 96x96, batch 128, bf16", "block", 128, "bf16",
        Bar(4, 1.6, floor=3), Bar(7, 2.3, us=420), mode="training", image=96,
    ),
    Scenario(
        "KernelBench level 3 problem 6", "kernelbench6", 10, "tf32",
        Bar(3, 2.5, floor=2.5), Bar(5, 4, us=1450), image=None, subjects=None,
    ),
)  # fmt: skip


@dataclass(frozen=True)
class Yardstick:
    """Public times of a KernelBench level 3 problem in milliseconds by card: eager and the best torch.compile.

    From results/timing of KernelBench, as carried by pike-project/pike.
    """

    suite: str
    name: str
    milliseconds: Mapping[str, tuple[float, float]]


YARDSTICKS = (
    Yardstick("kernelbench6", "problem 6, one block", {"H100 SXM": (8.74, 7.17), "B200": (6.07, 3.58)}),
    Yardstick("kernelbench7", "problem 7, the whole network", {"H100 SXM": (1.75, 0.99), "B200": (5.33, 0.97)}),
)


@dataclass(frozen=True)
class Outcome:
    """A scenario as measured: sums over its cases in microseconds, None where one of them was not measured.

    compile: each case's fastest mode. missing: why ``us`` is None.
    """

    us: float | None
    eager: float | None = None
    compile: float | None = None
    floor: float | None = None
    missing: str = ""

    def against(self, bar: Bar) -> dict[str, bool | None]:
        """For each figure that ``bar`` names, whether it is reached; None where it was not measured."""
        held: dict[str, bool | None] = {
            "x eager": None if self.eager is None else self.eager / self.us >= bar.eager,
            "x compile": None if self.compile is None else self.compile / self.us >= bar.compile,
        }
        if bar.floor is not None:
            held["x floor"] = None if self.floor is None else self.us / self.floor <= bar.floor
        if bar.us is not None:
            held["us"] = self.us <= bar.us
        return held


def evaluate(scenario: Scenario, cases: Sequence[Case]) -> Outcome:
    """The sums of a scenario over the cases of one result file."""
    found = {
        c.subject: c
        for c in cases
        if (c.suite, c.batch, c.dtype, c.mode) == (scenario.suite, scenario.batch, scenario.dtype, scenario.mode)
        and scenario.image in (None, c.image)
    }
    subjects = scenario.subjects or tuple(found)
    lacking = [s for s in subjects if s not in found or found[s].us(scenario.implementation) is None]
    if lacking or not subjects:
        some = 0 < len(lacking) < len(subjects)
        return Outcome(None, missing=f"{', '.join(lacking)} not measured" if some else "not measured")
    chosen = [found[s] for s in subjects]
    return Outcome(
        _sum([c.us(scenario.implementation) for c in chosen]),
        _sum([c.us(EAGER) for c in chosen]),
        _sum([c.best(COMPILE)[1] for c in chosen]),
        _sum([c.floor_us for c in chosen]),
    )


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values)
