"""Triton's real CUDA driver over libcuda/stub.c, and CPU tensors that pass for those of its two devices.

What a process needs that runs the path of a launch to its end without a GPU: everything is Triton's and PyTorch's own
code, but for the functions of torch.cuda, which a CPU build lacks, and ptxas, since the stub reads PTX.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import shutil
import subprocess
import sysconfig
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

SOURCE = Path(__file__).with_name("libcuda") / "stub.c"

MOST_PARAMETERS, NAME = 96, 64
"""As in stub.c."""


def compiler() -> str:
    """The compiler that Triton takes. Raises RuntimeError where it or Python's headers are missing."""
    found = shutil.which(os.environ.get("CC", "gcc"))
    if found is None:
        raise RuntimeError("Triton's launcher needs a C compiler: set CC, or install gcc (Debian: apt-get install gcc)")
    if not Path(sysconfig.get_path("include"), "Python.h").is_file():
        raise RuntimeError("Triton's launcher needs Python's headers (Debian: apt-get install python3-dev)")
    return found


def build(folder: Path) -> None:
    """The stub as libcuda.so.1 in a folder."""
    include = Path(find_spec("triton").origin).with_name("backends") / "nvidia" / "include"
    library = folder / "libcuda.so.1"
    # The name, by which the loader takes it for the library that Triton's modules ask for.
    flags = ("-shared", "-fPIC", f"-I{include}", f"-Wl,-soname,{library.name}")
    subprocess.run([compiler(), *flags, SOURCE, "-o", library], check=True)
    # Triton 3.5 links with -lcuda.
    (folder / "libcuda.so").symlink_to(library.name)


class _Launch(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("shared", ctypes.c_uint32),
        ("attributes", ctypes.c_uint32),
        ("device", ctypes.c_int32),
        ("parameters", ctypes.c_int32),
        ("stream", ctypes.c_uint64),
        ("function", ctypes.c_uint64),
        ("sizes", ctypes.c_int32 * MOST_PARAMETERS),
        ("values", ctypes.c_uint64 * MOST_PARAMETERS),
        ("name", ctypes.c_char * NAME),
    )


class Arrived(NamedTuple):
    """One launch as it reached the driver. device: whose context was current; function: its handle; parameters:
    (bytes, value) of each."""

    name: str
    grid: list[int]
    block: list[int]
    shared: int
    attributes: int
    device: int
    stream: int
    function: int
    parameters: list[tuple[int, int]]


class Stub:
    """The library, loaded, with Triton's driver over it. streams: the current one of each device, by index."""

    def __init__(self, folder: Path) -> None:
        self.library = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
        self.library.stub_set_device(0)
        self._streams = itertools.count(0x5000, 16)
        self.streams = [next(self._streams), next(self._streams)]
        self._pretend(folder)

    def _pretend(self, folder: Path) -> None:
        import torch

        os.environ["TRITON_LIBCUDA_PATH"] = str(folder)
        torch._C._cuda_getCurrentRawStream = self.streams.__getitem__
        torch.cuda.current_device = self.device
        torch.cuda._exchange_device = torch.cuda._maybe_exchange_device = self.exchange
        torch.cuda.get_device_capability = lambda device=None: (9, 0)
        torch.cuda.get_device_properties = lambda device=None: SimpleNamespace(name="a stub", major=9, minor=0)
        import triton
        from triton.backends.nvidia.compiler import CUDABackend
        from triton.backends.nvidia.driver import CudaDriver

        CUDABackend.make_cubin = lambda self, ptx, *_: ptx.encode()
        triton.runtime.driver.set_active(CudaDriver())

    def device(self) -> int:
        """Whose context is current."""
        return self.library.stub_device()

    def exchange(self, device: int) -> int:
        """Make another device current; returns the one before."""
        before = self.device()
        self.library.stub_set_device(device)
        return before

    def change_streams(self) -> None:
        """Other streams are current from here on."""
        self.streams[:] = next(self._streams), next(self._streams)

    def arrived(self) -> list[Arrived]:
        """The launches since the last call."""
        first = ctypes.POINTER(_Launch)()
        count = self.library.stub_launches(ctypes.byref(first))
        found = []
        for launch in first[:count]:
            parameters = list(zip(launch.sizes, launch.values, strict=True))[: launch.parameters]
            rest = (launch.shared, launch.attributes, launch.device, launch.stream, launch.function, parameters)
            found.append(Arrived(launch.name.decode(), list(launch.grid), list(launch.block), *rest))
        self.library.stub_clear()
        return found


def pretending(index: int) -> Any:
    """A mode within which CPU tensors say that they are on CUDA device ``index``, and those made there are CPU's.

    Its ``memory`` are the tensors that were made, one for each storage.
    """
    import torch
    from torch import Tensor
    from torch.overrides import TorchFunctionMode

    device = torch.device("cuda", index)
    answers = {Tensor.device: device, Tensor.is_cuda: True}

    class Pretending(TorchFunctionMode):
        def __init__(self) -> None:
            super().__init__()
            self.memory: dict[int, Tensor] = {}

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            getter = getattr(func, "__self__", None)
            if getter in answers:
                return answers[getter]
            if func is Tensor.get_device:
                return index
            kwargs = dict(kwargs or {})
            if kwargs.get("device") == device:
                kwargs["device"] = "cpu"
            result = func(*args, **kwargs)
            if isinstance(result, Tensor):
                self.memory.setdefault(result.untyped_storage().data_ptr(), result)
            return result

    return Pretending()
