"""GoogLeNet's b2 under compilers, tracers, transforms, quantization, checkpoints and counters."""

import io

import pytest
import torch
import torch.ao.quantization as quantization
from torch import nn
from torch.ao.quantization import quantize_fx
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from inception_fused import FusedInception, GoogLeNet, InceptionParams, KernelError, backend, inception
from inception_fused.modules import tracers
from inception_fused.modules.pools import pooled
from inception_fused.modules.stem import FusedStem, stem
from inception_fused.op import checking, gradients, launcher
from inception_fused.testing import Error
from marks import each_once, more, quick
from stem_cases import BOUND, ODD, SMALL, assert_alike, fused, images, pair, step
from test_compat_transforms import (
    DIFFERENTIATED,
    KEPT,
    TRANSFORMS,
    VMAPPED,
    _assert_alike,
    _compiled,
    _eagerly,
    _x,
    fresh_compiler,  # noqa: F401  an autouse fixture
    on_a_gpu,  # noqa: F401
)

ENGINE = torch.backends.quantized.engine
jit_warns = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")


def without_pool():
    return fused(SMALL, pool=False)


@pytest.mark.parametrize(("compiler", "dynamic"), [("aot_eager", None), more("inductor", None), more("inductor", True)])
def test_compiled(compiler, dynamic):
    ours, eager = pair()
    compiled = torch.compile(ours, fullgraph=True, backend=compiler, dynamic=dynamic)
    with backend("kernels"):
        for n in (2, 3, 5):
            x = images(n, 5, 4).requires_grad_()
            assert_alike(step(ours, x, compiled), step(eager, x))


def test_layers_of_a_compiled_stem_are_taken_one_by_one():
    ours, eager = pair()

    def run(layers, x):
        return layers[0](x).sum() + layers[:2](x).sum() + layers[:4](x).sum() + sum(layer.training for layer in layers)

    assert Error.of(_compiled(lambda x: run(ours, x))(images()), run(eager, images())).within(BOUND)


@pytest.mark.parametrize("way", ["hooked", "replaced"])
def test_a_compiled_stem_whose_layers_were_edited(way):
    ours, eager = pair()
    for layers in (ours, eager):
        if way == "hooked":
            layers[1].register_forward_hook(lambda module, args, y: y + 1)
        else:
            layers[3] = nn.LeakyReLU()
    x = images().requires_grad_()
    assert_alike(step(ours, x, _compiled(ours)), step(eager, x))
    with backend("kernels"), pytest.raises(Exception, match="1 has a hook|3 is a LeakyReLU"):
        _compiled(ours)(x)


@pytest.mark.parametrize("strict", [False, more(True)])
def test_exported(strict):
    """One operator, which differentiates at every call."""
    ours, eager = pair()
    dim = {0: torch.export.Dim("batch", min=2)}
    with backend("kernels"):
        program = torch.export.export(ours, (images(),), dynamic_shapes=(dim,), strict=strict)
        operators = [node.target.__name__ for node in program.graph.nodes if "inception_fused" in str(node.target)]
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        for kept in (program, torch.export.load(file)):
            module, x = kept.module(), images(3, 5, 4).requires_grad_()
            assert_alike(step(module, x), step(eager, x))
    assert operators == ["_exported.default"]


class Net(nn.Module):
    def __init__(self, layers):
        super().__init__()
        torch.manual_seed(5)
        self.head, self.b2, self.tail = nn.Conv2d(3, 24, 1), layers, nn.Conv2d(32, 8, 1)
        self.quant, self.dequant = quantization.QuantStub(), quantization.DeQuantStub()

    def forward(self, x):
        return self.dequant(self.tail(self.b2(self.head(self.quant(x)))))


def nets():
    return tuple(map(Net, pair()))


def test_a_symbolic_trace_keeps_one_call():
    net, eager = nets()
    traced = torch.fx.symbolic_trace(net)
    assert [node.target for node in traced.graph.nodes if node.op == "call_function"] == [InceptionParams, stem]
    x = images(c=3).requires_grad_()
    with backend("kernels"):
        assert_alike(step(traced, x), step(net, x), 0.0)
    with backend("eager"):
        layers = torch.fx.symbolic_trace(net)
    assert {"b2.0", "b2.3"} <= {node.target for node in layers.graph.nodes if node.op == "call_module"}
    assert_alike(step(layers, x), step(eager, x))


def test_a_symbolic_trace_of_the_network():
    """Its code names what can be imported again, by names that stay."""
    net = GoogLeNet()
    traced = torch.fx.symbolic_trace(net)
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    calls = [call for call in calls if call is not InceptionParams]
    assert calls == [pooled, stem, pooled, *[inception] * 2, pooled, *[inception] * 5, pooled, *[inception] * 2]
    file = io.BytesIO()
    torch.save(traced, file)
    for name in (b"pooled", b"stem"):
        assert b"inception_fused.pickles import " + name in file.getvalue()
    assert b"inception_fused.modules" not in file.getvalue()
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    x = torch.randn(1, 1, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), net(x))


def test_a_symbolic_trace_of_edited_layers_shows_them():
    net, eager = nets()
    for some in (net, eager):
        some.b2[3] = nn.LeakyReLU()
    traced = torch.fx.symbolic_trace(net)
    assert stem not in [node.target for node in traced.graph.nodes]
    assert_alike(step(traced, images(c=3)), step(eager, images(c=3)))


@jit_warns
def test_traced_by_torchscript():
    ours, eager = pair()
    with backend("kernels"):
        traced = torch.jit.trace(ours, (images(),))
        x = images(3, 6, 5).requires_grad_()
        assert_alike(step(traced, x), step(eager, x))
    assert "inception_fused::_exported" in str(traced.inlined_graph)


@jit_warns
@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(nn.ReLU(), m)], ids=["stem", "model"])
def test_scripted_as_its_layers(wrap, recwarn):
    """And left as it was, in a network too, whose blocks nobody can script."""
    ours, eager = pair()
    model = wrap(ours)
    scripted = torch.jit.script(model)
    x = images().requires_grad_()
    assert_alike(step(scripted, x), step(wrap(eager), x))
    assert any(type(m) is FusedStem for m in model.modules())
    with backend("kernels"), pytest.raises(KernelError, match=tracers.KEEPERS):
        torch.jit.script(model)
    with backend("kernels"):
        torch.jit.script(ours[:2])
    net = GoogLeNet()
    with pytest.raises(Exception, match="got a FusedInception"):
        torch.jit.script(net)
    assert type(net.b2) is FusedStem


@pytest.mark.skipif(ENGINE in ("none", None), reason="no engine for quantized layers here")
@pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning", "ignore::UserWarning")
@pytest.mark.parametrize("way", ["layer by layer", "by graph"])
def test_quantized_as_the_sequential(way):
    found, x = [], images(c=3)
    for net in nets():
        net = net.eval()
        if way == "by graph":
            prepared = quantize_fx.prepare_fx(net, quantization.get_default_qconfig_mapping(ENGINE), (x,))
            prepared(x)
            done = quantize_fx.convert_fx(prepared)
        else:
            net.qconfig = quantization.get_default_qconfig(ENGINE)
            prepared = quantization.prepare(quantization.fuse_modules(net, [["b2.0", "b2.1"], ["b2.2", "b2.3"]]))
            prepared(x)
            done = quantization.convert(prepared)
        kinds = sorted(type(m).__name__ for m in done.modules() if "torch.ao.nn" in type(m).__module__)
        found.append((kinds, done(x)))
    (ours, y), (theirs, truth) = found
    assert ours == theirs
    assert "ConvReLU2d" in " ".join(ours)
    torch.testing.assert_close(y, truth)


@each_once
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", quick(TRANSFORMS, "vmap", "per-sample", "hvp", "jvp"))
def test_transforms(name, trainable, on_a_gpu):  # noqa: F811
    module, x = without_pool().requires_grad_(trainable), _x()
    truth = _eagerly(TRANSFORMS[name], module, x)
    _assert_alike(TRANSFORMS[name](module, x), truth)
    _assert_alike(_compiled(lambda x: TRANSFORMS[name](module, x))(x), truth)


@pytest.mark.parametrize("name", quick(VMAPPED | DIFFERENTIATED, "vmap nested", "grad of vmap", "per-sample"))
def test_transforms_of_the_kernels(name):
    module, x = without_pool(), _x()
    truth = _eagerly(TRANSFORMS[name], module, x)
    if name in ("jvp", "jacfwd", "hessian"):
        with backend("kernels"), pytest.raises(KernelError):
            TRANSFORMS[name](module, x)
        return
    with backend("kernels"):
        _assert_alike(TRANSFORMS[name](module, x), truth)


@jit_warns
@pytest.mark.parametrize("way", ["export", "trace"])
@pytest.mark.parametrize("name", quick(KEPT, "autograd", "vmap of grad", "jvp"))
def test_transforms_of_a_graph_that_was_kept(name, way, on_a_gpu):  # noqa: F811
    module, x = without_pool(), _x()
    kept = torch.export.export(module, (x,)).module() if way == "export" else torch.jit.trace(module, (x,))
    _assert_alike(KEPT[name](kept, x), _eagerly(KEPT[name], module, x))


@pytest.mark.parametrize("bias", [True, False])
def test_second_derivatives(bias):
    module = fused(ODD, pool=False, bias=bias, dtype=torch.float64)
    names, given = zip(*module.named_parameters(), strict=True)

    def run(x, *params):
        return torch.func.functional_call(module, dict(zip(names, params, strict=True)), (x,))

    given = [t.detach().requires_grad_() for t in (images(1, 3, 2, c=ODD.c).double(), *given)]
    with backend("kernels"):
        assert torch.autograd.gradcheck(run, given, fast_mode=True)
        assert torch.autograd.gradgradcheck(run, given, fast_mode=True)


def test_functional_call_takes_the_parameters_that_it_is_given():
    ours, other = fused(), fused(seed=4)
    with backend("kernels"), torch.no_grad():
        swapped = torch.func.functional_call(ours, dict(other.named_parameters()), (images(),))
        assert torch.equal(swapped, other(images()))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpoints(use_reentrant):
    ours, x = fused(), images().requires_grad_()
    with backend("kernels"):
        found = step(ours, x, lambda x: checkpoint(ours, x, use_reentrant=use_reentrant))
        assert_alike(found, step(ours, x), 0.0)


@pytest.mark.parametrize("frozen", ["nothing", "0", "2"])
@pytest.mark.parametrize("of_x", [True, False], ids=["dx", "no dx"])
def test_flops_are_eagers(frozen, of_x):
    counts = []
    for module, wish in zip(pair(), ("kernels", "auto"), strict=True):
        for name, p in module.named_parameters():
            p.requires_grad_(not name.startswith(frozen))
        with backend(wish), FlopCounterMode(display=False) as counter:
            y = module(images(3, 5, 4).requires_grad_(of_x))
            forward = counter.get_total_flops()
            y.sum().backward()
        counts.append((forward, counter.get_total_flops() - forward))
    assert counts[0] == counts[1]
    assert counts[0][0] == 2 * 3 * 5 * 4 * (24 * 16 + 9 * 16 * 32)


def test_right_kernels_pass_the_check(monkeypatch):
    names, judge = [], checking._judge
    monkeypatch.setattr(checking, "_judge", lambda what, *args: (names.append(what), judge(what, *args)))
    with checking.checked(), backend("kernels"):
        for dtype in (torch.float32, torch.bfloat16):
            module = fused(ODD, dtype=dtype)
            for _ in range(3):
                step(module, images(c=ODD.c).to(dtype).requires_grad_())
    once = ["output", "d x", "d 0.weight", "d 2.weight", "d 0.bias", "d 2.bias"]
    assert names == once * 6


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("channels", [SMALL.k, SMALL.out], ids=["1x1", "3x3"])
def test_a_spoilt_output_is_named(channels, train, monkeypatch):
    function_of = launcher.function_of

    def spoilt(launched, implementation):
        launch = function_of(launched, implementation)

        def run(x, w, y, *args, **options):
            launch(x, w, y, *args, **options)
            if y.channels == channels:
                y.rows(options["gemm_m"])[7, 3] += 1.0

        return run if launched.name in ("K3", "K4") else launch

    monkeypatch.setattr(launcher, "function_of", spoilt)
    words = r"stem \(24, \(16, 32\)\), x \(2, 24, 5, 4\) torch.float32 on cpu: output differs from the reference"
    with checking.checked(), backend("kernels"), pytest.raises(KernelError, match=words), torch.set_grad_enabled(train):
        fused()(images())


@pytest.mark.parametrize("index", range(5))
def test_a_spoilt_gradient_is_named(index, monkeypatch):
    backward = gradients.block_backward

    def spoilt(*args, **options):
        grads = backward(*args, **options)
        grads[index].mul_(1.03)
        return grads

    monkeypatch.setattr(gradients, "block_backward", spoilt)
    name = ("x", "0.weight", "2.weight", "0.bias", "2.bias")[index]
    with checking.checked(), backend("kernels"), pytest.raises(KernelError, match=f": d {name} differs from the refer"):
        step(fused(), images().requires_grad_())


def test_a_stem_beside_a_block_in_one_graph():
    """Two variants of the same operators, which a symbolic trace before does not spoil."""
    model = nn.Sequential(without_pool(), FusedInception(32, 8, (8, 16), (8, 16), 8))
    torch.fx.symbolic_trace(model)
    x = images().requires_grad_()
    with backend("kernels"):
        found = step(model, x, _compiled(model))
    with backend("eager"):
        assert_alike(found, step(model, x))
