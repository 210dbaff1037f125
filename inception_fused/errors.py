"""The three ways in which a call can tell its caller that something is off."""


class InceptionInputError(RuntimeError):
    """A wrong call: the message names the argument, what it got and what it wants."""


class KernelError(RuntimeError):
    """A kernel was demanded (``backend("kernels")`` or ``"K1=triton"``) and cannot run, or a launch failed."""


class FallbackWarning(UserWarning):
    """The block ran in eager PyTorch where a caller could have expected kernels; the message says why."""
