"""Compiles one launch ahead of time, without a GPU, and asks NVIDIA's tools beside Triton what came out."""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler
from triton.compiler import ASTSource

from inception_fused.runtime.launch import OPTIONS, Launch, kind_of
from inception_fused.runtime.triton_versions import ptxas_tool

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def some_of(known: Iterable[Any]) -> Callable[[str], list[Any]]:
    """A type for argparse: some of what is known, separated by commas."""
    by_name = {str(value): value for value in known}

    def parse(text: str) -> list[Any]:
        if unknown := [word for word in text.split(",") if word not in by_name]:
            raise argparse.ArgumentTypeError(f"got {', '.join(unknown)}, wants some of {','.join(by_name)}")
        return [by_name[word] for word in text.split(",")]

    return parse


TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


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
    usage = _tool("cuobjdump", "-res-usage", binary=binary)
    registers, stack = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": binary.metadata.shared}


def disassembled(binary: Any) -> str:
    """The machine code as nvdisasm prints it, each instruction with its two words in hexadecimal."""
    return _tool("nvdisasm", "-c", "-hex", binary=binary)


def serialized(binary: Any, capability: int) -> bool:
    """Whether ptxas lets no wgmma run beside another (its note C7515), which costs each the time until it is done."""
    ptx = binary.asm["ptx"]
    if "wgmma.mma_async" not in ptx:
        return False
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        options = ("-v", f"--gpu-name=sm_{capability}a", str(source), "-o", f"{folder}/kernel.cubin")
        tool = ptxas_tool(capability, compiler).path
        done = subprocess.run([tool, *options], capture_output=True, text=True, check=True)
    return "serialized" in done.stderr


def _tool(name: str, *options: str, binary: Any) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        done = subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True)
    return done.stdout
