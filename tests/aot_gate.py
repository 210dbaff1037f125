"""Compiles the launches of a block ahead of time, without a GPU, and judges the machine code.

What the interpreter cannot see: registers that spill, shared memory beyond the block's limit, a dot that became no
matrix instruction, loads that lost their width. Runs in a process where Triton does not interpret:

    python tests/aot_gate.py --help
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from operator import itemgetter
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from inception_fused import gradients, ops, plan
from inception_fused.googlenet import GOOGLENET_BLOCKS, InceptionConfig, spatial_size
from inception_fused.kernels.launch import OPTIONS, Launch
from inception_fused.kernels.submit import record
from inception_fused.reference import CONV_NAMES, Inception

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TRITON_NAMES = {torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32"} | {d: name for name, d in DTYPES.items()}
CAPABILITIES = (80, 90, 100)
MAX_STACK_BYTES = 16
"""Triton 3.6 and 3.9 each put 8 bytes on the stack in some clean kernel; a real spill is 32 bytes and more."""

FIGURES = ("registers", "stack", "shared", "loads", "narrow_loads", "stores", "narrow_stores")
ODD_BLOCK = InceptionConfig(17, 13, (9, 20), (7, 11), 5)
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


class Job(NamedTuple):
    """One binary to compile. key: its identity; source: how to get the launch again in another process."""

    name: str
    key: tuple[Any, ...]
    source: tuple[Any, ...]
    capability: int
    wide_loads: bool


def block_launches(
    config: InceptionConfig, batch: int, image: tuple[int, int], dtype: torch.dtype, *,
    save: bool, bias: bool = True, activation: str | None = "relu", branch3: int = 5, packed: bool = False,
    dy_rows: bool = True,
) -> list[Launch]:  # fmt: skip
    """The launches of one forward on tensors without data, with save also those of a backward for all gradients.

    packed: parameters need no pack launch in the forward. dy_rows: dy is channels_last (else NCHW).
    """
    with torch.device("meta"):
        block = Inception(*config, branch3_kernel_size=branch3, bias=bias, activation=activation, dtype=dtype)
        x = torch.empty((batch, config.in_channels, *image), dtype=dtype).contiguous(memory_format=torch.channels_last)
    if packed:
        block = block.to(memory_format=torch.channels_last)
    weights = [getattr(block, name).weight for name in CONV_NAMES]
    biases = [getattr(block, name).bias for name in CONV_NAMES] if bias else []
    shape = plan.BlockShape.of(x, weights)
    relu = activation == "relu"
    y, r, bits, taps = ops._outputs(x, shape, True, save and relu, save)
    chosen = dict.fromkeys(plan.KERNELS, "triton")
    x_slice = ops.ChannelSlice(x, ops.row_stride(x), 0, shape.c)
    with torch.no_grad(), record() as launches:
        ops._run(
            x_slice, weights, biases, relu, shape, chosen,
            y, r, bits if save and relu else None, taps if save else None,
        )  # fmt: skip
        if save:
            needs = [True] * 7 + [bias] * 6
            dy = y if dy_rows else torch.empty_like(y, memory_format=torch.contiguous_format)
            gradients.block_backward(dy, x, r, bits, taps, weights, biases, relu=relu, needs=needs, chosen=chosen)
    return launches


def binary_key(launch: Launch) -> tuple[Any, ...]:
    """What makes Triton compile anew: kernel, types, constexprs, warps and stages; sizes do not."""
    kinds = tuple(map(_kind, launch.args))
    fixed = tuple(sorted((name, str(value)) for name, value in launch.constexprs.items()))
    return (launch.kernel.fn.__name__, kinds, fixed, tuple(launch.tile))


def _kind(arg: Any) -> Any:
    if isinstance(arg, tuple):
        return tuple(map(_kind, arg))
    if isinstance(arg, torch.Tensor):
        return "*" + TRITON_NAMES[arg.dtype]
    if arg is None:
        return "constexpr"
    return "fp32" if isinstance(arg, float) else "i32"


def googlenet_launches(dtype: torch.dtype) -> Iterator[tuple[str, Launch]]:
    """Every launch of inference and training of the nine blocks at 224x224 and batch 1, 32 and 128."""
    for name, config in GOOGLENET_BLOCKS.items():
        side = spatial_size(name)
        for batch, save in itertools.product((1, 32, 128), (False, True)):
            # The gradient that comes out of the average pool behind 5b is NCHW.
            for launch in block_launches(config, batch, (side, side), dtype, save=save, dy_rows=name != "5b"):
                yield name, launch


def compile_launch(launch: Launch, capability: int) -> Any:
    """Triton's ahead-of-time compile, with the hints that a launch on a GPU gives: pointers on 16 bytes."""
    names = launch.kernel.arg_names
    signature = dict(zip(names, map(_kind, launch.args), strict=False))
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


def run_job(job: Job) -> dict[str, Any]:
    dtype, kwargs, index = job.source
    launch = block_launches(**{**kwargs, "dtype": DTYPES[dtype]})[index]
    figures, faults = judge(launch, job.capability, job.wide_loads)
    name = launch.kernel.fn.__name__
    tile = launch.tile._asdict()
    return {
        "name": job.name,
        "kernel": name,
        "wide": job.wide_loads,
        "capability": job.capability,
        "tile": tile,
        **figures,
        "faults": faults,
    }


def planted() -> dict[str, list[str]]:
    """Faults that the gate finds in launches spoilt on purpose: one for each thing that it asserts."""
    at = {
        "config": GOOGLENET_BLOCKS["4b"],
        "batch": 128,
        "image": (14, 14),
        "save": False,
        "bias": False,
        "packed": True,
    }
    k1, k2, k3, k4 = block_launches(**at, dtype=torch.bfloat16)
    in_elements = k4._replace(constexprs=k4.constexprs | {"UNIT": 1})
    pack = block_launches(**(at | {"packed": False}), dtype=torch.bfloat16)[0]
    return {
        "spills": judge(k3._replace(tile=k3.tile._replace(BLOCK_M=256, BLOCK_N=256)), 80, True)[1],
        "narrow loads": judge(in_elements, 90, True)[1],
        "shared memory": judge(k1._replace(tile=k1.tile._replace(num_stages=6)), 90, True)[1],
        "no matrix instruction": verdict(compile_launch(pack, 90), wide_loads=False, has_dot=True)[1],
        "unspoilt": judge(k2, 90, True)[1] + judge(k4, 90, True)[1],
    }


class _NoDevice:
    """A driver that answers what Triton's launch path asks before it compiles, for a machine without a GPU."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def launched_binary(launch: Launch) -> Any:
    """What ``kernel[grid](...)`` itself would compile on sm_90 for these arguments, with its own hints."""
    triton.runtime.driver.set_active(_NoDevice(90))
    return launch.compile()


def launch_path(dtype: str) -> dict[str, Any]:
    """GoogLeNet's binaries as launches make them on sm_90: how many, the gate's verdicts on them, and which of them
    are not, to the byte, what compile_launch() makes of the same launch."""
    found: dict[str, dict[str, Any]] = {}
    for block, launch in googlenet_launches(DTYPES[dtype]):
        binary = launched_binary(launch)
        if binary.hash not in found:
            kernel = launch.kernel.fn.__name__
            _, faults = verdict(binary, wide_loads=False, has_dot=kernel not in WITHOUT_DOT)
            same = binary.asm["cubin"] == compile_launch(launch, 90).asm["cubin"]
            found[binary.hash] = {"name": f"{block} {kernel} {dtype}", "faults": faults, "same": same}
    return {"dtype": dtype, "binaries": list(found.values())}


def cases() -> Iterator[tuple[str, dict[str, Any], bool, tuple[int, ...], slice]]:
    """(label, block_launches' arguments, whether every load must be wide, architectures, which launches).

    Without a bias every load is of activations or weights, so that each can be asked to be 16 bytes wide.
    """
    everywhere, every = CAPABILITIES, slice(None)
    for block, batch in itertools.product(GOOGLENET_BLOCKS, (1, 32, 128)):
        side = spatial_size(block)
        at = {"config": GOOGLENET_BLOCKS[block], "batch": batch, "image": (side, side), "bias": False, "packed": True}
        for save in (False, True):
            yield f"{block}x{batch}", at | {"save": save}, True, everywhere, every
        yield f"{block}x{batch} 3x3", at | {"save": True, "branch3": 3}, True, everywhere, slice(-1, None)
    yield "odd", {"config": ODD_BLOCK, "batch": 2, "image": (7, 5), "save": True}, False, everywhere, every
    block = {"config": GOOGLENET_BLOCKS["4b"], "batch": 128, "image": (14, 14), "save": True}
    # With a bias on sm_90: launch_path().
    yield "4b bias", block, False, (80, 100), every
    yield "4b NCHW dy", block | {"packed": True, "dy_rows": False}, False, everywhere, slice(5, 6)
    odd = {"config": ODD_BLOCK, "batch": 2, "image": (7, 5), "save": True, "dy_rows": False}
    yield "odd NCHW dy", odd, False, everywhere, slice(6, 7)
    yield "4b no act", block | {"activation": None}, False, (90,), every


def jobs(dtypes: list[str], capabilities: list[int]) -> list[Job]:
    """One job a binary."""
    found: dict[tuple[Any, ...], Job] = {}
    for (label, kwargs, wide, supported, which), dtype in itertools.product(cases(), dtypes):
        launches = block_launches(**kwargs, dtype=DTYPES[dtype])
        for index in range(len(launches))[which]:
            launch = launches[index]
            for capability in set(supported) & set(capabilities):
                key = (*binary_key(launch), capability)
                name = f"{launch.kernel.fn.__name__} {label} {dtype}"
                found.setdefault(key, Job(name, key, (dtype, kwargs, index), capability, wide))
    return list(found.values())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dtypes", default="fp32,fp16,bf16")
    parser.add_argument("--capabilities", default=",".join(map(str, CAPABILITIES)))
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="write every figure here, with the verdicts on planted faults")
    args = parser.parse_args()
    todo = jobs(args.dtypes.split(","), [int(c) for c in args.capabilities.split(",")])
    with ProcessPoolExecutor(args.workers) as pool:
        # fp16 is left out: its launches are bf16's but for the type.
        launched = list(pool.map(launch_path, ("fp32", "bf16"))) if args.json else []
        results = list(pool.map(run_job, todo))
    for result in results:
        figures = " ".join(f"{name} {result.get(name, '-')}" for name in FIGURES)
        tile = "x".join(str(result["tile"][name]) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K"))
        print(f"{result['name']} sm_{result['capability']} {tile}: {figures}", *result["faults"], sep="  ")
    if args.json:
        counts = {
            name: len(set(map(binary_key, map(itemgetter(1), googlenet_launches(DTYPES[name]))))) for name in DTYPES
        }
        found = {"binaries": results, "launched": launched, "counts": counts, "planted": planted()}
        args.json.write_text(json.dumps(found, indent=1))
    bad = [result for result in results if result["faults"]]
    print(f"{len(results)} binaries, {len(bad)} refused")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
