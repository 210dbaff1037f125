"""What :func:`inception_fused.explain` returns: a table of the blocks of a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One block, or what looks like one. name: in the model, "" for the model itself; kind: its class's name.

    state: "fused" (built so), "converted" or "not converted"; what: its variant, in words; path: what runs it now, or
    why it is not converted.
    """

    name: str
    kind: str
    state: str
    what: str
    path: str


@dataclass(frozen=True)
class Explanation:
    """``print`` shows it as a table. rows: one :class:`Row` a block."""

    rows: tuple[Row, ...]

    @property
    def converted(self) -> int:
        """Blocks that are converted or were built fused."""
        return sum(row.state != "not converted" for row in self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "nothing in this model looks like an Inception block"
        head = ("block", "class", "state", "variant", "runs, or why not")
        cells = [head, *((row.name or "(the model)", *row[1:]) for row in self.rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(head) - 1)]
        lines = []
        for line in cells:
            padded = [cell.ljust(width) for cell, width in zip(line, widths, strict=False)]
            lines.append("  ".join([*padded, line[-1]]).rstrip())
        return "\n".join(
            [*lines, f"{self.converted} of {len(self.rows)} run as fused blocks where the kernels can run"]
        )

    def to_json(self) -> list[dict[str, Any]]:
        """The rows as dicts."""
        return [row._asdict() for row in self.rows]
