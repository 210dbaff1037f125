"""Transforms of torch.func above each other, over a block that runs the kernels."""

import pytest
import torch
from torch.func import functional_call, grad, vmap

from inception_fused import backend
from marks import each_once
from stem_cases import fused
from test_compat_transforms import _assert_alike, _block, _eagerly, _loss, _x


def _ensemble(run):
    """run of a block with two sets of parameters, which are batched."""

    def each(m, x):
        def member(scale):
            return run(lambda x: functional_call(m, {n: p * scale for n, p in m.named_parameters()}, (x,)), x)

        return vmap(member)(torch.tensor([1.0, 2.0]))

    return each


LEVELS = {
    "vmap of vmap": lambda m, x: vmap(vmap(lambda x: m(x[None])), 1)(torch.stack([x, -x], 1)),
    "vmap of vmap of grad": lambda m, x: vmap(vmap(grad(lambda x: _loss(m)(x[None]))))(torch.stack([x, -x])),
    "vmap of grad of vmap": lambda m, x: vmap(grad(lambda x: _loss(vmap(lambda x: m(x[None])))(x)))(
        torch.stack([x, -x])
    ),
    "grad of vmap of vmap": lambda m, x: grad(_loss(vmap(vmap(lambda x: m(x[None])))))(torch.stack([x, -x])),
    "an ensemble": _ensemble(lambda m, x: vmap(lambda x: m(x[None]))(x)),
    "an ensemble's gradients": _ensemble(lambda m, x: vmap(grad(lambda x: _loss(m)(x[None])))(x)),
}


@each_once
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
@pytest.mark.parametrize("name", LEVELS)
@pytest.mark.parametrize("make", [_block, lambda: fused(pool=False)], ids=["block", "stem"])
def test_levels_over_the_kernels(name, trainable, make):
    block, x = make().requires_grad_(trainable), _x()
    with backend("kernels"):
        y = LEVELS[name](block, x)
    _assert_alike(y, _eagerly(LEVELS[name], block, x))
