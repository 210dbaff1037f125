"""The package's file of counts: whole, of these kernels, and what is asked of it where it has no answer."""

from __future__ import annotations

import itertools
import json
import re

import pytest
import torch

from count_fakes import NOTHING, binary, counts_of
from counter.counting import CAPABILITIES
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, GOOGLENET_LAUNCHED, block_shape, spatial_size
from inception_fused.block.views import Tile
from inception_fused.plan import choice, counts
from inception_fused.plan.counts import FILE, Key, as_text, parse
from inception_fused.plan.launches import FPROP
from inception_fused.plan.sources import PACKAGE

TILE = Tile(64, 64, 32, num_stages=3)
STALE = "the kernels have changed since plan/counts.json was counted: run python python/count.py"


def test_the_file_is_of_these_kernels():
    assert not counts.shipped().stale, STALE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_every_launch_of_googlenet_is_counted(dtype):
    """With the plan's tiles of today, on each architecture, inference and training."""
    known = counts.shipped()
    missing = set()
    for (block, config), batch in itertools.product(GOOGLENET_LAUNCHED.items(), (1, 32, 128)):
        shape = block_shape(config, batch, spatial_size(block), dtype)
        for chip, saves in itertools.product(CAPABILITIES, (False, True)):
            plan = dict(capability=divmod(chip, 10))
            normed = choice.tiled(shape, dtype, **plan, normed=True) if block in GOOGLENET_BLOCKS else []
            normed = [launch for launch in normed if launch.row.role != FPROP]
            for launch in (*choice.tiled(shape, dtype, **plan), *normed):
                key = counts.key_of(launch, choice.tile_of(launch), saves)
                if (key, chip) not in known.binaries:
                    missing.add((str(key), chip))
    # What combines the sums of BatchNorm has a tile of its own.
    assert None not in map(known.tile_of, ("norm_combine_kernel", "norm_grad_combine_kernel")), STALE
    assert not missing, f"{STALE}: {sorted(missing)[:3]}"


def test_every_product_has_a_main_loop_of_its_tile():
    for (key, capability), found in counts.shipped().binaries.items():
        if found.main is None:
            assert key.kernel.startswith(("pack", "mask", "reduce", "norm", "max_pool")), key
            continue
        product = key.tile.BLOCK_M * key.tile.BLOCK_N * key.tile.BLOCK_K / counts.MACS_UNIT
        assert found.main.of("macs") * key.tile.num_warps >= product, (key, capability)
        assert 0 < found.main.of("alu") < found.main.of("issue")
        assert found.main.cycles >= found.main.of("issue")
        assert 0 < found.registers <= 255


def test_text_and_back():
    known = counts.shipped()
    assert parse(as_text(known)) == known
    assert as_text(known) == FILE.read_text(), "written by hand"
    assert len(FILE.read_bytes()) < 100_000


def test_another_schema_is_refused(monkeypatch):
    data = json.loads(as_text(NOTHING)) | {"schema": 99}
    with pytest.raises(ValueError, match="count.py"):
        parse(json.dumps(data))


def test_a_damaged_file_is_none(monkeypatch, tmp_path):
    monkeypatch.setattr(counts, "FILE", tmp_path / "counts.json")
    counts.shipped.cache_clear()
    try:
        assert counts.shipped() is None
        (tmp_path / "counts.json").write_text("{}")
        assert counts.shipped() is None
    finally:
        monkeypatch.undo()
        counts.shipped.cache_clear()
    assert counts.shipped() is not None


def test_its_own_count_comes_first():
    made = binary(TILE, step=10)
    known = counts_of("a_kernel", TILE, 3, made)
    assert known.find(Key("a_kernel", "bf16", TILE, 3, False), 90) == (made, "")
    assert known.find(Key("a_kernel", "fp32", TILE, 3, False), 90) is None
    assert known.find(Key("b_kernel", "bf16", TILE, 3, False), 90) is None
    assert NOTHING.find(Key("a_kernel", "bf16", TILE, 3, False), 90) is None


def test_the_nearest_tile_is_scaled_to_the_one_asked():
    known = counts_of("a_kernel", TILE, 3, binary(TILE, step=100, alu=40, straight=30, cycles=50))
    asked = TILE._replace(BLOCK_M=128, num_warps=8)
    found = known.find(Key("a_kernel", "bf16", asked, 5, True), 90)
    assert "64x64x32" in found.stands_for
    # One and a half times the operands and twice the result, by twice the warps.
    assert found.binary.main.of("issue") == pytest.approx(75)
    assert found.binary.main.of("alu") == pytest.approx(30)
    assert found.binary.main.of("macs") * 8 == pytest.approx(128 * 64 * 32 / counts.MACS_UNIT)
    assert found.binary.parts[0].of("issue") == pytest.approx(30)
    assert found.binary.shared == pytest.approx(16384 * 1.5)


def test_the_nearest_saves_as_the_asked_one_does():
    wide, far = TILE._replace(BLOCK_N=128), TILE._replace(BLOCK_M=256, BLOCK_N=256)
    made = {
        (Key("a_kernel", "bf16", tile, 3, saves), 90): binary(tile, step=step)
        for tile, saves, step in ((wide, True, 1), (far, False, 2))
    }
    found = NOTHING._replace(binaries=made).find(Key("a_kernel", "bf16", TILE, 3, False), 90)
    assert "256x256" in found.stands_for


@pytest.mark.parametrize(("asked", "taken"), [(80, 80), (86, 89), (87, 80), (89, 89), (90, 90), (100, 90), (120, 89)])
def test_the_nearest_architecture(asked, taken):
    key = Key("a_kernel", "bf16", TILE, 3, False)
    made = {(key, chip): binary(TILE, step=chip)._replace(capability=chip) for chip in (80, 89, 90)}
    found = NOTHING._replace(binaries=made).find(key, asked)
    assert found.binary.capability == taken
    assert found.stands_for == ("" if asked == taken else f"sm_{taken}'s")


def test_grids_in_proportion_to_the_nearest():
    known = NOTHING._replace(grids={"reduce_kernel": [(1000, 70), (9000, 90)]})
    assert [known.programs("reduce_kernel", weights) for weights in (1000, 500, 9000, 18000)] == [70, 35, 90, 180]
    assert known.programs("another", 1000) is None


def test_it_is_packaged():
    name = FILE.relative_to(PACKAGE).as_posix()
    assert re.search(rf'^inception_fused = \[.*"{name}"', (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE)
