"""The launches of a block, forward and backward: one table, a row each.

    pack   parameters cast, permuted to KRSC, BatchNorm folded     where they need it
    K1     grouped GEMM of the 1x1 reductions                      x  -> y's first slice, r3, r5
    K2     3x3 max-pool + 1x1                                      x  -> y's last slice, taps
    K3     3x3 convolution                                         r3 -> y's second slice
    K4     5x5 (or 3x3) convolution                                r5 -> y's third slice
           of two 3x3                                              r5 -> t, t -> y's third slice

    pack   weights transposed, flipped and cast
    B1     mask and bias sums                                      dy, bits -> g = [g2 | g3 | g4 | g1]
    B2     dgrad: 3x3, 5x5 (or 3x3), 1x1 of branch 4               g2, r3 -> dr3;  g3, r5 -> dr5;  g4 -> dpool
           of two 3x3                                              g3, t -> dt;  dt, r5 -> dr5
    B3     grouped 1x1 dgrad + the max-pool's gradient             [g1 | dr3 | dr5], dpool, taps -> dx
    B4     wgrad, split over pixels: 1x1, 3x3, 5x5, pool          [g1 | dr3 | dr5], x;  g2, r3;  g3, r5;  g4, x -> sums
    B5     parts added up                                          -> dw, db

GoogLeNet's stem, a 1x1 and a 3x3 convolution, has the rows of one branch, the 1x1 in K4's and B2's kernels:

    pack, K4 1x1, K3; pack, B1, B2 3x3, B2 1x1 (x's), B4 1x1, B4 3x3, B5

and where BatchNorm takes the statistics of the batch, K1 to K4 write raw values and then, of r, t and y each:

    N1     partial statistics                                      raw -> parts
    N2     parts combined                                          -> mean, var, scale, shift
    N3     normalised, ReLU                                        raw -> r, t, y

    N4     in the place of B1: partial sums                        dy, raw -> sums of g and of g * raw
    N5     sums combined; of dr and dt they are B2's               -> d gamma, d beta, coefficients
    N6     the gradient of what was normalised                     dy, raw -> g;  dr, raw -> dr;  dt, raw -> dt

A :class:`Row` is one launch of a kernel (kernel_table.py): its role and the convolutions it computes, which say its
GEMM, what it reads and writes, and so FLOP and bytes (problems.py). Operators, plan, floors, forecast, tuner,
benchmarks and ``explain`` read this table; a variant of the block has its own (:func:`table_of`), of the same kernels
and rules.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from inception_fused.block import chains
from inception_fused.plan.kernel_table import BLOCK_KERNELS, Kernel

PACK, FPROP, MASK, DGRAD, DGRAD_X, WGRAD, SUM = "pack", "fprop", "mask", "dgrad", "dgrad of x", "wgrad", "sum"
"""Roles: what a launch does with its convolutions. "dgrad of x" is that of all reductions, and of the pool."""

GEMMS = (FPROP, DGRAD, DGRAD_X, WGRAD)

STATISTICS, COMBINE, NORMALISE = "statistics", "combine", "normalise"
"""Roles of BatchNorm in training, in a backward those of its gradients."""

NORMS = (STATISTICS, COMBINE, NORMALISE)
COUNTED = (*GEMMS, *NORMS)
"""Launches whose time goes by the instructions of their binaries too, not by their bytes alone."""

_NAMED = {(kernel.name, kernel.direction): kernel for kernel in BLOCK_KERNELS}
_CONVS = {conv.name: conv for variant in chains.VARIANTS.values() for conv in variant.convs}


class Row(NamedTuple):
    """One launch. name: among those of its pass; convs: the convolutions it computes; rules: key of its tiles, "" where
    the launcher has its own; centred: whether a dgrad also sums what BatchNorm's gradient needs."""

    name: str
    kernel: Kernel
    role: str
    convs: tuple[str, ...]
    rules: str = ""
    centred: bool = False

    @property
    def direction(self) -> str:
        return self.kernel.direction

    @property
    def pooled(self) -> bool:
        """Whether x passes the max-pool before the convolutions."""
        return _CONVS[self.convs[0]].role == chains.PROJECTION

    @property
    def reads_x(self) -> bool:
        return self.role in (FPROP, WGRAD) and all(_CONVS[conv].role != chains.WINDOW for conv in self.convs)


def _row(kernel: str, direction: str, role: str, convs: Iterable[str], suffix: str = "", rules: str = "") -> Row:
    return Row(f"{kernel} {suffix}".strip(), _NAMED[kernel, direction], role, tuple(convs), rules or kernel)


class Normed(NamedTuple):
    """The rows that normalise some columns, or compute the gradients of that. statistics: None where they are B2's."""

    statistics: Row | None
    combine: Row
    normalise: Row

    @property
    def rows(self) -> tuple[Row, ...]:
        return _there(*self)


class Forward(NamedTuple):
    """The rows of a forward; projection: None where there is no pool; windows: one for each of chains.windows().
    normed: with the statistics of the batch, of each of batch_stats.columns_of() in that order, else none."""

    pack: Row
    reductions: Row
    projection: Row | None
    windows: tuple[Row, ...]
    normed: tuple[Normed, ...] = ()

    @property
    def in_order(self) -> tuple[Row, ...]:
        inner, ends = [norm.rows for norm in self.normed[:-1]], [norm.rows for norm in self.normed[-1:]]
        first = _there(self.pack, self.reductions, self.projection)
        if len(inner) < 2:
            return (*first, *_flat(inner), *self.windows, *_flat(ends))
        # Between branch 3's windows lies t.
        return (*first, *inner[0], *self.windows[:-1], *inner[1], self.windows[-1], *_flat(ends))


class Backward(NamedTuple):
    """The rows of a backward: of dgrad those behind the windows, in the order in which one needs the other, and behind
    the projection, that of x; of wgrad those of the reductions, the windows, the projection. Those of a projection are
    None where there is no pool. mask: None where BatchNorm takes the statistics of the batch, whose rows normed has in
    the order of a backward: of y, t, r."""

    pack: Row
    mask: Row | None
    dgrad_windows: tuple[Row, ...]
    dgrad_projection: Row | None
    dgrad_x: Row
    wgrad_reductions: Row
    wgrad_windows: tuple[Row, ...]
    wgrad_projection: Row | None
    total: Row
    normed: tuple[Normed, ...] = ()

    @property
    def in_order(self) -> tuple[Row, ...]:
        ends, inner = [norm.rows for norm in self.normed[:1]], [norm.rows for norm in self.normed[1:]]
        windows = list(self.dgrad_windows)
        if len(inner) > 1:
            # dt has to be complete before dr5 is made of it: it is the second of the windows' gradients.
            windows[2:2] = inner[0]
        masks = (self.mask,) if self.mask is not None else _flat(ends)
        dgrad = (*windows, *_flat(inner[-1:]), *_there(self.dgrad_projection, self.dgrad_x))
        wgrad = _there(self.wgrad_reductions, *self.wgrad_windows, self.wgrad_projection)
        return (self.pack, *masks, *dgrad, *wgrad, self.total)


def _there(*rows: Row | None) -> tuple[Row, ...]:
    return tuple(row for row in rows if row is not None)


def _flat(groups: Iterable[tuple[Row, ...]]) -> tuple[Row, ...]:
    return tuple(row for group in groups for row in group)


class Table(NamedTuple):
    """The launches of a variant. rows, names: every launch of a pass, "forward" or "backward", in the order in which
    they are made."""

    forward: Forward
    backward: Backward
    rows: dict[str, tuple[Row, ...]]
    names: dict[str, tuple[str, ...]]


def _table(variant: chains.Variant, normed: bool) -> Table:
    names = variant.names
    reductions, windows, projection = chains.reductions(names), chains.windows(names), chains.projection(names)
    # Behind branch 2's window stand branch 3's. "5x5" is 3x3 where branch 3 is.
    twice = ("first", "second") if len(windows) > 2 else ()

    def window_rows(kernels: tuple[str, str], direction: str, role: str, suffixes: tuple[str, str]) -> tuple[Row, ...]:
        second, third = kernels
        # Of a part of a block the first windows alone.
        named = zip(windows, (second, third, third), (suffixes[0], *(twice or suffixes[1:])), strict=False)
        return tuple(_row(kernel, direction, role, (conv,), suffix) for conv, kernel, suffix in named)

    def norms(direction: str, statistics: str, combine: str, normalise: str) -> list[Normed]:
        """Of y, then of what lies inside, t before r."""
        inside = [names[i] for i in variant.inner if i not in variant.reductions]
        parts = [("y", chains.ends(names)), *([("t", inside)] if inside else []), ("r", reductions[1:])]
        return [
            Normed(
                _row(statistics, direction, STATISTICS, convs, name),
                Row(f"{combine} {name}", _NAMED[combine, direction], COMBINE, tuple(convs)),
                _row(normalise, direction, NORMALISE, convs, name),
            )
            for name, convs in parts
            if normed
        ]

    def pooled(kernel: str, direction: str, role: str, suffix: str = "", rules: str = "") -> Row | None:
        return _row(kernel, direction, role, (projection,), suffix, rules) if projection is not None else None

    # One convolution that alone reads x is a window of one tap, forward and backward, and needs no binary of its own.
    group, alone = _row("K1", "forward", FPROP, reductions), _row("K4", "forward", FPROP, reductions, "1x1")
    group_dgrad = _row("B3", "backward", DGRAD_X, reductions)
    alone_dgrad = _row("B2", "backward", DGRAD, reductions, "1x1", "B2 1x1")
    forward = Forward(
        pack=Row("pack", _NAMED["pack", "forward"], PACK, names),
        reductions=group if projection is not None else alone,
        projection=pooled("K2", "forward", FPROP),
        windows=window_rows(("K3", "K4"), "forward", FPROP, ("", "")),
        normed=tuple(reversed(norms("forward", "N1", "N2", "N3"))),
    )
    dgrad, *later = window_rows(("B2", "B2"), "backward", DGRAD, ("3x3", "5x5"))
    ends, inner = (found := norms("backward", "N4", "N5", "N6"))[:1], found[1:]
    backward = Backward(
        pack=Row("pack", _NAMED["pack", "backward"], PACK, names),
        mask=None if normed else _row("B1", "backward", MASK, names),
        dgrad_windows=tuple(row._replace(centred=normed) for row in (dgrad, *reversed(later))),
        dgrad_projection=pooled("B2", "backward", DGRAD, "1x1", "B2 1x1"),
        dgrad_x=group_dgrad if projection is not None else alone_dgrad,
        wgrad_reductions=_row("B4", "backward", WGRAD, reductions, "1x1"),
        wgrad_windows=window_rows(("B4", "B4"), "backward", WGRAD, ("3x3", "5x5")),
        wgrad_projection=pooled("B4", "backward", WGRAD, "pool", "B4 pool"),
        total=Row("B5", _NAMED["B5", "backward"], SUM, names),
        normed=(*ends, *(norm._replace(statistics=None) for norm in inner)),
    )
    rows = {"forward": forward.in_order, "backward": backward.in_order}
    return Table(forward, backward, rows, {direction: tuple(row.name for row in rows[direction]) for direction in rows})


TABLES = {variant.count: _table(variant, normed=False) for variant in chains.VARIANTS.values()}
NORMED_TABLES = {variant.count: _table(variant, normed=True) for variant in chains.BLOCKS.values()}


def table_of(values: Sequence[object], *, normed: bool = False) -> Table:
    """The table of a variant. values: a list of one value a convolution. normed: BatchNorm takes the batch's
    statistics."""
    return (NORMED_TABLES if normed else TABLES)[len(values)]


USUAL = table_of(chains.USUAL.names)
"""Of GoogLeNet's blocks."""

ROWS, NAMES = USUAL.rows, USUAL.names

WGRAD_RULES = frozenset(row.rules for row in ROWS["backward"] if row.role == WGRAD)
"""Keys of tiles whose GEMM_K are the pixels."""
