"""The names by which a pickle finds its classes: stable ones in a new pickle, files of before the folders in an old
one.

Public classes are pickled as ``inception_fused.NAME``. What else a block's pickle holds is named here, as
``inception_fused.pickles.NAME``, so that its file may move. Before there were folders a pickle named files: OLD has
them. Objects of tools (Verification, Explanation) are results of one version, and have no old names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from inspect import get_annotations
from types import ModuleType
from typing import Any, get_type_hints

from inception_fused.block.googlenet_blocks import InceptionConfig
from inception_fused.block.reference import Inception, InceptionParams
from inception_fused.block.views import BatchNorm
from inception_fused.conversion.api import convert, convert_, revert_
from inception_fused.conversion.converted import _blank
from inception_fused.conversion.inspection import Child, State
from inception_fused.conversion.torchvision_block import ConvNormRelu, TorchvisionInception
from inception_fused.modules.entry import FusedEntry
from inception_fused.modules.fused_inception import FusedInception
from inception_fused.modules.googlenet import GoogLeNet
from inception_fused.modules.pools import FusedPool, pooled
from inception_fused.modules.stem import FusedStem, stem
from inception_fused.modules.structure import Roles
from inception_fused.modules.watch import Seen
from inception_fused.op.autograd import FusedInceptionFunction, inception

STABLE = (Child, State, _blank, ConvNormRelu, FusedEntry, FusedPool, FusedStem, Roles, Seen, pooled, stem)
"""What the pickle of a block, a network or a graph of one holds and is not public."""

OLD = {
    "adapter": (Child, State, _blank),
    "conversion": (convert, convert_, revert_),
    "function": (FusedInceptionFunction, inception),
    "googlenet": (GoogLeNet, InceptionConfig),
    "kernels.views": (BatchNorm,),
    "module": (FusedInception,),
    "reference": (Inception, InceptionParams),
    "structure": (Roles,),
    "torchvision_block": (ConvNormRelu, TorchvisionInception),
    "watch": (Seen,),
}
"""Files of before, with what pickles (and graphs of torch.fx, which name functions) took from them."""


def register(public: Iterable[object]) -> None:
    """Gives the package's public classes and functions, and STABLE, their names, and Python's import the modules of
    OLD. Once, by the package."""
    for item in public:
        if callable(item):
            _name(item, __package__)
    for item in STABLE:
        _name(item, __name__)
    for name, items in OLD.items():
        path = f"{__package__}.{name}"
        # One file has become a folder of the same name.
        old = sys.modules.setdefault(path, ModuleType(path, "What pickles of before the folders take from here."))
        vars(old).update({item.__name__: item for item in items})


def _name(item: Any, module: str) -> None:
    if isinstance(item, type) and (own := get_annotations(item)):
        # Which are strings until somebody looks them up, in the module that a class says it is from.
        hints = get_type_hints(item)
        item.__annotations__ = {name: hints[name] for name in own}
    item.__module__ = module
