"""An emulator of PTX: executes what Triton emits for the project's kernels on tensors on the CPU (sm_80, sm_90).

    run         a kernel's PTX, a grid, tensors: what happened
    schedule    in what order warps run, when asynchronous work takes effect
    program     text -> instructions and basic blocks
    translate   instructions -> steps; arithmetic (integers), accesses, warp_wide, issue: what each does
    warps       lanes, registers, program counters, barriers
    memory      tensors with red zones; shared: shared memory and its races; asynchronous: cp.async, wgmma
    fragments   where the elements of matrices lie

What it cannot show is in DESIGN.md, section 9.
"""

from .program import PtxError
from .run import Kernel, Report, execute
from .schedule import Schedule

__all__ = ["Kernel", "PtxError", "Report", "Schedule", "execute"]
