"""Prints, as JSON, what reaches Triton's launcher: of planned launches, and of launches from memory in each way.

Run by test_replay.py in a process of its own, since one that interprets kernels cannot compile them.
"""

from __future__ import annotations

import json
import weakref
from typing import Any

import torch
from triton import knobs

from benchmarks.cases.stub_device import stub_device
from checks.block_cases import SMALL, backward, make_block
from inception_fused.op import operators
from inception_fused.runtime import launch, replay

LAUNCHER_ARGUMENTS = 9
"""Grid, stream, function, two of metadata and two hooks stand before the kernel's own arguments."""


def canonical(calls: list[tuple[Any, ...]]) -> list[Any]:
    """Calls of the launcher, every address replaced by the order in which it first appears."""
    seen: dict[int, int] = {}

    def name(arg: Any) -> Any:
        if isinstance(arg, tuple):
            return [name(item) for item in arg]
        if isinstance(arg, torch.Tensor):
            arg = arg.data_ptr()
        if isinstance(arg, int) and arg >= 1 << 32:
            return f"address {seen.setdefault(arg, len(seen))}"
        return arg if isinstance(arg, (int, float, type(None))) else str(arg)

    found = []
    for args in calls:
        *grid, stream, function, metadata = args[:6]
        found.append([grid, stream, function, str(metadata), *map(name, args[LAUNCHER_ARGUMENTS:])])
    return found


def main() -> None:
    block = make_block(SMALL, (3, 7, 5), torch.bfloat16)
    alive: list[weakref.ref[torch.Tensor]] = []
    with stub_device() as launcher:

        def step() -> list[Any]:
            """Each pass with names of its own: the backward's temporaries may lie where the forward's were."""
            launcher.calls.clear()
            out = block.forward()
            found = canonical(launcher.calls)
            launcher.calls.clear()
            grads = backward(block, out, dy := torch.ones_like(out[0]))
            alive.extend(weakref.ref(t) for t in (*out, dy, *grads))
            return found + canonical(launcher.calls)

        found = {"planned": step()}
        assert step() == found["planned"], "two planned steps differ"
        launcher.calls.clear()
        found["kept"] = sum(ref() is not None for ref in alive)
        plans = operators._planned_forward, operators._planned_backward
        operators._planned_forward = operators._planned_backward = None  # from here on every launch is from memory
        found["private"] = step()
        operators._planned_forward, operators._planned_backward = plans
        hooks = knobs.runtime.launch_enter_hook
        hooks.add(lambda metadata: None)
        found["hooked"] = step()
        # Of the backward alone, whose calls are the last.
        found["metadata"] = [args[6] is not None and args[7] is hooks for args in launcher.calls]
        hooks.calls.clear()
        replay.forget()
        launch.PRIVATE_CALL = ((0, 0), (0, 0))
        step(), step()
        found["public"] = step()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
