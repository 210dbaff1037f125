"""Whatever somebody does to the layers of GoogLeNet's b2 is honoured: by the kernels, or by running the layers."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, prune

from inception_fused import FallbackWarning, KernelError, backend
from inception_fused.modules.stem import FusedStem
from stem_cases import LAYERS, SMALL, assert_alike, fused, fused_of, images, pair, plain, step


def behind(layers):
    layers.append(nn.ReLU(inplace=True))


def between(layers):
    layers.insert(4, nn.BatchNorm2d(SMALL.out))
    layers.extend([nn.Conv2d(SMALL.out, 5, 1)])


def without_pool(layers):
    del layers[4]


def inplace(layers):
    for relu in (layers[1], layers[3]):
        relu.inplace = True


@pytest.mark.parametrize("edit", [behind, between, without_pool, inplace])
def test_edits_that_the_kernels_honour(edit):
    ours, eager = pair()
    for layers in (ours, eager):
        torch.manual_seed(5)
        edit(layers)
    x = images().requires_grad_()
    with backend("kernels"):
        found = step(ours, x)
    assert ours.eager_reason() is None
    assert_alike(found, step(eager, x))


def replaced(index, layer):
    return lambda layers: layers.__setitem__(index, copy.deepcopy(layer))


def first_of_all(layers):
    layers.insert(0, nn.Identity())


def deleted(layers):
    del layers[1]


def with_forward(layers):
    layers[0].forward = lambda x: torch.zeros(2, SMALL.k, 5, 4)


CHANGES = {
    "0 is an Identity, not a Conv2d": first_of_all,
    "2 is a ReLU, not a Conv2d": deleted,
    "3 is a LeakyReLU, not a ReLU": replaced(3, nn.LeakyReLU()),
    "1 is an Identity": replaced(1, nn.Identity()),
    "0 is configured as": replaced(0, nn.Conv2d(24, 16, 3, padding=1)),
    "2 is configured as": replaced(2, nn.Conv2d(16, 32, 3, padding=1, groups=2)),
    "2 is configured": lambda layers: setattr(layers[2], "stride", (2, 2)),
    "some convolutions have a bias": lambda layers: setattr(layers[0], "bias", None),
    "0 has a forward of its own": with_forward,
    "1 has a hook": lambda layers: layers[1].register_forward_hook(lambda module, args, y: y + 1),
    "2 has a hook": lambda layers: prune.l1_unstructured(layers[2], "weight", 0.4),
    "0 is a ParametrizedConv2d": lambda layers: parametrizations.weight_norm(layers[0]),
    "3 is a Sequential": lambda layers: layers.__setitem__(3, nn.Sequential(layers[3])),
}


@pytest.mark.parametrize("reason", CHANGES)
def test_edits_that_run_the_layers(reason):
    ours, eager = pair()
    for layers in (ours, eager):
        torch.manual_seed(5)
        CHANGES[reason](layers)
    eager.load_state_dict(ours.state_dict())
    x = images().requires_grad_()
    assert_alike(step(ours, x), step(eager, x))
    with backend("kernels"), pytest.raises(KernelError, match=reason):
        ours(x)


def test_lazy_layers_wait_for_their_input():
    torch.manual_seed(3)
    ours = fused_of(nn.Sequential(nn.LazyConv2d(16, 1), nn.ReLU(), nn.LazyConv2d(32, 3, padding=1), nn.ReLU()))
    y = ours(images())
    assert type(ours[0]) is nn.Conv2d
    with backend("kernels"):
        assert_alike({"y": ours(images()).detach()}, {"y": y.detach()})


def test_hooks_on_the_stem_and_on_what_follows_keep_the_kernels():
    ours, seen = fused(), []
    ours.register_forward_hook(lambda module, args, y: seen.append(y.shape))
    ours[4].register_forward_hook(lambda module, args, y: seen.append(y.shape))
    with backend("kernels"):
        ours(images())
    assert seen == [(2, 32, 3, 2)] * 2


def test_hooks_on_all_modules_see_the_layers():
    ours, seen = fused(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module)))
    try:
        ours(images())
        with backend("kernels"), pytest.raises(KernelError, match="a global module hook is registered"):
            ours(images())
    finally:
        handle.remove()
    assert seen == [*LAYERS, FusedStem]


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ReLU, nn.Sequential])
def test_another_method_of_a_class_is_honoured(kind, monkeypatch):
    ours, eager = pair()
    method = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: 2 * method(self, x))
    assert_alike(step(ours, images()), step(eager, images()))
    with backend("kernels"), pytest.raises(KernelError, match=f"{kind.__name__}.forward was replaced"):
        ours(images())


@pytest.mark.parametrize("wish", ["auto", "kernels"])
def test_other_functions_in_pytorch_do_no_harm(wish, monkeypatch):
    ours, truth = fused(), plain()(images()).detach()
    for name in ("conv2d", "relu"):
        monkeypatch.setattr(F, name, None)
    with backend(wish):
        assert_alike({"y": ours(images()).detach()}, {"y": truth})


class OnCuda(torch.Tensor):
    """A CPU tensor that says that it is on a GPU, where a caller is warned."""

    is_cuda = True


@pytest.mark.parametrize("wish", ["auto", "eager"])
def test_a_caller_who_could_expect_kernels_is_warned(wish, recwarn):
    """Not of a slice, which is a Sequential, nor where eager was asked for."""
    ours, x = fused(), images().as_subclass(OnCuda)
    ours[1].register_forward_hook(lambda module, args, y: None)
    with backend(wish):
        for given in (x, x[0]):
            ours(given)
        ours[:2](x)
        ours[1:](images(c=SMALL.k).as_subclass(OnCuda))
    said = [str(w.message) for w in recwarn if w.category is FallbackWarning]
    assert said == ["the Inception block runs in eager PyTorch: 1 has a hook"] * (2 if wish == "auto" else 0)
