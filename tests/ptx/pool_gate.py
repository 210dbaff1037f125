"""Executes the max-pools of K2, B4, P1 and P2 from their PTX, assembly included, and compares them with PyTorch's.

    python tests/ptx/pool_gate.py [--dtypes bf16,fp16,fp32] [--capabilities 80,90] [--json OUT]

Every tile of the plan, with taps and without, on values that order, tie and are not finite. Weights
are ones on a diagonal, so that what is compared is the pool, exactly.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python"))

import torch
import triton
import triton.language as tl
from torch import Tensor

from counter.compiling import DTYPES, some_of
from emulated import Emulation, emulating
from inception_fused.block.pools import PoolShape
from inception_fused.block.views import ChannelSlice, Epilogue, Tile, taps_width, unit_of
from inception_fused.kernels.common import largest_where
from inception_fused.kernels.conv_wgrad import conv_wgrad
from inception_fused.kernels.max_pool import max_pool
from inception_fused.kernels.max_pool_grad import max_pool_grad
from inception_fused.kernels.pool_proj import pool_proj
from inception_fused.plan import choice
from inception_fused.runtime import aten, aten_pools
from inception_fused.runtime.launch import launch

IMAGES, HEIGHT, WIDTH, CHANNELS = 2, 9, 8, 72
"""144 pixels: more than a tile of 128. Two chunks of channels in 16-bit types, four in fp32, and the rest of one."""

ODD = 33
"""Of them, for what is not in units of 16 bytes."""

FORMS = ((1, False), (0, True))
"""(padding, ceil_mode) of the pools of stride 2."""

PIXELS = IMAGES * HEIGHT * WIDTH
NAN, INF = float("nan"), float("inf")
PALETTES = {
    "normal": None,
    "ties": [0.0, 1.0, -1.0],
    "signed zeros": [0.0, -0.0],
    "infinite": [-INF, INF, 0.0],
    "largest and smallest": [2.0**127, 1.875 * 2.0**127, -(2.0**127), 2.0**15, 2.0**-24, -(2.0**-24), 0.0],
    "nan": [NAN, 0.0, 1.0, -INF],
    "nan at the edges": [0.0, 1.0, 2.0],
}


def values(name: str, dtype: torch.dtype) -> Tensor:
    """[PIXELS, CHANNELS], in whole numbers of TF32."""
    palette = PALETTES[name]
    if palette is None:
        return torch.randn(PIXELS, CHANNELS).bfloat16().to(dtype)
    x = torch.tensor(palette).to(dtype)[torch.randint(len(palette), (PIXELS, CHANNELS))]
    if name == "nan at the edges":
        images = x.view(IMAGES, HEIGHT, WIDTH, CHANNELS)
        for c, (row, column) in enumerate(itertools.product((0, 3, HEIGHT - 1), (0, 3, WIDTH - 1))):
            images[:, row, column, c::9] = NAN
    return x


def differing(name: str, ours: Tensor, twin: Tensor) -> Iterator[str]:
    wrong = (ours != twin) & ~(ours.isnan() & twin.isnan()) if ours.is_floating_point() else ours != twin
    if wrong.any():
        first = tuple(wrong.nonzero()[0].tolist())
        yield f"{name}: {int(wrong.sum())} of {wrong.numel()}, first {first}: {ours[first]}, wants {twin[first]}"


def projected(x: Tensor, save: bool, tile: Tile) -> Iterator[str]:
    """K2 beside its twin."""
    w = torch.eye(CHANNELS, dtype=x.dtype)[..., None, None].contiguous()
    found = []
    for twin in (False, True):
        y, taps = torch.zeros_like(x), torch.full((PIXELS, CHANNELS // 2), 255, dtype=torch.uint8) if save else None
        given = dict(gemm_m=PIXELS, image=(HEIGHT, WIDTH), epilogue=Epilogue(relu=False))
        slices = (ChannelSlice(x, CHANNELS, 0, CHANNELS), w, ChannelSlice(y, CHANNELS, 0, CHANNELS), None, taps)
        if twin:
            aten.pool_proj(*slices, **given)
        else:
            pool_proj(*slices, **given, tile=tile, unit=16 // x.itemsize)
        found.append((y, taps))
    (y, taps), (y_twin, taps_twin) = found
    yield from differing("y", y, y_twin)
    if save:
        yield from differing("taps", taps, taps_twin)


def summed(x: Tensor, tile: Tile) -> Iterator[str]:
    """B4's pool in two ranges beside PyTorch's: where the gradient is one for one pixel, a filter has its maximum.

    A channel with a maximum that is not finite is NaN in every filter.
    """
    images = x.view(IMAGES, HEIGHT, WIDTH, CHANNELS).permute(0, 3, 1, 2)
    pooled = torch.nn.functional.max_pool2d(images.float(), 3, stride=1, padding=1).permute(0, 2, 3, 1)
    pooled = pooled.reshape(PIXELS, CHANNELS)
    g = torch.eye(PIXELS, dtype=x.dtype)
    part = torch.full((2, PIXELS, 1, 1, CHANNELS), 7.0)
    borders = torch.zeros(1, dtype=torch.int16)
    slices = (ChannelSlice(g, PIXELS, 0, PIXELS), ChannelSlice(x, CHANNELS, 0, CHANNELS))
    conv_wgrad(
        *slices, part, borders, gemm_m=PIXELS, image=(HEIGHT, WIDTH), pool=True, tile=tile, unit=16 // x.itemsize
    )
    yield from differing("sums", part.sum(0).view(PIXELS, CHANNELS), g.float().T @ pooled)


def strided(
    x: Tensor, pool: PoolShape, save: bool, tiles: tuple[Tile, Tile], *, epilogue: bool = False
) -> Iterator[str]:
    """P1 beside its twin; with save P2 on those taps beside its own, on whole numbers, whose sums are exact. epilogue:
    with bias and ReLU, and the sums for the bias."""
    channels = x.shape[1]
    dy, found = torch.randint(-7, 8, (pool.pooled_rows, channels)).to(x.dtype), []
    bias = (torch.randint(-2, 3, (channels,)) / 2).to(x.dtype) if epilogue else None
    for twin in (False, True):
        y, dx = torch.full_like(dy, NAN), torch.full_like(x, NAN)
        taps = torch.full((pool.pooled_rows, taps_width(channels)), 255, dtype=torch.uint8) if save else None
        tiles_of_cells = 1 if twin else triton.cdiv(pool.cells, tiles[1].BLOCK_M)
        sums = torch.full((tiles_of_cells, channels), NAN) if epilogue else None
        of_x, of_y, of_dy, of_dx = (ChannelSlice(t, channels, 0, channels) for t in (x, y, dy, dx))
        given = [dict(tile=tile, unit=unit_of(x.dtype, channels)) if not twin else {} for tile in tiles]
        (aten_pools.max_pool if twin else max_pool)(of_x, of_y, taps, bias, relu=epilogue, pool=pool, **given[0])
        if save:
            (aten_pools.max_pool_grad if twin else max_pool_grad)(of_dy, taps, of_dx, sums, pool=pool, **given[1])
        found.append((y, taps, dx, sums.sum(0) if epilogue else None))
    for name, ours, twins in zip(("y", "taps", "dx", "sums"), *found, strict=True):
        if ours is not None and (save or name == "y"):
            yield from differing(name, ours, twins)


@triton.jit
def columns_kernel(a_ptr, b_ptr, rows_ptr, out_ptr, BLOCK: tl.constexpr):
    """largest_where() of a tile whose columns are dense: a thread packs elements of two rows."""
    offs = tl.arange(0, BLOCK)
    places = offs[:, None] + BLOCK * offs[None, :]
    row = tl.load(rows_ptr + offs) != 0
    a, b = tl.load(a_ptr + places), tl.load(b_ptr + places)
    tl.store(out_ptr + places, largest_where(row, a, b, a))


def by_columns(dtype: torch.dtype) -> Iterator[str]:
    a, b, out = (torch.randn(32, 32).to(dtype) for _ in range(3))
    rows = torch.arange(32, dtype=torch.int16) % 3 % 2
    launch(columns_kernel, (1,), (a, b, rows, out), dict(BLOCK=32), Tile(32, 32, 32, num_warps=2))
    yield from differing("maxima", out.T, torch.where(rows.bool()[:, None], torch.maximum(a, b).T, a.T))


def faults(capability: int, dtype_name: str) -> Iterator[tuple[str, list[str]]]:
    """Each launch, and what was wrong with it."""
    dtype = DTYPES[dtype_name]
    torch.manual_seed(0)
    with emulating(Emulation(capability)):
        yield f"largest_where by columns {dtype_name} sm_{capability}", list(by_columns(dtype))
    for name, (kernel, save) in itertools.product(PALETTES, (("K2", True), ("K2", False), ("B4 pool", True))):
        rules = choice.RULES[kernel]
        for tile in rules.tiles(dtype, divmod(capability, 10)):
            if tile == rules.unaligned.tile(dtype):
                continue
            torch.manual_seed(0)
            x, emulation = values(name, dtype), Emulation(capability)
            with emulating(emulation):
                wrong = list(projected(x, save, tile) if kernel == "K2" else summed(x, tile))
            wrong += [f"race: {race}" for record in emulation.records for race in record.races]
            size = "x".join(map(str, tile[:3]))
            yield (
                f"{kernel}{' with taps' * (save and kernel == 'K2')} {size} {dtype_name} sm_{capability} {name}",
                wrong,
            )


def strided_faults(capability: int, dtype_name: str) -> Iterator[tuple[str, list[str]]]:
    """The same of P1 and P2: every binary, with padding and with ceil_mode."""
    dtype, both = DTYPES[dtype_name], (True, False)
    for name, channels, form, save, epilogue in itertools.product(PALETTES, (CHANNELS, ODD), FORMS, both, both):
        torch.manual_seed(0)
        x, emulation = values(name, dtype)[:, :channels].contiguous(), Emulation(capability)
        pool = PoolShape(IMAGES, HEIGHT, WIDTH, *form)
        unit = unit_of(dtype, channels)
        columns = dict(gemm_n=channels, unit=unit)
        tiles = tuple(choice.choose_tile(rules, dtype, gemm_m=pool.pooled_rows, **columns) for rules in choice.POOLS)
        with emulating(emulation):
            wrong = list(strided(x, pool, save, tiles, epilogue=epilogue))
        wrong += [f"race: {race}" for record in emulation.records for race in record.races]
        kernels = "P1 with taps, P2" if save else "P1"
        with_bias = " with bias and ReLU" if epilogue else ""
        yield f"{kernels}{with_bias} {form} {channels} {dtype_name} sm_{capability} {name}", wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write launches and faults here")
    parser.add_argument("--dtypes", type=some_of(DTYPES), default=",".join(DTYPES))
    parser.add_argument("--capabilities", type=some_of((80, 90)), default="80,90")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    launches, found = [], []
    for capability, dtype in itertools.product(chosen.capabilities, chosen.dtypes):
        for name, wrong in itertools.chain(faults(capability, dtype), strided_faults(capability, dtype)):
            launches.append(name)
            found += [f"{name}: {fault}" for fault in wrong]
            print(name, *wrong, sep="\n    ", flush=True)
    print(f"{len(launches)} launches, {len(found)} faults")
    if chosen.json:
        chosen.json.write_text(json.dumps({"launches": launches, "faults": found}))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
