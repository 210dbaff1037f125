"""BatchNorm in eval mode behind every convolution: each slice and gradient against float64, every way of calling."""

from itertools import chain, product

import pytest
import torch
import torch.nn.functional as F
from cases import (
    DTYPES,
    GRADIENT_NAMES,
    ODD,
    REDUCE_24,
    SMALL,
    TWICE_ROUNDED,
    backward_truth,
    check_bits,
    in_layout,
    make_block,
)
from torch import nn

from inception_fused import (
    BatchNorm,
    InceptionConfig,
    InceptionInputError,
    InceptionParams,
    KernelError,
    backend,
    function,
    inception,
    ops,
    replay,
)
from inception_fused.folding import FIELDS, flatten, operator_needs, split
from inception_fused.gradients import saves
from inception_fused.kernels.submit import count
from inception_fused.reference import CONV_NAMES, inception_reference
from inception_fused.testing import Error, tolerance

USUAL_DTYPES = list(product(DTYPES, [torch.float32]))
OTHER_DTYPES = [
    (torch.float16, torch.float16),
    (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float64),
]
"""Of the block and of BatchNorm's vectors."""

KINDS = list(product([True, False], [True, False]))
"""Whether there are biases, and whether BatchNorm is affine."""

CASES = [
    *((*dtypes, ODD, *kind) for dtypes, kind in product(USUAL_DTYPES, KINDS)),
    *((*dtypes, ODD, True, True) for dtypes in OTHER_DTYPES),
    *((*dtypes, REDUCE_24, False, True) for dtypes in USUAL_DTYPES),
]


def make_norms(weights, affine=True, dtype=torch.float32, seed=1):
    """Six BatchNorms with eps of their own; gamma has negative values and zeros, and is of one size elsewhere: where a
    channel is far larger than the others, its one rounding is beyond what Error's peak allows for."""
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for i, w in enumerate(weights):
        gamma, beta, mean = torch.randn(3, w.shape[0], generator=generator)
        gamma = gamma.sign() * (gamma.abs() % 1 + 0.5)
        gamma[1::5] = 0
        # So that ReLU leaves something of the channels that gamma silences.
        beta[1::5] = beta[1::5].abs()
        var = torch.rand(w.shape[0], generator=generator) + 0.5
        vectors = [gamma if affine else None, beta if affine else None, 0.3 * mean, var]
        norms.append(BatchNorm(*(t if t is None else t.to(dtype) for t in vectors), 2.0 ** -(4 + i)))
    return tuple(norms)


def forward(block, norms, wish="kernels", save=True):
    """The operator: y, r, bits, taps."""
    return torch.ops.inception_fused._forward(*block, save, save and block.relu, save, wish, *flatten(norms))


def leaves_of(block, norms, needs=None):
    """x, weights, biases, gammas and betas that require gradients, where ``needs`` names them."""
    affine = flatten(norms)[0][12:]
    names = names_of(block, norms)
    tensors = [block.x, *block.weights, *block.biases, *affine]
    return [
        t.detach().clone().requires_grad_(needs is None or name in needs)
        for name, t in zip(names, tensors, strict=True)
    ]


def names_of(block, norms):
    names = GRADIENT_NAMES[: 7 + len(block.biases)]
    if norms[0].gamma is not None:
        names = names + [f"{name} batch_norm.{field}" for field in ("gamma", "beta") for name in CONV_NAMES]
    return names


def params_of(leaves, block, norms):
    """InceptionParams of :func:`leaves_of` with the statistics of norms."""
    weights, rest = tuple(leaves[1:7]), leaves[7:]
    biases, affine = tuple(rest[: len(block.biases)]), rest[len(block.biases) :]
    if affine:
        norms = tuple(n._replace(gamma=g, beta=b) for n, g, b in zip(norms, affine[:6], affine[6:], strict=True))
    return InceptionParams(weights, biases or None, norms)


def call(leaves, block, norms, wish="kernels"):
    with backend(wish):
        return inception(
            leaves[0], params_of(leaves, block, norms), activation="relu" if block.relu else None
        )  # fmt: skip


def doubled(norm):
    return BatchNorm(*(t if t is None else t.double() for t in norm[:4]), norm.eps)


def conv_norm(x, w, bias, norm, relu=True):
    """Convolution, BatchNorm and ReLU in float64."""
    y = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), padding=w.shape[-1] // 2)
    norm = doubled(norm)
    y = F.batch_norm(y, norm.mean, norm.var, norm.gamma, norm.beta, eps=norm.eps)
    return F.relu(y) if relu else y


def check_each_slice(block, norms, out, factor=1):
    """Every convolution's result against float64 on the very operand that its kernel read; the bits exactly."""
    y, r, bits, _ = out
    shape, biases = block.shape, block.biases or [None] * 6
    images = (shape.n, shape.h, shape.w)
    r3, r5 = (part.rows(shape.gemm_m).unflatten(0, images).permute(0, 3, 1, 2) for part in shape.r_slices(r))
    pooled = F.max_pool2d(block.x.double(), 3, stride=1, padding=1)
    y1, y2, y3, y4 = y.split(shape.branch_channels, dim=1)
    results = [(y1, block.x), (r3, block.x), (y2, r3), (r5, block.x), (y3, r5), (y4, pooled)]
    for name, (result, operand), w, bias, norm in zip(CONV_NAMES, results, block.weights, biases, norms, strict=True):
        error = Error.of(result, conv_norm(operand, w, bias, norm, block.relu))
        bound = factor * tolerance(y.dtype, w[0].numel())
        assert error.within(bound), f"{name}: {error}, bound {bound:.2e}"
    if block.relu:
        check_bits(bits, y, shape)


def gradients_truth(block, norms, out, dy):
    """Float64 gradients by autograd, through the masks, r and arg-max of the forward's outputs."""
    leaves = [t.detach().double().requires_grad_() for t in leaves_of(block, norms)]
    _, weights, biases, double_norms = leaves[0], *params_of(leaves, block, [doubled(n) for n in norms])
    folded, shifts = [], []
    for w, bias, norm in zip(weights, biases or [0] * 6, double_norms, strict=True):
        scale = (1 if norm.gamma is None else norm.gamma) / (norm.var + norm.eps).sqrt()
        folded.append(w * scale[:, None, None, None])
        shifts.append((bias - norm.mean) * scale + (0 if norm.beta is None else norm.beta))
    given = block._replace(weights=[w.detach() for w in folded], biases=[s.detach() for s in shifts])
    dx, *found = backward_truth(given, out, dy)
    outputs = [(t, g) for t, g in zip([*folded, *shifts], found, strict=True) if t.requires_grad]
    return [dx, *torch.autograd.grad([t for t, _ in outputs], leaves[1:], [g for _, g in outputs])]


def size_of(truth):
    """Of the elements by filter and by input channel, which BatchNorm makes as different as its scales are."""
    if truth.dim() == 1:
        return torch.ones_like(truth)
    filters = truth.square().mean((1, 2, 3), keepdim=True).sqrt()
    filters[filters == 0] = 1
    channels = (truth / filters).square().mean((0, 2, 3), keepdim=True).sqrt()
    channels[channels == 0] = 1
    return filters * channels


def check_each_gradient(block, norms, grads, out, dy, extra=0.0):
    """Each alone against float64; extra: operand rounding beyond that of tolerance()."""
    shape = block.shape
    widest = max(w[0].numel() * shape.k // w.shape[0] for w in block.weights)
    bound = tolerance(block.x.dtype, max(shape.gemm_m, widest)) + extra
    names = names_of(block, norms)
    for name, g, truth in zip(names, grads, gradients_truth(block, norms, out, dy), strict=True):
        # gamma of 0: nothing passes, and nothing of it belongs to the scale of the others.
        some = truth != 0
        assert not g[~some].any(), f"gradient of {name}: not zero where it must be"
        twice = name in TWICE_ROUNDED or name.split()[0] in ("p2_1", "p3_1")
        limit = bound * (2 if twice else 1) + (tolerance(g.dtype, 1) if g.dtype != dy.dtype else 0)
        size = size_of(truth)
        error = Error.of((g / size)[some], (truth / size)[some])
        assert error.within(limit), f"gradient of {name}: {error}, bound {limit:.2e}"


@pytest.mark.parametrize(("dtype", "vectors", "config", "bias", "affine"), CASES)
def test_each_slice_and_gradient(dtype, vectors, config, bias, affine):
    block = make_block(config, (2, 5, 4), dtype, bias=bias)
    norms = make_norms(block.weights, affine, vectors)
    out = forward(block, norms)
    check_each_slice(block, norms, out)
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms)
    assert torch.equal(y, out[0])
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    check_each_gradient(block, norms, grads, out, dy)
    for g, t in zip(grads[1:], leaves[1:], strict=True):
        assert (g.dtype, g.stride()) == (t.dtype, t.stride())


@pytest.mark.parametrize("options", [{"activation": None}, {"branch3": 3}], ids=str)
def test_variants(options):
    block = make_block(SMALL, (2, 5, 4), torch.bfloat16, **options)
    norms = make_norms(block.weights)
    out = forward(block, norms)
    check_each_slice(block, norms, out)
    leaves, dy = leaves_of(block, norms), torch.randn_like(out[0])
    check_each_gradient(block, norms, torch.autograd.grad(call(leaves, block, norms), leaves, dy), out, dy)


@pytest.mark.parametrize("layout", ["KRSC", "strided", "transposed"])
def test_layouts_of_weights_and_vectors(layout):
    block = make_block(SMALL, (2, 5, 4))
    block = block._replace(weights=in_layout(block.weights, layout))
    norms = [BatchNorm(*(torch.stack((t, t), dim=1)[:, 0] for t in n[:4]), n.eps) for n in make_norms(block.weights)]
    check_each_slice(block, norms, forward(block, norms))
    leaves = [block.x, *block.weights, *block.biases, *flatten(norms)[0][12:]]
    leaves = [t.requires_grad_() for t in leaves]
    y = call(leaves, block, norms)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    check_each_gradient(block, norms, grads, forward(block, norms), dy)
    assert all(g.stride() == torch.empty_like(t).stride() for g, t in zip(grads[1:], leaves[1:], strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("wish", "affine"), [("eager", True), ("eager", False), *((f"K{k}=triton", True) for k in (1, 2, 3, 4))]
)
def test_twins(wish, affine, dtype):
    """In ATen a product is rounded to dtype before it is scaled, which a mean beside it makes larger."""
    block = make_block(SMALL, (2, 4, 5), dtype)
    norms = make_norms(block.weights, affine)
    with count() as names:
        out = forward(block, norms, wish)
    assert len(names) == (0 if wish == "eager" else 2), "pack and the kernel"
    check_each_slice(block, norms, out, factor=2)
    dy = torch.randn_like(out[0])
    leaves = leaves_of(block, norms)
    if wish != "eager":
        grads = torch.autograd.grad(call(leaves, block, norms, wish), leaves, dy)
        check_each_gradient(block, norms, grads, out, dy, tolerance(dtype, 1))


def test_the_compiled_kernel(installed):
    block = make_block(REDUCE_24, (1, 5, 4), torch.bfloat16)
    norms = make_norms(block.weights)
    wish = "K1=native,K2=triton,K3=triton,K4=triton"
    for _ in range(3):
        installed.calls()
        out = forward(block, norms, wish)
        assert [name for name, _ in installed.calls()].count("launch") == 1
        check_each_slice(block, norms, out)


@pytest.mark.parametrize("fields", [("gamma",), ("beta",), ("weight",), ("bias",), ("x",), ("gamma", "x")], ids=str)
def test_only_the_wanted_gradients(fields):
    block = make_block(SMALL, (2, 4, 5))
    norms = make_norms(block.weights)
    names = names_of(block, norms)
    needs = {name for name in names if (name == "x" and "x" in fields) or name.split(".")[-1] in fields}
    full, some = leaves_of(block, norms), leaves_of(block, norms, needs)
    y = call(full, block, norms)
    dy = torch.randn_like(y)
    y.backward(dy)
    y = call(some, block, norms)
    held = [t for t in y.grad_fn.saved_tensors if t is not None and t.dtype == torch.uint8 and t.numel()]
    y.backward(dy)
    flags = [name in needs for name in names]
    flags[13:13] = [False] * 12
    assert len(held) == sum(saves(operator_needs(flags, [1e-5] * 6), True)[1:])
    for name, a, b in zip(names, some, full, strict=True):
        assert (a.grad is not None) == (name in needs), name
        if name in needs:
            assert torch.equal(a.grad, b.grad), name


def test_what_the_operator_is_asked_for():
    """gamma wants W and shift, beta shift, of its own convolution."""
    nothing = [False] * 13
    for affine, biases in ((24, 6), (24, 0), (12, 6), (12, 0)):
        for i in range(7 + biases + affine):
            needs = [j == i for j in range(7 + biases + affine)]
            k = (i - 7 - biases) % 6
            expected = list(nothing)
            for place in (
                (i,) if i < 7 + biases
                else () if i < 19 + biases
                else (1 + k, 7 + k) if i < 25 + biases
                else (7 + k,)
            ):  # fmt: skip
                expected[place] = True
            assert operator_needs(needs, [1e-5] * 6) == expected
        tensors = list(range(6 + biases + affine))
        parts = split(tensors, [1e-5] * 6)
        assert [len(part) for part in parts] == [6, biases, affine]
        assert list(chain(*parts)) == tensors
    assert operator_needs([True] * 7, []) == [True] * 7 + [False] * 6


@pytest.mark.parametrize(("bias", "affine"), KINDS)
def test_launches(bias, affine):
    """pack and four, whether the weights want it or not; eleven for the gradients."""
    block = make_block(SMALL, (2, 4, 5), bias=bias)
    for layout in ("KCRS", "KRSC"):
        given = block._replace(weights=in_layout(block.weights, layout))
        norms = make_norms(block.weights, affine)
        leaves = leaves_of(given, norms)
        with count() as names:
            y = call(leaves, given, norms)
        assert len(names) == 5
        assert names[0].startswith("pack_kernel")
        with count() as names:
            y.sum().backward()
        assert len(names) == 11
        with torch.no_grad(), count() as names:
            call(leaves, given, norms)
        assert len(names) == 5


TINY = InceptionConfig(3, 2, (2, 3), (2, 2), 2)


@pytest.mark.parametrize(("bias", "affine"), [(True, True), (False, False)])
def test_gradcheck_in_float64(bias, affine):
    """Gradients of the kernels by finite differences, and theirs through the reference."""
    block = make_block(TINY, (1, 3, 2), torch.float64, bias=bias)
    norms = make_norms(block.weights, affine, torch.float64)
    leaves = leaves_of(block, norms)

    def run(*leaves):
        return inception(leaves[0], params_of(list(leaves), block, norms))

    with backend("kernels"):
        assert torch.autograd.gradcheck(run, leaves, fast_mode=True)
    second = {}
    for wish in ("kernels", "eager"):
        with backend(wish):
            firsts = torch.autograd.grad(run(*leaves).square().sum(), leaves, create_graph=True)
            second[wish] = torch.autograd.grad(sum(g.square().sum() for g in firsts), leaves)
    for ours, truth in zip(second["kernels"], second["eager"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("vectors", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_second_order_beside_16_bits(vectors):
    """The reference takes vectors of any dtype there too."""
    block = make_block(SMALL, (1, 3, 3), torch.bfloat16, activation=None)
    norms = make_norms(block.weights, True, vectors)
    results = []
    for wish in ("kernels", "eager"):
        leaves = leaves_of(block, norms)
        (dx,) = torch.autograd.grad(call(leaves, block, norms, wish).square().sum(), leaves[0], create_graph=True)
        dx.float().square().sum().backward()
        results.append([t.grad for t in leaves])
    for a, b in zip(*results, strict=True):
        assert a.dtype == b.dtype
        assert Error.of(a, b).within(10 * tolerance(torch.bfloat16, 10**3))


@pytest.mark.parametrize(("affine", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_from_the_third_call_on(affine, dtype, monkeypatch):
    """From memory, bit for bit, and it sees statistics that were written through .data."""
    block = make_block(SMALL, (2, 5, 4), dtype)
    norms = make_norms(block.weights, affine)
    leaves = leaves_of(block, norms)
    params = params_of(leaves, block, norms)
    plans = []
    for name in ("forward", "backward"):
        plan = getattr(ops, f"_planned_{name}")
        monkeypatch.setattr(
            ops, f"_planned_{name}", lambda *a, plan=plan, name=name: plans.append(name) or plan(*a)
        )  # fmt: skip
    runs = []
    for seed in range(5):
        if seed == 3:
            params.batch_norms[1].mean.data.add_(1)
            params.batch_norms[4].var.data.mul_(3)
        with backend("kernels"):
            y = inception(leaves[0], params)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(5)).to(dtype)
        runs.append([y, *torch.autograd.grad(y, leaves, dy)])
        if seed == 3:
            out = forward(block, norms)
            assert torch.equal(y, out[0])
            check_each_slice(block, norms, out)
            check_each_gradient(block, norms, runs[-1][1:], out, dy)
    assert plans == ["forward", "backward"] * 2
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[2], strict=True))
    assert not torch.equal(runs[2][0], runs[3][0])
    with torch.no_grad(), backend("kernels"):
        ys = [inception(leaves[0], params) for _ in range(3)]
    assert all(torch.equal(y, runs[4][0]) for y in ys)
    assert plans.count("forward") == 4


def test_what_makes_a_kind():
    """eps and having gamma at all are no property of the tensors before them."""
    block = make_block(SMALL, (1, 4, 3))
    for _ in range(3):
        for norms in (
            make_norms(block.weights),
            make_norms(block.weights, affine=False),
            [n._replace(eps=0.5) for n in make_norms(block.weights)],
            make_norms(block.weights, dtype=torch.float16),
        ):
            check_each_slice(block, norms, forward(block, norms))
        plain = block.forward()
        assert torch.equal(plain[0], make_block(SMALL, (1, 4, 3)).forward()[0])
    assert sum(type(recipe) is replay.Recipe for recipe in replay._recipes.values()) == 5


@pytest.mark.parametrize("affine", [True, False])
def test_opcheck(affine):
    block = make_block(SMALL, (2, 4, 3))
    more = flatten(make_norms(block.weights, affine))
    args = (block.x, block.weights, block.biases, True)
    for save in (True, False):
        torch.library.opcheck(
            torch.ops.inception_fused._forward.norms, (*args, save, save, save, "kernels", *more)
        )  # fmt: skip
    torch.library.opcheck(torch.ops.inception_fused._infer.norms, (*args, "kernels", *more))


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("wish", ["kernels", "auto"])
def test_compiles_as_one_graph(wish, affine):
    torch._dynamo.reset()
    block = make_block(SMALL, (2, 4, 3))
    norms = make_norms(block.weights, affine)
    results = []
    for compiled in (False, True):
        leaves = leaves_of(block, norms)

        def run(x, params):
            return inception(x, params).square().sum()

        run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        with backend(wish):
            loss = run(leaves[0], params_of(leaves, block, norms))
            results.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*results, strict=True):
        assert Error.of(a, b).within(tolerance(torch.float32, 10**3))
        assert a.stride() == b.stride()


@pytest.mark.parametrize("affine", [True, False])
def test_torch_func(affine):
    """Per-sample gradients, an ensemble, statistics that differ from item to item, and a batch of x."""
    block = make_block(SMALL, (2, 4, 3))
    norms = make_norms(block.weights, affine)
    xs = torch.stack([block.x, 2 * block.x, -block.x])
    leaves = [t.detach() for t in leaves_of(block, norms)[1:]]
    ensemble = [torch.stack([t, 2 * t]) for t in leaves]
    stacked = torch.stack([norms[0].mean, norms[0].mean + 1])

    def loss(leaves, x):
        return inception(x, params_of([x, *leaves], block, norms)).square().sum()

    def shifted(mean):
        return inception(block.x, params_of([block.x, *leaves], block, (norms[0]._replace(mean=mean), *norms[1:])))

    results = []
    for wish in ("kernels", "eager"):
        with backend(wish):
            grads = torch.func.grad(loss)(leaves, block.x)
            per_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(leaves, xs)
            outs = torch.func.vmap(loss, in_dims=(0, None))(ensemble, block.x)
            batched = torch.func.vmap(lambda x: inception(x, params_of([x, *leaves], block, norms)))(xs)
            moved = torch.func.vmap(shifted)(stacked)
        results.append([*grads, *per_sample, outs, batched, moved])
    for ours, theirs in zip(*results, strict=True):
        assert Error.of(ours, theirs).within(tolerance(torch.float32, 10**4))


def test_statistics_that_are_to_be_learnt():
    """PyTorch has no gradient of them either, and says so."""
    block = make_block(SMALL, (1, 4, 3))
    norms = make_norms(block.weights)
    leaves = leaves_of(block, norms)
    for field in ("mean", "var"):
        learnt = list(norms)
        learnt[2] = norms[2]._replace(**{field: getattr(norms[2], field).clone().requires_grad_()})
        with pytest.raises(KernelError, match="a gradient of BatchNorm's mean or var is wanted"):
            call(leaves, block, learnt)
        with pytest.raises(RuntimeError, match="not differentiable with respect to argument 'running_"):
            call(leaves, block, learnt, "auto")
        with torch.no_grad():
            assert torch.equal(call(leaves, block, learnt), forward(block, norms)[0])
        # The Function itself, which finds out when its gradients are asked for.
        vectors, eps = flatten(learnt)
        y, *_ = function.FusedInceptionFunction.apply(
            block.x, True, "kernels", (True, True, True), *block.weights, *block.biases, *vectors, tuple(eps)
        )
        with pytest.raises(RuntimeError, match="not differentiable"):
            torch.autograd.grad(y.sum(), getattr(learnt[2], field))


def test_affine_and_not_in_one_block():
    block = make_block(SMALL, (1, 4, 3))
    norms = make_norms(block.weights)
    plain = norms[3]._replace(gamma=None, beta=None)
    for one in (plain, norms[3]._replace(gamma=None), norms[3]._replace(beta=None)):
        mixed = (*norms[:3], one, *norms[4:])
        params = InceptionParams(tuple(block.weights), tuple(block.biases), mixed)
        with backend("kernels"), pytest.raises(KernelError, match="some BatchNorms have gamma or beta and some have"):
            inception(block.x, params)
        truth = inception_reference(block.x, params)
        assert Error.of(inception(block.x, params), truth).within(tolerance(torch.float32, 10**3))
    everywhere = tuple(n._replace(beta=None) for n in norms)
    with backend("kernels"), pytest.raises(KernelError, match="some BatchNorms have gamma or beta and some have"):
        inception(block.x, InceptionParams(tuple(block.weights), tuple(block.biases), everywhere))


@pytest.mark.parametrize(("dtype", "vectors"), USUAL_DTYPES + OTHER_DTYPES, ids=str)
def test_the_reference(dtype, vectors):
    """As the modules would compute it, in any dtypes, and on the path of a CPU in channels_last memory."""
    block = make_block(ODD, (2, 5, 4), dtype)
    norms = make_norms(block.weights, True, vectors)
    params = InceptionParams(tuple(block.weights), tuple(block.biases), norms)

    def conv(x, i):
        module = nn.Sequential(nn.Conv2d(*block.weights[i].shape[1::-1], block.weights[i].shape[2], padding="same"))
        module.append(nn.BatchNorm2d(block.weights[i].shape[0], eps=norms[i].eps)).append(nn.ReLU()).double().eval()
        names = {"0.weight": block.weights[i], "0.bias": block.biases[i]}
        names |= {"1.weight": norms[i].gamma, "1.bias": norms[i].beta}
        names |= {"1.running_mean": norms[i].mean, "1.running_var": norms[i].var}
        module.load_state_dict(names, strict=False)
        return module(x)

    x = block.x.double()
    pooled = F.max_pool2d(x, 3, stride=1, padding=1)
    truth = torch.cat([conv(x, 0), conv(conv(x, 1), 2), conv(conv(x, 3), 4), conv(pooled, 5)], dim=1)
    for y in (inception_reference(block.x, params), inception(block.x, params)):
        assert y.dtype == dtype
        for ours, part in zip(*(t.split(block.shape.branch_channels, dim=1) for t in (y, truth)), strict=True):
            assert Error.of(ours, part).within(4 * tolerance(dtype, 10**3))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_autocast():
    block = make_block(SMALL, (2, 5, 4))
    norms = make_norms(block.weights)
    leaves = leaves_of(block, norms)
    with torch.autocast("cpu", torch.bfloat16):
        y = call(leaves, block, norms)
    assert y.dtype == torch.bfloat16
    rounded = block._replace(x=block.x.bfloat16(), weights=[w.bfloat16() for w in block.weights])
    out = forward(rounded, norms)
    check_each_slice(rounded, norms, out)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, leaves, dy)
    assert {g.dtype for g in grads} == {torch.float32}
    # gamma's gradient is that of the weights as they were given.
    check_each_gradient(rounded, norms, grads, out, dy, tolerance(torch.bfloat16, 1))


def test_an_empty_batch():
    block = make_block(SMALL, (0, 4, 3))
    norms = make_norms(block.weights)
    leaves = leaves_of(block, norms)
    y = call(leaves, block, norms)
    assert y.shape == (0, SMALL.out_channels, 4, 3)
    assert not any(g.any() for g in torch.autograd.grad(y.sum(), leaves[1:]))


def wrong(index=1, **changes):
    """A call of SMALL's block with one BatchNorm changed."""
    block = make_block(SMALL, (1, 3, 3))
    norms = list(make_norms(block.weights))
    norms[index] = norms[index]._replace(**changes)
    return lambda: inception(block.x, InceptionParams(tuple(block.weights), tuple(block.biases), tuple(norms)))


def wrong_norms(change):
    block = make_block(SMALL, (1, 3, 3))
    norms = change(make_norms(block.weights))
    return lambda: inception(block.x, InceptionParams(tuple(block.weights), None, norms))


WRONG_CALLS = {
    "p2_1 batch_norm.mean: got shape (7,), wants (8,)": wrong(mean=torch.zeros(7)),
    "p2_1 batch_norm.var: got shape (1, 8), wants (8,)": wrong(var=torch.ones(1, 8)),
    "p4_2 batch_norm.gamma: got shape (9,), wants (8,)": wrong(5, gamma=torch.zeros(9)),
    "p2_2 batch_norm.beta: got shape (), wants (24,)": wrong(2, beta=torch.zeros(())),
    "x: got device cpu, p2_1 batch_norm.beta is on meta": wrong(beta=torch.zeros(8, device="meta")),
    "p2_1 batch_norm.mean: got torch.int64, wants a floating": wrong(mean=torch.zeros(8).long()),
    "p2_1 batch_norm.gamma: got torch.int32, wants a floating": wrong(gamma=torch.zeros(8).int()),
    "p2_1 batch_norm.var: got NoneType, wants a tensor": wrong(var=None),
    "p2_1 batch_norm.gamma: got float, wants a tensor": wrong(gamma=1.0),
    "p2_1 batch_norm.eps: got -1.0, wants a number of at least 0": wrong(eps=-1.0),
    "p2_1 batch_norm.eps: got nan, wants a number": wrong(eps=float("nan")),
    "p2_1 batch_norm.eps: got None, wants a number": wrong(eps=None),
    "params.batch_norms: got 5 items, wants six BatchNorm": wrong_norms(lambda n: n[:5]),
    "params.batch_norms: got 0 items, wants six BatchNorm": wrong_norms(lambda n: ()),
    "params.batch_norms: got BatchNorm2d, wants six BatchNorm": wrong_norms(lambda n: nn.BatchNorm2d(8)),
    "params.batch_norms: got tuple for p3_1, wants six BatchNorm": wrong_norms(lambda n: (*n[:3], tuple(n[3]), *n[4:])),
}


@pytest.mark.parametrize("wish", ["auto", "kernels"])
@pytest.mark.parametrize("words", WRONG_CALLS)
def test_wrong_call(words, wish):
    for _ in range(3):
        with backend(wish), pytest.raises(InceptionInputError) as caught:
            WRONG_CALLS[words]()
        assert words in str(caught.value)


@pytest.mark.parametrize("eps", [0, 1, 0.0])
def test_eps_that_are_odd_but_right(eps):
    block = make_block(SMALL, (1, 4, 3))
    norms = [n._replace(eps=eps) for n in make_norms(block.weights)]
    check_each_slice(block, norms, forward(block, norms))
    with backend("kernels"):
        y = inception(block.x, InceptionParams(tuple(block.weights), tuple(block.biases), norms))
    assert torch.equal(y, forward(block, norms)[0])


def test_the_operators_check_their_lists():
    block = make_block(SMALL, (1, 3, 3))
    norms, eps = flatten(make_norms(block.weights))
    for given, words in (
        ((norms[:18], eps), "norms: got 18 and 6 eps, wants 12 or 24"),
        ((norms, eps[:5]), "norms: got 24 and 5 eps"),
        ((norms, []), "norms: got 24 and 0 eps"),
        (([*norms[:23], norms[0]], eps), "p4_2 batch_norm.beta: got shape .16,., wants .8,."),
    ):
        with pytest.raises(InceptionInputError, match=words):
            torch.ops.inception_fused._infer(*block, "kernels", *given)
    assert FIELDS == ("mean", "var", "gamma", "beta")


@pytest.mark.parametrize("before", [0, 3], ids=["planned", "remembered"])
def test_what_was_swapped_between_forward_and_backward(before):
    block = make_block(SMALL, (2, 5, 4))
    for i in range(before + 1):
        norms = make_norms(block.weights)
        leaves = leaves_of(block, norms)
        y = call(leaves, block, norms)
        if i < before:
            y.sum().backward()
    norms[2].var.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()
