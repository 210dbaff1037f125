"""The table of launches: whole, and the only place that joins a kernel's name to its file."""

import ast
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch

from inception_fused import GOOGLENET_BLOCKS
from inception_fused.block.chains import BLOCKS, DOUBLE, STEM, VARIANTS
from inception_fused.block.googlenet_blocks import block_shape
from inception_fused.plan.kernel_table import BLOCK_KERNELS, KERNELS, POOL_KERNELS, RULES
from inception_fused.plan.launches import DGRAD, DGRAD_X, FPROP, NORMED_TABLES, NORMS, TABLES, WGRAD, table_of
from inception_fused.plan.pairs import PAIRS
from inception_fused.plan.problems import launches_of
from inception_fused.runtime import aten, aten_norms, aten_pools, native

ROOT = next(folder for folder in Path(__file__).resolve().parents if (folder / "setup.py").exists())
PRODUCT = [path for folder in ("inception_fused", "benchmarks", "python") for path in (ROOT / folder).rglob("*.py")]


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_kernel_has_its_file(kernel):
    module = import_module(f"inception_fused.kernels.{kernel.file}")
    assert callable(getattr(module, kernel.file))
    assert hasattr(getattr(module, kernel.function), "fn"), "compiled by Triton"


@pytest.mark.parametrize("kernel", POOL_KERNELS, ids=str)
def test_a_pools_kernel_has_its_twin_and_one_set_of_tiles(kernel):
    assert callable(getattr(aten_pools, kernel.file))
    assert [rules.key for rules in kernel.sets] == [kernel.name]


@pytest.mark.parametrize("kernel", BLOCK_KERNELS, ids=str)
def test_a_blocks_kernel_has_its_twin_and_its_rows(kernel):
    rows = {row for tables in (TABLES, NORMED_TABLES) for t in tables.values() for row in t.rows[kernel.direction]}
    rows = {row for row in rows if row.kernel is kernel}
    assert rows
    assert callable(getattr(aten_norms if {row.role for row in rows} <= set(NORMS) else aten, kernel.file))
    assert kernel.native is None or callable(getattr(native, kernel.file))
    assert {row.rules for row in rows} <= {"", *(s.key for s in kernel.sets)}


@pytest.mark.parametrize(
    ("variant", "normed"),
    [*((variant, False) for variant in VARIANTS.values()), *((variant, True) for variant in BLOCKS.values())],
    ids=[*map(str, VARIANTS), *(f"{count}-BatchNorm" for count in BLOCKS)],
)
def test_every_convolution_is_computed_once(variant, normed):
    table = table_of(variant.names, normed=normed)

    def computed(direction, *roles):
        return sorted(conv for row in table.rows[direction] if row.role in roles for conv in row.convs)

    assert computed("forward", FPROP) == computed("backward", WGRAD) == sorted(variant.names)
    assert computed("backward", DGRAD, DGRAD_X) == sorted(variant.names)
    for role in NORMS if normed else ():
        forward = computed("forward", role)
        assert forward == sorted(variant.names)
        # The sums of r's gradient are B2's.
        assert set(computed("backward", role)) <= set(forward)
    assert all(len(set(names)) == len(names) for names in table.names.values())
    assert set(RULES) >= {row.rules for rows in table.rows.values() for row in rows} - {""}


def test_two_windows_cost_three_launches_of_the_same_kernels():
    usual, double = table_of(range(6)), table_of(range(7))
    more = {direction: set(double.names[direction]) - set(usual.names[direction]) for direction in usual.names}
    assert more == {
        "forward": {"K4 first", "K4 second"},
        "backward": {"B2 first", "B2 second", "B4 first", "B4 second"},
    }
    for direction, rows in usual.rows.items():
        assert len(double.rows[direction]) == len(rows) + (1 if direction == "forward" else 2)
        assert {row.rules for row in double.rows[direction]} == {row.rules for row in rows}
    # dt is there before what reads it.
    assert [row.convs for row in double.backward.dgrad_windows] == [("p2_2",), ("p3_3",), ("p3_2",)]


def test_the_stem_has_the_launches_of_one_branch():
    """Each with the rules, and so the binaries, of a block's launch."""
    table = table_of(STEM.names)
    assert table.names["forward"] == ("pack", "K4 1x1", "K3")
    assert table.names["backward"] == ("pack", "B1", "B2 3x3", "B2 1x1", "B4 1x1", "B4 3x3", "B5")
    usual = table_of(range(6)).rows
    for direction, rows in table.rows.items():
        assert {(row.kernel, row.rules) for row in rows} <= {(row.kernel, row.rules) for row in usual[direction]}


@pytest.mark.parametrize("double", [False, True], ids=["one window", "two windows"])
def test_a_forward_reads_what_is_there(double):
    shape = block_shape(GOOGLENET_BLOCKS["4b"], 2, 14, torch.float16)
    if double:
        *others, p3_2, p4_2 = shape.filters
        shape = shape._replace(filters=(*others, p3_2, p3_2, p4_2), sides=(1, 1, 3, 1, 3, 3, 1))
        assert shape.variant is DOUBLE
    there = {"x", *(f"{conv}.weight" for conv in shape.variant.names)}
    for launch in launches_of(shape, torch.float16, "forward"):
        assert set(launch.reads) <= there, launch.name
        there |= set(launch.writes)
    assert set(shape.variant.names) <= there


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair.file)
def test_a_pair_has_its_file_and_two_tiles_of_one_binary(pair):
    module = import_module(f"inception_fused.kernels.{pair.file}")
    assert callable(getattr(module, pair.file))
    assert hasattr(getattr(module, pair.function), "fn"), "compiled by Triton"
    first, second = pair.halves
    assert first.rule.num_warps == second.rule.num_warps
    assert all(half.rule in RULES[half.kernel].rules for half in pair.halves)
    assert all(half.rule.condition() in ("otherwise", "2-byte dtypes") for half in pair.halves), "behind all others"
    names = [name.split()[0] for name in table_of(range(7)).names["forward"]]
    assert names.index(second.kernel) == names.index(first.kernel) + 1


def words(path):
    """Identifiers and texts of a file's code, without docstrings and comments."""
    tree = ast.parse(path.read_text())
    said = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    identifiers, texts = set(), []
    for node in ast.walk(tree):
        named = [getattr(node, field, None) for field in ("id", "attr", "name", "module")]
        identifiers |= {part for name in named if isinstance(name, str) for part in name.split(".")}
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in said:
            texts.append(node.value)
    return identifiers, " ".join(texts)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_a_kernel_is_named_in_few_files(kernel):
    """Its file, its twins, the tables of kernels, launches and pairs, its pair, and at most one more. In kernels/ K1
    and the like are numbers of filters."""
    found = []
    for path in PRODUCT:
        identifiers, texts = words(path)
        named = re.search(rf"\b{kernel.name}\b", texts) and path.parent.name != "kernels" and kernel.name != "pack"
        if kernel.file in identifiers or named:
            found.append(path.relative_to(ROOT).as_posix())
    if kernel.file in ("pack", "reduce", "max_pool"):  # common words
        found = [path for path in found if path.startswith("inception_fused/kernels/")]
    tables = [f"inception_fused/plan/{name}.py" for name in ("kernel_table", "launches", "pairs")]
    pair = [f"inception_fused/kernels/{pair.file}.py" for pair in PAIRS]
    assert len([path for path in found if path not in (*tables, *pair)]) <= 3, found
