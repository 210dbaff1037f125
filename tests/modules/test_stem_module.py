"""GoogLeNet's b2 is a Sequential to its users, whatever runs its convolutions; more in compat/test_compat_stem.py."""

import copy
import io
import pickle
from functools import partial

import pytest
import torch
from torch import nn

from inception_fused import (
    FusedInception,
    GoogLeNet,
    Inception,
    InceptionInputError,
    KernelError,
    backend,
    inception,
)
from inception_fused.modules.stem import FusedStem
from inception_fused.testing import assert_parity, tolerance
from marks import each_once
from stem_cases import LAYERS, ODD, SMALL, Sizes, assert_alike, fused, images, pair, plain, replica_of, step


class Own(FusedInception):
    pass


def mixed(*config):
    return (FusedInception if config[0] > 192 else Inception)(*config)


FACTORIES = {
    "FusedInception": (FusedInception, FusedStem),
    "two windows": (partial(FusedInception, branch3_kernel_size=3, branch3_convs=2), FusedStem),
    "a subclass": (Own, FusedStem),
    "Inception": (Inception, nn.Sequential),
    "mixed": (mixed, nn.Sequential),
}


@pytest.mark.parametrize("name", FACTORIES)
def test_the_stem_is_fused_where_all_blocks_are(name):
    block, kind = FACTORIES[name]
    net = GoogLeNet(block=block)
    assert type(net.b2) is kind
    assert list(net.b2._modules) == [str(i) for i in range(len(LAYERS))]
    assert all(isinstance(layer, kind) for layer, kind in zip(net.b2, LAYERS, strict=True))


def test_keys_weights_and_outputs_are_the_sequentials(nets):
    ours, eager = (net.b2 for net in nets)
    assert isinstance(ours, nn.Sequential)
    assert list(ours.state_dict()) == list(eager.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    for a, b in zip(ours.parameters(), eager.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    for source, target in ((ours, eager), (eager, ours)):
        changed = {name: 2 * t for name, t in source.state_dict().items()}
        target.load_state_dict(changed, strict=True)
        source.load_state_dict(changed, strict=True)
    x = images(2, 5, 6, c=64)
    with backend("kernels"):
        assert_alike({"y": ours(input=x).detach()}, {"y": eager(x).detach()})


@each_once
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("sizes", [SMALL, ODD, Sizes(3, 1, 1)], ids=["aligned", "odd", "one channel"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_parity_of_the_output_and_every_gradient(dtype, sizes, bias):
    module = fused(sizes, bias=bias, dtype=dtype)
    with backend("kernels"):
        rows = assert_parity(module, images(2, 5, 6, c=sizes.c).to(dtype))
    names = [f"d {name}" for name, _ in sorted(module.named_parameters(), key=lambda item: item[0][2:], reverse=True)]
    assert [row.what for row in rows] == ["output", "d x", *names]


INPUTS = {
    "NHWC": lambda x: x.contiguous(memory_format=torch.channels_last),
    "NCHW": lambda x: x.contiguous(),
    "every other column": lambda x: torch.cat((x, x), 3)[..., ::2],
    "a slice of channels": lambda x: torch.cat((x, x), 1).to(memory_format=torch.channels_last)[:, 5 : 5 + x.shape[1]],
    "expanded": lambda x: x[:1].expand(3, -1, -1, -1),
    "1x1": lambda x: x[..., :1, :1],
    "one row": lambda x: x[:, :, :1],
    "no image": lambda x: x[:0],
    "unbatched": lambda x: x[0],
}


@each_once
@pytest.mark.parametrize("wish", ["auto", "kernels", "eager"])
@pytest.mark.parametrize("name", INPUTS)
@pytest.mark.parametrize("sizes", [SMALL, ODD], ids=["aligned", "odd"])
def test_whatever_the_layers_take(name, wish, sizes):
    ours, eager = pair(sizes)
    x = INPUTS[name](images(c=sizes.c)).requires_grad_()
    if wish == "kernels" and x.dim() == 3:
        with backend(wish), pytest.raises(KernelError, match=r"x is no dense tensor \[N, C, H, W\]"):
            ours(x)
        return
    with backend(wish):
        assert_alike(step(ours, x), step(eager, x))
        y = ours[:4](x)
    assert y.dim() == 3 or y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("train", [torch.no_grad, torch.inference_mode])
def test_without_gradients(train):
    ours, eager = pair()
    with train(), backend("kernels"):
        y = ours(images())
        assert_alike({"y": y}, {"y": eager(images())})
    assert y.is_inference() == (train is torch.inference_mode)


def test_wrong_inputs_are_named():
    ours = fused()
    for wish in ("auto", "kernels"):
        with backend(wish), pytest.raises(InceptionInputError, match="x: got 23 channels"):
            ours(images(c=23))
        with backend(wish), pytest.raises(InceptionInputError, match="x: got torch.int64"):
            ours(images().long())
        with backend(wish), pytest.raises(InceptionInputError, match="0.weight is torch.float32; wants one dtype"):
            ours(images().double())


def test_the_function_takes_no_stem():
    with pytest.raises(InceptionInputError, match="params.weights: got 2 items, wants six tensors"):
        inception(images(), fused().params())


def test_a_network_runs_it(nets):
    """Which layers run is seen by what is launched: b1's pool, a stem's two and pack before nine blocks."""
    from inception_fused.runtime import submit

    net = copy.deepcopy(nets[0])
    net.b2[4].register_forward_pre_hook(lambda module, args: found.append(list(names)))
    found = []
    with backend("kernels"), torch.no_grad(), submit.count() as names:
        net(torch.randn(1, 1, 32, 32))
    assert [len(some) for some in found] == [4]
    assert len(names) > 4


def test_layers_are_taken_one_by_one():
    ours, eager = pair()
    x = images()
    parts = {
        "first two": (ours[:2], eager[:2]), "all four": (ours[:4], eager[:4]), "the last": (ours[3:], eager[3:]),
        "behind the first": (nn.Sequential(ours[0], *ours[1:]), eager), "listed": (nn.Sequential(*list(ours)), eager),
        "every other": (ours[::2], eager[::2]), "added": (ours + nn.Sequential(nn.ReLU()), eager),
    }  # fmt: skip
    with backend("kernels"):
        for name, (part, truth) in parts.items():
            given = torch.randn(2, part[0].in_channels, 5, 4) if isinstance(part[0], nn.Conv2d) else x
            assert torch.allclose(part(given), truth(given), atol=1e-5), name
    assert [type(layer) for layer in ours] == LAYERS
    assert (len(ours), ours[-1]) == (5, ours[4])
    assert (type(ours[:4]), type(ours + ours)) == (FusedStem, nn.Sequential)


@each_once
@pytest.mark.parametrize("frozen", ["0", "2", "0.weight", "2.bias", "", "x"])
@pytest.mark.parametrize("of_x", [True, False], ids=["dx", "no dx"])
def test_frozen_parameters_get_no_gradient(frozen, of_x):
    ours, eager = pair()
    for layers in (ours, eager):
        for name, p in layers.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
    x = images().requires_grad_(of_x or not frozen)
    with backend("kernels"):
        found = step(ours, x)
    assert_alike(found, step(eager, x))
    assert not any(name.startswith(frozen) for name in found if frozen and name not in ("x", "y"))


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "torch.save": saved}


@pytest.mark.parametrize("way", COPIES)
def test_copies_are_independent(way):
    ours, x = fused(), images().requires_grad_()
    with backend("kernels"):
        expected = step(ours, x)
        other = COPIES[way](ours)
        with torch.no_grad():
            for p in ours.parameters():
                p.zero_()
        assert_alike(step(other, x), expected, 0.0)
    assert type(other) is FusedStem


def test_a_pickle_from_before_there_was_a_stem(nets):
    """Its b2 is a Sequential, and stays one."""
    old = copy.deepcopy(nets[0])
    old.b2 = nn.Sequential(*old.b2)
    restored = saved(old)
    assert type(restored.b2) is nn.Sequential
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert_alike({"y": restored(x)}, {"y": nets[0](x)})
    nets[0].load_state_dict(restored.state_dict())


def test_a_replica_of_data_parallel():
    ours = fused()
    replica = replica_of(ours)
    with backend("kernels"):
        y = replica(images())
        assert torch.equal(y, ours(images()))
        y.square().sum().backward()
    assert all(p.grad is not None for p in ours.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """No further from float64 than eager is; gradients in the parameters' dtype."""
    results = []
    for module, wish in zip(pair(), ("kernels", "auto"), strict=True):
        with backend(wish), torch.autocast("cpu", dtype=dtype):
            results.append(step(module, images().requires_grad_()))
    truth = step(plain().double(), images().double().requires_grad_())
    ours, theirs = results
    assert ours["y"].dtype == dtype
    for name, t in truth.items():
        errors = [(result[name].double() - t).square().mean().sqrt() / t.square().mean().sqrt() for result in results]
        assert ours[name].dtype == theirs[name].dtype, name
        # A mask that a rounding flips is some percent of a sum of forty pixels.
        assert errors[0] <= 2 * errors[1] + tolerance(dtype, 24 * 9), name
