"""A converted block: an instance of its own class's subclass, whose forward runs the kernels on its own parameters.

The subclass is made for the class that the block had, so isinstance, attributes, methods and state_dict stay; only
forward is another. What the block, its layers and their classes were at its conversion stands in one plain attribute.
Whatever has changed since (a layer replaced, wrapped or hooked, an attribute, a class's method, BatchNorm in training
mode) sends a call to the forward that it had.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inception_fused.block.chains import first, optional, third_windows, variant_of
from inception_fused.block.reference import InceptionParams
from inception_fused.block.views import BatchNorm
from inception_fused.conversion.channels_last import to_channels_last
from inception_fused.conversion.trial import try_block
from inception_fused.modules.refusals import other_kind
from inception_fused.modules.structure import (
    Roles,
    is_globally_hooked,
    is_lazy,
    is_pool_3x3,
    is_same_conv,
    layer,
)
from inception_fused.modules.tracers import announce_script, wants_layers, with_names_of
from inception_fused.modules.watch import Seen
from inception_fused.op import backends
from inception_fused.op.autograd import eager, inception
from inception_fused.op.calls import autocast_enabled

# Symbolic tracing keeps the block as one call instead of looking inside.
torch.fx.wrap("inception")

STATE = "_inception_fused"
"""The attribute of a converted block that holds its State."""

TRAINING = "its BatchNorm is in training mode"
WAITING = "its parameters wait for the first input"

USUAL_REASONS = (TRAINING, WAITING)
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


class ConvertedBlock:
    """What every converted block's class has beside its original one."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # Its class exists in this process only, so a pickle names the original.
        # Python 3.10 knows no __getstate__ of every object.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _blank, (original_of(self),), state

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script asks of every module first. It then compiles the original's forward."""
        announce_script(self)
        prepare = getattr(super(), "__prepare_scriptable__", None)
        return prepare() if prepare is not None else self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        state = self.__dict__.get(STATE)
        if state is not None and state.seen is not None and not state.seen.modules:
            # From a pickle: its classes in this process may be other code than the one that was tried.
            state.known, state.seen = False, None
            _settle(self)


def original_of(module: ConvertedBlock) -> type[nn.Module]:
    """The class that a converted block had, whatever subclass its own has got since, as FSDP2 makes one."""
    kinds = type(module).__mro__
    return kinds[kinds.index(ConvertedBlock) + 1]


def _run(module: nn.Module, original: Callable[..., Any], x: Any) -> Any:
    """x [N, C, H, W] -> [N, K, H, W] in channels_last memory, as the original computes it.

    Raises KernelError where the backend demands kernels that cannot run.
    """
    state = module.__dict__.get(STATE)
    if state is None:
        # Somebody has made another instance of a converted block's class.
        return original(module, x)
    traced = isinstance(x, torch.fx.Proxy)
    if traced and wants_layers(x):
        return original(module, x)
    if not traced and not (isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()):
        return original(module, x)
    reason, inside = _inspect(module, state)
    if traced and state.roles.norms and reason in (None, TRAINING):
        # BatchNorm's statistics in a call of inception() would stay in eval mode for ever: the graph keeps the module,
        # or the layers of one that is itself the root.
        path = x.tracer.path_of_module(module)
        return x.tracer.create_proxy("call_module", path, (x,), {}) if path else original(module, x)
    if reason is None:
        params = _params(module, state, inside)
        if traced or x.dtype == first(params.weights).dtype or autocast_enabled(x):
            return inception(x, params, activation=state.activation)
        # Which the original may convert, or refuse in its own words.
        return original(module, x)
    if traced:
        return original(module, x)
    y = eager(x, reason, backends.current(), partial(original, module), quiet=reason in USUAL_REASONS)
    if not state.known:
        _settle(module)
    return y


def _blank(original: type[nn.Module]) -> nn.Module:
    """An empty instance for unpickling."""
    kind = converted_class(original)
    safe = [item[0] if isinstance(item, tuple) else item for item in torch.serialization.get_safe_globals()]
    if _blank in safe and kind not in safe:
        # torch.load(weights_only=True) with this function and the original allowed, which is all that a user can name.
        torch.serialization.add_safe_globals([kind])
    return kind.__new__(kind)


@cache
def converted_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a block's class that runs kernels where it is given one image tensor, by place or by name."""
    name_of_x = next(iter(list(inspect.signature(original.forward).parameters)[1:]), None)

    run = _run

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) == 1 and (args or name_of_x in kwargs):
            return run(self, original.forward, *args, *kwargs.values())
        return original.forward(self, *args, **kwargs)

    # torch.export and symbolic tracing look at its signature, TorchScript at its source.
    forward = wraps(original.forward)(with_names_of(forward, original.forward))
    name = f"Fused{original.__name__}"
    namespace = {"__doc__": ConvertedBlock.__doc__, "__module__": original.__module__, "forward": forward}
    kind = type(name, (ConvertedBlock, original), namespace)
    for base in original.__mro__:
        for known in base.__dict__.values():
            _forget(kind, known)
    return kind


def _forget(kind: type, known: Any) -> None:
    """Takes a class out of the container in which its bases keep their subclasses."""
    if isinstance(known, dict):
        for key in [key for key, value in known.items() if value is kind or key is kind]:
            del known[key]
    elif isinstance(known, list):
        known[:] = [item for item in known if item is not kind]
    elif isinstance(known, set):
        known.discard(kind)


def adopt(
    module: nn.Module, roles: Roles, activation: str | None, *, known: bool = True, channels_last: bool = False
) -> None:
    """Turns a block into a converted one. Its layers stay the objects that they are.

    Raises whatever its class or metaclass does where no subclass can be made; the block is then as it was.
    """
    kind = converted_class(type(module))
    tree, names = _tree(module)
    convs, norms, pools = (
        tuple([names.index(name) for name in group]) for group in (roles.convs, roles.norms, (roles.pool,))
    )
    state = State(
        roles, tree, convs, norms, pools, variant(module, roles), activation, known, channels_last=channels_last
    )
    object.__setattr__(module, "__class__", kind)
    module.__dict__[STATE] = state
    if known:
        try:
            remember(module)
        except Exception:  # whatever the copy of somebody's attribute raises
            release(module)
            raise


def remember(module: nn.Module) -> None:
    """Takes a converted block as it is now for what it was at its conversion."""
    state: State = module.__dict__[STATE]
    inside = [module]
    for parent, key, *_ in state.tree[1:]:
        inside.append(inside[parent]._modules[key])
    state.seen = Seen(inside, skipped=ConvertedBlock)


def variant(module: nn.Module, roles: Roles) -> str:
    """A block's variant in words."""
    sides = [layer(module, name).kernel_size[0] for name in third_windows(roles.convs)]
    windows = f"{sides[0]}x{sides[0]}" if len(sides) == 1 else "two 3x3"
    behind = sum(map(bool, roles.norms))
    some = f" behind {behind} of {len(roles.convs)}" if behind < len(roles.norms) else ""
    return f"{windows} in branch 3" + (f", BatchNorm{some}" if behind else "")


def release(module: nn.Module) -> None:
    """The inverse of :func:`adopt`."""
    original = original_of(module)
    del module.__dict__[STATE]
    object.__setattr__(module, "__class__", original)


def _tree(module: nn.Module) -> tuple[tuple[Child, ...], list[str]]:
    """State.tree and the modules' dotted names."""
    found, names = [Child(0, "", type(module), len(module._modules))], [""]

    def walk(module: nn.Module, parent: int, prefix: str) -> None:
        for key, child in module._modules.items():
            if child is not None:
                kind = nn.Conv2d if type(child) is nn.LazyConv2d else type(child)
                found.append(Child(parent, key, kind, len(child._modules)))
                names.append(prefix + key)
                walk(child, len(found) - 1, f"{prefix}{key}.")

    walk(module, 0, "")
    return tuple(found), names


def eager_reason(module: nn.Module) -> str | None:
    """What about a converted block's layers keeps the kernels from standing in for them; None if nothing."""
    return _inspect(module, module.__dict__[STATE])[0]


def is_stale(module: nn.Module) -> bool:
    """Whether a converted block is no longer what it was tried as, or was refused after its first input."""
    state: State = module.__dict__[STATE]
    return state.known and bool(state.refused or _changes(module, state)[0])


def _inspect(module: nn.Module, state: State) -> tuple[str | None, Sequence[nn.Module]]:
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
            state.seen = Seen(inside, skipped=ConvertedBlock)
    if not torch.compiler.is_compiling() and is_globally_hooked():
        return "a global module hook is registered", ()
    owned = [inside[index].__dict__["_parameters"] for index in state.convs]
    if len({(len(p), "bias" in p) for p in owned}) > 1:
        more = [name for p in owned for name in p if name not in ("weight", "bias")]
        return f"a convolution has {more[0]}" if more else "a convolution has lost its bias", ()
    for index in state.norms:
        if not index:
            continue
        d = inside[index].__dict__
        if d["training"]:
            return TRAINING, ()
        if d["_buffers"]["running_mean"] is None or d["_buffers"]["running_var"] is None:
            return f"{_dotted(state, index)} keeps no running statistics", ()
    return None, inside


def _changes(module: nn.Module, state: State) -> tuple[str, Sequence[nn.Module]]:
    """What of a block, its layers and their classes is no longer what it was and matters, "" for nothing; the modules
    of State.tree as they are now."""
    inside: list[nn.Module] = []
    for index, (parent, key, kind, children) in enumerate(state.tree):
        now = inside[parent]._modules.get(key) if inside else module
        name = _dotted(state, index)
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
            return f"{_dotted(state, index)} is configured as {inside[index]}", ()
    for index in state.pools:
        if index and not is_pool_3x3(inside[index]):
            return f"{_dotted(state, index)} is configured as {inside[index]}", ()
    patched = state.seen.classes.patched()
    return f"{patched}; {AGAIN}" if patched else "", inside


def _worded(name: str, why: str) -> str:
    """What changed() says of a module of that name, "" for the block itself."""
    if why.startswith("its"):
        return f"{name}: {why}; {AGAIN}" if name else f"{why}; {AGAIN}"
    return f"{name or 'it'} {why}"


def _dotted(state: State, index: int) -> str:
    """The name of a module in State.tree, "" for the block."""
    keys = []
    while index > 0:
        keys.append(state.tree[index].key)
        index = state.tree[index].parent
    return ".".join(reversed(keys))


def _params(module: nn.Module, state: State, inside: Sequence[nn.Module]) -> InceptionParams:
    """Roles.params() without looking for the layers again."""
    owned = [inside[index].__dict__["_parameters"] for index in state.convs]
    norms = [inside[index].__dict__ if index else None for index in state.norms]
    try:
        biases = tuple([p["bias"] for p in owned])
        return InceptionParams(
            tuple([p["weight"] for p in owned]),
            optional(biases),
            tuple([d and _batch_norm(d["_parameters"], d["_buffers"], d["eps"]) for d in norms]) or None,
        )
    except KeyError:
        # Somebody has put a plain tensor in a parameter's place.
        return state.roles.params(module)


def _batch_norm(p: dict[str, Tensor | None], b: dict[str, Tensor | None], eps: float) -> BatchNorm:
    return BatchNorm(p["weight"], p["bias"], b["running_mean"], b["running_var"], eps)


def _settle(module: nn.Module) -> None:
    """Once a lazy block has its parameters: tries what it computes, and remembers the answer."""
    state: State = module.__dict__[STATE]
    if torch.compiler.is_compiling() or is_lazy([layer(module, name) for name in state.roles.convs]):
        return
    activation, why = try_block(module, original_of(module), state.roles, converted_class)
    if state.channels_last and not why:
        to_channels_last(module)
    remember(module)
    state.activation, state.refused, state.known = activation, why, True
