"""The calls that are timed: a block at one point with its inputs, eager, compiled or in a CUDA graph.

Every implementation of a point gets the same weights and inputs. PyTorch's own are set up as their best
common form: channels_last activations and weights, cuDNN's algorithm search on, TF32 on for fp32 (both for
convolutions and GEMMs), and for torch.compile a cache cleared before each point with static shapes, without
which its limit on recompilations silently gives eager's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from inception_fused.googlenet import InceptionConfig

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "fp32": torch.float32}
MODES = ("forward", "training", "graph")
"""forward without gradients; training: forward and the gradients of x and all parameters; graph: the
forward captured in a CUDA graph."""

OUTPUT_LIMIT = 0.02
"""bf16 with the bias added before or after the rounding differs by 0.003."""

GRADIENT_LIMIT = 0.15
"""The same two differ by 0.05: where a ReLU's input is near zero, rounding flips its mask."""


@dataclass(frozen=True)
class Point:
    """One case. config: of the block; size: H = W of its feature map; dtype, mode: of DTYPES and MODES."""

    block: str
    config: InceptionConfig
    size: int
    batch: int
    dtype: str
    mode: str = "forward"

    def __str__(self) -> str:
        return f"{self.block} batch {self.batch} {self.dtype} {self.mode}"


@contextmanager
def tensor_core_settings() -> Iterator[None]:
    """Within it cuDNN searches for its fastest algorithm, and fp32 convolutions and GEMMs run as TF32."""
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.benchmark = torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, allow_tf32
        torch.set_float32_matmul_precision(precision)


def build(
    block: Callable[..., nn.Module],
    point: Point,
    device: torch.device | str,
    memory_format: torch.memory_format = torch.channels_last,
) -> nn.Module:
    """``block(*point.config)`` with weights that depend on the point only, in the point's dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = block(*point.config)
    return module.to(device=device, dtype=DTYPES[point.dtype], memory_format=memory_format)


def operands(
    point: Point, device: torch.device | str, memory_format: torch.memory_format = torch.channels_last
) -> tuple[Tensor, Tensor]:
    """x [N, C, H, W] and dy [N, K, H, W], normal random values that depend on the point only."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(channels: int) -> Tensor:
        shape = (point.batch, channels, point.size, point.size)
        values = torch.randn(shape, generator=generator, device=device, dtype=torch.float32)
        return values.to(dtype=DTYPES[point.dtype], memory_format=memory_format)

    x, dy = draw(point.config.in_channels), draw(point.config.out_channels)
    return x.requires_grad_(point.mode == "training"), dy


def call_of(module: nn.Module, x: Tensor, dy: Tensor, mode: str) -> Callable[[], tuple[Tensor, ...]]:
    """The call that is timed. It returns (y,), or in training y and the gradients of x and the parameters.

    Gradients are returned, not accumulated, so that no implementation is charged for adding into ``.grad``.
    """
    if mode not in MODES:
        raise ValueError(f"mode: got {mode!r}, wants one of {', '.join(MODES)}")

    def forward() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (module(x),)

    def training() -> tuple[Tensor, ...]:
        y = module(x)
        return (y.detach(), *torch.autograd.grad(y, wanted, dy))

    wanted = (x, *module.parameters())
    return training if mode == "training" else forward


def compiled(module: nn.Module) -> nn.Module:
    """``module`` under torch.compile for this point alone; the first call compiles."""
    torch.compiler.reset()
    return torch.compile(module, dynamic=False, fullgraph=True)


def graphed(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], object], tuple[Tensor, ...]]:
    """Captures ``call`` in a CUDA graph; returns its replay and the tensors that every replay writes.

    Raises what the capture raises: a call that synchronises with the host cannot be captured.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = call()
    return graph.replay, outputs


def assert_agree(what: str, actual: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    """Raises AssertionError where two results of one call, as :func:`call_of` returns them, plainly differ.

    The measure is the relative norm of the difference; a NaN never agrees. It catches a wrong kernel before
    it is timed and is no parity test: the limits are :data:`OUTPUT_LIMIT` and :data:`GRADIENT_LIMIT`.
    """
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        scale = torch.linalg.vector_norm(e.float()).item()
        error = torch.linalg.vector_norm(a.float() - e.float()).item() / (scale or 1.0)
        limit = GRADIENT_LIMIT if index else OUTPUT_LIMIT
        if not error < limit:
            name = f"gradient {index}" if index else "the output"
            raise AssertionError(f"{what}: {name} is {error:.3g} off in relative norm, limit {limit}")
