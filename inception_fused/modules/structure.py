"""The structure of an Inception block in anybody's module: which of its layers is which, by kind and order alone.

    C1 | C1 C3 | C1 Ck    | pool C1        in the order of registration, k = 3 or 5
    C1 | C1 C3 | C1 C3 C3 | pool C1

C is a convolution that keeps the size of the image, its BatchNorm may stand behind it; the pool
is 3x3 with stride 1, or absent where the module's forward calls it as a function. ReLU layers may stand anywhere: what
is computed between the layers no structure tells, so whoever relies on it must try it (conversion.try_block).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.module import _has_any_global_hook

from inception_fused.block.chains import BLOCKS, VARIANTS, first, inputs, optional, variant_of
from inception_fused.block.reference import InceptionParams
from inception_fused.block.views import BatchNorm
from inception_fused.modules import refusals

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")

GLOBAL_HOOKS = (
    "_global_forward_hooks", "_global_forward_pre_hooks", "_global_backward_hooks", "_global_backward_pre_hooks",
)  # fmt: skip

NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)
"""Classes of the BatchNorm that a block may have. The second is the first, but shares its statistics in training."""

FORWARDS = ("forward", "_conv_forward", "_call_impl", "_wrapped_call_impl", "_slow_forward")
"""Methods that people replace on a layer; the second makes a convolution wrap around at the borders."""

USUAL_SETTINGS = {
    count: {
        name: tuple(((s, s), (1, 1), (s // 2, s // 2), (1, 1), 1, "zeros") for s in sides)
        for name, sides in variant.sides.items()
    }
    for count, variant in VARIANTS.items()
}
"""Kernel size, stride, padding, dilation, groups and padding mode of each convolution of a variant, which is named by
how many it has."""


class Roles(NamedTuple):
    """Dotted names of a block's layers. convs: in the order of their variant; norms: one each, "" where none stands
    there, or none at all; pool: "" where the forward calls it as a function."""

    convs: tuple[str, ...]
    norms: tuple[str, ...]
    pool: str

    def params(self, module: nn.Module, *, batch: bool = True) -> InceptionParams:
        """The parameters of a block with these roles, and the statistics of its BatchNorms. batch: whether of those
        that train there are none, as the block's mode says; else they are as in eval."""
        convs = [layer(module, name) for name in self.convs]
        norms = [layer(module, name) if name else None for name in self.norms]
        biases = tuple([conv.bias for conv in convs])
        return InceptionParams(
            tuple([conv.weight for conv in convs]),
            optional(biases),
            tuple([n and _batch_norm(n, batch and n.training) for n in norms]) or None,
        )


def _batch_norm(norm: nn.Module, batch: bool) -> BatchNorm:
    mean, var = (None, None) if batch else (norm.running_mean, norm.running_var)
    return BatchNorm(norm.weight, norm.bias, mean, var, norm.eps)


class Proposal(NamedTuple):
    """What the structure of a module says. roles: None where it is no block; why then says what is missing."""

    roles: Roles | None
    why: str


def layer(module: nn.Module, name: str) -> nn.Module:
    """The layer of a dotted name."""
    for key in name.split("."):
        module = module._modules[key]
    return module


def candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, Proposal]]:
    """(name, module, proposal) of everything in a model that is an Inception block or looks like one, each instance
    once; the innermost only."""
    seen: set[nn.Module] = set()

    def walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module, Proposal]]:
        if module in seen or isinstance(module, torch.jit.ScriptModule):
            return
        seen.add(module)
        found = False
        # Not named_children(), which a class may have made its own.
        for key, child in module._modules.items():
            for item in walk(child, f"{name}.{key}" if name else key) if child is not None else ():
                found = True
                yield item
        # A container without a forward, such as ModuleList, computes nothing: its owner does.
        computes = type(module).forward is not nn.Module.forward
        if not found and computes and _looks_like_a_block(module):
            yield name, module, propose(module)

    yield from walk(model, "")


def scripted(model: nn.Module) -> Iterator[str]:
    """Names of the outermost scripted modules that may hold a block: candidates() does not look into them."""
    outer: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule) and not name.startswith(tuple(outer)):
            outer.append(f"{name}." if name else "")
            kinds = [getattr(inner, "original_name", "") for inner in module.modules()]
            if kinds.count("Conv2d") >= min(BLOCKS):
                yield name


def _looks_like_a_block(module: nn.Module) -> bool:
    """Whether it is worth a reason why it is none: some six convolutions, and their windows, a pool that keeps the size
    or the class's name."""
    if not module._modules:
        return False
    leaves = [leaf for _, leaf in _leaves(module)]
    convs = [leaf for leaf in leaves if refusals.is_conv(leaf)]
    pools = (nn.MaxPool2d, nn.AvgPool2d)
    pooled = any(isinstance(leaf, pools) and leaf.stride in (1, (1, 1)) for leaf in leaves)
    called = "inception" in type(module).__name__.lower() and "aux" not in type(module).__name__.lower()
    return 4 <= len(convs) <= 10 and (pooled or called or refusals.is_known(convs))


def _leaves(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for key, child in module._modules.items():
        if child is not None and child._modules:
            yield from _leaves(child, f"{prefix}{key}.")
        elif child is not None:
            yield prefix + key, child


def propose(module: nn.Module) -> Proposal:
    """The roles of a module's layers, or why it is no block. Whether it computes one is another question."""
    try:
        return _proposed(module)
    except Exception as error:  # whatever layers raise that lack what their class has
        return Proposal(None, f"its layers cannot be read: {type(error).__name__}: {error}")


def _proposed(module: nn.Module) -> Proposal:
    proposal = _parse(_leaves(module))
    if proposal.roles is None:
        return proposal
    roles = proposal.roles
    named = {*roles.convs, *roles.norms}
    own = [
        name
        for name, _ in (*module.named_parameters(), *module.named_buffers())
        if name.rpartition(".")[0] not in named
    ]
    if own:
        return Proposal(None, f"it has a parameter or buffer beside its convolutions': {own[0]}")
    why = _fault(module, roles)
    return Proposal(None, why) if why else proposal


def _parse(leaves: Iterator[tuple[str, nn.Module]]) -> Proposal:
    """Roles by kind and order."""
    convs: list[tuple[str, nn.Module]] = []
    norms: dict[int, str] = {}
    pools: list[tuple[int, str]] = []
    windows: list[tuple[str, nn.Module]] = []
    for name, leaf in leaves:
        why = refusals.strange_layer(name, leaf)
        if why:
            return Proposal(None, why)
        if isinstance(leaf, nn.Conv2d):
            convs.append((name, leaf))
        elif isinstance(leaf, nn.modules.batchnorm._BatchNorm):
            if not convs or len(convs) - 1 in norms:
                return Proposal(None, f"{name} does not follow a convolution")
            norms[len(convs) - 1] = name
        elif isinstance(leaf, nn.MaxPool2d):
            pools.append((len(convs), name))
            windows.append((name, leaf))
    for name, leaf in (*convs, *windows):
        why = refusals.strange_window(name, leaf)
        if why:
            return Proposal(None, why)
    why = refusals.wrong_number(convs, windows) or refusals.wrong_place(convs, pools)
    if why:
        return Proposal(None, why)
    roles = Roles(
        tuple(name for name, _ in convs),
        tuple(norms.get(i, "") for i in range(len(convs))) if norms else (),
        pools[0][1] if pools else "",
    )
    return Proposal(roles, "")


def _fault(module: nn.Module, roles: Roles) -> str:
    """What about the layers' settings, channels or hooks the kernels cannot stand in for; "" where nothing."""
    convs = [layer(module, name) for name in roles.convs]
    for name, conv, sides in zip(roles.convs, convs, variant_of(convs).sides.values(), strict=True):
        if type(conv) not in (nn.Conv2d, nn.LazyConv2d):
            return f"{name} is {refusals.named(type(conv).__name__)}, not a Conv2d"
        if not is_same_conv(conv, sides):
            return refusals.strange_settings(name, conv)
    for name, conv in zip(roles.norms, convs, strict=False):
        if not name:
            continue
        norm = layer(module, name)
        if type(norm) not in NORMS:
            return f"{name} is {refusals.named(type(norm).__name__)}, not a BatchNorm2d"
        if norm.num_features != conv.out_channels:
            return f"{name} has {norm.num_features} features behind {conv.out_channels} channels"
    if roles.pool and not (type(layer(module, roles.pool)) is nn.MaxPool2d and is_pool_3x3(layer(module, roles.pool))):
        return f"{roles.pool} is {layer(module, roles.pool)}, wants a MaxPool2d of 3x3, stride 1, padding 1"
    for name, inner in module.named_modules():
        d = inner.__dict__
        if isinstance(inner, nn.LazyConv2d) and len(d["_forward_pre_hooks"]) == 1:
            # Its own, which takes itself off with the first input.
            d = d | {"_forward_pre_hooks": {}}
        if name and is_touched(d):
            return f"{name} has a hook or a forward of its own"
    if "forward" in module.__dict__:
        return "the instance has a forward of its own"
    return "" if is_lazy(convs) else _channel_fault(roles, convs)


def _channel_fault(roles: Roles, convs: Sequence[nn.Module]) -> str:
    for name, conv in zip(roles.convs, convs, strict=True):
        if getattr(conv, "weight", None) is None:
            return f"{name} has no weight"
    # Of the weights: a lazy convolution that got its own from a checkpoint goes on saying 0 channels.
    ins, outs = zip(*((conv.weight.shape[1], conv.weight.shape[0]) for conv in convs), strict=True)
    for name, given, wanted in zip(roles.convs, ins, inputs(first(ins), outs), strict=True):
        if given != wanted:
            return f"{name} takes {given} channels, wants {wanted} in its place"
    return ""


def is_lazy(convs: Sequence[nn.Module]) -> bool:
    """Whether parameters wait for the first input."""
    return any(isinstance(conv, nn.LazyConv2d) for conv in convs)


def is_touched(d: dict[str, object]) -> bool:
    """Whether a module with these attributes has a hook or a forward of its own."""
    return is_hooked(d) or has_own_forward(d)


def is_hooked(d: dict[str, object]) -> bool:
    return bool(d["_forward_hooks"] or d["_forward_pre_hooks"] or d["_backward_hooks"] or d["_backward_pre_hooks"])


def has_own_forward(d: dict[str, object]) -> bool:
    # Spelt out, since torch.compile does not trace a comparison of sets.
    return (
        "forward" in d or "_conv_forward" in d or "_call_impl" in d or "_wrapped_call_impl" in d or "_slow_forward" in d
    )


def is_globally_hooked() -> bool:
    """Whether a hook on all modules may read or change what the children do.

    A ModuleTracker's only note where execution is, and a FlopCounterMode that pushed the block into eager would count
    what does not run otherwise.
    """
    if not _has_any_global_hook():
        return False
    from torch.utils.module_tracker import ModuleTracker

    hooks = (hook for name in GLOBAL_HOOKS for hook in getattr(nn_module, name).values())
    return not all(isinstance(getattr(hook, "__self__", None), ModuleTracker) for hook in hooks)


def has_settings(d: dict[str, object], settings: tuple[tuple[object, ...], ...]) -> bool:
    """Whether a Conv2d with these attributes has one of some settings, as USUAL_SETTINGS names them: one comparison,
    where :func:`is_same_conv` makes seven. False says nothing."""
    return (d["kernel_size"], d["stride"], d["padding"], d["dilation"], d["groups"], d["padding_mode"]) in settings


def is_same_conv(conv: nn.Conv2d, sides: tuple[int, ...]) -> bool:
    """Square kernel of one of ``sides``, stride 1, no dilation, no groups, zero padding that keeps the size."""
    side = conv.kernel_size[0]
    same = conv.padding in ("same", (side // 2, side // 2))
    return (
        side in sides
        and conv.kernel_size == (side, side)
        and conv.stride == (1, 1)
        and same
        and conv.dilation == (1, 1)
        and conv.groups == 1
        and conv.padding_mode == "zeros"
    )


def is_pool_3x3(pool: nn.MaxPool2d) -> bool:
    return (
        pool.kernel_size in (3, (3, 3))
        and pool.stride in (1, (1, 1))
        and pool.padding in (1, (1, 1))
        and pool.dilation in (1, (1, 1))
        and not pool.return_indices
    )
