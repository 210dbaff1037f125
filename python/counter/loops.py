"""A step of a launch's main loop: how long its integer instructions, its product and its operands keep their units.

The gate in tests/aot refuses a loop whose integer instructions outlast both others: no card would then see its matrix
units or its L2 busy. Cycles of one multiprocessor and one program, of the card that stands for the architecture.
"""

from __future__ import annotations

from typing import NamedTuple

from inception_fused.block.views import Tile
from inception_fused.plan import launches, traffic
from inception_fused.plan.cards import A100, H200, RTX_4090
from inception_fused.plan.counts import MACS_UNIT, Binary
from inception_fused.plan.problems import Launch

CARDS = {80: A100, 89: RTX_4090, 90: H200}
"""By the architecture that a card stands for."""


class Step(NamedTuple):
    """Cycles of a trip through the main loop. l2: of the bytes of whole tiles at the multiprocessor's share of L2."""

    integer: float
    tensor: float
    l2: float

    @property
    def excess(self) -> float:
        """Integer instructions over the longer of the two others: more than 1 is refused."""
        return self.integer / max(self.tensor, self.l2)


def step(problem: Launch, tile: Tile, binary: Binary) -> Step | None:
    """Of a binary; None without a main loop, or on an architecture that no card stands for."""
    main, card = binary.main, CARDS.get(binary.capability)
    if main is None or card is None:
        return None
    precision = "tf32" if problem.shape.itemsize == 4 else "bf16"
    macs_a_cycle = card.flops[precision] / 2 / card.multiprocessors / card.clock
    bytes_a_cycle = card.l2 / card.multiprocessors / card.clock
    m, n, width = tile.BLOCK_M, tile.BLOCK_N, problem.shape.w
    if problem.row.pooled and problem.row.role == launches.FPROP:
        m *= traffic.window_reads(tile.BLOCK_M, width, binary.through_l1)
    if problem.row.pooled and problem.row.role == launches.WGRAD:
        n *= traffic.window_reads(tile.BLOCK_K, width, binary.through_l1)
    return Step(
        32 * main.of("alu") * tile.num_warps / card.multiprocessor.alu,
        main.of("macs") * MACS_UNIT * tile.num_warps / macs_a_cycle,
        (m + n) * tile.BLOCK_K * problem.shape.itemsize / bytes_a_cycle,
    )
