"""The calls that are timed: a block at one point with its inputs, eager, compiled or in a CUDA graph.

Every implementation of a point gets the same weights and inputs. PyTorch's own are set up as their best
common form: channels_last activations and weights, cuDNN's algorithm search on, TF32 on for fp32 (both for
convolutions and GEMMs), and for torch.compile a cache cleared before each point with static shapes, without
which its limit on recompilations silently gives eager's time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from inception_fused.block.googlenet_blocks import InceptionConfig, block_shape, branch3_name, branch3_options
from inception_fused.block.shapes import BlockShape

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
    """One case. config, activation: of the block; size: H = W of its feature map; dtype, mode: of DTYPES and MODES;
    branch3: sides of the windows of its third branch, as in googlenet_blocks.BRANCH3."""

    block: str
    config: InceptionConfig
    size: int
    batch: int
    dtype: str
    mode: str = "forward"
    activation: str | None = "relu"
    branch3: tuple[int, ...] = (5,)

    @property
    def shape(self) -> BlockShape:
        return block_shape(self.config, self.batch, self.size, DTYPES[self.dtype], branch3=self.branch3)

    @property
    def label(self) -> str:
        """The block, with what it has other than GoogLeNet's."""
        form = "" if self.branch3 == (5,) else f" {branch3_name(self.branch3)}"
        return f"{self.block}{form}{'' if self.activation else ' without ReLU'}"

    def __str__(self) -> str:
        return f"{self.label} batch {self.batch} {self.dtype} {self.mode}"


@contextmanager
def tensor_core_settings(*, tf32: bool = True) -> Iterator[None]:
    """Within it cuDNN searches for its fastest algorithm, and fp32 convolutions and GEMMs run as TF32, or strictly."""
    benchmark, precision = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    allow_tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = True, tf32
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark, torch.backends.cudnn.allow_tf32 = benchmark, allow_tf32
        torch.set_float32_matmul_precision(precision)


LAYOUTS = {"channels_last": torch.channels_last, "KCRS": torch.contiguous_format}
"""What results call the memory format of weights. KCRS, PyTorch's own, costs a forward one launch more: pack."""


def build(
    block: Callable[..., nn.Module],
    point: Point,
    device: torch.device | str,
    memory_format: torch.memory_format = torch.channels_last,
) -> nn.Module:
    """``block(*config, activation=...)`` of a point, with its windows and with weights that depend on it only, in its
    dtype."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = block(*point.config, activation=point.activation, **branch3_options(point.branch3))
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
    """The call that is timed. It returns (y,), or in training y and the gradients of x, if it wants one, and of the
    parameters.

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

    wanted = (*([x] if x.requires_grad else []), *module.parameters())
    return training if mode == "training" else forward


def compiled(module: nn.Module, mode: str = "default") -> nn.Module:
    """``module`` under torch.compile for this point alone; the first call compiles. mode: torch.compile's."""
    torch.compiler.reset()
    return torch.compile(module, dynamic=False, fullgraph=True, mode=mode)


def stepped(call: Callable[[], tuple[Tensor, ...]]) -> Callable[[], tuple[Tensor, ...]]:
    """``call`` of a module compiled with CUDA graphs: before each, the outputs of the one before are given up."""

    def step() -> tuple[Tensor, ...]:
        torch.compiler.cudagraph_mark_step_begin()
        return call()

    return step


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


def assert_agree(
    what: str,
    actual: Sequence[Tensor],
    expected: Sequence[Tensor],
    *,
    limits: tuple[float, float] = (OUTPUT_LIMIT, GRADIENT_LIMIT),
    slices: Sequence[int] | None = None,
) -> None:
    """Raises AssertionError where two results of one call, as :func:`call_of` returns them, plainly differ.

    The measure is the relative norm of the difference; a NaN never agrees. It catches a wrong kernel before
    it is timed and is no parity test. limits: of the output and of a gradient. slices: channels of the branches, of
    which each is then judged on its own, so that a wrong one cannot hide in the norm of all.
    """
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        name, limit = (f"gradient {index}", limits[1]) if index else ("the output", limits[0])
        if a.shape != e.shape:
            raise AssertionError(f"{what}: {name} is {tuple(a.shape)}, not {tuple(e.shape)}")
        cut = list(slices) if slices and not index else [a.shape[0]]
        axis = 1 if slices and not index else 0
        for branch, (part, truth) in enumerate(zip(a.split(cut, axis), e.split(cut, axis), strict=True), 1):
            scale = torch.linalg.vector_norm(truth.float()).item()
            error = torch.linalg.vector_norm(part.float() - truth.float()).item() / (scale or 1.0)
            if not error < limit:
                where = f"{name}, branch {branch}," if axis else name
                raise AssertionError(f"{what}: {where} is {error:.3g} off in relative norm, limit {limit}")


def assert_block_parity(
    point: Point,
    device: torch.device | str,
    memory_format: torch.memory_format = torch.channels_last,
    *,
    backward: bool,
) -> None:
    """Asserts parity of our block with float64 at the point's block, batch and dtype, its kernels demanded.

    memory_format: of the weights; in PyTorch's own, pack is one of the launches that are tested.
    """
    from inception_fused import FusedInception, backend, testing

    module = build(FusedInception, point, device, memory_format)
    x, _ = operands(replace(point, mode="forward"), device)
    with backend("kernels"):
        testing.assert_parity(module, x, backward=backward)
