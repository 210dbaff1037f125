"""Transforms of torch.func inside and around compiled, exported and traced graphs: right values and gradients, or an
error that names the way out; never zeros."""

import io

import pytest
import torch
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, stack_module_state, vjp, vmap
from torch.utils._pytree import tree_leaves

from batch_norm_cases import leaves_of, make_norms, params_of
from checks.block_cases import SMALL, make_block
from inception_fused import FusedInception, InceptionParams, backend, inception
from inception_fused.op import forward, reasons
from inception_fused.testing import Error, tolerance
from marks import each_once, more, quick

BOUND = tolerance(torch.float32, 10**4)
REFUSED = 'backend "kernels" demands kernels that cannot run: '


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def on_a_gpu():
    """Calls in "auto" take the operators on this CPU, as they would on a GPU; what they launch is ATen's."""
    call = tuple(source for source in reasons.CALL if source is not reasons._device_of_auto)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reasons, "CALL", call)
        yield


def _block(**kwargs):
    torch.manual_seed(3)
    return FusedInception(*SMALL, **kwargs)


def _x(*shape):
    return torch.randn(*(shape or (2,)), 24, 4, 3, generator=torch.Generator().manual_seed(1))


def _compiled(f, **kwargs):
    return torch.compile(f, backend="aot_eager", **{"fullgraph": True} | kwargs)


def _detached(module):
    return {name: p.detach() for name, p in module.named_parameters()}


def _by_name(module):
    """Parameters in an order that strict export does not keep."""
    return [p for _, p in sorted(module.named_parameters())]


def _assert_alike(ours, theirs):
    for a, b in zip(tree_leaves(ours), tree_leaves(theirs), strict=True):
        assert b.any()
        error = Error.of(a, b)
        assert error.within(BOUND), error


def _step(run, parameters, x):
    """Gradients by autograd of x and parameters."""
    x = x.clone().requires_grad_()
    return torch.autograd.grad(run(x).square().sum(), [x, *parameters])


def _eagerly(f, *args):
    with backend("eager"):
        return f(*args)


def _of_parameters(m, x):
    return grad(lambda p: functional_call(m, p, (x,)).square().sum())(_detached(m))


def _loss(m):
    return lambda x: m(x).square().sum()


VMAPPED = {
    "vmap": lambda m, x: vmap(lambda x: m(x[None]))(x),
    "vmap of the last": lambda m, x: vmap(lambda x: m(x), -1, -1)(torch.stack([x, 2 * x], -1)),
    "vmap nested": lambda m, x: vmap(vmap(lambda x: m(x[None])), 1)(torch.stack([x, -x], 1)),
    "vmap of an empty batch": lambda m, x: vmap(lambda s: m(x[:0]).sum() + m(x).sum() * s)(torch.ones(3)),
    "vmap without grad": torch.no_grad()(lambda m, x: vmap(lambda x: m(x))(x[None])),
}
DIFFERENTIATED = {
    "grad": lambda m, x: grad(_loss(m))(x),
    "grad, and another path": lambda m, x: grad(lambda x: _loss(m)(x) + (x**3).sum())(x),
    "vjp": lambda m, x: vjp(m, x)[1](m(x).detach()),
    "of detached parameters": _of_parameters,
    "per-sample": lambda m, x: vmap(
        grad(lambda p, x: _loss(lambda x: functional_call(m, p, (x[None],)))(x)), (None, 0)
    )(_detached(m), x),
    "vmap of grad": lambda m, x: vmap(grad(lambda x: _loss(m)(x[None])))(x),
    "grad of vmap": lambda m, x: grad(lambda x: vmap(lambda x: m(x[None]))(x).square().sum())(x),
    "hvp": lambda m, x: grad(lambda z: (grad(_loss(m))(z) * x).sum())(x),
    "jacrev": lambda m, x: jacrev(lambda t: m(t * x).mean((0, 2, 3)))(torch.tensor(1.0)),
    "jvp": lambda m, x: jvp(m, (x,), (x + 1,)),
    "jacfwd": lambda m, x: jacfwd(lambda t: m(t * x))(torch.tensor(1.0)),
    "hessian": lambda m, x: hessian(lambda t: _loss(m)(t * x))(torch.tensor(1.0)),
}
TRANSFORMS = VMAPPED | DIFFERENTIATED
USUAL = (
    "vmap nested",
    "vmap without grad",
    "grad, and another path",
    "of detached parameters",
    "per-sample",
    "hvp",
    "jvp",
)


@each_once
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", quick(TRANSFORMS, *USUAL))
def test_compiled(name, trainable, on_a_gpu):
    block = _block().requires_grad_(trainable)
    run, x = TRANSFORMS[name], _x()
    _assert_alike(_compiled(lambda x: run(block, x))(x), _eagerly(run, block, x))


@pytest.mark.parametrize("name", quick(TRANSFORMS, "vmap of grad"))
def test_compiled_on_a_cpu(name):
    """Plain ATen, in channels_last memory as vmap knows it."""
    block, x = _block(), _x()
    _assert_alike(_compiled(lambda x: TRANSFORMS[name](block, x))(x), _eagerly(TRANSFORMS[name], block, x))


@pytest.mark.parametrize("name", quick(VMAPPED, "vmap"))
def test_compiled_vmap_runs_the_kernels(name, monkeypatch):
    launched = []
    run = forward.launch_forward
    monkeypatch.setattr(forward, "launch_forward", lambda *args: launched.append(1) or run(*args))
    block, x = _block(), _x()
    with backend("kernels"):
        y = _compiled(lambda x: TRANSFORMS[name](block, x))(x)
    assert launched
    _assert_alike(y, _eagerly(TRANSFORMS[name], block, x))


@pytest.mark.parametrize("name", quick(DIFFERENTIATED, "grad", "jvp"))
def test_kernels_demanded_of_a_compiled_derivative(name):
    block = _block()
    with backend("kernels"), pytest.raises(Exception, match=REFUSED):
        _compiled(lambda x: TRANSFORMS[name](block, x))(_x())


def _kinds():
    """Whether with biases, activation, BatchNorm: not at all, affine or not."""
    return {
        "no biases": (False, "relu", None),
        "no activation": (True, None, None),
        "BatchNorm": (True, "relu", True),
        "BatchNorm, no biases": (False, "relu", True),
        "BatchNorm, not affine": (True, None, False),
    }


@pytest.mark.parametrize("kind", quick(_kinds(), "BatchNorm, no biases"))
def test_kinds_of_blocks(kind, on_a_gpu):
    """Gradients of each sample, batched parameters and batched statistics in one graph.

    With BatchNorm those of all samples: of each PyTorch's own compiled graph fails where memory is channels_last.
    """
    bias, activation, affine = _kinds()[kind]
    block = make_block(SMALL, (2, 4, 3), bias=bias, activation=activation)
    norms = make_norms(block.weights, affine) if affine is not None else None
    tensors = leaves_of(block, norms)[1:] if norms else [*block.weights, *block.biases]
    tensors = [t.detach() for t in tensors]

    def call(x, tensors, norms=norms):
        if norms:
            return inception(x, params_of([x, *tensors], block, norms), activation=activation)
        return inception(x, InceptionParams(tuple(tensors[:6]), tuple(tensors[6:]) or None), activation=activation)

    def run(x):
        def loss(tensors, x):
            return call(x, tensors).square().sum()

        slopes = grad(loss, (0, 1))
        found = [slopes(tensors, x) if norms else vmap(slopes, (None, 0))(tensors, x[:, None])]
        found += [vmap(call, (None, 0))(x, [torch.stack([t, -t]) for t in tensors])]
        if norms:
            means = torch.stack([norms[0].mean, norms[0].mean + 1])
            found += [vmap(lambda mean: call(x, tensors, (norms[0]._replace(mean=mean), *norms[1:])))(means)]
        return found

    _assert_alike(_compiled(run)(block.x), _eagerly(run, block.x))


def test_under_autocast(on_a_gpu):
    """The reference in a graph computes in autocast's dtype, gradients come in the parameters'."""
    block, x = _block(), _x()
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = _compiled(lambda x: _of_parameters(block, x))(x), _eagerly(_of_parameters, block, x)
    for name, g in ours.items():
        assert g.dtype == torch.float32
        assert Error.of(g, theirs[name]).rms < 0.05, name


def test_a_compiled_ensemble(on_a_gpu):
    block, x = _block(), _x()
    parameters, _ = stack_module_state([_block(), FusedInception(*SMALL)])

    def run(parameters, x):
        each = vmap(grad(lambda p, x: functional_call(block, p, (x,)).square().sum()), (0, None))(parameters, x)
        return each, vmap(lambda p: functional_call(block, p, (x,)))(parameters)

    parameters = {name: p.detach() for name, p in parameters.items()}
    _assert_alike(_compiled(run)(parameters, x), _eagerly(run, parameters, x))


def test_dynamic_sizes(on_a_gpu):
    block = _block()

    def run(x):
        return vmap(grad(_loss(block)))(x)

    compiled = _compiled(run, dynamic=True)
    for shape in ((3, 2), (5, 2)):
        _assert_alike(compiled(_x(*shape)), _eagerly(run, _x(*shape)))


@pytest.mark.parametrize("name", [more("vmap"), "grad"])
def test_autograd_through_a_compiled_transform(name, on_a_gpu):
    block, x = _block(), _x()
    leaves = list(block.parameters())
    ours = _step(_compiled(lambda x: TRANSFORMS[name](block, x)), leaves, x)
    _assert_alike(ours, _eagerly(_step, lambda x: TRANSFORMS[name](block, x), leaves, x))


def test_kernels_in_autograd_through_a_compiled_vmap():
    block, x = _block(), _x()
    leaves = list(block.parameters())
    with backend("kernels"):
        ours = _step(_compiled(lambda x: vmap(lambda x: block(x))(x[None])), leaves, x)
    _assert_alike(ours, _eagerly(_step, lambda x: block(x), leaves, x))


@pytest.mark.parametrize("trainable", [True, False])
def test_vmap_of_a_compiled_function(trainable):
    """Dynamo gives up such a frame, and must not go on with the launchers below it."""
    block, x = _block().requires_grad_(trainable), _x(2, 1)
    with backend("kernels"):
        y = vmap(_compiled(lambda x: block(x), fullgraph=False))(x)
    _assert_alike(y, _eagerly(lambda x: vmap(block)(x), x))


WAYS = ("export", "strict export", "trace", "trace without grad", "trace without grad, loaded")


@pytest.fixture(scope="module", params=quick(WAYS, WAYS[0], WAYS[-1]))
def kept(request, on_a_gpu):
    """(a graph of the block that was kept in "auto", the block)."""
    return _keep(request.param), _block()


def _keep(way):
    if "export" in way:
        return torch.export.export(_block(), (_x(),), strict="strict" in way).module()
    with torch.set_grad_enabled("without grad" not in way):
        traced = torch.jit.trace(_block(), (_x(),))
    if "loaded" not in way:
        return traced
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    return torch.jit.load(file)


KEPT = {
    "autograd": lambda m, x: _step(lambda x: m(x), _by_name(m), x),
    "autograd again": lambda m, x: _step(lambda x: m(x), _by_name(m), 2 * x),
    "grad": DIFFERENTIATED["grad"],
    "vmap": lambda m, x: vmap(lambda x: m(x))(torch.stack([x, -x])),
    "vmap of grad": lambda m, x: vmap(grad(lambda x: m(x).square().sum()))(torch.stack([x, -x])),
    "autograd through vmap": lambda m, x: _step(lambda x: vmap(lambda x: m(x))(x[None]), _by_name(m), x),
    "jvp": lambda m, x: jvp(lambda x: m(x), (x,), (x + 1,)),
}


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("name", KEPT)
def test_a_graph_that_was_kept(name, kept):
    ours, block = kept
    _assert_alike(KEPT[name](ours, _x()), _eagerly(KEPT[name], block, _x()))


def test_an_exported_module_compiled_and_with_other_parameters(on_a_gpu):
    ours, block, x = _keep("export"), _block(), _x()
    _assert_alike(_compiled(grad(_loss(ours)))(x), _eagerly(grad(_loss(block)), x))
    _assert_alike(_of_parameters(ours, x), _eagerly(_of_parameters, block, x))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("way", [more("export"), "trace without grad"])
def test_kernels_demanded_of_a_graph_that_was_kept(way):
    """They run for values and in autograd; under torch.func's gradient they cannot."""
    x = _x()
    with backend("kernels"):
        ours, block = _keep(way), _block()
        for name in ("autograd", "vmap"):
            _assert_alike(KEPT[name](ours, x), KEPT[name](block, x))
        for name in ("grad", "vmap of grad", "jvp"):
            with pytest.raises(RuntimeError, match=REFUSED):
                KEPT[name](ours, x)


@pytest.mark.parametrize("name", quick(DIFFERENTIATED, "of detached parameters"))
def test_a_symbolic_trace(name, on_a_gpu):
    """Its one call of a block decides anew. What is called by its parameters' names needs the GraphModule's own."""
    block, x = _block(), _x()
    traced = torch.fx.symbolic_trace(block)
    _assert_alike(TRANSFORMS[name](traced, x), _eagerly(TRANSFORMS[name], block, x))
    _assert_alike(_compiled(lambda x: TRANSFORMS[name](traced, x))(x), _eagerly(TRANSFORMS[name], block, x))
