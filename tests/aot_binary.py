"""Compiles one launch ahead of time, without a GPU, and judges its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inception_fused import plan
from inception_fused.kernels.launch import OPTIONS, Launch, kind_of

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
MAX_STACK_BYTES = 16
"""Triton 3.6 and 3.9 each put 8 bytes on the stack in some clean kernel; a real spill is 32 bytes and more."""

MMA = re.compile(r"mma\.sync|wgmma\.mma_async|tcgen05\.mma")
WIDE = re.compile(r"\.v4\.b32|\.v2\.b64|\.v8\.b32|\.v4\.b64")


WITHOUT_DOT = ("pack_kernel", "pack_dgrad_kernel", "mask_grad_kernel", "reduce_kernel")

SMALL_ACCESS = {
    "mask_grad_kernel": r"ld\.global\.b8 ",  # a byte of mask bits for eight elements
    "grouped_dgrad_kernel": r"ld\.global\.b(32|16) ",  # the taps of 16 bytes of dpool
    "reduce_kernel": r"st\.global\.(b32|v2\.b32|b16) ",  # one store for eight loads and more
}
"""Narrow accesses that are meant, for each kernel: not of activations or weights, or few."""

TRANSPOSED_TF32 = r"cp\.async\.ca\S* .*, 0x4,"
"""wgrad's operands in fp32 from sm_90 on: wgmma and tcgen05 read TF32 along GEMM_K only, so Triton transposes both
while it copies them, four bytes at a time."""


def compile_launch(launch: Launch, capability: int) -> Any:
    """Triton's ahead-of-time compile, with the hints that a launch on a GPU gives: pointers on 16 bytes."""
    names = launch.kernel.arg_names
    signature = dict(zip(names, map(kind_of, launch.args), strict=False))
    constexprs: dict[Any, Any] = {name: None for name, kind in signature.items() if kind == "constexpr"}
    attrs: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(names[: len(launch.args)]):
        for path, kind in _leaves(signature[name], (i,)):
            if kind == "constexpr":
                constexprs[path if len(path) > 1 else name] = None
            elif kind.startswith("*"):
                attrs[path] = [["tt.divisibility", 16]]
    given = launch.constexprs | {k: v for k, v in launch.tile._asdict().items() if k in names}
    for name, value in given.items():
        signature[name] = "constexpr" if not isinstance(value, tuple) else ("constexpr",) * len(value)
        if isinstance(value, tuple):
            constexprs |= {(names.index(name), j): v for j, v in enumerate(value)}
        else:
            constexprs[name] = value
    source = ASTSource(launch.kernel, signature, constexprs, attrs)
    options = OPTIONS | {"num_warps": launch.tile.num_warps, "num_stages": launch.tile.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def _leaves(kind: Any, path: tuple[int, ...]) -> Iterator[tuple[tuple[int, ...], str]]:
    if isinstance(kind, tuple):
        for j, inner in enumerate(kind):
            yield from _leaves(inner, (*path, j))
    else:
        yield path, kind


def resources(binary: Any) -> dict[str, int]:
    """Registers and stack bytes a thread (cuobjdump), shared memory of a block."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        usage = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": binary.metadata.shared}


def verdict(binary: Any, *, wide_loads: bool, has_dot: bool, meant: str = "$^") -> tuple[dict[str, int], list[str]]:
    """Figures, and what is wrong.

    wide_loads: every load of the kernel is of activations or weights, 16 bytes each, but for those that ``meant``, a
    pattern, finds.
    """
    figures, ptx, faults = resources(binary), binary.asm["ptx"], []
    if figures["stack"] > MAX_STACK_BYTES:
        faults.append(f"spills: {figures['stack']} bytes of stack")
    if figures["shared"] > plan.MIN_SHARED_BYTES:
        faults.append(f"shared memory: {figures['shared']} bytes, sm_86 has {plan.MIN_SHARED_BYTES}")
    if has_dot and not MMA.search(ptx):
        faults.append("no matrix instruction")
    loads = [line.strip() for line in ptx.splitlines() if "ld.global" in line or ("cp.async.c" in line and "[" in line)]
    narrow = [line for line in loads if not _is_wide(line) and not re.search(meant, line)]
    figures |= {"loads": len(loads), "narrow_loads": len(narrow)}
    stores = [line.strip() for line in ptx.splitlines() if "st.global" in line]
    narrow_stores = [line for line in stores if not _is_wide(line) and not re.search(rf"\.b8|{meant}", line)]
    figures |= {"stores": len(stores), "narrow_stores": len(narrow_stores)}
    if wide_loads and narrow_stores:
        faults.append(f"narrow stores: {len(narrow_stores)} of {len(stores)}, such as {narrow_stores[0]!r}")
    if wide_loads and narrow:
        faults.append(f"narrow loads: {len(narrow)} of {len(loads)}, such as {narrow[0]!r}")
    return figures, faults


def _is_wide(line: str) -> bool:
    if "cp.async.c" in line:
        return re.search(r"\],\s*(0x10|16)\b", line) is not None
    return WIDE.search(line) is not None


def judge(launch: Launch, capability: int, wide_loads: bool) -> tuple[dict[str, int], list[str]]:
    """:func:`verdict` on a launch; a compile error of any kind is a fault."""
    name = launch.kernel.fn.__name__
    meant = SMALL_ACCESS.get(name, "$^")
    if name == "conv_wgrad_kernel" and launch.args[0].dtype == torch.float32 and capability >= 90:
        meant = TRANSPOSED_TF32
    try:
        binary = compile_launch(launch, capability)
        return verdict(binary, wide_loads=wide_loads, has_dot=name not in WITHOUT_DOT, meant=meant)
    except Exception as error:
        return {}, [f"does not compile: {type(error).__name__}: {str(error)[-300:]}"]
