"""What the forecasts of a model's blocks say, in words: what bounds each kernel, what eager may do faster."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from inception_fused.plan.cards import Ceilings
from inception_fused.plan.forecast import NO_PRODUCT, Forecast
from inception_fused.tools.report import figure_of

SMALL_SHARE = 0.05
"""Of all predicted time: kernels below it are not named."""

WIDE = 0.1
"""Of the predicted time: a range that is wider is said."""

MARGIN = 0.8
"""Eager is named where it takes less than this of ours: both are models."""


def notes(launches: Sequence[Forecast], ceilings: Ceilings, on_card: bool) -> list[str]:
    """Sentences on the launches of a model's blocks, all of them."""
    total = sum(launch.predicted for launch in launches)
    shares = {kernel: sum(launch.predicted for launch in some) / total for kernel, some in _kernels(launches).items()}
    large = [kernel for kernel, share in sorted(shares.items(), key=lambda item: -item[1]) if share >= SMALL_SHARE]
    said = [f"{kernel} {shares[kernel]:.0%} ({bound_of(_kernels(launches)[kernel])})" for kernel in large]
    gap = f"{ceilings.launch * 1e6:.1f} us a launch{'' if on_card else ' (a guess)'}"
    found = [
        f"predicted: the busiest unit of each launch on {ceilings.multiprocessors} multiprocessors, by instructions "
        f"counted in its machine code, not measured, and {gap}{_range(launches, total)}. Of it {', '.join(said)}."
    ]
    if others := sorted({launch.stands_for for launch in launches} - {"", NO_PRODUCT}):
        names = ", ".join(dict.fromkeys(launch.name for launch in launches if launch.stands_for in others))
        found.append(f"not counted with this tile on this architecture: {names}; predicted from {'; '.join(others)}.")
    if faster := eager_faster(launches):
        chosen = ",".join(f"{kernel}=eager" for some in faster for kernel in some.split("+"))
        times = ", ".join(
            f"{k} {figure_of(1e6 * ours)} us, eager {figure_of(1e6 * t)}" for k, (ours, t) in faster.items()
        )
        found.append(
            f'eager\'s own kernels may be faster, by a model of them that is a guess: {times}; try backend("{chosen}").'
        )
    return found


def bound_of(launches: Iterable[Forecast]) -> str:
    """What bounds most of some launches' time."""
    times: dict[str, float] = {}
    for launch in launches:
        word = "timed" if launch.timed else launch.bound
        times[word] = times.get(word, 0.0) + launch.predicted
    return max(times, key=times.__getitem__)


def eager_faster(launches: Sequence[Forecast]) -> Mapping[str, tuple[float, float]]:
    """Kernels whose launches all have an ATen twin that is predicted to be clearly faster: (ours, eager's) seconds."""
    found = {}
    for kernel, some in _kernels(launches).items():
        if all(launch.eager is not None for launch in some):
            ours, eager = sum(launch.predicted for launch in some), sum(launch.eager for launch in some)
            if eager < MARGIN * ours:
                found[kernel] = (ours, eager)
    return found


def as_data(launches: Iterable[Forecast]) -> list[dict[str, Any]]:
    """The launches ready for ``json.dumps``, in microseconds."""
    return [
        {
            "launch": launch.name, "bound": launch.bound, "timed": launch.timed, "stands_for": launch.stands_for,
            "predicted_us": 1e6 * launch.predicted, "low_us": 1e6 * launch.low, "high_us": 1e6 * launch.high,
            "units_us": {unit: 1e6 * seconds for unit, seconds in launch.units.items()},
        }
        for launch in launches
    ]  # fmt: skip


def _kernels(launches: Iterable[Forecast]) -> dict[str, list[Forecast]]:
    """By the names that backend() knows: the launches of one kernel have its name and a window's, those of a pair both
    names."""
    found: dict[str, list[Forecast]] = {}
    for launch in launches:
        found.setdefault(launch.name.split()[0], []).append(launch)
    return found


def _range(launches: Sequence[Forecast], total: float) -> str:
    low, high = sum(launch.low for launch in launches), sum(launch.high for launch in launches)
    return (
        f"; latency is assumed: {figure_of(1e6 * low)} to {figure_of(1e6 * high)} us"
        if high - low > WIDE * total
        else ""
    )
