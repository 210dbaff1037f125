"""torch.load(weights_only=True): of a state_dict as it is, of a whole model with its classes allowed."""

from __future__ import annotations

import importlib
import io
import pickle

import pytest
import torch
from torch import nn

from clients import CLIENTS, drawn, images
from inception_fused import backend, convert, convert_, revert_
from inception_fused.conversion.converted import ConvertedBlock
from marks import quick

NAMES = ("old d2l", "torchvision")


def saved(item):
    file = io.BytesIO()
    torch.save(item, file)
    file.seek(0)
    return file


def model(name):
    return nn.Sequential(drawn(CLIENTS[name]())).eval()


def allowed(file):
    """What a file names, as somebody who trusts these names allows them."""
    names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    file.seek(0)
    found = [name.rpartition(".") for name in names]
    return torch.serialization.safe_globals(
        [(getattr(importlib.import_module(module), name), f"{module}.{name}") for module, _, name in found]
    )


@pytest.fixture(autouse=True)
def only_what_is_allowed_here():
    before = torch.serialization.get_safe_globals()
    yield
    torch.serialization.clear_safe_globals()
    torch.serialization.add_safe_globals(before)


@pytest.mark.parametrize("name", quick(NAMES, "torchvision"))
def test_a_state_dict(name):
    original = model(name)
    fused = convert(original)
    for ours, theirs in ((fused, original), (original, fused)):
        other = type(theirs)(CLIENTS[name]()).eval()
        other.load_state_dict(torch.load(saved(ours.state_dict()), weights_only=True))
        convert_(other)
        with backend("kernels"):
            assert torch.equal(other(x := images()), fused(x))


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_model(name):
    fused = convert(model(name))
    file = saved(fused)
    with pytest.raises(pickle.UnpicklingError, match="not an allowed global"):
        torch.load(file, weights_only=True)
    file.seek(0)
    with allowed(file):
        loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded[0], ConvertedBlock)
    with backend("kernels"):
        assert torch.equal(loaded(x := images()), fused(x))


def test_nothing_is_allowed_that_nobody_asked_for():
    fused, before = convert(model("old d2l")), torch.serialization.get_safe_globals()
    pickle.loads(pickle.dumps(fused))
    torch.load(saved(fused), weights_only=False)
    assert set(torch.serialization.get_safe_globals()) == set(before)


def test_a_reverted_model_names_no_class_of_this_package():
    file = saved(revert_(convert(model("old d2l"))))
    assert not any("inception" in name for name in torch.serialization.get_unsafe_globals_in_checkpoint(file))
