"""A converted block: an instance of its own class's subclass, whose forward runs the kernels on its own parameters.

The subclass is made for the class that the block had, so isinstance, attributes, methods and state_dict stay; only
forward is another. What the block, its layers and their classes were at its conversion stands in one plain attribute.
Whatever has changed since (a layer replaced, wrapped or hooked, an attribute, a class's method) sends a call to the
forward that it had.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial, wraps
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from inception_fused.block.batch_stats import takes_batch
from inception_fused.block.chains import first
from inception_fused.conversion.batch_norm_training import train
from inception_fused.conversion.channels_last import to_channels_last
from inception_fused.conversion.inspection import (
    STATE,
    USUAL_REASONS,
    Child,
    State,
    inspect,
    params_of,
    variant,
)
from inception_fused.conversion.trial import try_block
from inception_fused.modules.structure import Roles, is_lazy, layer
from inception_fused.modules.tracers import announce_script, wants_layers, with_names_of
from inception_fused.modules.watch import Seen
from inception_fused.op import backends
from inception_fused.op.autograd import eager, inception
from inception_fused.op.calls import autocast_enabled

# Symbolic tracing keeps the block as one call instead of looking inside.
torch.fx.wrap("inception")


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
    reason, inside = inspect(module, state)
    if traced and state.roles.norms and reason is None:
        # BatchNorm's statistics in a call of inception() would stay in eval mode for ever: the graph keeps the module,
        # or the layers of one that is itself the root.
        path = x.tracer.path_of_module(module)
        return x.tracer.create_proxy("call_module", path, (x,), {}) if path else original(module, x)
    if reason is None:
        params = params_of(module, state, inside)
        if traced or x.dtype == first(params.weights).dtype or autocast_enabled(x):
            if takes_batch(params.batch_norms):
                return train(x, params, inside, state, partial(original, module))
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
    name_of_x = next(iter(list(signature(original.forward).parameters)[1:]), None)

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
