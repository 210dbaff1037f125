"""What a seeded fault is: one piece of text of the package replaced, and the tests that should see it."""

from __future__ import annotations

from typing import NamedTuple

KERNEL_KINDS = ("guard", "stride", "mask", "accumulation", "store")
"""Bounds and borders; addresses; which values pass; sums; what is written where."""

GLUE_KINDS = ("saved", "order", "dtype", "needs", "format", "key", "probe", "fold", "limit", "path")
"""What is kept for a backward; of launches; of tensors; subsets of gradients; memory; of a launch that is remembered;
what is accepted; of BatchNorm; of 32 bits; which way a call takes."""


class Fault(NamedTuple):
    """``old``, which must occur exactly once in ``file``, becomes ``new``. tests: files or node ids, run in this order
    until one fails."""

    name: str
    file: str
    kind: str
    old: str
    new: str
    breaks: str
    tests: tuple[str, ...]

    def apply(self, text: str) -> str:
        """The text of the file with the fault in it. Raises ValueError where there is not one place for it."""
        if text.count(self.old) != 1:
            raise ValueError(f"{self.name}: its text occurs {text.count(self.old)} times in {self.file}, not once")
        return text.replace(self.old, self.new)


PACKAGE, TESTS = "inception_fused/", "tests/"


def fault(name: str, file: str, kind: str, old: str, new: str, breaks: str, *tests: str) -> Fault:
    """file: inside the package; tests: inside tests."""
    return Fault(name, PACKAGE + file, kind, old, new, breaks, tuple(TESTS + test for test in tests))
