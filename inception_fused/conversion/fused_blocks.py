"""The blocks of a model that run kernels, built so or converted, GoogLeNet's stem among them, as the tools for whole
models see them."""

from __future__ import annotations

from torch import nn

from inception_fused.block.reference import InceptionParams
from inception_fused.conversion.converted import ConvertedBlock
from inception_fused.conversion.inspection import STATE, eager_reason
from inception_fused.modules.fused_inception import Block, FusedInception
from inception_fused.modules.stem import LAYERS, FusedStem

BUILT = {FusedInception: "built with FusedInception", FusedStem: "GoogLeNet's stem"}
"""Classes of blocks that nobody has to convert, and what :func:`explain` calls them."""


class ConvertedView:
    """A converted block as the rest of the package sees a block: by the names that FusedInception has."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @property
    def activation(self) -> str | None:
        return self.module.__dict__[STATE].activation

    def params(self) -> InceptionParams:
        """A BatchNorm that trains has no mean and variance: it takes those of the batch."""
        return self.module.__dict__[STATE].roles.params(self.module)

    def params_in_eval(self) -> InceptionParams:
        return self.module.__dict__[STATE].roles.params(self.module, batch=False)

    def eager_reason(self) -> str | None:
        return eager_reason(self.module)


def view_of(module: object) -> Block | None:
    """A module as a block of this package, which the tools for whole models ask for; None if it is none."""
    if isinstance(module, ConvertedView):
        return module
    if isinstance(module, ConvertedBlock) and STATE in module.__dict__:
        return ConvertedView(module)
    return module if is_built(module) else None


def is_built(module: object) -> bool:
    """Whether a module runs kernels without a conversion; a slice of a stem is a Sequential like any other."""
    return isinstance(module, FusedInception) or (isinstance(module, FusedStem) and module.is_whole())


def fused_part(module: nn.Module) -> nn.Module:
    """What of a block the kernels stand in for: of a stem not the layers that follow, such as the pool."""
    if not isinstance(module, FusedStem):
        return module
    part = module[: len(LAYERS)]
    part.training = module.training
    return part


def words_of(block: Block) -> str:
    """What a block is, in words."""
    if isinstance(block, ConvertedView):
        return block.module.__dict__[STATE].what
    return next(words for kind, words in BUILT.items() if isinstance(block, kind))


def blocks_of(model: nn.Module) -> dict[str, nn.Module]:
    """Every module of a model that is a block, by its name, once each; "model" where it is the model itself."""
    return {name or "model": module for name, module in model.named_modules() if view_of(module) is not None}
