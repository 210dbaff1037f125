"""Bugs seeded in the PTX of launches (bug_list.py) are noticed, and go where they are meant to."""

import pytest

from bug_list import BUGS, NANS, Bug
from bug_rules import bare, copy_mask, drop, more, store_mask, sub
from marks import more as left_to_full


def _bugs(beside, folder) -> dict:
    """The verdicts of ptx_bugs.py, by a bug's id."""
    return beside.findings("ptx/ptx_bugs.py", folder, *([] if beside.full else ["--quick"]))


BESIDE = {"bugs": _bugs}


@pytest.fixture(scope="module")
def bugs(beside) -> dict:
    return beside.result("bugs")


@pytest.mark.parametrize("bug", [bug if bug.quick else left_to_full(bug) for bug in BUGS], ids=lambda bug: bug.id)
def test_a_bug_is_noticed(bugs, bug):
    assert bugs[bug.id]["right"], bugs[bug.id]["found"]


def test_what_the_list_covers():
    real = [bug for bug in BUGS if not bug.equivalent]
    assert len({bug.id for bug in BUGS}) == len(BUGS)
    assert len(real) >= 89
    assert len(BUGS) - len(real) <= 2
    assert {bug.capability for bug in real} == {80, 90}
    assert {bug.kernel.split()[0] for bug in real} == {
        "pack", "grouped_gemm", "pool_proj", "conv_fprop", "pack_dgrad", "mask_grad", "conv_dgrad", "grouped_dgrad",
        "conv_wgrad", "reduce", "norm_stats", "norm_combine", "norm_apply", "norm_grad_stats", "norm_grad_combine",
        "norm_grad_apply",
    }  # fmt: skip
    for bug in BUGS:
        # What is no bug on normal data is one with NaNs.
        assert not bug.equivalent or any(other.data == NANS and other.kernel == bug.kernel for other in real)


TEXT = """
	.loc	1 46 0                          // a.py:46:0
	setp.lt.s32 	%p1, %r1, %r2;
// %bb.0:
	setp.gt.s32 	%p2, %r3, 63;
	and.pred 	%p3, %p1, %p2;
	selp.b32 	%r4, 16, 0, %p1;
	selp.b32 	%r5, %r4, 0, %p2;
	cp.async.cg.shared.global [ %r9 + 0 ], [ %rd1 + 0 ], 0x10, %r5;
	cp.async.wait_group 	2;
	bar.sync 	0;
	@%p3 st.global.v4.b32 [ %rd2 + 0 ], { %r6, %r7, %r8, %r9 };
	setp.lt.s32 	%p1, %r1, %r9;
"""


@pytest.mark.parametrize(("rule", "old", "new"), [
    (drop(r"bar\.sync"), "\tbar.sync \t0;\n", ""),
    (drop(r"st\.global"), "\t@%p3 st.global.v4.b32 [ %rd2 + 0 ], { %r6, %r7, %r8, %r9 };\n", ""),
    (more(r"wait_group[ \t]+(\d+)"), "wait_group \t2", "wait_group \t3"),
    (store_mask(), "setp.lt.s32 \t%p1, %r1, %r2", "setp.le.s32 \t%p1, %r1, %r2"),
    (store_mask(pick=1), "setp.gt", "setp.ge"),
    (copy_mask(), "setp.lt.s32 \t%p1, %r1, %r2", "setp.le.s32 \t%p1, %r1, %r2"),
    (copy_mask(pick=-1), "setp.gt", "setp.ge"),
    (sub(r"setp\.lt", "setp.ge", -1), "setp.lt.s32 \t%p1, %r1, %r9", "setp.ge.s32 \t%p1, %r1, %r9"),
    (sub(r"%r9", "%r8", None), "%r9", "%r8"),
])  # fmt: skip
def test_a_rule_changes_its_place_and_no_other(rule, old, new):
    text = bare(TEXT)
    assert ".loc" not in text
    assert rule(text) == text.replace(old, new)
    assert rule(text) != text


@pytest.mark.parametrize(
    "rule", [drop(r"mma\.sync"), store_mask(access="st.shared"), store_mask(pick=2), sub("bar", "bar", 1)]
)
def test_a_rule_without_a_place_is_an_error(rule):
    with pytest.raises(LookupError):
        rule(bare(TEXT))
    with pytest.raises(LookupError, match="changes nothing"):
        Bug("none", "pack 1", 80, sub("bar", "bar")).apply(bare(TEXT))
