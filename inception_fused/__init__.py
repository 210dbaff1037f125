"""The Inception block of GoogLeNet as four fused GPU kernels behind a drop-in PyTorch module."""

from inception_fused.conversion import convert, convert_, revert_
from inception_fused.dispatch import backend
from inception_fused.environment import info
from inception_fused.errors import FallbackWarning, InceptionInputError, KernelError
from inception_fused.explanation import explain
from inception_fused.function import FusedInceptionFunction, inception
from inception_fused.googlenet import GOOGLENET_BLOCKS, GoogLeNet, InceptionConfig
from inception_fused.kernels.views import BatchNorm
from inception_fused.module import FusedInception
from inception_fused.precompile import precompile
from inception_fused.reference import Inception, InceptionParams
from inception_fused.torchvision_block import TorchvisionInception
from inception_fused.verification import Verification, verify

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
