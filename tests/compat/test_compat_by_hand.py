"""The private operators by hand: differentiated they raise and name the way out, otherwise they are themselves."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.func import grad, jvp, vmap

from batch_norm_cases import make_norms
from checks.block_cases import SMALL, make_block
from inception_fused import FusedInception, InceptionInputError, backend
from inception_fused.block.folding import flatten
from inception_fused.op import autograd
from inception_fused.op import operators as ops
from inception_fused.testing import Error, tolerance
from marks import each_once

BOUND = tolerance(torch.float32, 10**4)
NO_DERIVATIVE = "the operator has no derivative: call inception_fused.inception"


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def _compiled(f):
    return torch.compile(f, fullgraph=True, backend="aot_eager")


def _by_hand():
    """Calls of each operator, with the tensor of which a derivative may be asked."""
    block = make_block(SMALL, (2, 4, 3))
    norms, out = flatten(make_norms(block.weights)), block.forward("auto")
    operators, bias = torch.ops.inception_fused, block.biases[0]
    saved = (block.x, *out[1:], block.weights, block.bias_dtypes, True, [True] * 13, "auto")
    return {
        "_infer": (lambda x: operators._infer(x, *block[1:], "auto"), block.x),
        "_infer.norms": (lambda x: operators._infer(x, *block[1:], "auto", *norms), block.x),
        "_forward": (lambda x: operators._forward(x, *block[1:], True, True, True, "auto")[0], block.x),
        "_forward.norms": (lambda x: operators._forward(x, *block[1:], *[True] * 3, "auto", *norms)[0], block.x),
        "_infer of a bias": (lambda b: operators._infer(*block[:2], [b, *block.biases[1:]], True, "auto"), bias),
        "_backward": (lambda dy: operators._backward(dy, *saved)[0], torch.randn_like(out[0])),
    }  # fmt: skip


def _dual(f, t):
    with forward_ad.dual_level():
        return f(forward_ad.make_dual(t, t))


def _leaf(t):
    return t.clone().requires_grad_()


ASKED = {
    "autograd": lambda f, t: f(_leaf(t)),
    "grad": lambda f, t: grad(lambda t: f(t).sum())(t),
    "vmap of grad": lambda f, t: vmap(grad(lambda t: f(t).sum()))(t[None]),
    "grad of vmap": lambda f, t: grad(lambda t: vmap(f)(t).sum())(t[None]),
    "autograd through vmap": lambda f, t: vmap(f)(_leaf(t[None])),
    "the outer of two": lambda f, t: grad(lambda s: grad(lambda r: (f(s * t) * r).sum())(torch.tensor(2.0)))(
        torch.tensor(1.0)
    ),
    "jvp": lambda f, t: jvp(f, (t,), (t,)),
    "jvp without grad": lambda f, t: torch.no_grad()(jvp)(f, (t,), (t,)),
    "dual": _dual,
    "compiled": lambda f, t: _compiled(f)(_leaf(t)),
    "compiled grad": lambda f, t: _compiled(grad(lambda t: f(t).sum()))(t),
}
UNASKED = {
    "vmap": lambda f, t: vmap(f)(t[None])[0],
    "without grad": lambda f, t: torch.no_grad()(f)(_leaf(t)),
    "vmap without grad": lambda f, t: torch.no_grad()(vmap(f))(_leaf(t)[None])[0],
    "inference mode": lambda f, t: torch.inference_mode()(f)(_leaf(t)),
    "grad of something else": lambda f, t: grad(lambda s: (s * f(t)).sum())(torch.tensor(1.0)),
    "in place under grad": lambda f, t: grad(lambda s: f(t).mul_(s).sum())(torch.tensor(1.0)),
    "without grad under grad": lambda f, t: grad(lambda t: (torch.no_grad()(f)(t).sum() * t).sum())(t).flatten()[0],
    "jvp of something else": lambda f, t: jvp(lambda s: (s * f(t)).sum(), (torch.tensor(1.0),), (torch.tensor(1.0),))[
        1
    ],
    "functionalize": lambda f, t: torch.func.functionalize(f)(t),
    "compiled": lambda f, t: _compiled(f)(t),
    "compiled vmap": lambda f, t: _compiled(vmap(f))(t[None])[0],
}


@each_once
@pytest.mark.parametrize("way", ASKED)
@pytest.mark.parametrize("operator", _by_hand())
def test_an_operator_by_hand_is_not_differentiated(operator, way):
    f, t = _by_hand()[operator]
    with pytest.raises(Exception, match=NO_DERIVATIVE) as caught:
        ASKED[way](f, t)
    if "compiled" not in way:
        assert type(caught.value) is InceptionInputError


@each_once
@pytest.mark.parametrize("way", UNASKED)
@pytest.mark.parametrize("operator", _by_hand())
def test_an_operator_by_hand_gives_what_it_gave(operator, way):
    f, t = _by_hand()[operator]
    y, truth = UNASKED[way](f, t), f(t)
    assert Error.of(y, truth if y.dim() else truth.sum()).within(BOUND)


def test_a_tangent_of_the_gradient_is_not_lost():
    """Forward mode over a backward whose forward ran the kernels before."""
    block, x = FusedInception(*SMALL), torch.randn(2, 24, 4, 3)
    tangents = []
    for wish in ("kernels", "eager"):
        leaf = _leaf(x)
        with backend(wish):
            y = block(leaf)
        with forward_ad.dual_level():
            dy = forward_ad.make_dual(torch.ones_like(y), y.detach())
            (dx,) = torch.autograd.grad(y, leaf, dy)
            tangents.append(forward_ad.unpack_dual(dx).tangent)
    assert Error.of(*tangents).within(BOUND)


def test_no_biases_as_a_compiled_binary_hands_them_over():
    """An empty list of tensors arrives as None."""
    block = make_block(SMALL, (2, 4, 3), bias=False)
    given = (block.x, block.weights, None, True)
    y, *saved = ops._forward(*given, True, True, True, "kernels")
    assert torch.equal(y, block.forward()[0])
    assert torch.equal(ops._infer(*given, "kernels"), y)
    needs = [True] * 7 + [False] * 6
    grads = ops._backward(torch.ones_like(y), block.x, *saved, block.weights, None, True, needs, "kernels")
    assert [g.numel() > 0 for g in grads] == needs
    assert torch.equal(autograd._exported(*given, "kernels"), y)
