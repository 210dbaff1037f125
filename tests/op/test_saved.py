"""What may be changed in place between forward and backward: all that eager allows, and nothing silently wrong."""

import pytest
import torch

from batch_norm_cases import make_norms
from checks.block_cases import SMALL, make_block
from inception_fused import (
    BatchNorm,
    FusedInception,
    Inception,
    InceptionInputError,
    InceptionParams,
    backend,
    inception,
)
from inception_fused.block.folding import flatten
from inception_fused.block.reference import CONV_NAMES, inception_reference
from inception_fused.block.tensor_lists import FIELDS
from inception_fused.op import checking
from inception_fused.testing import GRADIENT_NAMES, Error, tolerance
from marks import quick

BOUND = tolerance(torch.float32, 10**4)
WEIGHTS = GRADIENT_NAMES[1:7]

WANTED = {
    "all": lambda name: True,
    "x": lambda name: name == "x",
    "parameters": lambda name: name != "x",
    "frozen p2_2": lambda name: not name.startswith("p2_2"),
    "frozen 1x1": lambda name: name.startswith(("p2_2", "p3_2")),
    "frozen p1_1 and p4_2": lambda name: name.startswith(("p2", "p3")),
    "p4_2": lambda name: name.startswith("p4_2"),
    "biases": lambda name: name.endswith((".bias", ".beta")),
    "weights": lambda name: name.endswith(".weight"),
    "p2_1.bias": lambda name: name == "p2_1.bias",
    "p3_2.beta": lambda name: name in ("p3_2.bias", "p3_2.beta"),
    "gammas": lambda name: name.endswith(".gamma"),
    "p2_1.gamma": lambda name: name == "p2_1.gamma",
}
"""Which gradients are wanted, by name; statistics never have one."""

BESIDES = {"p4_2": {"x"}, "gammas": {"x", *WEIGHTS}, "p2_1.gamma": {"x", "p2_1.weight"}}
"""What op/saved.py says is read although eager does not keep it."""

CASES = [(wanted, normed) for wanted in WANTED for normed in (False, True) if normed or "gamma" not in wanted]


def arguments(wanted, normed):
    """({name: leaf}, eps) of a block, those that are wanted requiring gradients."""
    block = make_block(SMALL, (2, 4, 3))
    tensors, names, eps = [block.x, *block.weights, *block.biases], list(GRADIENT_NAMES), []
    if normed:
        vectors, eps = flatten(make_norms(block.weights))
        tensors += vectors
        names += [f"{name}.{field}" for field in FIELDS for name in CONV_NAMES]
    needs = [WANTED[wanted](name) and not name.endswith((".mean", ".var")) for name in names]
    leaves = [t.clone().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]
    return dict(zip(names, leaves, strict=True)), eps


def params(named, eps):
    tensors = list(named.values())[1:]
    means, variances, gammas, betas = (tensors[i : i + 6] for i in range(12, 36, 6))
    norms = tuple(BatchNorm(*t) for t in zip(gammas, betas, means, variances, eps, strict=True)) if eps else None
    return InceptionParams(tuple(tensors[:6]), tuple(tensors[6:12]), norms)


def fused(named, eps, wish="kernels"):
    with backend(wish):
        return inception(named["x"], params(named, eps))


def spoil(named, names):
    """NaN in place, which whatever reads it passes on."""
    with torch.no_grad():
        for name in names:
            named[name].fill_(float("nan"))


def some_dy(y):
    return torch.randn(y.shape, generator=torch.Generator().manual_seed(1))


def wanted_of(named):
    return [t for t in named.values() if t.requires_grad]


def gradients(y, named):
    return torch.autograd.grad(y, wanted_of(named), some_dy(y))


def truth_and_allowed(wanted, normed):
    """Eager's gradients, and the names of what may be changed before they are asked for."""
    named, eps = arguments(wanted, normed)
    truth, allowed = gradients(inception_reference(named["x"], params(named, eps)), named), set()
    for name in named:
        named, eps = arguments(wanted, normed)
        y = inception_reference(named["x"], params(named, eps))
        spoil(named, [name])
        try:
            found = gradients(y, named)
        except RuntimeError:
            continue
        assert all(torch.equal(a, b) for a, b in zip(found, truth, strict=True)), name
        allowed.add(name)
    return truth, allowed


def check(found, truth):
    for ours, theirs in zip(found, truth, strict=True):
        assert Error.of(ours, theirs).within(BOUND)


@pytest.mark.parametrize(
    ("wanted", "normed"),
    quick(CASES, ("all", True), ("frozen 1x1", False), ("biases", True), ("p2_1.gamma", True), ("frozen p2_2", False)),
)
def test_what_may_be_changed(wanted, normed):
    """All that autograd does not keep is changed at once: no less than eager allows, and nothing of it is read."""
    truth, allowed = truth_and_allowed(wanted, normed)
    named, eps = arguments(wanted, normed)
    y = fused(named, eps)
    kept = {t.data_ptr() for t in y.grad_fn.saved_tensors if t is not None and t.numel()}
    changed = {name for name, t in named.items() if t.data_ptr() not in kept}
    assert allowed - changed <= BESIDES.get(wanted, set())
    spoil(named, changed)
    check(gradients(y, named), truth)


@pytest.mark.parametrize(("wanted", "normed"), quick(CASES, ("all", True), ("frozen 1x1", False)))
def test_eager_path_on_a_cpu(wanted, normed):
    truth, allowed = truth_and_allowed(wanted, normed)
    named, eps = arguments(wanted, normed)
    y = fused(named, eps, "auto")
    spoil(named, allowed)
    check(gradients(y, named), truth)


@pytest.mark.parametrize(("name", "normed"), [("p2_2.weight", False), ("x", False), ("p3_1.gamma", True)])
def test_what_is_read_raises(name, normed):
    named, eps = arguments("all", normed)
    y = fused(named, eps)
    spoil(named, [name])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        gradients(y, named)


@pytest.mark.parametrize(
    ("wanted", "normed"), quick(CASES, ("all", False), ("all", True), ("frozen 1x1", False), ("biases", True))
)
def test_compiled(wanted, normed):
    torch._dynamo.reset()
    truth, allowed = truth_and_allowed(wanted, normed)
    named, eps = arguments(wanted, normed)
    with backend("kernels"):
        y = torch.compile(inception, fullgraph=True, backend="aot_eager")(named["x"], params(named, eps))
    spoil(named, allowed - BESIDES.get(wanted, set()))
    check(gradients(y, named), truth)


def second_order(y, named):
    """First gradients, and those of a penalty on them, None where there is none."""
    dy = some_dy(y).requires_grad_()
    firsts = torch.autograd.grad(y, wanted_of(named), dy, create_graph=True)
    penalty = sum(g.square().sum() for g in firsts)
    return [*firsts, *torch.autograd.grad(penalty, [dy, *wanted_of(named)], allow_unused=True)]


@pytest.mark.parametrize(
    ("wanted", "normed"),
    quick(CASES, ("all", False), ("all", True), ("frozen 1x1", False), ("biases", True), ("p2_1.gamma", True)),
)
def test_second_order(wanted, normed):
    """With every bias and beta changed; gradients of them too."""
    results = []
    for run in (inception_reference, inception):
        named, eps = arguments(wanted, normed)
        with backend("kernels"):
            y = run(named["x"], params(named, eps))
        spoil(named, [name for name in named if name.endswith((".bias", ".beta"))])
        results.append([torch.zeros(1) if g is None else g for g in second_order(y, named)])
    for i, (theirs, ours) in enumerate(zip(*results, strict=True)):
        # Of a gradient that is zero throughout one of the two may know that nobody needs it.
        if theirs.any() or ours.any():
            assert Error.of(ours, theirs).within(BOUND), i


@pytest.mark.parametrize("several", [False, True])
def test_a_bias_that_was_computed(several):
    """It has the history of the forward, and one that was written again has another."""
    results = []
    for wish in ("kernels", "eager"):
        named, eps = arguments("all", False)
        leaf = named["p2_1.bias"]
        named["p2_1.bias"] = 2 * leaf
        y = fused(named, eps, wish)
        dy = torch.ones(3, *y.shape) if several else torch.ones_like(y)
        results.append(torch.autograd.grad(y, leaf, dy, create_graph=True, is_grads_batched=several)[0])
    assert Error.of(*results).within(BOUND)
    named["p2_1.bias"] = 2 * leaf
    y = fused(named, eps)
    named["p2_1.bias"].mul_(3)
    first = torch.autograd.grad(y.sum(), leaf, retain_graph=True)[0]
    assert first.shape == leaf.shape
    with pytest.raises(
        InceptionInputError, match=r"params: got a bias or beta \(8,\) that was computed and then modif"
    ):
        torch.autograd.grad(y.sum(), leaf, create_graph=True)


def test_a_step_of_the_biases_between_two_backward_passes():
    results = []
    for kind, wish in ((FusedInception, "kernels"), (Inception, "auto")):
        torch.manual_seed(3)
        block = kind(*SMALL)
        x = torch.randn(2, 24, 4, 3, requires_grad=True)
        optimizer = torch.optim.SGD([p for name, p in block.named_parameters() if name.endswith("bias")], lr=0.5)
        with backend(wish), checking.checked(wish == "kernels"):
            y = block(x)
            for _ in range(2):
                y.square().sum().backward(retain_graph=True)
                optimizer.step()
        results.append([x.grad, *block.parameters(), *[p.grad for p in block.parameters()]])
    for ours, theirs in zip(*results, strict=True):
        assert Error.of(ours, theirs).within(BOUND)


def test_what_is_not_kept_is_not_held():
    """The first block of a network of which only the windows learn holds neither x nor the frozen weights."""
    named, eps = arguments("frozen 1x1", False)
    y = fused(named, eps)
    held = sum(t.untyped_storage().nbytes() for t in y.grad_fn.saved_tensors if t.dtype == torch.float32)
    rows, sizes = 2 * 4 * 3, [named[f"{name}.weight"].numel() for name in ("p2_2", "p3_2")]
    assert held == 4 * (rows * 16 + sum(sizes) + 5), "r, two weights, five stand-ins of one element"
