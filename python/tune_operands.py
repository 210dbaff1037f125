"""One problem of the tuner with tensors: its launches with any tile, and its results judged against float64.

The truth is the launcher's ATen twin in float64 on the very operands that the kernel reads, so that no error hides
behind another kernel's. Operands are normal random values; they depend on the problem only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from inception_fused import plan
from inception_fused.googlenet import InceptionConfig
from inception_fused.kernels import aten
from inception_fused.kernels.views import ChannelSlice, Epilogue, Tile
from inception_fused.problems import Problem, block_shape
from inception_fused.testing import PEAK_FACTOR, Error, tolerance

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""Of a launcher, without tile and unit."""


@dataclass(frozen=True)
class Case:
    """A problem and where in the network it comes from. size: H = W of the block's feature map."""

    block: str
    config: InceptionConfig
    batch: int
    size: int
    dtype: str
    problem: Problem

    @property
    def key(self) -> str:
        """Its identity in files: two blocks with equal channels and pixels share one."""
        p = self.problem
        return f"{p.kernel} {self.dtype} {p.gemm_m} {p.gemm_n} {p.gemm_k}"

    @property
    def bond(self) -> tuple[str, int, int] | None:
        """Equal for cases whose tiles must have one height: the two of B2 whose sums over rows share a buffer."""
        return (self.block, self.batch, self.size) if self.problem.launch in ("B2 3x3", "B2 5x5") else None

    def __str__(self) -> str:
        return f"{self.problem.launch} {self.block} batch {self.batch} {self.dtype}"


class Workload:
    """A case's operands on a device ("meta" for tensors without data)."""

    def __init__(self, case: Case, device: torch.device | str) -> None:
        self.case, self.problem, self.device = case, case.problem, torch.device(device)
        dtype = case.problem.dtype
        self.shape = block_shape(case.config, case.batch, case.size, dtype)
        self.kernel = self.problem.kernel[:2]
        self.forward = self.kernel[0] == "K"
        self.inputs = self._draw(dtype)

    def launches(self, tile: Tile) -> list[Any]:
        """What is timed: for K1 to K4 the launch of inference and that of training, which write bits and taps."""
        return [self.launch(tile, save) for save in ((False, True) if self.forward else (True,))]

    def launch(self, tile: Tile, save: bool) -> Any:
        from inception_fused.kernels.submit import record

        args, kwargs = self.arguments(self.inputs, tile, save)
        with record() as launches:
            _launcher(self.kernel)(*args, **kwargs, tile=tile, unit=self.problem.unit)
        return launches[0]

    def check(self, tile: Tile) -> float:
        """The largest error of a tile's results over its bound. Raises AssertionError where one is beyond it."""
        worst = 0.0
        for save in (False, True) if self.forward else (True,):
            args, kwargs = self.arguments(self.inputs, tile, save)
            results = self.results(args, kwargs)
            for result in results.values():
                result.fill_(255 if result.dtype == torch.uint8 else float("nan"))
            _launcher(self.kernel)(*args, **kwargs, tile=tile, unit=self.problem.unit)
            for name, result in results.items():
                where = f"{self.case}, {tile}, {'saving' if save else 'not saving'}: {name}"
                worst = max(worst, self._judge(where, name, result, results))
        return worst

    def _judge(self, where: str, name: str, result: Tensor, results: Mapping[str, Tensor]) -> float:
        if name in ("bits", "taps"):
            # The bits are those of the stored result, which may be rounded to zero.
            expected = aten.pack_bits(results["y"]) if name == "bits" else self.truth[name]
            assert torch.equal(result, expected), f"{where} differ from what they have to be"
            return 0.0
        if result.dim() > 2 or name.startswith("sums"):
            result = result.double().sum(0)
        error, bound = Error.of(result, self.truth[name]), self.bound
        assert error.within(bound), f"{where} is wrong: {error}, bound {bound:.2e}"
        return max(error.rms, error.peak / PEAK_FACTOR) / bound

    @property
    def bound(self) -> float:
        length = self.problem.taps * self.problem.gemm_k
        if self.kernel in ("B1", "B2"):
            length = max(length, self.shape.gemm_m)  # of the sums over rows
        tf32 = self.device.type == "cuda" and self.problem.dtype == torch.float32
        return tolerance(self.problem.dtype, length, tf32=tf32)

    @cached_property
    def truth(self) -> dict[str, Tensor]:
        """Results of the twin in float64."""
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in self.inputs.items()}
        args, kwargs = self.arguments(doubles, None, True)
        _TWINS[self.kernel](*args, **kwargs)
        found = self.results(args, kwargs)
        return {name: t.sum(0) if t.dim() > 2 or name.startswith("sums") else t for name, t in found.items()}

    def arguments(self, inputs: Mapping[str, Tensor], tile: Tile | None, save: bool) -> Arguments:
        """The launcher's arguments around fresh outputs. tile: None for the twin's, which sums in one range."""
        return getattr(self, f"_{self.kernel.lower()}")(inputs, tile, save)

    def results(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Tensor]:
        """What a launch writes, of its arguments: matrices of rows; parts and sums with their ranges before them."""
        m = self.shape.gemm_m
        if self.kernel == "K1":
            found = {"y": args[2], "r3": args[3], "r5": args[4], "bits": args[5]}
        elif self.forward:
            found = {"y": args[2], "bits": args[3], "taps": args[4] if self.kernel == "K2" else None}
        elif self.kernel == "B1":
            return {f"g{i}": g.rows(m) for i, g in enumerate(args[2])} | {"sums": args[3]}
        elif self.kernel == "B2":
            found = {"dr": args[3]._replace(channels=kwargs["width"])}
            if args[4].channels:
                return {"dr": found["dr"].rows(m), "sums": args[4].rows(args[4].base.shape[0])}
        elif self.kernel == "B3":
            found = {"dx": args[4]}
        else:
            return {"part": args[2]}
        return {
            name: part.rows(m) if isinstance(part, ChannelSlice) else part
            for name, part in found.items()
            if part is not None
        }

    def _draw(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """The operands that the kernel reads, by name."""
        s, m = self.shape, self.shape.gemm_m
        generator = None if self.device.type == "meta" else torch.Generator(self.device).manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            t = torch.randn(size, generator=generator, device=self.device, dtype=torch.float32)
            return (t * scale).to(dtype)

        def weight(k: int, c: int, r: int = 1) -> Tensor:
            w = draw(k, c, r, r, scale=(2 / (c * r * r)) ** 0.5)
            return w.contiguous(memory_format=torch.channels_last)

        def whole(high: int, *size: int) -> Tensor:
            return torch.randint(high, size, generator=generator, device=self.device, dtype=torch.uint8)

        side = round(self.problem.taps**0.5)
        image = (s.n, s.c, s.h, s.w)
        x = {"x": lambda: draw(*image).contiguous(memory_format=torch.channels_last)}
        r = {"r": lambda: draw(m, s.r_width).relu_()}
        grads = {"grads": lambda: draw(m, s.grads_width)}
        k, c = {"K3": (s.k2, s.k2_reduce), "K4": (s.k3, s.k3_reduce)}.get(self.kernel, (s.k4, s.c))
        if self.kernel == "K1":
            groups = zip(("w1", "w2", "w3"), (s.k1, s.k2_reduce, s.k3_reduce), strict=True)
            wanted = x | {name: lambda n=n: weight(n, s.c) for name, n in groups}
            wanted |= {f"b{i}": lambda n=n: draw(n) for i, n in enumerate((s.k1, s.k2_reduce, s.k3_reduce))}
        elif self.forward:
            wanted = (x if self.kernel == "K2" else r) | {"w": lambda: weight(k, c, side), "b": lambda: draw(k)}
        elif self.kernel == "B1":
            dy = (s.n, s.k, s.h, s.w)
            wanted = {
                "dy": lambda: draw(*dy).contiguous(memory_format=torch.channels_last),
                "bits": lambda: whole(256, m, s.bits_width),
            }
        elif self.kernel == "B2":
            wanted = grads | r | {"w": lambda: draw(self._b2_place()[1], side, side, self.problem.gemm_k, scale=0.1)}
        elif self.kernel == "B3":
            wanted = grads | {
                "w": lambda: draw(s.c, s.k1 + s.r_width, scale=0.1),
                "dpool": lambda: draw(m, s.c),
                "taps": lambda: aten.pack_taps(whole(9, m, s.c)),
            }
        else:
            wanted = grads | (r if self.problem.launch in ("B4 3x3", "B4 5x5") else x)
        return {name: make() for name, make in wanted.items()}

    def _k1(self, t: Mapping[str, Tensor], tile: Tile | None, save: bool) -> Arguments:
        s = self.shape
        y, bits, _ = self._outputs(t["x"], save)
        r = t["x"].new_empty((s.gemm_m, s.r_width))
        epilogues = tuple(Epilogue(t[f"b{i}"]) for i in range(3))
        args = (self._x(t), (t["w1"], t["w2"], t["w3"]), s.y_slices(y)[0], *s.r_slices(r), bits and bits[0])
        return args, dict(gemm_m=s.gemm_m, epilogues=epilogues)

    def _k2(self, t: Mapping[str, Tensor], tile: Tile | None, save: bool) -> Arguments:
        y, bits, taps = self._outputs(t["x"], save)
        return (self._x(t), t["w"], self.shape.y_slices(y)[3], bits and bits[3], taps), self._place(t)

    def _k3(self, t: Mapping[str, Tensor], tile: Tile | None, save: bool, branch: int = 1) -> Arguments:
        y, bits, _ = self._outputs(t["r"], save)
        x = self.shape.r_slices(t["r"])[branch - 1]
        return (x, t["w"], self.shape.y_slices(y)[branch], bits and bits[branch]), self._place(t)

    def _k4(self, t: Mapping[str, Tensor], tile: Tile | None, save: bool) -> Arguments:
        return self._k3(t, tile, save, 2)

    def _b1(self, t: Mapping[str, Tensor], tile: Tile | None, save: bool) -> Arguments:
        s = self.shape
        ranges = plan.row_ranges(s.gemm_m, tile.BLOCK_M) if tile else (1, 1)
        grads = t["dy"].new_empty((s.gemm_m, s.grads_width))
        sums = self._sums(t["dy"], ranges[0], s.k)
        bits = ChannelSlice(t["bits"], s.bits_width, 0, s.bits_width)
        return (t["dy"], bits, s.g_slices(grads), sums), dict(ranges=ranges)

    def _b2_place(self) -> tuple[int, int, int]:
        """(index of g, channels of dr, first column of the sums) of this launch of B2."""
        s = self.shape
        return {"B2 3x3": (1, s.k2_reduce, 0), "B2 5x5": (2, s.k3_reduce, s.r5_offset)}.get(
            self.problem.launch, (3, s.c, 0)
        )

    def _b2(self, t: Mapping[str, Tensor], tile: Tile | None, save: bool) -> Arguments:
        s, m = self.shape, self.shape.gemm_m
        branch, channels, start = self._b2_place()
        g = s.g_slices(t["grads"])[branch]
        sums = self._sums(g.base, -(-m // tile.BLOCK_M) if tile else 1, s.r_width)
        place = dict(gemm_m=m, image=(s.h, s.w), width=self.problem.gemm_n)
        if branch == 3:
            dr = ChannelSlice(g.base.new_empty((m, s.c)), s.c, 0, s.c)
            return (g, t["w"], None, dr, ChannelSlice(sums, s.r_width, 0, 0)), place
        # Not the buffer that g is read from, as in a backward: there the places are others.
        dr = s.dr_slices(torch.empty_like(t["grads"]))[branch - 1]
        part = ChannelSlice(sums, s.r_width, start, channels)
        return (g, t["w"], s.r_slices(t["r"])[branch - 1], dr, part), place

    def _b3(self, t: Mapping[str, Tensor], tile: Tile | None, save: bool) -> Arguments:
        s = self.shape
        columns = s.reductions_slice(t["grads"], 0, s.k1 + s.r_width)
        dpool, dx = (ChannelSlice(b, s.c, 0, s.c) for b in (t["dpool"], torch.empty_like(t["dpool"])))
        return (columns, t["w"], dpool, t["taps"], dx), dict(gemm_m=s.gemm_m, image=(s.h, s.w))

    def _b4(self, t: Mapping[str, Tensor], tile: Tile | None, save: bool) -> Arguments:
        s, m = self.shape, self.shape.gemm_m
        launch, side = self.problem.launch, 1
        if launch in ("B4 3x3", "B4 5x5"):
            i = ("B4 3x3", "B4 5x5").index(launch)
            g, x = s.g_slices(t["grads"])[1 + i], s.r_slices(t["r"])[i]
            side = round((self.problem.gemm_n // x.channels) ** 0.5)
        else:
            g = (
                s.g_slices(t["grads"])[3]
                if launch == "B4 pool"
                else s.reductions_slice(t["grads"], 0, self.problem.gemm_m)
            )
            x = self._x(t)
        splits = 1
        if tile is not None:
            tiles = -(-g.channels // tile.BLOCK_M) * -(-self.problem.gemm_n // tile.BLOCK_N)
            splits = plan.split_k(tiles, -(-m // tile.BLOCK_K), self._weights())
        part = self._sums(g.base, splits, g.channels, side, side, x.channels)
        return (g, x, part), dict(pool=launch == "B4 pool", gemm_m=m, image=(s.h, s.w))

    def _weights(self) -> int:
        """Elements of the block's six weights, by which wgrad is split."""
        c = self.case.config
        windows = c.c2[0] * c.c2[1] * 9 + c.c3[0] * c.c3[1] * 25
        return (c.c1 + c.c2[0] + c.c3[0] + c.c4) * c.in_channels + windows

    def _outputs(self, like: Tensor, save: bool) -> tuple[Tensor, list[ChannelSlice] | None, Tensor | None]:
        """y, and where forward saves for backward the branches' bits and taps."""
        s = self.shape
        y = like.new_empty((s.n, s.h, s.w, s.k)).permute(0, 3, 1, 2)
        if not save:
            return y, None, None
        bits = like.new_empty((s.gemm_m, s.bits_width), dtype=torch.uint8)
        return y, s.bits_slices(bits), like.new_empty((s.gemm_m, s.taps_width), dtype=torch.uint8)

    def _sums(self, like: Tensor, *size: int) -> Tensor:
        return like.new_empty(size, dtype=torch.float64 if like.dtype == torch.float64 else torch.float32)

    def _x(self, t: Mapping[str, Tensor]) -> ChannelSlice:
        return ChannelSlice(t["x"], self.shape.c, 0, self.shape.c)

    def _place(self, t: Mapping[str, Tensor]) -> dict[str, Any]:
        return dict(gemm_m=self.shape.gemm_m, image=(self.shape.h, self.shape.w), epilogue=Epilogue(t["b"]))


_TWINS: dict[str, Callable[..., None]] = {
    "K1": aten.grouped_gemm,
    "K2": aten.pool_proj,
    "K3": aten.conv_fprop,
    "K4": aten.conv_fprop,
    "B1": aten.mask_grad,
    "B2": aten.conv_dgrad,
    "B3": aten.grouped_dgrad,
    "B4": aten.conv_wgrad,
}


def _launcher(kernel: str) -> Callable[..., None]:
    """Imported late: Triton is not everywhere, and --dry-run runs without."""
    from inception_fused import gradients, ops

    return ops._triton(kernel) if kernel[0] == "K" else gradients._triton(kernel)
