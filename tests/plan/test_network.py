"""GoogLeNet in parts: sizes and eager's kernels against PyTorch itself, forecasts against those of the blocks alone."""

from __future__ import annotations

import re
from functools import partial
from operator import attrgetter

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from inception_fused import GOOGLENET_BLOCKS, GoogLeNet, Inception, InceptionInputError
from inception_fused.block.googlenet_blocks import block_shape, branch3_options, spatial_size
from inception_fused.block.pools import PoolShape
from inception_fused.plan import network
from inception_fused.plan.cards import A100, H200
from inception_fused.plan.floors import total
from inception_fused.plan.forecast import forecast
from inception_fused.plan.network import BLOCK, CONVOLUTION, FORMS, HEAD, POOL, STEM, estimates, parts_of
from inception_fused.plan.pool_forecast import pool_forecast
from operator_traffic import Traffic, by_name

aten = torch.ops.aten
US = 1e-6
PRECISIONS = {"bf16": torch.bfloat16, "tf32": torch.float32}


def meta(batch=2, image=224, dtype=torch.bfloat16, **options):
    """GoogLeNet and images for it, without storage."""
    with torch.device("meta"):
        return GoogLeNet(**{"block": Inception, **options}).to(dtype), torch.empty(batch, 1, image, image, dtype=dtype)


def works_of(parts, direction):
    """Of all parts in a pass, in the order in which they run."""
    ordered = parts if direction == "forward" else reversed(parts)
    return [work for part in ordered for work in getattr(part, direction)]


@pytest.mark.parametrize("image", [224, 96, 37])
def test_sizes_are_those_of_the_network(image):
    net, x = meta(3, image)
    parts = parts_of(net, x)
    last = {part.stage: part.output for part in parts}
    assert last == dict(net.layer_shapes(x))
    found = {part.name: part for part in parts}
    assert [part.name for part in parts if part.kind == BLOCK] == list(GOOGLENET_BLOCKS)
    for name, config in GOOGLENET_BLOCKS.items():
        size = spatial_size(name, image)
        assert found[name].shape == block_shape(config, 3, size, torch.bfloat16)
        assert found[name].output == (3, config.out_channels, size, size)


def test_the_parts_in_order():
    parts = parts_of(*meta())
    others = [(part.name, part.kind) for part in parts if part.kind != BLOCK]
    assert others == [
        *(("b1 7x7", CONVOLUTION), ("b1 bias, ReLU, pool", POOL), ("b2 1x1, 3x3", STEM), ("b2 pool", POOL)),
        *(("b3 pool", POOL), ("b4 pool", POOL), ("b5 average pool", HEAD), ("classifier", HEAD)),
    ]
    (stem,) = (part.shape for part in parts if part.kind == STEM)
    assert (stem.n, stem.h, stem.w, stem.c, stem.filters, stem.sides) == (2, 56, 56, 64, (64, 192), (1, 3))
    pools = [part.shape for part in parts if part.kind == POOL]
    assert [(pool.shape.h, pool.channels, pool.epilogue) for pool in pools] == [
        *((112, 64, True), (56, 192, False), (28, 480, False), (14, 832, False)),
    ]
    assert {pool.shape._replace(h=0, w=0) for pool in pools} == {PoolShape(2, 0, 0, 1)}
    assert [len(part.forward) for part in parts if part.kind != BLOCK] == [1, 3, 6, 1, 1, 1, 1, 1]
    # The 7x7 has no dgrad.
    assert [len(part.backward) for part in parts if part.kind != BLOCK] == [1, 4, 8, 2, 2, 2, 1, 3]


def test_eager_traffic_is_that_of_its_operators():
    net, x = meta()
    parts = parts_of(net, x)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):
            # Its operator would name the bias, and autograd its gradient.
            layer.bias = None
    with Traffic() as forward, FlopCounterMode(display=False) as flop:
        y = net(x)
    with Traffic() as backward, FlopCounterMode(display=False) as flop_backward:
        y.backward(torch.empty_like(y))
    assert sum(work.flop for work in works_of(parts, "forward")) == flop.get_total_flops()
    assert sum(work.flop for work in works_of(parts, "backward")) == flop_backward.get_total_flops()
    works, moved = by_name(works_of(parts, "forward")), forward.moved
    assert sorted(works["conv"]) == sorted(moved[aten.convolution])
    assert sorted(works["relu"]) == sorted(works["bias"]) == sorted(moved[aten.relu])
    assert works["pool"] == moved[aten.max_pool2d_with_indices]
    assert works["mean"] == moved[aten.mean]
    assert works["linear"] == [size - net.classifier.bias.nbytes for size in moved[aten.addmm]]
    works, moved = by_name(works_of(parts, "backward")), backward.moved
    assert sorted(works["relu'"]) == sorted(moved[aten.threshold_backward])
    # The operator names the pool's input, which its kernel does not read: as many bytes as the zeros.
    pools = [sum(both) for both in zip(works["zeros"], works["pool'"], strict=True)]
    assert pools == moved[aten.max_pool2d_with_indices_backward]
    # Two products of each layer but the first, of which one operator names dy once; Linear's first is dgrad.
    *others, first = works["wgrad"]
    linear, *dgrads = works["dgrad"]
    assert [linear, others.pop(0)] == moved[aten.mm]
    dys = works["db"][1:-1]
    expected = [a + b - dy for a, b, dy in zip(dgrads, others, dys, strict=True)]
    weight = net.b1[0].weight.nbytes
    assert sorted([*expected, first + weight]) == sorted(moved[aten.convolution_backward])


def test_the_stem_at_batch_128_by_hand():
    """A 7x7 of one channel with stride 2 from 224x224 to 112x112, a pool to 56x56, 1x1 and 3x3, a pool to 28x28."""
    parts = {part.name: part for part in parts_of(*meta(128))}
    image, half, quarter, eighth = (128 * size**2 for size in (224, 112, 56, 28))
    (conv,), (bias, relu, pool) = parts["b1 7x7"].forward, parts["b1 bias, ReLU, pool"].forward
    assert (conv.flop, conv.bytes) == (2 * half * 49 * 64, 2 * (image + half * 64 + 49 * 64))
    assert bias.bytes == relu.bytes == 2 * 2 * half * 64
    assert [work.name for work in parts["b1 7x7"].backward] == ["wgrad"]
    assert pool.bytes == 64 * (2 * (half + quarter) + 8 * quarter)
    zeros, scattered, mask, db = parts["b1 bias, ReLU, pool"].backward
    assert (zeros.bytes, scattered.bytes, mask.bytes) == (2 * half * 64, pool.bytes, 3 * 2 * half * 64)
    assert (mask.name, db.name, db.bytes) == ("relu'", "db", 2 * half * 64)
    _, _, _, window, *_ = parts["b2 1x1, 3x3"].forward
    assert (window.flop, window.bytes) == (2 * quarter * 9 * 64 * 192, 2 * (quarter * (64 + 192) + 9 * 64 * 192))
    names = ["relu'", "db", "dgrad", "wgrad"]
    assert [work.name for work in parts["b2 1x1, 3x3"].backward] == names * 2
    assert parts["b2 pool"].forward[0].bytes == 192 * (2 * (quarter + eighth) + 8 * eighth)
    (mean,), (spread,) = parts["b5 average pool"].forward, parts["b5 average pool"].backward
    assert mean.bytes == spread.bytes == 2 * 128 * 1024 * (49 + 1)


@pytest.mark.parametrize("fused", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_fused_parts_are_forecast_and_others_at_their_floor(precision, training, fused):
    dtype = PRECISIONS[precision]
    parts = parts_of(*meta(32, 96, dtype))
    place = dict(precision=precision, training=training)
    found = estimates(parts, dtype, A100, **place, fused=fused)
    for estimate in found:
        kernels = estimate.part.kernels(training=training)
        assert estimate.floor == total(kernels, A100, precision)
        assert estimate.kernels == len(kernels)
        if estimate.part.kind in fused:
            if estimate.part.kind == POOL:
                alone = pool_forecast(estimate.part.shape, A100, **place)
            else:
                alone = forecast(estimate.part.shape, dtype, A100, **place)
            assert list(estimate.launches) == alone
            assert estimate.seconds() == sum(launch.predicted for launch in alone)
            assert estimate.seconds(network.busiest) == sum(max(launch.units.values()) for launch in alone)
            # Ours make no pass of their own for biases, ReLUs and the concatenation, and no indices of eight bytes.
            assert estimate.seconds(attrgetter("floor")) < estimate.floor
        else:
            assert estimate.launches == ()
            assert estimate.seconds() == estimate.seconds(network.busiest) == estimate.floor
    assert {estimate.part.kind for estimate in found if estimate.launches} == set(fused)
    eager = estimates(parts, dtype, A100, **place, fused=())
    assert network.summed(eager) == pytest.approx(sum(estimate.floor for estimate in found))


def test_the_share_of_the_stem():
    place = dict(precision="bf16", training=False)
    before, after, last = (
        estimates(parts_of(*meta(128)), torch.bfloat16, H200, **place, fused=fused) for fused in FORMS.values()
    )
    floors = [estimate.floor for estimate in before[:4]]
    # 51 us of the 7x7, 299 of its bias, ReLU and pool, 327 of both convolutions, 81 of their pool.
    assert [us / US for us in floors] == pytest.approx([50.8, 298.7, 327.5, 80.7], abs=0.1)
    stem, rest = network.stem_share(before)
    assert stem == rest == pytest.approx(sum(floors) / network.summed(before))
    launches = forecast(after[2].part.shape, torch.bfloat16, H200, **place)
    assert [launch.name for launch in launches] == ["K4 1x1", "K3"]
    ours = sum(launch.predicted for launch in launches)
    assert network.summed(after) == pytest.approx(network.summed(before) - floors[2] + ours)
    stem, rest = network.stem_share(after)
    assert rest == pytest.approx((floors[0] + floors[1] + floors[3]) / network.summed(after))
    assert stem - rest == pytest.approx(ours / network.summed(after))
    pools = [sum(launch.predicted for launch in last[place].launches) for place in (1, 3)]
    stem, rest = network.stem_share(last)
    assert rest == pytest.approx(floors[0] / network.summed(last)), "the 7x7 alone"
    assert stem == pytest.approx((floors[0] + ours + sum(pools)) / network.summed(last))
    by_floors, _ = network.stem_share(before, attrgetter("floor"))
    assert by_floors > network.stem_share(before)[0], "of our launches only what none can beat"


def test_a_stem_of_another_form_has_no_launches():
    net, x = meta()
    net.b2[2].stride = (2, 2)
    assert [part.kind for part in parts_of(net, x) if part.stage == "b2"] == [CONVOLUTION, POOL]
    net, x = meta()
    del net.b2[3]
    assert [part.kind for part in parts_of(net, x) if part.stage == "b2"] == [CONVOLUTION, POOL]


@pytest.mark.parametrize(
    ("change", "names", "served"),
    [
        (lambda b1: b1[2].__setattr__("ceil_mode", True), ["7x7", "bias, ReLU, pool"], True),
        (lambda b1: b1[2].__setattr__("kernel_size", (3, 3)), ["7x7", "bias, ReLU, pool"], True),
        (lambda b1: b1[2].__setattr__("stride", 3), ["7x7", "pool"], False),
        (lambda b1: b1[2].__setattr__("kernel_size", (3, 2)), ["7x7", "pool"], False),
        (lambda b1: b1[2].__setattr__("dilation", 2), ["7x7", "pool"], False),
        (lambda b1: b1[2].__setattr__("padding", (1, 0)), ["7x7", "pool"], False),
        (lambda b1: b1[0].__setattr__("bias", None), ["7x7", "pool"], True),
        (lambda b1: b1.__delitem__(1), ["7x7", "pool"], True),
        (lambda b1: b1.insert(2, nn.Conv2d(64, 64, 1, device="meta")), ["7x7, 1x1", "pool"], True),
    ],
)
def test_which_pools_have_launches_and_take_bias_and_relu(change, names, served):
    """Eager's kernels are the same, in whichever part they stand."""
    net, x = meta(dtype=torch.float32)
    change(net.b1)
    parts = [part for part in parts_of(net, x) if part.stage == "b1"]
    assert [part.name for part in parts] == [f"b1 {name}" for name in names]
    assert (parts[-1].shape is not None) == served
    kernels = [work.name for part in parts for work in part.forward]
    works = {nn.Conv2d: "conv", nn.ReLU: "relu", nn.MaxPool2d: "pool"}
    biases = [layer for layer in net.b1 if isinstance(layer, nn.Conv2d) and layer.bias is not None]
    assert sorted(kernels) == sorted([*(works[type(layer)] for layer in net.b1), *["bias"] * len(biases)])
    found = estimates(parts, torch.float32, A100, precision="tf32", training=True, fused=(POOL,))
    launches = [launch.name for launch in found[-1].launches]
    assert launches == (["P1", "P2", *(["P2's sums"] if "bias" in names[-1] else [])] if served else [])
    assert found[0].launches == ()


def test_other_windows_of_branch_3():
    net, x = meta(block=partial(Inception, **branch3_options((3, 3))))
    (part,) = (part for part in parts_of(net, x) if part.name == "4e")
    assert part.shape.sides == (1, 1, 3, 1, 3, 3, 1)
    assert (len(part.forward), len(part.backward)) == (23, 33)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda net: net.b2.append(nn.Sigmoid()), r"network: got Sigmoid\(\) in b2, wants GoogLeNet's layers"),
        (lambda net: net.b5.__setitem__(2, nn.AdaptiveAvgPool2d(2)), "AdaptiveAvgPool2d to one pixel"),
        (lambda net: net.b2.insert(0, nn.Conv2d(64, 64, 1, groups=2)), "in b2, wants .*: Conv2d without groups"),
        (lambda net: net.b5.insert(0, net.b5[0]), "got more than 9 blocks"),
    ],
)
def test_what_is_no_googlenet_is_refused(change, message):
    net, x = meta(dtype=torch.float32)
    with torch.device("meta"):
        change(net)
    with pytest.raises(InceptionInputError, match=message):
        parts_of(net, x)


def test_the_command(capsys):
    from inception_fused.__main__ import main

    assert main(["plan", "--network", "--batch", "128", "--card", "H200"]) == 0
    text = capsys.readouterr().out
    assert "GoogLeNet, batch 128, 224x224 pixels, bf16" in text
    assert "counted in the machine code, not measured" in text
    assert re.search(r"^b2 1x1, 3x3 +192x56x56 +327\.5 +6 ", text, re.MULTILINE)
    assert re.search(r"^b1 7x7 +64x112x112 +50\.8 +1 +- +101\.6 +2 +-$", text, re.MULTILINE)
    assert re.search(r"^b1 bias, ReLU, pool +64x56x56 +298\.7 +3 +[\d.]+ +1 +645\.2 +7 +[\d.]+ +3$", text, re.MULTILINE)
    block = forecast(
        block_shape(GOOGLENET_BLOCKS["3a"], 128, 28, torch.bfloat16), torch.bfloat16, H200, precision="bf16"
    )
    assert re.search(rf"^3a +256x28x28 +223\.3 +20 +{sum(i.predicted for i in block) / US:.1f} +4 ", text, re.MULTILINE)
    for name in ("inference", "training step"):
        forms = [line for line in text.splitlines() if re.match(rf"{name} +\D", line) and line.count("%")]
        assert len(forms) == 1 + len(FORMS)
    assert re.search(r"^inference +eager +2219 +34%$", text, re.MULTILINE)
    assert main(["plan", "--network", "--image-size", "96", "--dtype", "fp32", "--batch", "1", "--card", "A100"]) == 0
    text = capsys.readouterr().out
    assert "GoogLeNet, batch 1, 96x96 pixels, fp32" in text
    assert "NVIDIA A100" in text
    assert " to " in text, "ranges at batch 1"
    assert main(["plan", "--network", "--branch3", "two-3x3"]) == 0
    assert "GoogLeNet, branch 3 two-3x3, batch 32" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["3a", "--network"], "--network: got 3a with it"),
        (["--network", "--batch-norm"], "--network: got --batch-norm with it"),
        (["--network", "--card", "V100"], "invalid choice"),
        (["--network", "--image-size", "0"], "got '0', wants a positive integer"),
    ],
)
def test_the_command_refuses(arguments, message, capsys):
    from inception_fused.__main__ import main

    with pytest.raises(SystemExit) as error:
        main(["plan", *arguments])
    assert error.value.code == 2
    assert message in capsys.readouterr().err
