"""A block as chains: every list of values follows them, and no place is lost on the way there and back."""

import pytest

from inception_fused import chains
from inception_fused.chains import CONV_NAMES, COUNT, BlockTensors, Needs, Norms

VALUES = [f"{name} value" for name in CONV_NAMES]


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
    assert tensors == (VALUES, biases, norms, eps)
    assert tensors.flat == [*VALUES, *biases, *norms]
    assert [t for part in Norms.of(tensors.norms) for t in part] == norms
    names = [name for name, _ in chains.named(tensors)]
    assert len(names) == len(set(names)) == len(tensors.flat)


def test_flags_without_biases_want_none_of_them():
    needs = Needs.of([True, *[False] * COUNT])
    assert (needs.x, any(needs.weights), any(needs.biases), len(needs.flat)) == (True, False, False, 1 + 2 * COUNT)
