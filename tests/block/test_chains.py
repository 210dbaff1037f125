"""A block as chains: every list of values follows them, and no place is lost on the way there and back."""

import ast
from pathlib import Path

import pytest

import inception_fused
from inception_fused.block import chains
from inception_fused.block.chains import BLOCKS, DOUBLE, STEM, USUAL, VARIANTS
from inception_fused.block.tensor_lists import BlockTensors, Flags, Needs, Norms, named, statistics
from inception_fused.errors import InceptionInputError

EACH = pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)


def values_of(variant):
    return [f"{name} value" for name in variant.names]


VALUES, COUNT = values_of(USUAL), USUAL.count

LISTS = {"weights", "biases", "norms", "needs", "tensors", "grads", "flat"}
"""Names of lists that follow the chains."""

SIZES = {size for count in BLOCKS for size in (count, 2 * count, 1 + 2 * count, 4 * count)}


def is_number(node):
    """Whether this is an integer, or a slice between integers."""
    if isinstance(node, ast.Slice):
        return any(part is not None and is_number(part) for part in (node.lower, node.upper))
    if isinstance(node, ast.UnaryOp):
        return is_number(node.operand)
    return isinstance(node, ast.Constant) and type(node.value) is int


def is_size(node):
    return any(isinstance(part, ast.Constant) and part.value in SIZES for part in ast.walk(node))


def counts(node):
    """Whether an expression is about a place in a list that follows the chains, or about its length."""
    if isinstance(node, ast.Subscript):
        name = getattr(node.value, "attr", getattr(node.value, "id", ""))
        return name in LISTS and is_number(node.slice)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Mult):
        return any(isinstance(side, (ast.List, ast.Tuple)) for side in (node.left, node.right)) and is_size(node)
    if isinstance(node, ast.Compare):
        lengths = [side for side in (node.left, *node.comparators) if isinstance(side, ast.Call)]
        return any(getattr(side.func, "id", "") == "len" for side in lengths) and is_size(node)
    if not isinstance(node, ast.Call):
        return False
    called = getattr(node.func, "attr", getattr(node.func, "id", ""))
    return called in ("range", "static_range") and any(map(is_size, node.args))


def counting(source):
    """The lines that count. Device code may: it is written for the longest block."""
    tree = ast.parse(source)
    device = [
        node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and "triton.jit" in _decorators(node)
    ]
    skipped = {id(inner) for node in device for inner in ast.walk(node)}
    return sorted({node.lineno for node in ast.walk(tree) if id(node) not in skipped and counts(node)})


def _decorators(function):
    return " ".join(map(ast.unparse, function.decorator_list))


def test_the_chains_are_the_branches_of_the_block():
    assert [[conv.name for conv in chain] for chain in USUAL.chains] == [
        ["p1_1"], ["p2_1", "p2_2"], ["p3_1", "p3_2"], ["p4_2"],
    ]  # fmt: skip
    assert chains.ends(USUAL.names) == ["p1_1", "p2_2", "p3_2", "p4_2"]
    assert chains.inner(USUAL.names) == ["p2_1", "p3_1"]
    assert chains.inputs("x", USUAL.names) == ["x", "x", "p2_1", "x", "p3_1", "x"]
    assert chains.third_windows(USUAL.names) == ["p3_2"]


def test_the_chains_with_two_windows_in_branch_3():
    assert [[conv.name for conv in chain] for chain in DOUBLE.chains] == [
        ["p1_1"], ["p2_1", "p2_2"], ["p3_1", "p3_2", "p3_3"], ["p4_2"],
    ]  # fmt: skip
    assert chains.ends(DOUBLE.names) == ["p1_1", "p2_2", "p3_3", "p4_2"]
    assert chains.inner(DOUBLE.names) == ["p2_1", "p3_1", "p3_2"]
    assert chains.windows(DOUBLE.names) == ["p2_2", "p3_2", "p3_3"]
    assert chains.inputs("x", DOUBLE.names) == ["x", "x", "p2_1", "x", "p3_1", "p3_2", "x"]
    assert chains.third_windows(DOUBLE.names) == ["p3_2", "p3_3"]


def test_the_stem_is_the_second_branch_alone():
    assert [[conv.name for conv in chain] for chain in STEM.chains] == [["0", "2"]]
    assert (chains.ends(STEM.names), chains.inner(STEM.names)) == (["2"], ["0"])
    assert chains.inputs("x", STEM.names) == ["x", "0"]
    assert chains.projection(STEM.names) is None
    assert not chains.has_pool(STEM.names)
    assert (chains.direct([5, 7]), chains.direct([3, *[1] * 5])) == (0, 3)
    assert chains.longest(STEM.names, None) == [None, "0", "2", *[None] * 4]
    assert chains.longest_filters([5, 7]) == [0, 5, 7, 0, 0, 0, 0]
    assert chains.longest_windows(["a"]) == ["a", None, None]


@EACH
def test_roles_and_outputs_have_inverses(variant):
    values = values_of(variant)
    parts = chains.reductions(values), chains.windows(values), chains.projection(values)
    assert chains.from_roles(*parts) == values
    assert chains.from_outputs(chains.ends(values), chains.inner(values)) == values
    assert [v for chain in chains.by_chain(values) for v in chain] == values
    assert chains.shortest(chains.longest(values, None), values) == values


def test_what_a_shorter_block_is_among_the_longest():
    assert chains.longest(VALUES, None) == [*VALUES[:4], None, *VALUES[4:]]
    assert chains.longest_windows(["a", "b"]) == ["a", None, "b"]
    assert chains.longest_filters([1, 2, 3, 4, 5, 6]) == [1, 2, 3, 4, 4, 5, 6]
    longest = values_of(DOUBLE)
    assert chains.longest(longest, None) == longest
    assert chains.longest_windows(["a", "b", "c"]) == ["a", "b", "c"]
    assert chains.longest_filters(range(7)) == [*range(7)]


@EACH
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kinds", [0, 2, 4])
def test_a_flat_list_is_cut_by_kind(biased, kinds, variant):
    count, values = variant.count, values_of(variant)
    biases, norms = [f"b{i}" for i in range(count * biased)], [f"n{i}" for i in range(count * kinds)]
    eps = (1e-3,) * count if kinds else ()
    tensors = BlockTensors.of([*values, *biases, *norms], eps)
    assert [*map(list, tensors)] == [values, biases, norms, [*eps]]
    assert tensors.flat == [*values, *biases, *norms]
    assert [t for part in Norms.of(tensors.norms) for t in part] == norms
    names = [name for name, _ in named(tensors)]
    assert len(names) == len(set(names)) == len(tensors.flat)


@EACH
def test_flags_without_biases_want_none_of_them(variant):
    needs = Needs.of([True, *[False] * variant.count])
    assert (needs.x, any(needs.weights), any(needs.biases), len(needs.flat)) == (
        True,
        False,
        False,
        1 + 2 * variant.count,
    )


@pytest.mark.parametrize("count", [0, 1, 6, 9, 11, 12, 14, 16])
def test_another_number_of_flags_is_refused(count):
    with pytest.raises(InceptionInputError, match=f"needs: got {count} flags, wants 3, 5, 7, 8, 13, 15"):
        Needs.of([True] * count)


def test_lists_of_the_wrong_length_are_named():
    assert BlockTensors(VALUES).fault() == BlockTensors(VALUES, VALUES, VALUES * 2, [0.1] * COUNT).fault() == ""
    assert (
        BlockTensors(VALUES[:-1]).fault()
        == f"weights: got 5 and 0 biases, wants {chains.ORDER}, and as many biases or none"
    )
    assert BlockTensors(VALUES, VALUES[1:]).fault() == "weights: got 6 and 5 biases, wants six, and six or none"
    wants = "wants 12 or 24 vectors of BatchNorm and six eps, or none of either"
    assert BlockTensors(VALUES, (), VALUES, [0.1] * COUNT).fault() == f"norms: got 6 and 6 eps, {wants}"
    assert BlockTensors(VALUES, (), VALUES * 4).fault() == f"norms: got 24 and 0 eps, {wants}"


@pytest.mark.parametrize("wanted", ["x", *DOUBLE.names])
@pytest.mark.parametrize("kind", ["weights", "biases"])
@EACH
def test_gradients_to_inputs_are_those_behind_what_is_wanted(wanted, kind, variant):
    """That of x wants all; a parameter's those of the convolutions behind it in its chain."""
    names = variant.names
    flags, none = [name == wanted for name in names], [False for _ in names]
    needs = Needs(wanted == "x", none, none)._replace(**{kind: flags})
    behind = {"p2_1": ["p2_2"], "p3_1": ["p3_2", "p3_3"], "p3_2": ["p3_3"], "x": names}.get(wanted, ())
    assert needs.to_inputs == [name in behind for name in names]


def test_places_and_flags():
    assert [VALUES[i] for places in USUAL.places for i in places] == VALUES
    assert chains.heads(USUAL.names) == chains.heads(DOUBLE.names) == ["p1_1", "p2_1", "p3_1", "p4_2"]
    assert chains.first(USUAL.names) == "p1_1"
    for variant in BLOCKS.values():
        assert variant.names[variant.projection] == chains.projection(variant.names) == "p4_2"
    flat = [True, *VALUES, *VALUES, *VALUES * 2]
    flags = Flags.of(flat, (0.1,) * COUNT)
    assert (flags.x, flags.flat, flags.tensors.vectors) == (True, flat, VALUES * 3)
    assert statistics(flags.tensors.norms) == VALUES * 2


@pytest.mark.parametrize(
    "source",
    [
        "weights[4]", "params.weights[1:7]", "norms[:12]", "needs[-1]", "[None] * 6", "(False,) * 13",
        "len(convs) != 6", "len(norms) in (0, 12, 24)", "range(6)", "tl.static_range(6)", "f(biases[6:])",
        "len(convs) == 7", "range(14)",
    ],
)  # fmt: skip
def test_the_scan_sees(source):
    assert counting(source) == [1]


@pytest.mark.parametrize(
    "source",
    [
        "@triton.jit\ndef f(outs):\n    tl.static_range(6)",
        "weights[i]",
        "shape[0]",
        "len(x.shape) == 4",
        "[0] * COUNT",
        "weights[:COUNT]",
    ],
)
def test_the_scan_lets_pass(source):
    assert counting(source) == []


def test_no_other_module_counts_in_lists_that_follow_the_chains():
    root = Path(inception_fused.__file__).parent
    found = {}
    for path in sorted(root.rglob("*.py")):
        lines = counting(path.read_text(encoding="utf-8"))
        if lines and path.name not in ("chains.py", "tensor_lists.py"):
            found[path.relative_to(root).as_posix()] = lines
    assert found == {}


def test_a_list_of_no_variant_is_refused_where_nobody_looked_before():
    for given in (VALUES[1:], []):
        words = f"weights: got {len(given)}, wants six tensors in the order p1_1"
        with pytest.raises(InceptionInputError, match=words):
            chains.windows(given)
