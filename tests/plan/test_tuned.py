"""Tables of tuned tiles: which is taken, which is ignored and why, which tile serves which problem."""

import json
import os
import re
import warnings

import pytest
import torch

from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.googlenet_blocks import GOOGLENET_LAUNCHED, block_shape, spatial_size
from inception_fused.block.views import Tile
from inception_fused.op import reasons
from inception_fused.plan import choice, tile_table, tuned
from inception_fused.plan.choice import tiled
from inception_fused.plan.explain_plan import explain
from inception_fused.plan.launches import NORMED_TABLES, ROWS, TABLES
from inception_fused.plan.rules import MAX_BINARIES, UNALIGNED
from inception_fused.tools import environment
from tune_fakes import GPU, entry, put, table

TILE = Tile(128, 64, 32, num_stages=4)
K3 = ("K3", torch.bfloat16)


def tile(gemm_m, gemm_n=128, gemm_k=96, kernel="K3", dtype=torch.bfloat16, unit=8):
    return choice.choose_tile(kernel, dtype, gemm_m=gemm_m, gemm_n=gemm_n, gemm_k=gemm_k, unit=unit, gpu=GPU)


def rule(gemm_m, gemm_n=128, kernel="K3", dtype=torch.bfloat16):
    return choice.choose_tile(kernel, dtype, gemm_m=gemm_m, gemm_n=gemm_n, unit=8)


def test_a_tile_serves_its_problem_and_batches_a_factor_of_two_away(tiles_folder):
    other = TILE._replace(BLOCK_M=64)
    put(entry("K3", "bf16", 1000, 128, 96, TILE), entry("K3", "bf16", 4000, 128, 96, other))
    assert [tile(m) for m in (500, 1000, 1999)] == [TILE] * 3
    assert [tile(m) for m in (2001, 4000, 8000)] == [other] * 3
    assert tile(499) == rule(499)
    assert tile(8001) == rule(8001)
    assert tile(2000) == TILE, "the smaller of two that are equally near"
    assert tile(1000, gemm_n=136) == rule(1000, 136)
    assert tile(1000, gemm_k=104) == rule(1000)
    assert tile(1000, dtype=torch.float16) == rule(1000)
    assert tile(1000, kernel="K4") == rule(1000, kernel="K4")
    assert tile(1000, unit=1) == UNALIGNED.tile(torch.bfloat16)


def test_the_pixels_of_wgrad_are_its_gemm_k(tiles_folder):
    found = TILE._replace(BLOCK_K=rule(128, 864, "B4").BLOCK_K)
    put(entry("B4", "bf16", 128, 864, 25088, found))
    assert tile(128, 864, 40000, "B4") == found
    assert tile(128, 864, 60000, "B4") == tile(64, 864, 25088, "B4") == rule(128, 864, "B4") != found


def test_a_tile_serves_its_window(tiles_folder):
    """A 5x5 and the first of two 3x3 have the same channels."""
    put(entry("K3", "bf16", 1000, 128, 96, TILE, taps=9))
    sizes = dict(gemm_m=1000, gemm_n=128, gemm_k=96, unit=8, gpu=GPU)
    assert choice.choose_tile(*K3, **sizes, taps=9) == TILE
    assert choice.choose_tile(*K3, **sizes, taps=25) == rule(1000) != TILE


def test_the_users_table_comes_before_the_packages_and_both_before_the_rules(tiles_folder, monkeypatch):
    packaged = TILE._replace(BLOCK_N=32)
    entries = [entry("K3", "bf16", m, 128, 96, packaged) for m in (100, 1000)]
    tile_table.write(tuned.package_path(GPU.capability), table(*entries, gpu="Another GPU"))
    put(entry("K3", "bf16", 1000, 128, 96, TILE))
    assert [tile(1000), tile(100), tile(10)] == [TILE, packaged, rule(10)]
    monkeypatch.setenv("INCEPTION_FUSED_TUNED", "0")
    tuned.forget()
    assert tile(1000) == rule(1000)
    assert tuned.describe(GPU) == "rules (INCEPTION_FUSED_TUNED=0)"


def test_where_the_users_tables_are(monkeypatch, tmp_path):
    monkeypatch.delenv("INCEPTION_FUSED_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.user_path("NVIDIA H100 80GB HBM3/x") == tmp_path / "inception_fused" / "NVIDIA_H100_80GB_HBM3_x.json"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.cache_folder().parts[-2:] == (".cache", "inception_fused")


GOOD = entry("K3", "bf16", 1000, 128, 96, TILE)


def with_tile(**changes):
    return table(GOOD._replace(tile=TILE._replace(**changes)))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read"),
        ("[" * 100_000, "cannot be read"),
        ("[]", "is no table of tiles"),
        ("{}", "is no table of tiles"),
        (table(GOOD, schema=1), "its schema is 1, this version reads 2"),
        (table(GOOD, gpu="Another GPU"), "it is for Another GPU (sm_90), not for Test GPU 90"),
        (table(GOOD, capability=[8, 0]), "(sm_80), not for"),
        (table(GOOD, kernel_sources="0" * 64), "timed with other kernels"),
        (table(GOOD, entries=[{"kernel": "K3"}]), "is no table of tiles"),
        (table(GOOD, entries=5), "is no table of tiles"),
        (table(GOOD._replace(kernel="K9")), "'K9'"),
        (table(GOOD._replace(dtype="fp64")), "'fp64'"),
        (table(GOOD._replace(gemm_m=0)), "positive integers"),
        (table(GOOD._replace(taps=0)), "positive integers"),
        (table(GOOD._replace(gemm_m="12")), "positive integers"),
        (with_tile(BLOCK_M=96), "BLOCK_M is 96, wants a power of two"),
        (with_tile(BLOCK_M=8), "BLOCK_M is 8"),
        (with_tile(BLOCK_N=512), "BLOCK_N is 512"),
        (with_tile(BLOCK_M=True), "positive integers"),
        (with_tile(BLOCK_K=64), "BLOCK_K is 64, the rule's 32"),
        (with_tile(num_warps=2), "num_warps is 2"),
        (with_tile(num_stages=9), "num_stages is 9"),
        (with_tile(GROUP_M=100), "GROUP_M 100"),
        (with_tile(BLOCK_M=256, BLOCK_N=128), "more than 128 accumulators"),
        (
            table(GOOD._replace(kernel="K1", tile=Tile(128, 128, 64, num_stages=8), taps=1)),
            "262144 bytes of shared memory, of 232448",
        ),
    ],
)  # fmt: skip
def test_a_table_that_cannot_be_trusted_is_ignored_as_a_whole(content, reason, tiles_folder):
    path = tuned.user_path(GPU.name)
    path.parent.mkdir()
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.warns(UserWarning, match="python python/tune.py again, or delete the file") as caught:
        found = tile(1000), tile(1001)
    assert found == (rule(1000), rule(1001))
    assert len(caught) == 1, "said once"
    assert reason in tuned.describe(GPU)
    assert tuned.describe(GPU).startswith("rules; ignored")
    assert tuned.describe(GPU).endswith(tuned.REMEDY)


def test_a_warning_that_is_an_error_ends_no_step(tiles_folder):
    path = tuned.user_path(GPU.name)
    path.parent.mkdir()
    path.write_text("{")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tile(1000) == rule(1000)


def test_eight_warps_hold_for_the_compiler_that_was_checked(tiles_folder):
    wide = TILE._replace(BLOCK_N=256, num_warps=8, num_stages=3)
    put(entry("K3", "bf16", 1000, 128, 96, wide), entry("K3", "bf16", 8000, 128, 96, TILE))
    assert tile(1000) == wide
    put(entry("K3", "bf16", 1000, 128, 96, wide), entry("K3", "bf16", 8000, 128, 96, TILE), triton="2.0")
    assert (tile(1000), tile(8000)) == (rule(1000), TILE)


def test_a_device_without_a_table_has_no_key(tiles_folder, monkeypatch):
    properties = type("Properties", (), {"name": GPU.name, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    device = torch.device("cuda", 0)
    assert tuned.key(torch.device("cpu")) is tuned.key(torch.device("meta")) is None
    assert tuned.key(device) is None
    put(GOOD)
    assert tuned.key(device) == GPU


def test_a_file_is_replaced_at_once_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "table.json"
    tile_table.write(path, {"old": 1})

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(OSError, match="No space"):
        tile_table.write(path, {"new": 1})
    assert json.loads(path.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["table.json"]


def full_table():
    """An entry for every problem of GoogLeNet in bf16: two tiles for each forward kernel and B2 of another height."""
    found = {}
    for name, config in GOOGLENET_LAUNCHED.items():
        for batch in (1, 32, 128):
            for p in tiled(block_shape(config, batch, spatial_size(name), torch.bfloat16), torch.bfloat16):
                chosen = choice.tile_of(p)
                if p.rules == "K2":  # whose two rules differ in BLOCK_K already
                    chosen = chosen._replace(BLOCK_M=32)
                elif p.rules in choice.FORWARD:
                    chosen = chosen._replace(BLOCK_M=64 if batch == 1 else 32, BLOCK_N=64, num_warps=4, num_stages=2)
                elif p.rules == "B2":
                    chosen = chosen._replace(BLOCK_M=64)
                item = entry(p.rules, "bf16", p.gemm.m, p.gemm.n, p.gemm.k, chosen, taps=p.gemm.taps)
                found[item.key, item.pixels] = item
    return found.values()


def test_with_a_table_in_force_block_k_does_not_depend_on_the_batch(tiles_folder):
    put(*full_table())
    heights = set()
    for name, config in GOOGLENET_LAUNCHED.items():
        blocks = {}
        for batch in (1, 2, 7, 32, 100, 128, 4096):
            for p in tiled(block_shape(config, batch, spatial_size(name), torch.bfloat16), torch.bfloat16):
                blocks.setdefault(p.name, set()).add(choice.tile_of(p, GPU).BLOCK_K)
                if p.name == "K3":
                    heights.add(choice.tile_of(p, GPU).BLOCK_M)
        assert all(len(sizes) == 1 for sizes in blocks.values())
    assert heights == {32, 64, 256}, "two tuned tiles, and the rule's where the batch is far from all of them"


def test_with_a_table_in_force_a_dtype_keeps_to_few_binaries(tiles_folder, monkeypatch):
    """The launches are those that ops and gradients make; aot_gate counts what Triton would compile anew."""
    from checks.launches import googlenet_launches
    from inception_fused.runtime.launch import binary_key

    put(*full_table())
    monkeypatch.setattr(tuned, "key", lambda device: GPU)
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    launches = [launch for _, launch in googlenet_launches(torch.bfloat16)]
    k3 = {launch.tile for launch in launches if launch.kernel.fn.__name__ == "conv_fprop_kernel"}
    assert {t.BLOCK_M for t in k3} == {32, 64}, "the table is in force"
    assert len(set(map(binary_key, launches))) <= MAX_BINARIES


@pytest.mark.parametrize("normed", [False, True], ids=["", "BatchNorm"])
@pytest.mark.parametrize("branch3", [(5,), (3,), (3, 3)], ids=str)
def test_problems_are_what_the_operators_ask_the_plan(branch3, normed, tiles_folder, monkeypatch):
    from checks.launches import block_launches

    asked = []

    def choose_tile(kernel, dtype, **problem):
        asked.append(
            (kernel, dtype, *(problem[name] for name in ("gemm_m", "gemm_n", "gemm_k", "taps", "unit", "gpu")))
        )
        return original(kernel, dtype, **problem)

    original = choice.choose_tile
    monkeypatch.setattr(choice, "choose_tile", choose_tile)
    monkeypatch.setattr(tuned, "key", lambda device: GPU)
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    for config in (GOOGLENET_BLOCKS["4b"], GOOGLENET_BLOCKS["3a"]._replace(c3=(10, 30))):
        asked.clear()
        kind = dict(save=True, branch3=branch3[0], double=len(branch3) > 1, normed=normed)
        block_launches(config, 2, (9, 9), torch.float16, **kind)
        found = tiled(block_shape(config, 2, 9, torch.float16, branch3=branch3), torch.float16, normed=normed)
        # Of two launches that may be made as one it is asked twice.
        assert set(asked) == {(p.rules, p.dtype, *p.gemm, p.unit, GPU) for p in found}


def test_b2_of_both_windows_has_one_height_whatever_the_table_says(tiles_folder, monkeypatch):
    """Their sums over rows share a buffer with a row for each tile of rows."""
    config = GOOGLENET_BLOCKS["4b"]
    p3, p5 = (
        p for p in tiled(block_shape(config, 2, 9, torch.float16), torch.float16) if p.name in ("B2 3x3", "B2 5x5")
    )
    low = choice.tile_of(p5)._replace(BLOCK_M=32)
    put(entry("B2", "fp16", p5.gemm.m, p5.gemm.n, p5.gemm.k, low, taps=25))
    from checks.launches import block_launches

    monkeypatch.setattr(tuned, "key", lambda device: GPU)
    monkeypatch.setattr(reasons, "interpreting", lambda: False)
    launches = block_launches(config, 2, (9, 9), torch.float16, save=True)
    dgrads = [launch.tile for launch in launches if launch.kernel.fn.__name__ == "conv_dgrad_kernel"]
    assert dgrads[:2] == [choice.tile_of(p3)] * 2
    assert choice.tile_of(p3).BLOCK_M != low.BLOCK_M


def test_explain_says_why(tiles_folder):
    config = GOOGLENET_BLOCKS["3a"]
    text = explain(config, 32, 28, torch.bfloat16)
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert list(lines) == ["launch", *(row.name for rows in ROWS.values() for row in rows if row.rules)]
    assert re.search(
        r"25088 x 128 x 864  256x128x32, 4 stages, 8 warps +[0-9.]+  [a-zA-Z0-9 -]+  rule 'wide': sm_90",
        lines["K3"],
    )
    assert lines["B1"].endswith("the kernel's only rule")
    assert "B1" not in explain(config, 32, 28, torch.bfloat16, backward=False)
    put(entry("K3", "bf16", 25088, 128, 96, TILE, taps=9))
    line = next(line for line in explain(config, 32, 28, torch.bfloat16, GPU).splitlines() if line.startswith("K3"))
    assert re.search(
        r"128x64x32, 4 stages +17.2 +timed  +tuned on Test GPU 90 at 1a2b3c4: 17.2 us, rule's 18.9, "
        r"runner-up 128x64x32, 2 stages 17.9, spread 0.4%$",
        line,
    )
    far = next(line for line in explain(config, 50, 28, torch.bfloat16, GPU).splitlines() if line.startswith("K3"))
    assert far.endswith("timed with 25088 pixels")
    odd = explain(config._replace(c2=(97, 128)), 1, 7, torch.bfloat16)
    assert "rule 'unaligned': not in units of 16 bytes" in odd


def test_explain_of_two_windows_names_both():
    text = explain(GOOGLENET_BLOCKS["4e"], 128, 14, torch.bfloat16, branch3=(3, 3))
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert list(lines) == ["launch", *(row.name for rows in TABLES[7].rows.values() for row in rows if row.rules)]
    for name, gemm in (
        ("K4 first", "25088 x 128 x 288"),
        ("K4 second", "25088 x 128 x 1152"),
        ("B2 second", "25088 x 128 x 1152"),
        ("B2 first", "25088 x 32 x 1152"),
        ("B4 first", "128 x 288 x 25088"),
        ("B4 second", "128 x 1152 x 25088"),
    ):
        assert gemm in lines[name]


def test_info_shows_the_table_in_force(tiles_folder, monkeypatch):
    assert environment.info()["tiles"] == "rules (no GPU)" or torch.cuda.is_available()
    assert tuned.describe(GPU) == "rules (never tuned)"
    put(GOOD)
    assert tuned.describe(GPU) == "tuned on Test GPU 90 at 1a2b3c4 (user), 1 entry"
    monkeypatch.setattr(environment, "tiles_in_force", lambda: tuned.describe(GPU))
    assert "tiles      tuned on Test GPU 90" in environment.format_info(environment.info())


def test_the_plan_command_on_a_gpu(tiles_folder, loads, capsys, monkeypatch):
    from inception_fused.__main__ import main

    properties = type("Properties", (), {"name": GPU.name, "major": 9, "minor": 0})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    put(entry("K3", "bf16", 25088, 128, 96, TILE, taps=9))
    assert main(["plan", "3a"]) == 0
    text = capsys.readouterr().out
    assert "tiles: tuned on Test GPU 90 at 1a2b3c4 (user), 1 entry" in text
    assert "17.2 us, rule's 18.9" in text
    assert "compiled kernels" not in text
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert main(["plan", "3a"]) == 0
    assert "K1 and B3 here: the compiled kernels" in capsys.readouterr().out


def test_the_plan_command(capsys):
    from inception_fused.__main__ import main

    assert main(["plan", "3a,5b", "--batch", "1", "--dtype", "fp32", "--image-size", "96"]) == 0
    text = capsys.readouterr().out
    assert "3a, batch 1, 12x12 pixels, fp32" in text
    assert "NVIDIA H200 and 1.3 a launch, counted in the machine code, not measured" in text
    assert "5b, batch 1, 3x3 pixels, fp32" in text
    assert "144 x 176 x 192" in text
    assert "4a" not in text
    assert main(["plan", "3a", "--branch3", "two-3x3", "--batch", "1"]) == 0
    text = capsys.readouterr().out
    assert "3a, branch 3 two-3x3, batch 1, 28x28 pixels, bf16" in text
    assert "B4 second" in text
    assert "N1" not in text
    assert main(["plan", "3a", "--batch-norm", "--batch", "1"]) == 0
    text = capsys.readouterr().out
    assert "3a, BatchNorm in training, batch 1, 28x28 pixels, bf16" in text
    shown = [line[:8].strip() for line in text.splitlines()[5:]]
    assert shown == [row.name for rows in NORMED_TABLES[6].rows.values() for row in rows if row.rules]
    assert main(["plan", "4a,stem", "--branch3", "two-3x3"]) == 0
    text = capsys.readouterr().out
    assert "stem, batch 32, 56x56 pixels, bf16" in text
    assert text.index("K4 1x1") < text.index("4a, branch 3 two-3x3")
    assert main(["plan", "--rules"]) == 0
    assert capsys.readouterr().out == choice.describe() + "\n"
    for arguments in (
        ["plan", "stem", "--batch-norm"],
        ["plan", "6z"],
        ["plan", "--batch", "0"],
        ["plan", "--branch3", "7x7"],
        ["--json", "plan"],
    ):
        with pytest.raises(SystemExit) as error:
            main(arguments)
        assert error.value.code == 2
