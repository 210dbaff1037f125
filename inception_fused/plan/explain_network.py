"""The parts of GoogLeNet as a table: eager's floor and our forecast of each, the sums, and the stem's share of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from operator import attrgetter

import torch
from torch import nn

from inception_fused.plan import tuned
from inception_fused.plan.cards import H200, Ceilings
from inception_fused.plan.explain_plan import aligned
from inception_fused.plan.network import FORMS, Estimate, estimates, parts_of, stem_share, summed
from inception_fused.plan.tile_table import PRECISIONS

PASSES = {"inference": False, "training step": True}
HEADER = ("part", "output", *("floor", "kernels", "ours", "launches") * len(PASSES))

LEGEND = (
    "microseconds on {card}; floor: what FLOP and bytes of eager PyTorch's kernels allow at least, each alone and "
    "without its launch;\nours: the forecast, that is the busiest unit of each of our launches and {launch:.1f} a "
    "launch, counted in the machine code, not measured;\n- where PyTorch computes the part"
)
BELOW = (
    "blocks fused: the stem (b1, b2) by PyTorch; stem too: its 1x1 and 3x3 as well; pools too: the max-pools between, "
    "the first with the 7x7's\nbias and ReLU. floors: of PyTorch's kernels, and of our launches where a part is fused. "
    "With our forecasts PyTorch's parts stay at their\nfloors: these sums are too low by what its kernels need beyond "
    "those, and so is the stem's share where PyTorch computes it."
)


def explain(network: nn.Module, images: Sequence[int], gpu: tuned.Gpu | None = None, card: Ceilings = H200) -> str:
    """A line for each part, then each of FORMS' sums and the stem's share in it.

    network: GoogLeNet on the meta device, in the dtype of the kernels, float32 for TF32. images: their [N, C, H, W].
    gpu: whose tuned tables are asked (tuned.key()); None for the rules. card: whose ceilings count.
    """
    dtype = next(network.parameters()).dtype
    parts = parts_of(network, torch.empty(*images, dtype=dtype, device="meta"))
    place = dict(precision=PRECISIONS[dtype], gpu=gpu)
    found = {
        form: [estimates(parts, dtype, card, training=training, fused=fused, **place) for training in PASSES.values()]
        for form, fused in FORMS.items()
    }
    fullest = list(found.values())[-1]
    rows = [("", "", *(cell for name in PASSES for cell in (name, "", "", ""))), HEADER]
    rows += [_row(both) for both in zip(*fullest, strict=True)]
    legend = LEGEND.format(card=card.name, launch=1e6 * card.launch)
    return "\n".join([legend, "", *aligned(rows), "", *aligned(_sums(found)), "", BELOW])


def _row(both: Sequence[Estimate]) -> tuple[str, ...]:
    part = both[0].part
    cells = [cell for estimate in both for cell in _cells(estimate)]
    return (part.name, "x".join(map(str, part.output[1:])), *cells)


def _cells(estimate: Estimate) -> tuple[str, ...]:
    ours = (f"{1e6 * estimate.seconds():.1f}", str(len(estimate.launches))) if estimate.launches else ("-", "")
    return (f"{1e6 * estimate.floor:.1f}", str(estimate.kernels), *ours)


def _sums(found: Mapping[str, Sequence[Sequence[Estimate]]]) -> list[tuple[str, ...]]:
    """Of each pass: eager's, then each form's."""
    rows = [("", "", "floors", "stem", "with our forecasts", "stem", "of it PyTorch's")]
    for place, name in enumerate(PASSES):
        for form, passes in found.items():
            some = passes[place]
            if not rows[-1][0].startswith(name):
                rows.append((name, "eager", *_by_floors([estimate._replace(launches=()) for estimate in some])))
            stem, rest = stem_share(some)
            rows.append((name, form, *_by_floors(some), _span(some), f"{stem:.0%}", f"{rest:.0%}"))
    return [row + ("",) * (len(rows[0]) - len(row)) for row in rows]


def _by_floors(some: Sequence[Estimate]) -> tuple[str, str]:
    of = attrgetter("floor")
    return f"{1e6 * summed(some, of):.0f}", f"{stem_share(some, of)[0]:.0%}"


def _span(some: Sequence[Estimate]) -> str:
    """The sum in microseconds, with its range where that is wide."""
    low, middle, high = (1e6 * summed(some, attrgetter(name)) for name in ("low", "predicted", "high"))
    wide = high - low > 0.1 * middle
    return f"{middle:.0f}" + (f" ({low:.0f} to {high:.0f})" if wide else "")
