"""A converted block: an instance of its own class's subclass, whose forward runs the kernels on its own parameters.

The subclass is made for the class that the block had, so isinstance, attributes, methods and state_dict stay; only
forward is another. What the block was at its conversion stands in one plain attribute. Whatever has changed since
(a layer replaced, wrapped or hooked, BatchNorm in training mode) sends a call to the forward that it had.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache, partial, wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from inception_fused import dispatch
from inception_fused.calls import autocast_enabled
from inception_fused.function import eager, inception
from inception_fused.kernels.views import BatchNorm
from inception_fused.module import Block, FusedInception
from inception_fused.reference import CONV_NAMES, InceptionParams
from inception_fused.structure import (
    SIDES,
    Roles,
    has_usual_settings,
    is_globally_hooked,
    is_lazy,
    is_pool_3x3,
    is_same_conv,
    is_touched,
    layer,
)

# Symbolic tracing keeps the block as one call instead of looking inside.
torch.fx.wrap("inception")

STATE = "_inception_fused"
"""The attribute of a converted block that holds its State."""

TRAINING = "its BatchNorm is in training mode"
WAITING = "its parameters wait for the first input"

USUAL_REASONS = (TRAINING, WAITING)
"""For which nobody is warned: the block does what it should."""


class Child(NamedTuple):
    """A module inside a block at its conversion. parent: its place in State.tree, -1 for the block itself; children:
    how many it has; settings: of a container, see :func:`settings_of`."""

    parent: int
    key: str
    kind: type[nn.Module]
    children: int
    settings: tuple[tuple[str, Any], ...]


class State(NamedTuple):
    """What a block was at its conversion. tree: every module inside, parents first.

    convs, norms, pools: the places of the roles' layers in tree; children, settings: of the block itself, as a Child's;
    what: its variant in words.

    activation: "relu" or None; known is False while its parameters wait for the first input, since until then nobody
    can try what it computes. refused: why it must not run kernels after all. channels_last: whether its weights are to
    be brought into that memory format as soon as they are there.
    """

    roles: Roles
    tree: tuple[Child, ...]
    convs: tuple[int, ...]
    norms: tuple[int, ...]
    pools: tuple[int, ...]
    children: int
    settings: tuple[tuple[str, Any], ...]
    what: str
    activation: str | None = None
    known: bool = True
    refused: str = ""
    channels_last: bool = False


class ConvertedBlock:
    """What every converted block's class has beside its original one."""

    def __reduce_ex__(self, protocol: int) -> tuple[Any, ...]:
        # Its class exists in this process only, so a pickle names the original.
        # Python 3.10 knows no __getstate__ of every object.
        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return _blank, (original_of(self),), state


def original_of(module: ConvertedBlock) -> type[nn.Module]:
    """The class that a converted block had."""
    return next(kind for kind in type(module).__mro__ if not issubclass(kind, ConvertedBlock))


def _run(module: nn.Module, original: Callable[..., Any], x: Any) -> Any:
    """x [N, C, H, W] -> [N, K, H, W] in channels_last memory, as the original computes it.

    Raises KernelError where the backend demands kernels that cannot run.
    """
    state = module.__dict__.get(STATE)
    if state is None:
        # Somebody has made another instance of a converted block's class.
        return original(module, x)
    traced = isinstance(x, torch.fx.Proxy)
    if not traced and not (isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()):
        return original(module, x)
    reason, inside = _inspect(module, state)
    if reason is None:
        params = _params(module, state, inside)
        if traced or x.dtype == params.weights[0].dtype or autocast_enabled(x):
            return inception(x, params, activation=state.activation)
        # Which the original may convert, or refuse in its own words.
        return original(module, x)
    if traced:
        return original(module, x)
    y = eager(x, reason, dispatch.current(), partial(original, module), quiet=reason in USUAL_REASONS)
    if not state.known:
        _settle(module)
    return y


def _blank(original: type[nn.Module]) -> nn.Module:
    """An empty instance for unpickling."""
    kind = converted_class(original)
    return kind.__new__(kind)


@cache
def converted_class(original: type[nn.Module]) -> type[nn.Module]:
    """The subclass of a block's class that runs kernels where it is given one image tensor, by place or by name."""
    name_of_x = next(iter(list(inspect.signature(original.forward).parameters)[1:]), None)

    @wraps(original.forward)  # torch.export and symbolic tracing look at its signature
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if len(args) + len(kwargs) == 1 and (args or name_of_x in kwargs):
            return _run(self, original.forward, *args, *kwargs.values())
        return original.forward(self, *args, **kwargs)

    name = f"Fused{original.__name__}"
    return type(name, (ConvertedBlock, original), {"__doc__": ConvertedBlock.__doc__, "forward": forward})


def adopt(
    module: nn.Module, roles: Roles, activation: str | None, *, known: bool = True, channels_last: bool = False
) -> None:
    """Turns a block into a converted one. Its layers stay the objects that they are."""
    kind = converted_class(type(module))
    tree, names = _tree(module)
    places = [
        tuple([names.index(name) for name in group if name]) for group in (roles.convs, roles.norms, (roles.pool,))
    ]
    module.__dict__[STATE] = State(
        roles, tree, *places, len(module._modules), settings_of(module),
        variant(module, roles), activation, known, channels_last=channels_last,
    )  # fmt: skip
    module.__class__ = kind


def variant(module: nn.Module, roles: Roles) -> str:
    """A block's variant in words."""
    side = layer(module, roles.convs[4]).kernel_size[0]
    return f"{side}x{side} in branch 3" + (", BatchNorm" if roles.norms else "")


def release(module: nn.Module) -> None:
    """The inverse of :func:`adopt`."""
    del module.__dict__[STATE]
    module.__class__ = original_of(module)


def _tree(module: nn.Module) -> tuple[tuple[Child, ...], list[str]]:
    """Every module inside, parents first, and their dotted names."""
    found: list[Child] = []
    names: list[str] = []

    def walk(module: nn.Module, parent: int, prefix: str) -> None:
        for key, child in module._modules.items():
            if child is not None:
                kind = nn.Conv2d if type(child) is nn.LazyConv2d else type(child)
                settings = settings_of(child) if child._modules else ()
                found.append(Child(parent, key, kind, len(child._modules), settings))
                names.append(prefix + key)
                walk(child, len(found) - 1, f"{prefix}{key}.")

    walk(module, -1, "")
    return tuple(found), names


def settings_of(module: nn.Module) -> tuple[tuple[str, Any], ...]:
    """The plain values and functions among a module's own attributes, on which its forward may depend."""
    return tuple(
        (name, value)
        for name, value in module.__dict__.items()
        if not name.startswith("_") and name != "training" and (isinstance(value, PLAIN) or callable(value))
    )


PLAIN = (bool, int, float, str, type(None))


def obstacle(module: nn.Module) -> str | None:
    """What about a converted block's layers keeps the kernels from standing in for them; None if nothing."""
    return _inspect(module, module.__dict__[STATE])[0]


def _inspect(module: nn.Module, state: State) -> tuple[str | None, list[nn.Module]]:
    """The obstacle, and where there is none the modules of State.tree as they are now. Asked at every call."""
    if state.refused or not state.known:
        return state.refused or WAITING, []
    if len(module._modules) != state.children:
        return f"it has {len(module._modules)} children, had {state.children}", []
    changed = _changed(module, state.settings)
    if changed:
        return changed, []
    inside: list[nn.Module] = []
    biases = 0
    for parent, key, kind, children, settings in state.tree:
        child = (inside[parent] if parent >= 0 else module)._modules.get(key)
        if type(child) is not kind:
            return f"{_dotted(state, len(inside))} is a {type(child).__name__}, not a {kind.__name__}", []
        d = child.__dict__
        if is_touched(d):
            return f"{_dotted(state, len(inside))} has a hook or a forward of its own", []
        if len(d["_modules"]) != children:
            return f"{_dotted(state, len(inside))} has {len(d['_modules'])} layers, had {children}", []
        if settings and (changed := _changed(child, settings)):
            return f"{_dotted(state, len(inside))}: {changed}", []
        inside.append(child)
    for short, index in zip(CONV_NAMES, state.convs, strict=True):
        child = inside[index]
        if not has_usual_settings(child.__dict__, short) and not is_same_conv(child, SIDES.get(short, (1,))):
            return f"{_dotted(state, index)} is configured as {child}", []
        biases += child.bias is not None
    if biases not in (0, 6):
        return "some convolutions have a bias and some have none", []
    for index in state.pools:
        if not is_pool_3x3(inside[index]):
            return f"{_dotted(state, index)} is configured as {inside[index]}", []
    if not torch.compiler.is_compiling() and is_globally_hooked():
        return "a global module hook is registered", []
    for index in state.norms:
        d = inside[index].__dict__
        if d["training"]:
            return TRAINING, []
        if d["_buffers"]["running_mean"] is None or d["_buffers"]["running_var"] is None:
            return f"{_dotted(state, index)} keeps no running statistics", []
    return None, inside


def _dotted(state: State, index: int) -> str:
    """The name of a module in State.tree."""
    keys = []
    while index >= 0:
        keys.append(state.tree[index].key)
        index = state.tree[index].parent
    return ".".join(reversed(keys))


def _changed(module: nn.Module, settings: tuple[tuple[str, Any], ...]) -> str:
    """Which of a module's plain attributes is no longer what it was; "" where none."""
    d = module.__dict__
    for name, value in settings:
        now = d.get(name, d)
        if now is not value and now != value:
            return f"its {name} is {now!r}, was {value!r}"
    return ""


def _params(module: nn.Module, state: State, inside: list[nn.Module]) -> InceptionParams:
    """Roles.params() without looking for the layers again."""
    owned = [inside[index]._parameters for index in state.convs]
    norms = [inside[index].__dict__ for index in state.norms]
    try:
        biases = tuple([p["bias"] for p in owned])
        return InceptionParams(
            tuple([p["weight"] for p in owned]),
            None if biases[0] is None else biases,
            tuple([_batch_norm(d["_parameters"], d["_buffers"], d["eps"]) for d in norms]) or None,
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
    from inception_fused.conversion import to_channels_last, try_block

    activation, why = try_block(module, original_of(module), state.roles)
    module.__dict__[STATE] = state._replace(activation=activation, known=True, refused=why)
    if state.channels_last and not why:
        to_channels_last(module)


class ConvertedView:
    """A converted block as the rest of the package sees a block: by the names that FusedInception has."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def activation(self) -> str | None:
        return self.module.__dict__[STATE].activation

    def params(self) -> InceptionParams:
        return self.module.__dict__[STATE].roles.params(self.module)

    def eager_reason(self) -> str | None:
        return obstacle(self.module)


def view_of(module: object) -> Block | None:
    """A module as a block of this package, which the tools for whole models ask for; None if it is none."""
    if isinstance(module, ConvertedView):
        return module
    if isinstance(module, ConvertedBlock) and STATE in module.__dict__:
        return ConvertedView(module)
    return module if isinstance(module, FusedInception) else None


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of a model that is a block, by its name, once each; "model" where it is the model itself."""
    return {name or "model": module for name, module in model.named_modules() if view_of(module) is not None}
