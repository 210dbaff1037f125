"""The stage that times both forms of the compiled kernels side by side, and what its times say about choice.ROUTES."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from math import exp, log
from typing import Any

import torch

from benchmarks.cases.baselines import Point, build, operands
from gpu.run import Matrix, Row, Run, StageError, figures
from inception_fused.plan.floors import works
from inception_fused.plan.launches import NAMES
from inception_fused.tools.timing import measure

FORMS = ("native", "triton")

NOISE = 0.02
"""Two forms whose times differ by less are called equal."""


def native_points(matrix: Matrix) -> list[Point]:
    return replace(matrix, dtypes=("bf16", "tf32", "fp16")).points(("forward",))


def native(run: Run) -> None:
    """Two rows per point and compiled kernel, each form alone, each checked against float64 before either is timed.

    figures["routes"] holds :func:`routes` by kernel. Raises StageError if a point failed or a form cannot run at all.
    """
    from inception_fused.plan import choice
    from inception_fused.runtime import native as extension

    reason = extension.why_no_extension(torch.device(run.device))
    if reason is not None:
        run.add({"kernel": " and ".join(choice.COMPILED), "implementation": "native", "skipped": reason})
        raise StageError(f"nothing was compared: {reason}")

    def time_forms(point: Point) -> list[Row]:
        limits = {work.name: work for direction in NAMES for work in works(point.shape, direction)}
        rows = []
        for kernel in choice.COMPILED:
            launches = {form: checked_launch(point, kernel, form, run.device) for form in FORMS}
            work = limits[kernel]
            limit = {"flop": work.flop, "moved": work.bytes, "floor": work.floor(run.ceilings(), point.dtype)}
            for form, item in launches.items():
                timing = measure(item.run, run.stopwatch, seconds=run.seconds)
                row = {"kernel": kernel, "implementation": form, "weights": "channels_last"}
                rows.append(row | figures(timing, **limit))
        return rows

    # Asked before the first launch: afterwards the device may be lost.
    capability = torch.cuda.get_device_capability() if run.device == "cuda" else None
    try:
        run.each(native_points(run.matrix), time_forms, seconds=5)
    finally:
        rows, blocks = run.stage.get("rows", []), list(run.matrix.blocks)
        found = {kernel: routes(rows, blocks, capability, kernel) for kernel in choice.COMPILED}
        run.stage["figures"] = {"routes": found}
        print("\n".join(routes_table(kernel, one) for kernel, one in found.items()), flush=True)


def checked_launch(point: Point, kernel: str, form: str, device: str) -> Any:
    """A compiled kernel of one form at a point, ready to be run again and again; it has run once, with the right
    result.

    Raises AssertionError where what it writes is not within rounding of float64, KernelError where it cannot run.
    """
    from checks.block_cases import Block
    from inception_fused import FusedInception
    from inception_fused.plan import choice

    module = build(FusedInception, point, device).requires_grad_(False)
    x, dy = operands(point, device)
    weights, biases, _ = module.params()
    block = Block(x.detach(), list(weights), list(biases), True)
    try:
        return (
            _checked_forward(block, kernel, form)
            if kernel in choice.FORWARD
            else _checked_backward(block, dy, kernel, form)
        )
    except AssertionError as error:
        raise AssertionError(f"{kernel} {form}, {point}: {error}") from None


def _demanding(kernel: str, form: str) -> str:
    from inception_fused.plan import choice

    return ",".join(f"{name}={form if name == kernel else 'triton'}" for name in choice.KERNELS)


def _checked_forward(block: Any, kernel: str, form: str) -> Any:
    from gpu.sanitizer_cases import check_k1
    from inception_fused.op import launcher
    from inception_fused.runtime.submit import record

    # Listed, not run: of the launches only the first is wanted. r is saved so that it can be looked at, bits are not.
    with launcher.apart(), record() as launches:
        y, r, _, _ = torch.ops.inception_fused._forward(*block, True, False, False, _demanding(kernel, form))
    _, *names = NAMES["forward"]
    if len(launches) != len(names):
        raise StageError(f"got {len(launches)} launches, wants {', '.join(names)}, with weights that need no packing")
    for output in (y, r):
        output.fill_(float("nan"))
    launches[0].run()
    check_k1(block, y, r)
    return launches[0]


def _checked_backward(block: Any, dy: torch.Tensor, kernel: str, form: str) -> Any:
    """All launches of a backward run once, since the compiled one reads what most of them have written."""
    from checks.block_cases import backward, check_backward
    from inception_fused.runtime.submit import record

    out = block.forward(save=True)
    with record() as launches:
        grads = backward(block, out, dy, _demanding(kernel, form))
    if len(launches) != len(NAMES["backward"]):
        raise StageError(f"got {len(launches)} launches, wants {', '.join(NAMES['backward'])}")
    for grad in grads:
        grad.fill_(float("nan"))
    for launch in launches:
        launch.run()
    check_backward(block, out, dy, grads, tf32=dy.is_cuda and dy.dtype == torch.float32)
    return launches[NAMES["backward"].index(kernel)]


def routes(
    rows: Sequence[Mapping[str, Any]], blocks: Sequence[str], capability: tuple[int, int] | None, kernel: str
) -> dict[str, Any]:
    """What the rows of this stage say of a kernel, ready for JSON.

    sets: for each dtype and batch that has all ``blocks`` in both forms {dtype, batch, native_us, triton_us (sums over
    the blocks), ratio (Triton's over native's)}. ratio: their geometric mean, so that small batches count like large
    ones; faster: "native", "triton" or "equal"; both None without a set. route: the line of choice.ROUTES for the
    capability; verdict: whether it is confirmed, in words, None without a device or a set.
    """
    from inception_fused.plan import choice

    times: dict[tuple[str, int], dict[str, dict[str, float]]] = {}
    for row in rows:
        if "us" in row and row["kernel"] == kernel:
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
    lines = [line for line in choice.ROUTES if capability is not None and tuple(capability) >= line[0]]
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


def routes_table(kernel: str, found: Mapping[str, Any]) -> str:
    """:func:`routes` as lines of text."""
    lines = [
        f"  {kernel} {s['dtype']} batch {s['batch']}: native {s['native_us']:.1f} us, Triton {s['triton_us']:.1f} us, "
        f"Triton / native {s['ratio']:.3f}"
        for s in found["sets"]
    ]
    if found["ratio"] is None:
        return f"  {kernel}: no dtype and batch has every block in both forms"
    lines.append(f"  {kernel}, faster: {found['faster']} (geometric mean of Triton / native {found['ratio']:.3f})")
    if found["verdict"]:
        lines.append(f"  choice.ROUTES: {found['verdict']}")
    return "\n".join(lines)
