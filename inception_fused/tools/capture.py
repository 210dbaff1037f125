"""The input that each block of a model gets in a run of ``model(x)``, which leaves the model as it was."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from inception_fused.block.leaves import is_tracked
from inception_fused.conversion.fused_blocks import blocks_of, view_of
from inception_fused.errors import FallbackWarning, InceptionInputError, KernelError
from inception_fused.modules.fused_inception import Block
from inception_fused.modules.structure import candidates
from inception_fused.op import viewing
from inception_fused.op.autograd import compute_dtype


class Item(NamedTuple):
    """A block with what it was called with: its name, its input (None where there is none, and why says why),
    autocast's dtype there, and whether a gradient of the input is wanted. block: None where the module is no block of
    this package."""

    name: str
    block: Block | None
    x: Tensor | None
    autocast: torch.dtype | None = None
    x_grad: bool = False
    why: str = "model(x) did not call it"

    def autocasting(self) -> AbstractContextManager[object]:
        """autocast as it was where the block was called."""
        return torch.autocast(self.x.device.type, dtype=self.autocast) if self.autocast else nullcontext()

    @property
    def dtype(self) -> torch.dtype:
        """In which the block computes."""
        with self.autocasting():
            return compute_dtype(self.x)


def arguments(model: object, x: object, backward: object) -> dict[str, nn.Module]:
    """The blocks of a model, after a look at what :func:`verify` and its like are given. Raises InceptionInputError."""
    if not isinstance(model, nn.Module):
        raise InceptionInputError(f"model: got {type(model).__name__}, wants an nn.Module with FusedInception blocks")
    if not isinstance(x, Tensor):
        raise InceptionInputError(f"x: got {type(x).__name__}, wants a tensor that model(x) takes")
    if not isinstance(backward, bool):
        raise InceptionInputError(f"backward: got {backward!r}, wants True or False")
    blocks = blocks_of(model)
    if blocks:
        return blocks
    got = f"model: got {type(model).__name__}"
    found = [(name or "the model", proposal) for name, _, proposal in candidates(model)]
    names = [name for name, proposal in found if proposal.roles is not None]
    if names:
        raise InceptionInputError(
            f"{got} whose Inception blocks are not converted ({', '.join(names)}); call "
            "inception_fused.convert_(model) first"
        )
    if found:
        name, proposal = found[0]
        raise InceptionInputError(
            f"{got} without any fused block: {name} looks like one, but {proposal.why}; "
            "inception_fused.explain(model) says it of each"
        )
    raise InceptionInputError(
        f"{got} without any FusedInception in it, wants at least one; convert_(model) where it has Inception blocks of "
        "its own, build them with FusedInception(in_channels, c1, c2, c3, c4), or take GoogLeNet()"
    )


def capture(model: nn.Module, blocks: dict[str, nn.Module], x: Tensor, *, gradients: bool = False) -> list[Item]:
    """Run model(x) once and keep a copy of the input of each block's first call. Leaves the model as it was.

    gradients: whether the model runs as for a backward, which shows whether an input wants a gradient; what autograd
    would save for that is thrown away at once. A model made in inference mode has no backward.

    Raises:
        InceptionInputError: model(x) fails. KernelError: a kernel does, or cannot run where it is demanded.
    """
    found: dict[nn.Module, tuple[Any, ...]] = {}
    gradients = gradients and all(map(is_tracked, model.parameters()))

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = args[0] if args else kwargs.get("x", next(iter(kwargs.values()), None))
        if block in found or not isinstance(given, Tensor):
            return
        kind = given.device.type
        on = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        try:
            found[block] = _copy(given), torch.get_autocast_dtype(kind) if on else None, given.requires_grad
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:  # of a quantised tensor, or one of vmap's
            found[block] = None, None, False, f"its input cannot be copied: {error}"

    with ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        if gradients:
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(lambda t: None, lambda _: None))
        stack.enter_context(unchanged(model, x))
        for block in blocks.values():
            handle = block.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
        if "torch._dynamo" in sys.modules:
            # A compiled model would run without the hooks.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(quiet())
        stack.enter_context(viewing.Advising())
        try:
            model(x)
        except (InceptionInputError, KernelError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # whatever somebody's forward raises
            if viewing.is_refused(error) and any(view_of(block) is not None for block in blocks.values()):
                raise InceptionInputError(f"model: model(x) fails: {viewing.advice(error)}") from error
            raise InceptionInputError(
                f"x: got shape {tuple(x.shape)}, {x.dtype} on {x.device}, with which model(x) fails: "
                f"{type(error).__name__}: {error}; wants an input of the model's shape, dtype and device"
            ) from error
    return [Item(name, view_of(block), *found.get(block, (None,))) for name, block in blocks.items()]


@contextmanager
def quiet() -> Iterator[None]:
    """Without FallbackWarnings: the result says what they say."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FallbackWarning)
        yield


@contextmanager
def unchanged(model: nn.Module, x: Tensor) -> Iterator[None]:
    """Within it the model has copies of its buffers, which it may write into; PyTorch's random state is put back.

    Copies rather than values put back at the end: a write would spoil the backward of a forward that has saved them.
    Parameters that wait for their first input get it, and keep what they drew: then the random state is not put back.
    """
    devices = {t.device.index for t in (x, *model.parameters(), *model.buffers()) if t.is_cuda}
    waiting = any(map(is_lazy, (*model.parameters(), *model.buffers())))
    kept = [(m._buffers, dict(m._buffers)) for m in model.modules() if not isinstance(m, torch.jit.ScriptModule)]
    scripted = [(b, b.clone()) for m in model.modules() if isinstance(m, torch.jit.ScriptModule) for b in m.buffers()]
    copies = {b: b.clone() for _, buffers in kept for b in buffers.values() if b is not None and not is_lazy(b)}
    with nullcontext() if waiting else torch.random.fork_rng(devices=sorted(devices)):
        try:
            for buffers, before in kept:
                buffers.update({name: copies[b] for name, b in before.items() if b in copies})
            yield
        finally:
            for buffers, before in kept:
                added = {} if not waiting else {name: b for name, b in buffers.items() if name not in before}
                buffers.clear()
                buffers.update(before | added)
            for buffer, values in scripted:
                if not torch.equal(buffer, values):
                    buffer.copy_(values)


def _copy(x: Tensor) -> Tensor:
    """x with its strides, those of a slice of channels too; a copy, since the model may go on to write into it."""
    x = x.detach()
    if type(x) is not Tensor or 0 in x.stride():
        return x.clone()
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
