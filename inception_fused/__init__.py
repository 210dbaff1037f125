"""The Inception block of GoogLeNet as four fused GPU kernels behind a drop-in PyTorch module."""

from inception_fused import pickles
from inception_fused.block.googlenet_blocks import GOOGLENET_BLOCKS, InceptionConfig
from inception_fused.block.reference import Inception, InceptionParams
from inception_fused.block.views import BatchNorm
from inception_fused.conversion.api import convert, convert_, revert_
from inception_fused.conversion.torchvision_block import TorchvisionInception
from inception_fused.errors import FallbackWarning, InceptionInputError, KernelError
from inception_fused.modules.fused_inception import FusedInception
from inception_fused.modules.googlenet import GoogLeNet
from inception_fused.op.autograd import FusedInceptionFunction, inception
from inception_fused.op.backends import backend
from inception_fused.tools.environment import info
from inception_fused.tools.explanation import explain
from inception_fused.tools.precompile import precompile
from inception_fused.tools.verification import Verification, verify

__version__ = "0.1.0"

__all__ = [
    "GOOGLENET_BLOCKS",
    "BatchNorm",
    "FallbackWarning",
    "FusedInception",
    "FusedInceptionFunction",
    "GoogLeNet",
    "Inception",
    "InceptionConfig",
    "InceptionInputError",
    "InceptionParams",
    "KernelError",
    "TorchvisionInception",
    "Verification",
    "backend",
    "convert",
    "convert_",
    "explain",
    "inception",
    "info",
    "precompile",
    "revert_",
    "verify",
]

# What a pickle names, and a traceback.
pickles.register(globals()[name] for name in __all__)
