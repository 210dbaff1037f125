"""The sentences of explain() on its forecasts: what bounds a kernel, which count stood in, what eager may do faster."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from benchmarks.cases.networks import BatchNormInception
from inception_fused import GOOGLENET_BLOCKS, BatchNorm, FusedInception, InceptionParams, explain
from inception_fused.block.googlenet_blocks import block_shape
from inception_fused.op.backends import parse
from inception_fused.plan import eager
from inception_fused.plan.cards import H200
from inception_fused.plan.forecast import NO_PRODUCT, Forecast, forecast
from inception_fused.plan.launches import NORMED_TABLES, TABLES
from inception_fused.plan.problems import launches_of
from inception_fused.tools import predictions
from inception_fused.tools.block_times import Subject, block_times, has_to_pack, pack_remedy
from inception_fused.tools.capture import Item

US = 1e-6


def made(name, us, bound="L2", *, eager_us=None, stands_for="", low=None, high=None):
    low, high = (us if value is None else value for value in (low, high))
    beside = None if eager_us is None else eager_us * US
    return Forecast(name, 0.0, us * US, False, bound, low * US, high * US, {bound: us * US}, stands_for, beside)


def said(*launches, on_card=False):
    return predictions.notes(launches, H200, on_card)


def test_the_largest_kernels_are_named_with_their_bounds():
    (note,) = said(
        made("K1", 10.0), made("K2", 60.0, "latency"), made("B4 1x1", 9.0, "DRAM"), made("B4 pool", 20.0, "latency"),
        made("B5", 1.0),
    )  # fmt: skip
    assert "counted in its machine code, not measured, and 1.3 us a launch (a guess). " in note
    assert note.endswith("Of it K2 60% (latency), B4 29% (latency), K1 10% (L2).")
    assert "latency is assumed" not in note
    (note,) = said(made("K2", 60.0, "latency", low=42.0, high=78.0), on_card=True)
    assert "1.3 us a launch; latency is assumed: 42.0 to 78.0 us. " in note


def test_what_stood_in_is_named():
    note = said(made("K1", 10.0, stands_for="sm_90 something"), made("B1", 1.0, stands_for=NO_PRODUCT))[1]
    assert note == "not counted with this tile on this architecture: K1; predicted from sm_90 something."


def test_eager_is_named_where_it_is_clearly_faster():
    launches = [
        made("K1", 10.0, eager_us=9.0), made("K2", 60.0, eager_us=10.0), made("B4 1x1", 50.0, eager_us=10.0),
        made("B4 pool", 50.0, eager_us=60.0), made("B5", 100.0),
    ]  # fmt: skip
    note = said(*launches)[-1]
    assert "K2 60.0 us, eager 10.0, B4 100 us, eager 70.0" in note
    assert 'try backend("K2=eager,B4=eager")' in note
    assert parse("K2=eager,B4=eager")
    assert len(said(*launches[:1])) == 1


def test_both_kernels_of_a_pair_are_switched_off():
    note = said(made("K1+K2", 60.0, eager_us=10.0), made("K3+K4 first", 20.0, eager_us=20.0))[-1]
    assert "K1+K2 60.0 us, eager 10.0" in note
    assert 'try backend("K1=eager,K2=eager")' in note


def test_eagers_model_by_hand():
    """The 3x3 of 4d: a product at 0.6 of the peak, bias and ReLU over its output, three launches. A max-pool has its
    indices beside."""
    shape = block_shape(GOOGLENET_BLOCKS["4d"], 128, 14, torch.bfloat16)
    found = {launch.name: launch for launch in launches_of(shape, torch.bfloat16, "forward")}
    rows, k, c = 25088, 288, 144
    product = 2 * rows * 9 * c * k / (0.6 * 790e12)
    passes = 2 * (2 * 2 * rows * k / 4.3e12)
    assert eager.seconds(found["K3"], H200, "bf16", False) == pytest.approx(product + passes + 3 * 1.3 * US)
    assert eager.seconds(found["pack"], H200, "bf16", False) is None
    pooled, training = (eager.seconds(found["K2"], H200, "bf16", saves) for saves in (False, True))
    assert pooled > rows * 512 * (2 + 2 + 8) / 4.3e12
    assert training > pooled


def test_a_small_kernel_of_eager_is_no_faster_than_any():
    shape = block_shape(GOOGLENET_BLOCKS["5b"], 1, 7, torch.bfloat16)
    found = {launch.name: launch for launch in launches_of(shape, torch.bfloat16, "forward")}
    least = 3 * eager.LEAST + eager.STEPS * eager.STEP + 3 * 1.3 * US
    assert eager.seconds(found["K3"], H200, "bf16", False) == pytest.approx(least)


@pytest.mark.parametrize("windows", [(5,), (3,), (3, 3)])
def test_every_product_has_a_twin(windows):
    shape = block_shape(GOOGLENET_BLOCKS["4d"], 8, 14, torch.bfloat16, branch3=windows)
    found = forecast(shape, torch.bfloat16, H200, precision="bf16", training=True, packs=True)
    without = {launch.name for launch in found if launch.eager is None}
    assert without == {"pack", "B1", "B5"}
    # K1 with K2, and K3 with K4.
    assert len(found) == sum(map(len, TABLES[6 + (len(windows) > 1)].rows.values())) - 2


@pytest.mark.parametrize("training", [True, False])
def test_a_block_whose_batch_norm_trains(training):
    """Launches of its own, no weights to fold, and a remedy for those that are in PyTorch's layout."""
    block = BatchNormInception(64, 16, (16, 32), (16, 32), 16).train(training)
    weights = [m.weight for m in block.modules() if isinstance(m, nn.Conv2d)]
    layers = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    statistics = [(None, None) if training else (m.running_mean, m.running_var) for m in layers]
    norms = [BatchNorm(m.weight, m.bias, *two, m.eps) for m, two in zip(layers, statistics, strict=True)]
    params = InceptionParams(tuple(weights), None, tuple(norms))
    subject = Subject(block, lambda: params, kernels=True)
    found = block_times(subject, Item("it", None, torch.randn(2, 64, 7, 7)), H200)
    names = [launch.name for launch in found.launches]
    assert ("N6 y" in names) == training
    assert names[0] == "pack"
    forward, backward = (NORMED_TABLES[6].names[direction] for direction in ("forward", "backward"))
    if training:
        assert names == ["pack", "K1+K2", *forward[3:6], "K3+K4", *forward[8:], *backward]
        assert found.forward.predicted_us < found.step.predicted_us
    assert bool(pack_remedy(params, torch.float32)) == training
    dense = params._replace(weights=tuple(w.contiguous(memory_format=torch.channels_last) for w in weights))
    assert has_to_pack(dense, torch.float32) == (not training)
    assert has_to_pack(dense, torch.bfloat16)


def test_explain_prints_and_keeps_them():
    model = nn.Sequential(FusedInception(*GOOGLENET_BLOCKS["4a"])).eval()
    found = explain(model, torch.randn(1, 480, 2, 2))
    text = str(found)
    assert "counted in its machine code, not" in text
    (row,) = json.loads(json.dumps(found.to_json()))
    assert [launch["launch"] for launch in row["launches"]] == ["pack", "K1+K2", "K3+K4"]
    assert sum(launch["predicted_us"] for launch in row["launches"]) == pytest.approx(row["forward"]["predicted_us"])
    assert all(launch["bound"] for launch in row["launches"])
