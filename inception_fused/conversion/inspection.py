"""What a converted block was at its conversion, whether it still is, and its parameters as they are now."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.block.chains import optional, third_windows, variant_of
from inception_fused.block.reference import InceptionParams
from inception_fused.block.views import BatchNorm
from inception_fused.modules.refusals import other_kind
from inception_fused.modules.structure import Roles, is_globally_hooked, is_pool_3x3, is_same_conv, layer
from inception_fused.modules.watch import Seen

STATE = "_inception_fused"
"""The attribute of a converted block that holds its State."""

WAITING = "its parameters wait for the first input"

USUAL_REASONS = (WAITING,)
"""For which nobody is warned: the block does what it should."""

AGAIN = "convert_ tries it anew"


class Child(NamedTuple):
    """A module inside a block at its conversion. parent: its place in State.tree, where the block itself is 0;
    children: how many it has."""

    parent: int
    key: str
    kind: type[nn.Module]
    children: int


@dataclass(eq=False, slots=True)
class State:
    """What a block was at its conversion. tree: the block and every module inside, parents first.

    convs, norms, pools: the places of the roles' layers in tree, of norms 0 where none stands; what: its variant in
    words.

    activation: "relu" or None; known is False while its parameters wait for the first input, since until then nobody
    can try what it computes. refused: why it must not run kernels after all. channels_last: whether its weights are to
    be brought into that memory format as soon as they are there. seen: the modules of tree and their classes, once it
    is known.
    """

    roles: Roles
    tree: tuple[Child, ...]
    convs: tuple[int, ...]
    norms: tuple[int, ...]
    pools: tuple[int, ...]
    what: str
    activation: str | None = None
    known: bool = True
    refused: str = ""
    channels_last: bool = False
    seen: Seen | None = None


def variant(module: nn.Module, roles: Roles) -> str:
    """A block's variant in words."""
    sides = [layer(module, name).kernel_size[0] for name in third_windows(roles.convs)]
    windows = f"{sides[0]}x{sides[0]}" if len(sides) == 1 else "two 3x3"
    behind = sum(map(bool, roles.norms))
    some = f" behind {behind} of {len(roles.convs)}" if behind < len(roles.norms) else ""
    return f"{windows} in branch 3" + (f", BatchNorm{some}" if behind else "")


def eager_reason(module: nn.Module) -> str | None:
    """What about a converted block's layers keeps the kernels from standing in for them; None if nothing."""
    return inspect(module, module.__dict__[STATE])[0]


def is_stale(module: nn.Module) -> bool:
    """Whether a converted block is no longer what it was tried as, or was refused after its first input."""
    state: State = module.__dict__[STATE]
    return state.known and bool(state.refused or _changes(module, state)[0])


def inspect(module: nn.Module, state: State) -> tuple[str | None, Sequence[nn.Module]]:
    """eager_reason(), and where it is None the modules of State.tree as they are now. Asked at every call."""
    if state.refused or not state.known:
        return state.refused or WAITING, ()
    inside = state.seen.modules
    if inside[0] is not module or not state.seen.holds():
        reason, inside = _changes(module, state)
        if reason:
            return reason, ()
        if state.seen.modules[0] is module and not torch.compiler.is_compiling():
            # Of no consequence, and not to be found again at every call.
            state.seen = Seen(inside, skipped=state.seen.classes.skipped)
    if not torch.compiler.is_compiling() and is_globally_hooked():
        return "a global module hook is registered", ()
    owned = [inside[index].__dict__["_parameters"] for index in state.convs]
    if len({(len(p), "bias" in p) for p in owned}) > 1:
        more = [name for p in owned for name in p if name not in ("weight", "bias")]
        return f"a convolution has {more[0]}" if more else "a convolution has lost its bias", ()
    for index in filter(None, state.norms):
        buffers = inside[index].__dict__["_buffers"]
        if (buffers["running_mean"] is None) != (buffers["running_var"] is None):
            return f"{dotted(state, index)} keeps one of its running statistics", ()
    return None, inside


def _changes(module: nn.Module, state: State) -> tuple[str, Sequence[nn.Module]]:
    """What of a block, its layers and their classes is no longer what it was and matters, "" for nothing; the modules
    of State.tree as they are now."""
    inside: list[nn.Module] = []
    for index, (parent, key, kind, children) in enumerate(state.tree):
        now = inside[parent]._modules.get(key) if inside else module
        name = dotted(state, index)
        if inside and type(now) is not kind:
            return f"{name} {other_kind(now, kind)}", ()
        if len(now._modules) != children:
            return f"{name or 'it'} has {len(now._modules)} {'layers' if name else 'children'}, had {children}", ()
        why = state.seen.changed(index, now, hooks=bool(inside))
        if why:
            return _worded(name, why), ()
        if inside and now is not state.seen.modules[index] and "_is_replica" not in now.__dict__:
            # Attributes may go on referring to the other one.
            return f"{name} is another {kind.__name__}; {AGAIN}", ()
        inside.append(now)
    for index, sides in zip(state.convs, variant_of(state.convs).sides.values(), strict=True):
        if not is_same_conv(inside[index], sides):
            return f"{dotted(state, index)} is configured as {inside[index]}", ()
    for index in state.pools:
        if index and not is_pool_3x3(inside[index]):
            return f"{dotted(state, index)} is configured as {inside[index]}", ()
    patched = state.seen.classes.patched()
    return f"{patched}; {AGAIN}" if patched else "", inside


def _worded(name: str, why: str) -> str:
    """What changed() says of a module of that name, "" for the block itself."""
    if why.startswith("its"):
        return f"{name}: {why}; {AGAIN}" if name else f"{why}; {AGAIN}"
    return f"{name or 'it'} {why}"


def dotted(state: State, index: int) -> str:
    """The name of a module in State.tree, "" for the block."""
    keys = []
    while index > 0:
        keys.append(state.tree[index].key)
        index = state.tree[index].parent
    return ".".join(reversed(keys))


def params_of(module: nn.Module, state: State, inside: Sequence[nn.Module]) -> InceptionParams:
    """Roles.params() without looking for the layers again."""
    owned = [inside[index].__dict__["_parameters"] for index in state.convs]
    norms = [inside[index].__dict__ if index else None for index in state.norms]
    try:
        biases = tuple([p["bias"] for p in owned])
        return InceptionParams(
            tuple([p["weight"] for p in owned]),
            optional(biases),
            tuple([d and _batch_norm(d["_parameters"], d["_buffers"], d["eps"], d["training"]) for d in norms]) or None,
        )
    except KeyError:
        # Somebody has put a plain tensor in a parameter's place.
        return state.roles.params(module)


def _batch_norm(p: dict[str, Tensor | None], b: dict[str, Tensor | None], eps: float, training: bool) -> BatchNorm:
    mean, var = (None, None) if training else (b["running_mean"], b["running_var"])
    return BatchNorm(p["weight"], p["bias"], mean, var, eps)
