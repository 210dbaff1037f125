"""GoogLeNet's b1 is a Sequential to its users, whatever applies its bias and ReLU."""

from __future__ import annotations

import copy
import pickle
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from inception_fused import FusedInception, GoogLeNet, Inception, KernelError, backend
from inception_fused.block.views import row_stride
from inception_fused.modules import entry
from inception_fused.modules.entry import FusedEntry
from inception_fused.modules.pools import FusedPool
from inception_fused.op.pools_autograd import max_pool
from inception_fused.runtime import submit
from inception_fused.testing import Error, tolerance
from marks import each_once
from stem_cases import replica_of


def plain(channels=8, *, bias=True, padding=1, ceil_mode=False, of=3):
    torch.manual_seed(3)
    conv = nn.Conv2d(of, channels, 7, stride=2, padding=3, bias=bias)
    return nn.Sequential(conv, nn.ReLU(), nn.MaxPool2d(3, 2, padding, ceil_mode=ceil_mode))


def pair(*args, **kwargs):
    """The same layers as a FusedEntry, and as a Sequential."""
    theirs = plain(*args, **kwargs)
    children = copy.deepcopy(theirs._modules)
    pool = children["2"]
    children["2"] = FusedPool(3, 2, pool.padding, ceil_mode=pool.ceil_mode)
    return FusedEntry(OrderedDict(children)), theirs


def images(*shape, seed=1):
    return torch.randn(shape or (2, 3, 19, 22), generator=torch.Generator().manual_seed(seed))


def step(module, x):
    """The output and every gradient that there is."""
    module.zero_grad()
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.requires_grad)
    y = module(x)
    y.double().pow(2).sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach()} | ({"x": x.grad} if x.grad is not None else {}) | grads


def assert_true(ours, theirs, x, *, wish="kernels", dtype=torch.float32):
    """Within twice the layers' own distance from float64."""
    truth = step(copy.deepcopy(theirs).double(), x.detach().double().requires_grad_(x.requires_grad))
    with backend(wish):
        found = step(ours, x)
    eager = step(theirs, x)
    assert found.keys() == eager.keys()
    for name, t in found.items():
        assert t.dtype == eager[name].dtype, name
        own = Error.of(eager[name], truth[name])
        assert Error.of(t, truth[name]).within(max(2 * own.rms, tolerance(dtype, 3 * 49))), name


FORMS = {"usual": {}, "odd": dict(channels=13), "no bias": dict(bias=False), "ceil": dict(padding=0, ceil_mode=True)}


@each_once
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("of_x", [True, False], ids=["dx", "no dx"])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=["NCHW", "NHWC"])
def test_against_the_layers(memory, of_x, form):
    x = images().contiguous(memory_format=memory).requires_grad_(of_x)
    assert_true(*pair(**FORMS[form]), x)


@pytest.mark.parametrize("frozen", ["0.weight", "0.bias", "0"])
def test_frozen_parameters_get_no_gradient(frozen):
    both = pair()
    for module in both:
        for name, p in module.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
    assert_true(*both, images().requires_grad_())


def test_the_layers_themselves_run_without_kernels():
    """To the bit, in PyTorch's memory."""
    ours, theirs = pair()
    for wish in ("auto", "eager"):
        with backend(wish):
            found = step(ours, images().requires_grad_())
        for name, t in step(theirs, images().requires_grad_()).items():
            assert torch.equal(found[name], t), name
            assert found[name].stride() == t.stride()


def launched(run):
    with backend("kernels"), submit.count() as names:
        found = run()
    return found, [name.partition(":")[0] for name in names]


def test_taps_are_all_that_is_kept_behind_the_convolution():
    ours, _ = pair(16)
    kept = []

    def run():
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
            return ours(images())

    y, names = launched(run)
    assert names == ["max_pool_kernel"]
    assert y.is_contiguous(memory_format=torch.channels_last)
    shapes = [tuple(t.shape) for t in kept]
    assert sorted(shapes) == sorted([(2, 3, 19, 22), (16, 3, 7, 7), (2 * 5 * 6, 8)])


@pytest.mark.parametrize("strided", [False, True], ids=["dense", "strided"])
@pytest.mark.parametrize("of", [1, 3])
def test_what_the_convolution_gives_is_not_copied(of, strided, monkeypatch):
    """Grey images too, whose strides say nothing of the order; weights as they are made."""
    ours, theirs = pair(16, of=of)
    x = images(2, of, 19, 44)[..., ::2] if strided else images(2, of, 19, 22)
    given = []
    monkeypatch.setattr(entry, "max_pool", lambda y, **more: given.append(row_stride(y)) or max_pool(y, **more))
    with backend("kernels"):
        y = ours(x)
    assert given == [16]
    assert Error.of(y, theirs.double()(x.double())).within(tolerance(torch.float32, of * 49))


def hooked(module):
    module[1].register_forward_hook(lambda layer, args, y: y + 1)


def pruned(module):
    prune.l1_unstructured(module[0], "weight", 0.5)


EDITS = {
    "a hook": (hooked, "1 has a hook"),
    "pruning": (pruned, "0 has a hook"),
    "a hook on the pool": (lambda m: m[2].register_forward_pre_hook(lambda layer, x: (x[0] + 1,)), "2 has a hook"),
    "another activation": (lambda m: setattr(m, "1", nn.GELU()), "1 is a GELU"),
    "another pool": (lambda m: setattr(m, "2", nn.AvgPool2d(2)), "2 is an AvgPool2d"),
    "borders": (lambda m: setattr(m[0], "padding_mode", "circular"), "0 is configured as"),
    "settings": (lambda m: setattr(m[2], "kernel_size", 2), "its max-pool is configured as"),
    "a forward": (lambda m: setattr(m[1], "forward", lambda x: x * 2), "1 has a forward of its own"),
}


@pytest.mark.parametrize("name", EDITS)
def test_edits_are_honoured(name):
    edit, reason = EDITS[name]
    ours, theirs = pair()
    for module in (ours, theirs):
        edit(module)
    assert torch.equal(ours(images()), theirs(images()))
    with backend("kernels"), pytest.raises(KernelError, match=reason):
        ours(images())


def test_edits_that_the_kernel_knows():
    """A convolution of other sizes, and parameters in another's place."""
    ours, theirs = pair()
    for module in (ours, theirs):
        module[0] = copy.deepcopy(nn.Conv2d(3, 8, 3, padding=2, dilation=2))
        module[0].load_state_dict({name: torch.ones_like(t) / 9 for name, t in module[0].state_dict().items()})
    _, names = launched(lambda: ours(images()))
    assert names == ["max_pool_kernel"]
    assert_true(ours, theirs, images())


BIASES = {
    "strided": lambda b: torch.stack((b, torch.full_like(b, torch.nan)), dim=1)[:, 0],
    "expanded": lambda b: b[:1].expand_as(b),
    "every second": lambda b: b.repeat_interleave(2)[1::2],
}


@pytest.mark.parametrize("change", BIASES)
def test_biases_of_any_strides(change):
    ours, theirs = pair()
    for module in (ours, theirs):
        module[0].bias.data = BIASES[change](module[0].bias.detach())
        assert not module[0].bias.is_contiguous()
    assert_true(ours, theirs, images())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_a_bias_of_another_dtype_is_refused_as_by_the_layers(dtype):
    """Although the pool, behind which the kernel adds it, would take any."""
    for module, wish in zip(pair(), ("kernels", "auto"), strict=True):
        module[0].bias.data = module[0].bias.to(dtype)
        with backend(wish), pytest.raises(RuntimeError, match="and bias type .* should be the same"):
            module(images())


def test_several_gradients_at_once():
    results = []
    for module, wish in zip(pair(), ("kernels", "auto"), strict=True):
        x = images().requires_grad_()
        with backend(wish):
            y = module(x)
        dy = torch.stack([torch.ones_like(y), torch.zeros_like(y), images(*y.shape, seed=2)])
        results.append(torch.autograd.grad(y, [x, *module.parameters()], dy, is_grads_batched=True))
    for ours, theirs in zip(*results, strict=True):
        assert Error.of(ours, theirs).within(tolerance(torch.float32, 3 * 49))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype):
    """No further from float64 than the layers are, with as many maxima that rounding moves to another pixel; gradients
    in the parameters' dtype."""
    x, results = images(2, 3, 63, 60), []
    for module, wish in zip(pair(), ("kernels", "auto"), strict=True):
        with backend(wish), torch.autocast("cpu", dtype=dtype):
            results.append(step(module, x.requires_grad_()))
    truth = step(plain().double(), x.detach().double().requires_grad_())
    for name, t in truth.items():
        errors = [(result[name].double() - t).norm() / t.norm() for result in results]
        assert results[0][name].dtype == results[1][name].dtype, name
        assert errors[0] <= 2 * errors[1] + tolerance(dtype, 3 * 49), name
    assert results[0]["y"].dtype == dtype


def test_slices_scripts_and_traces():
    ours, theirs = pair()
    x = images()
    for part, truth in ((ours[:2], theirs[:2]), (ours[2:], theirs[2:]), (nn.Sequential(*ours), theirs)):
        given = x if isinstance(part[0], nn.Conv2d) else images(2, 8, 9, 9)
        assert torch.equal(part(given), truth(given))
    expected = theirs(x)
    traced = torch.fx.symbolic_trace(ours)
    assert torch.equal(torch.jit.script(ours)(x), expected)
    assert torch.equal(torch.jit.trace(ours, x)(x), expected)
    y, names = launched(lambda: traced(x))
    assert torch.equal(y, expected)
    assert names == ["max_pool_kernel"]
    with backend("kernels"), pytest.raises(KernelError, match="torch.jit.script"):
        torch.jit.script(pair()[0])


def test_compiled_and_transformed():
    ours, theirs = pair()
    compiled, x = torch.compile(ours, backend="aot_eager", fullgraph=True), images()
    parameters = dict(ours.named_parameters())

    def loss(module):
        return lambda p, x: torch.func.functional_call(module, p, (x[None],)).square().sum()

    with backend("kernels"):
        for name, t in step(compiled, x).items():
            assert torch.allclose(t, step(ours, x)[name.removeprefix("_orig_mod.")], rtol=1e-5, atol=1e-5), name
        found = torch.func.vmap(torch.func.grad(loss(ours)), (None, 0))(parameters, x)
    for name, t in torch.func.vmap(torch.func.grad(loss(theirs)), (None, 0))(parameters, x).items():
        assert torch.allclose(found[name], t, rtol=1e-4, atol=1e-4), name


@pytest.mark.parametrize("way", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_copies_and_replicas(way):
    ours, _ = pair()
    with backend("kernels"):
        y = ours(images())
        other = way(ours)
        assert type(other) is FusedEntry
        assert torch.equal(other(images()), y)
        replica = replica_of(ours)
        assert torch.equal(replica(images()), y)


def test_where_it_stands():
    torch.manual_seed(1)
    ours = GoogLeNet(in_channels=3)
    torch.manual_seed(1)
    theirs = GoogLeNet(in_channels=3, block=Inception)
    assert (type(ours.b1), type(theirs.b1)) == (FusedEntry, nn.Sequential)
    assert all(torch.equal(a, b) for a, b in zip(ours.b1.parameters(), theirs.b1.parameters(), strict=True))
    assert isinstance(ours.b3[0], FusedInception)
    with torch.no_grad():
        y, names = launched(lambda: ours.b1(images()))
        assert torch.allclose(y, theirs.b1(images()), atol=1e-6)
    assert names == ["max_pool_kernel"]
    empty, _ = launched(lambda: ours.b1(images(0, 3, 19, 22)))
    assert tuple(empty.shape) == (0, 64, 5, 6)
    empty.sum().backward()
