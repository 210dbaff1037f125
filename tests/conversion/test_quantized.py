"""Blocks under torch.ao.quantization: as the unconverted model, layer by layer."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.ao.quantization import quantize_fx

from clients import CLIENTS, FLAT, C, drawn, images
from inception_fused import FusedInception, Inception, InceptionInputError, KernelError, backend, convert
from inception_fused.modules.structure import has_own_forward
from marks import each_once

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SIZES = (C, FLAT[1], FLAT[2:4], FLAT[4:6], FLAT[6])
ENGINE = torch.backends.quantized.engine
pytestmark.append(pytest.mark.skipif(ENGINE in ("none", None), reason="no engine for quantized layers here"))


class Net(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.stem, self.block, self.tail = nn.Conv2d(C, C, 1), block, nn.Conv2d(64, 8, 1)
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()

    def forward(self, x):
        return self.dequant(self.tail(self.block(self.stem(self.quant(x)))))


def eagerly(model, x, training):
    model.train(training)
    get = quantization.get_default_qat_qconfig if training else quantization.get_default_qconfig
    model.qconfig = get(ENGINE)
    prepared = (quantization.prepare_qat if training else quantization.prepare)(model)
    prepared(x)
    return quantization.convert(prepared.eval())


def by_graph(model, x, training):
    get = quantization.get_default_qat_qconfig_mapping if training else quantization.get_default_qconfig_mapping
    prepare = quantize_fx.prepare_qat_fx if training else quantize_fx.prepare_fx
    prepared = prepare(model.train(training), get(ENGINE), (x,))
    prepared(x)
    return quantize_fx.convert_fx(prepared.eval())


def models(kind):
    """(the model as it was, the model with a block of ours), with the same parameters."""
    if "FusedInception" in kind:
        more = {"branch3_kernel_size": 3, "branch3_convs": 2} if "3x3" in kind else {}
        original, ours = Inception(*SIZES, **more), FusedInception(*SIZES, **more)
        ours.load_state_dict(original.state_dict())
    else:
        original = drawn(CLIENTS[kind]())
        ours = convert(original)
    original, ours = Net(original), Net(ours)
    ours.stem, ours.tail = copy.deepcopy(original.stem), copy.deepcopy(original.tail)
    return original, ours


def quantized(model):
    return sorted(
        type(m).__name__
        for m in model.modules()
        if type(m).__module__.startswith(("torch.ao.nn", "torch.ao.nn.intrinsic"))
    )


@each_once
@pytest.mark.parametrize("training", [False, True], ids=["calibrated", "in training"])
@pytest.mark.parametrize("way", [eagerly, by_graph])
@pytest.mark.parametrize("kind", ["FusedInception", "FusedInception of two 3x3", "old d2l", "torchvision"])
def test_quantized_as_the_unconverted_model(kind, way, training):
    original, ours = models(kind)
    # In which ours computes: a rounding apart, observers would choose other scales.
    x = images().to(memory_format=torch.channels_last)
    expected, found = (way(model, x, training) for model in (original, ours))
    assert quantized(found) == quantized(expected)
    assert len(quantized(found)) >= 8
    assert torch.equal(found(x), expected(x))
    assert expected(x).any()


@pytest.mark.parametrize("kind", ["FusedInception", "torchvision"])
def test_dynamic_quantization_leaves_blocks_alone(kind):
    model = models(kind)[1].eval()
    x = images()
    with backend("kernels"):
        block = quantization.quantize_dynamic(model).block
        assert torch.equal(block(x), model.block(x))
        assert not any(has_own_forward(m.__dict__) for m in block.modules())


@pytest.mark.parametrize("kind", ["FusedInception", "old d2l"])
def test_kernels_demanded_of_a_model_to_quantize(kind):
    model = models(kind)[1].eval()
    with (
        backend("kernels"),
        pytest.raises(KernelError, match="torch.ao.quantization takes the layers of a block; prep"),
    ):
        quantize_fx.prepare_fx(model, quantization.get_default_qconfig_mapping(ENGINE), (images(),))


def test_a_block_that_is_kept_out_is_one_call():
    """Neither traced nor quantized: it runs the kernels."""
    model, x = models("FusedInception")[1].eval(), images()
    config = quantization.fx.custom_config.PrepareCustomConfig().set_non_traceable_module_classes([FusedInception])
    mapping = quantization.get_default_qconfig_mapping(ENGINE).set_object_type(FusedInception, None)
    prepared = quantize_fx.prepare_fx(model, mapping, (x,), prepare_custom_config=config)
    prepared(x)
    found = quantize_fx.convert_fx(prepared)
    assert type(found.block) is FusedInception
    with backend("kernels"):
        assert torch.equal(found.block(x), model.block(x))


def test_what_a_quantized_block_says():
    block = quantization.convert(quantization.prepare(_with_qconfig(models("FusedInception")[1]).eval())).block
    assert block.eager_reason() == (
        "p1_1 is a torch.ao.nn.quantized.modules.conv.Conv2d, not a torch.nn.modules.conv.Conv2d"
    )
    x = torch.quantize_per_tensor(images(), 0.1, 0, torch.quint8)
    assert block(x).is_quantized
    with backend("kernels"), pytest.raises(KernelError, match="p1_1 is a torch.ao"):
        block(x)
    with pytest.raises(InceptionInputError, match="got torch.quint8.*; use x.dequantize.., or quantize the block's"):
        FusedInception(*SIZES)(x)


def _with_qconfig(model):
    model.qconfig = quantization.get_default_qconfig(ENGINE)
    return model
