"""GoogLeNet's stem is one more block to explain, verify, precompile and parity, alone and in a model."""

import json
import re

import pytest
import torch
from torch import nn

from inception_fused import (
    FusedInception,
    GoogLeNet,
    Inception,
    InceptionInputError,
    backend,
    convert_,
    explain,
    precompile,
    revert_,
    verify,
)
from inception_fused import __main__ as command
from inception_fused.conversion.fused_blocks import blocks_of, fused_part
from inception_fused.modules.stem import FusedStem
from inception_fused.op import autograd, backends
from inception_fused.testing import assert_parity
from inception_fused.tools.measuring import Launches
from stem_cases import SMALL, fused, fused_of, images, plain
from test_precompile import planned  # noqa: F401
from test_verify import quick  # noqa: F401  an autouse fixture

ROWS = ["output", "d x", "d 0.weight", "d 2.weight", "d 0.bias", "d 2.bias"]


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return GoogLeNet()


def model():
    """A stem and a block behind other layers."""
    torch.manual_seed(2)
    return nn.Sequential(nn.Conv2d(3, 24, 1), fused(), FusedInception(SMALL.out, 8, (8, 16), (8, 16), 8))


def test_blocks_of_a_network_in_its_order(net):
    assert list(blocks_of(net)) == ["b2", "b3.0", "b3.1", *(f"b4.{i}" for i in range(5)), "b5.0", "b5.1"]
    assert list(blocks_of(net.b2)) == ["model"]
    assert blocks_of(nn.Sequential(net.b2[:2], net.b2[1:], nn.Sequential(*net.b2))) == {}
    assert list(blocks_of(nn.Sequential(net.b2[:4]))) == ["0"]


def test_explain_has_a_row_of_it(net):
    rows = explain(net).rows
    assert [row.name for row in rows] == list(blocks_of(net))
    assert (rows[0].kind, rows[0].state, rows[0].what) == ("FusedStem", "fused", "GoogLeNet's stem")
    assert str(explain(net)).count("10 of 10 are fused blocks") == 1
    assert [row.kind for row in explain(GoogLeNet(block=Inception)).rows] == ["Inception"] * 9
    with backend("kernels"):
        assert {row.path for row in explain(net).rows} == {"kernels"}


@pytest.mark.parametrize("training", [True, False])
def test_explain_predicts_its_launches(training):
    module = fused().train(training)
    found = explain(module, images())
    (row,) = found.rows
    backward = ["pack", "B1", "B2 3x3", "B2 1x1", "B4 1x1", "B4 3x3", "B5"]
    assert [launch.name for launch in row.launches] == ["pack", "K4 1x1", "K3", *backward * training]
    (launches,) = (some["launches"] for some in json.loads(json.dumps(found.to_json())))
    assert sum(launch["predicted_us"] for launch in launches) == pytest.approx((row.step or row.forward).predicted_us)
    assert all(value > 0 for value in row.forward)
    assert (row.step is not None) == training
    assert row.remedy.startswith("one launch more (pack) rewrites the 3x3 weights")
    dense = explain(module.to(memory_format=torch.channels_last), images()).rows[0]
    assert (dense.launches[0].name, dense.remedy) == ("K4 1x1", "")


def test_explain_times_what_the_kernels_stand_in_for():
    module = fused().eval()
    part = fused_part(module)
    assert list(part) == list(module)[:4]
    assert not part.training
    seen = []
    module[4].forward = lambda x: seen.append(x.shape) or x
    assert explain(module, images()).rows[0].forward.measured_us > 0
    assert len(seen) == 1, "the run of the model itself"


def test_explain_says_why_the_layers_run():
    module = fused()
    module[3] = nn.LeakyReLU()
    with backend("kernels"):
        (row,) = explain(module).rows
    assert row.path == "eager: 3 is a LeakyReLU, not a ReLU"
    assert row.remedy == ""


def test_verify_checks_and_weighs_it():
    dense = dict(memory_format=torch.channels_last)
    with backend("kernels"):
        found = verify(model().to(**dense), images(c=3).contiguous(**dense))
    assert found.ok
    assert [row.name for row in found.rows] == ["1", "2"]
    (row, block), text = found.rows, str(found)
    assert [r.what for r in row.parity] == ROWS
    assert [r.what for r in block.parity][:4] == [f"branch {i}" for i in range(1, 5)]
    assert "1: kernels ran, interpreted on the CPU: K3 triton, K4 triton, B1 triton, B2 triton, B4 triton" in text
    assert "a block's four slices, the stem's output and the gradients of x" in " ".join(text.split())
    assert row.costs.launches_forward == (Launches(2, 0), Launches(0, 4))
    assert row.costs.launches_backward == (Launches(7, 0), Launches(0, 4))
    # r, and a bit an element of y; eager's outputs of both layers.
    pixels = 2 * 5 * 4
    assert row.costs.held_bytes == (pixels * (4 * SMALL.k + SMALL.out // 8), pixels * 4 * (SMALL.k + SMALL.out))


def test_verify_finds_what_is_wrong(monkeypatch):
    whole = autograd.convolved
    monkeypatch.setattr(autograd, "convolved", lambda *a, **k: whole(*a, **k) * 1.03)
    found = verify(fused(), images(), backward=False)
    assert "NOT OK: beyond its bound: model: output (" in str(found)
    assert "the worst of a block's output\n" in str(found)
    with pytest.raises(AssertionError, match="output: error"):
        assert_parity(fused(), images(), backward=False)


def test_parity_takes_no_slice_and_no_edited_layers():
    module = fused()
    with pytest.raises(InceptionInputError, match="module: got FusedStem, wants a FusedInception or a converted block"):
        assert_parity(module[:2], images())
    module[1] = nn.Identity()
    with pytest.raises(InceptionInputError, match="module: got a block whose 1 is an Identity"):
        assert_parity(module, images())


def test_precompile_makes_it_ready(planned):  # noqa: F811
    net, x = model(), images(c=3)
    with backend("kernels"):
        found = precompile(net, x, progress=False)
        assert (found.blocks, found.skipped) == (("1", "2"), {})
        assert {"_planned_forward", "_planned_backward"} == set(planned)
        planned.clear()
        given = net[0](x)
        y = net[1][:4](given)
        torch.autograd.grad(y, (given, *net[1].parameters()), torch.ones_like(y))
        with torch.no_grad():
            net(x)
    assert planned == []


def test_precompile_skips_edited_layers():
    module = fused()
    module[0].register_forward_hook(lambda module, args, y: None)
    with backend("kernels"):
        found = precompile(module, images(), progress=False)
    assert found.skipped == {"model": "0 has a hook, so it runs its own children: nothing to compile"}


def test_conversion_passes_it_by():
    """A model with a stem is converted where it has blocks, and reverted; a plain stem is nobody's block."""
    net = nn.Sequential(fused(), Inception(SMALL.out, 8, (8, 16), (8, 16), 8))
    layers = net[0]
    convert_(net, strict=True, channels_last=True)
    assert [row.state for row in explain(net).rows] == ["fused", "converted"]
    assert layers[2].weight.is_contiguous(memory_format=torch.channels_last)
    revert_(net)
    assert net[0] is layers
    assert type(layers) is FusedStem
    assert [row.state for row in explain(net).rows] == ["fused", "not converted"]
    assert explain(plain()).rows == ()
    with pytest.raises(InceptionInputError, match="without an Inception block that can be converted"):
        convert_(plain(), strict=True)
    assert convert_(fused(), strict=True)


def test_the_command_verifies_it(capsys, monkeypatch):
    monkeypatch.setattr(backends, "_from_environment", "kernels")
    assert command.main(["verify", "--blocks", "stem", "--image-size", "33", "--dtype", "bf16"]) == 0
    out = capsys.readouterr().out
    assert re.search(r"^stem +1x64x9x9 .* ok$", out, re.MULTILINE)
    assert "ok: every slice and gradient of 1 block is within its bound" in out


def test_a_stem_made_by_hand_of_other_layers_is_no_block():
    layers = fused_of(nn.Sequential(nn.Conv2d(24, 8, 1), nn.ReLU()))
    assert explain(layers).rows == ()
    with pytest.raises(InceptionInputError, match="model: got FusedStem without any FusedInception"):
        verify(layers, images())
