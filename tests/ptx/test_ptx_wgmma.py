"""wgmma in the emulator: operands in shared memory in every layout, and in registers, against the PTX ISA's tables."""

from __future__ import annotations

import itertools
from typing import NamedTuple

import numpy as np
import pytest

from emulator import PtxError, Schedule, execute
from isa_tables import WGMMA_A16, WGMMA_A_TF32, descriptor, operand_byte, wgmma_d
from matrix_data import LANE, from_global, gathered, numbers, pattern, registers, to_global, vector
from tiny_ptx import module, patterns, tensor

B_AT = 16384
"""Where B begins in shared memory; A begins at zero."""

SHARED = 32768


class Operand(NamedTuple):
    """A matrix of (mn, k) in shared memory. skip: how far into it, along K, the product begins."""

    major: str
    swizzle: int
    lbo: int
    sbo: int
    skip: int = 0

    @property
    def transposed(self) -> int:
        return int(self.major == "MN")


K_MAJOR = [Operand("K", 0, 128, 256), Operand("K", 0, 4096, 128), Operand("K", 32, 16, 256), Operand("K", 64, 0, 512),
           Operand("K", 64, 16, 1024, skip=1), Operand("K", 128, 0, 1024), Operand("K", 128, 16, 1024, skip=3),
           Operand("K", 128, 48, 2048)]  # fmt: skip
"""LBO counts without swizzling only. skip: the start address moves by 32 bytes inside the swizzle."""

MN_MAJOR = [Operand("MN", 0, 128, 256), Operand("MN", 0, 2048, 128), Operand("MN", 32, 512, 256),
            Operand("MN", 32, 256, 2048), Operand("MN", 64, 1024, 512), Operand("MN", 128, 2048, 1024),
            Operand("MN", 128, 2048, 1024, skip=1)]  # fmt: skip


def stored(matrix: np.ndarray, operand: Operand, kind: str, at: int, image: np.ndarray) -> int:
    """Writes a matrix (mn, k) into an image of shared memory; returns where the product's part of it starts."""
    size, step = (4, 8) if kind == "tf32" else (2, 16)
    k0 = operand.skip * step
    for mn, k in np.ndindex(matrix.shape):
        byte = operand_byte(operand.major, operand.swizzle, size, at, operand.lbo, operand.sbo, mn, k0 + k)
        value = pattern(matrix[mn, k], kind)
        image[byte : byte + size] = np.frombuffer(value.to_bytes(size, "little"), np.uint8)
    # The start address is where (0, k0) would lie without swizzling.
    return at + (32 * operand.skip if operand.major == "K" else operand.skip * 2 * operand.sbo)


def described(register: int, start: int, operand: Operand) -> list[str]:
    """%rd[register] describes an operand, made as Triton makes it."""
    constant = descriptor(operand.swizzle, operand.lbo, operand.sbo)
    return [f"add.s32 \t%r311, %r310, {start};", "bfe.u32 \t%r312, %r311, 4, 14;",
            f"cvt.u64.u32 \t%rd{register}, %r312;",
            f"or.b64 \t%rd{register}, %rd{register}, {constant};"]  # fmt: skip


def loaded(image: np.ndarray, parameter: int) -> list[str]:
    """Copies the image into shared memory, for the tensor cores to read."""
    lines = [f"ld.param.b64 \t%rd200, [tiny_param_{parameter}];", "mul.wide.u32 \t%rd201, %r300, 16;",
             "add.s64 \t%rd202, %rd200, %rd201;", "mov.b32 \t%r310, global_smem;", "shl.b32 \t%r313, %r300, 4;",
             "add.s32 \t%r314, %r310, %r313;"]  # fmt: skip
    for offset in range(0, len(image), 2048):
        if image[offset : offset + 2048].any():
            lines += [f"ld.global.v4.b32 \t{vector(320, 4)}, [%rd202+{offset}];"]
            lines += [f"st.shared.v4.b32 \t[%r314+{offset}], {vector(320, 4)};"]
    return [*lines, "fence.proxy.async.shared::cta;", "bar.sync \t0;"]


def product(instruction: str) -> list[str]:
    return ["wgmma.fence.sync.aligned;", "// begin inline asm", instruction, "// end inline asm",
            "wgmma.commit_group.sync.aligned;", "// begin inline asm", "wgmma.wait_group.sync.aligned 0;",
            "// end inline asm"]  # fmt: skip


def multiplied(kind, a, b, c, a_operand, b_operand, *, scales=(1, 1), scale_d=True, run=None) -> np.ndarray:
    """D of one wgmma with A (64, k) and B (n, k) and the accumulator C (64, n). a_operand: None for A in registers."""
    n = b.shape[0]
    image = np.zeros(SHARED, np.uint8)
    shape, tf32 = f"m64n{n}k{8 if kind == 'tf32' else 16}", kind == "tf32"
    d_at = wgmma_d(n)
    held = [registers(c[16 * w : 16 * w + 16], d_at, "f32") for w in range(4)]
    held_a = [registers(a[16 * w : 16 * w + 16], WGMMA_A_TF32 if tf32 else WGMMA_A16, kind) for w in range(4)]
    starts = [stored(a, a_operand, kind, 0, image) if a_operand else 0, stored(b, b_operand, kind, B_AT, image)]
    arguments = [tensor(image.tolist(), 8), tensor(held, 32), tensor(held_a, 32)]
    lines = LANE + loaded(image, 0) + from_global(1, 10, n // 2) + from_global(2, 200, len(held_a[0][0]))
    lines += described(1, starts[0], a_operand) if a_operand else []
    lines += [*described(2, starts[1], b_operand), f"mov.pred \t%p1, {-int(scale_d)};"]
    transposed = [operand.transposed for operand in (a_operand, b_operand) if operand]
    flags = ", ".join(map(str, [*scales, *([] if tf32 else transposed)]))
    left = "%rd1" if a_operand else vector(200, len(held_a[0][0]))
    lines += product(
        f"wgmma.mma_async.sync.aligned.{shape}.f32.{kind}.{kind} {vector(10, n // 2)}, {left}, %rd2, %p1, {flags};"
    )
    ptx = module("\n".join(lines + to_global(1, 10, n // 2)), parameters=["u64"] * 3)
    report = execute(ptx, (1,), arguments, shared=SHARED, **(run or {}))
    assert not report.races
    found = patterns(arguments[1]).reshape(4, 32, -1).tolist()
    return np.concatenate([gathered(found[w], d_at) for w in range(4)])


def case(kind: str, n: int = 16) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    k = 8 if kind == "tf32" else 16
    return numbers((64, k), 1), numbers((n, k), 2), numbers((64, n), 3)


LAYOUTS = [("bf16", a, MN_MAJOR[0]) for a in K_MAJOR + MN_MAJOR] + [("f16", K_MAJOR[0], b) for b in K_MAJOR + MN_MAJOR]
LAYOUTS += [("tf32", a, b) for a, b in zip(K_MAJOR, K_MAJOR[1:] + K_MAJOR[:1], strict=True)]


def named(value: object) -> str:
    return "-".join(map(str, value)) if isinstance(value, Operand) else str(value)


@pytest.mark.parametrize(("kind", "a_operand", "b_operand"), LAYOUTS, ids=named)
def test_layouts(kind, a_operand, b_operand):
    a, b, c = case(kind)
    assert np.array_equal(multiplied(kind, a, b, c, a_operand, b_operand), a @ b.T + c)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
@pytest.mark.parametrize("n", [8, 32, 64, 128, 256])
def test_widths(kind, n):
    a, b, c = case(kind, n)
    operand = Operand("K", 128, 0, 1024) if n <= 128 else Operand("K", 32, 0, 256)
    assert np.array_equal(multiplied(kind, a, b, c, operand, operand), a @ b.T + c)


@pytest.mark.parametrize("kind", ["bf16", "f16", "tf32"])
def test_a_in_registers(kind):
    a, b, c = case(kind)
    assert np.array_equal(multiplied(kind, a, b, c, None, K_MAJOR[5]), a @ b.T + c)


@pytest.mark.parametrize(("scales", "scale_d"), [((-1, 1), True), ((1, -1), True), ((-1, -1), True), ((1, 1), False)])
def test_scales(scales, scale_d):
    """imm-scale-a and imm-scale-b negate an operand; without scale-d nothing of D is added, not even a NaN."""
    a, b, c = case("bf16")
    c = c if scale_d else np.full_like(c, np.nan)
    wanted = scales[0] * scales[1] * a @ b.T + (c if scale_d else 0)
    assert np.array_equal(multiplied("bf16", a, b, c, K_MAJOR[5], K_MAJOR[5], scales=scales, scale_d=scale_d), wanted)


SCHEDULES = [*itertools.product(["ascending", "descending", "random"], ["late", "early", "random"])]


@pytest.mark.parametrize(("order", "timing"), SCHEDULES)
def test_schedules_do_not_matter(order, timing):
    a, b, c = case("bf16")
    run = {"schedule": Schedule(order=order, timing=timing, seed=1)}
    assert np.array_equal(multiplied("bf16", a, b, c, K_MAJOR[5], MN_MAJOR[4], run=run), a @ b.T + c)


@pytest.mark.parametrize("seed", range(8))
def test_products_of_one_accumulator_keep_their_order(seed):
    """The first replaces what was there and the others add, whichever of them takes effect early."""
    n, operand = 16, K_MAJOR[5]
    matrices = [(numbers((64, 16), i), numbers((n, 16), 10 + i)) for i in range(3)]
    image, lines = np.zeros(SHARED, np.uint8), []
    for i, (a, b) in enumerate(matrices):
        starts = stored(a, operand, "bf16", 8192 * i, image), stored(b, operand, "bf16", 24576 + 2048 * i, image)
        lines += described(1 + 2 * i, starts[0], operand) + described(2 + 2 * i, starts[1], operand)
    lines = LANE + loaded(image, 0) + from_global(1, 10, n // 2) + lines
    lines += ["mov.pred \t%p1, 0;", "mov.pred \t%p2, -1;", "wgmma.fence.sync.aligned;"]
    for i in range(3):
        flags = f"%p{1 if i == 0 else 2}, 1, 1, 0, 0"
        lines += [f"wgmma.mma_async.sync.aligned.m64n{n}k16.f32.bf16.bf16 {vector(10, n // 2)}, %rd{1 + 2 * i}, "
                  f"%rd{2 + 2 * i}, {flags};", "wgmma.commit_group.sync.aligned;"]  # fmt: skip
    lines += ["wgmma.wait_group.sync.aligned 0;", *to_global(1, 10, n // 2)]
    arguments = [tensor(image.tolist(), 8), tensor([0x7FFFFFFF] * 128 * (n // 2), 32)]
    ptx = module("\n".join(lines), parameters=["u64"] * 2)
    execute(ptx, (1,), arguments, shared=SHARED, schedule=Schedule("random", "random", seed))
    found = patterns(arguments[1]).reshape(4, 32, -1).tolist()
    wanted = sum(a @ b.T for a, b in matrices)
    assert np.array_equal(np.concatenate([gathered(found[w], wgmma_d(n)) for w in range(4)]), wanted)


def test_a_base_offset_is_not_ignored():
    """Triton never sets one: to refuse it is enough."""
    lines = LANE + loaded(np.ones(4096, np.uint8), 0) + ["mov.pred \t%p1, 0;"]
    lines += [f"mov.b32 \t%r{10 + i}, 0;" for i in range(4)]
    lines += [f"mov.b64 \t%rd1, {descriptor(128, 0, 512, 1024, base_offset=3)};", "mov.b64 \t%rd2, %rd1;"]
    lines += product(
        f"wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {vector(10, 4)}, %rd1, %rd2, %p1, 1, 1, 0, 0;"
    )
    with pytest.raises(PtxError):
        execute(module("\n".join(lines), parameters=["u64"]), (1,), [tensor([1] * 4096, 8)], shared=SHARED)
