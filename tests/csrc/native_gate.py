"""Judge the machine code of the compiled kernels: no spills, matrix instructions, 16-byte accesses.

    python tests/csrc/native_gate.py [--architectures 80,90]

Compiles each kernel and element type for each architecture with warnings as errors, prints a table of registers, stack
and shared memory, and exits with 1 if a kernel is refused. Needs nvcc and cuobjdump (of a toolkit, or of the Triton
package), no GPU.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "csrc"))

import toolchain

CSRC = Path(toolchain.__file__).parent
STRICT = (
    "-Werror",
    "all-warnings",
    "-Xptxas=-warn-spills,-warn-lmem-usage,-Werror",
    "-Xcompiler=-Wall,-Wextra,-Werror",
)
MATRIX = {"bf16": "HMMA.16816.F32.BF16", "fp16": "HMMA.16816.F32", "tf32": "HMMA.1688.F32.TF32"}
KERNELS = ("grouped_gemm", "grouped_dgrad")
TAPS, TAPS_LOAD = 9, {"bf16": "LDG.E", "fp16": "LDG.E", "tf32": "LDG.E.U16"}
"""Windows that a pixel lies in; the load of one's taps of 16 bytes of channels."""

SERIALISED = re.compile(r"C75\d\d")
"""ptxas's advice that it has serialised asynchronous matrix instructions (C7510, C7515)."""


class Kernel(NamedTuple):
    """What the machine code of one kernel takes and holds. opcodes: opcode with modifiers -> count."""

    name: str
    element: str
    tile: str
    architecture: str
    registers: int
    stack: int
    opcodes: Counter

    def count(self, prefix: str) -> int:
        return sum(n for opcode, n in self.opcodes.items() if opcode.startswith(prefix))

    def refusals(self) -> list[str]:
        """Why this kernel must not be shipped."""
        found = []
        if self.stack:
            found.append(f"{self.stack} bytes of stack")
        if self.count("LDL") or self.count("STL"):
            found.append("loads or stores of local memory")
        if not self.opcodes[MATRIX[self.element]]:
            found.append(f"no {MATRIX[self.element]}")
        if not self.count("LDSM.16.M88.4"):
            found.append("no LDSM of four matrices")
        if "unaligned" not in self.tile:
            copies = [opcode for opcode in self.opcodes if opcode.startswith("LDGSTS")]
            if not copies or not all(".128" in opcode for opcode in copies):
                found.append("copies that are not 16 bytes wide (LDGSTS.128)")
            if not self.count("STG.E.128"):
                found.append("no stores of 16 bytes (STG.128)")
            if self.count("STG.E.U16") or self.count("STG.E.64"):
                found.append("stores of single elements")
            if self.name == "grouped_dgrad":
                loads = {opcode for opcode in self.opcodes if opcode.startswith("LDG.")}
                if self.count("LDG.E.128") < TAPS or loads - {"LDG.E.128", TAPS_LOAD[self.element]}:
                    found.append("the pool's gather is not nine loads of 16 bytes (LDG.128) and one of taps for each")
        return found


def cuobjdump(nvcc_root: Path) -> str:
    """The disassembler: PATH, the toolkit, or the Triton package. Raises FileNotFoundError where there is none."""
    triton = find_spec("triton")
    places = [shutil.which("cuobjdump"), nvcc_root / "bin" / "cuobjdump"]
    if triton is not None and triton.origin is not None:
        places.append(Path(triton.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump")
    for place in places:
        if place is not None and Path(place).exists():
            return str(place)
    raise FileNotFoundError("no cuobjdump: install a CUDA toolkit, or pip install triton")


def run(command: Sequence[str], environment: dict[str, str] | None = None) -> str:
    """Standard output and error. Raises RuntimeError with them where the command fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))}\n{done.stdout}")
    return done.stdout


def judge(
    nvcc: toolchain.Nvcc, host: toolchain.HostCompiler, kernel: str, element: str, architecture: str, csrc: Path = CSRC
) -> list[Kernel]:
    """Compile one kernel's element type for one architecture and read its tiles. Raises RuntimeError on any warning."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernel.cubin")
        target = f"-gencode=arch=compute_{architecture},code=sm_{architecture}"
        define = f"-DINCEPTION_FUSED_ELEMENT={element}"
        source = csrc / f"{kernel}.cu"
        command = [nvcc.path, "-ccbin", host.path, "-std=c++17", "-O3", *STRICT, target, define, "-cubin"]
        output = run([*command, str(source), "-o", str(cubin)])
        if SERIALISED.search(output):
            raise RuntimeError(f"matrix instructions are serialised:\n{output}")
        tool = cuobjdump(nvcc.root)
        environment = os.environ | {"PATH": f"{Path(tool).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
        usage = run([tool, "-res-usage", str(cubin)], environment)
        code = run([tool, "-sass", str(cubin)], environment)
    opcodes = {}
    for part in code.split("Function : ")[1:]:
        name, text = part.split("\n", 1)
        opcodes[name.strip()] = Counter(re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?\w+\s+)?([A-Z][\w.]*)", text, re.M))
    kernels = []
    for name, registers, stack in re.findall(r"Function (\S+?):\s+REG:(\d+) STACK:(\d+)", usage):
        block_m, block_n, aligned = re.search(r"Li(\d+)ELi(\d+)ELb([01])E", name).groups()
        tile = f"{block_m}x{block_n}" + ("" if aligned == "1" else " unaligned")
        kernels.append(Kernel(kernel, element, tile, architecture, int(registers), int(stack), opcodes[name]))
    if not kernels:
        raise RuntimeError(f"no kernel found in {kernel} for {element} on sm_{architecture}:\n{usage}")
    return kernels


def judge_all(architectures: Sequence[str] | None = None) -> list[Kernel]:
    """Every kernel of the extension. Raises toolchain.CannotBuild where there is no compiler."""
    host = toolchain.find_host_compiler()
    nvcc = toolchain.find_nvcc(host)
    every = [(k, element, a) for k in KERNELS for element in MATRIX for a in architectures or nvcc.architectures]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        found = pool.map(lambda one: judge(nvcc, host, *one), every)
        return [kernel for kernels in found for kernel in kernels]


def shared_bytes() -> dict[tuple[str, str, str], int]:
    """(kernel, element, tile) -> dynamic shared memory of a block, as the installed extension says; {} without one."""
    from inception_fused.runtime import native

    try:
        module = native.extension()
    except ImportError:
        return {}
    return {
        (kernel, element, f"{m}x{n}" + ("" if aligned else " unaligned")): shared
        for kernel in KERNELS
        for element in MATRIX
        for m, n, aligned, _, shared in getattr(module, f"{kernel}_tiles")(element)
    }


def table(kernels: Sequence[Kernel], shared: dict[tuple[str, str, str], int]) -> str:
    counted = ("HMMA", "LDSM", "LDGSTS", "LDG.E.128", "STG.E.128")
    rows = [("kernel", "element", "tile", "sm", "registers", "stack", "shared bytes", *counted, "verdict")]
    for k in kernels:
        figures = (k.registers, k.stack, shared.get((k.name, k.element, k.tile), "-"), *map(k.count, counted))
        rows.append((k.name, k.element, k.tile, k.architecture, *map(str, figures), "; ".join(k.refusals()) or "ok"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", help="comma-separated; default: all that the build compiles for")
    options = parser.parse_args()
    kernels = judge_all(options.architectures.split(",") if options.architectures else None)
    print(table(kernels, shared_bytes()))
    return int(any(kernel.refusals() for kernel in kernels))


if __name__ == "__main__":
    sys.exit(main())
