"""Products and moves of matrices in the emulator, each alone in a tiny module, against the tables of the PTX ISA."""

from __future__ import annotations

import random

import numpy as np
import pytest

from emulator import execute
from isa_tables import (
    CANONICAL,
    LDMATRIX_ADDRESSES,
    M8N8,
    M8N8_TRANS,
    M16N8_C,
    M16N8K8_A,
    M16N8K8_B,
    M16N8K16_A,
    M16N8K16_B,
    descriptor,
    operand_byte,
    swizzled,
    wgmma_d,
)  # fmt: skip
from matrix_data import LANE, from_global, gathered, numbers, registers, to_global, vector
from tiny_ptx import module, patterns, tensor

FRAGMENTS = {
    "f16": (M16N8K16_A, M16N8K16_B, "m16n8k16"), "bf16": (M16N8K16_A, M16N8K16_B, "m16n8k16"),
    "tf32": (M16N8K8_A, M16N8K8_B, "m16n8k8"),
}  # fmt: skip


def test_the_tables_cover_each_element_once():
    for fragment in (M16N8K16_A, M16N8K16_B, M16N8_C, M16N8K8_A, M16N8K8_B, M8N8, M8N8_TRANS, wgmma_d(8), wgmma_d(64)):
        places = [fragment.place(lane, i) for lane in range(32) for i in range(len(fragment.elements))]
        assert sorted(places) == [(r, c) for r in range(fragment.rows) for c in range(fragment.columns)]
    for (major, swizzle), _ in CANONICAL.items():
        lbo, sbo = (4096, 1024) if major == "MN" and swizzle else (128, 2048)
        places = {operand_byte(major, swizzle, 2, 0, lbo, sbo, mn, k) for mn in range(64) for k in range(16)}
        assert len(places) == 64 * 16


def test_tables_by_hand():
    """Elements named in the manual's figures and examples."""
    assert M16N8K16_A.place(5, 6) == (9, 10)
    assert M16N8K16_B.place(5, 3) == (11, 1)
    assert M16N8K8_A.place(31, 3) == (15, 7)
    assert [swizzled(16 * 8 * row, 128) % 128 for row in range(9)] == [0, 16, 32, 48, 64, 80, 96, 112, 0]
    # 9.7.15.5.1.2.1.3, K-major without swizzling, tf32: LBO 64 and SBO 32 elements encode as 16 and 8.
    assert descriptor(0, 64 * 4, 32 * 4) == 16 << 16 | 8 << 32
    assert [operand_byte("K", 0, 4, 0, 256, 128, mn, k) // 4 for mn, k in ((1, 0), (8, 0), (0, 1), (0, 4))] == [
        4,
        32,
        1,
        64,
    ]
    # MN-major, 32-byte swizzling, bf16: LBO 128 and SBO 256 elements, ((8,2,2),(8,2)):((1,8,128),(16,256)).
    at = {(mn, k): operand_byte("MN", 32, 2, 0, 256, 512, mn, k) // 2 for mn in range(32) for k in range(16)}
    assert (at[16, 0], at[0, 1], at[8, 0], at[0, 8]) == (128, 16, 8, 256)
    assert at[0, 4] == 4 * 16 + 8, "the fifth row of 32 bytes has its halves exchanged"
    # What Triton writes for 128 bytes along K.
    assert descriptor(128, 0, 1024) == 4611686293305294848


@pytest.mark.parametrize("kind", FRAGMENTS)
def test_mma(kind):
    """Four warps, each with matrices of its own, straight from registers."""
    a_at, b_at, shape = FRAGMENTS[kind]
    matrices = [
        [numbers((f.rows, f.columns), 10 * w + i) for i, f in enumerate((a_at, b_at, M16N8_C))] for w in range(4)
    ]
    held = [[registers(m[i], f, k) for m in matrices]
            for i, (f, k) in enumerate(((a_at, kind), (b_at, kind), (M16N8_C, "f32")))]  # fmt: skip
    if kind == "tf32":
        # The low 13 bits of a tf32 operand are not looked at.
        held[:2] = [[[[value | 0x1FFF for value in row] for row in warp] for warp in part] for part in held[:2]]
    arguments = [tensor(part, 32) for part in held]
    n_a, n_b = (len(part[0][0]) for part in held[:2])
    lines = LANE + from_global(0, 10, n_a) + from_global(1, 20, n_b) + from_global(2, 30, 4)
    lines += [f"mma.sync.aligned.{shape}.row.col.f32.{kind}.{kind}.f32 {vector(40, 4)}, {vector(10, n_a)}, "
              f"{vector(20, n_b)}, {vector(30, 4)};"]  # fmt: skip
    execute(module("\n".join(lines + to_global(2, 40, 4)), parameters=["u64"] * 3, target="sm_80"), (1,), arguments)
    found = patterns(arguments[2]).reshape(4, 32, 4).tolist()
    for warp, (a, b, c) in enumerate(matrices):
        assert np.array_equal(gathered(found[warp], M16N8_C), a @ b + c), f"warp {warp}"


def test_mma_may_write_what_it_reads():
    a, b, c = numbers((16, 16), 1), numbers((16, 8), 2), numbers((16, 8), 3)
    arguments = [tensor([registers(m, f, k)] * 4, 32)
                 for m, f, k in ((a, M16N8K16_A, "bf16"), (b, M16N8K16_B, "bf16"), (c, M16N8_C, "f32"))]  # fmt: skip
    lines = LANE + from_global(0, 10, 4) + from_global(1, 20, 2) + from_global(2, 30, 4)
    c_registers = vector(30, 4)
    step = f"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {c_registers}, {vector(10, 4)}, {vector(20, 2)}, "
    step += f"{c_registers};"
    lines += [step] * 2
    execute(module("\n".join(lines + to_global(2, 30, 4)), parameters=["u64"] * 3), (1,), arguments)
    found = patterns(arguments[2]).reshape(4, 32, 4).tolist()
    assert np.array_equal(gathered(found[3], M16N8_C), 2 * a @ b + c)


def rows_in_any_order(warps: int, count: int, seed: int) -> list[list[int]]:
    """Places, in rows of 16 bytes, of each warp's 8 * count rows: none twice, in no order."""
    draw = random.Random(seed)
    places = draw.sample(range(warps * 32), warps * 8 * count)
    return [places[w * 8 * count : (w + 1) * 8 * count] for w in range(warps)]


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("op", ["ldmatrix", "stmatrix"])
def test_rows_of_matrices(op, trans, count):
    """8x8 matrices of 16 bits whose rows lie anywhere in shared memory; lanes that name no row have address 0."""
    fragment = M8N8_TRANS if trans else M8N8
    places = rows_in_any_order(4, count, count)
    addresses = [[0] * 32 for _ in range(4)]
    for warp, rows in enumerate(places):
        for matrix, lanes in enumerate(LDMATRIX_ADDRESSES[count]):
            for row, lane in enumerate(lanes):
                addresses[warp][lane] = 16 * rows[8 * matrix + row]
    draw = random.Random(3)
    memory = np.array([draw.getrandbits(16) for _ in range(4 * 32 * 8)]).reshape(-1, 8)
    held = np.array([draw.getrandbits(32) for _ in range(4 * 32 * count)]).reshape(4, 32, count)
    arguments = [tensor(addresses, 32), tensor(memory.tolist(), 16), tensor(held.tolist(), 32)]
    copied = ["ld.param.b64 \t%rd50, [tiny_param_1];", "mul.wide.u32 \t%rd51, %r300, 16;",
              "add.s64 \t%rd52, %rd50, %rd51;",
              "mov.b32 \t%r70, global_smem;", "shl.b32 \t%r71, %r300, 4;", "add.s32 \t%r72, %r70, %r71;"]  # fmt: skip
    lines = LANE + from_global(0, 10, 1) + from_global(2, 30, count) + copied
    lines += [f"ld.global.v4.b32 \t{vector(60, 4)}, [%rd52];", f"st.shared.v4.b32 \t[%r72], {vector(60, 4)};"]
    lines += ["bar.sync \t0;", "add.s32 \t%r73, %r70, %r10;"]
    if op == "ldmatrix":
        lines += [f"ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 \t{vector(30, count)}, [%r73];"]
        lines += to_global(2, 30, count)
    else:
        lines += [
            f"stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 \t[%r73], {vector(30, count)};",
            "bar.sync \t0;",
        ]
        lines += [f"ld.shared.v4.b32 \t{vector(60, 4)}, [%r72];", f"st.global.v4.b32 \t[%rd52], {vector(60, 4)};"]
    execute(module("\n".join(lines), parameters=["u64"] * 3), (1,), arguments, shared=2048)
    wanted, wanted_held = memory.copy(), held.copy()
    for warp, lane, matrix, element in np.ndindex(4, 32, count, 2):
        row, column = fragment.place(lane, element)
        row = places[warp][8 * matrix + row]
        half = int(held[warp, lane, matrix]) >> 16 * element & 0xFFFF
        wanted[row, column] = half
        kept = int(wanted_held[warp, lane, matrix]) & 0xFFFF << 16 * (1 - element)
        wanted_held[warp, lane, matrix] = kept | int(memory[row, column]) << 16 * element
    if op == "ldmatrix":
        assert patterns(arguments[2]).reshape(4, 32, count).tolist() == wanted_held.tolist()
    else:
        assert patterns(arguments[1]).reshape(-1, 8).tolist() == wanted.tolist()
