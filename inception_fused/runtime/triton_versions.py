"""Which Tritons go with which torch, which are wrong or slow on which GPUs, and the ptxas that Triton would use."""

from __future__ import annotations

import re
from inspect import signature
from typing import Any, NamedTuple

PINS = (
    ("2.9.0", "3.5.0"),
    ("2.9.1", "3.5.1"),
    ("2.10", "3.6.0"),
    ("2.11", "3.6.0"),
    ("2.12.0", "3.7.0"),
    ("2.12.1", "3.7.1"),
    ("2.14", "3.8"),
)
"""(torch, the Triton that its wheels for CUDA ask for): first parts of their versions. Any other pair runs too."""


class Limit(NamedTuple):
    """What is known against a Triton on a GPU. kind: "wrong" (its results; it is refused) or "slow" (one warning).

    triton: (major, minor), first and last; capability: of GPUs, first and last, None for all that follow. sentence:
    what is wrong, or how slow with a figure, to follow "Triton 3.6.0 "; remedy: what brings another.
    """

    kind: str
    triton: tuple[tuple[int, int], tuple[int, int]]
    capability: tuple[tuple[int, int], tuple[int, int] | None]
    sentence: str
    remedy: str

    def holds(self, triton: tuple[int, int], capability: tuple[int, int]) -> bool:
        (first, last), (oldest, newest) = self.triton, self.capability
        return first <= triton <= last and oldest <= capability and (newest is None or capability <= newest)


LIMITS = (
    Limit(
        "wrong",
        ((0, 0), (3, 4)),
        ((0, 0), None),
        "is older than 3.5, the first that the kernels are compiled and checked with",
        'pip install "torch>=2.10", which brings a newer one',
    ),
    Limit(
        "wrong",
        ((3, 5), (3, 6)),
        # Those with tcgen05; sm_120 multiplies with mma.sync, as sm_80 does.
        ((10, 0), (11, 9)),
        "has races of its own on sm_100 to sm_110, which spoil results (triton-lang/triton#9871, "
        "pytorch/pytorch#181248)",
        'pip install "torch>=2.12", which brings Triton 3.7 or newer',
    ),
)
"""Whatever is added here is refused or warned of, and reported, without another line."""


def release(version: str) -> tuple[int, int]:
    """(major, minor) of a version such as "3.6.0+git1234". Raises ValueError for one that does not begin with them."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if found is None:
        raise ValueError(f"got version {version!r}, wants one that begins like 3.6")
    return int(found[1]), int(found[2])


def limit(kind: str, triton: str, capability: tuple[int, int]) -> str | None:
    """What LIMITS says of this kind ("wrong" or "slow") against a Triton on a GPU, with the remedy; None for nothing.

    A version that cannot be read has nothing against it.
    """
    try:
        version = release(triton)
    except ValueError:
        return None
    found = [entry for entry in LIMITS if entry.kind == kind and entry.holds(version, capability)]
    return ". ".join(f"Triton {triton} {entry.sentence}; {entry.remedy}" for entry in found) or None


def is_known(torch: str, triton: str) -> bool:
    """Whether a torch and a Triton are one of PINS."""
    return any(_begins(torch, ours) and _begins(triton, theirs) for ours, theirs in PINS)


def describe_pair(torch: str, triton: str | None) -> str:
    """What the table says of a pair, in one line."""
    if triton is None:
        return f"torch {torch} without Triton"
    known = "in" if is_known(torch, triton) else "not in"
    return f"torch {torch} with Triton {triton}: {known} the table of pairs that the wheels of torch ask for"


def ptxas_tool(arch: int, compiler: Any) -> Any:
    """Triton's ptxas for sm_``arch``, with version and path. compiler: triton.backends.nvidia.compiler."""
    # Triton 3.5 has one for all architectures, 3.9 one for sm_80 to sm_89.
    return compiler.get_ptxas(*([arch] if signature(compiler.get_ptxas).parameters else []))


def ptxas(arch: int = 80) -> str | None:
    """The ptxas that Triton would use for sm_``arch``: version and path, or why there is none; None without Triton."""
    try:
        from triton.backends.nvidia import compiler
    except Exception as error:  # no Triton; or one that is broken, which must not break a report
        return None if isinstance(error, ModuleNotFoundError) else f"none: {type(error).__name__}: {error}"
    try:
        tool = ptxas_tool(arch, compiler)
    except Exception as error:
        return f"none: {type(error).__name__}: {error}"
    return f"{tool.version} for sm_{arch} ({tool.path})"


def _begins(version: str, part: str) -> bool:
    numbers, wanted = version.partition("+")[0].split("."), part.split(".")
    return numbers[: len(wanted)] == wanted
