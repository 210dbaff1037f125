"""Prints, as JSON, what precompile() leaves to do for the calls after it, and what processes make of one cache.

Run by test_precompile.py in a process of its own, since one that interprets kernels cannot compile them. Its first
argument is how many processes start together; TRITON_CACHE_DIR is theirs.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from triton import knobs

from benchmarks.cases import stub_device
from checks.block_cases import SMALL
from inception_fused import FusedInception, precompile
from inception_fused.op import operators
from inception_fused.runtime.submit import count
from stem_cases import fused


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 24, 1), FusedInception(*SMALL)).to(torch.bfloat16)


X = torch.randn(2, 3, 6, 4).to(torch.bfloat16, memory_format=torch.channels_last)


def files() -> dict[str, tuple[int, int]]:
    """Every file of the cache with the time when it was written, and its size."""
    found = [path for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("*") if path.is_file()]
    return {str(path): (path.stat().st_mtime_ns, path.stat().st_size) for path in found}


def broken() -> list[str]:
    """Groups of files of the cache that are not whole."""
    found = []
    for path in Path(os.environ["TRITON_CACHE_DIR"]).rglob("__grp__*.json"):
        children = json.loads(path.read_text())["child_paths"].values()
        if not children or any(not Path(child).is_file() or not Path(child).stat().st_size for child in children):
            found.append(str(path))
    return found


def together(processes: int) -> list[int]:
    """Exit codes of processes that compile the same at the same moment; forked, so that all have imported."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(processes)

    def work() -> None:
        barrier.wait()
        found = precompile(model().requires_grad_(False), X, threads=2, progress=False)
        assert found.binaries == 3, found
        assert found.blocks == ("1",), found

    children = [context.Process(target=work) for _ in range(processes)]
    for child in children:
        child.start()
    for child in children:
        child.join()
    return [child.exitcode for child in children]


def afterwards(net: nn.Module) -> dict[str, Any]:
    """What is compiled, loaded and planned by the calls after precompile()."""
    seen: dict[str, Any] = {"compiled": 0, "loaded": 0, "planned": 0}

    def counted(what: str, function: Any) -> Any:
        def call(*args: Any) -> Any:
            seen[what] += 1
            return function(*args)

        return call

    load = stub_device._Utils.load_binary
    stub_device._Utils.load_binary = counted("loaded", load)
    knobs.runtime.jit_cache_hook = lambda **_: seen.update(compiled=seen["compiled"] + 1)
    operators._planned_forward = counted("planned", operators._planned_forward)
    operators._planned_backward = counted("planned", operators._planned_backward)
    block, x = net[1], net[0](X)
    for way in ("channels_last", "NCHW"):
        y = block(x)
        ones = torch.ones_like(y)
        torch.autograd.grad(y, (x, *block.parameters()), ones if way == "channels_last" else ones.contiguous())
    with torch.no_grad():
        net(X)
    found = {"remembered": dict(seen)}
    # A dy of yet another kind is planned, and takes the binaries that are there.
    block(x).sum().backward()
    found["expanded dy"] = dict(seen)
    return found


def main() -> None:
    torch.set_num_threads(1)
    with stub_device.stub_device() as launcher:
        found: dict[str, Any] = {"exit codes": together(int(sys.argv[1])), "broken": broken()}
        before = files()
        again = precompile(model().requires_grad_(False), X, progress=False)
        found |= {"inference": again.binaries, "rewritten": files() != before}
        net = model()
        with count() as ran:
            whole = precompile(net, X, progress=False)
        found |= {"all": whole.binaries, "text": str(whole), "launches that ran": len(ran)}
        precompile(net, X, progress=False)
        launcher.calls.clear()
        found |= afterwards(net)
        stem = nn.Sequential(net[0], fused(pool=False, dtype=torch.bfloat16))
        found["binaries of the stem"] = precompile(stem, X, progress=False).binaries
        found["stem remembered"] = afterwards(stem)["remembered"]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
