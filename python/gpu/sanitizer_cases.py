"""Launch the kernels on odd shapes and judge their results: the program that compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python python/gpu/sanitizer_cases.py
    python python/gpu/sanitizer_cases.py [--kernels native|triton] [--list]
    python python/gpu/sanitizer_cases.py --overrun

With "native" the compiled kernels are used and ATen computes the rest, with "triton" every kernel is Triton's.
A case that saves for backward is also run backward, for all gradients. The last cases have BatchNorm in training, and
with "triton" are GoogLeNet's stem, of which nothing is compiled.
PyTorch's caching allocator must be off, as above: it would hide a write beyond a tensor inside a larger block.
--overrun writes beyond a tensor on purpose: a tool that does not report it sees nothing.

Exit code: 0 if every result was right, 1 if any was wrong; the last line says how many cases there were.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from torch import Tensor

from checks.block_cases import (
    DTYPES,
    ODD,
    ODD_STEM,
    SMALL,
    Block,
    backward,
    check_backward,
    check_bits,
    check_kernels,
    check_taps,
    check_values,
    conv_truth,
    make_block,
)
from gpu.normed_cases import ALL, DOUBLE, MIXED, check_normed, check_normed_gradients, make_normed, raw_values
from inception_fused import InceptionConfig
from inception_fused.block import chains
from inception_fused.block.googlenet_blocks import Config, StemConfig
from inception_fused.block.views import ChannelSlice, Epilogue, row_stride
from inception_fused.op.launcher import function_of
from inception_fused.plan import choice
from inception_fused.plan.launches import USUAL
from inception_fused.plan.problems import launch_of
from inception_fused.testing import Error, tolerance

BACKENDS = {
    "native": ",".join(f"{kernel}={'native' if kernel in choice.COMPILED else 'eager'}" for kernel in choice.KERNELS),
    "triton": ",".join(f"{kernel}=triton" for kernel in choice.KERNELS),
}

Results = TypeVar("Results")

DONE = "cases, none wrong"
"""End of the last line of a run without a wrong result."""


class Case(NamedTuple):
    """One call. shape: (N, H, W). wide: (channels, first) of the tensor that x is a slice of, None for all of it.
    modes: of batch_stats one a convolution, of a BatchNorm that trains, () for none; seven are two 3x3 in branch 3.
    dy_rows: dy is channels_last, else NCHW."""

    name: str
    config: Config
    shape: tuple[int, int, int]
    wide: tuple[int, int] | None = None
    bias: bool = True
    activation: str | None = "relu"
    save: bool = True
    own_stream: bool = False
    modes: tuple[int, ...] = ()
    dy_rows: bool = True


CASES = (
    # 8174 rows are 64 tiles of 128, the last with 110. Channels fill the ring of four steps and leave a tail of K.
    Case("128x128", InceptionConfig(168, 120, (88, 16), (40, 8), 8), (2, 61, 67)),
    Case("128x96", InceptionConfig(40, 88, (56, 16), (24, 8), 8), (2, 61, 67)),
    Case(
        "128x96, no bias, no activation", InceptionConfig(40, 88, (56, 16), (24, 8), 8), (2, 61, 67), None, False, None
    ),
    Case("64x64, long K", InceptionConfig(200, 48, (40, 16), (24, 8), 8), (2, 7, 5)),
    Case("64x64, one row", InceptionConfig(200, 64, (56, 16), (40, 8), 8), (1, 1, 1)),
    Case("64x64, 65 rows, own stream", SMALL, (1, 5, 13), own_stream=True),
    Case("64x64, no bias", SMALL, (2, 7, 5), bias=False),
    Case("64x64, no activation", SMALL, (2, 7, 5), activation=None),
    Case("64x64, nothing saved", SMALL, (2, 7, 5), save=False),
    # x ends where the wide tensor ends, so that whatever is read behind it is behind the allocation.
    Case("64x64, slice on 16 bytes", SMALL, (2, 6, 5), (40, 16)),
    Case("unaligned, slice off 16 bytes", SMALL, (2, 6, 5), (25, 1)),
    Case("unaligned", ODD, (2, 7, 5)),
    Case("unaligned, one row", InceptionConfig(17, 61, (47, 20), (37, 11), 5), (1, 1, 1)),
    Case("unaligned, no bias, no activation", ODD, (3, 5, 5), bias=False, activation=None),
    Case("unaligned, nothing saved, own stream", ODD, (1, 9, 15), save=False, own_stream=True),
)

NORMED_CASES = (
    # 8174 rows are 256 tiles of 32 for the statistics, of which several are one range's.
    Case("BatchNorm", InceptionConfig(40, 88, (56, 16), (24, 8), 8), (2, 61, 67), bias=False, modes=ALL),
    Case("BatchNorm, two 3x3, own stream", SMALL, (2, 7, 5), own_stream=True, modes=DOUBLE),
    Case("BatchNorm, some in eval mode or absent, slice off 16 bytes", SMALL, (2, 6, 5), (25, 1), modes=MIXED),
    Case("BatchNorm, unaligned, dy NCHW", ODD, (2, 7, 5), modes=ALL, dy_rows=False),
    Case("BatchNorm, unaligned, two 3x3, no activation", ODD, (3, 5, 5), activation=None, modes=DOUBLE),
)
"""The raw forms of K1 to K4, N1 to N6, and B2 with its second sum."""

STEM_CASES = (
    Case("stem", StemConfig(40, 56, 88), (2, 61, 67)),
    Case("stem, odd channels, slice off 16 bytes, own stream", ODD_STEM, (2, 7, 5), (18, 1), own_stream=True),
)
"""Without branches that a block has."""


def cases(kernels: str) -> tuple[Case, ...]:
    """What is run of a set of kernels."""
    return (*CASES, *NORMED_CASES, *(STEM_CASES if kernels == "triton" else ()))


def make(case: Case, dtype: torch.dtype, device: str = "cuda") -> Block:
    """The case's arguments of the operator, x as a slice of a wider tensor of NaN where the case says so."""
    options = dict(bias=case.bias, activation=case.activation, double=len(case.modes) == len(DOUBLE))
    block = make_block(case.config, case.shape, dtype, device=device, **options)
    if case.wide is None:
        return block
    channels, first = case.wide
    n, c, h, w = block.x.shape
    rows = torch.full((n, h, w, channels), float("nan"), dtype=dtype, device=device)
    wide = rows.permute(0, 3, 1, 2)
    wide[:, first : first + c] = block.x
    return block._replace(x=wide[:, first : first + c])


def native_tile(block: Block) -> tuple[int, int, bool]:
    """(BLOCK_M, BLOCK_N, aligned) of the compiled grouped GEMM for a block."""
    stride = row_stride(block.x)
    aligned = block.x.data_ptr() % 16 == 0
    launch = launch_of(USUAL.forward.reductions, block.shape, block.x.dtype, x_row_stride=stride, aligned=aligned)
    tile = choice.native_tile_of(launch)
    return tile.BLOCK_M, tile.BLOCK_N, launch.unit > 1


def called(case: Case, call: Callable[[], Results]) -> Results:
    """What ``call`` returns; the case's own stream has been waited for."""
    if not case.own_stream:
        return call()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        results = call()
    stream.synchronize()
    return results


def forward(case: Case, block: Block, kernels: str) -> tuple[Tensor, ...]:
    """The operator's four outputs."""
    return called(case, lambda: block.forward(BACKENDS[kernels], save=case.save))


def check(block: Block, out: Sequence[Tensor], kernels: str) -> None:
    """Raises AssertionError where a result of ``kernels`` is wrong. Judged on the CPU: no more launches to watch."""
    host = Block(block.x.cpu(), [w.cpu() for w in block.weights], [b.cpu() for b in block.biases], block.relu)
    y, r, bits, taps = (t.cpu() for t in out)
    if kernels == "triton" and len(r) and (len(taps) or not chains.has_pool(host.weights)):
        check_kernels(host, (y, r, bits, taps), tf32=y.dtype == torch.float32)
        return
    check_k1(host, y, r)
    if len(bits):
        check_bits(bits, y, host.shape)


def check_k1(block: Block, y: Tensor, r: Tensor) -> None:
    """Raises AssertionError where y's first slice or r (if it was saved) is not within rounding of float64."""
    shape = block.shape
    images = (shape.n, shape.h, shape.w)
    results = {"y1": (y[:, : shape.branch_channels[0]], 0)}
    if len(r):
        parts = [p.rows(shape.gemm_m).unflatten(0, images).permute(0, 3, 1, 2) for p in shape.r_slices(r)]
        results |= {"r3": (parts[0], 1), "r5": (parts[1], 3)}
    bound = tolerance(block.x.dtype, shape.c, tf32=block.x.dtype == torch.float32)
    for name, (result, i) in results.items():
        truth = conv_truth(block.x, block.weights[i], block.biases[i] if block.biases else None, block.relu)
        error = Error.of(result, truth)
        assert error.within(bound), f"{name}: {error}, bound {bound:.2e}"


def check_gradients(case: Case, block: Block, out: tuple[Tensor, ...], kernels: str) -> None:
    """Runs the backward, and raises AssertionError where a gradient is wrong, judged on the CPU."""
    dy = torch.randn_like(out[0])
    grads = called(case, lambda: backward(block, out, dy, BACKENDS[kernels]))
    host = Block(block.x.cpu(), [w.cpu() for w in block.weights], [b.cpu() for b in block.biases], block.relu)
    saved = tuple(t.cpu() for t in out)
    check_backward(host, saved, dy.cpu(), [g.cpu() for g in grads], tf32=dy.dtype == torch.float32)


def check_normed_case(case: Case, block: Block, kernels: str) -> None:
    """Runs both passes of a case with BatchNorm in training, and raises AssertionError where a result is wrong."""
    normed, wish = make_normed(block, case.modes), BACKENDS[kernels]
    out = called(case, lambda: normed.forward(block, wish))
    dy = torch.randn_like(out[0], memory_format=torch.channels_last if case.dy_rows else torch.contiguous_format)
    grads = called(case, lambda: normed.backward(block, out, dy, wish))
    host = Block(block.x.cpu(), [w.cpu() for w in block.weights], [b.cpu() for b in block.biases], block.relu)
    tf32, results = block.x.dtype == torch.float32, [t.cpu() for t in out]
    if kernels == "triton":
        check_values(*raw_values(host, results), sources=results[3], tf32=tf32)
        check_taps(host, results[4])
    else:
        check_k1(*raw_values(host, results))
    check_normed(host, normed, results)
    check_normed_gradients(host, normed, results, dy.cpu(), [g.cpu() for g in grads], tf32=tf32)


def overrun(device: str = "cuda") -> None:
    """Launches the compiled grouped GEMM on a y without its last eight rows: it writes 1 KB beyond the allocation."""
    m, c, k = 64, 64, (64, 16, 16)

    def draw(*size: int) -> Tensor:
        return torch.randn(size).to(device=device, dtype=torch.bfloat16)

    x, weights = draw(m, c), tuple(draw(n, c) for n in k)
    r, short = draw(m, k[1] + k[2]), draw(m - 8, k[0])
    launch = function_of(USUAL.forward.reductions.kernel, "native")
    launch(
        ChannelSlice(x, c, 0, c), weights,
        ChannelSlice(short, k[0], 0, k[0]),
        ChannelSlice(r, k[1] + k[2], 0, k[1]), ChannelSlice(r, k[1] + k[2], k[1], k[2]), None,
        gemm_m=m, epilogues=(Epilogue(),) * 3, unit=8,
        tile=USUAL.forward.reductions.kernel.native.choose(x.dtype, m, sum(k), unit=8),
    )  # fmt: skip


def failures(kernels: str) -> Iterator[str | None]:
    """For each case what is wrong with it, or None."""
    for dtype in DTYPES:
        for case in cases(kernels):
            print(f"{kernels} {dtype} {case.name}", flush=True)
            block = make(case, dtype)
            try:
                if case.modes:
                    check_normed_case(case, block, kernels)
                else:
                    out = forward(case, block, kernels)
                    check(block, out, kernels)
                    if case.save:
                        check_gradients(case, block, out, kernels)
            except AssertionError as error:
                yield f"{dtype} {case.name}: {error}"
            else:
                yield None


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", choices=sorted(BACKENDS), default="native")
    parser.add_argument("--overrun", action="store_true", help="write beyond a tensor instead, on purpose")
    parser.add_argument("--list", action="store_true", help="list the cases")
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{dtype} {case.name}" for dtype in DTYPES for case in cases(options.kernels)))
        return 0
    if options.overrun:
        overrun()
        try:
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the device reports: {error}", flush=True)
        print("wrote 1 KB beyond a tensor")
        return 0
    found = []
    for wrong in failures(options.kernels):
        found.append(wrong)
        if wrong:
            print(f"WRONG: {wrong}", flush=True)
    wrong = sum(w is not None for w in found)
    print(f"{len(found)} cases, {wrong} wrong" if wrong else f"{len(found)} {DONE}", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
