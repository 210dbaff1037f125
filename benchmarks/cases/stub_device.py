"""A device that does nothing: the whole path of a launch runs, up to the driver, on a machine without a GPU.

Kernels are compiled as for an H100 and never run, so outputs stay unwritten. What is left is the time that Python
spends. Not in it: CUDA's allocator (PyTorch's for the CPU answers instead), the switch to x's device, cuLaunchKernel.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar
from unittest.mock import patch

CAPABILITY = 90
THREADS_PER_BLOCK = 1024

INDEX = 1000
"""Of the device: Triton keeps compiled kernels by it, and those of a GPU in the same process must stay that GPU's."""


class _Utils:
    """What Triton asks of a driver when it loads a binary."""

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 227 << 10, "multiprocessor_count": 132}

    def load_binary(self, name: str, kernel: bytes, shared: int, device: int) -> tuple[Any, ...]:
        function = hash(kernel)
        return object(), function, 0, 0, THREADS_PER_BLOCK


class _Launcher:
    """In the place of Triton's compiled launcher, with its signature; keeps the arguments of its calls."""

    calls: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, src: Any, metadata: Any) -> None:
        pass

    def __call__(self, *args: Any) -> None:
        self.calls.append(args)


class _Driver:
    """A Triton driver for a device that is not there."""

    launcher_cls = _Launcher
    utils = _Utils()

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self) -> int:
        return INDEX

    def get_current_stream(self, device: int = 0) -> int:
        return 0


@contextmanager
def stub_device() -> Iterator[type[_Launcher]]:
    """Within it blocks run the kernels' path on CPU tensors, with launches that do nothing; yields the launcher.

    Raises RuntimeError under TRITON_INTERPRET=1, where kernels are not compiled.
    """
    import triton

    from inception_fused.op import backends, reasons

    if triton.knobs.runtime.interpret:
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not launched; unset it")
    with ExitStack() as stack:
        stack.enter_context(patch.object(reasons, "MACHINE", ()))
        stack.enter_context(backends.backend("kernels"))
        triton.runtime.driver.set_active(_Driver())
        try:
            yield _Launcher
        finally:
            # There is no default to reset it to where there is no GPU.
            triton.runtime.driver._active = None
