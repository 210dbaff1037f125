"""Blocks with BatchNorm in eval mode, what they should compute, and the checks of each slice and gradient."""

from itertools import product

import torch
import torch.nn.functional as F

from checks.block_cases import DTYPES, ODD, REDUCE_24, backward_truth, check_bits, products
from inception_fused import BatchNorm, InceptionParams, backend, inception
from inception_fused.block import chains, folding
from inception_fused.testing import Error, gradient_names, tolerance

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
    """One BatchNorm a convolution, with eps of their own; gamma has negative values and zeros, and is of one size
    elsewhere: where a channel is far larger than the others, its one rounding is beyond what Error's peak allows for.
    """
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


def partial_norms(weights, dtype=torch.float32):
    """BatchNorm of every kind beside none: behind p1_1 it is affine, behind p2_1 none, behind p2_2 neither gamma nor
    beta, behind p3_1 no beta, behind the last none, with an eps that is an integer."""
    p1_1, _, p2_2, p3_1, *rest, _ = make_norms(weights, dtype=dtype)
    bare, half = p2_2._replace(gamma=None, beta=None), p3_1._replace(beta=None)
    return (p1_1._replace(eps=2), None, bare, half, *rest, None)


def partly_biased(block):
    """Without a bias of p1_1 and p2_1, of which the first has a BatchNorm in :func:`partial_norms`."""
    return block._replace(biases=[None, None, *block.biases[2:]])


def operands(block, norms):
    """As the operators take them."""
    return folding.tensors_of(InceptionParams(tuple(block.weights), tuple(block.biases) or None, norms))


def forward(block, norms, wish="kernels", save=True):
    """The operator: y, r, bits, taps."""
    weights, biases, vectors, eps = operands(block, norms)
    saves = save, save and block.relu, save
    return torch.ops.inception_fused._forward.norms(block.x, weights, biases, block.relu, *saves, wish, vectors, eps)


def affine_of(norms):
    """((place, field, vector) of every gamma, then of every beta that is there."""
    return [
        (i, field, getattr(norm, field))
        for field in ("gamma", "beta")
        for i, norm in enumerate(norms or ())
        if norm is not None and getattr(norm, field) is not None
    ]


def leaves_of(block, norms, needs=None):
    """x, weights, biases, gammas and betas that are there and require gradients, where ``needs`` names them."""
    names = names_of(block, norms)
    biases = [b for b in block.biases if b is not None]
    tensors = [block.x, *block.weights, *biases, *(t for *_, t in affine_of(norms))]
    return [
        t.detach().clone().requires_grad_(needs is None or name in needs)
        for name, t in zip(names, tensors, strict=True)
    ]


def names_of(block, norms):
    there = [True, *(b is not None for b in (*block.weights, *block.biases))]
    names = [name for name, kept in zip(gradient_names(block.weights), there, strict=False) if kept]
    return names + [f"{block.shape.variant.names[i]} batch_norm.{field}" for i, field, _ in affine_of(norms)]


def params_of(leaves, block, norms):
    """InceptionParams of :func:`leaves_of` with the statistics of norms."""
    rest = iter(leaves[1:])
    weights = tuple(next(rest) for _ in block.weights)
    biases = tuple(None if b is None else next(rest) for b in block.biases)
    norms = list(norms)
    for i, field, _ in affine_of(norms):
        norms[i] = norms[i]._replace(**{field: next(rest)})
    return InceptionParams(weights, biases or None, tuple(norms))


def call(leaves, block, norms, wish="kernels"):
    with backend(wish):
        return inception(
            leaves[0], params_of(leaves, block, norms), activation="relu" if block.relu else None
        )  # fmt: skip


def doubled(norm):
    return norm and BatchNorm(*(t if t is None else t.double() for t in norm[:4]), norm.eps)


def conv_norm(x, w, bias, norm, relu=True):
    """Convolution, BatchNorm and ReLU in float64."""
    y = F.conv2d(x.double(), w.double(), None if bias is None else bias.double(), padding=w.shape[-1] // 2)
    norm = doubled(norm)
    if norm is not None:
        y = F.batch_norm(y, norm.mean, norm.var, norm.gamma, norm.beta, eps=norm.eps)
    return F.relu(y) if relu else y


def check_each_slice(block, norms, out, factor=1):
    """Every convolution's result against float64 on the very operand that its kernel read; the bits exactly."""
    y, r, bits, _ = out
    shape, biases = block.shape, block.biases or chains.each(None, block.weights)
    images = (shape.n, shape.h, shape.w)
    inner = [part.rows(shape.gemm_m).unflatten(0, images).permute(0, 3, 1, 2) for part in shape.r_slices(r)]
    pooled = F.max_pool2d(block.x.double(), 3, stride=1, padding=1)
    operands = chains.from_roles([block.x] * 3, inner, pooled)
    results = chains.from_outputs(y.split(shape.branch_channels, dim=1), inner)
    each = zip(shape.variant.names, results, operands, block.weights, biases, norms, strict=True)
    for name, result, operand, w, bias, norm in each:
        error = Error.of(result, conv_norm(operand, w, bias, norm, block.relu))
        bound = factor * tolerance(y.dtype, w[0].numel())
        assert error.within(bound), f"{name}: {error}, bound {bound:.2e}"
    if block.relu:
        check_bits(bits, y, shape)


def gradients_truth(block, norms, out, dy):
    """Float64 gradients by autograd, through the masks, r and arg-max of the forward's outputs."""
    leaves = [t.detach().double().requires_grad_() for t in leaves_of(block, norms)]
    weights, biases, double_norms = params_of(leaves, block, [doubled(n) for n in norms])
    folded, shifts = [], []
    for w, bias, norm in zip(weights, biases or [None for _ in weights], double_norms, strict=True):
        bias = w.new_zeros(w.shape[0]) if bias is None else bias
        if norm is None:
            folded.append(w)
            shifts.append(bias)
            continue
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
    rounded = dict(zip(gradient_names(block.weights), products(block), strict=True))
    for name, g, truth in zip(names, grads, gradients_truth(block, norms, out, dy), strict=True):
        # gamma of 0: nothing passes, and nothing of it belongs to the scale of the others.
        some = truth != 0
        assert not g[~some].any(), f"gradient of {name}: not zero where it must be"
        times = rounded.get(name) or rounded[f"{name.split()[0]}.weight"]
        limit = bound * times + (tolerance(g.dtype, 1) if g.dtype != dy.dtype else 0)
        size = size_of(truth)
        error = Error.of((g / size)[some], (truth / size)[some])
        assert error.within(limit), f"gradient of {name}: {error}, bound {limit:.2e}"
