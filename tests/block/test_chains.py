"""A block as chains: every list of values follows them, and no place is lost on the way there and back."""

import ast
from pathlib import Path

import pytest

import inception_fused
from inception_fused.block import chains
from inception_fused.block.chains import CONV_NAMES, COUNT, NORM_COUNTS, PLACES, BlockTensors, Flags, Needs, Norms
from inception_fused.errors import InceptionInputError

VALUES = [f"{name} value" for name in CONV_NAMES]

LISTS = {"weights", "biases", "norms", "needs", "tensors", "grads", "flat"}
"""Names of lists that follow the chains."""

SIZES = {COUNT, 2 * COUNT, 1 + 2 * COUNT, *NORM_COUNTS}


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
    assert [[conv.name for conv in chain] for chain in chains.CHAINS] == [
        ["p1_1"], ["p2_1", "p2_2"], ["p3_1", "p3_2"], ["p4_2"],
    ]  # fmt: skip
    assert chains.ends(CONV_NAMES) == ["p1_1", "p2_2", "p3_2", "p4_2"]
    assert chains.inner(CONV_NAMES) == ["p2_1", "p3_1"]
    assert chains.inputs("x", CONV_NAMES) == ["x", "x", "p2_1", "x", "p3_1", "x"]


def test_roles_and_outputs_have_inverses():
    parts = chains.reductions(VALUES), chains.windows(VALUES), chains.projection(VALUES)
    assert chains.from_roles(*parts) == VALUES
    assert chains.from_outputs(chains.ends(VALUES), chains.inner(VALUES)) == VALUES
    assert [v for chain in chains.by_chain(VALUES) for v in chain] == VALUES


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("kinds", [0, 2, 4])
def test_a_flat_list_is_cut_by_kind(biased, kinds):
    biases, norms = [f"b{i}" for i in range(COUNT * biased)], [f"n{i}" for i in range(COUNT * kinds)]
    eps = (1e-3,) * COUNT if kinds else ()
    tensors = BlockTensors.of([*VALUES, *biases, *norms], eps)
    assert [*map(list, tensors)] == [VALUES, biases, norms, [*eps]]
    assert tensors.flat == [*VALUES, *biases, *norms]
    assert [t for part in Norms.of(tensors.norms) for t in part] == norms
    names = [name for name, _ in chains.named(tensors)]
    assert len(names) == len(set(names)) == len(tensors.flat)


def test_flags_without_biases_want_none_of_them():
    needs = Needs.of([True, *[False] * COUNT])
    assert (needs.x, any(needs.weights), any(needs.biases), len(needs.flat)) == (True, False, False, 1 + 2 * COUNT)


@pytest.mark.parametrize("count", [0, 1, COUNT, 2 + COUNT, 2 * COUNT, 2 + 2 * COUNT])
def test_another_number_of_flags_is_refused(count):
    with pytest.raises(InceptionInputError, match=f"needs: got {count} flags, wants 7 or 13"):
        Needs.of([True] * count)


def test_lists_of_the_wrong_length_are_named():
    assert BlockTensors(VALUES).fault() == BlockTensors(VALUES, VALUES, VALUES * 2, [0.1] * COUNT).fault() == ""
    assert BlockTensors(VALUES[:-1]).fault() == "weights: got 5 and 0 biases, wants six, and six or none"
    assert BlockTensors(VALUES, VALUES[1:]).fault() == "weights: got 6 and 5 biases, wants six, and six or none"
    wants = "wants 12 or 24 vectors of BatchNorm and six eps, or none of either"
    assert BlockTensors(VALUES, (), VALUES, [0.1] * COUNT).fault() == f"norms: got 6 and 6 eps, {wants}"
    assert BlockTensors(VALUES, (), VALUES * 4).fault() == f"norms: got 24 and 0 eps, {wants}"


@pytest.mark.parametrize("wanted", ["x", *CONV_NAMES])
@pytest.mark.parametrize("kind", ["weights", "biases"])
def test_gradients_to_inputs_are_those_behind_what_is_wanted(wanted, kind):
    """That of x wants all; a parameter's those of the convolutions behind it in its chain."""
    flags = [name == wanted for name in CONV_NAMES]
    needs = Needs(wanted == "x", [False] * COUNT, [False] * COUNT)._replace(**{kind: flags})
    behind = {"p2_1": ["p2_2"], "p3_1": ["p3_2"], "x": CONV_NAMES}.get(wanted, ())
    assert needs.to_inputs == [name in behind for name in CONV_NAMES]


def test_places_and_flags():
    assert [VALUES[i] for places in PLACES for i in places] == VALUES
    assert chains.heads(CONV_NAMES) == ["p1_1", "p2_1", "p3_1", "p4_2"]
    assert (chains.first(CONV_NAMES), chains.varying_window(CONV_NAMES)) == ("p1_1", "p3_2")
    assert CONV_NAMES[chains.BEFORE_POOL] == chains.projection(CONV_NAMES)
    flat = [True, *VALUES, *VALUES, *VALUES * 2]
    flags = Flags.of(flat, (0.1,) * COUNT)
    assert (flags.x, flags.flat, flags.tensors.vectors) == (True, flat, VALUES * 3)
    assert chains.statistics(flags.tensors.norms) == VALUES * 2


@pytest.mark.parametrize(
    "source",
    [
        "weights[4]", "params.weights[1:7]", "norms[:12]", "needs[-1]", "[None] * 6", "(False,) * 13",
        "len(convs) != 6", "len(norms) in (0, 12, 24)", "range(6)", "tl.static_range(6)", "f(biases[6:])",
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
        if lines and path.name != "chains.py":
            found[path.relative_to(root).as_posix()] = lines
    assert found == {}
