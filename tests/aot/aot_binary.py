"""Judges the machine code of one launch, compiled ahead of time (python/counter/compiling.py)."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

import torch

from counter.compiling import compile_launch, resources
from inception_fused.plan import tile_table
from inception_fused.plan.launches import GEMMS, NORMED_TABLES, TABLES
from inception_fused.plan.pairs import PAIRS
from inception_fused.runtime.launch import Launch

MAX_STACK_BYTES = 16
"""Triton 3.6 and 3.9 each put 8 bytes on the stack in some clean kernel; a real spill is 32 bytes and more."""

MMA = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")
FROM_REGISTERS = re.compile(r"wgmma\.mma_async\S* \{[^}]*\}, \{")
WIDE = re.compile(r"\.v4\.b32|\.v2\.b64|\.v8\.b32|\.v4\.b64")
LOAD = re.compile(r"ld\.global|cp\.async\.c.*\[")
STORE = re.compile(r"st\.global")
LABEL, BRANCH = re.compile(r"(\$L__BB\w+):"), re.compile(r"\bbra\S*\s+(\$L__BB\w+)")

PAIRED = {pair.function for pair in PAIRS}

POOLS = {"max_pool_kernel", "max_pool_grad_kernel"}

WITHOUT_DOT = POOLS | {
    row.kernel.function
    for table in (*TABLES.values(), *NORMED_TABLES.values())
    for rows in table.rows.values()
    for row in rows
    if row.role not in GEMMS
}


class Meant(NamedTuple):
    """Narrow accesses that are no fault, as patterns: none of them is of activations, or of weights for a product.

    stores: by default of mask bits and taps. vectors: how many vectors of one number a column are loaded by loads, of
    which a thread then has the columns of 16 bytes of activations, UNIT of each; 0 for loads without a limit.
    """

    loads: str = "$^"
    stores: str = r"\.b8"
    vectors: int = 0


TAPS = r"st\.global\.b(32|16|8) "

BORDERS = r"ld\.global\.b16 "

NUMBERS = r"ld\.global\.b32 "
A_COLUMN = r"st\.global\.b(32|16) "

MEANT = {
    # A byte of mask bits for eight elements; a word of borders a pixel of one image, once.
    "mask_grad_kernel": Meant(r"ld\.global\.b8 ", r"st\.global\.b16 "),
    # A word of borders for all channels of a pixel.
    "conv_wgrad_kernel": Meant(BORDERS),
    # The taps of 16 bytes of dpool.
    "grouped_dgrad_kernel": Meant(r"ld\.global\.b(32|16) "),
    # The taps of 16 bytes of x.
    "pool_proj_kernel": Meant(stores=TAPS),
    "pool_and_reduce_kernel": Meant(stores=TAPS),
    # The taps of 16 bytes of x, of dy.
    "max_pool_kernel": Meant(stores=TAPS),
    "max_pool_grad_kernel": Meant(r"ld\.global\.b(32|16) "),
    # One store for eight loads and more.
    "reduce_kernel": Meant(stores=r"st\.global\.(b32|v2\.b32|b16) "),
    # Two fp32 sums a column, for all rows of a range; of N4 a word of borders a pixel of one image, once.
    "norm_stats_kernel": Meant(stores=r"st\.global\.b32 "),
    "norm_grad_stats_kernel": Meant(NUMBERS, A_COLUMN, vectors=3),
    # Vectors of one number a column, of which a program has eight columns; the sums themselves are 16 bytes wide.
    "norm_combine_kernel": Meant(r"ld\.global\.b(32|16) ", A_COLUMN, vectors=5),
    "norm_grad_combine_kernel": Meant(NUMBERS, A_COLUMN, vectors=3),
    # Statistics and coefficients, for all rows of a tile.
    "norm_apply_kernel": Meant(NUMBERS, vectors=3),
    "norm_grad_apply_kernel": Meant(NUMBERS, vectors=6),
    # Weights in the layout that the user has are read an element at a time, and so written: a warp still fills lines.
    "pack_kernel": Meant(r"ld\.global", r"st\.global"),
}

FEW_PIXELS, HALVES = 16, r"ld\.global\.v2\.b32 "
"""K2's small tile: 64 bytes of each of 16 pixels are eight bytes for each of 128 threads, a whole row for eight."""

ANY_LOAD = r"ld\.global"
TRANSPOSED_TF32 = rf"cp\.async\.ca\S* .*, 0x4,|{BORDERS}"
"""wgrad's operands in fp32 from sm_90 on: wgmma and tcgen05 read TF32 along GEMM_K only, so Triton transposes both
while it copies them, four bytes at a time."""


def meant(launch: Launch, capability: int) -> Meant:
    """What a launch may access narrowly on an architecture."""
    name, constexprs = launch.kernel.fn.__name__, launch.constexprs
    found = MEANT.get(name, Meant())
    if name in ("pool_proj_kernel", "pool_and_reduce_kernel") and launch.tile.BLOCK_M == FEW_PIXELS:
        found = found._replace(loads=HALVES)
    if name == "conv_wgrad_kernel" and launch.args[0].dtype == torch.float32 and 90 <= capability < 120:
        return found._replace(loads=TRANSPOSED_TF32)
    as_given = name == "pack_dgrad_kernel" and not all(
        krsc or rs == 1 for krsc, rs in zip(constexprs["KRSC"], constexprs["RS"], strict=True)
    )
    strided_dy = not constexprs.get("ROWS", True)
    if as_given or strided_dy:
        found = found._replace(loads=ANY_LOAD, vectors=0)
    given = dict(zip(launch.kernel.arg_names, launch.args, strict=False))
    if given.get("sums_ptr") is not None:
        # fp32 partial sums of biases' gradients, one a column and tile.
        found = found._replace(stores=rf"{found.stores}|st\.global\.b32 ")
    if given.get("mean_ptr") is not None:
        found = found._replace(loads=NUMBERS, vectors=1)
    return found


def verdict(binary: Any, launch: Launch, capability: int) -> tuple[dict[str, int], list[str]]:
    """Figures, and what is wrong.

    Where channels are whole units of 16 bytes every access of activations and weights must be 16 bytes wide. Scale and
    shift of an epilogue, a few elements for each thread, come after the last matrix instruction and are not asked; of a
    pair every access of a loop is asked, and each half besides in its own kernel.
    """
    figures, lines, faults = resources(binary), binary.asm["ptx"].splitlines(), []
    limit = tile_table.SHARED_BYTES.get(divmod(capability, 10), 99) << 10
    if figures["stack"] > MAX_STACK_BYTES:
        faults.append(f"spills: {figures['stack']} bytes of stack")
    if figures["shared"] > limit:
        faults.append(f"shared memory: {figures['shared']} bytes, sm_{capability} has {limit}")
    products = [i for i, line in enumerate(lines) if MMA.search(line)]
    if not products and launch.kernel.fn.__name__ not in WITHOUT_DOT:
        faults.append("no matrix instruction")
    if any(map(FROM_REGISTERS.search, lines)):
        # ptxas 12.8 and 12.9 let the next step write what the second of two such instructions still reads.
        faults.append("wgmma reads an operand from registers")
    vectors = launch.constexprs.get("HAS_SHIFT") or launch.constexprs.get("HAS_SCALE")
    asked = lines[: products[-1]] if products and vectors else lines
    if vectors and launch.kernel.fn.__name__ in PAIRED:
        # Of two main loops, whose epilogues stand anywhere.
        asked = [
            line for i, line in enumerate(lines) if "cp.async.c" in line or any(i in loop for loop in _loops(lines))
        ]
    small = meant(launch, capability)
    for kind, found, all_lines, pattern, most in (
        ("loads", LOAD, asked, small.loads, small.vectors * launch.constexprs["UNIT"]),
        ("stores", STORE, lines, small.stores, 0),
    ):
        accesses = [line.strip() for line in all_lines if found.search(line)]
        narrow = [line for line in accesses if not _is_wide(line)]
        borne = [line for line in narrow if re.search(pattern, line)]
        if not most or len(borne) <= most:
            narrow = [line for line in narrow if line not in borne]
        figures |= {kind: len(accesses), f"narrow_{kind}": len(narrow)}
        if launch.constexprs["UNIT"] > 1 and narrow:
            faults.append(f"narrow {kind}: {len(narrow)} of {len(accesses)}, such as {narrow[0]!r}")
    return figures, faults


def _loops(lines: list[str]) -> list[range]:
    """Lines from a label to the last branch back to it."""
    labels: dict[str, int] = {}
    found: dict[str, range] = {}
    for i, line in enumerate(lines):
        if label := LABEL.match(line):
            labels[label[1]] = i
        elif (branch := BRANCH.search(line)) and branch[1] in labels:
            found[branch[1]] = range(labels[branch[1]], i)
    return list(found.values())


def _is_wide(line: str) -> bool:
    if "cp.async.c" in line:
        return re.search(r"\],\s*(0x10|16)\b", line) is not None
    return WIDE.search(line) is not None


def judge(launch: Launch, capability: int) -> tuple[dict[str, int], list[str]]:
    """:func:`verdict` on a launch; a compile error of any kind is a fault."""
    try:
        return verdict(compile_launch(launch, capability), launch, capability)
    except Exception as error:
        return {}, [f"does not compile: {type(error).__name__}: {str(error)[-300:]}"]
