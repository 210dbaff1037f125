"""How a bug is put into the PTX of a launch: a place that is found by what the text says, and another text there.

The text differs between the versions of Triton, so a rule names no register and no line. A rule that finds no place
raises LookupError: a bug that is not there would count as caught or as missed for nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

Rule = Callable[[str], str]

LEFT_OUT = re.compile(r"[ \t]*(//|\.loc\b|\$L__tmp\d+:|\$L__func_).*\n")


def bare(ptx: str) -> str:
    """PTX without comments on lines of their own and positions in the source, so that patterns span instructions."""
    return LEFT_OUT.sub("", ptx)


def sub(pattern: str, instead: str | Callable[[re.Match[str]], str], which: int | None = 0) -> Rule:
    """The which-th match of a pattern becomes another text; None: each."""

    def rule(ptx: str) -> str:
        found = list(re.finditer(pattern, ptx, re.M))
        chosen = found if which is None else found[which : which + 1 or None]
        if not chosen:
            raise LookupError(f"{len(found)} places of {pattern!r}")
        for match in reversed(chosen):
            text = match.expand(instead) if isinstance(instead, str) else instead(match)
            ptx = ptx[: match.start()] + text + ptx[match.end() :]
        return ptx

    return rule


def drop(pattern: str, which: int | None = 0) -> Rule:
    """An instruction is missing."""
    return sub(rf"^[ \t]*(?:@!?%p\d+ )?{pattern}.*\n", "", which)


def more(pattern: str, by: int = 1, which: int | None = 0) -> Rule:
    """The number that a pattern catches is larger."""
    return sub(pattern, lambda m: m[0].replace(m[1], str(int(m[1], 0) + by)), which)


WIDER = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq"}
"""Another comparison instead of each: of numbers one that differs where they are equal."""

DEFINES = r"^[ \t]*(?:@!?%p\d+ )?(\w+)[\w.:]*[ \t]+{}(?:\|%p\d+)?, (.*);"


def comparisons(ptx: str, at: int, register: str) -> Iterator[re.Match[str]]:
    """The setp that decide a predicate, or a number that is selected by predicates, as it is before ``at``."""
    definitions = list(re.finditer(DEFINES.format(re.escape(register)), ptx, re.M))
    before = [match for match in definitions if match.start() < at] or definitions
    if not before:
        return
    last = before[-1]
    if last[1] == "setp":
        yield last
    elif last[1] in ("and", "or", "not", "selp", "mov"):
        names = re.findall(r"%p\d+|%r\d+", last[2]) if last[1] in ("selp", "mov") else re.findall(r"%p\d+", last[2])
        for name in names:
            yield from comparisons(ptx, last.start(), name)


def mask(access: str, register: str, which: int | None = 0, pick: int = 0) -> Rule:
    """A comparison that decides whether an access happens is another one (WIDER).

    access: pattern of the instruction, whose which-th match it is (None: each). register: pattern, with a group, of the
    register in its text that guards it. pick: which of the comparisons behind that.
    """

    def rule(ptx: str) -> str:
        found = [place for place in re.finditer(rf"^.*{access}.*$", ptx, re.M) if re.search(register, place[0])]
        if not found:
            raise LookupError(f"nothing guards {access!r}")
        chosen = {}
        for place in found if which is None else [found[which]]:
            guards = list(comparisons(ptx, place.start(), re.search(register, place[0])[1]))
            chosen |= {guard.start(): guard for guard in guards[pick : pick + 1 or None]}
        if not chosen:
            raise LookupError(f"no comparison {pick} behind {access!r}")
        for _, setp in sorted(chosen.items(), reverse=True):
            changed = re.sub(r"setp\.(\w+)", lambda m: f"setp.{WIDER[m[1]]}", setp[0], count=1)
            ptx = ptx[: setp.start()] + changed + ptx[setp.end() :]
        return ptx

    return rule


def store_mask(which: int | None = 0, pick: int = 0, access: str = r"st\.global\.v4") -> Rule:
    return mask(access, r"@!?(%p\d+)", which, pick)


def copy_mask(which: int | None = 0, pick: int = 0) -> Rule:
    """Of cp.async, whose last operand is how many bytes are read."""
    return mask(r"cp\.async\.c[ag]\.shared", r", (%r\d+);", which, pick)
