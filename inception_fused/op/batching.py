"""The operators under ``torch.func``: to ``vmap`` a batch of x alone folds into N, batched parameters are one call
each; what would be differentiated is refused, since the operators have no derivative.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.pyfunctorch import TransformType, retrieve_current_functorch_interpreter
from torch.utils._pytree import tree_leaves, tree_map_only

from inception_fused.block.call_types import Saves
from inception_fused.op import operators
from inception_fused.op import pools as _pools  # noqa: F401  registers the operators
from inception_fused.op.calls import refuse_derivatives

NOTHING = Saves(False, False, False)

_ENTRANCE = torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchDynamicLayerFrontMode).add(
    torch._C.DispatchKey.FuncTorchDynamicLayerBackMode
)
_LEVELS = _ENTRANCE | torch._C.DispatchKeySet(torch._C.DispatchKey.FuncTorchBatched)


def _batched_beside_x(in_dims):
    return any(d is not None for d in tree_leaves(in_dims[1:]))


def _vmap_forward(info, in_dims, *args):
    """A batch of x alone folds into N; batched parameters are one call each."""
    if _batched_beside_x(in_dims):
        return _vmap_by_item(torch.ops.inception_fused._forward, info, in_dims, *args)
    return _folded(torch.ops.inception_fused._forward, info, in_dims, *args)


def _folded(op, info, in_dims, x, *rest):
    """One call for all items. What op saves is empty and of one dimension where it is not asked for."""
    out = op(x.movedim(in_dims[0], 0).flatten(0, 1), *rest)
    given = [t.dim() > 1 for t in out]
    folded = tuple(t.unflatten(0, (info.batch_size, -1)) if g else t for t, g in zip(out, given, strict=True))
    return folded, tuple(0 if g else None for g in given)


def _vmap_infer(info, in_dims, *args):
    """As :func:`_vmap_forward` that saves nothing."""

    def with_saves(x, weights, biases, relu, *rest, saves):
        return x, weights, biases, relu, *saves, *rest

    in_dims = with_saves(*in_dims, saves=[None for _ in NOTHING])
    (y, *_), (dim, *_) = _vmap_forward(info, in_dims, *with_saves(*args, saves=NOTHING))
    return y, dim


def _vmap_exported(info, in_dims, x, weights, biases, *rest):
    """As :func:`_vmap_forward`, but through the operator itself, so that the levels below differentiate it."""
    if _batched_beside_x(in_dims):
        return _vmap_by_item(torch.ops.inception_fused._exported, info, in_dims, x, weights, biases, *rest)
    y = torch.ops.inception_fused._exported(x.movedim(in_dims[0], 0).flatten(0, 1), weights, biases, *rest)
    return y.unflatten(0, (info.batch_size, -1)), 0


def _vmap_backward(info, in_dims, *args):
    return _vmap_by_item(torch.ops.inception_fused._backward, info, in_dims, *args)


def _vmap_max_pool(info, in_dims, *args):
    """As :func:`_vmap_forward`."""
    run = _vmap_by_item if _batched_beside_x(in_dims) else _folded
    return run(torch.ops.inception_fused._max_pool, info, in_dims, *args)


def _vmap_max_pool_backward(info, in_dims, *args):
    return _vmap_by_item(torch.ops.inception_fused._max_pool_backward, info, in_dims, *args)


def _vmap_by_item(op, info, in_dims, *args):
    """One call of op per batch item, results stacked."""

    def item(arg, dim, i):
        if isinstance(arg, (list, tuple)) and isinstance(dim, (list, tuple)):
            return [item(a, d, i) for a, d in zip(arg, dim, strict=True)]
        return arg if dim is None else arg.select(dim, i)

    outs = [op(*(item(arg, dim, i) for arg, dim in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
    if isinstance(outs[0], Tensor):
        return torch.stack(outs), 0
    stacked = [torch.stack(parts) for parts in zip(*outs, strict=True)]
    return (stacked, [0] * len(stacked)) if isinstance(outs[0], list) else (tuple(stacked), (0,) * len(stacked))


def _pass_down(op):
    """An operator's step from one level of torch.func to the one below, as PyTorch takes it, unless something is to be
    differentiated here: below, the tensors no longer say so."""
    name = op._schema.name.partition("::")[2]

    def run(*args):
        refuse_derivatives(name, [t for t in tree_leaves(args) if isinstance(t, Tensor)])
        interpreter = retrieve_current_functorch_interpreter()
        differentiates, level = interpreter.key() in (TransformType.Grad, TransformType.Jvp), interpreter.level()
        with interpreter.lower(), _entered():
            if not differentiates:
                return op(*args)
            out = op(*tree_map_only(Tensor, lambda t: _functorch._unwrap_for_grad(t, level), args))
        return tree_map_only(Tensor, lambda t: _functorch._wrap_for_grad(t, level), out)

    operators.library.impl(op, run, "FuncTorchDynamicLayerBackMode")


def _entered():
    """Within it the current level is entered as by a call from outside: what PyTorch has switched off for the time at
    the end of the level above, rules of vmap among it, is on again."""
    if _functorch.peek_interpreter_stack() is None:
        return nullcontext()
    included, excluded = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    return torch._C._ForceDispatchKeyGuard(included | _ENTRANCE, excluded - _LEVELS)


for _name in ("_infer", "_forward", "_backward", "_max_pool", "_max_pool_backward"):
    _packet = getattr(torch.ops.inception_fused, _name)
    for _overload in _packet.overloads():
        _pass_down(getattr(_packet, _overload))

# Under vmap of a compiled function Dynamo would go on to compile the Python of the operators below.
_vmap_forward, _vmap_backward = map(torch._disable_dynamo, (_vmap_forward, _vmap_backward))
_vmap_max_pool, _vmap_max_pool_backward = map(torch._disable_dynamo, (_vmap_max_pool, _vmap_max_pool_backward))
for _overload in ("", ".norms"):
    torch.library.register_vmap(f"inception_fused::_infer{_overload}", _vmap_infer, lib=operators.library)
    torch.library.register_vmap(f"inception_fused::_forward{_overload}", _vmap_forward, lib=operators.library)
    torch.library.register_vmap(f"inception_fused::_exported{_overload}", _vmap_exported, lib=operators.library)
torch.library.register_vmap("inception_fused::_backward", _vmap_backward, lib=operators.library)
torch.library.register_vmap("inception_fused::_max_pool", _vmap_max_pool, lib=operators.library)
torch.library.register_vmap("inception_fused::_max_pool_backward", _vmap_max_pool_backward, lib=operators.library)
