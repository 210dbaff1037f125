"""The stage that times K1's two forms side by side, and what its times say about plan.ROUTES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log
from typing import Any

import torch
from baselines import Point, build, operands
from gpu_run import Matrix, Row, Run, StageError, figures
from roofline import forward_kernels
from timing import measure

FORMS = ("native", "triton")

NOISE = 0.02
"""Two forms whose times differ by less are called equal."""


def native_points(matrix: Matrix) -> list[Point]:
    return replace(matrix, dtypes=("bf16", "tf32", "fp16")).points(("forward",))


def native(run: Run) -> None:
    """Two rows per point, K1 alone in each form, each checked against float64 before either is timed.

    figures["routes"] holds :func:`routes`. Raises StageError if a point failed or one form cannot run at all.
    """
    from inception_fused import native as extension

    obstacle = extension.obstacle(torch.device(run.device))
    if obstacle is not None:
        run.add({"kernel": "K1", "implementation": "native", "skipped": obstacle})
        raise StageError(f"nothing was compared: {obstacle}")

    def time_forms(point: Point) -> list[Row]:
        launches = {form: checked_launch(point, form, run.device) for form in FORMS}
        work = forward_kernels(point.config, point.batch, point.size, point.dtype)[0]
        limit = {"flop": work.flop, "moved": work.bytes, "floor": work.floor(run.ceilings(), point.dtype)}
        rows = []
        for form, item in launches.items():
            timing = measure(item.run, run.stopwatch, seconds=run.seconds)
            rows.append({"kernel": "K1", "implementation": form, **figures(timing, **limit)})
        return rows

    # Asked before the first launch: afterwards the device may be lost.
    capability = torch.cuda.get_device_capability() if run.device == "cuda" else None
    try:
        run.each(native_points(run.matrix), time_forms, seconds=5)
    finally:
        found = routes(run.stage.get("rows", []), list(run.matrix.blocks), capability)
        run.stage["figures"] = {"routes": found}
        print(routes_table(found), flush=True)


def checked_launch(point: Point, form: str, device: str) -> Any:
    """K1 of one form at a point, ready to be run again and again; it has run once, with the right result.

    Raises AssertionError where y's first slice or r is not within rounding of float64, KernelError where it cannot run.
    """
    from cases import Block
    from sanitizer_cases import check_k1

    from inception_fused import FusedInception
    from inception_fused.kernels.submit import record

    module = build(FusedInception, point, device).requires_grad_(False)
    x, _ = operands(point, device)
    weights, biases = module.params()
    block = Block(x, list(weights), list(biases), True)
    # Listed, not run: of the four launches only K1's is wanted. r is saved so that it can be looked at, bits are not.
    wish = f"K1={form},K2=triton,K3=triton,K4=triton"
    with record() as launches:
        y, r, _, _ = torch.ops.inception_fused._forward(*block, True, False, False, wish)
    if len(launches) != 4:
        raise StageError(f"{point}: got {len(launches)} launches, wants K1 to K4, with weights that need no packing")
    for output in (y, r):
        output.fill_(float("nan"))
    launches[0].run()
    try:
        check_k1(block, y, r)
    except AssertionError as error:
        raise AssertionError(f"K1 {form}, {point}: {error}") from None
    return launches[0]


def routes(
    rows: Sequence[Mapping[str, Any]], blocks: Sequence[str], capability: tuple[int, int] | None
) -> dict[str, Any]:
    """What the rows of this stage say, ready for JSON.

    sets: for each dtype and batch that has all ``blocks`` in both forms {dtype, batch, native_us, triton_us (sums over
    the blocks), ratio (Triton's over native's)}. ratio: their geometric mean, so that small batches count like large
    ones; faster: "native", "triton" or "equal"; both None without a set. route: the line of plan.ROUTES for the
    capability; verdict: whether it is confirmed, in words, None without a device or a set.
    """
    from inception_fused import plan

    times: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for row in rows:
        if "us" in row:
            forms = times.setdefault((row["dtype"], row["batch"]), {})
            forms.setdefault(row["implementation"], {})[row["block"]] = row["us"]
    sets = []
    for (dtype, batch), forms in times.items():
        if all(block in forms.get(form, {}) for form in FORMS for block in blocks):
            sums = {form: sum(forms[form][block] for block in blocks) for form in FORMS}
            sets.append(
                {"dtype": dtype, "batch": batch, "native_us": sums["native"], "triton_us": sums["triton"],
                 "ratio": sums["triton"] / sums["native"]}
            )  # fmt: skip
    ratio = exp(sum(log(s["ratio"]) for s in sets) / len(sets)) if sets else None
    faster = None
    if ratio is not None:
        faster = "equal" if abs(log(ratio)) < NOISE else "native" if ratio > 1 else "triton"
    lines = [line for line in plan.ROUTES if capability is not None and tuple(capability) >= line[0]]
    route = verdict = None
    if lines:
        (major, minor), routed = lines[-1]
        route = f"{routed} from sm_{major}{minor}"
        if faster == "equal":
            verdict = f'"{route}" is neither confirmed nor contradicted: less than {NOISE:.0%} apart'
        elif faster is not None:
            verdict = f'"{route}" is {"confirmed" if faster == routed else "contradicted"}'
    return {
        "sets": sets,
        "ratio": ratio,
        "faster": faster,
        "capability": capability and list(capability),
        "route": route,
        "verdict": verdict,
    }


def routes_table(found: Mapping[str, Any]) -> str:
    """:func:`routes` as lines of text."""
    lines = [
        f"  {s['dtype']} batch {s['batch']}: native {s['native_us']:.1f} us, Triton {s['triton_us']:.1f} us, "
        f"Triton / native {s['ratio']:.3f}"
        for s in found["sets"]
    ]
    if found["ratio"] is None:
        return "  no dtype and batch has every block in both forms"
    lines.append(f"  faster: {found['faster']} (geometric mean of Triton / native {found['ratio']:.3f})")
    if found["verdict"]:
        lines.append(f"  plan.ROUTES: {found['verdict']}")
    return "\n".join(lines)
