"""The operators' rules for ``torch.vmap``: a batch of x alone folds into N, batched parameters are one call each."""

from __future__ import annotations

import torch

from inception_fused import ops

NORMS = 8
"""Where the norms of _forward.norms stand."""


def _vmap_forward(info, in_dims, *args):
    """A batch of x alone folds into N; batched parameters are one call each."""
    x_dim, w_dims, b_dims, *_ = in_dims
    norm_dims = in_dims[NORMS] if len(in_dims) > NORMS else ()
    if any(d is not None for d in (*w_dims, *b_dims, *norm_dims)):
        return _vmap_by_item(torch.ops.inception_fused._forward, info, in_dims, *args)
    x, *rest = args
    out = torch.ops.inception_fused._forward(x.movedim(x_dim, 0).flatten(0, 1), *rest)
    given = [t.dim() > 1 for t in out]
    folded = tuple(t.unflatten(0, (info.batch_size, -1)) if g else t for t, g in zip(out, given, strict=True))
    return folded, tuple(0 if g else None for g in given)


def _vmap_infer(info, in_dims, x, weights, biases, *rest):
    relu, *rest = rest
    in_dims = (*in_dims[:4], None, None, None, *in_dims[4:])
    (y, *_), (dim, *_) = _vmap_forward(info, in_dims, x, weights, biases, relu, False, False, False, *rest)
    return y, dim


def _vmap_backward(info, in_dims, *args):
    return _vmap_by_item(torch.ops.inception_fused._backward, info, in_dims, *args)


def _vmap_by_item(op, info, in_dims, *args):
    """One call of op per batch item, results stacked."""

    def item(arg, dim, i):
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [item(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    outs = [op(*(item(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
    stacked = [torch.stack(parts) for parts in zip(*outs, strict=True)]
    return (stacked, [0] * len(stacked)) if isinstance(outs[0], list) else (tuple(stacked), (0,) * len(stacked))


for _overload in ("", ".norms"):
    torch.library.register_vmap(f"inception_fused::_infer{_overload}", _vmap_infer, lib=ops.library)
    torch.library.register_vmap(f"inception_fused::_forward{_overload}", _vmap_forward, lib=ops.library)
torch.library.register_vmap("inception_fused::_backward", _vmap_backward, lib=ops.library)
